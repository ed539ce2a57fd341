"""Errors that the user can fix: printed as one line, exit code 2, no traceback."""

from __future__ import annotations

import errno
from typing import Any


class InputError(ValueError):
    """Bad input: says what is wrong, where, what is allowed and what to do about it."""


class CollectiveError(InputError):
    """An InputError that all ranks raise together: rank 0 prints it, and none has to be killed."""


def explain_os_error(error: OSError) -> str:
    """The system's reason and what to do about it, in one line."""
    advice = {
        errno.ENOSPC: "free some space or choose another disk",
        errno.EDQUOT: "your quota is used up; free some space or choose another disk",
        errno.EFBIG: "the file size limit of this session is too small (ulimit -f)",
        errno.EACCES: "choose a folder you may write to",
        errno.EPERM: "choose a folder you may write to",
        errno.EROFS: "the file system is read-only; choose another one",
        errno.ENOTDIR: "a part of the path is a file; choose another folder",
        errno.EEXIST: "a part of the path is a file; choose another folder",
    }.get(error.errno or 0)
    return f"{error.strerror or error}" + (f"; {advice}" if advice else "")


def explain(error: Exception) -> str:
    """An exception's message as one line; the first problem of pydantic's validation errors."""
    problems: Any = getattr(error, "errors", None)
    if callable(problems):
        problem = problems()[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    return (str(error).splitlines() or [type(error).__name__])[0]
