"""Does `hpc-xvr register` find where and when one camera saw what the other did?

    python benchmarks/registering.py              200 pairs, 100 that do not match; under an hour
    python benchmarks/registering.py --quick      a few of each; under 50 s
    python benchmarks/registering.py --hard       fewer photons, sharp frames and stated rates
    python benchmarks/registering.py --large      a larger fast camera, more frames; hours
    python benchmarks/registering.py --json out.json --rows out.jsonl    goes on where it stopped

Pairs are simulated experiments of all scenes, seen by a sharp camera and by a fast one of 64x96
pixels (a sixteenth of an HPV-X2's): scale 2.5 to 4.5, rotation up to 5 degrees, centres up to 20 %
of the field of view apart, every flip, other gain and offset, blur, 2,000 to 20,000 photons a fast
pixel at full scale, flickering beam. Eight sharp frames come at instants between fast ones; three
of four pairs state frame rates (wrong by up to 0.01 %), the others none. With --hard it is 500 to
16,000 photons, six sharp frames, and every second pair that states rates. With --large it is up to
128 fast frames, as many as an HPV-X2 records, of 128x192 pixels (a quarter of its), and 24 sharp
ones. Counted as right: the right flip, no place of the common field of view (a grid of 9 x 9 places
of the fast frame, corners included) more than 0.1 fast pixels aside, and no sharp frame's instant
more than 0.1 fast frames.

Some pairs cannot be right: where little moves, or jumps, noise hides when it did. For each pair the
least deviation that can be expected is computed from the light without noise (`bounding`).
Told by the motion are pairs whose instants are known to 0.1 frames by 2 of these; `possible` is the
share that would be within 0.1 frames if errors had just these deviations. Both cameras expose for
0.3 to 0.8 of a fast frame.

Pairs that do not match are recordings of two experiments, half of them of one scene, and noise.
What resampling by a scale that is no integer costs is the PSNR of `bayes` with a fast camera of
that scale, against one whose pixels are 3 or 4 sharp ones.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FuturesTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from bounding import Noise, least_deviation
from filing import file_result, usage
from hpc_xvr import log
from hpc_xvr.data.cameras import Recording
from hpc_xvr.data.pairing.joining import Pairing
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.data.registering.placing import FLIPS
from hpc_xvr.data.registering.register import registered
from hpc_xvr.data.registering.timing import Clock
from hpc_xvr.data.registration import Registration
from hpc_xvr.data.simulate.beamline import SENSORS, Beamline, SimulatedCamera
from hpc_xvr.data.simulate.experiment import simulate_video
from hpc_xvr.data.simulate.scenes import SCENES
from hpc_xvr.errors import InputError
from hpc_xvr.reconstruction.material import from_recordings
from hpc_xvr.reconstruction.methods import open_method
from hpc_xvr.reconstruction.workflow import frames_of
from hpc_xvr.train.meters import describe_machine
from starting import ROOT

READ = 0.003
"""Read noise of the fast camera, of full scale."""
EXPOSED = 3
"""Instants that make up an exposure."""
A_WORLD = 4
"""Pairs of cameras that look at one experiment."""
ENOUGH = 0.1
"""Fast pixels, and fast frames."""


@dataclass(frozen=True)
class Kind:
    """Of pairs."""

    fast: tuple[int, int] = (64, 96)
    """Pixels (h, w) of the fast camera."""
    frames: int = 56
    """Of the fast camera, at most."""
    keys: int = 8
    photons: tuple[int, int] = (2000, 20_000)
    """Of a fast pixel at full scale."""
    stated: float = 3 / 4
    """Share of pairs that state rates."""


KINDS = {
    "usual": Kind(),
    "hard": Kind(keys=6, photons=(500, 16_000), stated=1 / 2),
    "large": Kind(fast=(128, 192), frames=128, keys=24),
}


@dataclass(frozen=True)
class Pair:
    scene: str
    sharp: np.ndarray
    fast: np.ndarray
    truth: Registration
    instants: np.ndarray
    """Of the sharp frames, in fast frames from the first."""
    rates: tuple[float, float] | None
    """Of the fast and the sharp camera, as the files state them."""
    bound: float
    """Least deviation, fast frames, of the instant of the least certain sharp frame."""

    def recordings(self) -> tuple[Recording, Recording]:
        rates = self.rates or (None, None)
        fast = CameraReading(bit_depth=10, frame_rate_hz=rates[0]).open(self.fast)
        sharp = CameraReading(bit_depth=12, frame_rate_hz=rates[1]).open(self.sharp)
        return sharp, fast


class World:
    """An experiment whose light can be asked for at any instant."""

    def __init__(self, number: int, kind: Kind) -> None:
        self.kind, self.frames = kind, kind.frames
        self.rng = np.random.default_rng([18, number])
        self.scene = list(SCENES)[number % len(SCENES)]
        self.scale = float(self.rng.uniform(2.6, 4.3))
        size = [8 * math.ceil(1.55 * self.scale * side / 8) for side in kind.fast]
        streams = [np.random.default_rng([number, k]) for k in range(2)]
        scene = SCENES[self.scene]((size[0], size[1]), self.frames + 6, streams[0])
        self.line = Beamline(scene, streams[1])
        self.shape = tuple(size)
        self.fast = [self.light(t) for t in range(self.frames)]

    def light(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Of an exposure that begins at an instant, with and without the noise that both cameras
        see."""
        within = (np.arange(EXPOSED) + 0.5) / EXPOSED * self.line.exposure
        state = np.mean([self.line.state(t + 3 + float(dt)) for dt in within], 0)
        clean, seen = (
            gaussian_filter(light, (0, self.line.penumbra), truncate=3, mode="nearest")
            for light in (state, state * (1 + 0.003 * self.rng.normal()))
        )
        noise = self.rng.standard_normal(seen.shape, dtype=np.float32)
        return np.maximum(seen + np.sqrt(np.maximum(seen, 0) / self.line.quanta) * noise, 0), clean

    def pair(self) -> Pair:
        draw = self.rng.uniform
        scale = float(np.clip(self.scale * draw(0.95, 1.05), 2.5, 4.5))
        flip = list(FLIPS)[self.rng.integers(4)]
        grid, keys = self.kind.fast, self.kind.keys
        shift = draw(-0.2, 0.2, 2) * grid * scale
        middle = np.array(self.shape) / 2
        hr = [int(min(draw(0.85, 1.1) * scale * n, side - 4)) for n, side in
              zip(grid, self.shape, strict=True)]  # fmt: skip
        slack = np.array(self.shape) / 2 - np.array(hr) / 2
        corner = np.rint(np.clip(middle - shift / 2, middle - slack, middle + slack) - hr_half(hr))
        truth = Registration(scale=scale, rotation_deg=draw(-5, 5), flip=flip)
        aside = middle + shift / 2 - truth.to_hr(np.array([grid]) / 2)[0]
        on_world = truth.model_copy(update={"origin": tuple(aside)})
        gap = float(draw(3, (self.frames - 4) / (keys - 1)))
        instants = draw(-0.4, 2.0) + gap * np.arange(keys)
        last = min(self.frames, math.ceil(instants[-1]) + 3)
        fast = FastCamera(on_world, self.rng, self.kind)
        top, left = corner.astype(int)
        camera = SimulatedCamera.of(SENSORS["sa-z"], (hr[0], hr[1]), 1, self.rng)
        sharp, clean = [], []
        for t in instants:
            seen, light = self.light(t)
            part = seen[top : top + hr[0], left : left + hr[1]]
            sharp.append(camera.record(np.ascontiguousarray(part)))
            clean.append(fast.expected(light))
        rates = None
        if self.rng.random() < self.kind.stated:
            rates = 1e5, 1e5 / gap * float(draw(0.9999, 1.0001))
        truth = on_world.model_copy(update={"origin": tuple(aside - corner)})
        recorded = np.stack([fast.record(light) for light, _ in self.fast[:last]])
        bound = least_deviation(
            np.stack([fast.expected(light) for _, light in self.fast[:last]]),
            np.stack(clean),
            fast.sees(truth, (hr[0], hr[1])),
            instants,
            fast.noise(self.line.quanta, camera),
            rates is not None,
        )
        return Pair(self.scene, np.stack(sharp), recorded, truth, instants, rates, bound)


