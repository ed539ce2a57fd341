"""Phantom .cine: monochrome of 8 and 16 bit, packed 12 bit, and packed 10 bit (P10).

A file is a header (44 bytes), a bitmap header, the camera's setup, tagged blocks (time stamps and
exposures), a table of frame offsets, and the frames. Every offset and count is checked before use.

Values of P10 are codes of linear 12-bit values: each is the number of its line in the camera
maker's table, which other readers apply too. Packed 12-bit values, and 10-bit values that are not
packed, are linear.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from hpc_xvr.data.cameras.packing import unpack
from hpc_xvr.data.cameras.recording import Recording, check_shape, stated_bit_depth
from hpc_xvr.data.cameras.stamps import frame_times, rate_of
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

P10 = 256
PACKED = {P10: 10, 1024: 12}
"""Compression code of the bitmap header: bits of a packed pixel."""
IMAGE_TIMES, EXPOSURES = 1002, 1003
SECOND = 2**32
"""Ticks of time stamps and exposures in a second."""
LARGEST_TEXT = 2**16
SETUP = {
    "frame_rate_16": (0, "H", 0),
    "mark": (140, "2s", 0),
    "length": (142, "H", 0),
    "im_width": (737, "H", 0),
    "im_height": (739, "H", 0),
    "serial": (743, "I", 0),
    "frame_rate": (768, "I", 0),
    "shutter_us": (772, "I", 0),
    "camera_version": (792, "I", 0),
    "firmware_version": (796, "I", 0),
    "software_version": (800, "I", 0),
    "cfa": (808, "I", 553),
    "real_bpp": (896, "I", 579),
    "decimation": (1556, "I", 608),
    "shutter_ns": (1568, "I", 626),
    "description": (1596, "4096s", 632),
    "black_level": (5732, "i", 672),
    "white_level": (5736, "i", 672),
}
"""Field of the setup: its offset, its format, and the first version of the software to state it."""
KEPT = (
    "serial",
    "firmware_version",
    "software_version",
    "decimation",
    "black_level",
    "white_level",
    "description",
)


class _Layout(NamedTuple):
    """Where the frames lie and how."""

    shape: tuple[int, int, int]
    stored_bits: int
    packing: int
    bottom_up: bool
    starts: np.ndarray
    """Offset of each frame in the file."""

    @property
    def frame_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.stored_bits // 8

    def pixels(self, data: bytes) -> np.ndarray:
        """Counts (H, W) of a frame's bytes."""
        if self.packing:
            values = unpack(np.frombuffer(data, np.uint8), self.stored_bits)
            values = _p10_table()[values] if self.packing == P10 else values
        else:
            values = np.frombuffer(data, np.dtype(f"<u{self.stored_bits // 8}"))
        frame = values.reshape(self.shape[1:])
        return frame[::-1] if self.bottom_up else frame


