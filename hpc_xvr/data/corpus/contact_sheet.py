"""A picture of what is in a corpus: a few small frames of each recording."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hpc_xvr.data.corpus.reader import Corpus, Video
from hpc_xvr.errors import InputError
from hpc_xvr.files import replacing
from hpc_xvr.log import track

PER_PAGE = 48
COLUMNS = 3
SIDE = 150
"""Pixels of a small frame's longer side, and the 4 between two."""
DPI, HEAD, TEXT, GAP = 100, 35, 36, 12
"""Dots an inch; pixels for the title, the two lines over a recording, and between recordings."""
COLOURS = {"train": "0.25", "validation": "tab:blue", "test": "tab:red"}


def contact_sheet(corpus: Corpus, file: Path, everything: bool = False) -> list[Path]:
    """Write first, middle and last frame of recordings, and the middle one of the second camera.

    Of more than PER_PAGE recordings as many are shown, spread evenly, or with `everything` all of
    them on several pages (FILE-1.png, ...). Returns the files.

    Raises:
        InputError: the name is not that of a PNG, or the corpus is empty.
    """
    if file.suffix.lower() != ".png":
        raise InputError(f"contact sheet {file}: is written as PNG: give a name that ends in .png")
    videos: Sequence[Video] = corpus.videos
    if not videos:
        raise InputError(f"corpus {corpus.path}: holds no recordings to show")
    total = len(videos)
    if total > PER_PAGE and not everything:
        videos = [videos[round(i)] for i in np.linspace(0, total - 1, PER_PAGE)]
    pages = math.ceil(len(videos) / PER_PAGE)
    written = []
    for page in track(range(pages), "contact sheet", unit="pages"):
        shown = videos[page * PER_PAGE : (page + 1) * PER_PAGE]
        name = f"{file.stem}-{page + 1}{file.suffix}" if pages > 1 else file.name
        title = f"{corpus.path.resolve().name}: {len(videos)} of {total} recordings"
        title += f", page {page + 1} of {pages}" if pages > 1 else ""
        written.append(file.with_name(name))
        _draw(shown, title, written[-1])
    return written


def _draw(videos: Sequence[Video], title: str, file: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    columns = min(COLUMNS, len(videos))
    rows = math.ceil(len(videos) / columns)
    slots = 4 if any(video.lr_shape for video in videos) else 3
    strips = [_strip(video, slots) for video in videos]
    tall = [
        max(strip.shape[0] for strip in strips[row * columns : (row + 1) * columns])
        for row in range(rows)
    ]
    wide, high = columns * (slots * SIDE + GAP) + GAP, HEAD + sum(tall) + rows * (TEXT + GAP)
    figure = Figure(figsize=(wide / DPI, high / DPI), dpi=DPI)
    figure.text(GAP / wide, 1 - 22 / high, title, size=10, weight="bold")
    page = np.ones((high, wide), np.float32)
    top = HEAD
    for row in range(rows):
        for column in range(min(columns, len(videos) - row * columns)):
            number = row * columns + column
            video, strip = videos[number], strips[number]
            left = GAP + column * (slots * SIDE + GAP)
            page[top + TEXT :, left:][: strip.shape[0], : strip.shape[1]] = strip
            figure.text(
                left / wide,
                1 - (top + TEXT - 4) / high,
                _caption(video),
                size=7,
                color=COLOURS[video.split],
                linespacing=1.25,
            )
        top += TEXT + tall[row] + GAP
    figure.figimage(page, cmap="gray", vmin=0, vmax=1)
    with replacing(file) as beside:
        figure.savefig(beside, format="png")


def _caption(video: Video) -> str:
    info = video.info
    facts = ["x".join(map(str, video.shape)), f"{info.bit_depth} bit"]
    if info.frame_rate_hz:
        facts.append(f"{info.frame_rate_hz / 1e3:g} kHz")
    if info.pixel_size_um:
        facts.append(f"{info.pixel_size_um:g} um")
    if video.lr_shape:
        facts.append("lr " + "x".join(map(str, video.lr_shape)))
    id = video.id if len(video.id) <= 48 else f"{video.id[:45]}..."
    return f"{id}   {video.split}   {info.scene}\n{', '.join(facts)}"


def _strip(video: Video, slots: int) -> np.ndarray:
    """Small frames side by side, white between them; 0..1."""
    last = video.shape[0] - 1
    try:
        sharp = [_small(video.read(t)) for t in (0, last // 2, last)]
        parts = _stretched(sharp)
        if video.lr_shape:
            parts += _stretched([_small(video.read_lr(video.lr_shape[0] // 2))])
    except InputError:
        return _cross(slots)
    strip = np.ones((max(part.shape[0] for part in parts), slots * SIDE), np.float32)
    for slot, part in enumerate(parts):
        strip[: part.shape[0], slot * SIDE : slot * SIDE + part.shape[1]] = part
    return strip


def _small(frame: np.ndarray) -> np.ndarray:
    """The frame with SIDE - 4 pixels along its longer side."""
    zoom = (SIDE - 4) / max(frame.shape)
    height, width = (max(1, round(side * zoom)) for side in frame.shape)
    how = Image.Resampling.BOX if zoom < 1 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(frame.astype(np.float32)).resize((width, height), how))


def _stretched(frames: list[np.ndarray]) -> list[np.ndarray]:
    """Grey levels of all frames alike: the darkest and brightest 0.5 % are cut."""
    low, high = np.percentile(np.concatenate([frame.ravel() for frame in frames]), (0.5, 99.5))
    return [np.clip((frame - low) / max(high - low, 1e-6), 0, 1) for frame in frames]


def _cross(slots: int) -> np.ndarray:
    """For a recording that cannot be read."""
    y, x = np.mgrid[: SIDE // 2, : slots * SIDE]
    bar = np.abs(x / (slots * SIDE) - y / (SIDE // 2)) < 0.02
    return np.where(bar | bar[:, ::-1], 0.0, 0.9).astype(np.float32)