def hr_half(hr: list[int]) -> np.ndarray:
    return np.array(hr) / 2


class FastCamera:
    def __init__(self, place: Registration, rng: np.random.Generator, kind: Kind) -> None:
        self.rng, self.scale, self.grid = rng, place.scale, kind.fast
        self.gain, self.offset = rng.uniform(0.5, 1.2), rng.uniform(0, 0.2)
        self.blur = math.hypot(rng.uniform(0.5, 1.1), 0.29) * place.scale
        self.photons = 10 ** rng.uniform(*np.log10(kind.photons))
        rows, columns = (n.ravel() + 0.5 for n in np.indices(self.grid))
        self.at = place.to_hr(np.stack([rows, columns], 1)).T.reshape(2, *self.grid) - 0.5
        self.way = FLIPS[place.flip]

    def expected(self, light: np.ndarray) -> np.ndarray:
        """(h, w), a share of full scale."""
        smooth = gaussian_filter(light, self.blur, truncate=3, mode="nearest")
        seen = map_coordinates(smooth, self.at, order=1, mode="nearest")[self.way]
        found: np.ndarray = seen * self.gain + self.offset
        return found

    def record(self, light: np.ndarray) -> np.ndarray:
        seen = self.rng.poisson(self.expected(light) * self.photons) / self.photons
        seen = seen + READ * self.rng.normal(size=seen.shape)
        return np.clip(np.rint(1023 * seen), 0, 1023).astype(np.uint16)

    def sees(self, truth: Registration, shape: tuple[int, int]) -> np.ndarray:
        """Which of its pixels lie on sharp frames of this shape, (h, w)."""
        rows, columns = (n.ravel() + 0.5 for n in np.indices(self.grid))
        at = truth.to_hr(np.stack([rows, columns], 1))
        inside = (at > self.scale) & (at < np.array(shape) - self.scale)
        return inside.all(1).reshape(self.grid)

    def noise(self, quanta: float, sharp: SimulatedCamera) -> Noise:
        """Of what it records, and of what `sharp` does, in this camera's grey values."""
        pixels = self.scale**2
        return Noise(
            fast=(1 / self.photons, READ**2 + 1 / (12 * 1023**2)),
            common=(self.gain / quanta / pixels, 0.0),
            sharp=(
                self.gain / sharp.photons / pixels,
                (self.gain * sharp.read_noise) ** 2 / pixels,
            ),
            blur=self.blur / self.scale,
        )


