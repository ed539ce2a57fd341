"""The corpus folder on disk: names, header, attributes of a recording, checksums."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

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
Checksums: TypeAlias = Mapping[str, int | str]
"""Of the files of a clip: SHA-256 in hexadecimal digits; in older corpora CRC-32C as a number."""


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


def checksums(path: Path, without: str | None = None, like: Checksums | None = None) -> Checksums:
    """Those of each file of a clip by its name in the clip's folder ("." is the clip itself).

    Args:
        without: name of a file to leave out.
        like: known ones, of whose kinds the new ones are to be.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    named = {file.relative_to(path).as_posix(): file for file in files}
    known = like or {}
    return {name: checksum(f, known.get(name)) for name, f in named.items() if name != without}


def checksum(file: Path, like: int | str | None = None) -> int | str:
    """Of a file: its SHA-256, or its CRC-32C where `like` is one."""
    summing = _Sum(like)
    with file.open("rb", buffering=0) as opened:
        while data := opened.read(2**20):
            summing.add(data)
    return summing.value


def copy_file(source: Path, target: Path, like: int | str | None = None) -> int | str:
    """Copy a file to a new one of the same date; the checksum of what was read, as `checksum`."""
    summing = _Sum(like)
    with source.open("rb", buffering=0) as read, target.open("xb") as written:
        while data := read.read(2**20):
            summing.add(data)
            written.write(data)
    date = source.stat()
    os.utime(target, ns=(date.st_atime_ns, date.st_mtime_ns))
    return summing.value


class _Sum:
    """A checksum that is being computed.

    Older corpora have the CRC-32C of each file. It finds damage, but that of a
    shard, in which each chunk is followed by its own CRC-32C, does not depend on what is in the
    chunks at all: a chunk exchanged together with its CRC leaves it as it was.
    """

    def __init__(self, like: int | str | None) -> None:
        self._crc = 0 if isinstance(like, int) else None
        self._sha = hashlib.sha256()

    def add(self, data: bytes) -> None:
        if self._crc is None:
            self._sha.update(data)
            return
        from google_crc32c import extend

        self._crc = extend(self._crc, data)

    @property
    def value(self) -> int | str:
        return self._sha.hexdigest() if self._crc is None else self._crc


def frame_bytes(frame: np.ndarray) -> memoryview:
    """What the checksum of a clip is taken of: C order, little endian."""
    return np.ascontiguousarray(frame, frame.dtype.newbyteorder("<")).data
