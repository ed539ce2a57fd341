"""The files of one recording: their name, size and fingerprint, before they are opened."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hpc_xvr.data.cameras import numbering
from hpc_xvr.data.cameras.recording import guarded


@dataclass(frozen=True)
class Source:
    """The file, the folder of OME-Zarr, or the numbered image files, of one recording; `lr`: those
    of its second camera."""

    files: tuple[Path, ...]
    dataset: str | None = None
    lr: Source | None = None
    frames: tuple[int, int] | None = None
    """The first and the last one that are used, where some between are missing; None: all."""
    goes_on: tuple[str, str] | None = None
    """Folder and name of what seems to be the first part of this one: they share a split."""

    @property
    def name(self) -> str:
        """File name; of a sequence, prefix*suffix."""
        return (
            "*".join(numbering.pattern(self.files)) if len(self.files) > 1 else self.files[0].name
        )

    @property
    def path(self) -> Path:
        """Folder and name."""
        return self.files[0].parent / self.name

    @property
    def folder(self) -> str:
        """Its folder as an absolute path."""
        return str(self.files[0].parent.resolve())

    @property
    def stem(self) -> str:
        """The name as an id, before it is made unique."""
        first = self.files[0]
        name = first.stem
        if len(self.files) > 1:
            prefix, _ = numbering.pattern(self.files)
            name = prefix.strip("._- ") or first.parent.resolve().name
        if self.dataset:
            name += f"-{self.dataset}"
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._") or "video"

    @cached_property
    def state(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of change of each file."""
        with guarded(str(self.files[0])):
            return [_state(file) for file in self.files]

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(size for _, size, _ in self.state) + (self.lr.nbytes if self.lr else 0)

    def fingerprint(self, options: dict[str, Any]) -> str:
        """A hash that is the same for the same files, unchanged, ingested with the same options."""
        parts: list[Any] = [self.state, {**options, "dataset": self.dataset}]
        if self.lr is not None:
            parts.append([self.lr.state, self.lr.dataset])
        if self.frames is not None:
            parts.append(self.frames)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _state(path: Path) -> tuple[str, int, int]:
    """Name, bytes and time of change of a file, or of all files in a folder together."""
    inside = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]
    found = [one.stat() for one in inside]
    return (
        path.name,
        sum(one.st_size for one in found),
        max((one.st_mtime_ns for one in found), default=0),
    )
