"""TIFF stacks, and folders of numbered TIFF or PNG files (numbers sorted as numbers)."""

from __future__ import annotations

import logging
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from hpc_xvr.data.cameras.recording import Recording, array_recording, check_shape, guarded
from hpc_xvr.errors import InputError

TIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (*TIFF_SUFFIXES, ".png")
DENSEST = 2000
"""No codec of these files compresses a frame by more than this factor."""
PNG_DTYPES = {"L": "u1", "I;16": "u2", "I;16B": "u2", "I": "u2"}
MINISBLACK = 1

# Our errors say what tifffile logs about damage; without a handler that would go to stderr too.
tifffile.logger().addHandler(logging.NullHandler())


def open_stack(
    path: Path, bit_depth: int | None = None, full_scale: float | None = None
) -> Recording:
    """Open a multi-page TIFF, an ImageJ stack or a single image as one recording.

    Raises:
        InputError: colour, pages cut off, another number type, a damaged file.
    """
    frames, shape, native, metadata = _header(path)
    return array_recording(
        path,
        (frames, *shape),
        native,
        lambda start, stop: _read(path, frames, start, stop),
        bit_depth,
        full_scale,
        metadata=metadata,
    )


def open_sequence(
    files: Sequence[Path], bit_depth: int | None = None, full_scale: float | None = None
) -> Recording:
    """Open numbered single-frame files, in the given order, as one recording.

    Raises:
        InputError: as open_stack; a file that differs from the first is named when it is read.
    """
    _, shape, native, metadata = _header(files[0])

    def source(start: int, stop: int) -> Iterator[np.ndarray]:
        for file in files[start:stop]:
            with guarded(str(file)):
                pages, this_shape, this_native, _ = _header(file)
                if (pages, this_shape, this_native) != (1, shape, native):
                    raise InputError(
                        f"{file}: holds {pages} x {_size(this_shape)} {this_native} "
                        f"pixels, {files[0].name} 1 x {_size(shape)} {native}: all "
                        "files of a sequence must be alike"
                    )
                frame = next(_read(file, 1, 0, 1))
            yield frame

    prefix, suffix = name_key(files[0]) or ("", files[0].name)
    return array_recording(
        files[0].parent / f"{prefix}*{suffix}",
        (len(files), *shape),
        native,
        source,
        bit_depth,
        full_scale,
        metadata=metadata,
    )


def page_count(path: Path) -> int:
    """Frames of one image file."""
    return _header(path)[0]


def name_key(file: Path) -> tuple[str, str] | None:
    """What comes before and after the last number of a file's name; None without a number."""
    match = re.fullmatch(r"(.*?)\d+(\D*)", file.stem, re.DOTALL)
    return (match[1], match[2] + file.suffix) if match else None


def grouped(files: Iterable[Path]) -> list[list[Path]]:
    """Image files whose names differ in nothing but the last number, together."""
    groups: dict[object, list[Path]] = defaultdict(list)
    for file in files:
        key = name_key(file)
        groups[(file.parent, *key) if key else file].append(file)
    return list(groups.values())


def in_order(group: Sequence[Path]) -> list[Path]:
    """One group sorted by its numbers, which must rise in equal steps.

    Raises:
        InputError: a number is missing, or occurs twice (frame_1 and frame_01).
    """
    if len(group) == 1:
        return list(group)
    ordered = sorted((_number(file), file) for file in group)
    smallest = min(b[0] - a[0] for a, b in pairwise(ordered))
    for (before, _), (number, file) in pairwise(ordered):
        if number == before:
            raise InputError(f"{file}: number {number} occurs twice in its sequence: remove one")
        if smallest and number - before != smallest:
            raise InputError(
                f"{file}: follows number {before} where others step by {smallest}: "
                "a frame is missing, restore it or move what is behind the gap to a "
                "folder of its own"
            )
    return [file for _, file in ordered]


def _number(file: Path) -> int:
    prefix, suffix = name_key(file) or ("", "")
    return int(file.name[len(prefix) : len(file.name) - len(suffix)])


def _header(path: Path) -> tuple[int, tuple[int, int], np.dtype, dict[str, str]]:
    """Frames, their shape and number type, and what else the file says."""
    return _png_header(path) if path.suffix.lower() == ".png" else _tiff_header(path)


def _read(path: Path, frames: int, start: int, stop: int) -> Iterator[np.ndarray]:
    if path.suffix.lower() == ".png":
        yield from [_read_png(path)][start:stop]
    else:
        yield from _read_tiff(path, frames, start, stop)


# TIFF ---------------------------------------------------------------------------------------------


