"""What a reconstruction reads: the fast camera's stream and the sharp camera's key frames."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import overload

import numpy as np

from hpc_xvr.config import Data
from hpc_xvr.data.cameras import Recording
from hpc_xvr.data.corpus import Video
from hpc_xvr.data.degrade import CameraNoise, bin_down, shifted
from hpc_xvr.data.pairing.joining import Pair
from hpc_xvr.data.samples.sample import key_frames
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

CLEAN = CameraNoise()
BESIDE = 0.1
"""Fast frames between a key frame and the fast frame it belongs to that need no warning."""


class Stream(Sequence[np.ndarray]):
    """Frames that are read one by one on demand: `read(t)` -> (h, w) float32 in [0, 1]."""

    def __init__(self, shape: tuple[int, int, int], read: Callable[[int], np.ndarray]) -> None:
        self.shape = shape
        self._read = read

    def __len__(self) -> int:
        return self.shape[0]

    @overload
    def __getitem__(self, t: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, t: slice) -> list[np.ndarray]: ...

    def __getitem__(self, t: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(t, slice):
            return [self[i] for i in range(*t.indices(len(self)))]
        if not 0 <= t < len(self):
            raise IndexError(f"frame {t} of {len(self)}")
        return self._read(t)


class KeyFrames(Mapping[int, np.ndarray]):
    """Time -> key frame (H, W) float32 in [0, 1], read on demand."""

    def __init__(
        self, times: Sequence[int], shape: tuple[int, int], read: Callable[[int], np.ndarray]
    ) -> None:
        self.shape = shape
        self._times = dict.fromkeys(times)
        self._read = read

    def __len__(self) -> int:
        return len(self._times)

    def __iter__(self) -> Iterator[int]:
        return iter(self._times)

    def __getitem__(self, t: int) -> np.ndarray:
        if t not in self._times:
            raise KeyError(t)
        return self._read(t)


def remembered(lr: Stream, keys: KeyFrames) -> tuple[Stream, KeyFrames]:
    """The same streams, of which the fast frames of the longest gap and the last three key frames
    are kept: who looks at a gap's frames once more need not read them once more."""
    times = sorted(keys)
    gap = max((b - a for a, b in pairwise(times)), default=0)
    low = lru_cache(gap + 2)(lr.__getitem__)
    sharp = lru_cache(3)(keys.__getitem__)
    return Stream(lr.shape, low), KeyFrames(list(keys), keys.shape, sharp)


