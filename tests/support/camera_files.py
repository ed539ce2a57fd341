"""Writers of small camera files for tests, and what every reader must keep."""

from __future__ import annotations

import struct
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_xvr.data.cameras import open_camera_file
from hpc_xvr.errors import InputError

RNG = np.random.default_rng(7)


def stack(recording) -> np.ndarray:
    """All frames; checks what a Recording promises about them on the way."""
    frames = np.stack(list(recording.frames()))
    assert frames.shape == recording.shape and frames.dtype == recording.dtype
    assert frames.max() <= 2**recording.bit_depth - 1
    return frames


def refused(path, *words: str, **options) -> str:
    """Opening or reading gives one InputError line that holds the words."""
    with pytest.raises(InputError) as error:
        for _ in open_camera_file(path, **options).frames():
            pass
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    return line


def write_photron(folder: Path, frames: np.ndarray, bits: int, name="run", **keys) -> Path:
    header = {
        "Camera Type": "FASTCAM SA-Z",
        "Record Rate(fps)": "60000",
        "Shutter Speed(s)": "1/80000",
        "Total Frame": len(frames),
        "Save Step": 1,
        "Image Width": frames.shape[2],
        "Image Height": frames.shape[1],
        "Color Type": "Mono",
        "Color Bit": bits,
        "File Format": "MRaw",
        "EffectiveBit Depth": 8 if bits == 8 else 12,
        "EffectiveBit Side": "Lower",
    } | keys
    lines = [f"{key} : {value}" for key, value in header.items()]
    (folder / f"{name}.cih").write_text("\n".join(["#Camera Information Header", *lines, "", ""]))
    if bits == 12:
        pairs = frames.reshape(-1, 2).astype(np.uint32)
        word = pairs[:, 0] << 12 | pairs[:, 1]
        data = np.stack([word >> 16, word >> 8 & 255, word & 255], 1).astype(np.uint8)
    else:
        data = frames.astype(f"<u{bits // 8}")
    (folder / f"{name}.mraw").write_bytes(data.tobytes())
    return folder / f"{name}.cih"


def write_cihx(folder: Path, frames: np.ndarray, name="run") -> Path:
    write_photron(folder, frames, 12, name)
    (folder / f"{name}.cih").unlink()
    xml = f"""<?xml version='1.0' encoding='UTF-8'?>
<cih><imageFileInfo><fileFormat>Mraw</fileFormat></imageFileInfo><imageDataInfo><resolution>
<width>{frames.shape[2]}</width><height>{frames.shape[1]}</height></resolution><colorInfo>
<type>Mono</type><bit>12</bit></colorInfo><effectiveBit><depth>12</depth><side>Lower</side>
</effectiveBit></imageDataInfo><frameInfo><totalFrame>{len(frames)}</totalFrame>
<skipFrame>4</skipFrame></frameInfo><recordInfo><recordRate>50000</recordRate>
<shutterSpeedNsec>5000</shutterSpeedNsec></recordInfo><deviceInfo>
<deviceName>FASTCAM Nova</deviceName></deviceInfo></cih>"""
    (folder / f"{name}.cihx").write_bytes(b"CIHX\x3c\xff\x01\0" + xml.encode() + b"\0\x1a" * 20)
    return folder / f"{name}.cihx"


def section(tag: str, payload: bytes, count: int) -> bytes:
    return bytes.fromhex(tag) + b"\0\0" + struct.pack("<I", count) + b"\0\0\0\0" + payload


def shimadzu_parts(values: np.ndarray) -> list[bytes]:
    data = (values.astype("<u2") << 6).tobytes()
    return [
        b"HEAD" * 9,
        section("30300730", b"200", 3),
        section("30300830", b"110", 3),
        section("40400e40", b"2024/03/01 12:00:00", 19),
        section("60600560", struct.pack("<I", len(values)), 4),
        section("60600660", b"0\0", 1),
        section("a0a001a0", data, values.size),
        b"TAIL" * 5,
    ]


def write_cine(path: Path, frames: np.ndarray, rate=1000, step=1) -> Path:
    from pims.cine import SETUP_FIELDS

    count, height, width = frames.shape
    setup, at = bytearray(struct.calcsize("<" + "".join(f for _, f in SETUP_FIELDS))), {}
    for name, kind in SETUP_FIELDS:
        at[name] = (sum(struct.calcsize("<" + k) for _, k in SETUP_FIELDS[: len(at)]), kind)
    for name, value in {
        "mark": b"ST",
        "length": len(setup),
        "frame_rate": rate,
        "real_bpp": 12,
        "software_version": 781,
        "camera_version": 73,
    }.items():
        struct.pack_into("<" + at[name][1], setup, at[name][0], value)
    ticks = [2**62 + round(k * step / rate * 2**32) for k in range(count)]
    tags = struct.pack("<IHH", 8 + 8 * count, 1002, 1) + struct.pack(f"<{count}Q", *ticks)
    tags += struct.pack("<IHH", 8 + 4 * count, 1003, 0) + struct.pack(f"<{count}I", *[4295] * count)
    bitmap = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, 16, 0, 2 * height * width, 50_000, 50_000, 0, 4096
    )
    offsets = 84 + len(setup) + len(tags)
    head = struct.pack("<2s3HiIiIIIIQ", b"CI", 44, 0, 1, 0, count, 0, count, 44, 84, offsets, 2**62)
    size = 8 + 2 * height * width
    starts = [offsets + 8 * count + k * size for k in range(count)]
    images = b"".join(
        struct.pack("<II", 8, size - 8) + frame[::-1].astype("<u2").tobytes() for frame in frames
    )
    path.write_bytes(head + bitmap + setup + tags + struct.pack(f"<{count}Q", *starts) + images)
    return path


def write_dxchange(path: Path, data, white=None, dark=None, **options) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in (("data", data), ("data_white", white), ("data_dark", dark)):
            if values is not None:
                file.create_dataset(f"exchange/{name}", data=values, **options)
        file["measurement/instrument/detector/model"] = "Oryx"
        file["measurement/instrument/detector/exposure_time"] = 0.002
        file["measurement/instrument/detection_system/objective/resolution"] = 1.17
    return path


def counts(shape, bits=12) -> np.ndarray:
    return RNG.integers(0, 2**bits, shape).astype(np.uint16 if bits > 8 else np.uint8)
