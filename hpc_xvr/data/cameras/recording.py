"""A camera's recording: what is known about it, and its frames, read on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

FrameSource = Callable[[int, int], Iterator[np.ndarray]]
LARGEST_FRAME = 2**28
"""Pixels; no camera comes near it, so a header that states more is damaged."""
SAMPLE = 2**20
"""Values of which it is seen whether the largest one of a file is an outlier."""
DOUBTFUL = 0.1
"""An outlier if 99.9 % of the values lie below this share of it."""
STEADY = 0.1
"""Share of a frame interval by which a time stamp may lie aside and still count as steady."""
LEFT_OUT = "frames_left_out"
"""Key of the metadata that names the frames which are missing."""


@dataclass(frozen=True)
class Recording:
    """The frames of one camera, read on demand. `open_recording` makes one.

    No file handle is kept: `frames` opens the file and closes it. `shape` is (frames, height,
    width). `dtype` is uint8 or uint16; stored values are 0..2**bit_depth - 1, right-aligned.
    `full_scale` is the physical value (transmission, or the unit of a floating-point file) of the
    largest one. `pixel_size_um` is the pixel size on the object. `times_s` holds the time of each
    frame in seconds from the first one, (frames,) float64, rising, where the file has time stamps:
    they show lost frames, which `frame_rate_hz`, the rate between neighbours, does not. What is
    unknown is None.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype
    bit_depth: int
    source: FrameSource = field(repr=False, compare=False)
    camera: str = "unknown"
    frame_rate_hz: float | None = None
    pixel_size_um: float | None = None
    exposure_s: float | None = None
    full_scale: float = 1.0
    metadata: dict[str, str | int | float] = field(default_factory=dict)
    times_s: np.ndarray | None = field(default=None, repr=False, compare=False)
    numbers: np.ndarray | None = field(default=None, repr=False, compare=False)
    """When each frame was taken, in frame intervals from the camera's first one, where frames that
    are missing were left out (see `without_missing`)."""
    scale_doubt: str = field(default="", repr=False, compare=False)
    """Warned of where values are stored on `full_scale`."""
    scale_measured: bool = field(default=False, repr=False, compare=False)
    """Whether `full_scale` is the largest value of its frames, as nothing states it."""
    told: set[str] = field(default_factory=set, repr=False, compare=False)
    """Warnings that were given, as frames may be read several times."""

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all frames as stored values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def in_floats(self) -> bool:
        """Whether its values are floats, which `full_scale` makes grey levels, and not counts.

        Reads the first frame.
        """
        return next(self.values(0, 1)).dtype.kind == "f"

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yield frames start..stop-1 as stored values, (H, W) of `dtype`.

        Raises:
            InputError: a frame cannot be read, has another shape, or holds NaN, infinity or a value
                above the bit depth. The message names the frame.

        Warns, once a recording, of values that were cut to what can be stored.
        """
        cut = _Cut(self)
        try:
            for index, frame in enumerate(self.values(start, stop), start):
                yield cut.to_range(frame, index)
        finally:  # `reconstruct`, which reads here and there, does not come to the end
            cut.tell()

    def values(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yield frames start..stop-1 in the file's own unit, (H, W): counts, or finite floats.

        Raises:
            InputError: as `frames`, but for the bit depth.
        """
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        with guarded(f"{self.path}: frame {start}"):
            source = self.source(start, stop)
        for index in range(start, stop):
            with guarded(f"{self.path}: frame {index}"):
                frame = next(source, None)
            if frame is None:
                raise InputError(
                    f"{self.path}: ends before frame {index}, {self.shape[0]} frames "
                    "are expected: the file is incomplete, copy it again"
                )
            if frame.shape != self.shape[1:]:
                raise InputError(
                    f"{self.path}: frame {index} has {_size(frame.shape)} pixels, "
                    f"the first one {_size(self.shape[1:])}: all must be alike"
                )
            if frame.dtype.kind == "f" and not np.isfinite(frame).all():
                bad = frame.size - np.count_nonzero(np.isfinite(frame))
                raise InputError(
                    f"{self.path}: frame {index} holds {bad} values that are NaN or "
                    "infinite: repair the frame or leave it out"
                )
            yield frame

    def changed(self, change: Callable[[np.ndarray], np.ndarray], **fields: Any) -> Recording:
        """The same recording with `change` applied to the values of every frame."""
        return replace(
            self,
            source=lambda start, stop: (change(frame) for frame in self.values(start, stop)),
            **fields,
        )

    def flipped(self) -> Recording:
        """The same recording with its rows from bottom to top."""
        return self.changed(lambda frame: frame[::-1])

    def taken(self) -> np.ndarray:
        """When each frame was taken, in frame intervals from the first one: 0, 1, 2, 5 where two
        were lost after the third, as the time stamps say."""
        stamps, frames = self.times_s, self.shape[0]
        if self.numbers is not None:
            return self.numbers
        if stamps is None or frames < 2:
            return np.arange(frames, dtype=float)
        numbers: np.ndarray = (stamps - stamps[0]) / np.median(np.diff(stamps))
        whole = np.rint(numbers)
        return np.where(np.abs(numbers - whole) < STEADY, whole, numbers)

    def without_missing(self) -> Recording:
        """The same recording without the frames that cannot be read, of which it warns.

        `numbers` and `times_s` keep the times of the others. Reads all frames.

        Raises:
            InputError: none can be read.
        """
        bad: dict[int, InputError] = {}
        at = 0
        while at < len(self):
            try:
                for _ in self.values(at):
                    at += 1
            except InputError as error:
                bad[at] = error
                at += 1
        if len(bad) == len(self):
            raise bad[0]
        if not bad and self.numbers is None:
            return self
        return self.without(bad, f": {next(iter(bad.values()))}" if bad else "")

    def without(self, bad: Collection[int], reason: str = "") -> Recording:
        """The same recording without some frames, of which it warns; `numbers` and `times_s` keep
        the times of the others."""
        kept = np.array([k for k in range(len(self)) if k not in bad])
        place = np.arange(len(self)) if self.numbers is None else self.numbers.astype(int)
        left_out = ", ".join(spans(sorted({*range(place[-1] + 1)} - {*place[kept].tolist()})))
        logger.warning("%s: frames %s are missing and left out%s", self.path, left_out, reason)

        def source(start: int, stop: int) -> Iterator[np.ndarray]:
            for run in runs(kept[start:stop]):
                yield from self.values(run.start, run.stop)

        times = self.times_s
        return replace(
            self,
            shape=(len(kept), *self.shape[1:]),
            source=source,
            numbers=self.taken()[kept],
            times_s=None if times is None else times[kept] - times[kept[0]],
            metadata={**self.metadata, LEFT_OUT: left_out},
        )

    def cut(
        self, height: int, width: int, top: int = 0, left: int = 0, first: int = 0, last: int = -1
    ) -> Recording:
        """Frames `first` to `last` (-1: the last one), cut to `height` rows from `top` and `width`
        columns from `left`."""
        frames = (self.shape[0] if last < 0 else last + 1) - first
        times, numbers = self.times_s, self.numbers
        return replace(
            self,
            shape=(frames, height, width),
            numbers=None if numbers is None else numbers[first : first + frames],
            times_s=None if times is None else times[first : first + frames] - times[first],
            source=lambda start, stop: (
                frame[top : top + height, left : left + width]
                for frame in self.values(first + start, first + stop)
            ),
        )


