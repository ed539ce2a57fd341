"""Which videos a corpus has: one line each, of which only the first part is read at once.

A line of `manifest.jsonl` is a JSON object. What finding and reading a clip needs comes first, the
recording's attributes last, so that opening a corpus of 100,000 clips parses the first part of each
line, keeps a row of small numbers and remembers where the line is.
"""

from __future__ import annotations

import contextlib
import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_xvr.data.corpus.layout import (
    ID,
    LARGEST_FRAME,
    MANIFEST,
    SPLITS,
    Checksums,
    VideoInfo,
    checksums,
)
from hpc_xvr.errors import InputError, explain
from hpc_xvr.files import check_regular, disk_errors
from hpc_xvr.text import parse_json

if TYPE_CHECKING:
    from hpc_xvr.data.corpus.stores import Store

_ATTRIBUTES = b',"attributes":'
_DTYPES = ("uint8", "uint16")
_ROW = np.dtype(
    [
        ("offset", "i8"),  # of the line in the file; -1: the line is in `_more`
        ("shape", "i4", 3),
        ("lr_shape", "i4", 3),  # zeros: none
        ("dtype", "u1"),
        ("split", "u1"),
        ("bits", "u1"),
        ("lr_bits", "u1"),
    ]
)
_BATCH = 1000  # lines
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
# Descriptions that stay in memory, however many a corpus has.
_DESCRIPTIONS = 512


