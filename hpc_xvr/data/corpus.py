"""A corpus: a folder of recordings that training and evaluation read crops from.

    corpus.json      format, schema version and store
    manifest.jsonl   one line a video, so that opening a corpus reads one file; can be rebuilt
    videos/ID        a Zarr v3 group (the corpus itself is one), or videos/ID.h5 and corpus.h5,
                     a master file that links to them: `videos/ID/frames` (T, H, W) in both,
                     `videos/ID/lr` (T_lr, h, w) where a second camera recorded too

A video is written beside (`.incoming/`) and renamed when complete, so the folder `videos` holds
finished ones only, whatever kills the writer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from hpc_xvr.data.layout import (
    FORMAT,
    HEADER,
    ID,
    LOCK,
    MANIFEST,
    SCHEMA,
    SCRATCH,
    VideoInfo,
    WriterLock,
    commit,
    describe_clip,
    disk_errors,
    explain,
    manifest_line,
    read_entries,
    read_header,
    remove,
)
from hpc_xvr.data.stores import STORES, Array, Clip, DamagedData, Store
from hpc_xvr.errors import InputError

__all__ = ["Corpus", "CorpusWriter", "Video", "VideoInfo"]

# An open HDF5 clip holds a file descriptor; the usual limit is 1024 of them.
_OPEN_ARRAYS = 256


class Video:
    """A handle on one recording; cheap, picklable; arrays are opened on the first read."""

    def __init__(
        self, corpus: Path, path: Path, id: str, entry: dict[str, Any], arrays: _OpenArrays
    ) -> None:
        self.id = id
        self.path = path
        self.info = VideoInfo.model_validate(entry["attributes"])
        self.shape: tuple[int, int, int] = tuple(entry["shape"])
        self.dtype = np.dtype(entry["dtype"])
        self.lr_shape: tuple[int, int, int] | None = (
            tuple(entry["lr_shape"]) if entry["lr_shape"] else None
        )
        self._corpus = corpus
        self._arrays = arrays

    def read(
        self, t: int | Sequence[int], y: slice = slice(None), x: slice = slice(None)
    ) -> np.ndarray:
        """Stored values of a crop: (h, w), or (n, h, w) for a sequence of n frame numbers.

        Raises:
            InputError: the data do not match their checksum or cannot be read.
        """
        return self._read("frames", self.shape, t, y, x)

    def read_lr(
        self, t: int | Sequence[int], y: slice = slice(None), x: slice = slice(None)
    ) -> np.ndarray:
        """The same for the low-resolution camera's frames."""
        if self.lr_shape is None:
            raise InputError(
                f"corpus {self._corpus}, video {self.id}: has no recorded "
                "low-resolution stream; set data.lr_source to binned"
            )
        return self._read("lr", self.lr_shape, t, y, x)

    def intensity(
        self, t: int | Sequence[int], y: slice = slice(None), x: slice = slice(None)
    ) -> np.ndarray:
        """Crop(s) as float32 in [0, 1]: stored value / (2**bit_depth - 1)."""
        return self.read(t, y, x) * np.float32(1 / (2**self.info.bit_depth - 1))

    def lr_intensity(
        self, t: int | Sequence[int], y: slice = slice(None), x: slice = slice(None)
    ) -> np.ndarray:
        """The same for the low-resolution camera's frames."""
        depth = self.info.lr_bit_depth or self.info.bit_depth
        return self.read_lr(t, y, x) * np.float32(1 / (2**depth - 1))

    def _read(
        self, name: str, shape: tuple[int, int, int], t: int | Sequence[int], y: slice, x: slice
    ) -> np.ndarray:
        frames = [t] if isinstance(t, (int, np.integer)) else list(t)
        if any(not 0 <= i < shape[0] for i in frames):
            raise IndexError(f"video {self.id}: {name} {frames} outside 0..{shape[0] - 1}")
        y, x = slice(*y.indices(shape[1])), slice(*x.indices(shape[2]))
        try:
            crops = self._arrays.get(self.path, name).read(frames, y, x)
        except DamagedData as error:
            raise InputError(
                f"corpus {self._corpus}, video {self.id}: {name} {frames} cannot be read: a chunk "
                f"does not match its checksum or is gone; restore {self.path} or remove it from "
                f"the corpus ({error})"
            ) from None
        return crops[0] if isinstance(t, (int, np.integer)) else crops


