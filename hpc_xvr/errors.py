"""The one exception for what a user can mend: printed as one line, exit code 2, no traceback."""

import errno


class InputError(ValueError):
    """Bad input: says what is wrong, where, what is allowed and what to do about it."""


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
