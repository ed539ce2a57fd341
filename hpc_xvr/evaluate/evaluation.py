"""Methods against recordings whose truth is known: every frame between the key frames is scored."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hpc_xvr import metrics
from hpc_xvr.checkpoint import write_atomic
from hpc_xvr.config import Data
from hpc_xvr.data.batches import key_frames
from hpc_xvr.data.corpus import Video
from hpc_xvr.errors import InputError
from hpc_xvr.log import print_table, progress_bar
from hpc_xvr.model.bases import upsample
from hpc_xvr.reconstruct.pipeline import Method, reconstruct, recording_streams
from hpc_xvr.reconstruct.writers import written_whole

TITLES = {
    "bicubic": "bicubic",
    "nearest_hr": "nearest key frame",
    "linear_hr": "linear between key frames",
    "detail": "detail transfer",
    "adaptive": "detail transfer where still",
    "bayes": "Bayesian fusion",
}
"""Baselines as they are called in pictures and on the report's page."""

Methods = Mapping[str, tuple[Method, int]]
"""Name -> (method, frames it gives: 1 or data.lr_frames)."""


@dataclass(frozen=True)
class Row:
    """One method on one recording; the numbers are means over its counted frames."""

    method: str
    recording: str
    frames: int
    """Frames compared with the truth."""
    keys: int
    """Key frames, which every method is given and none is scored on."""
    psnr: float
    """dB on the 8-bit scale."""
    ssim: float
    aad: float
    """Mean absolute difference in 8-bit grey levels."""
    seconds_per_frame: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of all methods on all recordings, and how they were obtained."""

    rows: list[Row]
    settings: dict[str, object]

    def methods(self) -> list[str]:
        """Names in the order they were given."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def means(self) -> list[Row]:
        """One row a method: every recording counts the same; frames and keys are totals."""
        return [
            mean_row([row for row in self.rows if row.method == name]) for name in self.methods()
        ]

    def best(self, names: Iterable[str]) -> str:
        """The name of highest mean PSNR."""
        names = set(names)
        return max(
            (row for row in self.means() if row.method in names), key=lambda row: row.psnr
        ).method

    def show(self) -> None:
        """Print the means as a table."""
        columns = ["method", "PSNR dB", "SSIM", "AAD", "frames", "key frames left out", "ms/frame"]
        print_table(
            f"{self.settings.get('recordings', '')} recordings, a key frame every "
            f"{self.settings.get('gap', '?')} frames".strip(),
            columns,
            [
                (
                    row.method,
                    f"{row.psnr:.2f}",
                    f"{row.ssim:.4f}",
                    f"{row.aad:.3f}",
                    row.frames,
                    row.keys,
                    f"{1000 * row.seconds_per_frame:.1f}",
                )
                for row in self.means()
            ],
        )

    def save(self, folder: Path | str) -> None:
        """Write evaluation.json and evaluation.csv into `folder` (made if missing).

        An infinite PSNR (a method met the truth exactly) is null in the JSON, inf in the CSV.

        Raises:
            InputError: the disk refuses.
        """
        folder = Path(folder)
        tree = {
            "settings": self.settings,
            "means": [_finite(asdict(row)) for row in self.means()],
            "rows": [_finite(asdict(row)) for row in self.rows],
        }
        document = json.dumps(tree, indent=1, allow_nan=False) + "\n"
        write_atomic(folder / "evaluation.json", lambda file: file.write(document.encode()))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, [field.name for field in fields(Row)])
        table.writeheader()
        table.writerows(asdict(row) for row in [*self.rows, *self.means()])
        write_atomic(folder / "evaluation.csv", lambda file: file.write(text.getvalue().encode()))


def _finite(row: dict[str, object]) -> dict[str, object]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def mean_row(rows: Sequence[Row]) -> Row:
    """Mean over recordings of one method."""

    def mean(name: str) -> float:
        return float(np.mean([getattr(row, name) for row in rows]))

    return Row(
        rows[0].method,
        "mean",
        sum(row.frames for row in rows),
        sum(row.keys for row in rows),
        mean("psnr"),
        mean("ssim"),
        mean("aad"),
        mean("seconds_per_frame"),
    )


