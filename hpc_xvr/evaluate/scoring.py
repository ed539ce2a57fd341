"""Methods against recordings whose truth is known: every frame between the key frames is scored."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from hpc_xvr import metrics
from hpc_xvr.config import Data
from hpc_xvr.data.corpus import Video
from hpc_xvr.data.samples.sample import key_frames
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.noise import NO_NOISE, NoiseLevel
from hpc_xvr.evaluate.rows import METRICS, Condition, Row
from hpc_xvr.reconstruction.methods import NamedMethod
from hpc_xvr.reconstruction.pipeline import reconstruct
from hpc_xvr.reconstruction.streams import KeyFrames, Stream, recording_streams

FRAME_METRICS = [name for name in METRICS if name != "flicker"]  # flicker takes two frames


@dataclass(frozen=True)
class Unit:
    """The piece of work that is done as a whole: one recording under one condition."""

    condition: Condition
    video: Video = field(repr=False)


@dataclass(frozen=True)
class Setting:
    """What is the same for all units of an evaluation."""

    data: Data
    """Scale, where low-resolution frames come from, and frames of a window where the method takes
    any number."""
    seed: int = 0
    """Of the noise."""
    device: str | torch.device = "cpu"
    hr_noise: NoiseLevel = NO_NOISE
    """Noise on the key frames."""
    misregistration: float = 0.0
    """How far the fast camera's frames are shifted, in fast pixels."""

    def shift(self, recording: str) -> tuple[float, float]:
        """Rows and columns in sharp pixels: of that length, each recording in a direction of its
        own."""
        if not self.misregistration:
            return 0.0, 0.0
        angle = np.random.default_rng([self.seed, zlib.crc32(recording.encode()), 2]).uniform(
            0, 2 * np.pi
        )
        length = self.misregistration * self.data.scale
        return float(length * np.sin(angle)), float(length * np.cos(angle))


def streams_of(unit: Unit, setting: Setting) -> tuple[Stream, KeyFrames]:
    """What the two cameras see of a recording. The same noise whoever asks, in any order.

    Raises:
        InputError: noise on a recorded stream, which has its own; frames that do not fit.
    """
    video, data = unit.video, setting.data
    grid = (video.shape[1] // data.scale, video.shape[2] // data.scale)
    camera = unit.condition.noise.camera(video.id, grid, data.pattern, setting.seed)
    return recording_streams(
        video,
        unit.condition.gap,
        data,
        camera,
        setting.seed,
        hr_noise=setting.hr_noise.camera(video.id, video.shape[1:], data.pattern, setting.seed),
        shift=setting.shift(video.id),
    )


def score(
    methods: Mapping[str, NamedMethod],
    unit: Unit,
    setting: Setting,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Row]:
    """A row for each method; all see the same low-resolution frames.

    Times are those of the method alone (transfer to and from the device included), after one pass
    to warm up.

    Raises:
        InputError: a recording without a frame between two key frames, or of the wrong size.
    """
    video, condition = unit.video, unit.condition
    lr_stream, key_stream = streams_of(unit, setting)
    lr, keys = list(lr_stream), dict(key_stream)  # once, not once a method
    between = [t for t in range(len(lr)) if t not in keys]
    if not between:
        raise InputError(
            f"recording {video.id}: all its {len(lr)} frames are key frames at gap "
            f"{condition.gap}; set evaluate.gap to 2 or more"
        )
    takes = {name: _Take(method, lr, keys, between, setting) for name, method in methods.items()}
    truth = keys[0]
    for t in between:
        before = keys.get(t - 1, truth)
        truth = video.intensity(t)
        for take in takes.values():
            take.score_next(t, before, truth)
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
            **{metric: float(np.mean(values)) for metric, values in take.values.items()},
            seconds_per_frame=take.seconds / len(between),
            flops_per_frame=methods[name].flops(h, w, setting.data.scale),
        )
        for name, take in takes.items()
    ]


class _Take:
    """One method going through one recording, frame by frame."""

    def __init__(
        self,
        method: NamedMethod,
        lr: Sequence[np.ndarray],
        keys: Mapping[int, np.ndarray],
        between: Sequence[int],
        setting: Setting,
    ) -> None:
        next(_frames(method, lr, keys, between[:1], setting))  # warm up
        self._frames = _frames(method, lr, keys, between, setting)
        self._keys = keys
        self._last: np.ndarray | None = None
        self.values: dict[str, list[float]] = {name: [] for name in METRICS}
        self.seconds = 0.0

    def score_next(self, t: int, before: np.ndarray, truth: np.ndarray) -> None:
        """Make frame `t` and compare it with the truth; `before` is the truth at t - 1."""
        start = time.perf_counter()
        found, frame = next(self._frames)
        self.seconds += time.perf_counter() - start
        assert found == t
        for name in FRAME_METRICS:
            self.values[name].append(getattr(metrics, name)(frame, truth))
        # In the movie key frames stand among the others: a jump from and to them is flicker too.
        last = self._keys.get(t - 1, self._last)
        assert last is not None  # the first frame is a key frame
        self.values["flicker"].append(metrics.flicker(last, frame, before, truth))
        key = self._keys.get(t + 1)
        if key is not None:
            self.values["flicker"].append(metrics.flicker(frame, key, truth, key))
        self._last = frame


def frame_at(method: NamedMethod, unit: Unit, t: int, setting: Setting) -> np.ndarray:
    """Frame `t` of a recording, (H, W), made from the key frames around it."""
    lr, keys = streams_of(unit, setting)
    around = key_frames(t, unit.condition.gap, unit.video.shape[0])
    frames = _frames(method, lr, {key: keys[key] for key in around}, {t}, setting)
    return next(frame for _, frame in frames)


def _frames(
    method: NamedMethod,
    lr: Sequence[np.ndarray],
    keys: Mapping[int, np.ndarray],
    only: Collection[int],
    setting: Setting,
) -> Iterator[tuple[int, np.ndarray]]:
    """(t, frame) of the times `only`, in order."""
    return reconstruct(
        method.method,
        lr,
        keys,
        lr_frames=setting.data.lr_frames if method.lr_frames is None else method.lr_frames,
        n_out=method.n_out,
        device=setting.device,
        precision=method.precision,
        only=set(only),
    )


def check_methods(methods: Mapping[str, NamedMethod], data: Data) -> None:
    """Refuse models that work on another ratio of the grids than the data have.

    Raises:
        InputError: names the method and both scales.
    """
    for method in methods.values():
        if method.scale not in (None, data.scale):
            raise InputError(
                f"{method.name}: works at scale {method.scale}, the low-resolution frames are made "
                f"at data.scale {data.scale}; set it to {method.scale}, or leave the method out"
            )
