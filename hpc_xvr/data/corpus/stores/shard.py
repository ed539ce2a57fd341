"""Crops out of a Zarr shard as this program writes it, without a general Zarr reader between.

Reading a crop through one costs more than the bytes: the request is planned chunk by chunk. Here
the shard index is read once and a row of neighbouring chunks, which lie side by side in the file,
comes with one `pread`. Shards of any other make are left to tensorstore.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpc_xvr.data.corpus.stores.base import DamagedData
from hpc_xvr.text import parse_json

CRC = 4  # bytes of a CRC-32C


class Shard:
    """An array (T, H, W) in one shard: raw chunks (1, h, w), a CRC-32C behind each, index last.

    Raises:
        DamagedData: the file is gone, truncated, or its index does not match its checksum.
    """

    def __init__(self, folder: Path, layout: dict[str, Any]) -> None:
        from google_crc32c import value

        self._crc = value
        self.shape: tuple[int, int, int] = layout["shape"]
        self.dtype = np.dtype(layout["dtype"])
        self._chunk: tuple[int, int] = layout["chunk"]
        self._bytes = math.prod(self._chunk) * self.dtype.itemsize
        counts = (
            self.shape[0],
            *(
                math.ceil(side / chunk)
                for side, chunk in zip(self.shape[1:], self._chunk, strict=True)
            ),
        )
        try:  # without waiting for a writer, should it be a pipe
            flags = os.O_RDONLY | os.O_NONBLOCK
            self._file = os.open(folder / "c" / "0" / "0" / "0", flags)
        except OSError as error:
            raise DamagedData(f"shard cannot be opened: {error.strerror}") from None
        found = os.fstat(self._file)
        if not stat.S_ISREG(found.st_mode):
            raise DamagedData("the shard is not a file")
        size = 16 * math.prod(counts)
        if found.st_size < size + CRC + math.prod(counts) * (self._bytes + CRC):
            raise DamagedData(f"the shard is truncated, or its shape {self.shape} is not true")
        index = self._pread(size + CRC, found.st_size - size - CRC)
        if self._crc(index[:size]) != int.from_bytes(index[size:], "little"):
            raise DamagedData("the shard index does not match its checksum")
        self._index = np.frombuffer(index, "<u8", 2 * math.prod(counts)).reshape(*counts, 2)
        if (self._index[..., 1] != self._bytes + CRC).any():
            raise DamagedData("the shard lacks chunks")
        if (self._index[..., 0] > found.st_size - self._bytes - CRC).any():
            raise DamagedData("the shard index leads outside of the shard")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self, t: Sequence[int], y: slice, x: slice) -> np.ndarray:
        """Crops (n, h, w) of the frames t; y and x have no steps."""
        height, width = self._chunk
        out = np.empty((len(t), y.stop - y.start, x.stop - x.start), self.dtype)
        if not out.size:
            return out
        first, last = x.start // width, (x.stop - 1) // width
        columns = [_overlap(x, column * width, width) for column in range(first, last + 1)]
        for row in range(y.start // height, (y.stop - 1) // height + 1):
            to, rows = _overlap(y, row * height, height)
            offsets = self._index[t, row, first : last + 1, 0].tolist()
            for number, frame in enumerate(t):
                chunks = self._chunks(frame, offsets[number])
                for (across, part), chunk in zip(columns, chunks, strict=True):
                    out[number, to, across] = chunk[rows, part]
        return out

    def _chunks(self, t: int, offsets: list[int]) -> Iterable[np.ndarray]:
        """Chunks (h, w) of frame t at these places in the file, compared with their checksums."""
        step, count = self._bytes + CRC, len(offsets)
        if offsets[-1] != offsets[0] + (count - 1) * step:  # not side by side
            return [next(iter(self._chunks(t, [offset]))) for offset in offsets]
        data = np.frombuffer(self._pread(count * step, offsets[0]), np.uint8).reshape(count, step)
        contents, sums = data[:, : self._bytes], data[:, self._bytes :]
        for content, wanted in zip(contents, sums, strict=True):
            if self._crc(content).to_bytes(CRC, "little") != wanted.tobytes():
                raise DamagedData(f"frame {t}: a chunk does not match its checksum")
        chunks: np.ndarray = contents.view(self.dtype).reshape(count, *self._chunk)
        return chunks

    def _pread(self, count: int, offset: int) -> bytes:
        try:
            data = os.pread(self._file, count, offset) if offset >= 0 else b""
            while data and len(data) < count:
                more = os.pread(self._file, count - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise DamagedData(f"shard cannot be read: {error.strerror}") from None
        if len(data) < count:
            raise DamagedData("the shard is truncated")
        return data


def _overlap(wanted: slice, start: int, side: int) -> tuple[slice, slice]:
    """Where the chunk from `start` meets what is wanted: place in the crop, place in the chunk."""
    begin, end = max(wanted.start, start), min(wanted.stop, start + side)
    return slice(begin - wanted.start, end - wanted.start), slice(begin - start, end - start)


def layout(folder: Path) -> dict[str, Any] | None:
    """Shape, type and chunks of an array whose shard `Shard` can read; None for any other array."""
    try:
        meta = parse_json((folder / "zarr.json").read_text())
        (sharding,) = meta["codecs"]
        inner = sharding["configuration"]
        shape, shard = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
        depth, height, width = inner["chunk_shape"]
        fits = (
            len(shape) == 3
            and all(type(side) is int and side > 0 for side in (*shape, height, width))
            and sharding["name"] == "sharding_indexed"
            and meta["chunk_key_encoding"]
            == {"name": "default", "configuration": {"separator": "/"}}
            and [codec["name"] for codec in inner["codecs"]] == ["bytes", "crc32c"]
            and inner["codecs"][0].get("configuration", {}).get("endian", "little") == "little"
            and [codec["name"] for codec in inner["index_codecs"]] == ["bytes", "crc32c"]
            and inner.get("index_location", "end") == "end"
            and depth == 1
            and shard
            == [
                shape[0],
                *(math.ceil(n / c) * c for n, c in zip(shape[1:], (height, width), strict=True)),
            ]
        )
        dtype = {"uint8": "u1", "uint16": "<u2"}[meta["data_type"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return {"shape": tuple(shape), "dtype": dtype, "chunk": (height, width)} if fits else None
