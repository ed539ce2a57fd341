"""The corpus folder on disk: names, header, manifest, attributes, lock, safe replacement."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

from hpc_xvr.errors import InputError

SCHEMA = 1
FORMAT = "hpc_xvr corpus"
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
HEADER, MANIFEST, LOCK, SCRATCH = "corpus.json", "manifest.jsonl", ".lock", ".incoming"
STORES = ("zarr", "hdf5")
SPLITS = ("train", "validation", "test")


class Registration(BaseModel):
    """Where the pixels of the second, low-resolution camera lie on the high-resolution frames.

    Coordinates are (row, column), continuous: pixel k covers k to k + 1, so that two cameras with
    a common upper left corner have origin (0, 0), whatever their scale. The LR frame is flipped
    first, then HR = origin + scale * R @ LR with R = ((cos, -sin), (sin, cos)) of the rotation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Side of an LR pixel in HR pixels."""
    origin: tuple[FiniteFloat, FiniteFloat] = (0.0, 0.0)
    """HR (row, column) of the upper left corner of the LR frame."""
    rotation_deg: Annotated[float, Field(ge=-45, le=45)] = 0.0
    """Of the LR frame about that corner, counter-clockwise as seen."""
    flip: Literal["none", "rows", "columns", "both"] = "none"
    """What the LR camera shows mirrored: rows upside down, columns left to right."""

    def to_hr(self, places: np.ndarray) -> np.ndarray:
        """HR (row, column) of places (n, 2) on the flipped LR frame."""
        return np.asarray(self.origin) + self.scale * places @ self._rotation().T

    def to_lr(self, places: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(row, column) on the LR frame, (height, width) `size`, of HR places (n, 2)."""
        found = (places - np.asarray(self.origin)) @ self._rotation() / self.scale
        for axis, names in enumerate((("rows", "both"), ("columns", "both"))):
            if self.flip in names:
                found[:, axis] = size[axis] - found[:, axis]
        return found

    def _rotation(self) -> np.ndarray:
        angle = math.radians(self.rotation_deg)
        return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


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
    split: Literal["train", "validation", "test"]
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
    try:
        header = json.loads((path / HEADER).read_text())
        if header["format"] != FORMAT:
            raise KeyError
        schema, store = header["schema"], header["store"]
    except OSError as error:
        raise InputError(
            f"corpus {path}: no corpus there ({error.strerror}: {HEADER}); make one "
            "with `hpc-xvr ingest` or `hpc-xvr simulate`"
        ) from None
    except (ValueError, KeyError, TypeError):
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


class WriterLock:
    """A file with the writer's host and process; the kernel's lock on it ends with the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT)
            alone = True
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                alone = False
            except OSError:  # a file system without locks: the names in the file decide
                alone = None
            # Its last owner may have removed the file between our open and our lock.
            if not path.exists() or os.fstat(self._file).st_ino != path.stat().st_ino:
                os.close(self._file)
                continue
            break
        holder = os.read(self._file, 200).decode().split()
        if alone is False or (len(holder) == 2 and self._lives(*holder, alone)):
            os.close(self._file)
            name = " on ".join(reversed(holder[:2])) or "unknown"
            raise InputError(
                f"corpus {path.parent}: is being written by process {name}; wait for "
                f"it, or delete {path} if it no longer runs"
            )
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)

    @staticmethod
    def _lives(host: str, process: str, alone: bool | None) -> bool:
        if host != socket.gethostname():
            return True
        if alone:
            return False
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def release(self) -> None:
        """Let the next writer in."""
        self._path.unlink(missing_ok=True)
        os.close(self._file)


def commit(temporary: Path, final: Path) -> None:
    """Put a finished file or folder in its place so that it survives a crash right after."""
    sync(temporary)
    place(temporary, final)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all it holds, is on the disk."""
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            _fsync(Path(folder) / name)
    _fsync(path)


def place(temporary: Path, final: Path) -> None:
    """Rename what is on the disk already."""
    temporary.replace(final)
    _fsync(final.parent)


def checksums(path: Path) -> dict[str, int]:
    """CRC-32C of each file of a clip by its name in the clip's folder ("." is the clip itself)."""
    from google_crc32c import extend

    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    sums = {}
    for file in files:
        found = 0
        with file.open("rb") as opened:
            while data := opened.read(2**20):
                found = extend(found, data)
        sums[file.relative_to(path).as_posix()] = found
    return sums


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path, what: str = "write") -> Iterator[None]:
    """What the disk refuses is the user's to mend: OSError becomes a one-line InputError."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).splitlines()[0]
        raise InputError(
            f"corpus {path}: cannot {what} {error.filename or path} ({reason}); "
            f"{_free(path)} are free there: check space, quota and permissions"
        ) from None


def _free(path: Path) -> str:
    for folder in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB"
    return "unknown GB"


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def explain(error: Exception) -> str:
    """An exception's message as one line; the first problem of a validation error."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    return str(error).splitlines()[0]


def frame_bytes(frame: np.ndarray) -> memoryview:
    """What the checksum of a clip is taken of: C order, little endian."""
    return np.ascontiguousarray(frame, frame.dtype.newbyteorder("<")).data