def open_cine(path: Path, bit_depth: int | None = None, missing: bool = False) -> Recording:
    """Open a .cine file.

    Args:
        bit_depth: significant bits, instead of those that the header states.
        missing: frames may lie beyond the end of the file.

    Raises:
        InputError: colour or compressed frames, or offsets outside the file.
    """
    with path.open("rb") as file:
        head = struct.unpack("<2s3HiIiI3IQ", _bytes(path, file, 0, 44))
        kind, compression, first_image = head[0], head[2], head[6]
        count, off_bitmap, off_setup, off_images, trigger = head[7:]
        if kind != b"CI":
            raise InputError(f"{path}: does not start with CI: not a Phantom .cine, or damaged")
        bitmap = struct.unpack("<IiiHHIIiiII", _bytes(path, file, off_bitmap, 40))
        layout = _layout(path, file, count, off_images, compression, bitmap, missing)
        setup = _setup(path, file, off_setup)
        blocks = _tagged_blocks(path, file, off_setup + setup["length"], off_images, count)
    _check_setup(path, setup, layout)
    times = _times(path, blocks.get(IMAGE_TIMES))
    rate, record_rate = _rates(path, times, _record_rate(setup))
    metadata: dict[str, str | int | float] = {key: setup[key] for key in KEPT if setup.get(key)}
    if record_rate:
        metadata["record_rate_hz"] = record_rate
    if bitmap[7] > 0:
        metadata["sensor_pixel_um"] = round(1e6 / bitmap[7], 3)
    metadata["first_image"] = first_image
    if trigger:
        metadata["trigger_time"] = _date(trigger)
        if times is not None:
            ticks = int(blocks[IMAGE_TIMES][0]) - trigger
            metadata["first_frame_after_trigger_s"] = round(ticks / SECOND, 9)
    if layout.packing == P10:
        metadata["encoding"] = "packed 10 bit, decoded to linear 12 bit"

    def source(start: int, stop: int) -> Iterator[np.ndarray]:
        with path.open("rb") as file:
            for index in range(start, stop):
                yield layout.pixels(_frame(path, file, index, layout))

    return Recording(
        path=path,
        shape=layout.shape,
        dtype=np.dtype(np.uint8 if layout.stored_bits == 8 else np.uint16),
        bit_depth=_bit_depth(path, setup, layout, bitmap[10], bit_depth),
        source=source,
        camera=_camera(setup["camera_version"]),
        frame_rate_hz=rate,
        exposure_s=_exposure(path, setup, blocks.get(EXPOSURES)),
        metadata=metadata,
        times_s=times,
    )


@cache
def _p10_table() -> np.ndarray:
    """(1024,) uint16: the linear 12-bit value of each code."""
    file = resources.files("hpc_xvr.data.cameras") / "phantom_p10.txt"
    table: np.ndarray = np.loadtxt(file.read_text().splitlines(), np.uint16)
    return table


