"""TIFF: which pages are frames, what their numbers mean, and what the file says of itself.

tifffile decodes the pages. What it would pass over in silence is looked at here: pages that are cut
off, thumbnails, axes other than time, calibrations, and units.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
import tifffile

from hpc_xvr.data.cameras.recording import check_shape
from hpc_xvr.errors import InputError

DENSEST = 2000
"""No codec of these files compresses a frame by more than this factor."""
LOSSY = {6, 7, 22610, 33007, 34892, 34927, 34934, 50001}
"""Compressions (JPEG, JPEG XR, WebP, ...) that change grey levels."""
LONGEST = 2**20
"""Bytes of a page's description that are looked at."""
MINISWHITE, MINISBLACK, RGB = 0, 1, 2
REDUCED, MASK = 1, 4  # bits of tag NewSubfileType
TYPES = {3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
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
AXES = {"C": "channels", "S": "samples", "Z": "slices", "T": "times", "Q": "times", "I": "times"}
MICROMETRES = {"nm": 1e-3, "um": 1.0, "micron": 1.0, "microns": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
MICROMETRES |= {"inch": 25_400.0, "in": 25_400.0}
SECONDS = {"ns": 1e-9, "us": 1e-6, "usec": 1e-6, "ms": 1e-3, "msec": 1e-3, "s": 1.0, "sec": 1.0}
SECONDS |= {"second": 1.0, "seconds": 1.0, "min": 60.0, "h": 3600.0, "hour": 3600.0}

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


@dataclass(frozen=True)
class _Directory:
    """What the chain of pages says of one of them."""

    extra: bool
    """A thumbnail or a mask."""
    shape: tuple[int, ...] | None
    """Of the series that starts with this page, by tifffile's description."""
    axes: str | None


@dataclass
class _Stated:
    """What the file says of all its frames together."""

    axes: list[tuple[int, str]] = field(default_factory=list)
    """Sizes and names, without those of size 1."""
    fields: dict[str, Any] = field(default_factory=dict)
    line: tuple[float, float] | None = None
    others: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return math.prod(size for size, _ in self.axes)


def open_tiff(path: Path) -> Stack:
    """Find the frames: the pages of one series with no axis but time.

    Raises:
        InputError: several channels, slices or series (they are named), colour, pages that are cut
            off, a damaged file.
    """
    directories = _directories(path)
    pages = tuple(k for k, directory in enumerate(directories) if not directory.extra)
    if not pages:
        raise InputError(
            f"{path}: all its pages are marked as thumbnails or masks: export it again"
        )
    with tifffile.TiffFile(path) as tif:
        page: Any = tif.pages[pages[0]]
        _check_page(path, tif, page, 0)
        shape, native = page.shape[:2], page.dtype.newbyteorder("=")
        stated = _stated(path, tif, page, [directories[k] for k in pages])
        if left := len(directories) - len(pages):
            stated.notes.append(f"{left} pages that are marked as thumbnails or masks are left out")
        _check_axes(path, stated, shape)
        count = len(pages)
        behind = len(directories) == 1 and stated.count > 1 and not stated.others
        if behind:
            _check_behind(path, tif, page, stated.count)
            count = stated.count
        elif stated.count not in (1, count) and not stated.others:
            stated.notes.append(
                f"its description states {stated.count} frames, it has {count}: those are read"
            )
        fields = {"metadata": _texts(page), **stated.fields}
        orientation = _orientation(path, page, 0) or 1
        line, bits = stated.line, page.bitspersample
    white = None
    if line is not None:
        if native.kind == "u" and line[1] > 0 and line != (-32768, 1):
            white = line[0] + line[1] * (2**bits - 1)
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


def _check_behind(path: Path, tif: tifffile.TiffFile, page: Any, count: int) -> None:
    needed = page.dataoffsets[0] + count * page.nbytes
    if page.compression != 1 or not page.is_contiguous or page.bitspersample % 8:
        raise InputError(f"{path}: states {count} frames, but has one page: the file is incomplete")
    if needed > tif.filehandle.size:
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


# What a file says of all its frames ---------------------------------------------------------------


def _check_axes(path: Path, stated: _Stated, shape: tuple[int, int]) -> None:
    if all(name == "times" for _, name in stated.axes) and len(stated.axes) < 2:
        return
    sizes = " x ".join(f"{size} {name}" for size, name in stated.axes)
    raise InputError(
        f"{path}: {sizes}: each of {shape[0]} x {shape[1]} pixels; frames have no axis but time: "
        "save one channel and one slice as a file of its own, or name the axis time if it is"
    )


def _stated(path: Path, tif: tifffile.TiffFile, page: Any, frames: list[_Directory]) -> _Stated:
    for kind in ("lsm", "stk", "fluoview", "scanimage"):
        if getattr(tif, f"is_{kind}"):
            raise InputError(
                f"{path}: is a microscope's own kind of TIFF ({kind}): export it again"
            )
    if tif.is_ome:
        return _of_ome(path, str(tif.ome_metadata), page)
    if tif.is_imagej and tif.imagej_metadata is not None:
        return _of_imagej(path, tif.imagej_metadata, page)
    if frames[0].shape is not None:
        return _of_tifffile(path, page, frames)
    return _Stated()


def _of_tifffile(path: Path, page: Any, frames: list[_Directory]) -> _Stated:
    """Each series starts with a page that states its shape; those of one page each are one."""
    starts = [directory for directory in frames if directory.shape is not None]
    lengths = []
    for directory in starts:
        shape = directory.shape or ()
        if math.prod(shape) % math.prod(page.shape):
            return _Stated()  # of another file: what wrote this one has kept the description
        lengths.append(math.prod(shape) // math.prod(page.shape))
    if len(starts) > 1:
        if set(lengths) == {1} and len(starts) == len(frames):
            return _Stated([(len(frames), "times")])
        sizes = ", ".join(map(str, lengths[:8])) + (", ..." if len(lengths) > 8 else "")
        raise InputError(
            f"{path}: holds {len(starts)} series of {sizes} frames: save each as a file of its own"
        )
    shape, axes = starts[0].shape or (), starts[0].axes
    lead = len(shape) - len(page.shape)
    if shape[lead:] != page.shape:  # lengths of 1 somewhere else, as in (10, 16, 24, 1)
        lead = len([size for size in shape if size > 1]) - len([s for s in page.shape if s > 1])
        shape, axes = tuple(size for size in shape if size > 1), None
    if axes is None or len(axes) != len(shape):
        axes = "T" * len(shape) if sum(size > 1 for size in shape[:lead]) < 2 else "?" * len(shape)
    return _Stated(
        [
            (size, AXES.get(axis, f"({axis})"))
            for size, axis in zip(shape[:lead], axes, strict=False)
            if size > 1
        ]
    )


def _of_imagej(path: Path, said: dict[str, Any], page: Any) -> _Stated:
    def whole(name: str) -> int:
        value = said.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{path}: states {value} {name}: its description is damaged")
        return value

    channels, slices, times = whole("channels"), whole("slices"), whole("frames")
    if channels == page.samplesperpixel:
        channels = 1
    stated = _Stated(_sized((channels, "channels"), (slices, "slices"), (times, "times")))
    if not stated.axes:
        stated.axes = _sized((whole("images"), "times"))
    elif len(stated.axes) == 1 and stated.axes[0][1] != "times":
        size, name = stated.axes[0]
        # A plain stack of ImageJ has slices, whatever they are. tifffile (which writes 1.11a)
        # states channels for three dimensions without a name.
        plain = name == "slices" and not said.get("hyperstack")
        unnamed = name == "channels" and said.get("ImageJ") == "1.11a"
        if unnamed:
            stated.notes.append(
                f"its {size} images are named channels, as tifffile does by itself; they are read "
                "as frames in time"
            )
        if plain or unnamed:
            stated.axes = [(size, "times")]
    interval = _number(said.get("finterval"))
    if interval and (unit := SECONDS.get(_unit(said.get("tunit", "sec")))):
        stated.fields["frame_rate_hz"] = 1 / (interval * unit)
    factor = MICROMETRES.get(_unit(said.get("unit", "")))
    sizes = [_per_pixel(page, name) for name in ("XResolution", "YResolution")]
    if factor and sizes[0]:
        if sizes[1] and abs(sizes[1] / sizes[0] - 1) > 0.01:
            stated.notes.append("its pixels are not square: no pixel size is kept")
        else:
            stated.fields["pixel_size_um"] = float(f"{sizes[0] * factor:.6g}")
    if page.dtype.kind != "f":  # ImageJ calibrates integers only
        stated.line = _calibration(path, said)
    return stated


def _calibration(path: Path, said: dict[str, Any]) -> tuple[float, float] | None:
    """Offset and slope of ImageJ's calibration function; None without one."""
    function = said.get("cf", 20)  # 20: none
    if function == 20:
        return None
    try:
        offset, slope = float(said["c0"]), float(said["c1"])
    except (KeyError, TypeError, ValueError):
        offset = slope = math.nan
    if function != 0 or not math.isfinite(offset) or not 0 < abs(slope) < math.inf:
        raise InputError(
            f"{path}: has a calibration function (cf={function}) that is no straight line: convert "
            "it to 32 bit in ImageJ, which applies it"
        )
    return None if (offset, slope) == (0, 1) else (offset, slope)


def _of_ome(path: Path, text: str, page: Any) -> _Stated:
    images = ElementTree.fromstring(text).findall("{*}Image")
    every = [pixels for image in images for pixels in image.findall("{*}Pixels")]
    if len(every) > 1:
        sizes = ", ".join(
            f"{pixels.get('SizeT')} x {pixels.get('SizeY')} x {pixels.get('SizeX')}"
            for pixels in every[:8]
        )
        raise InputError(
            f"{path}: holds {len(every)} series ({sizes}): save each as a file of its own"
        )
    if not every:
        return _Stated()  # what it has is described in another file
    pixels = every[0]
    channels, slices, times = (int(pixels.get(f"Size{axis}", "1")) for axis in "CZT")
    if channels == page.samplesperpixel:
        channels = 1
    names = {uuid.get("FileName", "") for uuid in pixels.iter() if uuid.tag.endswith("}UUID")}
    stated = _Stated(_sized((channels, "channels"), (slices, "slices"), (times, "times")))
    stated.others = tuple(sorted(names - {"", path.name})) if len(names) > 1 else ()
    interval = _number(pixels.get("TimeIncrement"))
    if interval and (unit := SECONDS.get(_unit(pixels.get("TimeIncrementUnit", "s")))):
        stated.fields["frame_rate_hz"] = 1 / (interval * unit)
    wide, high = (_number(pixels.get(f"PhysicalSize{axis}")) for axis in "XY")
    factor = MICROMETRES.get(_unit(pixels.get("PhysicalSizeXUnit", "um")))
    if wide and factor:
        same = pixels.get("PhysicalSizeYUnit", "um") == pixels.get("PhysicalSizeXUnit", "um")
        if high and same and abs(high / wide - 1) > 0.01:
            stated.notes.append("its pixels are not square: no pixel size is kept")
        else:
            stated.fields["pixel_size_um"] = wide * factor
    return stated


def _sized(*axes: tuple[int, str]) -> list[tuple[int, str]]:
    return [axis for axis in axes if axis[0] != 1]


def _unit(text: object) -> str:
    """A unit with u for the two signs for micro, one of which ImageJ spells as an escape."""
    return re.sub(r"\\u00b5|[µμ]", "u", str(text).strip().lower())


def _number(value: object) -> float | None:
    """A finite number above 0, or None."""
    with contextlib.suppress(TypeError, ValueError):
        number = float(value)  # type: ignore[arg-type]
        return number if 0 < number < math.inf else None
    return None


def _per_pixel(page: Any, name: str) -> float | None:
    """The inverse of a resolution tag, a fraction."""
    if name not in page.tags:
        return None
    pixels, units = page.tags[name].value
    return units / pixels if pixels > 0 and units > 0 else None


# The chain of pages -------------------------------------------------------------------------------


def _directories(path: Path) -> list[_Directory]:
    """The pages of a TIFF, by following their chain: tifffile stops silently where it is broken."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 8:
            raise InputError(f"{path}: does not start as a TIFF file does: empty or damaged")
        big = struct.unpack(order + "H", head[2:4])[0] == 43
        at = struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0]
        chain = _Chain(path, file, size, order, big)
        found: list[_Directory] = []
        seen: set[int] = set()
        while at:
            tags, following = chain.tags(at, len(found))
            if at in seen:
                raise chain.broken(len(found))
            seen.add(at)
            found.append(chain.directory(tags, len(found)))
            at = following
    return found


@dataclass(frozen=True)
class _Chain:
    """The file, as far as its directories go."""

    path: Path
    file: BinaryIO
    size: int
    order: str
    big: bool

    def broken(self, pages: int) -> InputError:
        return InputError(
            f"{self.path}: the chain of its pages breaks after {pages}: the file is incomplete or "
            "damaged, copy it again"
        )

    def tags(self, at: int, pages: int) -> tuple[dict[int, tuple[int, int, bytes]], int]:
        """Type, count and value (or where it is) of a directory's tags, and the next directory."""
        number, entries, entry = ("Q", "Q", 20) if self.big else ("I", "H", 12)
        self.file.seek(at if at < self.size else self.size)
        data = self.file.read(struct.calcsize(entries))
        if len(data) < struct.calcsize(entries):
            raise self.broken(pages)
        length = struct.unpack(self.order + entries, data)[0] * entry
        if at + len(data) + length + struct.calcsize(number) > self.size:
            raise self.broken(pages)
        block = self.file.read(length + struct.calcsize(number))
        tags = {}
        for k in range(0, length, entry):
            tag, kind, count = struct.unpack_from(self.order + "HH" + number, block, k)
            tags[tag] = kind, count, block[k + entry - struct.calcsize(number) : k + entry]
        return tags, struct.unpack_from(self.order + number, block, length)[0]

    def directory(self, tags: dict[int, tuple[int, int, bytes]], index: int) -> _Directory:
        for offset in self._numbers(tags.get(330)):
            inside, _ = self.tags(offset, index)
            if not self._extra(inside):
                raise InputError(
                    f"{self.path}: page {index} has another image in it (SubIFD) that is no "
                    "thumbnail: export the frames as pages"
                )
        shape, axes = self._shape(tags.get(270))
        return _Directory(self._extra(tags), shape, axes)

    def _extra(self, tags: dict[int, tuple[int, int, bytes]]) -> bool:
        new, old = self._numbers(tags.get(254)), self._numbers(tags.get(255))
        return bool(new and new[0] & (REDUCED | MASK)) or old[:1] == [2]

    def _numbers(self, tag: tuple[int, int, bytes] | None) -> list[int]:
        if tag is None or tag[0] not in TYPES or not 0 < tag[1] <= 1000:
            return []
        form = f"{self.order}{tag[1]}{TYPES[tag[0]]}"
        data = self._data(tag, struct.calcsize(form))
        return list(struct.unpack(form, data)) if len(data) == struct.calcsize(form) else []

    def _shape(
        self, tag: tuple[int, int, bytes] | None
    ) -> tuple[tuple[int, ...] | None, str | None]:
        """Shape and axes in the description that tifffile writes."""
        if tag is None or tag[0] != 2 or not 8 < tag[1] < LONGEST:
            return None, None
        if self._data(tag, 7)[:7] not in (b'{"shape', b"shape=("):
            return None, None
        text = self._data(tag, tag[1]).decode(errors="replace").strip("\0 ")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = tifffile.tifffile.shaped_description_metadata(text)
            shape = tuple(int(size) for size in said["shape"])
            if shape and min(shape) > 0:
                axes = said.get("axes")
                return shape, axes if isinstance(axes, str) else None
        return None, None

    def _data(self, tag: tuple[int, int, bytes], length: int) -> bytes:
        if length <= len(tag[2]) and tag[1] <= len(tag[2]):
            return tag[2][:length]
        at = struct.unpack(self.order + ("Q" if self.big else "I"), tag[2])[0]
        self.file.seek(at if at < self.size else self.size)
        return self.file.read(length)
