"""The two file formats of a corpus behind one small interface: Zarr v3 and HDF5.

A store writes a clip frame by frame (`create`), reads crops of its arrays (`open`) and its
attributes (`describe`), and keeps what lets other programs open the whole corpus (`index`).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hpc_xvr.data.layout import commit

CHUNK = 128
# Room for the shard index of the clips in use: without it every chunk read re-reads the index.
READ_CACHE_BYTES = 16 << 20


class DamagedData(Exception):
    """Stored bytes that do not match their checksum, or are gone."""


class Clip(Protocol):
    """A clip that is being written."""

    def start(self, name: str, shape: tuple[int, int, int], dtype: np.dtype) -> None: ...

    def append(self, frame: np.ndarray) -> None: ...

    def finish(self, attributes: dict[str, Any]) -> None: ...

    def abort(self) -> None: ...


class Array(Protocol):
    """A stored array (T, H, W) open for reading."""

    shape: tuple[int, int, int]
    dtype: np.dtype

    def read(self, t: Sequence[int], y: slice, x: slice) -> np.ndarray: ...


class Store(Protocol):
    """One file format. Arrays of a clip are named `frames` and `lr`."""

    suffix: str

    def create(self, path: Path) -> Clip: ...

    def open(self, path: Path, name: str) -> Array: ...

    def describe(self, path: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple, str]]]: ...

    def index(self, root: Path, scratch: Path, ids: Sequence[str]) -> None: ...


def chunk_side(length: int) -> int:
    """Side of the chunks along an axis: equal parts of at most 128."""
    return math.ceil(length / math.ceil(length / CHUNK))


class ZarrStore:
    """Each clip is a group in one Zarr v3 hierarchy; an array is one shard (one file)."""

    suffix = ""

    def __init__(self) -> None:
        self._context: Any = None

    def create(self, path: Path) -> _ZarrClip:
        return _ZarrClip(path)

    def open(self, path: Path, name: str) -> _ZarrArray:
        import tensorstore

        if self._context is None:
            self._context = tensorstore.Context(
                {
                    "cache_pool": {"total_bytes_limit": READ_CACHE_BYTES},
                    "file_io_concurrency": {"limit": 1},
                    "data_copy_concurrency": {"limit": 1},
                }
            )
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str((path / name).absolute())},
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "fill_missing_data_reads": False,
        }
        try:
            array = tensorstore.open(spec, context=self._context, open=True, read=True).result()
        except (ValueError, OSError, RuntimeError) as error:
            raise DamagedData(f"{name} cannot be opened: {_first(error)}") from None
        return _ZarrArray(array)

    def describe(self, path: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple, str]]]:
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]
        arrays = {}
        for name in ("frames", "lr"):
            if (path / name).is_dir():
                meta = json.loads((path / name / "zarr.json").read_text())
                arrays[name] = (tuple(meta["shape"]), meta["data_type"])
        return attributes, arrays

    def index(self, root: Path, scratch: Path, ids: Sequence[str]) -> None:
        for folder in (root, root / "videos"):
            if not (folder / "zarr.json").exists():
                (scratch / "zarr.json").write_text(json.dumps(_group({})))
                commit(scratch / "zarr.json", folder / "zarr.json")


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


class _ZarrClip:
    """zarr-python writes the metadata; the shard is streamed, which needs the memory of one
    frame where zarr-python needs three clips, and is ten times as fast."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        path.mkdir()

    def start(self, name: str, shape: tuple[int, int, int], dtype: np.dtype) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec

        self._end_shard()
        self._chunk = (chunk_side(shape[1]), chunk_side(shape[2]))
        self._counts = (math.ceil(shape[1] / self._chunk[0]), math.ceil(shape[2] / self._chunk[1]))
        self._dtype = dtype.newbyteorder("<")
        shard = (shape[0], self._counts[0] * self._chunk[0], self._counts[1] * self._chunk[1])
        zarr.create_array(
            store=str(self._path / name),
            shape=shape,
            dtype=dtype,
            fill_value=0,
            chunks=(1, *self._chunk),
            shards=shard,
            filters=None,
            compressors=Crc32cCodec(),
        )
        self._padded = np.zeros(shard[1:], self._dtype)
        self._shape = shape
        self._entries: list[tuple[int, int]] = []
        shard_path = self._path / name / "c" / "0" / "0" / "0"
        shard_path.parent.mkdir(parents=True)
        self._file = shard_path.open("wb")
        self._offset = 0

    def append(self, frame: np.ndarray) -> None:
        from google_crc32c import value as crc32c

        self._padded[: self._shape[1], : self._shape[2]] = frame
        (h, w), (rows, columns) = self._chunk, self._counts
        chunks = self._padded.reshape(rows, h, columns, w).swapaxes(1, 2)
        for chunk in chunks.reshape(rows * columns, h * w):
            data = chunk.tobytes()
            self._file.write(data)
            self._file.write(crc32c(data).to_bytes(4, "little"))
            self._entries.append((self._offset, len(data) + 4))
            self._offset += len(data) + 4

    def finish(self, attributes: dict[str, Any]) -> None:
        self._end_shard()
        (self._path / "zarr.json").write_text(json.dumps(_group(attributes)))

    def abort(self) -> None:
        if self._file:
            self._file.close()

    def _end_shard(self) -> None:
        from google_crc32c import value as crc32c

        if self._file is None:
            return
        index = np.array(self._entries, "<u8").tobytes()
        self._file.write(index + crc32c(index).to_bytes(4, "little"))
        self._file.close()
        self._file = None