def errors(pair: Pair, found: Registration) -> tuple[float, float]:
    """Fast pixels and fast frames by which a registration is wrong; infinite where it says
    nothing."""
    space = math.inf
    rows, columns = (
        n.ravel() for n in np.meshgrid(*(np.linspace(0, n, 9) for n in pair.fast.shape[1:]))
    )
    places = np.stack([rows, columns], 1)
    true = pair.truth.to_hr(places)
    common = ((true >= 0) & (true <= pair.sharp.shape[1:])).all(1)
    if found.flip == pair.truth.flip:
        aside = np.linalg.norm(found.to_hr(places) - true, axis=1)[common]
        space = float(aside.max()) / pair.truth.scale
    if found.time is None:
        return space, math.inf
    clock = Clock(found.time.gap, found.time.lr_start, found.time.drift)
    mine = clock.of_sharp(np.arange(len(pair.instants)))
    there = (pair.instants >= 0) & (pair.instants <= len(pair.fast) - 1)
    return space, float(np.abs(mine - pair.instants)[there].max())


def of_world(number: int, pairs: int, matching: bool, name: str) -> list[dict[str, Any]]:
    """What became of some pairs of one experiment (matching), or of its sharp frames and another's
    fast ones."""
    log.logger.setLevel("ERROR")
    world = World(number, KINDS[name])
    other = None if matching else World(number + (6 if number % 2 else 7), KINDS[name])
    rows: list[dict[str, Any]] = []
    for index in range(pairs):
        pair = world.pair()
        sharp, fast = pair.recordings()
        if other is not None:
            fast = other.pair().recordings()[1]
            if index == pairs - 1 and number % 5 == 0:
                noise = world.rng.poisson(300, pair.fast.shape).astype(np.uint16)
                fast = CameraReading(bit_depth=10).open(noise)
        row: dict[str, Any] = {"world": number, "scene": pair.scene}
        row |= {
            "kind": name,
            "matching": matching,
            "rates": pair.rates is not None,
            "bound": pair.bound,
        }
        start = time.process_time()
        try:
            found = registered(sharp, fast).registration
        except InputError as error:
            row |= {"refused": str(error)}
        else:
            space, when = errors(pair, found)
            row |= {"refused": "", "space": space, "time": when, "found": found.found}
        row["seconds"] = time.process_time() - start
        rows.append(row)
    return rows