def _layout(
    path: Path,
    file: BinaryIO,
    count: int,
    off_images: int,
    compression: int,
    bitmap: tuple[int, ...],
    missing: bool,
) -> _Layout:
    """Sizes and offsets, checked against the file's size."""
    _, width, height, _, bits, packing = bitmap[:6]
    if bits not in (8, 16) or compression or packing not in (0, *PACKED):
        raise InputError(
            f"{path}: {bits} bit a pixel, compression {compression}/{packing}: "
            "supported is uncompressed or packed monochrome"
        )
    rows = abs(height)  # a negative height means that the first row comes first
    shape = (count, rows, width)
    check_shape(path, shape)
    stored_bits = PACKED.get(packing, bits)
    if rows * width * stored_bits % (8 if packing != P10 else 40):
        raise InputError(
            f"{path}: {rows} x {width} pixels of packed {stored_bits} bit do not fill whole "
            "groups of bytes: the header is damaged, copy the file again"
        )
    size = path.stat().st_size
    frame_bytes = rows * width * stored_bits // 8
    if count * (frame_bytes + 16) + off_images > size and not missing:
        raise InputError(
            f"{path}: has {size} bytes, its header promises {count} frames of "
            f"{rows} x {width} in {stored_bits} bit: the file is incomplete, copy "
            "it again"
        )
    starts = np.frombuffer(_bytes(path, file, off_images, 8 * count), "<u8")
    outside = np.flatnonzero(starts > size - frame_bytes - 8)
    if missing:
        starts = np.minimum(starts, size)  # where nothing can be read
    elif len(outside):
        raise InputError(
            f"{path}: frame {outside[0]} lies beyond the end of the file: it is "
            "incomplete or damaged, copy it again"
        )
    order = np.argsort(starts, kind="stable")
    near = (np.diff(starts[order]) < frame_bytes + 8) & (starts[order][:-1] < size)
    shared = np.flatnonzero(near)
    if len(shared):
        one, other = sorted(order[shared[0] : shared[0] + 2].tolist())
        raise InputError(
            f"{path}: frames {one} and {other} share bytes of the file: its table of "
            "frames is damaged, copy it again"
        )
    inside = starts[starts < size]
    last = int(inside.max()) if len(inside) else size
    after = size - last - frame_bytes - 8
    if after >= frame_bytes:
        logger.warning(
            "%s: holds %d more bytes after the %d frames that its header states, enough for %d "
            "more frames: they are not read",
            *(path, after, count, after // (frame_bytes + 8) or 1),
        )
    # Rows of packed frames run from top to bottom whatever the sign says.
    return _Layout(shape, stored_bits, packing, height > 0 and not packing, starts)


def _setup(path: Path, file: BinaryIO, at: int) -> dict[str, Any]:
    """The fields of SETUP that this version of the header has."""
    mark, length = struct.unpack("<2sH", _bytes(path, file, at + 140, 4))
    last = SETUP["software_version"]
    if mark != b"ST" or length < last[0] + 4:
        raise InputError(
            f"{path}: its camera setup at byte {at} is damaged, or older than Phantom software "
            "5.5: copy the file again, or save it with a newer software"
        )
    data = _bytes(path, file, at, length)
    version = struct.unpack_from("<I", data, last[0])[0]
    fields = {}
    for name, (offset, form, since) in SETUP.items():
        if since <= version and offset + struct.calcsize(form) <= length:
            value = struct.unpack_from("<" + form, data, offset)[0]
            if isinstance(value, bytes):
                value = value.partition(b"\0")[0].decode("latin-1").strip()
            fields[name] = value
    return fields


def _tagged_blocks(
    path: Path, file: BinaryIO, at: int, end: int, count: int
) -> dict[int, np.ndarray]:
    """Time stamps and exposures in ticks, one a frame, as far as they are there."""
    found: dict[int, np.ndarray] = {}
    more = 1
    while more and at + 8 <= end:
        size, kind, more = struct.unpack("<IHH", _bytes(path, file, at, 8))
        if size < 8 or at + size > end:
            break
        if kind == IMAGE_TIMES and size - 8 != 8 * count:
            raise InputError(
                f"{path}: has {(size - 8) // 8} time stamps for {count} frames: the file is "
                "damaged, copy or save it again"
            )
        width = {IMAGE_TIMES: 8, EXPOSURES: 4}.get(kind, 0)
        if width and size - 8 == width * count:
            found[kind] = np.frombuffer(_bytes(path, file, at + 8, size - 8), f"<u{width}")
        at += size
    if IMAGE_TIMES not in found:
        logger.warning(
            "%s: its blocks of time stamps are missing or damaged: its frames are taken as equally "
            "spaced in time",
            path,
        )
    return found


def _check_setup(path: Path, setup: dict[str, Any], layout: _Layout) -> None:
    """Refuse colour; say where the setup speaks of other frames, or fails to say what they are."""
    if setup.get("cfa", 0):
        raise InputError(f"{path}: is a colour recording: export it as monochrome")
    size = setup["im_height"], setup["im_width"]
    if all(size) and size != layout.shape[1:]:
        logger.warning(
            "%s: its bitmap header states frames of %d x %d pixels, its camera setup %d x %d: "
            "they are read as the former",
            *(path, *layout.shape[1:], *size),
        )
    if "cfa" not in setup:
        logger.warning(
            "%s: has the header of an old Phantom software (version %d), which does not say "
            "whether it is in colour: it is read as monochrome",
            *(path, setup["software_version"]),
        )


def _bit_depth(
    path: Path, setup: dict[str, Any], layout: _Layout, colours: int, stated: int | None
) -> int:
    """Significant bits: what the user states, the setup, the bitmap header's number of grey
    levels, or all bits that are stored."""
    if layout.packing == P10:
        if stated not in (None, 12):
            raise InputError(
                f"{path}: holds packed 10-bit codes of 12-bit values, which have 12 bit: leave "
                f"the bit depth {stated} out"
            )
        return 12
    real = setup.get("real_bpp", 0)
    levels = colours.bit_length() - 1 if colours > 0 and colours & (colours - 1) == 0 else 0
    depth = next((b for b in (real, levels) if 8 <= b <= 16), 0)
    if stated is None and depth == 0:
        logger.warning(
            "%s: its header does not say how many bits are significant: all %d that are stored "
            "are taken, unless you state the bit depth (--bit-depth)",
            *(path, layout.stored_bits),
        )
    return stated_bit_depth(path, layout.stored_bits, depth or None, stated)


def _times(path: Path, ticks: np.ndarray | None) -> np.ndarray | None:
    """Seconds from the first frame, (T,) float64, or None if the stamps do not say."""
    if ticks is None:
        return None
    steps = np.diff(ticks).astype(np.int64)  # of unsigned ticks: right even where they fall
    return frame_times(path, np.concatenate(([0.0], np.cumsum(steps.astype(float)))) / SECOND)


def _record_rate(setup: dict[str, Any]) -> float | None:
    """Frames a second that the camera recorded; the older field ends at 65,535."""
    older = setup["frame_rate_16"]
    return float(setup["frame_rate"] or (older if older < 2**16 - 1 else 0)) or None


def _rates(
    path: Path, times: np.ndarray | None, record: float | None
) -> tuple[float | None, float | None]:
    """Frames a second in the file and while recording.

    The time stamps decide. A recording saved every n-th frame has the record rate / n.
    """
    if times is None:
        if record is None:
            logger.warning(
                "%s: states no frame rate: it is unknown, unless you state it (--frame-rate)", path
            )
        return record, record
    rate = rate_of(path, times, record)
    if record is None:
        logger.warning("%s: states no frame rate; its time stamps say %g Hz", path, rate)
        return rate, None
    return rate, record


def _exposure(path: Path, setup: dict[str, Any], ticks: np.ndarray | None) -> float | None:
    """Seconds: of the first frame, or from the setup."""
    if ticks is not None and ticks[0]:
        other = np.flatnonzero(np.abs(ticks / ticks[0] - 1) > 0.01)
        if len(other):
            logger.warning(
                "%s: frame %d was exposed for %g s, the first one for %g s, so that their "
                "brightness differs",
                *(path, other[0], ticks[other[0]] / SECOND, ticks[0] / SECOND),
            )
        return float(ticks[0]) / SECOND
    return setup.get("shutter_ns", 0) * 1e-9 or setup["shutter_us"] * 1e-6 or None


def _frame(path: Path, file: BinaryIO, index: int, layout: _Layout) -> bytes:
    start = int(layout.starts[index])
    annotation = struct.unpack("<I", _bytes(path, file, start, 4))[0]
    if not 8 <= annotation <= LARGEST_TEXT:
        raise InputError(f"{path}: frame {index} has a damaged header: copy the file again")
    stated = struct.unpack("<I", _bytes(path, file, start + annotation - 4, 4))[0]
    if stated != layout.frame_bytes:
        raise InputError(
            f"{path}: frame {index} states {stated} bytes instead of "
            f"{layout.frame_bytes}: the file is damaged, copy it again"
        )
    return _bytes(path, file, start + annotation, stated)


def _bytes(path: Path, file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    data = file.read(count)
    if len(data) != count:
        raise InputError(
            f"{path}: ends before byte {at + count} that its header points to: the "
            "file is incomplete or damaged, copy it again"
        )
    return data


def _date(ticks: int) -> str:
    """Date and time (UTC) of a time stamp, to the microsecond."""
    start = datetime(1970, 1, 1, tzinfo=timezone.utc)
    return (start + timedelta(seconds=ticks / SECOND)).isoformat()


def _camera(version: int) -> str:
    """Two digits mean v7.3, three or four the model's name; later cameras use another code."""
    if version < 100:
        return f"Phantom v{version // 10}.{version % 10}"
    return f"Phantom v{version}" if version < 10_000 else f"Phantom (camera version {version})"
