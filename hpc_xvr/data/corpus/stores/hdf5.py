"""HDF5: one file a clip, and a small master file that links to all of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hpc_xvr.data.corpus.stores.base import DamagedData, ShapeAndType, chunk_side, first_line
from hpc_xvr.data.scout import check_survivable
from hpc_xvr.errors import InputError
from hpc_xvr.files import check_regular, commit
from hpc_xvr.text import parse_json

DENSEST = 1032
"""Bytes that one byte of deflated data can stand for at most; clips are not even compressed."""


class Hdf5Store:
    """Each clip is one HDF5 file; a small master file links to all of them."""

    suffix = ".h5"
    attributes_file = "."

    def create(self, path: Path) -> _Hdf5Clip:
        return _Hdf5Clip(path)

    def complete(self, path: Path, attributes: dict[str, Any]) -> None:
        clip = _Hdf5Clip(path, "r+")
        try:
            clip.finish(attributes)
        finally:
            with contextlib.suppress(Exception):
                clip.abort()

    def open(self, path: Path, name: str) -> _Hdf5Array:
        import h5py

        try:
            # A chunk cache in each open clip adds up, and crops are seldom read twice.
            check_regular(path)
            file = h5py.File(path, "r", rdcc_nbytes=0)
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                raise DamagedData(f"{name} is a link to elsewhere, which no clip has")
            array = file[name]
            if array.is_virtual or array.external:
                raise DamagedData(f"{name} lies in other files, which no clip does")
            if array.nbytes > DENSEST * array.id.get_storage_size():
                raise DamagedData(f"{name} is {array.shape}, but hardly anything is stored")
            return _Hdf5Array(array)
        except (OSError, KeyError, RuntimeError, InputError, AttributeError) as error:
            raise DamagedData(f"{name} cannot be opened: {first_line(error)}") from None

    def describe(self, path: Path) -> tuple[dict[str, Any], dict[str, ShapeAndType]]:
        import h5py

        check_regular(path)
        check_survivable(path)
        with h5py.File(path, "r") as file:
            attributes = {key: _plain(value) for key, value in file.attrs.items()}
            arrays = {
                name: (file[name].shape, file[name].dtype.name)
                for name in ("frames", "lr")
                if isinstance(file.get(name, getlink=True), h5py.HardLink)
            }
        for name in ("metadata", "registration"):
            if name in attributes:
                attributes[name] = parse_json(attributes[name])
        return attributes, arrays

    def index(self, root: Path, scratch: Path, ids: Sequence[str]) -> None:
        import h5py

        master = root / "corpus.h5"
        with contextlib.suppress(OSError, KeyError), h5py.File(master, "r") as file:
            if set(file["videos"]) == set(ids):
                return
        disk = DeferredErrorsFile(scratch / "corpus.h5", "w")
        with contextlib.closing(disk):
            with h5py.File(disk, "w") as file:
                videos = file.create_group("videos")
                for id in ids:
                    videos[id] = h5py.ExternalLink(f"videos/{id}.h5", "/")
            disk.check()
        commit(scratch / "corpus.h5", master)


class _Hdf5Clip:
    def __init__(self, path: Path, mode: Literal["w", "r+"] = "w") -> None:
        import h5py

        self._disk = DeferredErrorsFile(path, mode)
        # This version's metadata blocks carry checksums too.
        self._file = h5py.File(self._disk, mode, libver=("v110", "v110"))

    def start(self, name: str, shape: tuple[int, int, int], dtype: np.dtype) -> None:
        chunks = (1, chunk_side(shape[1]), chunk_side(shape[2]))
        self._array = self._file.create_dataset(
            name, shape, dtype.newbyteorder("<"), chunks=chunks, fletcher32=True
        )
        self._next = 0

    def append(self, frame: np.ndarray) -> None:
        self._array[self._next] = frame
        self._next += 1
        self._disk.check()

    def finish(self, attributes: dict[str, Any]) -> None:
        for key, value in attributes.items():
            stored = json.dumps(value) if isinstance(value, dict) else value
            if stored is not None and _plain(self._file.attrs.get(key)) != stored:
                self._file.attrs[key] = stored
        self.abort()
        self._disk.check()

    def abort(self) -> None:
        self._file.close()
        self._disk.close()


class DeferredErrorsFile:
    """What HDF5 writes through. libhdf5 crashes after a write that failed (disk full): here every
    write seems to succeed, and `check` raises the first OSError."""

    def __init__(self, path: Path, mode: Literal["w", "r+"]) -> None:
        self._file = path.open("w+b" if mode == "w" else "r+b", buffering=0)
        self._failure: OSError | None = None
        self.seek, self.tell, self.close = self._file.seek, self._file.tell, self._file.close
        self.read, self.readinto = self._file.read, self._file.readinto

    def write(self, data: memoryview) -> None:
        try:
            while len(data) and not self._failure:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._failure = error

    def truncate(self, size: int) -> None:
        try:
            self._file.truncate(size)
        except OSError as error:
            self._failure = self._failure or error

    def flush(self) -> None:
        """Nothing is held back; part of what h5py asks of a file."""

    def check(self) -> None:
        if self._failure:
            raise self._failure


class _Hdf5Array:
    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def read(self, t: Sequence[int], y: slice, x: slice) -> np.ndarray:
        try:
            return np.stack([self._array[i, y, x] for i in t])
        except (OSError, RuntimeError) as error:
            raise DamagedData(first_line(error)) from None


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