def results(
    worlds: range,
    pairs: int,
    matching: bool,
    kind: str,
    workers: int,
    until: float,
    kept: Path | None,
) -> list[dict[str, Any]]:
    """Rows of all worlds, or of those that were done by `until`; those in the file `kept` are not
    made again, others are added to it."""
    known = kept.read_text().splitlines() if kept and kept.exists() else []
    rows = [row for row in map(json.loads, known) if row["matching"] is matching]
    rows = [row for row in rows if row["world"] in worlds and row["kind"] == kind]
    missing = [number for number in worlds if all(row["world"] != number for row in rows)]
    start, done = time.time(), 0
    pool = ProcessPoolExecutor(workers)
    jobs = [pool.submit(of_world, number, pairs, matching, kind) for number in missing]
    try:
        for job in as_completed(jobs, max(1.0, until - time.time())):
            done += 1
            for row in job.result():
                print(told(row), flush=True)
                rows.append(row)
                if kept:
                    with kept.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            left = (time.time() - start) / done * (len(missing) - done) / 60
            print(f"{done} of {len(missing)} experiments, {left:.0f} min left", flush=True)
    except FuturesTimeout:
        print("time is over: the rest is left out")
    pool.shutdown(wait=False, cancel_futures=True)
    return rows


def told(row: dict[str, Any]) -> str:
    what = f"{row['world']:4d} {row['scene']:9s} {row['seconds']:5.1f} s  "
    what += f"at best {row['bound']:.3f} frames  "
    if row["refused"]:
        return what + "refused: " + row["refused"][:110]
    found = row["found"]
    what += "rates  " if row["rates"] else "       "
    return what + (
        f"{row['space']:8.3f} pixels {row['time']:8.3f} frames  score {found['score']:.2f} "
        f"clear {found['clearness']:.1f} deviation {found['corner_deviation_lr_px']:.3f} "
        f"{found.get('time_deviation_lr_frames', math.nan):.3f}"
    )


def median(values: Iterable[float]) -> float:
    return float(np.median([*values] or [math.nan]))


