"""Files that appear complete or not at all (written under a temporary name, synced, renamed), and
files and folders of which nobody else can take the place."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from hpc_xvr.errors import InputError, explain_os_error, os_problem

_PARTIAL = ".partial"
_OLDER = "-older"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# root, and what stands for it in containers (the kernel's overflow uid)
_TRUSTED = (0, 65534)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; the file written there becomes `path` at the end.

    It keeps the suffix of `path`, by which libraries choose a format, and is an empty file that was
    not there before: a name that nobody can foretell, so that no link waits there. After an
    exception nothing is left behind and `path` is as before.

    Raises:
        InputError: the folder is missing, or the disk is full, over quota or read-only.
    """
    check_folder(path)
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{_PARTIAL}{path.suffix}")
    try:
        os.close(_create(beside, 0o666))
        try:
            yield beside
            commit(beside, path)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
    except OSError as error:
        raise os_problem(f"cannot write {path}: {explain_os_error(error)}", error) from None


@contextlib.contextmanager
def replacing_folder(path: Path, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """The same for a folder: yield a new one beside `path` that becomes it at the end.

    A folder that is there is replaced only if `ours` says that it is an older result and holds
    nothing else.

    Raises:
        InputError: as `check_replaceable`, or the disk is full, over quota or read-only.
    """
    check_replaceable(path, ours)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PARTIAL}")
    older = beside.with_name(f"{beside.name}{_OLDER}")
    try:
        beside.mkdir()
        try:
            yield beside
            sync(beside)
            check_replaceable(path, ours)
            if path.is_dir():
                path.rename(older)
            try:
                place(beside, path)
            except OSError:
                if older.is_dir():
                    older.rename(path)
                raise
        finally:
            for folder in (beside, older):
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise os_problem(f"cannot write {path}: {explain_os_error(error)}", error) from None


def check_replaceable(path: Path, ours: Callable[[Path], bool]) -> None:
    """Raise InputError if a folder of results cannot be `path`; see `replacing_folder`."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; create it first")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        what = _kind(path.lstat().st_mode) if path.is_symlink() else "a file"
        raise InputError(f"{path}: is {what}, and the result is a folder; choose another name")
    if path.is_dir() and not ours(path):
        raise InputError(
            f"{path}: is a folder that holds other things than an older result; choose another name"
        )
    _check_open(path, path.absolute().parent)


def write_atomic(path: Path, write: Callable[[Any], Any]) -> None:
    """Call `write(binary file)` on a file that becomes `path` when it is complete.

    Missing folders are created.

    Raises:
        InputError: as `replacing`; `path` is as before.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_problem(f"cannot write {path}: {explain_os_error(error)}", error) from None
    with replacing(path) as beside, beside.open("wb") as file:
        write(file)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed calls of `replacing` and `write_atomic` left behind."""
    for path in folder.glob(f".*{_PARTIAL}*"):
        with contextlib.suppress(OSError):  # a stray folder, say, is nothing of ours
            path.unlink()


def remove_partials(path: Path) -> None:
    """Delete what killed calls of `replacing` and `replacing_folder` left beside this `path`, if it
    belongs to us; an older result only when there is another one."""
    mark = rf"[0-9a-f]{{16}}{re.escape(_PARTIAL)}"
    file = rf"\.{re.escape(path.stem)}\.{mark}{re.escape(path.suffix)}"
    folder = rf"\.{re.escape(path.name)}\.{mark}{f'({_OLDER})?' if path.exists() else ''}"
    name = re.compile(f"{file}|{folder}")
    with contextlib.suppress(OSError):
        for found in path.parent.iterdir():
            if name.fullmatch(found.name) and found.lstat().st_uid == os.geteuid():
                remove(found)


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


def check_spared(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise InputError if what is written would replace what is read, or lie in a folder of it.

    Args:
        inputs: files, and folders whose contents are read.
    """
    there = [path.resolve() for path in inputs if path.exists()]
    for out in outputs:
        real = out.resolve()
        for source in there:
            same = out.exists() and out.samefile(source)
            if same or real == source or real in source.parents:
                raise InputError(
                    f"{out}: would replace {source}, which is read: choose another name"
                )
            if source.is_dir() and source in real.parents:
                raise InputError(
                    f"{out}: would lie in {source}, whose files are read: choose another folder"
                )


def check_new_folder(path: Path) -> None:
    """Raise InputError if there cannot be a folder `path` that we may write to."""
    _check_open(path, path.absolute())


