"""Camera files into a corpus: what is there, corrected, described, split by recording."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hpc_xvr.data.cameras import (
    FORMATS,
    SUFFIXES,
    Recording,
    camera_files,
    images,
    open_files,
    open_recording,
    photron,
)
from hpc_xvr.data.cameras.flatfield import mean_frame, transmission
from hpc_xvr.data.cameras.recording import guarded
from hpc_xvr.data.corpus import Corpus, Video
from hpc_xvr.data.layout import HEADER
from hpc_xvr.data.writer import CorpusWriter
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger, progress_bar

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
Status = Literal["added", "already there", "duplicate"]


@dataclass(frozen=True)
class Source:
    """The file, or the numbered image files, of one recording."""

    files: tuple[Path, ...]
    dataset: str | None = None

    @property
    def name(self) -> str:
        """File name; of a sequence, prefix*suffix."""
        first = self.files[0]
        key = images.name_key(first) if len(self.files) > 1 else None
        return f"{key[0]}*{key[1]}" if key else first.name


@dataclass(frozen=True)
class Outcome:
    """What became of one recording: `id` is the video that holds its frames."""

    path: Path
    status: Status
    id: str
    split: str


class _Duplicate(Exception):
    """Ends the writing of a clip whose last frame shows that the corpus has it already."""

    def __init__(self, video: Video) -> None:
        super().__init__(video.id)
        self.video = video


def ingest(
    paths: Sequence[Path | str],
    corpus: Path | str,
    *,
    store: Literal["zarr", "hdf5"] = "zarr",
    flat: Path | str | None = None,
    dark: Path | str | None = None,
    dataset: str | None = None,
    flip_rows: bool = False,
    bit_depth: int | None = None,
    full_scale: float | None = None,
    frame_rate_hz: float | None = None,
    pixel_size_um: float | None = None,
    camera: str | None = None,
    scene: str | None = None,
    split: Literal["auto", "train", "validation", "test"] = "auto",
    multiple_of: int = 4,
    crop: bool = False,
) -> list[Outcome]:
    """Add recordings to a corpus, which is created where it is missing.

    Args:
        paths: camera files, globs, or folders, which are searched for camera files and for
            sequences of numbered images.
        flat, dark: recordings (averaged) for the flat/dark correction; FILE.h5::PATH for a
            dataset. They replace those that a DXchange file holds.
        dataset, flip_rows, bit_depth, full_scale: see cameras.open_recording.
        frame_rate_hz, pixel_size_um, camera: instead of what the files say.
        split: auto gives each recording to the split furthest below its share of 0.8/0.1/0.1.
        multiple_of: divisor that height and width must have; `crop` cuts what is too much.

    Raises:
        InputError: the first bad file or option; recordings finished before it stay.
    """
    for what, value in (("frame rate", frame_rate_hz), ("pixel size", pixel_size_um)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{what} {value}: must be a number above 0")
    if multiple_of < 1:
        raise InputError(f"multiple_of {multiple_of}: must be a whole number from 1")
    if dark is not None and flat is None:
        raise InputError(f"dark field {dark}: needs a flat field beside it, give --flat")
    sources = find_recordings(paths, dataset)
    light = _field(flat)
    shade = _field(dark)
    options = {
        "dataset": dataset,
        "flat": flat and str(flat),
        "dark": dark and str(dark),
        "flip_rows": flip_rows,
        "bit_depth": bit_depth,
        "full_scale": full_scale,
        "crop": multiple_of if crop else 0,
    }

    def prepare(source: Source) -> Recording:
        # A full scale is the transmission's where a flat field is given, else the file's own.
        recording = open_files(
            source.files,
            dataset=source.dataset,
            own_flat=flat is None,
            bit_depth=bit_depth,
            full_scale=full_scale if light is None else None,
        )
        if light is not None:
            recording = transmission(recording, light, shade, full_scale)
        recording = recording.flipped() if flip_rows else recording
        return _fitted(recording, multiple_of, crop)

    outcomes = []
    with CorpusWriter(corpus, store=store) as writer:
        videos = Corpus(writer.path).videos
        for source in sources:
            fingerprint = _fingerprint(source, options)
            known = next(
                (
                    video
                    for video in videos
                    if video.info.metadata.get("fingerprint") == fingerprint
                ),
                None,
            )
            if known is not None:
                logger.info("%s: already there as %s", source.files[0], known.id)
                outcomes.append(
                    Outcome(source.files[0], "already there", known.id, known.info.split)
                )
                continue
            recording = prepare(source)
            folder = str(source.files[0].parent.resolve())
            chosen = split if split != "auto" else _split(videos, folder, source.name)
            info = {
                "camera": camera or recording.camera,
                "frame_rate_hz": frame_rate_hz or recording.frame_rate_hz,
                "pixel_size_um": pixel_size_um or recording.pixel_size_um,
                "exposure_s": recording.exposure_s,
                "bit_depth": recording.bit_depth,
                "scene": scene or "unknown",
                "split": chosen,
                "source": source.name,
                "full_scale": recording.full_scale,
                "metadata": {
                    **recording.metadata,
                    "source_folder": folder,
                    "fingerprint": fingerprint,
                },
            }
            if source.dataset:
                info["metadata"]["dataset"] = source.dataset
            outcomes.append(_add(writer, recording, _id(source, videos), info, videos))
    return outcomes


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
                files, inner = camera_files(path)
                found.append(Source(tuple(files), inner or dataset))
    for files in _group(list(dict.fromkeys(loose))):
        found.append(Source(files if len(files) > 1 else tuple(camera_files(files[0])[0]), dataset))
    return list(dict.fromkeys(_by_pixels(source) for source in found))


def _matches(path: Path | str) -> list[Path | str]:
    if Path(path).exists():
        return [path]
    return sorted(glob.glob(str(path))) or [path]  # noqa: PTH207 - Path.glob needs a root


def _inside(folder: Path) -> list[Path]:
    """Camera files under a folder; hidden ones and those of a corpus are none."""
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


def _field(path: Path | str | None) -> np.ndarray | None:
    return None if path is None else mean_frame(open_recording(path, own_flat=False))


def _fitted(recording: Recording, multiple_of: int, crop: bool) -> Recording:
    height, width = recording.shape[1:]
    fit = height - height % multiple_of, width - width % multiple_of
    if fit == (height, width):
        return recording
    if min(fit) == 0 or not crop:
        how = "" if min(fit) == 0 else f": pass --crop to cut them to {fit[0]} x {fit[1]}"
        raise InputError(
            f"{recording.path}: frames of {height} x {width} pixels are no multiples "
            f"of {multiple_of}{how}"
        )
    return recording.cropped(*fit)


def _add(
    writer: CorpusWriter, recording: Recording, id: str, info: dict[str, Any], videos: list[Video]
) -> Outcome:
    by_hash = {video.info.sha256: video for video in videos if video.lr_shape is None}
    with progress_bar(recording.path.name, recording.shape[0], "frames") as advance:
        frames = _watched(recording, by_hash, advance)
        try:
            video = writer.add(id, frames, recording.shape, recording.dtype, info)
        except _Duplicate as found:
            video = found.video
            logger.warning(
                "%s: holds the same frames as %s (from %s): skipped",
                recording.path,
                video.id,
                video.info.source,
            )
            return Outcome(recording.path, "duplicate", video.id, video.info.split)
    videos.append(video)
    logger.info(
        "%s: added as %s (%s, %s frames of %s x %s, %s bit)",
        recording.path,
        video.id,
        video.info.split,
        *video.shape,
        video.info.bit_depth,
    )
    return Outcome(recording.path, "added", video.id, video.info.split)


def _watched(
    recording: Recording, by_hash: dict[str, Video], advance: Callable[[], None]
) -> Iterator[np.ndarray]:
    """The frames; before the last one is handed on, the whole is compared with the corpus."""
    digest = hashlib.sha256()
    largest = 0
    for index, frame in enumerate(recording.frames()):
        digest.update(np.ascontiguousarray(frame, frame.dtype.newbyteorder("<")).data)
        largest = max(largest, int(frame.max()))
        if index == recording.shape[0] - 1:
            video = by_hash.get(digest.hexdigest())
            if (
                video is not None
                and video.shape == recording.shape
                and video.dtype == recording.dtype
            ):
                raise _Duplicate(video)
            if recording.bit_depth == 16 and recording.full_scale == 1 and largest < 2**14:
                logger.warning(
                    "%s: stored as 16 bit, but no value exceeds %d: if the camera has "
                    "fewer bits, state its bit depth",
                    recording.path,
                    largest,
                )
        advance()
        yield frame


def _split(videos: Sequence[Video], folder: str, name: str) -> str:
    """The split of another video of the same file, else the one furthest below its share."""
    for video in videos:
        if video.info.source == name and video.info.metadata.get("source_folder") == folder:
            return video.info.split
    counts = {part: sum(video.info.split == part for video in videos) for part in SHARES}
    return max(SHARES, key=lambda part: round(SHARES[part] * (len(videos) + 1) - counts[part], 9))


def _id(source: Source, videos: Sequence[Video]) -> str:
    """A name made of the file's, unused in the corpus."""
    key = images.name_key(source.files[0]) if len(source.files) > 1 else None
    name = source.files[0].stem
    if key is not None:
        name = key[0].strip("._- ") or source.files[0].parent.resolve().name
    if source.dataset:
        name += f"-{source.dataset}"
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._") or "video"
    taken = {video.id for video in videos}
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    return unique


def _fingerprint(source: Source, options: dict[str, Any]) -> str:
    """The same for the same files, unchanged, ingested with the same options."""
    with guarded(str(source.files[0])):
        state = [
            (file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in source.files
        ]
    told = json.dumps([state, {**options, "dataset": source.dataset}])
    return hashlib.sha256(told.encode()).hexdigest()[:16]
