"""Writing a corpus: clips from any process, made part of it by one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from pydantic import ValidationError

from hpc_xvr.data.corpus.layout import (
    FORMAT,
    HEADER,
    ID,
    LOCK,
    MANIFEST,
    SCHEMA,
    SCRATCH,
    SPLITS,
    Split,
    VideoInfo,
    checksum,
    checksums,
    frame_bytes,
    read_header,
)
from hpc_xvr.data.corpus.lock import WriterLock
from hpc_xvr.data.corpus.manifest import Manifest, line
from hpc_xvr.data.corpus.reader import OpenArrays, Video
from hpc_xvr.data.corpus.stores import STORES, Clip, Store
from hpc_xvr.errors import InputError, explain
from hpc_xvr.files import commit, disk_errors, place, remove, sync
from hpc_xvr.text import parse_json


class CorpusWriter:
    """Creates a corpus or appends to it; one writer at a time. Use as a context manager.

    Clips come from `add`, or from other processes that call `write_clip` and send this one the
    entries to `commit`.

    `store`: None for that of a corpus which is there already.

    Raises:
        InputError: another writer holds the corpus, the folder holds something else, the corpus
            has another store or schema version, or the disk refuses (full, read-only).
    """

    def __init__(self, path: Path | str, store: Literal["zarr", "hdf5"] | None = "zarr") -> None:
        self.path = Path(path)
        store = store or cast(Literal["zarr", "hdf5"], read_header(self.path))
        self._known: set[str] = set()
        self._format: Store = STORES[store]()
        with disk_errors(self.path):
            self._made = not self.path.exists()
            if (
                not self._made
                and not (self.path / HEADER).exists()
                and (not self.path.is_dir() or any(p.name[0] != "." for p in self.path.iterdir()))
            ):
                raise InputError(
                    f"corpus {self.path}: holds something other than a corpus; choose a new folder"
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
            self._write(HEADER, json.dumps(header).encode() + b"\n")
        self.store = read_header(self.path)
        if self.store != store:
            raise InputError(
                f"corpus {self.path}: is stored as {self.store}, not {store}; write to a "
                f"new folder or ask for {self.store}"
            )
        (self.path / "videos").mkdir(exist_ok=True)
        manifest = Manifest.read(self.path, self._format)
        if not manifest.complete:
            self._write(MANIFEST, b"".join(manifest.lines()))
        self._known = set(manifest.ids)
        self._format.index(self.path, self._scratch, manifest.ids)

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; a corpus that was created and got no video is removed again."""
        try:
            if self._known:
                with disk_errors(self.path):
                    self._format.index(self.path, self._scratch, sorted(self._known))
        finally:
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
        """Write one recording; arguments and errors are those of `write_clip`.

        Raises:
            InputError: the corpus has a video of this id; no split.
        """
        self._new(id)
        if "split" not in info:
            raise InputError(f"corpus {self.path}, video {id}: split: one of {', '.join(SPLITS)}")
        return self.commit(write_clip(self.path, self.store, id, frames, shape, dtype, info, lr=lr))

    def commit(
        self, entry: dict[str, Any], id: str | None = None, split: Split | None = None
    ) -> Video:
        """Make a clip that `write_clip` finished part of the corpus.

        Args:
            entry: what `write_clip` returned.
            id: instead of the one it was written with.
            split: of a clip that was written without one, and only of such a clip.

        Raises:
            InputError: the corpus has a video of this id; the disk refuses.
        """
        id = id or entry["id"]
        if ("split" in entry["attributes"]) == (split is not None):
            raise ValueError(f"video {id}: a split is decided once, before or at the commit")
        self._new(id)
        with disk_errors(self.path):
            entry = entry if split is None else self._with_split(entry, split)
            entry = {**entry, "id": id}
            place(self._scratch / entry["file"], self.path / "videos" / (id + self._format.suffix))
            self._known.add(id)
            self._append(entry)
        return Video(Manifest.of(self.path, self._format, entry), 0, OpenArrays(self._format))

    def _with_split(self, entry: dict[str, Any], split: Split) -> dict[str, Any]:
        """The entry of a clip whose split was open, after it was added to the clip's attributes."""
        clip, name = self._scratch / entry["file"], self._format.attributes_file
        attributes = VideoInfo(**entry["attributes"], split=split).model_dump(mode="json")
        self._format.complete(clip, {"schema": SCHEMA, **attributes})
        sync(clip / name)
        files = {**entry["files"], name: checksum(clip / name)}
        return {**entry, "attributes": attributes, "files": files}

    def move(self, ids: Sequence[str], split: Split) -> None:
        """Give recordings another split.

        Raises:
            InputError: there is no such recording, or it is damaged; the disk refuses.
        """
        with disk_errors(self.path):
            for entry in self._entries(ids):
                self._check_attributes(entry)
            waiting = self._taken_out(ids)
            try:
                while waiting:
                    self._append(self._with_attributes(waiting.pop(), split))
            finally:  # what was not reached keeps the checksums of when it was written
                for entry in waiting:
                    self._append(entry)

    def rename(self, id: str, new: str) -> None:
        """Give a recording another id.

        Raises:
            InputError: there is no such recording; the new id is in use or not allowed; the disk
                refuses.
        """
        check_id(f"corpus {self.path}, video {new}", new)
        self._new(new)
        with disk_errors(self.path):
            (entry,) = self._taken_out([id])
            place(self._clip(id), self._clip(new))
            self._append({**entry, "id": new})
            self._known = self._known - {id} | {new}

    def remove(self, ids: Sequence[str]) -> None:
        """Delete recordings.

        Raises:
            InputError: there is no such recording; the disk refuses.
        """
        with disk_errors(self.path):
            for entry in self._taken_out(ids):
                clip = self._clip(entry["id"])
                place(clip, self._scratch / clip.name)  # at once; deleting takes its time
                self._known.discard(entry["id"])
                remove(self._scratch / clip.name)

    def _clip(self, id: str) -> Path:
        return self.path / "videos" / (id + self._format.suffix)

    def _taken_out(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """The manifest's entries of recordings, whose lines are removed from it.

        Without a line a recording speaks for itself, so whatever is then done to its clip in one
        step leaves a corpus that is whole, even if this process is killed before it adds the line
        again.
        """
        taken = self._entries(ids)
        manifest = Manifest.read(self.path, self._format)
        lines = zip(manifest.ids, manifest.lines(), strict=True)
        self._write(MANIFEST, b"".join(text for id, text in lines if id not in ids))
        return taken

    def _entries(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """The manifest's entries of recordings, each once.

        Raises:
            InputError: there is no such recording.
        """
        manifest = Manifest.read(self.path, self._format)
        for id in ids:
            if manifest.find(id) is None:
                raise InputError(
                    f"corpus {self.path}: no video {id}; `hpc-xvr inspect {self.path} --all` lists "
                    "those there are"
                )
        lines = zip(manifest.ids, manifest.lines(), strict=True)
        return [parse_json(text) for id, text in lines if id in ids]

    def _check_attributes(self, entry: dict[str, Any]) -> None:
        """Refuse to give new checksums to a file that is not the one that was written."""
        name, clip = self._format.attributes_file, self._clip(entry["id"])
        known = entry["files"].get(name)
        if known != checksum(clip / name, known):
            raise InputError(
                f"corpus {self.path}, video {entry['id']}: {clip / name} is not the file that was "
                "written; remove the recording and ingest it again from the camera files"
            )

    def _append(self, entry: dict[str, Any]) -> None:
        with (self.path / MANIFEST).open("ab") as file:
            file.write(line(entry))
            file.flush()
            os.fsync(file.fileno())

    def _with_attributes(self, entry: dict[str, Any], split: Split) -> dict[str, Any]:
        """The entry of a clip in the corpus, after its attributes were exchanged in one step."""
        name, clip = self._format.attributes_file, self._clip(entry["id"])
        beside = self._scratch / f"{uuid.uuid4().hex}{self._format.suffix}"
        if clip.is_dir():
            beside.mkdir()
        shutil.copy2(clip / name, beside / name)
        info = VideoInfo.model_validate({**entry["attributes"], "split": split})
        attributes = info.model_dump(mode="json")
        self._format.complete(beside, {"schema": SCHEMA, **attributes})
        files = {**entry["files"], name: checksum(beside / name)}
        commit(beside / name, clip / name)
        remove(beside)
        return {**entry, "attributes": attributes, "files": files}

    def discard(self, entry: dict[str, Any]) -> None:
        """Delete a clip that `write_clip` finished and that is not wanted."""
        remove(self._scratch / entry["file"])

    def _new(self, id: str) -> None:
        if id in self._known:
            raise InputError(f"corpus {self.path}, video {id}: is there already; choose another id")

    def _write(self, name: str, text: bytes) -> None:
        (self._scratch / name).write_bytes(text)
        commit(self._scratch / name, self.path / name)


def write_clip(
    corpus: Path | str,
    store: str,
    id: str,
    frames: Iterable[np.ndarray],
    shape: tuple[int, int, int],
    dtype: np.dtype | type | str,
    info: dict[str, Any],
    lr: np.ndarray | None = None,
) -> dict[str, Any]:
    """Write one recording beside the corpus that a CorpusWriter holds, from any process.

    It is on the disk, but becomes part of the corpus only when the writer commits the entry
    that is returned: plain values, small; what `manifest.line` says, and the clip's `file`.

    Args:
        frames: yields `shape[0]` arrays (H, W) of integers.
        dtype: uint8 or uint16, as stored.
        info: VideoInfo's fields without sha256. `split` may be missing: the commit adds it.
        lr: frames of the second camera (T_lr, h, w); info then has lr_times.

    Raises:
        InputError: a bad id, wrong info, a frame of another size or with values that do not fit,
            too few or too many frames, a full disk. Nothing is left behind.
    """
    corpus, dtype, form = Path(corpus), np.dtype(dtype), STORES[store]()
    where = f"corpus {corpus}, video {id}"
    check_id(where, id)
    _check(where, shape, dtype, info, lr)
    # A name of its own: the id may change until the commit, and a killed process may still write.
    temporary = corpus / SCRATCH / (uuid.uuid4().hex + form.suffix)
    with disk_errors(corpus), contextlib.ExitStack() as undo:
        undo.callback(remove, temporary)
        clip = form.create(temporary)
        undo.callback(_quietly, clip.abort)
        digest = hashlib.sha256()
        _fill(where, clip, digest, "frames", frames, shape, dtype, info["bit_depth"])
        if lr is not None:
            depth = info.get("lr_bit_depth") or info["bit_depth"]
            _fill(where, clip, digest, "lr", lr, lr.shape, lr.dtype, depth)
        attributes = _info(sha256=digest.hexdigest(), **info).model_dump(mode="json")
        if "split" not in info:
            del attributes["split"]
        clip.finish({"schema": SCHEMA, **attributes})
        sync(temporary)
        sums = checksums(temporary, without=None if "split" in info else form.attributes_file)
        undo.pop_all()
    return {
        "id": id,
        "file": temporary.name,
        "shape": list(shape),
        "dtype": dtype.name,
        "lr_shape": None if lr is None else list(lr.shape),
        "attributes": attributes,
        "files": sums,
    }


def check_id(where: str, id: str) -> None:
    """Raise InputError for what cannot be the id of a recording."""
    if not ID.fullmatch(id):
        raise InputError(
            f"{where}: an id is made of letters, digits, '_', '.' and '-', and "
            "starts with a letter or digit"
        )


def _info(**fields: Any) -> VideoInfo:
    """The fields, checked; where the split is still open it is the first one."""
    return VideoInfo(**{"split": SPLITS[0], **fields})


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
        checked = _info(sha256="", **info)
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
        digest.update(frame_bytes(frame))
        clip.append(frame)
    if count < shape[0]:
        raise InputError(f"{where}: {count} {name} came, {shape[0]} were announced")


def _readable(where: str, name: str, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    try:
        yield from frames
    except OSError as error:
        raise InputError(f"{where}: {name} cannot be read from their source ({error})") from None


def _quietly(action: Any) -> None:
    with contextlib.suppress(Exception):
        action()
