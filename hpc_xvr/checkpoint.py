"""Checkpoints: written atomically in the background, checked by checksum, resumed from the newest
valid one.

A checkpoint is an ordinary torch file (`torch.load(path, weights_only=True)` reads it) whose ZIP
comment holds the SHA-256 of everything before the comment's length field. Plain dicts of tensors,
numbers and strings go in and come out; their meaning is up to the caller.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import struct
import threading
import time
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from hpc_xvr.errors import InputError, PassingError, explain_os_error
from hpc_xvr.files import check_regular, write_atomic
from hpc_xvr.log import logger

_MARK = b"hpc_xvr sha256 "
_COMMENT = len(_MARK) + 64
_LONG = 2.0  # seconds of waiting for the disk that are worth a warning
_ZIP_END = 22  # bytes of the record that ends a ZIP file, its comment's length the last two
_NAME = re.compile(r"step-(\d{9})\.pt")


class CorruptCheckpoint(InputError):
    """The file is truncated, altered, or not a checkpoint of this program."""


def path_of(folder: Path, step: int) -> Path:
    """File of the checkpoint of a step."""
    return folder / f"step-{step:09d}.pt"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of all checkpoints of a folder, newest first; valid or not."""
    found = [(m, p) for p in folder.glob("step-*.pt") if (m := _NAME.fullmatch(p.name))]
    return sorted(((int(m[1]), p) for m, p in found), reverse=True)


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` beside `path`, sync it to disk, rename it into place.

    Raises:
        InputError: the disk is full or not writable; checkpoints written before stay as they are.
    """

    def write(file: Any) -> None:
        hashed = _Hashing(file)
        torch.save(state, cast("IO[bytes]", hashed))  # torch calls write and flush only
        hashed.end()

    write_atomic(path, write)


class _Hashing:
    """A file that computes its checksum while it is written, so that nothing is held twice.

    Errors of the disk are raised by `end`: raised during the write, torch would replace them by
    obscure ones of its own.
    """

    def __init__(self, file: Any) -> None:
        self._file, self._hash, self._tail = file, hashlib.sha256(), b""
        self._problem: OSError | None = None

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        if len(data) < _ZIP_END:
            joined = self._tail + bytes(data)
            self._emit(joined[:-_ZIP_END])
            self._tail = joined[-_ZIP_END:]
        else:
            self._emit(self._tail)
            self._emit(data[:-_ZIP_END])
            self._tail = bytes(data[-_ZIP_END:])
        return len(data)

    def flush(self) -> None:
        """Nothing to do: the end is written by `end`."""

    def end(self) -> None:
        assert self._tail[:4] == b"PK\5\6", "torch no longer ends its files with a ZIP record"
        self._emit(self._tail[:-2])
        comment = _MARK + self._hash.hexdigest().encode()
        self._emit(struct.pack("<H", len(comment)) + comment)
        if self._problem:
            raise self._problem

    def _emit(self, data: Any) -> None:
        if self._problem:
            return
        self._hash.update(data)
        try:
            self._file.write(data)
        except OSError as problem:
            self._problem = problem


class CheckpointWriter:
    """Writes the checkpoints of a folder in the background while the run goes on.

    One at a time: a save waits for the one before. A write that fails is a warning, as the older
    checkpoints are intact; it is an error after `failures` in a row, and for the last checkpoint.

    Args:
        keep: how many of the newest checkpoints are kept.
        keep_every: checkpoints of steps that are multiples of this are never deleted.
        failures: writes in a row that may fail before `save` raises.
    """

    def __init__(
        self, folder: Path, keep: int = 3, keep_every: int | None = None, failures: int = 3
    ) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._limit, self._failures = failures, 0
        self._spare: dict[tuple[Any, ...], Tensor] = {}  # buffers of the copies, reused
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None
        self.written = 0  # checkpoints on disk
        self.slowest = 0.0  # seconds from asking for a checkpoint to its being on disk
        self.blocked = 0.0  # seconds that the run has waited for copies and for the disk

    def save(self, state: dict[str, Any], spared: Collection[int] = ()) -> None:
        """Copy `state` and write it as the checkpoint of state["step"]; then prune the folder.

        The tensors may change as soon as this returns. The steps in `spared` are not pruned.

        Raises:
            InputError: too many writes in a row have failed.
        """
        start = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - start
        if waited > _LONG:
            logger.warning(
                "waited %.0f s for the checkpoint before that of step %d: the disk is slow, or "
                "checkpoint.every is too small",
                waited,
                state["step"],
            )
        self.check()
        copy = _copy(state, (), self._spare)
        arrived = None
        if torch.cuda.is_initialized():  # copies from a GPU may not have arrived yet
            arrived = torch.cuda.Event()
            arrived.record()
        self._thread = threading.Thread(
            target=self._write, args=(copy, set(spared), arrived, start), daemon=True
        )
        self._thread.start()
        self.blocked += time.perf_counter() - start

    def check(self) -> None:
        """Raise the error of the last write if the run should not go on."""
        problem = self._problem
        if problem is None or (isinstance(problem, InputError) and self._failures < self._limit):
            return
        if isinstance(problem, InputError) and self._failures > 1:
            text = f"{problem} ({self._failures} checkpoints in a row failed)"
            problem = PassingError(text) if isinstance(problem, PassingError) else InputError(text)
        raise problem

    def finish(self) -> None:
        """Wait until the last checkpoint of the run is on disk.

        Raises:
            InputError: it could not be written.
        """
        start = time.perf_counter()
        self.wait()
        self.blocked += time.perf_counter() - start
        if self._problem:
            raise self._problem

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the write under way, at most `timeout` seconds; `check` raises its error."""
        if self._thread:
            self._thread.join(timeout)
            if not self._thread.is_alive():
                self._thread = None

    def _write(self, state: dict[str, Any], spared: set[int], arrived: Any, start: float) -> None:
        step = state["step"]
        try:
            if arrived:
                arrived.synchronize()
            save(state, path_of(self._folder, step))
            self._problem, self._failures = None, 0
            self.written += 1
            self.slowest = max(self.slowest, time.perf_counter() - start)
        except BaseException as problem:  # raised in the training thread, by `check`
            self._problem = problem
            self._failures += 1
            if isinstance(problem, InputError) and self._failures < self._limit:
                newest = next((s for s, _ in list_checkpoints(self._folder)), None)
                logger.warning(
                    "%s; training goes on, %s (failure %d, checkpoint.failures is %d)",
                    problem,
                    f"the checkpoint of step {newest} is intact" if newest else "there is none yet",
                    self._failures,
                    self._limit,
                )
            return
        try:
            prune(self._folder, self._keep, step, self._keep_every, spared)
        except OSError as error:
            logger.warning("cannot delete old checkpoints: %s", explain_os_error(error))


def _copy(value: Any, key: tuple[Any, ...], spare: dict[tuple[Any, ...], Tensor]) -> Any:
    """Copy a tree of dicts and lists; tensors go to the CPU, into those of `spare` that fit."""
    if isinstance(value, dict):
        return {k: _copy(v, (*key, k), spare) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(v, (*key, i), spare) for i, v in enumerate(value))
    if not isinstance(value, Tensor):
        return value
    kept = spare.get(key)
    if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
        kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        spare[key] = kept
    return kept.copy_(value.detach(), non_blocking=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint and verify its checksum; tensors are loaded to the CPU.

    Raises:
        CorruptCheckpoint: the file is incomplete, altered or not written by `save`.
    """
    try:
        data = _read(path)
    except OSError as error:
        raise CorruptCheckpoint(f"checkpoint {path}: cannot be read ({error.strerror})") from None
    body, comment = data[: -_COMMENT - 2], data[-_COMMENT:]
    if hashlib.sha256(body).hexdigest().encode() != comment[len(_MARK) :]:
        raise CorruptCheckpoint(f"checkpoint {path}: contents do not match their checksum")
    # The checksum is right, but that does not mean that we have written this file.
    state = _tensors(f"checkpoint {path}", io.BytesIO(data), len(data))
    if not isinstance(state, dict):
        raise CorruptCheckpoint(f"checkpoint {path}: not written by hpc_xvr")
    return state


def read_tensors(path: Path) -> Any:
    """What any torch file holds, from whomever it may be: tensors on the CPU, numbers and text.

    Raises:
        CorruptCheckpoint: it is not one, holds code, or states more than is in it.
    """
    check_regular(path)
    try:
        with _Bounded(io.FileIO(path)) as file:
            return _tensors(f"weights {path}", file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        raise CorruptCheckpoint(f"weights {path}: no such file") from None
    except OSError as error:
        raise CorruptCheckpoint(f"weights {path}: cannot be read ({error.strerror})") from None


class _Bounded(io.BufferedReader):
    """A file of which nobody takes memory to read more than it has, as a pickle may ask for."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else max(0, min(size, left)))


def _tensors(where: str, file: IO[bytes], size: int) -> Any:
    """Contents of a torch file of `size` bytes; its tensors' sizes are believed only if they are in
    the file, which is seen before any of them is read."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as packed:
                records = packed.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError("its records are compressed, which torch never does")
            _fits(sum(record.file_size for record in records), size)
        file.seek(0)
        shapes = torch.load(file, map_location="meta", weights_only=True)
        _fits(_stated_bytes(shapes), size)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch meets in a file that is not one of its own
        raise CorruptCheckpoint(f"{where}: not readable as tensors ({_reason(error)})") from None


def _fits(stated: int, size: int) -> None:
    if stated > size:
        raise ValueError(f"states {stated:,} bytes of tensors, but has {size:,}")


def _stated_bytes(tree: Any) -> int:
    """Bytes of all tensors in a tree of dicts and lists, each counted once."""
    total, seen, left = 0, set(), [tree]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            key: Any = value.untyped_storage()._cdata, value.storage_offset(), value.shape
        else:
            key = id(value)
        if key in seen:
            continue
        seen.add(key)
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, (list, tuple, set)):
            left += value
    return total


def _reason(error: Exception) -> str:
    """In one line, and without torch's advice to let the file run its code."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return (
            "it is damaged, or holds objects of a program, which may bring code along; save the "
            "model's state_dict(), tensors and names only"
        )
    return line


def _read(path: Path) -> bytes:
    """The whole file, after a look at its end: it might be any file, of any size."""
    try:
        check_regular(path)
    except InputError as problem:
        raise CorruptCheckpoint(f"checkpoint {problem}") from None
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _COMMENT))
        if not file.read(_COMMENT).startswith(_MARK):
            raise CorruptCheckpoint(f"checkpoint {path}: truncated, or not written by hpc_xvr")
        file.seek(0)
        return file.read()


def newest_valid(
    folder: Path, needs: Collection[str] = ()
) -> Iterator[tuple[Path, dict[str, Any] | CorruptCheckpoint]]:
    """Find the newest valid checkpoint.

    A valid one is of the step that its name says and has a dict under each of `needs`.

    Yields:
        (path, problem) for each invalid checkpoint that is newer, newest first, then (path, state)
        of the valid one, if there is one.
    """
    for step, path in list_checkpoints(folder):
        try:
            state = load(path)
            if state.get("step") != step:
                raise CorruptCheckpoint(f"checkpoint {path}: is of step {state.get('step')}")
            missing = [name for name in needs if not isinstance(state.get(name), dict)]
            if missing:
                raise CorruptCheckpoint(f"checkpoint {path}: lacks {', '.join(missing)}")
            yield path, state
            return
        except CorruptCheckpoint as problem:
            yield path, problem


def prune(
    folder: Path,
    keep: int,
    newest: int,
    keep_every: int | None = None,
    spared: Collection[int] = (),
) -> None:
    """Delete all but the last `keep` checkpoints up to step `newest`, the one just written.

    Multiples of `keep_every` and the steps in `spared` stay too. Checkpoints after `newest` are
    deleted: they are damaged, since the run resumed from an older one. A stray folder of such a
    name is none of ours, and stays.
    """
    found = [(step, path) for step, path in list_checkpoints(folder) if not path.is_dir()]
    doomed = [path for step, path in found if step > newest]
    for step, path in [entry for entry in found if entry[0] <= newest][keep:]:
        if step not in spared and (not keep_every or step % keep_every):
            doomed.append(path)
    for path in doomed:
        path.unlink(missing_ok=True)
