"""Recordings that are still being written: how many of their frames are complete.

Followed are HDF5 files of one dataset in chunks, and folders of numbered TIFF or PNG files of one
frame each. A frame counts when it is complete and all before it are.
"""

from __future__ import annotations

import gc
import hashlib
import os
import re
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np

from hpc_xvr.data.cameras import HDF5, SUFFIXES, images, numbering
from hpc_xvr.data.cameras.hdf5 import read_frames, time_axes
from hpc_xvr.data.cameras.hdf5_axes import axis_order
from hpc_xvr.data.cameras.hdf5_choice import choose
from hpc_xvr.data.cameras.hdf5_links import Files, written_in_swmr
from hpc_xvr.data.cameras.hdf5_stored import stored_frames
from hpc_xvr.data.cameras.hdf5_virtual import Reader
from hpc_xvr.data.cameras.recording import guarded
from hpc_xvr.errors import InputError

SETTLED_S = 0.25
"""Seconds for which a TIFF file must not have changed: it has no checksum that says it is whole."""
_AGAIN = "bring it back and repeat the command"
_OTHER = "give each recording a file or folder of its own, and repeat the command"
_AGAIN_S = 1.0
"""Seconds after a change in which a file is looked into even if it seems unchanged: clocks of file
systems are coarse."""


class CannotFollow(InputError):
    """A recording that cannot be read while it grows, or has become another one."""


class Growing(Protocol):
    """A recording that grows."""

    frames: int
    """Complete ones, from the first on, at the last look."""
    ended: bool
    """Whether its writer has said that no more will come."""
    lost: set[int]
    """Frames that will never be there, and count as if they were."""
    waiting: str
    """Why there are no frames yet, or not more."""

    @property
    def path(self) -> Path: ...

    def look(self) -> bool:
        """Look how many frames are there; returns whether there are more.

        Raises:
            CannotFollow: it is of another kind, has shrunk, vanished, or been replaced.
        """
        ...

    def files(self) -> list[Path]:
        """Those that hold the frames."""
        ...

    def finish(self) -> None:
        """No more of it is wanted."""
        ...

    def since(self, frames: int) -> float:
        """When so many frames were there, by `time.time()`; rather too early than too late."""
        ...


def growing(path: Path | str, dataset: str | None = None, links: tuple[Path, ...] = ()) -> Growing:
    """Follow a recording; it need not be there yet.

    Args:
        path: an HDF5 file, also FILE.h5::PATH, or a folder of numbered images.

    Raises:
        CannotFollow: it is something else.
    """
    name, _, inner = str(path).partition("::")
    file = Path(name)
    if file.suffix.lower() in HDF5 and not file.is_dir():
        return GrowingHdf5(file, inner or dataset, links)
    if file.is_file() or file.suffix.lower() in SUFFIXES:
        raise CannotFollow(
            f"{file}: cannot be followed, as it is not known which of its frames are complete "
            f"while it is written: have the camera write HDF5 ({' '.join(HDF5)}) or a folder of "
            "numbered .tif or .png files, or reconstruct it when it is complete"
        )
    return GrowingFolder(file)


class _Arrivals:
    """When frames were first seen."""

    def __init__(self) -> None:
        self._ends: list[int] = []
        self._times: list[float] = []
        self.last = 0.0

    def note(self, frames: int, when: float) -> None:
        self.last = max(self.last, when)
        self._ends.append(frames)
        self._times.append(self.last)

    def since(self, frames: int) -> float:
        at = int(np.searchsorted(self._ends, frames))
        return self._times[min(at, len(self._times) - 1)]


