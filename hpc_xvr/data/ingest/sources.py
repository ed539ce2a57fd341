"""Which recordings files, globs and folders hold."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpc_xvr.data.cameras import FORMATS, SUFFIXES, camera_files, images, photron
from hpc_xvr.data.cameras.recording import guarded
from hpc_xvr.data.cameras.source import Source
from hpc_xvr.data.corpus.layout import HEADER
from hpc_xvr.errors import InputError


def find_recordings(paths: Sequence[Path | str], dataset: str | None = None) -> list[Source]:
    """The recordings that files, globs and folders stand for, each once.

    Single images among several paths (a glob the shell has expanded) form one recording for each
    sequence of numbers, after all others. A folder is searched with all it holds, a corpus in it
    left out.

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
            if folder.is_dir():
                inside = _inside(folder)
                if not inside:
                    raise InputError(f"{folder}: holds no recordings; readable are {FORMATS}")
                found += [Source(files, dataset) for files in _group(inside)]
            elif (
                len(paths) > 1
                and folder.suffix.lower() in images.IMAGE_SUFFIXES
                and folder.is_file()
            ):
                loose.append(folder)
            else:
                of_one, inner = camera_files(path)
                found.append(Source(tuple(of_one), inner or dataset))
    for files in _group(list(dict.fromkeys(loose))):
        found.append(Source(files if len(files) > 1 else tuple(camera_files(files[0])[0]), dataset))
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
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and not corpora & set(file.parents)
    )


def _group(files: list[Path]) -> Iterator[tuple[Path, ...]]:
    """Files in recordings: numbered single images together, a .mraw with its header, others alone.

    Raises:
        InputError: an image cannot be read, or a number is missing in a sequence.
    """
    pictures = [file for file in files if file.suffix.lower() in images.IMAGE_SUFFIXES]
    headers = {photron.header_of(file) for file in files if file.suffix.lower() == ".mraw"}
    yield from ((file,) for file in files if file not in pictures and file not in headers)
    for group in images.grouped(pictures):
        with guarded(str(group[0])):
            single = len(group) > 1 and images.page_count(group[0]) == 1
        if single:
            yield tuple(images.in_order(group))
        else:
            yield from ((file,) for file in sorted(group))


def _by_pixels(source: Source) -> Source:
    """A Photron recording is the same one by its header and by its pixel file."""
    first = source.files[0]
    if first.suffix.lower() in (".cih", ".cihx"):
        return Source((photron.pixels_of(first) or first,), source.dataset)
    return source
