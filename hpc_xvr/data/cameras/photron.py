"""Photron .mraw with its .cih (text) or .cihx (XML) header: headerless frames of 8, 12 or 16 bit.

12-bit pixels are packed, two in three bytes, most significant bits first.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from hpc_xvr.data.cameras.packing import unpack
from hpc_xvr.data.cameras.recording import (
    Recording,
    check_bytes,
    check_shape,
    guarded,
    stated_bit_depth,
)
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

LARGEST_HEADER = 2**24
XML_NAMES = {
    "Date": "fileInfo/date",
    "Time": "fileInfo/time",
    "Camera Type": "deviceInfo/deviceName",
    "Record Rate(fps)": "recordInfo/recordRate",
    "Shutter Speed(s)": "recordInfo/shutterSpeed",
    "Shutter Type2(nsec)": "recordInfo/shutterSpeedNsec",
    "Trigger Time": "recordInfo/triggerTime",
    "Original Total Frame": "frameInfo/recordedFrame",
    "Total Frame": "frameInfo/totalFrame",
    "Start Frame": "frameInfo/startFrame",
    "Save Step": "frameInfo/skipFrame",
    "Image Width": "imageDataInfo/resolution/width",
    "Image Height": "imageDataInfo/resolution/height",
    "Color Type": "imageDataInfo/colorInfo/type",
    "Color Bit": "imageDataInfo/colorInfo/bit",
    "EffectiveBit Depth": "imageDataInfo/effectiveBit/depth",
    "EffectiveBit Side": "imageDataInfo/effectiveBit/side",
    "File Format": "imageFileInfo/fileFormat",
    "Comment Text": "basicInfo/comment",
}
"""Key of a .cih file: path of the same value in a .cihx file."""
DEPTHS = (8, 12, 16)
"""Stored bits of a pixel."""
KEPT = (
    "Date",
    "Time",
    "Trigger Time",
    "Original Total Frame",
    "Start Frame",
    "Save Step",
    "Record Rate(fps)",
    "Comment Text",
    "Scale Pixel Size",
    "Scale Unit",
)


def open_photron(path: Path, bit_depth: int | None = None, missing: bool = False) -> Recording:
    """Open a recording by its .cih, .cihx or .mraw file.

    Args:
        bit_depth: significant bits, instead of those that the header states.
        missing: the pixel file may be shorter than the header says.

    Raises:
        InputError: header or pixel file is missing, the header lacks a key or contradicts itself,
            or the file has fewer pixels than the header says.
    """
    header_path, pixels = _pair(path)
    with guarded(str(header_path)):
        header = _read_header(header_path)
    frames, height, width = (
        _integer(header_path, header, key) for key in ("Total Frame", "Image Height", "Image Width")
    )
    shape = (frames, height, width)
    check_shape(header_path, shape)
    bits = _integer(header_path, header, "Color Bit")
    kind, camera = header.get("Color Type", "Mono"), header.get("Camera Type", "")
    # Raw is what newer cameras write; of a colour sensor (type ..K-C-..) it is a Bayer mosaic.
    if kind.lower() not in ("mono", "raw") or "-C-" in camera or bits not in DEPTHS:
        raise InputError(
            f"{header_path}: Color Type {kind}, Color Bit {bits}, camera {camera}: "
            "supported is monochrome with 8, 12 or 16 bit"
        )
    if header.get("File Format", "mraw").lower() != "mraw":
        raise InputError(
            f"{header_path}: File Format is {header['File Format']}, not MRaw: open "
            "the exported images instead"
        )
    side = header.get("EffectiveBit Side", "Lower").lower()
    if bit_depth is not None and side == "lower":  # the header's depth is not needed
        text = header.get("EffectiveBit Depth", "")
        depth = int(text) if text in map(str, range(1, 17)) else bit_depth
    else:
        depth = _integer(header_path, header, "EffectiveBit Depth", bits)
    if side not in ("lower", "higher") or not 1 <= depth <= 16:
        raise InputError(
            f"{header_path}: EffectiveBit Depth {depth}, Side {side}: allowed are "
            "1 to 16 and Lower or Higher"
        )
    count = height * width
    if bits == 12 and count % 2:
        raise InputError(
            f"{header_path}: {height} x {width} pixels of packed 12 bit do not "
            "fill whole bytes: the header is damaged, copy it again"
        )
    _check_size(header_path, pixels, shape, bits, missing)

    rate = _rate(header_path, header)
    step = max(1, _integer(header_path, header, "Save Step", 1))
    # A file of fewer bits than the sensor's holds only the upper ones: nothing to shift there.
    shift = bits - depth if side == "higher" and depth < bits else 0

    cut_off: list[bool] = []  # told once

    def source(start: int, stop: int) -> Iterator[np.ndarray]:
        size = count * bits // 8
        with pixels.open("rb") as file:
            file.seek(start * size)
            for _ in range(start, stop):
                data = file.read(size)
                if bits == 12:
                    frame = unpack(np.frombuffer(data, np.uint8), bits)
                else:
                    frame = np.frombuffer(data, np.dtype(f"<u{bits // 8}"))
                frame = frame.reshape(height, width)
                if shift and not cut_off and (frame & (2**shift - 1)).any():
                    cut_off.append(True)
                    logger.warning(
                        "%s: has values in the lower %d of %d bits, where %s says there are none "
                        "(EffectiveBit Depth %d, Side Higher): they are cut off",
                        *(pixels, shift, bits, header_path.name, depth),
                    )
                yield frame >> shift if shift else frame

    return Recording(
        path=pixels,
        shape=shape,
        dtype=np.dtype(np.uint8 if bits == 8 else np.uint16),
        bit_depth=stated_bit_depth(header_path, bits, depth, bit_depth),
        source=source,
        camera=f"Photron {camera}".strip(),
        frame_rate_hz=rate and rate / step,
        exposure_s=_exposure(header_path, header),
        metadata={key: header[key] for key in KEPT if header.get(key)},
    )


def _check_size(
    header: Path, pixels: Path, shape: tuple[int, int, int], bits: int, missing: bool
) -> None:
    """Compare the size of the pixel file with what its header promises.

    Raises:
        InputError: it is smaller, or just as large as with another number of bits.
    """
    frames, height, width = shape
    size = pixels.stat().st_size
    for other in DEPTHS:
        if other != bits and size and 8 * size == frames * height * width * other:
            raise InputError(
                f"{pixels}: has {size} bytes, which is {other} bit a pixel for its {frames} "
                f"frames, but {header.name} says Color Bit {bits}: correct Color Bit there, or "
                "Total Frame if that is what is wrong"
            )
    promised = frames * height * width * bits // 8
    if not missing:
        check_bytes(pixels, promised, frames)
    if size > promised:
        logger.warning(
            "%s: has %d bytes, its header promises %d frames in %d: what follows, enough for %.3g "
            "frames, is not read; if Total Frame, the size or Color Bit is wrong, correct %s",
            *(pixels, size, frames, promised, frames * (size / promised - 1), header.name),
        )


def header_of(pixels: Path) -> Path | None:
    """The .cihx or .cih beside a .mraw, however its suffix is spelled."""
    return _beside(pixels, (".cihx", ".cih"))


def pixels_of(header: Path) -> Path | None:
    """The .mraw beside a header."""
    return _beside(header, (".mraw",))


def _pair(path: Path) -> tuple[Path, Path]:
    if path.suffix.lower() == ".mraw":
        header = header_of(path)
        if header is None:
            raise InputError(
                f"{path}: its header {path.stem}.cih or .cihx is missing: put it "
                "beside the pixels, which cannot be read without it"
            )
        return header, path
    pixels = pixels_of(path)
    if pixels is None:
        raise InputError(
            f"{path}: its pixel file {path.stem}.mraw is missing: put it beside the header"
        )
    return path, pixels


def _beside(path: Path, suffixes: tuple[str, ...]) -> Path | None:
    found = {
        p.suffix.lower(): p
        for p in sorted(path.parent.iterdir())
        if p.stem == path.stem and p.is_file()
    }
    return next((found[suffix] for suffix in suffixes if suffix in found), None)


def _read_header(path: Path) -> dict[str, str]:
    if path.stat().st_size > LARGEST_HEADER:
        raise InputError(f"{path}: has {path.stat().st_size} bytes, too many for a header")
    data = path.read_bytes()
    if path.suffix.lower() == ".cih":
        lines = (line.partition(":") for line in _text(data).splitlines())
        return {key.strip(): value.strip() for key, colon, value in lines if colon}
    tree = _xml(path, data)
    return {
        key: (tree.findtext(name) or "").strip()
        for key, name in XML_NAMES.items()
        if tree.find(name) is not None
    }


def _xml(path: Path, data: bytes) -> ElementTree.Element:
    """The section <cih> among other bytes, in UTF-16 or a text of bytes.

    The tag of one byte order may also be found in the other, one byte off, but hardly ever parses.
    """
    broken = "holds no <cih> section"
    for encoding in ("ascii", "utf-16-le", "utf-16-be"):
        first, last = (tag.encode(encoding) for tag in ("<cih>", "</cih>"))
        begin, end = data.find(first), data.rfind(last)
        if 0 <= begin < end:
            section = data[begin : end + len(last)]
            try:
                return ElementTree.fromstring(
                    _text(section) if encoding == "ascii" else section.decode(encoding)
                )
            except (UnicodeDecodeError, ElementTree.ParseError) as error:
                broken = f"its <cih> section cannot be read ({error})"
    raise InputError(f"{path}: {broken}: not a Photron header, or damaged, copy it again")


def _text(data: bytes) -> str:
    """The text of a header: UTF-16, UTF-8 or, of Japanese systems, Shift JIS."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    if b"\0" in data[:2]:  # "#Camera" without a byte order mark
        return data.decode("utf-16-be" if data[0] == 0 else "utf-16-le", errors="replace")
    for encoding in ("utf-8-sig", "cp932"):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    return data.decode(errors="replace")