def figures(right: list[dict[str, Any]], wrong: list[dict[str, Any]]) -> dict[str, float]:
    def share(rows: list[dict[str, Any]], ok: Any) -> float:
        return sum(map(ok, rows)) / len(rows) if rows else math.nan

    def error(row: dict[str, Any], what: str) -> float:
        return math.inf if row["refused"] else float(row[what])

    def both(row: dict[str, Any]) -> bool:
        return max(error(row, "space"), error(row, "time")) <= ENOUGH

    made = [row for row in right if not row["refused"]]

    def is_told(row: dict[str, Any]) -> bool:
        return 2 * float(row["bound"]) <= ENOUGH

    def possible(row: dict[str, Any]) -> float:
        return math.erf(ENOUGH / (max(float(row["bound"]), 1e-9) * math.sqrt(2)))

    result = {
        "pairs": len(right),
        "pairs_refused": len(right) - len(made),
        "within_both": share(right, both),
        "within_0.1_pixels": share(right, lambda r: error(r, "space") <= ENOUGH),
        "within_0.1_frames": share(right, lambda r: error(r, "time") <= ENOUGH),
        "possible_within_0.1_frames": share(right, possible),
        "told_by_motion": share(right, is_told),
        "within_both[told by motion]": share([*filter(is_told, right)], both),
        "wrong_by_over_1_pixel": share(made, lambda r: r["space"] > 1),
        "wrong_by_over_1_frame": share(made, lambda r: 1 < r["time"] < math.inf),
        "without_time": share(made, lambda r: math.isinf(r["time"])),
        "clocks_within_0.1_frames": share(
            [row for row in made if row["time"] < math.inf], lambda r: r["time"] <= ENOUGH
        ),
        "clocks_within_3_deviations": share(
            [row for row in made if row["time"] < math.inf],
            lambda r: r["time"] <= 3 * r["found"]["time_deviation_lr_frames"],
        ),
        "median_error_pixels": median(r["space"] for r in made),
        "median_error_frames": median(r["time"] for r in made),
        "median_cpu_seconds": median(r["seconds"] for r in right),
        "not_matching": len(wrong),
        "not_matching_accepted": sum(not row["refused"] for row in wrong),
    }  # fmt: skip
    for name, stated in (("frame rates stated", True), ("no frame rates", False)):
        rows = [row for row in right if row["rates"] is stated]
        result[f"within_both[{name}]"] = share(rows, both)
        result[f"within_0.1_frames[{name}]"] = share(rows, lambda r: error(r, "time") <= ENOUGH)
    for scene in SCENES:
        rows = [row for row in right if row["scene"] == scene]
        result[f"within_both[{scene}]"] = share(rows, both)
        result[f"within_0.1_pixels[{scene}]"] = share(rows, lambda r: error(r, "space") <= ENOUGH)
        result[f"possible_within_0.1_frames[{scene}]"] = share(rows, possible)
        result[f"told_by_motion[{scene}]"] = share(rows, is_told)
        result[f"within_both[{scene}, told by motion]"] = share([*filter(is_told, rows)], both)
    return result


def resampling(quick: bool) -> dict[str, float]:
    """PSNR of `bayes` where the fast camera's pixels are not a whole number of sharp ones."""
    video = simulate_video("bubbles", (9, 192, 240) if quick else (17, 384, 480), 5)
    method = open_method(Path("bayes"), torch.device("cpu"))
    gap, result = 4, {}
    sharp = CameraReading(bit_depth=video.info["bit_depth"]).open(video.frames[::gap])
    truth = video.frames / float(2 ** video.info["bit_depth"] - 1)
    for scale in (3.0, 3.3, 3.5, 3.7, 4.0):
        size = [math.floor(side / scale) for side in video.frames.shape[1:]]
        where = Registration(scale=scale)
        fast = CameraReading(bit_depth=12).open(boxes(truth, scale, (size[0], size[1])))
        pairing = Pairing(gap, 0.0, where)
        material = from_recordings(method, fast, sharp, pairing, crop=True)
        found = []
        for t, frame in frames_of(method, material, torch.device("cpu")):
            if t % gap:
                error = frame[8:-8, 8:-8] - truth[t, 8 : frame.shape[0] - 8, 8 : frame.shape[1] - 8]
                found.append(-10 * math.log10(float((error**2).mean())))
        result[f"bayes_psnr_db[scale {scale:g}]"] = statistics.mean(found)
    for scale in (3.3, 3.5, 3.7):
        share = scale - 3
        ends = [result[f"bayes_psnr_db[scale {end}]"] for end in (3, 4)]
        whole = (1 - share) * ends[0] + share * ends[1]
        result[f"resampling_cost_db[scale {scale:g}]"] = (
            whole - result[f"bayes_psnr_db[scale {scale:g}]"]
        )
    return result


def boxes(frames: np.ndarray, scale: float, size: tuple[int, int]) -> np.ndarray:
    """Frames (T, H, W) in [0, 1] as 12-bit numbers of pixels exactly `scale` wide, with noise."""
    rows, columns = (box_weights(n, side, scale) for n, side in
                     zip(size, frames.shape[1:], strict=True))  # fmt: skip
    seen = rows @ frames @ columns.T
    rng = np.random.default_rng(0)
    noisy = rng.poisson(np.maximum(seen, 0) * 8000) / 8000
    return np.clip(np.rint(noisy * 4095), 0, 4095).astype(np.uint16)


