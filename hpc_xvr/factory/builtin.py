"""Weights that come with the package, by name: `builtin`, or `builtin:NAME`."""

from __future__ import annotations

from pathlib import Path

from hpc_xvr.errors import InputError

PREFIX = "builtin"
DEFAULT = "base"
_FOLDER = Path(__file__).parent / "builtin_weights"


def builtin_names() -> list[str]:
    """The names after `builtin:`, the default first."""
    names = sorted(path.stem for path in _FOLDER.glob("*.safetensors"))
    return sorted(names, key=lambda name: name != DEFAULT)


def is_builtin(text: str | Path) -> bool:
    """Does it name weights of the package rather than a file? (A folder of that name is
    `./builtin`.)"""
    return str(text) == PREFIX or str(text).startswith(f"{PREFIX}:")


def file_of(text: str | Path) -> Path:
    """The file of built-in weights; any other path as it is.

    Raises:
        InputError: there are no weights of that name.
    """
    if not is_builtin(text):
        return Path(text)
    name = str(text).partition(":")[2] or DEFAULT
    if name not in builtin_names():
        raise InputError(
            f"{text}: there are no built-in weights of that name; there are "
            + ", ".join(f"{PREFIX}:{known}" for known in builtin_names())
        )
    return _FOLDER / f"{name}.safetensors"
