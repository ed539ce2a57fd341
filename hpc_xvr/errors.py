"""Errors that the user can mend or wait out: printed as one line, no traceback."""

from __future__ import annotations

import errno
from typing import Any

BAD_INPUT = 2
"""Exit code: the same command would only fail again."""
PASSING = 74
"""Exit code: trouble of the moment (sysexits.h: EX_IOERR); the same command may succeed later."""
_PASSING = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EADDRINUSE,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
}


_LONGEST = 2000  # characters


class InputError(ValueError):
    """Bad input: says what is wrong, where, what is allowed and what to do about it.

    What it quotes may be anything, so it is brought to one line, and the middle of a long one is
    left out.
    """

    exit_code = BAD_INPUT

    def __init__(self, message: str) -> None:
        message = message.replace("\n", " ")
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2 - 5]} ... {message[5 - _LONGEST // 2 :]}"
        super().__init__(message)


class PassingError(InputError):
    """Nothing is wrong with the input: the disk is full, a port in use, another rank lost."""

    exit_code = PASSING


class CollectiveError(InputError):
    """An InputError that all ranks raise together: rank 0 prints it, and none has to be killed."""

    def __init__(self, message: str, exit_code: int = BAD_INPUT) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def os_problem(message: str, error: OSError) -> InputError:
    """An InputError for what the system refuses: a PassingError if that may be over later."""
    return PassingError(message) if passes(error) else InputError(message)


def passes(error: OSError) -> bool:
    """Is it trouble of the moment?"""
    return error.errno in _PASSING


def explain_os_error(error: OSError) -> str:
    """The system's reason and what to do about it, in one line."""
    advice = {
        errno.ENOSPC: "free some space or choose another disk",
        errno.EDQUOT: "your quota is used up; free some space or choose another disk",
        errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
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