def evaluate(
    methods: Methods,
    videos: Sequence[Video],
    *,
    data: Data,
    gap: int,
    photons: float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    rank: int = 0,
    world: int = 1,
) -> Evaluation:
    """Score each method on each frame between the key frames of each recording.

    All methods see the same low-resolution frames (same noise). Of `world` ranks each scores
    videos[rank::world]; `merge` joins their rows. Times are those of the method alone (transfer to
    and from the device included), after one pass to warm up.

    Raises:
        InputError: no recordings, or one without a frame between two key frames.
    """
    if not videos:
        raise InputError(
            "evaluate: there are no recordings in this split; see evaluate.split and "
            "the splits in the corpus' manifest"
        )
    own = list(videos)[rank::world]
    total = sum(video.shape[0] for video in own)
    rows = []
    with progress_bar("evaluate", total, "frames") as advance:
        for video in own:
            rows += _score(methods, video, data, gap, photons, seed, device, precision, advance)
    settings = {
        "gap": gap,
        "photons": photons,
        "seed": seed,
        "precision": precision,
        "lr_frames": data.lr_frames,
        "scale": data.scale,
        "lr_source": data.lr_source,
        "recordings": len(videos),
        "device": str(device),
    }
    return Evaluation(rows, settings)


def merge(parts: Iterable[Sequence[Row]]) -> list[Row]:
    """Rows of all ranks in the order a single rank would have given them: by recording."""
    rows = [row for part in parts for row in part]
    order = {name: i for i, name in enumerate(dict.fromkeys(row.method for row in rows))}
    assert len({(row.method, row.recording) for row in rows}) == len(rows), "scored twice"
    return sorted(rows, key=lambda row: (row.recording, order[row.method]))


def _score(
    methods: Methods,
    video: Video,
    data: Data,
    gap: int,
    photons: float | None,
    seed: int,
    device: str | torch.device,
    precision: str,
    advance,
) -> list[Row]:
    lr_stream, key_stream = recording_streams(video, gap, data, photons, seed)
    lr, keys = list(lr_stream), dict(key_stream)  # once, not once a method
    if len(keys) == len(lr):
        raise InputError(
            f"recording {video.id}: all its {len(lr)} frames are key frames at gap "
            f"{gap}; set evaluate.gap to 2 or more"
        )
    options = {"lr_frames": data.lr_frames, "device": device, "precision": precision}
    scores: dict[str, list[tuple[float, float, float]]] = {name: [] for name in methods}
    seconds = dict.fromkeys(methods, 0.0)
    between = [t for t in range(len(lr)) if t not in keys]
    runs = {}
    for name, (method, n_out) in methods.items():
        next(reconstruct(method, lr, keys, n_out=n_out, only={between[0]}, **options))
        runs[name] = reconstruct(method, lr, keys, n_out=n_out, only=set(between), **options)
    for t in between:
        truth = video.intensity(t)
        for name, run in runs.items():
            start = time.perf_counter()
            found, frame = next(run)
            seconds[name] += time.perf_counter() - start
            assert found == t
            scores[name].append(
                (metrics.psnr(frame, truth), metrics.ssim(frame, truth), metrics.aad(frame, truth))
            )
        advance()
    advance(len(keys))
    return [
        Row(
            name,
            video.id,
            len(between),
            len(keys),
            *(float(np.mean(column)) for column in zip(*scores[name], strict=True)),
            seconds[name] / len(between),
        )
        for name in methods
    ]


