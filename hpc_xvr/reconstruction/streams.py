"""What a reconstruction reads: the fast camera's stream and the sharp camera's key frames."""

from __future__ import annotations

import threading
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
from hpc_xvr.data.pairing.joining import Pair, TooFew
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


def remembered(lr: Stream, keys: KeyFrames, gaps: int = 1) -> tuple[Stream, KeyFrames]:
    """The same streams, of which the frames of that many of the longest gaps are kept: who looks at
    a gap's frames once more need not read them once more."""
    times = sorted(keys)
    gap = max((b - a for a, b in pairwise(times)), default=0)
    low = lru_cache(gaps * (gap + 1) + 1)(lr.__getitem__)
    sharp = lru_cache(gaps + 2)(keys.__getitem__)
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
        swapped = "; or are the two files swapped?" if h > height or w > width else ""
        raise InputError(
            f"{sharp.path} shows {height}x{width} pixels and {fast.path} {h}x{w}: scale "
            f"{scale} needs {scale * h}x{scale * w} for it; state with --registration where the "
            "fast camera's pixels lie on the sharp frames (hpc-xvr register finds it), or use a "
            f"model of the right scale{swapped}"
        )
    if sharp.shape[0] < 2:
        raise TooFew(
            f"{sharp.path}: has {sharp.shape[0]} frame that the fast camera covers, at least 2 key "
            "frames are needed (one before and one after the frames that are reconstructed)"
        )
    number = _beside(
        f"{sharp.path} with {fast.path}", pair.times, sharp.shape[0], ": check --gap and --lr-start"
    )
    read = _InTurn(sharp)
    keys = KeyFrames(list(number), (height, width), lambda t: read(number[t]))
    return Stream(fast.shape, _InTurn(fast)), keys


def streams_of_recording(video: Video, scale: int) -> tuple[Stream, KeyFrames]:
    """The same of a recording of a corpus that holds its fast camera's own stream.

    Raises:
        InputError: it holds none or one of another scale, or there are fewer than two key frames.
    """
    shape = video.require_lr(scale)
    name = f"recording {video.id}"
    times = np.asarray(video.info.lr_times or [], float)
    if len(times) != shape[0]:
        raise InputError(
            f"{name}: has {shape[0]} fast frames and {len(times)} times for them; ingest it again"
        )
    hint = ": look at how it was ingested"
    number = _beside(name, times, video.shape[0], hint)
    keys = KeyFrames(list(number), video.shape[1:], lambda t: video.intensity(number[t]))
    return Stream(shape, video.lr_intensity), keys


def _beside(name: str, times: np.ndarray, frames: int, hint: str) -> dict[int, int]:
    """Fast frame -> the sharp frame of its instant. Sharp frames at whose instant the fast camera
    lost its frames are left out, with a warning, as are those before or after all fast frames.

    Args:
        name: of the two recordings, for messages.
        times: of each fast frame, in sharp frames from the first one.
        frames: how many sharp ones there are.
        hint: what to check where something does not fit.

    Raises:
        InputError: two sharp frames share a fast one, or less than two are left.
    """
    nearest = [int(np.abs(times - k).argmin()) for k in range(frames)]
    interval = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    aside = np.abs(times[nearest] - np.arange(frames)) / interval
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
        raise TooFew(
            f"{name}: the fast camera has a frame at the instant of {len(there)} sharp frame, at "
            f"least 2 key frames are needed{hint}"
        )
    beside = aside[there]
    if beside.max() > BESIDE:
        worst = int(beside.argmax())
        logger.warning(
            "%s: key frame %d lies %.2f fast frames beside the nearest one (frame %d), %d others "
            "more than %g%s",
            *(name, there[worst], beside.max(), nearest[there[worst]]),
            *(np.count_nonzero(beside > BESIDE) - 1, BESIDE, hint),
        )
    return {nearest[k]: k for k in there}


class _InTurn(threading.local):
    """Reads frames of a recording by number; those that a thread takes in order without opening the
    file again."""

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
