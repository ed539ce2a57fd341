"""Phantom .cine through pims: 8 to 16-bit monochrome, also packed 10 and 12 bit.

pims trusts every offset and count of the file, so they are checked here before it sees them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hpc_xvr.data.cameras.recording import Recording, check_shape, positive
from hpc_xvr.errors import InputError

PACKED = {256: 10, 1024: 12}
"""Compression code of the bitmap header: bits of a packed pixel."""
IMAGE_TIMES = 1002
LARGEST_TEXT = 2**16
KEPT = (
    "serial",
    "firmware_version",
    "software_version",
    "decimation",
    "black_level",
    "white_level",
    "description",
)


def open_cine(path: Path) -> Recording:
    """Open a .cine file.

    Packed 10-bit values are the camera's own encoding, which is not linear in intensity.

    Raises:
        InputError: colour or compressed frames, offsets outside the file, missing time stamps.
    """
    with path.open("rb") as file:
        frames, stored_bits, starts, times = _check(path, file)
    cine = _open(path)
    try:
        fields = dict(cine.setup_fields_dict)
        rate = positive(path, "frame rate", float(cine.frame_rate))
        sensor_um = 1e6 / max(1, cine.bitmapinfo_dict["bi_x_pels_per_meter"])
        height, width = cine._height, cine._width
        exposure = float(cine.all_exposures[0])
    finally:
        cine.close()
    shape = (frames, height, width)
    if fields["cfa"] != 0:
        raise InputError(f"{path}: is a colour recording: export it as monochrome")
    stated = int(fields["real_bpp"])
    bit_depth = stated if 1 <= stated <= stored_bits else stored_bits

    def source(start: int, stop: int) -> Iterator[np.ndarray]:
        reader = _open(path)
        try:
            for index in range(start, stop):
                _check_frame(path, reader.f, starts[index], height * width * stored_bits // 8)
                yield np.asarray(reader.get_frame(index))
        finally:
            reader.close()

    metadata: dict[str, str | int | float] = {key: fields[key] for key in KEPT if fields.get(key)}
    metadata.update(record_rate_hz=rate, sensor_pixel_um=round(sensor_um, 3))
    if stored_bits == 10:
        metadata["encoding"] = "packed 10 bit, not linear in the light"
    return Recording(
        path=path,
        shape=shape,
        dtype=np.dtype(np.uint8 if stored_bits == 8 else np.uint16),
        bit_depth=bit_depth,
        source=source,
        camera=_camera(int(fields["camera_version"])),
        frame_rate_hz=_true_rate(rate, times),
        exposure_s=exposure if exposure > 0 else None,
        metadata=metadata,
    )


def _open(path: Path) -> Any:
    from pims.cine import Cine  # pims is slow to import, and only .cine files need it

    return Cine(str(path))


def _check(path: Path, file: BinaryIO) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Frame count, stored bits a pixel, offsets of the frames and their times (s)."""
    size = path.stat().st_size
    kind, _, compression = struct.unpack("<2s2H", _bytes(path, file, 0, 6))
    count, off_bitmap, off_setup, off_images = struct.unpack("<4I", _bytes(path, file, 20, 16))
    if kind != b"CI":
        raise InputError(f"{path}: does not start with CI: not a Phantom .cine, or damaged")
    _, width, height, _, bits, packing, _ = struct.unpack(
        "<IiiHHII", _bytes(path, file, off_bitmap, 24)
    )
    if bits not in (8, 16) or compression or packing not in (0, *PACKED):
        raise InputError(
            f"{path}: {bits} bit a pixel, compression {compression}/{packing}: "
            "supported is uncompressed or packed monochrome"
        )
    check_shape(path, (count, height, width))
    stored_bits = PACKED.get(packing, bits)
    frame_bytes = height * width * stored_bits // 8
    if count * (frame_bytes + 16) + off_images > size:
        raise InputError(
            f"{path}: has {size} bytes, its header promises {count} frames of "
            f"{height} x {width} in {stored_bits} bit: the file is incomplete, copy "
            "it again"
        )
    starts = np.frombuffer(_bytes(path, file, off_images, 8 * count), "<u8")
    outside = np.flatnonzero(starts > size - frame_bytes - 8)
    if len(outside):
        raise InputError(
            f"{path}: frame {outside[0]} lies beyond the end of the file: it is "
            "incomplete or damaged, copy it again"
        )
    length = struct.unpack("<H", _bytes(path, file, off_setup + 142, 2))[0]
    times = _time_stamps(path, file, off_setup + length, off_images, count)
    return count, stored_bits, starts, times


def _time_stamps(path: Path, file: BinaryIO, at: int, end: int, count: int) -> np.ndarray:
    """Seconds from the first frame, from the tagged block of image times."""
    times: np.ndarray | None = None
    more = 1
    while more and at + 8 <= end:
        size, kind, more = struct.unpack("<IHH", _bytes(path, file, at, 8))
        if size < 8:
            break
        if kind == IMAGE_TIMES:
            ticks = np.frombuffer(_bytes(path, file, at + 8, min(size - 8, 8 * count)), "<u8")
            if len(ticks) == count:
                times = (ticks - ticks[0]).astype(np.int64) / 2**32
        at += size
    if more or times is None:
        raise InputError(
            f"{path}: its {count} time stamps are missing or damaged: save the cine "
            "again with its image times"
        )
    return times


def _check_frame(path: Path, file: BinaryIO, start: int, frame_bytes: int) -> None:
    annotation = struct.unpack("<I", _bytes(path, file, int(start), 4))[0]
    if not 8 <= annotation <= LARGEST_TEXT:
        raise InputError(
            f"{path}: the frame at byte {start} has a damaged header: copy the file again"
        )
    stated = struct.unpack("<I", _bytes(path, file, int(start) + annotation - 4, 4))[0]
    if stated != frame_bytes:
        raise InputError(
            f"{path}: the frame at byte {start} states {stated} bytes instead of "
            f"{frame_bytes}: the file is damaged, copy it again"
        )


def _bytes(path: Path, file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    data = file.read(count)
    if len(data) != count:
        raise InputError(
            f"{path}: ends before byte {at + count} that its header points to: the "
            "file is incomplete or damaged, copy it again"
        )
    return data


def _true_rate(rate: float, times: np.ndarray) -> float:
    """Frames a second in the file: of a recording saved every n-th frame, rate / n."""
    if len(times) < 2:
        return rate
    interval = float(np.median(np.diff(times)))
    step = round(interval * rate) if 0 < interval < 1e6 else 1
    return rate / step if step >= 1 and abs(interval * rate - step) < 0.1 * step else rate


def _camera(version: int) -> str:
    """Two digits mean v7.3, three or four the model's name; later cameras use another code."""
    if version < 100:
        return f"Phantom v{version // 10}.{version % 10}"
    return f"Phantom v{version}" if version < 10_000 else f"Phantom (camera version {version})"
