"""Shimadzu HPV-X2 .dat: tagged sections in no fixed order, 250 x 400 pixels of 10 bit a frame.

A section starts with a 4-byte tag; its payload lies 14 bytes after the tag. Image data state the
number of their 16-bit samples 6 bytes after the tag and hold the 10-bit value in the upper bits.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hpc_xvr.data.cameras.recording import Recording, check_shape
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

HEIGHT, WIDTH = 250, 400
BITS = 10
INTERVAL = bytes.fromhex("30300730")
EXPOSURE = bytes.fromhex("30300830")
DATE = bytes.fromhex("40400e40")
FRAMES = bytes.fromhex("60600560")
FIRST_TIME = bytes.fromhex("60600660")
IMAGES = bytes.fromhex("a0a001a0")
PAYLOAD = 14
NEXT_TAG = re.compile(rb"(.)\1[\x00-\x1f]\1", re.DOTALL)
UNITS = {"": 1e-9, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def open_shimadzu(path: Path, bit_depth: int | None = None, missing: bool = False) -> Recording:
    """Open a .dat file; rows come in the file's order. `missing`: it may end before its last frame.

    Raises:
        InputError: no image section, a frame count that contradicts it, too few bytes, or a bit
            depth other than 10.
    """
    if bit_depth not in (None, BITS):
        raise InputError(
            f"{path}: Shimadzu HPV-X2 has {BITS} bit: leave the bit depth {bit_depth} out"
        )
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty: copy it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin, samples = _image_section(path, data, missing)
        header = data[: min(begin, 2**20)] + data[begin + 2 * samples :][: 2**20]
    frames = samples // (HEIGHT * WIDTH)
    shape = (frames, HEIGHT, WIDTH)
    check_shape(path, shape)
    stated = _payload(header, FRAMES, 4)
    if len(stated) == 4 and struct.unpack("<I", stated)[0] != frames:
        raise InputError(
            f"{path}: states {struct.unpack('<I', stated)[0]} frames but holds image "
            f"data of {frames}: the file is damaged, export it again"
        )

    def source(start: int, stop: int) -> Iterator[np.ndarray]:
        with path.open("rb") as file:
            file.seek(begin + start * 2 * HEIGHT * WIDTH)
            more = False  # bits than 10 were seen
            for index in range(start, stop):
                frame = np.frombuffer(file.read(2 * HEIGHT * WIDTH), "<u2")
                if not more and (more := bool((frame & 63).any())):
                    logger.warning(
                        "%s: frame %d has values in the lower 6 of 16 bits, where this camera has "
                        "none: they are cut off",
                        *(path, index),
                    )
                yield frame.reshape(HEIGHT, WIDTH) >> 6

    interval = _seconds(header, INTERVAL)
    metadata = {"date": _text(header, DATE), "first_frame_ns": _text(header, FIRST_TIME)}
    return Recording(
        path=path,
        shape=shape,
        dtype=np.dtype(np.uint16),
        bit_depth=BITS,
        source=source,
        camera="Shimadzu HPV-X2",
        frame_rate_hz=1 / interval if interval else None,
        exposure_s=_seconds(header, EXPOSURE),
        metadata={key: value for key, value in metadata.items() if value},
    )


def _image_section(path: Path, data: mmap.mmap, missing: bool) -> tuple[int, int]:
    """Offset and sample count of the image data: the first tag whose count makes sense.

    The four bytes of the tag may turn up elsewhere by chance.
    """
    longest = at = cut_off = -1
    while (at := data.find(IMAGES, at + 1)) >= 0:
        begin = at + PAYLOAD
        if begin > len(data):
            break
        samples = struct.unpack("<I", data[at + 6 : at + 10])[0]
        if samples == 0 or samples % (HEIGHT * WIDTH):
            continue
        if begin + 2 * samples <= len(data):
            return begin, samples
        if samples > longest:
            longest, cut_off = samples, begin
    if longest > 0 and missing:
        return cut_off, longest
    if longest > 0:
        raise InputError(
            f"{path}: has {len(data)} bytes, its header promises "
            f"{longest // (HEIGHT * WIDTH)} frames of {HEIGHT} x {WIDTH}: the file "
            "is incomplete, copy it again"
        )
    raise InputError(
        f"{path}: no section of {HEIGHT} x {WIDTH} frames found: not a Shimadzu "
        "HPV-X2 recording, or damaged"
    )


def _payload(header: bytes, tag: bytes, length: int) -> bytes:
    at = header.find(tag)
    return b"" if at < 0 else header[at + PAYLOAD : at + PAYLOAD + length]


def _text(header: bytes, tag: bytes) -> str:
    # Tags such as 30300830 start with ASCII digits: text ends where something like a tag begins.
    payload = NEXT_TAG.split(_payload(header, tag, 64), maxsplit=1)[0]
    match = re.match(rb"[\x20-\x7e]*", payload)
    return match[0].decode().strip() if match else ""


def _seconds(header: bytes, tag: bytes) -> float | None:
    """A time written as ASCII digits, in nanoseconds unless a unit follows."""
    match = re.match(r"(\d+(?:\.\d+)?)\s*([num]?s)?", _text(header, tag))
    return float(match[1]) * UNITS[match[2] or ""] or None if match else None
