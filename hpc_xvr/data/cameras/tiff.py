"""TIFF: which pages are frames, and their values.

tifffile decodes the pages. What it would pass over in silence is looked at: pages that are cut off
and thumbnails (`tiff_pages`), axes other than time, calibrations and units (`tiff_description`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from hpc_xvr.data.cameras import results, tiff_pages
from hpc_xvr.data.cameras.recording import check_shape
from hpc_xvr.data.cameras.tiff_description import check_axes, stated_by
from hpc_xvr.errors import InputError

DENSEST = 2000
"""No codec of these files compresses a frame by more than this factor."""
LOSSY = {6, 7, 22610, 33007, 34892, 34927, 34934, 50001}
"""Compressions (JPEG, JPEG XR, WebP, ...) that change grey levels."""
MINISWHITE, MINISBLACK, RGB = 0, 1, 2
ORIENTED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda frame: frame,
    2: lambda frame: frame[:, ::-1],
    3: lambda frame: frame[::-1, ::-1],
    4: lambda frame: frame[::-1],
    5: lambda frame: frame.T,
    6: lambda frame: frame.T[:, ::-1],
    7: lambda frame: frame[::-1, ::-1].T,
    8: lambda frame: frame.T[::-1],
}
"""Tag 274: how a frame is shown upright."""
# Our errors say what tifffile logs about damage; without a handler that would go to stderr too.
tifffile.logger().addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Stack:
    """The frames of a TIFF file, and how they are read.

    `native` is the number type of the values, calibrated; `bits` what they have in the file.
    `pages` are the frames' pages, None where all lie behind the only one. `others`: files that hold
    more of the same recording, `total` frames together.
    """

    shape: tuple[int, int]
    native: np.dtype
    count: int
    bits: int
    pages: tuple[int, ...] | None
    orientation: int = 1
    line: tuple[float, float] | None = None
    """Offset and slope from stored numbers to values."""
    white: float | None = None
    """Value of the largest number that could be stored, where `line` makes floats of integers."""
    fields: dict[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    total: int = 0
    notes: tuple[str, ...] = ()
    """Warnings."""


def open_tiff(path: Path, missing: bool = False) -> Stack:
    """Find the frames: the pages of one series with no axis but time. `missing`: the file may end
    before all of them.

    Raises:
        InputError: several channels, slices or series (they are named), colour, pages that are cut
            off, a damaged file.
    """
    directories = tiff_pages.directories(path, missing)
    pages = tuple(k for k, directory in enumerate(directories) if not directory.extra)
    if not pages:
        raise InputError(
            f"{path}: all its pages are marked as thumbnails or masks: export it again"
        )
    with tifffile.TiffFile(path) as tif:
        page: Any = tif.pages[pages[0]]
        _check_page(path, tif, page, 0)
        shape, native = page.shape[:2], page.dtype.newbyteorder("=")
        stated = stated_by(path, tif, page, [directories[k] for k in pages])
        if left := len(directories) - len(pages):
            stated.notes.append(f"{left} pages that are marked as thumbnails or masks are left out")
        check_axes(path, stated, shape)
        count = len(pages)
        behind = len(directories) == 1 and stated.count > 1 and not stated.others
        if behind:
            _check_behind(path, tif, page, stated.count, missing)
            count = stated.count
        elif stated.count not in (1, count) and not stated.others:
            stated.notes.append(
                f"its description states {stated.count} frames, it has {count}: those are read"
            )
        fields: dict[str, Any] = {"metadata": _texts(page), **stated.fields}
        of_ome = tif.is_ome
        orientation = _orientation(path, page, 0) or 1
        line, bits = stated.line, stated.bits or page.bitspersample
    white = None
    said = results.stated_by(stated.text, str(path), (count, *shape), native)
    if said is not None:  # a result of this program
        fields = results.merged(fields, said, str(path))
        bits = said.counts_bits or bits
        if native.kind == "f":
            white = said.full_scale
        elif line is None and said.slope is not None and of_ome:
            line = (0.0, said.slope)
    if line is not None:
        if native.kind == "u" and line[1] > 0 and line != (-32768, 1):
            top = said.stored_full_scale if said and said.stored_full_scale else 2**bits - 1
            white = line[0] + line[1] * top
        native = np.dtype(np.int16 if line == (-32768, 1) else np.float32)
        bits = 8 * native.itemsize
    return Stack(
        shape[::-1] if orientation > 4 else shape,
        native,
        count,
        bits,
        None if behind else pages,
        orientation,
        line,
        white,
        fields,
        stated.others,
        stated.count,
        tuple(stated.notes),
    )


def read_tiff(path: Path, stack: Stack, start: int, stop: int) -> Iterator[np.ndarray]:
    """Frames start..stop-1, upright and calibrated.

    Raises:
        InputError: a frame cannot be decoded, is in colour, or differs from the first.
    """
    with tifffile.TiffFile(path) as tif:
        stored = tif.pages[stack.pages[0] if stack.pages else 0].dtype
        for index in range(start, stop):
            if stack.pages is None:
                frame = _behind(tif, index)
            else:
                page: Any = tif.pages[stack.pages[index]]
                _check_page(path, tif, page, index)
                if page.dtype != stored:
                    raise InputError(
                        f"{path}: frame {index} holds {page.dtype} numbers, the first one "
                        f"{stored}: all must be alike"
                    )
                if _orientation(path, page, index) not in (None, stack.orientation):
                    raise InputError(
                        f"{path}: frame {index} has another orientation (tag 274) than the first "
                        "one: all must be alike"
                    )
                frame = _decoded(path, page, index)
            if frame.ndim == 3:
                frame = grey(f"{path}: frame {index}", frame)
            if stack.line is not None:
                offset, slope = stack.line
                frame = (offset + slope * frame.astype(np.float64)).astype(stack.native)
            yield ORIENTED[stack.orientation](frame)


def grey(where: str, frame: np.ndarray) -> np.ndarray:
    """The one channel of a frame (H, W, 3) whose three are equal.

    Raises:
        InputError: they differ.
    """
    if (frame != frame[..., :1]).any():
        raise InputError(
            f"{where} is in colour (RGB): convert it to grey; if its channels are three frames, "
            "write them as grey pages"
        )
    one: np.ndarray = frame[..., 0]
    return one


def _decoded(path: Path, page: Any, index: int) -> np.ndarray:
    try:
        frame: np.ndarray = page.asarray()
    except Exception as error:
        if "imagecodecs" not in str(error):
            raise
        raise InputError(
            f"{path}: frame {index} is stored as {_coding(page)}, for which the Python package "
            "imagecodecs is needed: pip install 'hpc_xvr[codecs]'"
        ) from None
    return frame


def _coding(page: Any) -> str:
    if page.compression != 1:
        return str(getattr(page.compression, "name", page.compression))
    return f"packed {page.bitspersample} bit numbers"


def _behind(tif: tifffile.TiffFile, index: int) -> np.ndarray:
    """A frame of the bare pixels that follow the only page's."""
    page: Any = tif.pages[0]
    tif.filehandle.seek(page.dataoffsets[0] + index * page.nbytes)
    stored = page.dtype.newbyteorder(tif.byteorder)
    frame: np.ndarray = np.frombuffer(tif.filehandle.read(page.nbytes), stored)
    native: np.ndarray = frame.astype(page.dtype).reshape(page.shape)
    return native


