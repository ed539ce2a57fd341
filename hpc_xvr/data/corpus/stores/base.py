"""What a store is: writes a clip frame by frame, reads crops of its arrays and its attributes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

CHUNK = 128
ShapeAndType = tuple[tuple[int, int, int], str]


class DamagedData(Exception):
    """Stored bytes that do not match their checksum, or are gone."""


class Clip(Protocol):
    """A clip that is being written."""

    def start(self, name: str, shape: tuple[int, int, int], dtype: np.dtype) -> None: ...

    def append(self, frame: np.ndarray) -> None: ...

    def finish(self, attributes: dict[str, Any]) -> None: ...

    def abort(self) -> None: ...


class Array(Protocol):
    """A stored array (T, H, W) open for reading."""

    shape: tuple[int, int, int]
    dtype: np.dtype

    def read(self, t: Sequence[int], y: slice, x: slice) -> np.ndarray: ...


class Store(Protocol):
    """One file format. Arrays of a clip are named `frames` and `lr`."""

    suffix: str
    attributes_file: str
    """Name, in the folder of a clip, of the file that holds its attributes; ".": the clip is one
    file."""

    def create(self, path: Path) -> Clip: ...

    def complete(self, path: Path, attributes: dict[str, Any]) -> None:
        """Give a finished clip these attributes: what it has already, and what is new or changed.

        Raises:
            OSError: the disk refuses. The clip is unusable then.
        """
        ...

    def open(self, path: Path, name: str) -> Array: ...

    def describe(self, path: Path) -> tuple[dict[str, Any], dict[str, ShapeAndType]]: ...

    def index(self, root: Path, scratch: Path, ids: Sequence[str]) -> None: ...


def chunk_side(length: int) -> int:
    """Side of the chunks along an axis: equal parts of at most 128."""
    return math.ceil(length / math.ceil(length / CHUNK))


def first_line(error: Exception) -> str:
    """What went wrong, on one line."""
    return str(error).splitlines()[0]