@dataclass
class GrowingHdf5:
    """A dataset of an HDF5 file to which frames are added: by a writer in SWMR mode, one that
    flushes, one that opens and closes it each time, or one that puts a longer file in its place."""

    path: Path
    dataset: str | None = None
    links: tuple[Path, ...] = ()
    frames: int = field(default=0, init=False)
    ended: bool = field(default=False, init=False)
    lost: set[int] = field(default_factory=set, init=False)
    waiting: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._swmr = False
        self._state: tuple[int, int, int] | None = None
        self._looked = time.time()
        self._first: bytes | None = None
        self._arrivals = _Arrivals()

    def files(self) -> list[Path]:
        return [self.path]

    def since(self, frames: int) -> float:
        return self._arrivals.since(frames)

    def finish(self) -> None:
        pass

    def look(self) -> bool:
        before, self._looked = self._looked, time.time()
        try:
            found = self.path.stat()
        except FileNotFoundError:
            if self.frames:
                raise CannotFollow(f"{self.path}: has vanished; {_AGAIN}") from None
            self.waiting = f"{self.path}: is not there yet"
            return False
        except OSError as error:
            self.waiting = f"{self.path}: {error.strerror}"
            return False
        state = found.st_ino, found.st_size, found.st_mtime_ns
        if state == self._state and self._looked - found.st_mtime > _AGAIN_S:
            return False
        try:
            with guarded(str(self.path)):
                swmr = written_in_swmr(self.path)
                ended = self._swmr and not swmr
                frames, first = self._count(ended)
        except CannotFollow:
            raise
        except InputError as error:  # it may be between two states
            self.waiting, self._looked = str(error), before
            return False
        self._state, self._swmr = state, self._swmr or swmr
        if frames < self.frames:
            raise CannotFollow(
                f"{self.path}: has shrunk: it had {self.frames} complete frames and now has "
                f"{frames}; {_OTHER}"
            )
        if self._first is not None and first != self._first:
            raise CannotFollow(
                f"{self.path}: was replaced: its first frame is another one; {_OTHER}"
            )
        self._first, self.ended = first, ended
        self.waiting = f"{self.path}: holds {frames} complete frames"
        more = frames > self.frames
        if more:
            self.frames = frames
            self._arrivals.note(frames, before)
        return more

    def _count(self, closed: bool) -> tuple[int, bytes | None]:
        """Complete frames, and a checksum of the first one."""
        if h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE):
            gc.collect()  # a file that stays open is not seen to grow
        with Files(self.path, self.links) as files:
            found = choose(files, self.dataset)
            where = f"{self.path}, dataset /{found[0].name}"
            item = files.item(found[0].place)
            if len(found) > 1 or item.is_virtual or item.external:
                raise CannotFollow(
                    f"{where}: is made of several files or datasets, which cannot be followed: "
                    "follow the file that the camera writes, or reconstruct it when it is complete"
                )
            order = axis_order(where, files, item, found[0].routes)
            axis = order[0]
            early = item.id.get_create_plist().get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY
            if axis is None or not item.chunks or early:
                raise CannotFollow(
                    f"{where}: does not say which of its frames were written: have the camera "
                    "store them in chunks that are allocated as they are written, or reconstruct "
                    "it when it is complete"
                )
            frames = stored_frames(item, axis, max(self.frames - 1, 0), closed, self.lost)
            for times in time_axes(files, found[0], axis):
                if times.maxshape == (None,) and len(times):  # they grow, too
                    frames = min(frames, len(times))
            if not frames:
                return 0, None
            frame = read_frames(Reader(files, False), files, found[0].place, order, 0, 1)
            return frames, hashlib.blake2b(frame.data, digest_size=16).digest()