class _ZarrArray:
    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape = tuple(array.shape)
        self.dtype = array.dtype.numpy_dtype

    def read(self, t: Sequence[int], y: slice, x: slice) -> np.ndarray:
        try:
            if len(t) == 1:
                return self._array[t[0], y, x].read().result()[None]
            return self._array[list(t), y, x].read().result()
        except (ValueError, OSError, RuntimeError) as error:
            raise DamagedData(_first(error)) from None


class Hdf5Store:
    """Each clip is one HDF5 file; a small master file links to all of them."""

    suffix = ".h5"

    def create(self, path: Path) -> _Hdf5Clip:
        return _Hdf5Clip(path)

    def open(self, path: Path, name: str) -> _Hdf5Array:
        import h5py

        try:
            # A chunk cache in each open clip adds up, and crops are seldom read twice.
            file = h5py.File(path, "r", rdcc_nbytes=0)
            return _Hdf5Array(file[name])
        except (OSError, KeyError, RuntimeError) as error:
            raise DamagedData(f"{name} cannot be opened: {_first(error)}") from None

    def describe(self, path: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple, str]]]:
        import h5py

        with h5py.File(path, "r") as file:
            attributes = {key: _plain(value) for key, value in file.attrs.items()}
            arrays = {
                name: (file[name].shape, file[name].dtype.name)
                for name in ("frames", "lr")
                if name in file
            }
        for name in ("metadata", "registration"):
            if name in attributes:
                attributes[name] = json.loads(attributes[name])
        return attributes, arrays

    def index(self, root: Path, scratch: Path, ids: Sequence[str]) -> None:
        import h5py

        master = root / "corpus.h5"
        with contextlib.suppress(OSError, KeyError), h5py.File(master, "r") as file:
            if set(file["videos"]) == set(ids):
                return
        disk = _PatientFile(scratch / "corpus.h5")
        with contextlib.closing(disk):
            with h5py.File(disk, "w") as file:
                videos = file.create_group("videos")
                for id in ids:
                    videos[id] = h5py.ExternalLink(f"videos/{id}.h5", "/")
            disk.check()
        commit(scratch / "corpus.h5", master)


class _Hdf5Clip:
    def __init__(self, path: Path) -> None:
        import h5py

        self._disk = _PatientFile(path)
        # This version's metadata blocks carry checksums too.
        self._file = h5py.File(self._disk, "w", libver=("v110", "v110"))

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
            if value is not None:
                self._file.attrs[key] = json.dumps(value) if isinstance(value, dict) else value
        self.abort()
        self._disk.check()

    def abort(self) -> None:
        self._file.close()
        self._disk.close()


class _PatientFile:
    """What HDF5 writes through: libhdf5 crashes after a write that failed (disk full), so it is
    told that all went well, and `check` raises the OSError."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
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
            raise DamagedData(_first(error)) from None


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]


STORES: dict[str, type[ZarrStore] | type[Hdf5Store]] = {"zarr": ZarrStore, "hdf5": Hdf5Store}
