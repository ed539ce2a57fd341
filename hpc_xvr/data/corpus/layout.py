"""The corpus folder on disk: names, header, attributes of a recording, checksums."""

from __future__ import annotations

import itertools
import math
import os
import re
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator

from hpc_xvr.data.registration import Registration
from hpc_xvr.errors import InputError
from hpc_xvr.files import check_regular
from hpc_xvr.text import parse_json

SCHEMA = 1
FORMAT = "hpc_xvr corpus"
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
HEADER, MANIFEST, LOCK, SCRATCH = "corpus.json", "manifest.jsonl", ".lock", ".incoming"
LARGEST_FRAME = 2**28
"""Pixels; no camera comes near it, so a corpus that states more is damaged."""
STORES = ("zarr", "hdf5")
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class VideoInfo(BaseModel):
    """What is known about a recording (stored as attributes of its group)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    camera: str
    frame_rate_hz: float | None = None
    pixel_size_um: float | None = None
    exposure_s: float | None = None
    bit_depth: int
    """Stored values of `frames` are 0..2**bit_depth - 1."""
    scene: str
    split: Split
    source: str
    """Name of the camera file, or "simulated"."""
    sha256: str
    """Of the bytes of `frames` (C order, little endian), then those of `lr` where there is one."""
    full_scale: float = 1.0
    """Physical value (transmission) of the largest value that can be stored."""
    lr_times: list[float] | None = None
    """Time of each LR frame, in HR frames from the first one."""
    lr_bit_depth: int | None = None
    """Bit depth of `lr`; None: that of `frames`."""
    registration: Registration | None = None
    """Of the camera that recorded `lr`, on the sharp camera's frames before they were cut; `lr`
    then is what it saw, on the grid of `frames` / scale."""
    metadata: dict[str, Any] = {}

    @field_validator("lr_times")
    @classmethod
    def _rising(cls, times: list[float] | None) -> list[float] | None:
        if times and not all(math.isfinite(t) for t in times):
            raise ValueError("must be finite numbers")
        if times and any(b <= a for a, b in itertools.pairwise(times)):
            raise ValueError("must rise from each low-resolution frame to the next")
        return times


def read_header(path: Path) -> str:
    """Store of the corpus at `path`, after checking format and schema version."""
    check_regular(path / HEADER)
    try:
        header = parse_json((path / HEADER).read_text())
        if header["format"] != FORMAT:
            raise KeyError
        schema, store = header["schema"], str(header["store"])
    except OSError as error:
        raise InputError(
            f"corpus {path}: no corpus there ({error.strerror}: {HEADER}); make one "
            "with `hpc-xvr ingest` or `hpc-xvr simulate`"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"corpus {path}: its {HEADER} is not that of a corpus; restore it or "
            "make the corpus anew"
        ) from None
    if schema != SCHEMA or store not in STORES:
        raise InputError(
            f"corpus {path}: schema version {schema}, store {store}; this program "
            f"reads version {SCHEMA}, zarr or hdf5: update hpc-xvr or ingest again"
        )
    return store


def checksums(path: Path, without: str | None = None) -> dict[str, int]:
    """CRC-32C of each file of a clip by its name in the clip's folder ("." is the clip itself).

    `without`: name of a file to leave out.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    named = {file.relative_to(path).as_posix(): file for file in files}
    return {name: checksum(file) for name, file in named.items() if name != without}


def checksum(file: Path) -> int:
    """CRC-32C of a file."""
    from google_crc32c import extend

    found = 0
    with file.open("rb") as opened:
        while data := opened.read(2**20):
            found = extend(found, data)
    return found


def copy_file(source: Path, target: Path) -> int:
    """Copy a file to a new one of the same date; the CRC-32C of what was read."""
    from google_crc32c import extend

    found = 0
    with source.open("rb", buffering=0) as read, target.open("xb") as written:
        while data := read.read(2**20):
            found = extend(found, data)
            written.write(data)
    date = source.stat()
    os.utime(target, ns=(date.st_atime_ns, date.st_mtime_ns))
    return found


def frame_bytes(frame: np.ndarray) -> memoryview:
    """What the checksum of a clip is taken of: C order, little endian."""
    return np.ascontiguousarray(frame, frame.dtype.newbyteorder("<")).data
