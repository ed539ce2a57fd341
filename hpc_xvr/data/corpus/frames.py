"""The frames of a recording as an array that reads what it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import index
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hpc_xvr.data.corpus.reader import Video

Index = int | slice | Sequence[int] | np.ndarray | EllipsisType
"""Of one axis; a sequence of numbers only of the first one."""


class Frames:
    """Frames (T, H, W) of one camera, as stored; a part of them is read when it is indexed.

    Works where a NumPy array is only indexed, measured, iterated over or converted, and as the
    source of a dask array:

        frames = corpus["run12"].frames
        frames[3]                      # (H, W)
        frames[10:20]                  # (10, H, W)
        frames[-1, 10:50, ::2]         # steps and negative numbers count as in NumPy
        frames[[0, 8, 16], 10:50]      # (3, 40, W)
        np.asarray(frames)             # all of them

    Indexing raises IndexError for what is not there, and DamagedVideo for data that do not match
    their checksum.
    """

    ndim = 3

    def __init__(self, video: Video, lr: bool = False) -> None:
        shape = video.lr_shape if lr else video.shape
        if shape is None:
            raise ValueError(f"video {video.id}: has no low-resolution frames")
        self.shape: tuple[int, int, int] = shape
        """Frames, height, width."""
        self._video, self._lr = video, lr

    @property
    def dtype(self) -> np.dtype:
        """uint8 or uint16."""
        return self._video.lr_dtype if self._lr else self._video.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[t] for t in range(len(self)))

    def __getitem__(self, key: Index | tuple[Index, ...]) -> np.ndarray:
        t, y, x = self._per_axis(key)
        frames, pick_t = _frame_numbers(t, self.shape[0])
        rows, pick_y = _range(y, self.shape[1])
        columns, pick_x = _range(x, self.shape[2])
        if frames and rows.stop > rows.start and columns.stop > columns.start:
            read = self._video.read_lr if self._lr else self._video.read
            crops = read(frames, rows, columns)
        else:
            sides = (part.stop - part.start for part in (rows, columns))
            crops = np.empty((len(frames), *sides), self.dtype)
        return crops[pick_t, pick_y, pick_x]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("frames on a disk become an array only by copying them")
        return np.asarray(self[:], dtype)

    def __repr__(self) -> str:
        return f"<Frames {self.shape} of video {self._video.id}{', lr' if self._lr else ''}>"

    def _per_axis(self, key: Index | tuple[Index, ...]) -> tuple[Any, Any, Any]:
        parts = list(key) if isinstance(key, tuple) else [key]
        if len([part for part in parts if part is not Ellipsis]) > self.ndim:
            raise IndexError(f"{len(parts)} indices for frames with {self.ndim} axes")
        dots = [place for place, part in enumerate(parts) if part is Ellipsis]
        if len(dots) > 1:
            raise IndexError("an index can only have a single ellipsis ('...')")
        place = dots[0] if dots else len(parts)
        missing = [slice(None)] * (self.ndim - len(parts) + len(dots))
        t, y, x = parts[:place] + missing + parts[place + 1 :]
        return t, y, x


def _frame_numbers(key: Any, count: int) -> tuple[list[int], int | slice]:
    """The frames to read, and what to take of them."""
    if isinstance(key, slice):
        return list(range(count)[key]), slice(None)
    if isinstance(key, (Sequence, np.ndarray)) and np.ndim(key) == 1:
        return [_number(one, count) for one in key], slice(None)
    return [_number(key, count)], 0


def _range(key: Any, count: int) -> tuple[slice, int | slice]:
    """The contiguous part to read, and what to take of it."""
    if not isinstance(key, slice):
        number = _number(key, count)
        return slice(number, number + 1), 0
    numbers = range(count)[key]
    if not numbers:
        return slice(0, 0), slice(None)
    return slice(min(numbers), max(numbers) + 1), slice(None, None, numbers.step)


def _number(key: Any, count: int) -> int:
    number = index(key)
    if not -count <= number < count:
        raise IndexError(f"index {number} is outside of {count}")
    return number % count