def _check_open(path: Path, folder: Path) -> None:
    """Is `folder`, or what is there of it, a folder that we may write to?"""
    while not (folder.exists() or folder.is_symlink()):
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: {folder} is a file; choose another folder")
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise InputError(f"cannot write {path}: the file system is read-only; choose another one")
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
    """Delete a file or a link, or a folder with everything in it; no link is followed."""
    if path.is_dir() and not path.is_symlink():
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
        raise os_problem(
            f"corpus {path}: cannot {what} {error.filename or path} ({reason}); "
            f"{_free(path)} are free there: check space, quota and permissions",
            error,
        ) from None


def check_regular(path: Path) -> None:
    """Raise InputError if something other than a file is at `path`, which is to be read.

    A pipe or a device may have no end. Whether there is anything is for the reader to say.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is {_kind(mode)}, not a file; give a regular file")


def private_folder(path: Path) -> None:
    """Make a folder that only this user may write to, or see that the one there is such a folder.

    In a place where others may write, too, somebody may have made one of that name before.

    Raises:
        InputError: it is a link, another user's, others may write to it, or could put another one
            in its place; or it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found, around = path.lstat(), path.parent.stat()
    except OSError as error:
        raise os_problem(f"cannot write {path}: {explain_os_error(error)}", error) from None
    problem = _not_ours(found) or (None if stat.S_ISDIR(found.st_mode) else "is not a folder")
    if problem is None and around.st_uid not in (os.geteuid(), *_TRUSTED):
        problem = f"lies in a folder of {_owner(around)}, who could exchange it"
    if problem is None and around.st_mode & stat.S_IWOTH and not around.st_mode & stat.S_ISVTX:
        problem = "lies in a folder in which every user could exchange it"
    if problem:
        raise InputError(
            f"{path}: {problem}; choose a folder of your own, which is made if need be"
        )


def private_text(path: Path, fresh: str) -> str:
    """The text of a file that only this user may read; a missing one gets the text `fresh`.

    Of several processes, also on several nodes, one makes it and all get the same.

    Raises:
        InputError: it is a link, another user's, or others may read it; or it cannot be made.
    """
    try:
        if not os.path.lexists(path):
            beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PARTIAL}")
            try:
                with os.fdopen(_create(beside, 0o600), "w") as file:
                    file.write(fresh)
                with contextlib.suppress(FileExistsError):  # another process was quicker
                    path.hardlink_to(beside)
            finally:
                beside.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            found = os.fstat(file.fileno())
            problem = _not_ours(found)
            if problem is None and found.st_mode & 0o077:
                problem = f"may be read by others; delete it, or chmod 600 {path}"
            if problem:
                raise InputError(f"{path}: {problem}")
            return file.read(4096)
    except OSError as error:
        raise os_problem(f"cannot read {path}: {explain_os_error(error)}", error) from None


def open_own(path: Path, mode: str) -> IO[bytes]:
    """Open a file of a name that can be foretold, to write it anew ("wb") or to append ("ab").

    Raises:
        OSError: the disk refuses.
        InputError: what is to be appended to is a link, another user's, or not a file.
    """
    if mode == "wb":
        path.unlink(missing_ok=True)
        return os.fdopen(_create(path, 0o666), mode)
    check_own(path)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW), mode)


def check_own(path: Path) -> None:
    """Raise InputError if what is at `path` is a link, another user's, or all may write to it."""
    try:
        problem = _not_ours(path.lstat(), stat.S_IWOTH)
    except FileNotFoundError:
        return
    if problem:
        raise InputError(f"{path}: {problem}; remove it, or choose another folder")


def _create(path: Path, mode: int) -> int:
    """A new file; never one that is there, or that a link points to."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)


def _not_ours(found: os.stat_result, writers: int = stat.S_IWGRP | stat.S_IWOTH) -> str | None:
    """What speaks against trusting a file or folder, as `lstat` describes it.

    `writers`: those who may not be allowed to write to it.
    """
    if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
        return f"is {_kind(found.st_mode)}"
    if found.st_uid != os.geteuid():
        return f"belongs to {_owner(found)}"
    if found.st_mode & writers:
        return "may be written to by others"
    return None


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def _owner(found: os.stat_result) -> str:
    with contextlib.suppress(KeyError):
        return f"user {pwd.getpwuid(found.st_uid).pw_name}"
    return f"user {found.st_uid}"


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
