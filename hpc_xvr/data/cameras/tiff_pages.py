"""The pages of a TIFF file, by following their chain.

tifffile stops silently where the chain is broken.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import tifffile

from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

LONGEST = 2**20
"""Bytes of a page's description that are looked at."""
REDUCED, MASK = 1, 4  # bits of tag NewSubfileType
TYPES = {3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}


@dataclass(frozen=True)
class Directory:
    """What the chain of pages says of one of them."""

    extra: bool
    """A thumbnail or a mask."""
    shape: tuple[int, ...] | None
    """Of the series that starts with this page, by tifffile's description."""
    axes: str | None


def directories(path: Path, missing: bool = False) -> list[Directory]:
    """The pages of a TIFF file; those before the place where their chain breaks, if some may be
    `missing`.

    Raises:
        InputError: it is no TIFF, the chain of its pages breaks, or a page has another image in it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 8:
            raise InputError(f"{path}: does not start as a TIFF file does: empty or damaged")
        big = struct.unpack(order + "H", head[2:4])[0] == 43
        at = struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0]
        chain = _Chain(path, file, size, order, big)
        found: list[Directory] = []
        seen: set[int] = set()
        while at:
            try:
                tags, following = chain.tags(at, len(found))
                if at in seen:
                    raise chain.broken(len(found))
            except InputError as error:
                if not (missing and found):
                    raise
                logger.warning("%s; those are read", error)
                break
            seen.add(at)
            found.append(chain.directory(tags, len(found)))
            at = following
    return found


@dataclass(frozen=True)
class _Chain:
    """The file, as far as its directories go."""

    path: Path
    file: BinaryIO
    size: int
    order: str
    big: bool

    def broken(self, pages: int) -> InputError:
        return InputError(
            f"{self.path}: the chain of its pages breaks after {pages}: the file is incomplete or "
            "damaged, copy it again"
        )

    def tags(self, at: int, pages: int) -> tuple[dict[int, tuple[int, int, bytes]], int]:
        """Type, count and value (or where it is) of a directory's tags, and the next directory."""
        number, entries, entry = ("Q", "Q", 20) if self.big else ("I", "H", 12)
        self.file.seek(at if at < self.size else self.size)
        data = self.file.read(struct.calcsize(entries))
        if len(data) < struct.calcsize(entries):
            raise self.broken(pages)
        length = struct.unpack(self.order + entries, data)[0] * entry
        if at + len(data) + length + struct.calcsize(number) > self.size:
            raise self.broken(pages)
        block = self.file.read(length + struct.calcsize(number))
        tags = {}
        for k in range(0, length, entry):
            tag, kind, count = struct.unpack_from(self.order + "HH" + number, block, k)
            tags[tag] = kind, count, block[k + entry - struct.calcsize(number) : k + entry]
        return tags, struct.unpack_from(self.order + number, block, length)[0]

    def directory(self, tags: dict[int, tuple[int, int, bytes]], index: int) -> Directory:
        for offset in self._numbers(tags.get(330)):
            inside, _ = self.tags(offset, index)
            if not self._extra(inside):
                raise InputError(
                    f"{self.path}: page {index} has another image in it (SubIFD) that is no "
                    "thumbnail: export the frames as pages"
                )
        shape, axes = self._shape(tags.get(270))
        return Directory(self._extra(tags), shape, axes)

    def _extra(self, tags: dict[int, tuple[int, int, bytes]]) -> bool:
        new, old = self._numbers(tags.get(254)), self._numbers(tags.get(255))
        return bool(new and new[0] & (REDUCED | MASK)) or old[:1] == [2]

    def _numbers(self, tag: tuple[int, int, bytes] | None) -> list[int]:
        if tag is None or tag[0] not in TYPES or not 0 < tag[1] <= 1000:
            return []
        form = f"{self.order}{tag[1]}{TYPES[tag[0]]}"
        data = self._data(tag, struct.calcsize(form))
        return list(struct.unpack(form, data)) if len(data) == struct.calcsize(form) else []

    def _shape(
        self, tag: tuple[int, int, bytes] | None
    ) -> tuple[tuple[int, ...] | None, str | None]:
        """Shape and axes in the description that tifffile writes."""
        if tag is None or tag[0] != 2 or not 8 < tag[1] < LONGEST:
            return None, None
        if self._data(tag, 7)[:7] not in (b'{"shape', b"shape=("):
            return None, None
        text = self._data(tag, tag[1]).decode(errors="replace").strip("\0 ")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = tifffile.tifffile.shaped_description_metadata(text)
            shape = tuple(int(size) for size in said["shape"])
            if shape and min(shape) > 0:
                axes = said.get("axes")
                return shape, axes if isinstance(axes, str) else None
        return None, None

    def _data(self, tag: tuple[int, int, bytes], length: int) -> bytes:
        if length <= len(tag[2]) and tag[1] <= len(tag[2]):
            return tag[2][:length]
        at = struct.unpack(self.order + ("Q" if self.big else "I"), tag[2])[0]
        self.file.seek(at if at < self.size else self.size)
        return self.file.read(length)