def side_by_side(
    path: Path | str,
    video: Video,
    methods: Methods,
    t: int,
    *,
    data: Data,
    gap: int,
    photons: float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "float32",
) -> Path:
    """Picture of frame `t`: the fast camera's view, each method, the truth; details; errors.

    First row whole frames with PSNR, second row the region that the methods find hardest, third
    row absolute error in 8-bit grey levels on one scale.

    Raises:
        InputError: `t` is a key frame or lies outside the recording.
    """
    lr, keys = recording_streams(video, gap, data, photons, seed)
    if t in keys or not 0 <= t < len(lr):
        raise InputError(
            f"frame {t} of {video.id}: is a key frame or outside 0..{len(lr) - 1}; "
            f"choose one between key frames ({', '.join(map(str, keys))})"
        )
    truth = video.intensity(t)
    around = {key: keys[key] for key in key_frames(t, gap, len(lr))}
    coarse = upsample(torch.from_numpy(np.ascontiguousarray(lr[t]))[None, None, None], data.scale)
    panels = {"fast camera, bicubic": np.clip(coarse[0, 0, 0].numpy(), 0, 1)}
    for name, (method, n_out) in methods.items():
        panels[TITLES.get(name, name)] = next(
            frame
            for _, frame in reconstruct(
                method,
                lr,
                around,
                lr_frames=data.lr_frames,
                n_out=n_out,
                device=device,
                precision=precision,
                only={t},
            )
        )
    title = f"{video.id}, frame {t}: key frames {min(around)} and {max(around)}"
    if photons is not None:
        title += f", {photons:g} photons a pixel"
    figure = _figure(panels, truth, title)
    path = Path(path)
    with written_whole(path) as beside:
        figure.savefig(beside, format=path.suffix[1:] or "png", dpi=110)
    return path


def _worst_region(error: np.ndarray) -> tuple[int, int, int]:
    """(y, x, side) of the square with the largest summed error."""
    side = max(min(error.shape) * 3 // 10, min(16, *error.shape))
    total = np.pad(error.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    strips = total[side:] - total[:-side]
    squares = strips[:, side:] - strips[:, :-side]
    y, x = np.unravel_index(squares.argmax(), squares.shape)
    return int(y), int(x), side


def _figure(panels: dict[str, np.ndarray], truth: np.ndarray, title: str) -> Figure:
    errors = {name: 255 * np.abs(frame - truth) for name, frame in panels.items()}
    # Each method's error weighs the same, or the blur of the coarsest would decide alone.
    y, x, side = _worst_region(
        sum(error / max(float(error.mean()), 1e-6) for error in errors.values())
    )
    low, high = np.percentile(truth, (0.2, 99.8))
    grey = {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6), "interpolation": "nearest"}
    top = max(float(np.percentile(np.stack(list(errors.values())), 99.5)), 1.0)
    columns = len(panels) + 1
    height, width = truth.shape
    cell = 12.8 / columns
    rows = (cell * height / width, cell, cell * height / width)
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(12.8, sum(rows) + 1.15), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(3, columns, squeeze=False, height_ratios=rows)
        figure.suptitle(title, fontsize=11)
        zoom = np.s_[y : y + side, x : x + side]
        for i, (name, frame) in enumerate([*panels.items(), ("truth", truth)]):
            axes[0, i].imshow(frame, **grey)
            axes[0, i].add_patch(
                Rectangle(
                    (x - 0.5, y - 0.5), side, side, fill=False, edgecolor="#e8590c", linewidth=1.2
                )
            )
            score = "" if name == "truth" else f"\n{metrics.psnr(frame, truth):.2f} dB"
            axes[0, i].set_title(name + score)
            axes[1, i].imshow(frame[zoom], **grey)
            for row in axes[:, i]:
                row.set_xticks([])
                row.set_yticks([])
            if name == "truth":
                axes[2, i].axis("off")
            else:
                shown = axes[2, i].imshow(
                    errors[name], cmap="magma", vmin=0, vmax=top, interpolation="nearest"
                )
        for row, label in zip(axes[:, 0], ("frame", "zoom", "absolute error"), strict=True):
            row.set_ylabel(label)
        for spine in (spine for cell in axes[1] for spine in cell.spines.values()):
            spine.set_edgecolor("#e8590c")
        inset = axes[2, -1].inset_axes([0.02, 0.06, 0.06, 0.88])
        figure.colorbar(shown, cax=inset, label="grey levels of 255")
    return figure
