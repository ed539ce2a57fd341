"""Methods against recordings whose truth is known: every frame between the key frames is scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from hpc_xvr import metrics
from hpc_xvr.config import Data
from hpc_xvr.data.corpus import Video
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.methods import NamedMethod
from hpc_xvr.evaluate.noise import NoiseLevel
from hpc_xvr.reconstruction.pipeline import reconstruct
from hpc_xvr.reconstruction.streams import KeyFrames, Stream, recording_streams

METRICS = {
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "aad": "AAD",
    "psnr_float": "PSNR dB, not rounded",
    "psnr_gradient": "gradient PSNR dB",
    "flicker": "flicker",
}
"""Field of a row -> what tables call it. Higher is better of those not in LOWER."""
LOWER = ("aad", "flicker")


@dataclass(frozen=True)
class Condition:
    """What the methods were given: a corpus, a key frame every `gap` frames, a noise level."""

    corpus: str
    gap: int
    noise: str
    """As `NoiseLevel.name`."""

    def __str__(self) -> str:
        noise = "" if self.noise == "none" else f", {NoiseLevel.parse(self.noise).label}"
        return f"{Path(self.corpus).name}: a key frame every {self.gap} frames{noise}"


@dataclass(frozen=True)
class Row:
    """One method on one recording under one condition; means over its counted frames."""

    condition: Condition
    recording: str
    scene: str
    method: str
    frames: int
    """Frames compared with the truth."""
    keys: int
    """Key frames, which every method is given and none is scored on."""
    psnr: float
    """dB on the 8-bit scale."""
    ssim: float
    aad: float
    """Mean absolute difference in 8-bit grey levels."""
    psnr_float: float
    """dB without rounding to 8 bits."""
    psnr_gradient: float
    """dB of the gradients: edge sharpness."""
    flicker: float
    """Error of the change from frame to frame, in grey levels of 255."""
    seconds_per_frame: float
    flops_per_frame: float = 0.0


@dataclass(frozen=True)
class Unit:
    """The piece of work that is done as a whole: one recording under one condition."""

    condition: Condition
    video: Video = field(repr=False)


def recording_seen(
    video: Video, gap: int, noise: NoiseLevel, data: Data, seed: int
) -> tuple[Stream, KeyFrames]:
    """What the two cameras see of a recording. The same noise whoever asks, in any order.

    Raises:
        InputError: noise on a recorded stream, which has its own; frames that do not fit.
    """
    grid = (video.shape[1] // data.scale, video.shape[2] // data.scale)
    camera = noise.camera(video.id, grid, data.pattern, seed)
    return recording_streams(video, gap, data, camera, seed)


def score(
    entries: Mapping[str, NamedMethod],
    unit: Unit,
    *,
    data: Data,
    seed: int = 0,
    device: str | torch.device = "cpu",
    advance: Callable[[int], None] = lambda n: None,
) -> list[Row]:
    """A row for each method; all see the same low-resolution frames.

    Times are those of the method alone (transfer to and from the device included), after one pass
    to warm up.

    Raises:
        InputError: a recording without a frame between two key frames, or of the wrong size.
    """
    video, condition = unit.video, unit.condition
    noise = NoiseLevel.parse(condition.noise)
    lr_stream, key_stream = recording_seen(video, condition.gap, noise, data, seed)
    lr, keys = list(lr_stream), dict(key_stream)  # once, not once a method
    between = [t for t in range(len(lr)) if t not in keys]
    if not between:
        raise InputError(
            f"recording {video.id}: all its {len(lr)} frames are key frames at gap "
            f"{condition.gap}; set evaluate.gap to 2 or more"
        )
    runs = {name: _Run(entry, lr, keys, between, data, device) for name, entry in entries.items()}
    truth = keys[0]
    for t in between:
        before = keys.get(t - 1, truth)
        truth = video.intensity(t)
        for run in runs.values():
            run.take(t, truth, before, keys.get(t + 1))
        advance(1)
    advance(len(keys))
    h, w = lr_stream.shape[1:]
    return [
        Row(
            condition,
            video.id,
            video.info.scene,
            name,
            len(between),
            len(keys),
            **{key: float(np.mean(values)) for key, values in run.values.items()},
            seconds_per_frame=run.seconds / len(between),
            flops_per_frame=entries[name].flops(h, w, data.scale),
        )
        for name, run in runs.items()
    ]


class _Run:
    """One method going through one recording."""

    def __init__(
        self,
        entry: NamedMethod,
        lr: Sequence[np.ndarray],
        keys: Mapping[int, np.ndarray],
        between: Sequence[int],
        data: Data,
        device: str | torch.device,
    ) -> None:
        options = {
            "lr_frames": entry.lr_frames or data.lr_frames,
            "n_out": entry.n_out,
            "device": device,
            "precision": entry.precision,
        }
        next(reconstruct(entry.method, lr, keys, only={between[0]}, **options))
        self._frames = reconstruct(entry.method, lr, keys, only=set(between), **options)
        self._keys = keys
        self._last: np.ndarray | None = None
        self.values: dict[str, list[float]] = {name: [] for name in METRICS}
        self.seconds = 0.0

    def take(self, t: int, truth: np.ndarray, before: np.ndarray, after: np.ndarray | None) -> None:
        """Make frame `t` and score it; `before` and `after` are the truth, after at a key only."""
        start = time.perf_counter()
        found, frame = next(self._frames)
        self.seconds += time.perf_counter() - start
        assert found == t
        for name in ("psnr", "ssim", "aad", "psnr_float", "psnr_gradient"):
            self.values[name].append(getattr(metrics, name)(frame, truth))
        # In the movie key frames stand among the others: a jump from and to them is flicker too.
        last = self._keys.get(t - 1, self._last)
        self.values["flicker"].append(metrics.flicker(last, frame, before, truth))
        if after is not None:
            self.values["flicker"].append(metrics.flicker(frame, after, truth, after))
        self._last = frame


def reconstruct_one(
    entry: NamedMethod,
    video: Video,
    t: int,
    streams: tuple[Stream, KeyFrames],
    around: tuple[int, int],
    data: Data,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Frame `t` of a recording, (H, W), from the key frames at the two times `around`."""
    lr, keys = streams
    frames = reconstruct(
        entry.method,
        lr,
        {key: keys[key] for key in around},
        lr_frames=entry.lr_frames or data.lr_frames,
        n_out=entry.n_out,
        device=device,
        precision=entry.precision,
        only={t},
    )
    return next(frame for _, frame in frames)


def check_methods(entries: Mapping[str, NamedMethod], data: Data) -> None:
    """Refuse models that work on another ratio of the grids than the data have.

    Raises:
        InputError: names the method and both scales.
    """
    for entry in entries.values():
        if entry.scale not in (None, data.scale):
            raise InputError(
                f"{entry.name}: works at scale {entry.scale}, the low-resolution frames are made "
                f"at data.scale {data.scale}; set it to {entry.scale}, or leave the method out"
            )


def in_order(rows: Sequence[Row], methods: Sequence[str]) -> list[Row]:
    """Rows by recording and method, whoever made them and in whichever order."""
    order = {name: i for i, name in enumerate(methods)}
    unique = {(row.condition, row.recording, row.method): row for row in rows}
    return sorted(unique.values(), key=lambda row: (row.recording, order[row.method]))


def renamed(row: Row, corpus: str) -> Row:
    """The row with its corpus called by another path (a folder that has moved)."""
    return replace(row, condition=replace(row.condition, corpus=corpus))