@dataclass
class GrowingFolder:
    """A folder of numbered images of one frame each, written in the order of their numbers."""

    path: Path
    frames: int = field(default=0, init=False)
    ended: bool = field(default=False, init=False)
    lost: set[int] = field(default_factory=set, init=False)
    waiting: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._folder: tuple[int, int] | None = None
        self._names: set[str] = set()
        self._by_number: dict[int, str] = {}
        self._template: re.Pattern[str] | None = None
        self._lowest = self._step = 0
        self._complete: list[Path] = []
        self._done: set[str] = set()
        """The names of those."""
        self._first: tuple[int, int] | None = None
        self._states: dict[str, tuple[tuple[int, int], float]] = {}
        """Size and time of change of files that are not complete yet, and when they were first
        seen so."""
        self._arrivals = _Arrivals()

    def files(self) -> list[Path]:
        return list(self._complete)

    def since(self, frames: int) -> float:
        return self._arrivals.since(frames)

    def finish(self) -> None:
        pass

    def look(self) -> bool:
        try:
            found = self.path.stat()
            with os.scandir(self.path) as entries:
                names = [
                    entry.name
                    for entry in entries
                    if entry.name.lower().endswith(images.IMAGE_SUFFIXES) and entry.name[0] != "."
                ]
        except OSError as error:
            if self.frames:
                raise CannotFollow(
                    f"{self.path}: has vanished ({error.strerror}); {_AGAIN}"
                ) from None
            self.waiting = f"{self.path}: is not there yet"
            return False
        self._check_same(found.st_dev, found.st_ino, names)
        self._number(names)
        if len(self._by_number) < 2:
            self.waiting = f"{self.path}: holds {len(self._by_number)} numbered .tif or .png files"
            return False
        count = self.frames
        while True:
            number = self._lowest + self._step * self.frames
            name = self._by_number.get(number)
            if name is None:
                self.waiting = f"{self.path}: number {number} is not there yet"
                return self.frames > count
            when = self._ready(self.path / name)
            if when is None:
                self.waiting = f"{self.path / name}: is not complete yet"
                return self.frames > count
            if not self._complete:
                self._first = self._state(self.path / name)
            self._complete.append(self.path / name)
            self._done.add(name)
            self.frames += 1
            self._arrivals.note(self.frames, min(when, time.time()))

    def _check_same(self, device: int, inode: int, names: list[str]) -> None:
        if self.frames:
            gone = self._done - set(names)
            if gone:
                raise CannotFollow(
                    f"{self.path}: has shrunk: {len(gone)} of its {self.frames} complete frames "
                    f"have vanished, the first one {min(gone)}; {_AGAIN}"
                )
            if self._folder != (device, inode) or self._state(self._complete[0]) != self._first:
                raise CannotFollow(
                    f"{self.path}: was replaced: its first frame is another one; {_OTHER}"
                )
        self._folder = device, inode

    def _number(self, names: list[str]) -> None:
        """Give new names their numbers."""
        new = [name for name in names if name not in self._names]
        if not new:
            return
        found = self._template and [self._template.fullmatch(name) for name in new]
        if found and all(found):
            numbers = [int(match[1]) for match in found if match]
            taken = set(numbers) & set(self._by_number) or len(set(numbers)) < len(numbers)
            self._by_number.update(zip(numbers, new, strict=True))
        else:
            taken = self._regroup(names)
        self._names.update(new)
        for name in new:
            self._settled(self.path / name)
        ordered = sorted(self._by_number)
        step = min((b - a for a, b in pairwise(ordered)), default=0)
        early = self._complete and (ordered[0] < self._lowest or step < self._step)
        if taken or early:
            raise CannotFollow(
                f"{self.path}: files with numbers of, before or between those of complete frames "
                "have come: frames must be written in the order of their numbers"
            )
        self._lowest, self._step = ordered[0], step

    def _regroup(self, names: list[str]) -> bool:
        """Find out which part of the names is the number; returns whether one occurs twice."""
        files = [self.path / name for name in sorted(names)]
        groups = numbering.grouped(files)
        if len(groups) != 1 or groups[0].parts or min(groups[0].numbers) < 0:
            raise CannotFollow(
                f"{self.path}: holds other files than one sequence of numbered .tif or .png: give "
                "each recording a folder of its own, with numbers from 0 up"
            )
        group = groups[0]
        self._by_number = {
            number: file.name for file, number in zip(group.files, group.numbers, strict=True)
        }
        if len(files) > 1:
            before, after = numbering.pattern(files)
            self._template = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
        return len(self._by_number) < len(files)

    @staticmethod
    def _state(path: Path) -> tuple[int, int]:
        found = path.stat()
        return found.st_size, found.st_mtime_ns

    def _ready(self, path: Path) -> float | None:
        """When a file was complete; None: it is not."""
        settled = self._settled(path)
        png = path.suffix.lower() == ".png"  # which has checksums
        if not (settled or png):
            return None
        try:
            with guarded(str(path)):
                before = path.stat()
                images.read_single(path)
                after = path.stat()
        except images.SeveralFrames as error:
            raise CannotFollow(
                f"{error}: folders of files of one frame each can be followed"
            ) from None
        except InputError:
            return None
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            return None
        self._states.pop(path.name, None)
        return after.st_ctime

    def _settled(self, path: Path) -> bool:
        """Whether a file has not changed for a while, as far as we have looked."""
        try:
            state = self._state(path)
        except OSError:
            return False
        known, since = self._states.get(path.name, (None, 0.0))
        if known != state:
            self._states[path.name] = state, time.monotonic()
            return False
        return time.monotonic() - since >= SETTLED_S
