"""Which recordings files, globs and folders hold."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hpc_xvr.data.cameras import (
    FORMATS,
    SUFFIXES,
    camera_files,
    images,
    numbering,
    ome_zarr,
    photron,
)
from hpc_xvr.data.cameras.recording import guarded
from hpc_xvr.data.cameras.source import Source
from hpc_xvr.data.corpus.layout import HEADER
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger


def find_recordings(
    paths: Sequence[Path | str], dataset: str | None = None, missing: bool = False
) -> list[Source]:
    """The recordings that files, globs and folders stand for, each once.

    Single images among several paths (a glob the shell has expanded) form one recording for each
    sequence of numbers, after all others. A folder is searched with all it holds, a corpus in it
    left out. `missing`: numbers of single images may be missing.

    Raises:
        InputError: nothing there, an unknown kind of file, a folder without recordings.
    """
    paths = [match for path in paths for match in _matches(path)]
    if not paths:
        raise InputError(
            f"no files to ingest: give camera files or folders; readable are {FORMATS}"
        )
    found: list[Source] = []
    loose: list[Path] = []
    for path in paths:
        folder = Path(path)
        with guarded(str(path)):
            if ome_zarr.is_image(folder):
                found.append(Source((folder,), dataset))
            elif folder.is_dir():
                zarrs = [
                    one
                    for one in sorted(folder.rglob("*.zarr"))
                    if _shown(one, folder) and ome_zarr.is_image(one)
                ]
                found += [Source((one,), dataset) for one in zarrs]
                inside = _inside(folder)
                if not inside and not zarrs:
                    raise InputError(f"{folder}: holds no recordings; readable are {FORMATS}")
                found += _recordings(inside, dataset, missing)
            elif (
                len(paths) > 1
                and folder.suffix.lower() in images.IMAGE_SUFFIXES
                and folder.is_file()
            ):
                loose.append(folder)
            else:
                of_one, inner = camera_files(path, missing)
                found.append(Source(tuple(of_one), inner or dataset))
    for source in _recordings(list(dict.fromkeys(loose)), dataset, missing):
        if len(source.files) == 1:
            source = replace(source, files=tuple(camera_files(source.files[0], missing)[0]))
        found.append(source)
    return list(dict.fromkeys(_by_pixels(source) for source in found))


def _matches(path: Path | str) -> list[Path | str]:
    if Path(path).exists():
        return [path]
    return sorted(glob.glob(str(path))) or [path]  # noqa: PTH207 - Path.glob needs a root


def _inside(folder: Path) -> list[Path]:
    """Camera files under a folder, without hidden ones and those of a corpus."""
    corpora = {header.parent for header in folder.rglob(HEADER)}
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and _shown(file, folder)
        and not corpora & set(file.parents)
    )


def _shown(path: Path, folder: Path) -> bool:
    """Whether neither it nor a folder on the way to it is hidden."""
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _recordings(files: list[Path], dataset: str | None, missing: bool) -> Iterator[Source]:
    """Files in recordings: numbered single images together, and the parts of a stack that was
    split, a .mraw with its header, others alone.

    Raises:
        InputError: an image cannot be read, or a number is missing in a sequence.
    """
    pictures = [file for file in files if file.suffix.lower() in images.IMAGE_SUFFIXES]
    headers = {photron.header_of(file) for file in files if file.suffix.lower() == ".mraw"}
    others = [file for file in files if file.suffix.lower() not in images.IMAGE_SUFFIXES]
    yield from (Source((file,), dataset) for file in others if file not in headers)
    stacks: list[Path] = []
    sequences: list[numbering.Group] = []
    for group in numbering.grouped(pictures):
        if _are_stacks(sorted(group.files), missing) and not group.parts:
            stacks += group.files
        else:
            sequences.append(group)
    numbering.refuse_other_numbers(file for group in sequences for file in group.files)
    numbering.tell_of_divided(sequences)
    ordered = {group: tuple(group.in_order(missing)) for group in sequences}
    pairs: list[_Linked] = [
        (None if before is None else ordered[before], ordered[group])
        for before, group in numbering.continued(sequences)
    ]
    for previous, file in numbering.successive(stacks):
        pairs.append((None if previous is None else (previous,), (file,)))
    yield from _linked(pairs, dataset)


_Linked = tuple[tuple[Path, ...] | None, tuple[Path, ...]]
"""The files that come before, and files."""


def _linked(pairs: Iterable[_Linked], dataset: str | None) -> Iterator[Source]:
    """The recordings of these files: those that go on where the ones before them end know the first
    part."""
    first_part: dict[tuple[Path, ...], tuple[str, str]] = {}
    for before, files in pairs:
        source = Source(files, dataset)
        if before is not None and images.goes_on(before, files):
            earlier = Source(before, dataset)
            first = first_part.get(before, (earlier.folder, earlier.name))
            first_part[files] = first
            logger.warning(
                "%s: seems to go on where %s ends: they stay two recordings, of the same split; "
                "if they are one, %s",
                source.path,
                earlier.name if earlier.folder == source.folder else earlier.path,
                "move the images into one folder"
                if len(files) > 1
                else "join the files or name them .part1, .part2, ...",
            )
            source = replace(source, goes_on=first)
        yield source


def _are_stacks(files: list[Path], missing: bool) -> bool:
    """Does the first of these images that can be read hold more than one frame, or, where some
    may be `missing`, do most of them?

    Raises:
        InputError: none of several can be read. One alone is refused when it is opened.
    """
    if missing:
        with guarded(str(files[0])):
            return images.page_count(*files) > 1
    problem: InputError | None = None
    for file in files:
        try:
            with guarded(str(file)):
                return images.page_count(file) > 1
        except InputError as error:
            problem = problem or error
    if problem and len(files) > 1:
        raise problem
    return False


def _by_pixels(source: Source) -> Source:
    """A Photron recording is the same one by its header and by its pixel file."""
    first = source.files[0]
    if first.suffix.lower() in (".cih", ".cihx"):
        return Source((photron.pixels_of(first) or first,), source.dataset)
    return source
