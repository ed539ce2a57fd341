"""Write reconstructed frames to one file: TIFF stack, DXchange HDF5, or a small movie to look at.

A file appears under its name only when it is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import tifffile
from PIL import Image, ImageDraw, ImageFont

from hpc_xvr.errors import InputError, PassingError
from hpc_xvr.files import check_folder, replacing

FULL = 65535
TIFF_LIMIT = 2**32 - 2**26  # bytes of pixels; a classic TIFF addresses 4 GiB
MOVIE_FRAMES = 60
MOVIE_WIDTH = {".gif": 720, ".webp": 1000, ".png": 1000}  # noise hardly compresses in a GIF
GIF_GREYS = 64
STRIP_FRAMES = 6


@dataclass(frozen=True)
class Calibration:
    """Units of a sequence's times, lengths and intensities; what is unknown is None."""

    frame_rate_hz: float | None = None
    pixel_size_um: float | None = None
    full_scale: float = 1.0
    """Physical value (for example transmission) of intensity 1, stored as 65535."""
    unit: str = ""
    """Of `full_scale`: counts of the sharp camera, or empty for transmissions and the unit of a
    floating-point file."""
    times_s: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Time of each frame of the fast recording from its first one, where it has time stamps."""
    notes: tuple[str, ...] = ()
    """What was done to the recordings beforehand, a line each."""


def check_sequence(path: Path) -> None:
    """Refuse a path that `write_sequence` could not write, before the frames are computed.

    Raises:
        InputError: unknown suffix or missing folder.
    """
    if path.suffix.lower() not in SEQUENCE_WRITERS:
        raise InputError(
            f"{path}: unknown format {path.suffix or '(no suffix)'}; end the name in "
            f"one of {', '.join(SEQUENCE_WRITERS)}"
        )
    check_folder(path)


def write_sequence(
    path: Path | str,
    frames: Iterable[np.ndarray],
    count: int,
    calibration: Calibration = Calibration(),
    first_frame: int = 0,
    dtype: Literal["uint16", "float32"] = "uint16",
) -> Path:
    """Write `count` frames (H, W) in [0, 1], one frame in memory at a time.

    Args:
        path: `.tif` or `.tiff` for one stack, which ImageJ opens with its scale and frame rate
            (BigTIFF beyond 4 GB); `.h5` or `.hdf5` for DXchange, the stack being /exchange/data.
        calibration: stored with the frames.
        first_frame: index of the first frame in the fast recording, stored too.
        dtype: uint16 stores intensities as 0..65535 and what 65535 stands for; float32 stores
            physical values (transmission, counts), nothing cut off.

    Raises:
        InputError: unknown suffix, missing folder, full disk, a frame of another size or with
            values that are not finite, or a number of frames other than `count`.
    """
    path = Path(path)
    check_sequence(path)
    writer = SEQUENCE_WRITERS[path.suffix.lower()]
    frames = iter(frames)
    with replacing(path) as beside:
        first = next(frames, None)
        if first is None:
            raise InputError(f"{path}: there are no frames to write")
        shape = (count, *first.shape)
        kind = np.dtype(dtype)
        free, needed = shutil.disk_usage(path.parent).free, kind.itemsize * int(np.prod(shape))
        if needed > free:
            raise PassingError(
                f"{path}: needs {needed / 1e9:.2f} GB, {path.parent} has "
                f"{free / 1e9:.2f} GB left; choose another disk"
            )
        writer(
            beside,
            _stored(chain([first], frames), shape, path, kind, calibration.full_scale),
            shape,
            kind,
            calibration,
            first_frame,
        )
    return path


def _stored(
    frames: Iterable[np.ndarray],
    shape: tuple[int, int, int],
    path: Path,
    kind: np.dtype,
    full_scale: float,
) -> Iterator[np.ndarray]:
    done = 0
    for i, frame in enumerate(frames):
        if i >= shape[0]:
            raise InputError(f"{path}: more than the expected {shape[0]} frames came")
        if frame.shape != shape[1:]:
            raise InputError(
                f"{path}: frame {i} is {frame.shape}, the first one {shape[1:]}; all "
                "frames must have one size"
            )
        if not np.isfinite(frame).all():
            raise InputError(f"{path}: frame {i} holds values that are not finite")
        if kind.kind == "f":
            yield (frame * full_scale).astype(kind)
        else:
            yield np.rint(np.clip(frame, 0, 1) * FULL).astype(kind)
        done = i + 1
    if done != shape[0]:
        raise InputError(f"{path}: only {done} of the expected {shape[0]} frames came")


def _write_tiff(
    path: Path,
    frames: Iterator[np.ndarray],
    shape: tuple[int, int, int],
    kind: np.dtype,
    calibration: Calibration,
    first_frame: int,
) -> None:
    big = kind.itemsize * int(np.prod(shape)) > TIFF_LIMIT
    metadata: dict[str, object] = {
        "axes": "TYX",
        "Info": (  # shown by ImageJ's Show Info
            "\n".join(
                (
                    f"first frame: {first_frame}",
                    _meaning(kind, calibration),
                    *calibration.notes,
                    *_lost(calibration, first_frame, shape[0]),
                )
            )
        ),
    }
    if kind.kind == "u":
        # ImageJ's calibration function: it shows values, not the numbers that stand for them.
        metadata |= {"cf": 0, "c0": 0.0, "c1": calibration.full_scale / FULL}
        metadata["vunit"] = calibration.unit or "Gray Value"
    resolution: tuple[float, float] | None = None
    if calibration.frame_rate_hz:
        metadata |= {"fps": calibration.frame_rate_hz, "finterval": 1 / calibration.frame_rate_hz}
    if calibration.pixel_size_um:
        # A TIFF resolution counts pixels per unit; ImageJ reads the unit from the metadata.
        metadata["unit"] = "um"
        resolution = (1 / calibration.pixel_size_um, 1 / calibration.pixel_size_um)
    with tifffile.TiffWriter(path, bigtiff=big, imagej=not big) as file:
        file.write(
            frames,
            shape=shape,
            dtype=kind,
            photometric="minisblack",
            metadata=metadata,
            resolution=resolution,
        )


def _meaning(kind: np.dtype, calibration: Calibration) -> str:
    if kind.kind == "f":
        return f"values: {calibration.unit or 'physical, as the recordings'}"
    return f"value of {FULL}: {calibration.full_scale:g} {calibration.unit}".rstrip()


def _lost(calibration: Calibration, first: int, count: int) -> list[str]:
    """A line that gives the frames' times where they are not equally spaced."""
    if calibration.times_s is None:
        return []
    times = calibration.times_s[first : first + count]
    steps = np.diff(times)
    if len(steps) == 0 or steps.max() < 1.5 * np.median(steps):
        return []
    told = " ".join(f"{t:.9g}" for t in times - calibration.times_s[0])
    return [f"times in s, not equally spaced as the fast camera lost frames: {told}"]


