"""Small movies to look at: MP4, GIF, WebP, or a strip of pictures as PNG, with panels side by side,
a scale bar and the time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from hpc_xvr.errors import InputError
from hpc_xvr.files import check_folder, replacing
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.writers.about import UNKNOWN, Calibration
from hpc_xvr.text import printable

MOVIE_FRAMES = 60
MOVIE_WIDTH = {".mp4": 1280, ".gif": 720, ".webp": 1000, ".png": 1000}
"""Noise hardly compresses in a GIF."""
GIF_GREYS = 64
STRIP_FRAMES = 6
SAMPLE = 24
"""First frames of an MP4, which settle its grey scale."""
OUTSIDE = 0.02
"""Share of later pixels beyond that scale which is worth a warning; it leaves out 0.004 itself."""
CRF = "20"
"""Quality of x264: hardly told from the original."""
BAND, LINE = 22, 4
"""Rows for a label, and between panels."""
BAR = 0.25
"""Longest scale bar, of the width of a panel."""


class Doubt(NamedTuple):
    """Something in a frame that is not to be believed, to be marked."""

    panel: int
    """Number of the panel that shows it."""
    text: str
    """What is wrong, in two or three words."""
    place: tuple[int, int]
    """Row and column of its middle, in pixels of the largest panel."""
    side: int
    """Of the square around it, in the same."""


class Movie:
    """Takes the frames of a movie in turn; made by `open_movie`."""

    limit: int | None = MOVIE_FRAMES
    """Frames that are kept; None: all."""

    def __init__(
        self, path: Path, fps: float, labels: Sequence[str], calibration: Calibration, comment: str
    ) -> None:
        self._path, self._kind, self._fps = path, path.suffix.lower(), fps
        self._labels = [printable(label) for label in labels]
        self._calibration, self._comment = calibration, printable(comment)
        self._seen, self._stride = 0, 1
        self._kept: list[_Kept] = []
        self._enlarged = 1.0
        if self._kind == ".png":
            self.limit = STRIP_FRAMES

    @property
    def wanted(self) -> bool:
        """Whether the next frame will be kept; one that will not need not be made."""
        return self._seen % self._stride == 0

    @property
    def marked(self) -> list[int]:
        """Numbers of the frames with a doubt that the movie shows."""
        return [kept.number for kept in self._kept if kept.doubt]

    def add(
        self,
        panels: Sequence[np.ndarray] | None,
        number: int | None = None,
        doubt: Doubt | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        """The next frame: one array (h, w) in [0, 1] a label, or None if it is not wanted.

        Args:
            number: of the frame in the fast recording; default: how many came before.
            doubt: what is marked: the label on black, and a square around the place.
            labels: of this frame's panels, where they are others.
        """
        wanted, number = self.wanted, self._seen if number is None else number
        self._seen += 1
        if not wanted or panels is None:
            return
        if len(panels) != len(self._labels):
            raise ValueError(
                f"frame {number} has {len(panels)} panels for {len(self._labels)} labels"
            )
        reduced, self._enlarged = _one_size(panels, MOVIE_WIDTH[self._kind])
        told = self._labels if labels is None else [printable(label) for label in labels]
        self._take(_Kept(number, reduced, doubt, told))

    def _take(self, kept: _Kept) -> None:
        self._kept.append(kept)
        if self.limit is not None and len(self._kept) > self.limit:
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    def finish(self, beside: Path) -> None:
        """Write what was taken to a file.

        Raises:
            InputError: there are no frames.
        """
        levels = self._levels()
        greys = GIF_GREYS if self._kind == ".gif" else 256
        sheets = [self._sheet(kept, levels, greys) for kept in self._kept]
        if self._kind == ".png":
            told = PngImagePlugin.PngInfo()
            told.add_text("Comment", self._comment)
            _strip(sheets).save(beside, pnginfo=told)
            return
        options: dict[str, Any] = {"optimize": True, "comment": self._comment.encode()}
        if self._kind == ".webp":
            exif = Image.Exif()
            exif[0x010E] = self._comment  # ImageDescription
            options = {"quality": 75, "method": 4, "exif": exif}
        sheets[0].save(
            beside,
            save_all=True,
            append_images=sheets[1:],
            loop=0,
            duration=max(round(1000 * self._stride / self._fps), 20),
            **options,
        )

    def _levels(self) -> tuple[float, float]:
        """Black and white: of the last panels, as the first one may be of another camera."""
        if not self._kept:
            raise InputError(f"{self._path}: there are no frames to show")
        shown = [panel for kept in self._kept for panel in kept.panels[1:]]
        stack = np.stack(shown or [kept.panels[0] for kept in self._kept])
        low, high = np.percentile(stack, (0.2, 99.8))
        return float(low), float(max(high, low + 1e-6))

    def _sheet(self, kept: _Kept, levels: tuple[float, float], greys: int) -> Image.Image:
        """The panels of a frame with their labels, the scale bar in the last one."""
        number, panels, doubt, labels = kept
        height, width = panels[0].shape
        font = _font()
        stacked = _stacked(height, width)
        columns, rows = (1, len(panels)) if stacked else (len(panels), 1)
        sheet = Image.new(
            "L", (columns * (width + LINE) - LINE, rows * (height + BAND + LINE) - LINE), 255
        )
        draw = ImageDraw.Draw(sheet)
        note = self._note(number)
        corner = 0 if stacked else len(panels) - 1  # number of the panel whose band has the note
        x = y = 0
        for i, (panel, label) in enumerate(zip(panels, labels, strict=True)):
            x, y = (0, i * (height + BAND + LINE)) if stacked else (i * (width + LINE), 0)
            level = np.rint(
                np.clip((panel - levels[0]) / (levels[1] - levels[0]), 0, 1) * (greys - 1)
            )
            grey = Image.fromarray((level * (255 / (greys - 1))).astype(np.uint8))
            sheet.paste(grey, (x, y + BAND))
            wordings, inks = [label], (0, 90)
            if doubt and doubt.panel == i:
                _mark(draw, doubt, (x, y + BAND, width, height), self._enlarged)
                wordings, inks = [f"{label}: {doubt.text}", doubt.text], (255, 190)
            notes = [note, note.partition(", ")[2], ""] if i == corner else [""]
            text, beside = _fitting(draw, wordings, notes, width)
            draw.text((x + 4, y + 3), text, fill=inks[0], font=font)
            draw.text((x + width - 4, y + 3), beside, fill=inks[1], font=font, anchor="ra")
        if self._calibration.pixel_size_um:
            size = self._calibration.pixel_size_um / self._enlarged
            _scale_bar(draw, (x, y + BAND, width, height), size, font)
        return sheet

    def _note(self, number: int) -> str:
        """Number and time of a frame."""
        times, rate = self._calibration.times_s, self._calibration.frame_rate_hz
        if times is not None and len(times) > 1 and number < len(times):
            return (
                f"frame {number}, {_time(float(times[number]), float(np.median(np.diff(times))))}"
            )
        return f"frame {number}, {_time(number / rate, 1 / rate)}" if rate else f"frame {number}"


class _Film(Movie):
    """An MP4, encoded as the frames come: memory for SAMPLE of them."""

    limit = None

    def __init__(self, beside: Path, *about: Any) -> None:
        super().__init__(*about)
        import av

        self._file = av.open(str(beside), "w", format="mp4", options={"movflags": "+faststart"})
        self._stream: Any = None
        self._range: tuple[float, float] | None = None
        self._outside = self._pixels = 0
        self._marked: list[int] = []

    @property
    def marked(self) -> list[int]:
        return [*self._marked, *super().marked]

    def _take(self, kept: _Kept) -> None:
        self._kept.append(kept)
        if self._range is None and len(self._kept) < SAMPLE:
            return
        self._encode()

    def _encode(self) -> None:
        if self._range is None:
            low, high = self._levels()
            spare = 0.05 * (high - low)  # later frames may be brighter or darker
            self._range = low - spare, high + spare
        low, high = self._range
        for kept in self._kept:
            last = kept.panels[-1]
            self._outside += int(np.count_nonzero((last < low) | (last > high)))
            self._pixels += last.size
            grey = np.asarray(self._sheet(kept, self._range, 256))
            grey = np.pad(grey, [(0, n % 2) for n in grey.shape], constant_values=255)
            self._send(np.stack([grey] * 3, -1))
        self._marked = self.marked
        self._kept = []

    def _send(self, picture: np.ndarray) -> None:
        import av

        if self._stream is None:
            rate = Fraction(self._fps).limit_denominator(1000)
            self._stream = self._file.add_stream(
                "libx264", rate=rate, options={"crf": CRF, "preset": "medium"}
            )
            self._stream.height, self._stream.width = picture.shape[:2]
            self._stream.pix_fmt = "yuv420p"  # what every player and browser shows
            self._file.metadata.update({"title": self._path.stem, "comment": self._comment})
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        self._file.mux(self._stream.encode(frame))

    def finish(self, beside: Path) -> None:
        if self._kept or self._stream is None:
            self._encode()
        self._file.mux(self._stream.encode(None))
        self._file.close()
        if self._outside > OUTSIDE * self._pixels:
            logger.warning(
                "%s: %.0f %% of the pixels are brighter or darker than its grey scale, which the "
                "first %d frames settle",
                *(self._path, 100 * self._outside / self._pixels, SAMPLE),
            )

    def close(self) -> None:
        """Let go of a film that is not finished."""
        with contextlib.suppress(Exception):
            self._file.close()


class _Kept(NamedTuple):
    """A frame that is shown."""

    number: int
    panels: list[np.ndarray]
    doubt: Doubt | None
    labels: Sequence[str]


@contextlib.contextmanager
def open_movie(
    path: Path | str,
    fps: float,
    labels: Sequence[str],
    *,
    calibration: Calibration = UNKNOWN,
    comment: str = "",
) -> Iterator[Movie]:
    """A movie whose frames are added one by one; the file appears at the end. See `write_movie`."""
    path = Path(path)
    check_movie(path)
    with replacing(path) as beside:
        if path.suffix.lower() != ".mp4":
            movie = Movie(path, fps, labels, calibration, comment)
            yield movie
            movie.finish(beside)
            return
        film = _Film(beside, path, fps, labels, calibration, comment)
        try:
            yield film
            film.finish(beside)
        finally:
            film.close()


def write_movie(
    path: Path | str,
    frames: Iterable[Sequence[np.ndarray]],
    fps: float,
    labels: Sequence[str],
    *,
    calibration: Calibration = UNKNOWN,
    first_frame: int = 0,
    comment: str = "",
) -> Path:
    """Write a small movie to look at: the panels of each frame side by side (wide ones stacked).

    All panels share one grey scale. MP4 has all frames, its grey scale is that of the first ones;
    of the others long sequences are thinned to at most 60 frames, played at the same speed.

    Args:
        path: `.mp4` (H.264; needs the package av), `.gif` or `.webp` for an animation, `.png` for a
            strip of up to six frames.
        frames: for each frame one array (h, w) in [0, 1] per label; smaller ones are interpolated
            to the size of the largest.
        fps: frames of the sequence per second of the movie.
        labels: of the panels.
        calibration: pixel size of the largest panels, for a scale bar; rate or times of the frames.
        first_frame: index of the first frame in the fast recording.
        comment: stored in the file.

    Raises:
        InputError: unknown suffix, no frames, missing folder or full disk; MP4 without av.
    """
    with open_movie(path, fps, labels, calibration=calibration, comment=comment) as movie:
        for number, panels in enumerate(frames, first_frame):
            movie.add(panels, number)
    return Path(path)


def frames_shown(path: Path, frames: range, keys: Collection[int]) -> range:
    """Which frames of a reconstruction a movie of this kind shows: MP4 all, others so few that they
    fit, evenly spread; and as few key frames among them as may be, which are as they were recorded
    and show nothing of the reconstruction.

    Args:
        frames: numbers of those that there are.
        keys: numbers of the key frames.
    """
    kind = path.suffix.lower()
    limit = STRIP_FRAMES if kind == ".png" else MOVIE_FRAMES
    least = -(-len(frames) // limit)
    if kind == ".mp4" or least <= 1:
        return frames
    spread = [frames[start::step] for step in range(least, least + 4) for start in (0, step // 2)]
    return min(spread, key=lambda some: (sum(t in keys for t in some) / len(some), some.step))


def check_movie(path: Path) -> None:
    """Refuse a path that `write_movie` could not write, before the frames are computed.

    Raises:
        InputError: unknown suffix or missing folder; MP4 without the package av.
    """
    suffix = path.suffix.lower()
    if suffix not in MOVIE_WIDTH:
        raise InputError(
            f"{path}: unknown movie format {path.suffix or '(no suffix)'}; end the "
            "name in .mp4, .gif, .webp or .png"
        )
    if suffix == ".mp4":
        try:
            import av  # noqa: F401
        except ImportError:
            raise InputError(
                f"{path}: MP4 needs the Python package av: pip install 'hpc_xvr[movie]', or end "
                "the name in .webp"
            ) from None
    check_folder(path)


def _one_size(panels: Sequence[np.ndarray], room: int) -> tuple[list[np.ndarray], float]:
    """The panels in one size that fits, and how many of its pixels one of the largest makes."""
    height, width = (max(sides) for sides in zip(*(panel.shape for panel in panels), strict=True))
    columns = 1 if _stacked(height, width) else len(panels)
    factor = min((room // columns - LINE) / width, 2.0)
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    out = []
    for panel in panels:
        image = Image.fromarray(np.asarray(panel, np.float32))
        # In two steps, so that what is shown is the interpolation a method would be given.
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        out.append(np.asarray(image.resize(size, Image.Resampling.BICUBIC)))
    return out, size[0] / width


@cache
def _font() -> Any:
    """Matplotlib's: Pillow's own has no µ."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 12)


