"""Checkpoints that are whole or not there: atomic write, checksum, newest valid first.

A checkpoint is an ordinary torch file (`torch.load(path, weights_only=True)` reads it) whose ZIP
comment holds the SHA-256 of everything before the comment's length field. Plain dicts of tensors,
numbers and strings go in and come out; what they mean is the caller's affair.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hpc_xvr.errors import InputError, explain_os_error

_MARK = b"hpc_xvr sha256 "
_COMMENT = len(_MARK) + 64
_NAME = re.compile(r"step-(\d{9})\.pt")


class CorruptCheckpoint(InputError):
    """The file is truncated, altered, or no checkpoint of this program."""


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
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = memoryview(buffer.getbuffer())
    assert bytes(data[-22:-18]) == b"PK\5\6", "torch no longer ends its files with a ZIP record"
    body = data[:-2]
    comment = _MARK + hashlib.sha256(body).hexdigest().encode()
    write_atomic(
        path,
        lambda file: (
            file.write(body),
            file.write(struct.pack("<H", len(comment))),
            file.write(comment),
        ),
    )


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint after checking its checksum; tensors come on the CPU.

    Raises:
        CorruptCheckpoint: not whole, or not written by `save`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptCheckpoint(f"checkpoint {path}: cannot be read ({error.strerror})") from None
    body, comment = data[: -_COMMENT - 2], data[-_COMMENT:]
    if not comment.startswith(_MARK):
        raise CorruptCheckpoint(f"checkpoint {path}: truncated, or not written by hpc_xvr")
    if hashlib.sha256(body).hexdigest().encode() != comment[len(_MARK) :]:
        raise CorruptCheckpoint(f"checkpoint {path}: contents do not match their checksum")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a checksum that fits a file we did not write
        line = str(error).splitlines()[0]
        raise CorruptCheckpoint(f"checkpoint {path}: not readable as tensors ({line})") from None


def newest_valid(folder: Path) -> Iterator[tuple[Path, dict[str, Any] | CorruptCheckpoint]]:
    """Go through the checkpoints, newest first: a problem for each invalid one, then the state.

    Ends with the first valid one; yields nothing more where there is none.
    """
    for _, path in list_checkpoints(folder):
        try:
            yield path, load(path)
            return
        except CorruptCheckpoint as problem:
            yield path, problem


def prune(folder: Path, keep: int, newest: int) -> None:
    """Delete all but the last `keep` checkpoints up to step `newest`, the one just written.

    Later ones are damaged: they were passed over when the run resumed.
    """
    found = list_checkpoints(folder)
    doomed = [path for step, path in found if step > newest]
    doomed += [path for step, path in found if step <= newest][keep:]
    for path in doomed:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed `write_atomic` left behind."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def write_atomic(path: Path, write: Callable[[Any], Any]) -> None:
    """Call `write(binary file)` on a file beside `path`, sync and rename it over `path`.

    Raises:
        InputError: the disk is full, over quota, read-only or not permitted; `path` is as before.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise InputError(f"cannot write {path}: {explain_os_error(error)}") from None