def _write_hdf5(
    path: Path,
    frames: Iterator[np.ndarray],
    shape: tuple[int, int, int],
    kind: np.dtype,
    calibration: Calibration,
    first_frame: int,
) -> None:
    with h5py.File(path, "w") as file:
        file["implements"] = "exchange"
        data = file.create_dataset("exchange/data", shape, kind, chunks=(1, *shape[1:]))
        data.attrs["axes"] = "time:y:x"
        data.attrs["first_frame"] = first_frame
        if kind.kind == "u":
            data.attrs["full_scale"] = calibration.full_scale
            data.attrs["stored_full_scale"] = FULL
        if calibration.unit:
            data.attrs["units"] = calibration.unit
        if calibration.notes:
            data.attrs["notes"] = "\n".join(calibration.notes)
        if calibration.frame_rate_hz:
            data.attrs["frame_rate_hz"] = calibration.frame_rate_hz
        if calibration.pixel_size_um:
            data.attrs["pixel_size_um"] = calibration.pixel_size_um
        if calibration.times_s is not None:
            times = calibration.times_s[first_frame : first_frame + shape[0]]
            file["exchange/time"] = times
            file["exchange/time"].attrs["units"] = "s"
        for i, frame in enumerate(frames):
            data[i] = frame


SequenceWriter = Callable[
    [Path, Iterator[np.ndarray], tuple[int, int, int], np.dtype, Calibration, int], None
]
SEQUENCE_WRITERS: dict[str, SequenceWriter] = {
    ".tif": _write_tiff,
    ".tiff": _write_tiff,
    ".h5": _write_hdf5,
    ".hdf5": _write_hdf5,
}