def _stacked(height: int, width: int) -> bool:
    return width > 2 * height


def _fitting(
    draw: ImageDraw.ImageDraw, wordings: Sequence[str], notes: Sequence[str], width: int
) -> tuple[str, str]:
    """A wording and a note that fit into a band side by side, the first ones that do: rather a
    short wording than no note. Where nothing fits, the last wording alone."""
    pairs = [(wording, note) for note in notes for wording in wordings]

    def fits(pair: tuple[str, str]) -> bool:
        return sum(draw.textlength(text, font=_font()) for text in pair) < width - 16

    return next(filter(fits, pairs), (wordings[-1], ""))


def _mark(
    draw: ImageDraw.ImageDraw, doubt: Doubt, box: tuple[int, int, int, int], enlarged: float
) -> None:
    """Blacken the band over a panel (x, y, w, h), and draw a square around the place in it."""
    x, y, width, height = box
    draw.rectangle((x, y - BAND, x + width - 1, y - 1), fill=0)
    half = max(doubt.side * enlarged / 2, 8.0)
    middle = [(place + 0.5) * enlarged for place in doubt.place]
    top, left = (round(m - half) for m in middle)
    bottom, right = (round(m + half) for m in middle)
    for grow, grey in ((1, 0), (0, 255), (-1, 0)):  # seen on any grey
        draw.rectangle(
            (
                x + min(max(left - grow, 0), width - 1),
                y + min(max(top - grow, 0), height - 1),
                x + max(min(right + grow, width - 1), 0),
                y + max(min(bottom + grow, height - 1), 0),
            ),
            outline=grey,
        )