def _rate(path: Path, header: dict[str, str]) -> float | None:
    """Frames a second while recording; None of a camera that was clocked from outside."""
    text = header.get("Record Rate(fps)", "")
    with contextlib.suppress(ValueError):
        if 0 < (rate := float(text)) < math.inf:
            return rate
    logger.warning(
        "%s: Record Rate(fps) is %s: the frame rate is unknown, unless you state it (--frame-rate)",
        *(path, text or "missing"),
    )
    return None


def _number(path: Path, header: dict[str, str], key: str, default: float | None = None) -> float:
    text = header.get(key, "")
    if not text and default is not None:
        return float(default)
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"{path}: key {key} is {text or 'missing'}: a number is needed, copy the header again"
        ) from None


def _integer(path: Path, header: dict[str, str], key: str, default: int | None = None) -> int:
    value = _number(path, header, key, default)
    if not value.is_integer() or not 0 <= value < 2**40:
        raise InputError(
            f"{path}: key {key} is {header.get(key)}: a whole number is needed, copy "
            "the header again"
        )
    return int(value)


def _exposure(path: Path, header: dict[str, str]) -> float | None:
    """Seconds. The shutter speed is written 1/20000 in a .cih and 20000 in a .cihx."""
    if header.get("Shutter Type2(nsec)"):
        return _number(path, header, "Shutter Type2(nsec)") * 1e-9 or None
    speed = header.get("Shutter Speed(s)", "").removeprefix("1/")
    try:
        return 1 / float(speed)
    except (ValueError, ZeroDivisionError):
        return None