def box_weights(pixels: int, side: int, scale: float) -> np.ndarray:
    """(pixels, side): the share of each small pixel in each large one."""
    low = np.arange(pixels)[:, None] * scale
    k = np.arange(side)[None]
    cover = np.minimum(low + scale, k + 1) - np.maximum(low, k)
    weights: np.ndarray = np.clip(cover, 0, 1) / scale
    return weights


def real_pair() -> dict[str, float]:
    """rad_00003: a frame of a Phantom and one of an HPV-X2 of the same instant."""
    folder = real_data()
    if folder is None:
        return {}
    names = ("rad_00003_high_res.png", "rad_00003_low_res.png")
    sharp, fast = (CameraReading().open(folder / "tomobank_xfusion_png" / name) for name in names)
    found = registered(sharp, fast).registration
    plain = found.to_hr(np.array(fast.shape[1:])[None] / 2)[0]
    plain -= found.scale * np.array(fast.shape[1:]) / 2
    return {
        "rad_00003_scale": found.scale,
        "rad_00003_rotation_deg": found.rotation_deg,
        "rad_00003_flipped": float(found.flip != "none"),
        "rad_00003_origin_row": found.origin[0],
        "rad_00003_origin_column": found.origin[1],
        "rad_00003_origin_row_unturned": float(plain[0]),
        "rad_00003_origin_column_unturned": float(plain[1]),
        "rad_00003_corner_deviation_pixels": found.found["corner_deviation_lr_px"],
    }


def real_data() -> Path | None:
    """`$HPC_XVR_REALDATA`, or `shared/realdata` beside the checkout."""
    folder = Path(os.environ.get("HPC_XVR_REALDATA", ROOT.parent / "shared" / "realdata"))
    for place in (folder, ROOT.parent.parent / "shared" / "realdata"):
        if place.is_dir():
            return place
    return None


@click.command(help=usage(__doc__ or ""))
@click.option("--quick", is_flag=True, help="A few pairs of small cameras.")
@click.option(
    "--hard", "kind", flag_value="hard", help="Fewer photons, sharp frames and stated rates."
)
@click.option("--large", "kind", flag_value="large", help="A larger fast camera, more frames.")
@click.option(
    "--first",
    default=2000,
    show_default=True,
    help="Number of the first experiment; 0 to 150, 1000 to 1029, 3000 to 3029 and 4000 to 4007 "
    "served to tune the method.",
)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where the result goes.")
@click.option("--rows", "kept", type=click.Path(path_type=Path), help="A file to which each pair's "
              "row is added; pairs that it holds are not made again.")  # fmt: skip
@click.option("--workers", default=2, show_default=True, help="Processes.")
@click.option("--minutes", default=180.0, show_default=True, help="Pairs not done by then are left "
              "out, and their number is in the result.")  # fmt: skip
def main(
    quick: bool,
    kind: str | None,
    first: int,
    out: Path | None,
    kept: Path | None,
    workers: int,
    minutes: float,
) -> None:
    log.setup()
    log.logger.setLevel("ERROR")
    end = time.time() + 60 * minutes
    kind = kind or "usual"
    result = {**real_pair(), **resampling(quick)}
    print(result)
    worlds = range(first, first + (2 if quick else 50))
    right = results(worlds, 1 if quick else A_WORLD, True, kind, workers, time.time()
                    + 0.7 * (end - time.time()), kept)  # fmt: skip
    worlds = range(first + 100, first + (101 if quick else 150))
    wrong = results(worlds, 1 if quick else 2, False, kind, workers, end, kept)
    result |= figures(right, wrong)
    for name, value in result.items():
        print(f"{name:45s} {value:.4g}")
    context = {**describe_machine(torch.device("cpu")), "fast_pixels": list(KINDS[kind].fast)}
    context |= {"kind": kind, "first_experiment": first}
    name = "registering" if kind == "usual" else f"registering-{kind}"
    file_result(name, result, context, out, quick)


if __name__ == "__main__":
    main()