def _tiff_header(path: Path) -> tuple[int, tuple[int, int], np.dtype, dict[str, str]]:
    count = _count_pages(path)
    with tifffile.TiffFile(path) as tif:
        page: Any = tif.pages[0]
        _check_page(path, tif, page, 0)
        shape, native = page.shape, page.dtype.newbyteorder("=")
        if count == 1 and _contiguous(tif):
            count = int((tif.imagej_metadata or {}).get("images", 1))
            needed = page.dataoffsets[0] + count * page.nbytes
            if needed > tif.filehandle.size:
                raise InputError(
                    f"{path}: has {tif.filehandle.size} bytes, its header promises "
                    f"{count} frames in {needed}: the file is incomplete, copy it "
                    "again"
                )
        texts = {
            name.lower(): page.tags[name].value
            for name in ("Software", "DateTime")
            if name in page.tags
        }
    metadata = {key: value for key, value in texts.items() if isinstance(value, str) and value}
    return count, shape, native, metadata


def _contiguous(tif: tifffile.TiffFile) -> bool:
    """ImageJ writes stacks above 4 GB as one page followed by the other frames' bare pixels."""
    page: Any = tif.pages[0]
    return bool(
        tif.is_imagej
        and page.compression == 1
        and page.is_contiguous
        and isinstance(tif.imagej_metadata, dict)
    )


def _read_tiff(path: Path, frames: int, start: int, stop: int) -> Iterator[np.ndarray]:
    with tifffile.TiffFile(path) as tif:
        if frames > 1 and len(tif.pages) == 1:
            page: Any = tif.pages[0]
            file, dtype = tif.filehandle, page.dtype.newbyteorder(tif.byteorder)
            for index in range(start, stop):
                file.seek(page.dataoffsets[0] + index * page.nbytes)
                frame = np.frombuffer(file.read(page.nbytes), dtype)
                yield frame.astype(page.dtype).reshape(page.shape)
            return
        native = tif.pages[0].dtype
        for index in range(start, stop):
            page = tif.pages[index]
            _check_page(path, tif, page, index)
            if page.dtype != native:
                raise InputError(
                    f"{path}: frame {index} holds {page.dtype} numbers, the first one {native}: "
                    "all must be alike"
                )
            yield page.asarray()


def _check_page(path: Path, tif: tifffile.TiffFile, page: Any, index: int) -> None:
    """tifffile fills what is missing with zeros; refuse such pages, colour and absurd sizes."""
    if page.photometric != MINISBLACK or page.samplesperpixel != 1 or len(page.shape) != 2:
        raise InputError(f"{path}: frame {index} is not a grey image with black as 0: convert it")
    check_shape(path, (1, *page.shape))
    spans = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    stored = sum(count for _, count in spans)
    if not spans or any(
        at <= 0 or count <= 0 or at + count > tif.filehandle.size for at, count in spans
    ):
        raise InputError(
            f"{path}: frame {index} lies beyond the end of the file: it is "
            "incomplete, copy it again"
        )
    if page.nbytes > stored * (1 if page.compression == 1 else DENSEST):
        raise InputError(
            f"{path}: frame {index} states {page.nbytes} bytes but stores {stored}: "
            "the file is damaged, copy it again"
        )


def _count_pages(path: Path) -> int:
    """Pages of a TIFF, by following their chain: tifffile stops silently where it is broken."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 8:
            raise InputError(f"{path}: does not start as a TIFF file does: empty or damaged")
        big = struct.unpack(order + "H", head[2:4])[0] == 43
        number, entries, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
        width = struct.calcsize(number)
        at = struct.unpack_from(order + number, head, 8 if big else 4)[0]
        seen: set[int] = set()
        while at:
            file.seek(at if at < size else size)
            data = file.read(struct.calcsize(entries))
            end = at + len(data)
            if len(data) == struct.calcsize(entries):
                end += struct.unpack(order + entries, data)[0] * entry
            if at in seen or end == at or end + width > size:
                raise InputError(
                    f"{path}: the chain of its pages breaks after {len(seen)}: the "
                    "file is incomplete or damaged, copy it again"
                )
            seen.add(at)
            file.seek(end)
            at = struct.unpack(order + number, file.read(width))[0]
    return len(seen)


# PNG ----------------------------------------------------------------------------------------------


def _png_header(path: Path) -> tuple[int, tuple[int, int], np.dtype, dict[str, str]]:
    with Image.open(path, formats=["PNG"]) as image:
        if image.mode not in PNG_DTYPES:
            raise InputError(f"{path}: is a {image.mode} image: convert it to 8 or 16-bit grey")
        shape, native = image.size[::-1], np.dtype(PNG_DTYPES[image.mode])
    check_shape(path, (1, *shape))
    if shape[0] * shape[1] * native.itemsize > DENSEST * path.stat().st_size:
        raise InputError(
            f"{path}: states {_size(shape)} pixels, more than its "
            f"{path.stat().st_size} bytes can hold: the file is damaged, copy it "
            "again"
        )
    return 1, shape, native, {}


def _read_png(path: Path) -> np.ndarray:
    _, _, native, _ = _png_header(path)
    with Image.open(path, formats=["PNG"]) as image:
        image.verify()  # checksums of all chunks, which load() does not look at
    with Image.open(path, formats=["PNG"]) as image:
        return np.asarray(image).astype(native)


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
