"""HDF5 files and what they lead to: links followed by hand, and only where that is allowed.

The HDF5 library follows soft and external links, parts of virtual datasets and raw files of
external storage to any file on the disk, without a word. Here every step is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py

from hpc_xvr.data.cameras.recording import guarded
from hpc_xvr.data.scout import check_survivable
from hpc_xvr.errors import InputError

BLOCK = 2**26
"""Bytes of frames read at once, and of the chunk cache."""
SIGNATURE = b"\x89HDF\r\n\x1a\n"
MOST_OPEN = 64
"""Files that are open at once; a recording may have thousands of parts."""
MOST_HOPS = 40
"""Links in a row."""
MOST_OBJECTS = 100_000
"""Groups and datasets looked at in search of frames."""


class Place(NamedTuple):
    """A file, and the name of a group or dataset in it to which only hard links lead."""

    path: Path
    name: str = ""

    def __str__(self) -> str:
        return f"{self.path}, dataset /{self.name}"


class NotAllowed(InputError):
    """A file leads to another that lies outside the folders which are allowed."""


class Found(NamedTuple):
    """A name as the user would write it, and where it leads: a place, or why nowhere."""

    name: str
    place: Place | InputError


class Files:
    """A file that the user named, and those that it leads to; a context manager.

    Args:
        path: the file.
        allow_links: folders, beside the file's own one, that it may lead into.
    """

    def __init__(self, path: Path, allow_links: Sequence[Path | str] = ()) -> None:
        self.path = path
        self.root = Place(path)
        self._allowed = [path.parent.resolve(), *(Path(folder).resolve() for folder in allow_links)]
        self._open: dict[Path, h5py.File] = {}
        self._raw: dict[tuple[Path, int], h5py.Dataset] = {}

    def __enter__(self) -> Files:
        self._file(self.path)
        return self

    def __exit__(self, *error: object) -> None:
        self._close(set(self._open))

    def close_some(self) -> None:
        """Close files if many are open. What is open of them is not to be used after that."""
        if len(self._open) > MOST_OPEN:
            self._close(set(self._open) - {self.path})

    def _close(self, paths: set[Path]) -> None:
        self._raw = {key: item for key, item in self._raw.items() if key[0] not in paths}
        for path in paths:
            self._open.pop(path).close()

    def item(self, place: Place) -> h5py.Group | h5py.Dataset:
        """Open what is at a place."""
        file = self._file(place.path)
        name = f"/{place.name}".encode(errors="surrogateescape")
        key = place.path, h5py.h5o.get_info(file.id, name).addr
        if key in self._raw:
            return self._raw[key]
        item = file[name]
        if not isinstance(item, h5py.Dataset) or item.external is None:
            return item
        # Its raw files lie beside the file, not in the folder where we run. HDF5 wants this said
        # when the dataset is first opened.
        item.id.close()
        access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
        access.set_efile_prefix(b"${ORIGIN}")
        self._raw[key] = h5py.Dataset(h5py.h5d.open(file.id, name, access))
        return self._raw[key]

    def locate(self, name: str, start: Place | None = None, shown: str = "") -> Place | None:
        """Where a name leads; None if there is no such name. May close files, see `close_some`.

        Args:
            start: the group that the name is in; None: the top of the file.
            shown: the name in messages.

        Raises:
            InputError: a link on the way leads to nothing, or to a file that is not allowed.
        """
        self.close_some()
        place, last = start or self.root, ""
        due = 0  # parts that the last link promises
        if name.startswith("/"):
            place = Place(place.path)
        parts = _parts(name)
        shown = f"/{(shown or name).strip('/')}"
        for _ in range(MOST_HOPS + len(parts)):
            if not parts:
                return place
            group = self.item(place)
            link = group.get(parts[0], getlink=True) if isinstance(group, h5py.Group) else None
            if link is None:
                if due:
                    raise InputError(
                        f"{self.path}: {shown} is a link to {last}, where nothing is: "
                        "the recording is incomplete, or the link is wrong"
                    )
                return None
            first, due = parts.pop(0), max(0, due - 1)
            if isinstance(link, h5py.HardLink):
                place = Place(place.path, f"{place.name}/{first}".lstrip("/"))
                continue
            last = link.path
            if isinstance(link, h5py.ExternalLink):
                last = f"{link.filename}::{link.path}"
                place = Place(self.beside(place.path, link.filename, shown))
            elif link.path.startswith("/"):
                place = Place(place.path)
            parts = [*_parts(link.path), *parts]
            due += len(_parts(link.path))
        raise InputError(f"{self.path}: {shown} is a link that leads round in a circle")

    def beside(self, holder: Path, name: str, what: str) -> Path:
        """The file `name` that `what` in the file `holder` leads to, where HDF5 would find it.

        Raises:
            InputError: it is missing, or outside the folders that are allowed.
        """
        stated = Path(name)
        # HDF5 looks for a file that has moved beside the one that names it.
        places = [stated] if stated.is_absolute() else []
        places.append(holder.parent / (stated.name if stated.is_absolute() else stated))
        found = next((place for place in places if place.is_file()), None)
        real = (found or places[0]).resolve()
        if not any(real.is_relative_to(folder) for folder in self._allowed):
            raise NotAllowed(
                f"{holder}: {what} leads to {real}, outside the file's folder, and was not read: "
                f"if you trust the file, pass --allow-links {real.parent}"
            )
        if found is None:
            raise InputError(
                f"{holder}: {what} leads to {name}, which is missing: put it beside the file"
            )
        return found

    def raw_bytes(self, place: Place, dataset: h5py.Dataset) -> tuple[int, str]:
        """How many bytes of a dataset's raw files are there (pieces of files without structure, one
        after the other), and what is wrong with the rest.

        Raises:
            InputError: a raw file is missing or not allowed.
        """
        have = 0
        for name, offset, size in dataset.external:
            raw = self.beside(place.path, name, f"the raw file of dataset /{place.name}")
            left = dataset.nbytes - have
            wanted = min(left, size) if size != h5py.h5f.UNLIMITED else left
            there = max(0, min(wanted, raw.stat().st_size - offset))
            have += there
            if there < wanted:
                return have, (
                    f"its raw file {raw} has {there} of {wanted} bytes: the recording is "
                    "incomplete, copy that file again"
                )
        return (
            have,
            f"its raw files have {have} of {dataset.nbytes} bytes: the recording is incomplete",
        )

    def datasets(self, start: Place | None = None, prefix: str = "") -> Iterator[Found]:
        """All datasets under a group, and all links that lead nowhere, in the order of names."""
        groups = [(prefix, start or self.root)]
        seen: set[tuple[Path, int]] = set()
        objects = 0
        while groups:
            shown, place = groups.pop()
            group = self.item(place)
            key = (place.path.resolve(), h5py.h5o.get_info(group.id).addr)
            if key in seen:
                continue
            seen.add(key)
            inside = []
            for name in sorted(group):
                if name.startswith("#") and not shown:  # MATLAB's own
                    continue
                if (objects := objects + 1) > MOST_OBJECTS:
                    raise InputError(
                        f"{self.path}: holds more than {MOST_OBJECTS} objects: name the dataset "
                        "with --dataset"
                    )
                full = f"{shown}/{name}".lstrip("/")
                try:
                    with guarded(f"{self.path}: /{full}"):
                        there = self.locate(name, place, full)
                        assert there is not None
                        item = self.item(there)
                except InputError as error:
                    yield Found(full, error)
                    continue
                if isinstance(item, h5py.Dataset):
                    yield Found(full, there)
                elif isinstance(item, h5py.Group):
                    inside.append((full, there))
            groups += reversed(inside)

    def _file(self, path: Path) -> h5py.File:
        if path not in self._open:
            if path.suffix.lower() == ".mat" and not h5py.is_hdf5(path):
                raise InputError(
                    f"{path}: is not a MATLAB file of version 7.3: save it again with -v7.3"
                )
            check_survivable(path)
            written = written_in_swmr(path)
            file = h5py.File(path, "r", locking=False, swmr=written, rdcc_nbytes=BLOCK)
            self._open[path] = file
        return self._open[path]


def written_in_swmr(path: Path) -> bool:
    """Whether a program has the file open to append to it while others read (SWMR), as the flags in
    its superblock say; they stay if that program is killed."""
    with path.open("rb") as file:
        begin = file.read(12)
    return len(begin) == 12 and begin[:8] == SIGNATURE and begin[8] >= 3 and bool(begin[11] & 4)


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]
