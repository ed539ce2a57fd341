"""Write files that appear complete or not at all: under a temporary name, synced, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hpc_xvr.errors import InputError, explain_os_error

_PARTIAL = ".partial"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; the file written there becomes `path` at the end.

    It keeps the suffix of `path`, by which libraries choose a format. After an exception
    nothing is left behind and `path` is as before.

    Raises:
        InputError: the folder is missing, or the disk is full, over quota or read-only.
    """
    check_folder(path)
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{_PARTIAL}{path.suffix}")
    try:
        yield beside
        commit(beside, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {explain_os_error(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_atomic(path: Path, write: Callable[[Any], Any]) -> None:
    """Call `write(binary file)` on a file that becomes `path` when it is complete.

    Missing folders are created.

    Raises:
        InputError: as `replacing`; `path` is as before.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {explain_os_error(error)}") from None
    with replacing(path) as beside, beside.open("xb") as file:
        write(file)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed calls of `replacing` and `write_atomic` left behind."""
    for path in folder.glob(f".*{_PARTIAL}*"):
        path.unlink(missing_ok=True)


def check_folder(path: Path) -> None:
    """Raise InputError if a file cannot be `path`: its folder is missing or closed to us, or `path`
    is a folder itself."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; create it first")
    check_new_file(path)


def check_new_file(path: Path) -> None:
    """The same for a file whose missing folders are made when it is written."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")
    _check_open(path, path.absolute().parent)


def check_new_folder(path: Path) -> None:
    """Raise InputError if there cannot be a folder `path` that we may write to."""
    _check_open(path, path.absolute())


def _check_open(path: Path, folder: Path) -> None:
    """Is `folder`, or what is there of it, a folder that we may write to?"""
    while not (folder.exists() or folder.is_symlink()):
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: {folder} is a file; choose another folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: no right to write to {folder}; choose another one")


def commit(temporary: Path, final: Path) -> None:
    """Move a finished file or folder to its place so that it survives a crash right after."""
    sync(temporary)
    place(temporary, final)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with everything in it, is on the disk."""
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            _fsync(Path(folder) / name)
    _fsync(path)


def place(temporary: Path, final: Path) -> None:
    """Rename a file or folder that has been synced, and sync the rename."""
    temporary.replace(final)
    _fsync(final.parent)


def remove(path: Path) -> None:
    """Delete a file, or a folder with everything in it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path, what: str = "write") -> Iterator[None]:
    """Turn an OSError, which the user can fix, into a one-line InputError."""
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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