def write_movie(
    path: Path | str, frames: Iterable[Sequence[np.ndarray]], fps: float, labels: Sequence[str]
) -> Path:
    """Write a small movie to look at: the panels of each frame side by side (wide ones stacked).

    All panels share one grey scale. Long sequences are thinned to at most 60 frames, played at the
    same speed.

    Args:
        path: `.gif` or `.webp` for an animation, `.png` for a strip of up to six frames.
        frames: for each frame one array (h, w) in [0, 1] per label; smaller ones are interpolated
            to the size of the largest.
        fps: frames of the sequence per second of the movie.
        labels: of the panels.

    Raises:
        InputError: unknown suffix, no frames, missing folder or full disk.
    """
    path = Path(path)
    check_movie(path)
    kind = path.suffix.lower()
    shown, stride = _thinned(
        frames, STRIP_FRAMES if kind == ".png" else MOVIE_FRAMES, labels, MOVIE_WIDTH[kind]
    )
    if not shown:
        raise InputError(f"{path}: there are no frames to show")
    low, high = np.percentile(
        np.stack([panel for _, panels in shown for panel in panels[1:]] or [shown[0][1][0]]),
        (0.2, 99.8),
    )
    greys = GIF_GREYS if kind == ".gif" else 256
    sheets = [
        _sheet(panels, labels, f"frame {i}", low, max(high - low, 1e-6), greys)
        for i, panels in shown
    ]
    with replacing(path) as beside:
        if kind == ".png":
            _strip(sheets).save(beside)
        else:
            options = {"quality": 75, "method": 4} if kind == ".webp" else {"optimize": True}
            sheets[0].save(
                beside,
                save_all=True,
                append_images=sheets[1:],
                loop=0,
                duration=max(round(1000 * stride / fps), 20),
                **options,
            )
    return path


def check_movie(path: Path) -> None:
    """Refuse a path that `write_movie` could not write, before the frames are computed.

    Raises:
        InputError: unknown suffix or missing folder.
    """
    if path.suffix.lower() not in (".gif", ".webp", ".png"):
        raise InputError(
            f"{path}: unknown movie format {path.suffix or '(no suffix)'}; end the "
            "name in .gif, .webp or .png"
        )
    check_folder(path)


def _thinned(
    frames: Iterable[Sequence[np.ndarray]], limit: int, labels: Sequence[str], width: int
) -> tuple[list[tuple[int, list[np.ndarray]]], int]:
    """Every stride-th frame, at most `limit`, already reduced to the size of their panels."""
    kept: list[tuple[int, list[np.ndarray]]] = []
    stride = 1
    for i, panels in enumerate(frames):
        if i % stride:
            continue
        if len(panels) != len(labels):
            raise ValueError(f"frame {i} has {len(panels)} panels for {len(labels)} labels")
        kept.append((i, _one_size(panels, width)))
        if len(kept) > limit:
            kept, stride = kept[::2], 2 * stride
    return kept, stride


def _one_size(panels: Sequence[np.ndarray], room: int) -> list[np.ndarray]:
    height, width = max(panel.shape for panel in panels)
    columns = 1 if _stacked(height, width) else len(panels)
    factor = min((room // columns - 4) / width, 2.0)
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    out = []
    for panel in panels:
        image = Image.fromarray(np.asarray(panel, np.float32))
        # In two steps, so that what is shown is the interpolation a method would be given.
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        out.append(np.asarray(image.resize(size, Image.Resampling.BICUBIC)))
    return out


def _stacked(height: int, width: int) -> bool:
    return width > 2 * height


def _sheet(
    panels: Sequence[np.ndarray],
    labels: Sequence[str],
    note: str,
    low: float,
    span: float,
    greys: int,
) -> Image.Image:
    height, width = panels[0].shape
    band, line = 22, 4
    font = ImageFont.load_default(size=13)
    stacked = _stacked(height, width)
    columns, rows = (1, len(panels)) if stacked else (len(panels), 1)
    sheet = Image.new(
        "L", (columns * (width + line) - line, rows * (height + band + line) - line), 255
    )
    draw = ImageDraw.Draw(sheet)
    for i, (panel, label) in enumerate(zip(panels, labels, strict=True)):
        x, y = (0, i * (height + band + line)) if stacked else (i * (width + line), 0)
        level = np.rint(np.clip((panel - low) / span, 0, 1) * (greys - 1))
        grey = Image.fromarray((level * (255 / (greys - 1))).astype(np.uint8))
        sheet.paste(grey, (x, y + band))
        draw.text((x + 4, y + 3), label, fill=0, font=font)
    room = width - draw.textlength(labels[-1 if not stacked else 0], font=font) - 12
    if draw.textlength(note, font=font) < room:
        draw.text((sheet.width - 4, 3), note, fill=110, font=font, anchor="ra")
    return sheet


def _strip(sheets: Sequence[Image.Image]) -> Image.Image:
    width, height = sheets[0].size
    strip = Image.new("L", (width, len(sheets) * (height + 4) - 4), 255)
    for i, sheet in enumerate(sheets):
        strip.paste(sheet, (0, i * (height + 4)))
    return strip