def recording_streams(
    video: Video,
    gap: int,
    data: Data,
    noise: CameraNoise = CLEAN,
    seed: int = 0,
    *,
    hr_noise: CameraNoise = CLEAN,
    shift: tuple[float, float] = (0.0, 0.0),
) -> tuple[Stream, KeyFrames]:
    """What the two cameras would have seen of a recording whose every sharp frame is known.

    Low-resolution frames are binned from the sharp ones, with the fast camera's `noise` (drawn from
    seed, recording and frame, so always the same), or taken from the recording's own stream
    (`data.lr_source: recorded`). Key frames are every `gap`-th frame and the last one.

    Args:
        hr_noise: noise on the key frames, beside what the recording has of its own.
        shift: of what the fast camera sees against the sharp one, rows and columns in sharp pixels.
    """
    frames, height, width = video.shape
    if frames < 2:
        raise InputError(f"recording {video.id}: has {frames} frame; two key frames are needed")
    if height % data.scale or width % data.scale:
        raise InputError(
            f"recording {video.id}: {height}x{width} pixels cannot be divided by "
            f"data.scale {data.scale}; ingest it with --crop, which cuts it "
            f"to {height - height % data.scale}x{width - width % data.scale}"
        )
    grid = (height // data.scale, width // data.scale)
    name = zlib.crc32(video.id.encode())
    if data.lr_source == "recorded":
        if any(shift):
            raise InputError(
                "only binned low-resolution frames are shifted, a recorded stream lies where it "
                "lies; leave evaluate.misregistration out, or set data.lr_source to binned"
            )
        lr = _recorded_stream(video, data.scale, noise)
    else:

        def binned(t: int) -> np.ndarray:
            frame = bin_down(shifted(video.intensity([t]), *shift)[0], data.scale)
            return noise.apply(frame, np.random.default_rng([seed, name, t]))

        lr = Stream((frames, *grid), binned)
    times = sorted({k for t in range(frames) for k in key_frames(t, gap, frames)})

    def key(t: int) -> np.ndarray:
        return hr_noise.apply(video.intensity(t), np.random.default_rng([seed, name, t, 1]))

    sharp = video.intensity if hr_noise is CLEAN else key
    return lr, KeyFrames(times, (height, width), sharp)


def _recorded_stream(video: Video, scale: int, noise: CameraNoise) -> Stream:
    _, h, w = video.require_lr(scale)
    if noise is not CLEAN:
        raise InputError(
            "noise is only added to binned low-resolution frames, a recorded stream has its own; "
            "leave it out, or set data.lr_source to binned"
        )
    nearest = video.nearest_lr(range(video.shape[0]))
    return Stream((video.shape[0], h, w), lambda t: video.lr_intensity(nearest[t]))


def streams_of_pair(pair: Pair, scale: int) -> tuple[Stream, KeyFrames]:
    """The streams of two cameras' recordings: each sharp frame belongs to the fast frame that is
    nearest in time. The stream has all fast frames; the key frames may begin later and end earlier.

    Raises:
        InputError: the sizes do not fit, or there are fewer than two key frames.
    """
    sharp, fast = pair.sharp, pair.fast
    h, w = fast.shape[1:]
    height, width = sharp.shape[1:]
    if (height, width) != (scale * h, scale * w):
        raise InputError(
            f"{sharp.path} shows {height}x{width} pixels and {fast.path} {h}x{w}: scale "
            f"{scale} needs {scale * h}x{scale * w} for it; state with --registration where the "
            "fast camera's pixels lie on the sharp frames, or use a model of the right scale"
        )
    if sharp.shape[0] < 2:
        raise InputError(
            f"{sharp.path}: has {sharp.shape[0]} frame that the fast camera covers, at least 2 key "
            "frames are needed (one before and one after the frames that are reconstructed)"
        )
    number = _beside(pair)
    nearest = list(number)
    read = _InTurn(sharp)
    keys = KeyFrames(nearest, (height, width), lambda t: read(number[t]))
    return Stream(fast.shape, _InTurn(fast)), keys


def _beside(pair: Pair) -> dict[int, int]:
    """Fast frame -> the sharp frame of its instant. Sharp frames at whose instant the fast camera
    lost its frames are left out, with a warning.

    Raises:
        InputError: two sharp frames share a fast one, or less than two are left.
    """
    name = f"{pair.sharp.path} with {pair.fast.path}"
    frames = pair.sharp.shape[0]
    nearest = [int(np.abs(pair.times - k).argmin()) for k in range(frames)]
    interval = float(np.median(np.diff(pair.times)))
    aside = np.abs(pair.times[nearest] - np.arange(frames)) / interval
    there = [k for k in range(frames) if aside[k] <= 0.5 + 1e-6]
    if len({nearest[k] for k in there}) < len(there):
        raise InputError(
            f"{name}: there are more sharp frames than fast ones; are the two files swapped, or "
            "--gap below 1?"
        )
    if lost := sorted(set(range(frames)) - set(there)):
        logger.warning(
            "%s: the fast camera lost its frames at the instant of sharp frame %s, which %s left "
            "out",
            *(name, ", ".join(map(str, lost)), "is" if len(lost) == 1 else "are"),
        )
    if len(there) < 2:
        raise InputError(
            f"{name}: the fast camera has a frame at the instant of {len(there)} sharp frame, at "
            "least 2 key frames are needed: check --gap and --lr-start"
        )
    _report_times(pair, [nearest[k] for k in there], aside[there], there)
    return {nearest[k]: k for k in there}


def _report_times(
    pair: Pair, nearest: Sequence[int], aside: np.ndarray, there: Sequence[int]
) -> None:
    """Log which fast frames are left out, and warn of sharp frames between two fast ones."""
    name, last = pair.fast.path, pair.fast.shape[0] - 1
    for first, stop, where in (
        (0, nearest[0] - 1, "before the first"),
        (nearest[-1] + 1, last, "after the last"),
    ):
        if first <= stop:
            logger.info(
                "%s: frames %d to %d come %s key frame and are left out", name, first, stop, where
            )
    if aside.max() > BESIDE:
        logger.warning(
            "%s: key frame %d lies %.2f fast frames beside the nearest one (frame %d), %d others "
            "more than %g: check --gap and --lr-start",
            pair.sharp.path,
            *(there[worst := int(aside.argmax())], aside.max(), nearest[worst]),
            *(np.count_nonzero(aside > BESIDE) - 1, BESIDE),
        )


class _InTurn:
    """Reads frames of a recording by number; those in order without opening the file again."""

    _SKIPPED = 4  # frames up to which reading on is cheaper than opening the file again

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._frames: Iterator[np.ndarray] = iter(())
        self._next: int | None = None

    def __call__(self, t: int) -> np.ndarray:
        if self._next is None or not self._next <= t <= self._next + self._SKIPPED:
            self._frames, self._next = self._recording.frames(t), t
        for _ in range(t - self._next):
            next(self._frames)
        self._next = t + 1
        top = 2**self._recording.bit_depth - 1
        frame: np.ndarray = next(self._frames).astype(np.float32) / top
        return frame