class _Cut:
    """Brings frames to a recording's stored values, and counts what is cut on the way."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._above = self._below = self._count = 0

    def to_range(self, frame: np.ndarray, index: int) -> np.ndarray:
        """Stored values of frame `index`.

        Raises:
            InputError: counts above the bit depth.
        """
        recording = self._recording
        top = 2**recording.bit_depth - 1
        self._count += frame.size
        if frame.dtype.kind == "f":
            # float16 ends at 65504, and float32 gets there from the smallest of them
            scaled = np.multiply(
                frame, top / recording.full_scale, dtype=np.result_type(frame, np.float32)
            )
            self._above += int(np.count_nonzero(scaled > top + 0.5))
            self._below += int(np.count_nonzero(scaled < -0.5))
            stored: np.ndarray = np.clip(np.rint(scaled), 0, top).astype(recording.dtype)
            return stored
        if frame.dtype.kind == "i":
            self._below += int(np.count_nonzero(frame < 0))
            frame = np.maximum(frame, 0)
        if (largest := int(frame.max())) > top:
            used = int(np.bitwise_or.reduce(frame, axis=None))
            unit = used & -used  # all values are multiples of it
            width = 8 * frame.dtype.itemsize
            right = f"state one from {largest.bit_length()} (--bit-depth)"
            if largest.bit_length() > 16:
                right = "give a full scale in its place (--full-scale)"
                if largest == np.iinfo(frame.dtype).max:
                    right = f"{right}, or repair the pixels if that value marks bad ones"
            if unit >= 2 ** (width - recording.bit_depth):
                right = f"state {width} (--bit-depth), as all values are multiples of {unit}"
            raise InputError(
                f"{recording.path}: frame {index} holds the value {largest}, but "
                f"{recording.bit_depth} bits end at {top}: the bit depth is wrong, {right}"
            )
        return frame.astype(recording.dtype, copy=False)

    def tell(self) -> None:
        """Warn of what was cut, unless that was said of this recording before."""
        recording = self._recording
        if recording.scale_doubt:
            self._once("scale", recording.scale_doubt)
        if self._above:
            self._once(
                "above",
                f"{100 * self._above / self._count:.3g} % of the values lie above full scale "
                f"{recording.full_scale:g} and were clipped to it; a larger full scale would keep "
                "them",
            )
        if self._below:
            self._once(
                "below",
                f"{100 * self._below / self._count:.3g} % of the values lie below 0 and became 0; "
                "an offset added to the file's values would keep them",
            )

    def _once(self, what: str, text: str) -> None:
        if what not in self._recording.told:
            self._recording.told.add(what)
            logger.warning("%s: %s", self._recording.path, text)


def array_recording(
    path: Path,
    shape: tuple[int, int, int],
    native: np.dtype,
    source: FrameSource,
    bit_depth: int | None,
    full_scale: float | None,
    missing: bool = False,
    **fields: Any,
) -> Recording:
    """Make a recording of frames whose file states only their number type (TIFF, PNG, HDF5).

    Unsigned integers of 8 and 16 bit, and signed ones, keep their values, wider ones with a bit
    depth up to 16. Floats, and wider integers with a full scale, are scaled to 16 bit by it, floats
    otherwise by their largest value, for which the whole file is read once. What is below 0 becomes
    0, with a warning. `missing`: frames that cannot be read are left out.

    Raises:
        InputError: numbers of another type, a bit depth that does not fit it, or floats that are
            all below 0.
    """
    check_shape(path, shape)
    native = np.dtype(native)
    if missing:
        there = Recording(path, shape, native, 16, source, **fields).without_missing()
        shape, source = there.shape, there.source
        kept = ("numbers", "times_s", "metadata")
        fields = {**fields, **{name: getattr(there, name) for name in kept}}
    if native.kind == "f":
        if bit_depth is not None:
            raise InputError(
                f"{path}: holds floating-point numbers, which have no bit depth: give their "
                "full scale instead"
            )
        floats = Recording(path, shape, np.dtype(np.uint16), 16, source, **fields)
        if full_scale is not None:
            return replace(floats, full_scale=positive(path, "full scale", full_scale))
        full_scale, doubt = _largest(floats)
        return replace(floats, full_scale=full_scale, scale_doubt=doubt, scale_measured=True)
    wide = native.itemsize > 2
    if native.kind not in "ui" or (wide and bit_depth is None and full_scale is None):
        how = ": convert the file"
        if native.kind in "ui":
            how = ": give a bit depth up to 16 to keep their values, or a full scale"
        raise InputError(
            f"{path}: holds {native} numbers; supported are uint8, uint16, int16 and float{how}"
        )
    widest = min(8 * native.itemsize - (native.kind == "i"), 16)
    if bit_depth is not None and not 1 <= bit_depth <= widest:
        raise InputError(
            f"{path}: bit depth {bit_depth} does not fit its {native} numbers: give 1 to {widest}"
        )
    if full_scale is not None:
        if not wide:
            raise InputError(
                f"{path}: holds {native} counts: a full scale is for floating-point numbers and "
                "those of more than 16 bit"
            )
        if bit_depth is not None:
            raise InputError(f"{path}: give its bit depth or its full scale, not both")
        scaled = Recording(path, shape, np.dtype(np.uint16), 16, source, **fields).changed(
            lambda frame: frame.astype(np.float64)
        )
        return replace(scaled, full_scale=positive(path, "full scale", full_scale))
    stored = np.dtype(np.uint8 if native.itemsize == 1 else np.uint16)
    return Recording(path, shape, stored, bit_depth or widest, source, **fields)


def _largest(floats: Recording) -> tuple[float, str]:
    """The largest value, and a doubt where it is far above nearly all others.

    A single hot pixel, or a hit of a cosmic ray, would otherwise leave a black movie.

    Raises:
        InputError: all values are below 0.
    """
    step = max(1, math.prod(floats.shape) // SAMPLE)
    largest, where, sample = -math.inf, 0, []
    for index, frame in enumerate(floats.values()):
        if (top := float(frame.max())) > largest:
            largest, where = top, index
        sample.append(frame.ravel()[index % step :: step].astype(np.float64))
    if largest < 0:
        raise InputError(f"{floats.path}: all values are below 0: nothing to store")
    usual = float(np.quantile(np.concatenate(sample), 0.999, method="inverted_cdf"))
    if usual >= DOUBTFUL * largest:
        return largest or 1.0, ""
    return largest, (
        f"99.9 % of the values lie below {100 * max(usual, 0) / largest:.2g} % of full scale "
        f"{largest:g}, the largest one (in frame {where}), and are stored as almost black: give "
        "--full-scale"
    )


def runs(numbers: Iterable[int]) -> list[range]:
    """Rising numbers as ranges without a gap."""
    found: list[range] = []
    for number in map(int, numbers):
        if found and found[-1].stop == number:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def spans(numbers: Iterable[int]) -> list[str]:
    """Rising numbers for messages: 3, 7 to 9."""
    return [
        f"{run.start} to {run.stop - 1}" if len(run) > 1 else str(run.start)
        for run in runs(numbers)
    ]


@contextmanager
def guarded(where: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into a one-line InputError.

    They raise nearly any type of exception, so all are caught.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{where}: no such file") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{where}: cannot be read ({reason}): the file is damaged, incomplete or "
            "of an unknown variant, copy or export it again"
        ) from error


def check_shape(path: Path, shape: tuple[int, ...]) -> None:
    """Refuse empty recordings, and frames larger than any camera makes."""
    if shape[0] < 1:
        raise InputError(f"{path}: holds no frames: export it again with at least one")
    if min(shape[1:]) < 1 or shape[1] * shape[2] > LARGEST_FRAME:
        raise InputError(
            f"{path}: states frames of {_size(shape[1:])} pixels: the header is "
            "damaged, copy or export the file again"
        )


def check_bytes(path: Path, needed: int, frames: int) -> None:
    """Refuse a file that is shorter than its header says."""
    have = path.stat().st_size
    if have < needed:
        raise InputError(
            f"{path}: has {have} bytes, its header promises {frames} frames in "
            f"{needed}: the file is incomplete, copy it again"
        )


def stated_bit_depth(path: Path, stored: int, header: int | None, stated: int | None) -> int:
    """Significant bits of `stored` ones: those the user states, else those of the header, else all.

    Raises:
        InputError: the user states more than are stored.
    """
    known = min(header or stored, stored)
    if stated is None:
        return known
    if not 1 <= stated <= stored:
        raise InputError(
            f"{path}: bit depth {stated} does not fit its values of {stored} bit: give 1 to "
            f"{stored}"
        )
    if header and stated != known:
        logger.warning("%s: read as the %d bit you state; it says %d", path, stated, known)
    return stated


def positive(path: Path, what: str, value: float) -> float:
    """Return `value`; raise InputError unless it is a finite number above 0."""
    if not 0 < value < float("inf"):
        raise InputError(f"{path}: {what} is {value}: it must be a number above 0")
    return value


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