class _OpenArrays:
    """Arrays this process has open, the least recently used closed first.

    Never shared with another process: handles are dropped on pickling and after a fork.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._arrays: OrderedDict[tuple[Path, str], Array] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"_store": type(self._store)(), "_arrays": OrderedDict(), "_process": -1}

    def get(self, path: Path, name: str) -> Array:
        if self._process != os.getpid():
            self._arrays, self._process = OrderedDict(), os.getpid()
            self._store = type(self._store)()
        key = (path, name)
        if key in self._arrays:
            self._arrays.move_to_end(key)
        else:
            self._arrays[key] = self._store.open(path, name)
            if len(self._arrays) > _OPEN_ARRAYS:
                self._arrays.popitem(last=False)
        return self._arrays[key]


class Corpus:
    """A corpus opened for reading; `videos` is sorted by id.

    Raises:
        InputError: there is no corpus at `path`, or it has another schema version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.store = read_header(self.path)
        entries, _ = read_entries(self.path, STORES[self.store]())
        self.videos = _videos(self.path, self.store, entries)
        self._by_id = {video.id: video for video in self.videos}

    def __getitem__(self, id: str) -> Video:
        if id not in self._by_id:
            some = ", ".join(list(self._by_id)[:5]) or "none"
            raise InputError(
                f"corpus {self.path}: no video {id}; there are {len(self.videos)}: "
                f"{some}{', ...' if len(self.videos) > 5 else ''}"
            )
        return self._by_id[id]

    def __len__(self) -> int:
        return len(self.videos)

    def split(self, name: str) -> list[Video]:
        """Videos of one split: train, validation or test."""
        return [video for video in self.videos if video.info.split == name]

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Read everything and compare with the sha256 taken when it was written.

        Yields (video id, what is wrong or None), one video after the other.
        """
        for video in self.videos:
            yield video.id, self._problem(video)

    def _problem(self, video: Video) -> str | None:
        digest = hashlib.sha256()
        streams = [("frames", video.shape)] + ([("lr", video.lr_shape)] if video.lr_shape else [])
        arrays = _OpenArrays(STORES[self.store]())
        try:
            for name, shape in streams:
                array = arrays.get(video.path, name)
                if array.shape != shape:
                    return f"{name} is {array.shape}, the manifest says {shape}"
                for t in range(shape[0]):
                    digest.update(_bytes(array.read([t], slice(0, shape[1]), slice(0, shape[2]))))
            stored = describe_clip(STORES[self.store](), self.path, video.path)["attributes"]
        except (DamagedData, InputError) as error:
            return str(error)
        if digest.hexdigest() != video.info.sha256:
            return "the frames do not match the sha256 in the manifest"
        if VideoInfo.model_validate(stored) != video.info:
            return "the attributes stored with the frames differ from the manifest"
        return None


class CorpusWriter:
    """Creates a corpus or appends to it; one writer at a time. Use as a context manager.

    Raises:
        InputError: another writer holds the corpus, the folder holds something else, the corpus
            has another store or schema version, or the disk refuses (full, read-only).
    """

    def __init__(self, path: Path | str, store: Literal["zarr", "hdf5"] = "zarr") -> None:
        self.path = Path(path)
        self._known: dict[str, dict[str, Any]] = {}
        with disk_errors(self.path):
            self._made = not self.path.exists()
            if (
                not self._made
                and not (self.path / HEADER).exists()
                and (not self.path.is_dir() or any(p.name[0] != "." for p in self.path.iterdir()))
            ):
                raise InputError(
                    f"corpus {self.path}: holds something that is no corpus; choose a new folder"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = WriterLock(self.path / LOCK)
        try:
            with disk_errors(self.path):
                self._open(store)
        except BaseException:
            self.close()
            raise

    def _open(self, store: str) -> None:
        self._scratch = self.path / SCRATCH
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        if not (self.path / HEADER).exists():
            header = {"format": FORMAT, "schema": SCHEMA, "store": store}
            self._write(HEADER, json.dumps(header) + "\n")
        found = read_header(self.path)
        if found != store:
            raise InputError(
                f"corpus {self.path}: is stored as {found}, not {store}; write to a "
                f"new folder or ask for {found}"
            )
        self.store = found
        self._format = STORES[found]()
        (self.path / "videos").mkdir(exist_ok=True)
        self._known, complete = read_entries(self.path, self._format)
        if not complete:
            self._write(MANIFEST, "".join(map(manifest_line, self._known.values())))
        self._format.index(self.path, self._scratch, sorted(self._known))

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; a corpus that was created and got no video is removed again."""
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        if self._made and not self._known:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    def add(
        self,
        id: str,
        frames: Iterable[np.ndarray],
        shape: tuple[int, int, int],
        dtype: np.dtype | type | str,
        info: dict[str, Any],
        lr: np.ndarray | None = None,
    ) -> Video:
        """Write one recording: `frames` yields `shape[0]` arrays (H, W) of integers.

        Args:
            dtype: uint8 or uint16, as stored.
            info: VideoInfo's fields without sha256.
            lr: frames of the second camera (T_lr, h, w); info then has lr_times.

        Raises:
            InputError: a bad or existing id, wrong info, a frame of another size or with values
                that do not fit, too few or too many frames, a full disk. Nothing is left behind.
        """
        where = f"corpus {self.path}, video {id}"
        dtype = np.dtype(dtype)
        if not ID.fullmatch(id):
            raise InputError(
                f"{where}: an id is made of letters, digits, '_', '.' and '-', and "
                "starts with a letter or digit"
            )
        if id in self._known:
            raise InputError(f"{where}: is there already; choose another id")
        self._check(where, shape, dtype, info, lr)
        final = self.path / "videos" / (id + self._format.suffix)
        temporary = self._scratch / final.name
        with disk_errors(self.path), contextlib.ExitStack() as undo:
            undo.callback(remove, temporary)
            clip = self._format.create(temporary)
            undo.callback(_quietly, clip.abort)
            digest = hashlib.sha256()
            _fill(where, clip, digest, "frames", frames, shape, dtype, info["bit_depth"])
            if lr is not None:
                depth = info.get("lr_bit_depth") or info["bit_depth"]
                _fill(where, clip, digest, "lr", lr, lr.shape, lr.dtype, depth)
            full = VideoInfo(sha256=digest.hexdigest(), **info)
            clip.finish({"schema": SCHEMA, **full.model_dump(mode="json")})
            commit(temporary, final)
            undo.pop_all()
        entry = {
            "id": id,
            "shape": list(shape),
            "dtype": dtype.name,
            "lr_shape": None if lr is None else list(lr.shape),
            "attributes": full.model_dump(mode="json"),
        }
        self._known[id] = entry
        with disk_errors(self.path):
            self._format.index(self.path, self._scratch, sorted(self._known))
            with (self.path / MANIFEST).open("a") as file:
                file.write(manifest_line(entry))
                file.flush()
                os.fsync(file.fileno())
        return _videos(self.path, self.store, {id: entry})[0]

    @staticmethod
    def _check(
        where: str,
        shape: tuple[int, int, int],
        dtype: np.dtype,
        info: dict[str, Any],
        lr: np.ndarray | None,
    ) -> None:
        for name, kind in [("frames", dtype)] + ([("lr", lr.dtype)] if lr is not None else []):
            if kind.name not in ("uint8", "uint16"):
                raise InputError(f"{where}: {name} are {kind}; uint8 and uint16 can be stored")
        for size in [shape] + ([lr.shape] if lr is not None else []):
            if len(size) != 3 or min(size) < 1:
                raise InputError(f"{where}: shape {size} is not (frames, height, width)")
        try:
            checked = VideoInfo(sha256="", **info)
        except (ValidationError, TypeError) as error:
            raise InputError(f"{where}: {explain(error)}") from None
        for name, depth, kind in [
            ("bit_depth", checked.bit_depth, dtype),
            ("lr_bit_depth", checked.lr_bit_depth or 1, np.dtype("u2") if lr is None else lr.dtype),
        ]:
            if not 1 <= depth <= 8 * kind.itemsize:
                raise InputError(
                    f"{where}: {name} {depth} does not fit {kind}, which holds 1 to "
                    f"{8 * kind.itemsize} bits"
                )
        if (0 if lr is None else len(lr)) != len(checked.lr_times or []):
            raise InputError(
                f"{where}: {0 if lr is None else len(lr)} low-resolution frames, but "
                f"{len(checked.lr_times or [])} lr_times; give one time for each"
            )

    def _write(self, name: str, text: str) -> None:
        (self._scratch / name).write_text(text)
        commit(self._scratch / name, self.path / name)


