"""Simulated frames beside real ones: spectra, grey levels, noise against level.

    python benchmarks/realism.py                     a minute; files its result in results/
    python benchmarks/realism.py --quick             one recording a kind, files nothing
    python benchmarks/realism.py --json out.json
    python benchmarks/realism.py --pictures folder   frames side by side, to look at

The real frames are those of the folder HPC_XVR_REALDATA (or ../shared/realdata): not part of this
repository, and only curves of them are filed. All frames are scaled to their 99.5th percentile.
Noise is what a second-difference mask leaves, by the quietest fifth of the blocks of each grey
level: fine-grained noise only, in real and simulated frames alike. For recordings of things that
stand still, it is the difference of successive frames, by the quietest fifth of the pixels.

Laser melting is compared like with like: spectra agree within 2 dB (sharp camera) and 4 dB
(HPV-X2), noise within 15 %. What still differs: real plates transmit more where the alloy is
lighter, melt pools have finer and less regular outlines, and powder lies flatter between two walls.
The real spray is of an x-ray tube: blurred, noisy, without fringes and with sheets of liquid, which
the simulated one lacks. The real foam is seen in visible light, overexposed, so that only the shape
of its spectrum means something. There is no real crack or insect to compare with.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import click
import h5py
import matplotlib
import numpy as np
from scipy.ndimage import convolve
from scipy.stats import wasserstein_distance

from filing import RESULTS
from hpc_xvr.data.cameras import open_camera_file
from hpc_xvr.data.simulate.experiment import Experiment

matplotlib.use("Agg")
from matplotlib import pyplot as plt

REAL = Path(os.environ.get("HPC_XVR_REALDATA", Path(__file__).parents[2] / "shared" / "realdata"))
MASK = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6
BLOCK = 12
BINS = 24
LEVELS = np.linspace(0.05, 1.0, 20)
REAL_COLOURS = ("#111111", "#777777", "#aaaaaa")
SIMULATED = "#0a7d8c"


@dataclass(frozen=True)
class Kind:
    """Real frames and the simulated ones to compare them with."""

    title: str
    real: tuple[str, ...]
    scene: str
    size: tuple[int, int]
    camera: str = "sa-z"


KINDS = {
    "keyhole_sharp": Kind(
        "laser melting, sharp camera",
        (
            "tomobank_xfusion_png/rad_00001h.png",
            "tomobank_xfusion_png/rad_00003_high_res.png",
        ),
        "keyhole",
        (400, 1024),
    ),
    "keyhole_fast": Kind(
        "laser melting, HPV-X2",
        ("tomobank_xfusion_png/rad_00003_low_res.png",),
        "keyhole",
        (248, 400),
        "hpv-x2",
    ),
    "spray": Kind(
        "spray (real: x-ray tube)",
        tuple(
            f"spray_xray_cc0/spray_polychromatic_Re-10600_frame0.hdf5::Camera{i}" for i in (1, 2, 3)
        ),
        "spray",
        (512, 512),
    ),
    "foam": Kind("foam (real: visible light)", ("trackpy_foam",), "bubbles", (512, 512)),
}
STILL = {
    "synchrotron, 2-BM": "aps_2bm_radiography",
    "SA-Z, visible light (a beam moves)": "pyidi_showcase/data_showcase.cih",
}


def real_frame(name: str) -> np.ndarray:
    """The first frame of a real recording, scaled; of the spray, its transmission."""
    path, _, dataset = name.partition("::")
    if not dataset:
        return scaled(next(iter(open_camera_file(REAL / path).frames())))
    background = REAL / Path(path).with_name("spray_polychromatic_background.hdf5")
    with h5py.File(REAL / path) as file, h5py.File(background) as fields:
        raw, flat, dark = (
            a[:].astype(float)
            for a in (file[dataset], fields[f"flat/{dataset}"], fields[f"dark-current/{dataset}"])
        )
    inside = (slice(64, 448), slice(64, 448))  # of the window, which is round
    return scaled(((raw - dark) / np.maximum(flat - dark, 50))[inside])


def scaled(frame: np.ndarray) -> np.ndarray:
    return frame / np.percentile(frame, 99.5)


def simulated_frame(kind: Kind, seed: int) -> np.ndarray:
    experiment = Experiment(kind.scene, (2, *kind.size), seed, camera=kind.camera, lr_stream=False)
    return scaled(list(experiment.frames())[1])


def spectrum(frame: np.ndarray) -> np.ndarray:
    """Power (dB) of the contrast by spatial frequency, 0 to 0.5 cycles a pixel in BINS rings."""
    window = np.hanning(frame.shape[0])[:, None] * np.hanning(frame.shape[1])
    power = np.abs(np.fft.rfft2((frame / frame.mean() - 1) * window)) ** 2 / (window**2).sum()
    k = np.hypot(np.fft.fftfreq(frame.shape[0])[:, None], np.fft.rfftfreq(frame.shape[1]))
    ring = np.minimum((k * 2 * BINS).astype(int), BINS)
    sums = np.bincount(ring.ravel(), power.ravel())[:BINS]
    return 10 * np.log10(sums / np.bincount(ring.ravel())[:BINS])


def noise_in_space(frame: np.ndarray) -> np.ndarray:
    """Noise at each of LEVELS, from the smoothest fifth of the blocks; NaN where there are few."""
    height, width = (n - n % BLOCK for n in frame.shape)

    def blocks(image: np.ndarray) -> np.ndarray:
        parts = image[:height, :width].reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK)
        return parts.swapaxes(1, 2).reshape(-1, BLOCK**2)

    level = blocks(frame).mean(1)
    sigma = 1.4826 * np.median(np.abs(blocks(convolve(frame, MASK))), axis=1)
    return by_level(level, sigma, 12)


def noise_in_time(frames: np.ndarray) -> np.ndarray:
    """The same from the differences of frames (T, H, W) of something that stands still."""
    sigma = 1.4826 / np.sqrt(2) * np.median(np.abs(np.diff(frames, axis=0)), axis=0)
    return by_level(frames.mean(0).ravel(), sigma.ravel(), 50)


def by_level(level: np.ndarray, sigma: np.ndarray, least: int) -> np.ndarray:
    bin_of = np.abs(level[:, None] - LEVELS).argmin(1)
    out = np.full(len(LEVELS), np.nan)
    for i in range(len(LEVELS)):
        here = sigma[(bin_of == i) & (sigma > 0)]
        if len(here) >= least:
            out[i] = np.quantile(here, 0.2)
    return out


def still_frames(name: str | None) -> np.ndarray:
    """Frames (T, H, W) of a real recording, or of a simulated step wedge."""
    if name is not None:
        frames = np.stack(list(open_camera_file(REAL / name).frames()))[:20].astype(float)
    else:
        experiment = Experiment("crack", (10, 192, 192), seed=1, lr_stream=False)
        wedge = np.repeat(np.linspace(0.02, 3, 12), 16) / experiment.line.attenuation
        thickness = np.tile(wedge.astype(np.float32), (192, 1))
        experiment.sample.thickness = lambda t: thickness
        frames = np.stack(list(experiment.frames())).astype(float)
    return frames / np.percentile(frames, 99.5)


def merits(name: str, real: list[np.ndarray], made: list[np.ndarray]) -> dict[str, float]:
    """How far simulated frames are from real ones; 0 or 1 is the same."""
    theirs, ours = (np.median([spectrum(f) for f in fs], axis=0) for fs in (real, made))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # levels that no frame has
        noise_real, noise_made = (
            np.nanmedian([noise_in_space(f) for f in fs], axis=0) for fs in (real, made)
        )
    sample = [np.concatenate([f.ravel()[::7] for f in fs]) for fs in (real, made)]

    def rolloff(s: np.ndarray) -> float:
        return float(s[int(0.4 * 2 * BINS)] - s[int(0.1 * 2 * BINS)])

    return {
        f"{name}_spectrum_rms_db": float(np.sqrt(np.mean((theirs - ours)[1:] ** 2))),
        f"{name}_rolloff_db_real": rolloff(theirs),
        f"{name}_rolloff_db_simulated": rolloff(ours),
        f"{name}_grey_level_distance": float(wasserstein_distance(*sample)),
        f"{name}_noise_ratio": float(np.nanmedian(noise_made / noise_real)),
        f"{name}_noise_slope_real": slope(noise_real),
        f"{name}_noise_slope_simulated": slope(noise_made),
    }


def slope(noise: np.ndarray) -> float:
    """Exponent of noise against level: 0.5 for photons alone."""
    there = np.isfinite(noise) & (noise > 0)
    if there.sum() < 2:
        return float("nan")
    return float(np.polyfit(np.log(LEVELS[there]), np.log(noise[there]), 1)[0])


def figure(title: str, panels: int) -> tuple[plt.Figure, list[plt.Axes]]:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    columns = (panels + 1) // 2
    fig, axes = plt.subplots(2, columns, figsize=(3.6 * columns, 5.6), layout="constrained")
    fig.suptitle(title, fontsize=11)
    return fig, list(axes.ravel())


def curves(
    axis: plt.Axes, x: np.ndarray, real: dict[str, np.ndarray], made: list[np.ndarray]
) -> None:
    """Real ones in greys; of the simulated ones the range and the middle."""
    for (label, y), colour in zip(real.items(), REAL_COLOURS, strict=False):
        axis.plot(x, y, color=colour, lw=1.3, label=label)
    some = np.isfinite(made).any(axis=0)
    stack = np.array(made)[:, some]
    axis.fill_between(x[some], np.nanmin(stack, 0), np.nanmax(stack, 0), color=SIMULATED, alpha=0.2)
    label = "simulated, range and median"
    axis.plot(x[some], np.nanmedian(stack, 0), color=SIMULATED, lw=1.6, label=label)
    axis.legend(frameon=False, fontsize=7)


def label_of(name: str) -> str:
    return f"real, {Path(name.partition('::')[0]).stem if '::' not in name else name[-7:]}"


def draw(frames: dict[str, tuple[dict[str, np.ndarray], list[np.ndarray]]], folder: Path) -> None:
    """One picture a measure."""
    k = (np.arange(BINS) + 0.5) / (2 * BINS)
    fig, axes = figure("Power spectra of contrast", len(frames))
    for axis, (name, (real, made)) in zip(axes, frames.items(), strict=True):
        curves(axis, k, {n: spectrum(f) for n, f in real.items()}, [spectrum(f) for f in made])
        axis.set(title=KINDS[name].title, xlabel="cycles / pixel", ylabel="power (dB)")
    fig.savefig(folder / "realism-spectra.png", dpi=130)

    edges = np.linspace(0, 1.2, 61)
    fig, axes = figure("Grey levels, share of pixels", len(frames))

    def histogram(frame: np.ndarray) -> np.ndarray:
        return np.histogram(frame, edges)[0] / frame.size

    for axis, (name, (real, made)) in zip(axes, frames.items(), strict=True):
        middle = 0.5 * (edges[1:] + edges[:-1])
        shown = {n: histogram(f) for n, f in real.items()}
        curves(axis, middle, shown, [histogram(f) for f in made])
        axis.set(title=KINDS[name].title, xlabel="level / 99.5th percentile")
    fig.savefig(folder / "realism-histograms.png", dpi=130)

    fig, axes = figure("Noise against grey level", len(frames) + 1)
    for axis, (name, (real, made)) in zip(axes, frames.items(), strict=False):
        shown = {n: 100 * noise_in_space(f) for n, f in real.items()}
        curves(axis, LEVELS, shown, [100 * noise_in_space(f) for f in made])
        axis.set(title=KINDS[name].title)
    still = {f"real, {n}": 100 * noise_in_time(still_frames(f)) for n, f in STILL.items()}
    curves(axes[len(frames)], LEVELS, still, [100 * noise_in_time(still_frames(None))])
    axes[len(frames)].set(title="standing still, frame to frame")
    for axis in axes[: len(frames) + 1]:
        axis.set(xlabel="level / 99.5th percentile", ylabel="noise (%)", ylim=(0, None))
    for axis in axes[len(frames) + 1 :]:
        axis.axis("off")
    fig.savefig(folder / "realism-noise.png", dpi=130)


def side_by_side(
    frames: dict[str, tuple[dict[str, np.ndarray], list[np.ndarray]]], folder: Path
) -> None:
    """Real frames above simulated ones: real pixels, for looking only."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (real, made) in frames.items():
        rows = list(real.items())[:2] + [(f"simulated {i}", f) for i, f in enumerate(made[:2])]
        fig, axes = plt.subplots(len(rows), 1, figsize=(10, 5 * len(rows)), layout="constrained")
        for axis, (title, frame) in zip(axes, rows, strict=True):
            axis.imshow(frame, cmap="gray", vmin=0, vmax=1.05)
            axis.set_title(title)
            axis.axis("off")
        fig.savefig(folder / f"{name}.png", dpi=90)
        plt.close(fig)