class Manifest:
    """The videos of a corpus, sorted by id; about 130 bytes each. Made by `read` or `of`."""

    def __init__(
        self,
        path: Path,
        store: Store,
        ids: list[str],
        rows: Iterable[tuple[Any, ...]],
        more: dict[int, bytes],
        complete: bool,
    ) -> None:
        self.path, self.ids = path, ids
        self.complete = complete
        """The file says just what is there."""
        self.copies: Path | None = None
        """Folder with copies of clips that are nearer than the corpus."""
        self._suffix = store.suffix
        self._more = more
        self._table = np.fromiter(rows, _ROW, len(ids))
        self._infos: dict[int, VideoInfo] = {}

    @classmethod
    def read(cls, path: Path, store: Store) -> Manifest:
        """The manifest of the corpus at `path`.

        The folder decides which videos there are: lines of removed ones are dropped, those that a
        killed writer finished without a line are read from their own attributes.

        Raises:
            InputError: the manifest, or the attributes of a video without a line, cannot be read.
        """
        lines, whole = _rows(path / MANIFEST)
        ids = _clips(path / "videos", store)
        rows, more = [], {}
        for number, id in enumerate(ids):
            row = lines.get(id)
            if row is None:
                clip = path / "videos" / (id + store.suffix)
                found = {"id": id, **describe_clip(store, path, clip)}
                more[number] = line(found)
                row = -1, *_columns(found)
            rows.append(row)
        return cls(path, store, ids, rows, more, whole and not more and len(lines) == len(ids))

    @classmethod
    def of(cls, path: Path, store: Store, entry: dict[str, Any]) -> Manifest:
        """One video of the corpus at `path`, just written."""
        return cls(path, store, [entry["id"]], [(-1, *_columns(entry))], {0: line(entry)}, False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ids": "\n".join(self.ids), "_infos": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, ids=state["ids"].split("\n") if state["ids"] else [])

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, id: str) -> int | None:
        """Number of a video."""
        number = bisect_left(self.ids, id)
        return number if number < len(self.ids) and self.ids[number] == id else None

    def clip(self, id: str) -> Path:
        """Folder or file of a clip."""
        return self.path / "videos" / (id + self._suffix)

    def nearest(self, id: str) -> Path:
        """The clip's copy if there is one, else the clip."""
        if self.copies is not None and (copy := self.copies / (id + self._suffix)).exists():
            return copy
        return self.clip(id)

    def of_split(self, name: str) -> np.ndarray:
        """Numbers of the videos of a split."""
        return np.flatnonzero(self._table["split"] == SPLITS.index(name))

    def frame_counts(self) -> np.ndarray:
        """Frames of each video: (n,) int64."""
        return self._table["shape"][:, 0].astype(np.int64)

    def split(self, number: int) -> str:
        """train, validation or test."""
        return SPLITS[int(self._table["split"][number])]

    def shape(self, number: int) -> tuple[int, int, int]:
        """Frames, height, width."""
        return tuple(self._table["shape"][number].tolist())

    def lr_shape(self, number: int) -> tuple[int, int, int] | None:
        """The same of the low-resolution stream, if there is one."""
        shape = tuple(self._table["lr_shape"][number].tolist())
        return shape if shape[0] else None

    def stated(self, id: str, name: str) -> tuple[int, int, int] | None:
        """Shape of an array (`frames` or `lr`) of a video."""
        number = self.find(id)
        if number is None:
            return None
        return self.shape(number) if name == "frames" else self.lr_shape(number)

    def dtype(self, number: int) -> np.dtype:
        """As stored: uint8 or uint16."""
        return np.dtype(_DTYPES[self._table["dtype"][number]])

    def bits(self, number: int) -> tuple[int, int]:
        """Bit depths of `frames` and of `lr`."""
        row = self._table[number]
        return int(row["bits"]), int(row["lr_bits"])

    def info(self, number: int) -> VideoInfo:
        """All that is known about a video.

        Raises:
            InputError: its line is damaged, or the file was written anew since it was opened.
        """
        info = self._infos.get(number)
        if info is None:
            if len(self._infos) >= _DESCRIPTIONS:
                self._infos.clear()
            info = self._infos[number] = self._read_info(number)
        return info

    def _read_info(self, number: int) -> VideoInfo:
        entry = self._entry(number)
        try:
            return VideoInfo.model_validate(entry["attributes"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(number, error) from None

    def files(self, number: int) -> Checksums | None:
        """Checksums of the clip's files (see layout.checksums), where the manifest has them."""
        files: Checksums | None = self._entry(number).get("files")
        if files is not None and not isinstance(files, dict):
            raise self._damaged(number, TypeError("files is no mapping"))
        return files

    def _entry(self, number: int) -> dict[str, Any]:
        """A video's line."""
        try:
            text = self._more.get(number) or next(self._lines([number]))
            entry: dict[str, Any] = parse_json(text)
            if entry["id"] != self.ids[number]:
                raise ValueError(f"the line is that of {entry['id']}")
            return entry
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(number, error) from None

    def _damaged(self, number: int, error: Exception) -> InputError:
        return InputError(
            f"corpus {self.path}, video {self.ids[number]}: {MANIFEST} is damaged, or was written "
            f"anew meanwhile ({explain(error)}); start again, or delete it: it is rebuilt when the "
            "corpus is next written to"
        )

    def lines(self) -> Iterator[bytes]:
        """The lines of a manifest that says just what is there."""
        for number, text in enumerate(self._lines(range(len(self)))):
            if number not in self._more:
                yield text
            else:
                yield line({**parse_json(text), "files": checksums(self.clip(self.ids[number]))})

    def _lines(self, numbers: Iterable[int]) -> Iterator[bytes]:
        with contextlib.ExitStack() as stack:
            file = None
            for number in numbers:
                if number in self._more:
                    yield self._more[number]
                    continue
                file = file or stack.enter_context((self.path / MANIFEST).open("rb"))
                file.seek(int(self._table["offset"][number]))
                yield file.readline()


def line(entry: dict[str, Any]) -> bytes:
    """One video as a line of the manifest.

    `entry`: id, shape, dtype, lr_shape (or None), attributes (VideoInfo as plain values), and
    files, their checksums, where they are known.
    """
    attributes = entry["attributes"]
    head = {key: entry[key] for key in ("id", "shape", "dtype", "lr_shape")}
    head |= {key: attributes.get(key) for key in ("split", "bit_depth", "lr_bit_depth")}
    tail = {key: entry[key] for key in ("attributes", "files") if key in entry}
    text = json.dumps({**head, **tail}, separators=(",", ":"))
    return text.encode() + b"\n"


def _rows(path: Path) -> tuple[dict[str, tuple[Any, ...]], bool]:
    """Row of each line by id, and whether all lines were whole."""
    check_regular(path)
    rows: dict[str, tuple[Any, ...]] = {}
    offset, count = 0, 0
    try:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            while batch := list(islice(file, _BATCH)):
                offsets = list(accumulate(map(len, batch), initial=offset))
                offset = offsets.pop()
                count += len(batch)
                try:
                    rows.update(_parsed(batch, offsets))
                except _DAMAGE:  # in one of them
                    for text, at in zip(batch, offsets, strict=True):
                        with contextlib.suppress(*_DAMAGE):
                            rows.update(_parsed([text], [at]))
    except OSError as error:
        raise InputError(
            f"corpus {path.parent}: {MANIFEST} cannot be read ({error}); delete it, it is "
            "rebuilt when the corpus is next written to"
        ) from None
    return rows, count == len(rows)


def _parsed(texts: list[bytes], offsets: list[int]) -> dict[str, tuple[Any, ...]]:
    """Rows of some lines: parsing their first parts as one array is five times as fast."""
    heads = []
    for text in texts:
        head, _, _ = text.partition(_ATTRIBUTES)
        if not text.endswith(b"}}\n"):
            raise ValueError("torn")
        heads.append(head + b"}" if b'"split":' in head else text)
    entries = json.loads(b"[" + b",".join(heads) + b"]")
    return {entry["id"]: (at, *_columns(entry)) for entry, at in zip(entries, offsets, strict=True)}


def _columns(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Row of the table without the offset."""
    known = entry if "split" in entry else entry["attributes"]
    shape, lr_shape = tuple(entry["shape"]), tuple(entry["lr_shape"] or (0, 0, 0))
    bits = known["bit_depth"]
    lr_bits = known.get("lr_bit_depth") or bits
    if not all(type(number) is int for number in (*shape, *lr_shape, bits, lr_bits)):
        raise TypeError("sizes and bit depths must be integers")
    for frames, height, width in (shape, lr_shape):
        if not 0 <= frames < 2**31 or height * width > LARGEST_FRAME:
            raise ValueError(f"{frames} frames of {height} x {width} pixels are out of range")
    recorded = min(lr_shape) > 0 or lr_shape == (0, 0, 0)
    if not (min(shape) > 0 and recorded and 0 < bits <= 16 and 0 < lr_bits <= 16):
        raise ValueError("numbers out of range")
    return (
        shape,
        lr_shape,
        _DTYPES.index(entry["dtype"]),
        SPLITS.index(known["split"]),
        bits,
        lr_bits,
    )


def _clips(folder: Path, store: Store) -> list[str]:
    """Ids of the finished clips, sorted."""
    names: list[str] = []
    with (
        disk_errors(folder.parent, "read"),
        contextlib.suppress(FileNotFoundError),
        os.scandir(folder) as files,
    ):
        names = [f.name for f in files if f.is_dir() != bool(store.suffix)]
    return sorted(
        name.removesuffix(store.suffix)
        for name in names
        if ID.fullmatch(name) and name.endswith(store.suffix)
    )


def describe_clip(store: Store, corpus: Path, path: Path) -> dict[str, Any]:
    """Manifest entry (without id) of a stored clip.

    Raises:
        InputError: the clip's attributes cannot be read.
    """
    try:
        attributes, arrays = store.describe(path)
        known = {key: value for key, value in attributes.items() if key in VideoInfo.model_fields}
        info = VideoInfo.model_validate(known)
        shape, dtype = arrays["frames"]
        found = {
            "shape": list(shape),
            "dtype": dtype,
            "lr_shape": list(arrays["lr"][0]) if "lr" in arrays else None,
            "attributes": info.model_dump(mode="json"),
        }
        _columns(found)
    except (OSError, RuntimeError, *_DAMAGE) as error:
        reason = explain(error)
        raise InputError(
            f"corpus {corpus}, video {path.name}: its attributes cannot be read "
            f"({reason}); restore {path} or remove it"
        ) from None
    return found