def _scale_bar(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], pixel_um: float, font: Any
) -> None:
    """A bar of 1, 2 or 5 times a power of ten in the lower left corner of a panel (x, y, w, h)."""
    x, y, width, height = box
    longest = BAR * width * pixel_um
    power = 10.0 ** math.floor(math.log10(longest))
    length = max(step * power for step in (1, 2, 5) if step * power <= longest)
    pixels = round(length / pixel_um)
    thick, margin = 4, 8
    if pixels < 8 or height < 48:
        return
    left, top = x + margin, y + height - margin - thick
    draw.rectangle((left - 1, top - 1, left + pixels, top + thick), fill=0)
    draw.rectangle((left, top, left + pixels - 1, top + thick - 1), fill=255)
    draw.text(
        (left, top - 4), _length(length), fill=255, font=font, anchor="ls",
        stroke_width=2, stroke_fill=0,
    )  # fmt: skip


def _length(um: float) -> str:
    for factor, unit in ((1e3, "mm"), (1.0, "µm"), (1e-3, "nm")):
        if um >= factor:
            return f"{um / factor:g} {unit}"
    return f"{um * 1e3:g} nm"


def _time(seconds: float, interval: float) -> str:
    """A time with as many digits as tell neighbouring frames apart."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")):
        if interval >= 0.01 * factor:
            digits = max(0, math.ceil(-math.log10(interval / factor)) + 1)
            return f"{seconds / factor:.{digits}f} {unit}"
    return f"{seconds:.3e} s"


def _strip(sheets: Sequence[Image.Image]) -> Image.Image:
    width, height = sheets[0].size
    strip = Image.new("L", (width, len(sheets) * (height + LINE) - LINE), 255)
    for i, sheet in enumerate(sheets):
        strip.paste(sheet, (0, i * (height + LINE)))
    return strip