def context() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


@click.command()
@click.option("--quick", is_flag=True, help="One simulated recording of each kind; file nothing.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where figures go.")
@click.option("--pictures", type=click.Path(path_type=Path), help="Folder for frames to look at.")
def main(quick: bool, json_path: Path | None, pictures: Path | None) -> None:
    """Compare simulated with real frames."""
    if not REAL.is_dir():
        sys.exit(f"{REAL}: no real frames there; set HPC_XVR_REALDATA to the folder that has them")
    frames = {}
    for name, kind in KINDS.items():
        real = {label_of(n): real_frame(n) for n in kind.real}
        frames[name] = real, [simulated_frame(kind, seed) for seed in range(1 if quick else 5)]
    result: dict = {}
    for name, (real, made) in frames.items():
        result |= merits(name, list(real.values()), made)
    result["frame_to_frame_slope_simulated"] = slope(noise_in_time(still_frames(None)))
    for n, f in STILL.items():
        result[f"frame_to_frame_slope_real[{n}]"] = slope(noise_in_time(still_frames(f)))
    for key, value in result.items():
        print(f"{key:48s} {value:8.3f}")
    result["context"] = context()
    if not quick:
        draw(frames, RESULTS)
    if pictures:
        side_by_side(frames, pictures)
    if json_path or not quick:
        path = json_path or RESULTS / "realism.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
