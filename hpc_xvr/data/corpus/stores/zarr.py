"""Zarr v3: one hierarchy, a group a clip, one shard (one file) an array."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpc_xvr.data.corpus.stores.base import Array, DamagedData, ShapeAndType, chunk_side, first_line
from hpc_xvr.data.corpus.stores.shard import Shard, layout
from hpc_xvr.errors import InputError
from hpc_xvr.files import check_regular, commit
from hpc_xvr.text import parse_json

# Room for the shard index of the clips in use: without it every chunk read re-reads the index.
READ_CACHE_BYTES = 16 << 20
_LARGEST_CHUNK = 2**28  # pixels; a chunk is decoded as a whole


class ZarrStore:
    """Each clip is a group in one Zarr v3 hierarchy; an array is one shard (one file)."""

    suffix = ""
    attributes_file = "zarr.json"

    def __init__(self) -> None:
        self._context: Any = None

    def create(self, path: Path) -> _ZarrClip:
        return _ZarrClip(path)

    def complete(self, path: Path, attributes: dict[str, Any]) -> None:
        _write_group(path, attributes)

    def open(self, path: Path, name: str) -> Array:
        try:
            check_regular(path / name / "zarr.json")
        except InputError as error:
            raise DamagedData(str(error)) from None
        known = layout(path / name)
        return Shard(path / name, known) if known else self._open_any(path, name)

    def _open_any(self, path: Path, name: str) -> _ZarrArray:
        """An array that another program wrote, or whose description is damaged."""
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
            "kvstore": {"driver": "file", "path": str((path / name).resolve())},
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "fill_missing_data_reads": False,
        }
        try:
            array = tensorstore.open(spec, context=self._context, open=True, read=True).result()
        except (ValueError, OSError, RuntimeError) as error:
            raise DamagedData(f"{name} cannot be opened: {first_line(error)}") from None
        chunk = array.chunk_layout.read_chunk.shape or ()
        if math.prod(side or 1 for side in chunk) > _LARGEST_CHUNK:
            raise DamagedData(f"{name} states chunks of more than {_LARGEST_CHUNK:,} pixels")
        return _ZarrArray(array)

    def describe(self, path: Path) -> tuple[dict[str, Any], dict[str, ShapeAndType]]:
        check_regular(path / "zarr.json")
        attributes = parse_json((path / "zarr.json").read_text())["attributes"]
        arrays = {}
        for name in ("frames", "lr"):
            if (path / name).is_dir():
                check_regular(path / name / "zarr.json")
                meta = parse_json((path / name / "zarr.json").read_text())
                arrays[name] = (tuple(meta["shape"]), meta["data_type"])
        return attributes, arrays

    def index(self, root: Path, scratch: Path, ids: Sequence[str]) -> None:
        for folder in (root, root / "videos"):
            if not (folder / "zarr.json").exists():
                _write_group(scratch, {})
                commit(scratch / "zarr.json", folder / "zarr.json")


def _write_group(folder: Path, attributes: dict[str, Any]) -> None:
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (folder / "zarr.json").write_text(json.dumps(group))


class _ZarrClip:
    """The shard is streamed, which needs the memory of one frame where zarr-python needs three
    clips, and is ten times as fast."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        path.mkdir()

    def start(self, name: str, shape: tuple[int, int, int], dtype: np.dtype) -> None:
        self._end_shard()
        self._chunk = (chunk_side(shape[1]), chunk_side(shape[2]))
        self._counts = (math.ceil(shape[1] / self._chunk[0]), math.ceil(shape[2] / self._chunk[1]))
        self._dtype = dtype.newbyteorder("<")
        shard = (shape[0], self._counts[0] * self._chunk[0], self._counts[1] * self._chunk[1])
        metadata = _array(shape, dtype, (1, *self._chunk), shard)
        self._padded = np.zeros(shard[1:], self._dtype)
        self._shape = shape
        self._entries: list[tuple[int, int]] = []
        shard_path = self._path / name / "c" / "0" / "0" / "0"
        shard_path.parent.mkdir(parents=True)
        (self._path / name / "zarr.json").write_text(json.dumps(metadata))
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
        _write_group(self._path, attributes)

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


def _array(
    shape: tuple[int, ...], dtype: np.dtype, chunk: tuple[int, ...], shard: tuple[int, ...]
) -> dict[str, Any]:
    """Metadata of an array of uncompressed, checksummed chunks (Zarr v3, sharding_indexed)."""
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    values = [{"name": "bytes"}, codecs[1]] if dtype.itemsize == 1 else codecs
    sharding = {
        "chunk_shape": chunk,
        "codecs": values,
        "index_codecs": codecs,
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "storage_transformers": [],
    }


class _ZarrArray:
    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape = tuple(array.shape)
        self.dtype = array.dtype.numpy_dtype

    def read(self, t: Sequence[int], y: slice, x: slice) -> np.ndarray:
        try:
            crops: np.ndarray
            if len(t) == 1:
                crops = self._array[t[0], y, x].read().result()[None]
            else:
                crops = self._array[list(t), y, x].read().result()
            return crops
        except (ValueError, OSError, RuntimeError) as error:
            raise DamagedData(first_line(error)) from None