def _fill(
    where: str,
    clip: Clip,
    digest: Any,
    name: str,
    frames: Iterable[np.ndarray],
    shape: tuple[int, int, int],
    dtype: np.dtype,
    bit_depth: int,
) -> None:
    clip.start(name, shape, dtype)
    count = 0
    for count, frame in enumerate(_readable(where, name, frames), 1):
        here = f"{where}: {name} {count - 1}"
        if count > shape[0]:
            raise InputError(f"{where}: more {name} than the {shape[0]} that were announced")
        if frame.shape != tuple(shape[1:]):
            raise InputError(f"{here} is {frame.shape}, the video is {tuple(shape[1:])}")
        if frame.dtype.kind == "f" and not np.isfinite(frame).all():
            raise InputError(f"{here} has NaN or infinite values; mend or leave out that frame")
        if frame.dtype.kind not in "ui":
            raise InputError(
                f"{here} is {frame.dtype}; scale it to 0..{2**bit_depth - 1} and "
                f"convert it to {dtype}"
            )
        if frame.min() < 0 or frame.max() >= 2**bit_depth:
            raise InputError(
                f"{here} holds values {frame.min()}..{frame.max()}, a bit depth of "
                f"{bit_depth} allows 0..{2**bit_depth - 1}"
            )
        frame = np.ascontiguousarray(frame, dtype)
        digest.update(_bytes(frame))
        clip.append(frame)
    if count < shape[0]:
        raise InputError(f"{where}: {count} {name} came, {shape[0]} were announced")


def _readable(where: str, name: str, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    try:
        yield from frames
    except OSError as error:
        raise InputError(f"{where}: {name} cannot be read from their source ({error})") from None


def _bytes(frame: np.ndarray) -> memoryview:
    return np.ascontiguousarray(frame, frame.dtype.newbyteorder("<")).data


def _videos(root: Path, store: str, entries: dict[str, dict[str, Any]]) -> list[Video]:
    arrays = _OpenArrays(STORES[store]())
    suffix = STORES[store].suffix
    try:
        return [
            Video(root, root / "videos" / (id + suffix), id, entries[id], arrays)
            for id in sorted(entries)
        ]
    except (ValidationError, KeyError, TypeError) as error:
        raise InputError(
            f"corpus {root}: {MANIFEST} is damaged ({explain(error)}); delete it, "
            "it is rebuilt when the corpus is next written to"
        ) from None


def _quietly(action: Any) -> None:
    with contextlib.suppress(Exception):
        action()