def _check_behind(path: Path, tif: tifffile.TiffFile, page: Any, count: int, missing: bool) -> None:
    needed = page.dataoffsets[0] + count * page.nbytes
    if page.compression != 1 or not page.is_contiguous or page.bitspersample % 8:
        raise InputError(f"{path}: states {count} frames, but has one page: the file is incomplete")
    if needed > tif.filehandle.size and not missing:
        raise InputError(
            f"{path}: has {tif.filehandle.size} bytes, its header promises {count} frames in "
            f"{needed}: the file is incomplete, copy it again"
        )


def _check_page(path: Path, tif: tifffile.TiffFile, page: Any, index: int) -> None:
    """tifffile fills what is missing with zeros; refuse such pages, colour and absurd sizes."""
    where = f"{path}: frame {index}"
    if page.photometric == MINISWHITE:
        raise InputError(f"{where} is not a grey image with black as 0, but with white: invert it")
    rgb = page.photometric == RGB and page.samplesperpixel == 3
    if rgb and page.planarconfig == 2:
        raise InputError(
            f"{where} is in colour (RGB, in three planes), not grey: if the planes are three "
            "frames, write them as pages (tifffile: photometric='minisblack')"
        )
    if not rgb and (page.photometric != MINISBLACK or page.samplesperpixel != 1):
        kind = str(getattr(page.photometric, "name", page.photometric)).lower()
        raise InputError(
            f"{where} is not a grey image with black as 0, but {kind} of {page.samplesperpixel} "
            "samples a pixel: convert it"
        )
    if len(page.shape) != (3 if rgb else 2):
        raise InputError(f"{where} has {len(page.shape)} dimensions, not 2: convert it")
    if page.compression in LOSSY:
        raise InputError(
            f"{where} is compressed by {_coding(page)}, which changes grey levels: export it "
            "without loss"
        )
    check_shape(path, (1, *page.shape[:2]))
    spans = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    stored = sum(count for _, count in spans)
    if not spans or any(
        at <= 0 or count <= 0 or at + count > tif.filehandle.size for at, count in spans
    ):
        raise InputError(
            f"{where} lies beyond the end of the file: it is incomplete, copy it again"
        )
    needed = math.prod(page.shape) * page.bitspersample // 8
    if needed > stored * (1 if page.compression == 1 else DENSEST):
        raise InputError(
            f"{where} states {needed} bytes but stores {stored}: the file is damaged, copy it again"
        )


def _orientation(path: Path, page: Any, index: int) -> int | None:
    """Tag 274; many writers give it to the first page only."""
    if 274 not in page.tags:
        return None
    value = int(page.tags[274].value)
    if value not in ORIENTED:
        raise InputError(
            f"{path}: frame {index} has the orientation {value} (tag 274): allowed are 1 to 8"
        )
    return value


def _texts(page: Any) -> dict[str, str]:
    texts = {
        name.lower(): page.tags[name].value
        for name in ("Software", "DateTime")
        if name in page.tags
    }
    return {key: value for key, value in texts.items() if isinstance(value, str) and value}
