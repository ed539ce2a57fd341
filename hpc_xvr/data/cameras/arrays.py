"""Recordings made from arrays of frames, in memory or read frame by frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hpc_xvr.data.cameras.recording import Recording, array_recording
from hpc_xvr.errors import InputError

ROUNDING = 1e-5
"""Share of full scale by which floating-point values may exceed 0..full scale."""


class ArrayLike(Protocol):
    """What numpy, zarr, h5py and dask arrays have in common."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, index: int, /) -> Any: ...


def open_array(
    array: ArrayLike,
    bit_depth: int | None = None,
    full_scale: float | None = None,
    name: str = "array",
) -> Recording:
    """Make a recording of frames (T, H, W): uint8 or uint16 counts, or floating-point values.

    Counts are 0..2**bit_depth - 1 (default: all bits of their type); floating-point values must lie
    in 0..full_scale (default: 1). Frames are read one by one when they are needed.

    Raises:
        InputError: another shape or type; when frames are read, values outside the range.
    """
    shape, native = tuple(map(int, array.shape)), np.dtype(array.dtype)
    if len(shape) != 3:
        raise InputError(f"{name}: has the shape {shape}: give frames as (T, H, W)")
    top = None
    if native.kind == "f":
        top = 1.0 if full_scale is None else full_scale

    def source(start: int, stop: int) -> Iterator[np.ndarray]:
        for index in range(start, stop):
            frame = np.asarray(array[index])
            if top is not None:
                _check_range(name, index, frame, top)
                frame = frame.astype(np.float32, copy=False)
            yield frame

    return array_recording(
        Path(name), (shape[0], shape[1], shape[2]), native, source, bit_depth, top or full_scale
    )


def _check_range(name: str, index: int, frame: np.ndarray, top: float) -> None:
    low, high = float(frame.min()), float(frame.max())
    if low < -ROUNDING * top or high > (1 + ROUNDING) * top:
        raise InputError(
            f"{name}: frame {index} holds values from {low:g} to {high:g}, outside 0 to the full "
            f"scale {top:g}: give the full scale that belongs to them"
        )
