"""One call for all formats of results."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from hpc_xvr.data.cameras import ome_zarr as ome_zarr_reader
from hpc_xvr.data.cameras.results import PROGRAM
from hpc_xvr.errors import InputError, PassingError
from hpc_xvr.files import check_folder, check_replaceable, replacing, replacing_folder, write_atomic
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.writers import hdf5, images, nexus, ome_zarr, tiff
from hpc_xvr.reconstruction.writers.about import FULL, UNKNOWN, Calibration, Provenance, Result
from hpc_xvr.text import printable

WORTH_TELLING = 1e-3
"""Share of values that are cut of which a warning tells."""
Dtype = Literal["uint16", "float32", "original"]


class Format(NamedTuple):
    """A kind of result."""

    write: Callable[[Path, Result], None]
    holds_maps: bool = False
    ours: Callable[[Path], bool] | None = None
    """Of a folder: whether it is a result of ours and nothing else, so may be replaced."""


_TIFF, _HDF5, _NEXUS = Format(tiff.write), Format(hdf5.write, True), Format(nexus.write, True)
_ZARR = Format(ome_zarr.write, True, ome_zarr.is_result)
SEQUENCE_FORMATS: dict[str, Format] = {
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".h5": _HDF5,
    ".hdf5": _HDF5,
    ".nxs": _NEXUS,
    **dict.fromkeys(ome_zarr_reader.SUFFIXES, _ZARR),
    "": Format(images.write, False, images.is_result),
}
"""By the suffix of the name; none: a folder of PNG."""


def check_sequence(path: Path, dtype: Dtype = "uint16") -> None:
    """Refuse a path that `write_sequence` could not write, before the frames are computed.

    Raises:
        InputError: unknown suffix, missing folder, a folder in the way that is no result, or
            numbers that the format does not have.
    """
    kind = _format(path)
    if dtype not in get_args(Dtype):
        raise InputError(f"dtype {dtype}: choose from {', '.join(get_args(Dtype))}")
    if kind.write is images.write and dtype == "float32":
        raise InputError(f"{path}: {images.NO_FLOATS}")
    check_folder(path) if kind.ours is None else check_replaceable(path, kind.ours)


def _format(path: Path) -> Format:
    suffix = path.suffix.lower()
    if suffix not in SEQUENCE_FORMATS:
        named = ", ".join(filter(None, SEQUENCE_FORMATS))
        hint = ""
        if suffix in (".mp4", ".gif", ".webp", ".png"):
            hint = f"; for something to look at, --movie {path}"
        raise InputError(
            f"{path}: unknown format {suffix}; end the name in one of {named}, or give it no "
            f"suffix for a folder of PNG{hint}"
        )
    return SEQUENCE_FORMATS[suffix]


def write_sequence(
    path: Path | str,
    frames: Iterable[np.ndarray],
    count: int,
    calibration: Calibration = UNKNOWN,
    first_frame: int = 0,
    dtype: Dtype = "uint16",
    about: Provenance | None = None,
) -> Path:
    """Write `count` frames (H, W) in [0, 1], one frame in memory at a time.

    What was there under that name is replaced: a file, or a folder that is such a result and
    nothing else. All formats but films are read back by `open_recording` with rate, times, pixel
    size and full scale.

    Args:
        path: `.tif` or `.tiff` for one stack, which Fiji opens with its scale and frame rate
            (BigTIFF with OME's description beyond 4 GB, and for `.ome.tif`); `.h5` or `.hdf5` for
            DXchange, the stack being /exchange/data; `.nxs` for NeXus; `.zarr` for OME-Zarr 0.5;
            no suffix for a folder of PNG files.
        calibration: stored with the frames.
        first_frame: index of the first frame in the fast recording, stored too.
        dtype: uint16 stores intensities as 0..65535 and what 65535 stands for; float32 stores
            physical values (transmission, counts), nothing cut off; original stores the sharp
            camera's counts in as many bits as it has (`calibration.bit_depth`), or float32 where
            its values are floats.
        about: what made the frames, stored too; `<path>.json` then says the same.

    Raises:
        InputError: unknown suffix, missing folder, full disk, a frame of another size or with
            values that are not finite (but floats may have frames that are all NaN, where one is
            missing), or a number of frames other than `count`.
    """
    path = Path(path)
    check_sequence(path, dtype)
    form = _format(path)
    kind, stored = _numbers(path, dtype, calibration.bit_depth)
    if form.write is images.write and stored is None:
        raise InputError(f"{path}: {images.NO_FLOATS}")
    times = calibration.times_s
    if times is not None and len(times) < first_frame + count:
        raise ValueError(
            f"{len(times)} times for frames {first_frame} to {first_frame + count - 1}"
        )
    frames = iter(frames)
    beside_path = path.with_name(f"{path.name}.json")
    place = replacing(path) if form.ours is None else replacing_folder(path, form.ours)
    with place as beside:
        first = next(frames, None)
        if first is None:
            raise InputError(f"{path}: there are no frames to write")
        shape = (count, *first.shape)
        free, needed = shutil.disk_usage(path.parent).free, kind.itemsize * math.prod(shape)
        if needed > free:
            raise PassingError(
                f"{path}: needs {needed / 1e9:.2f} GB, {path.parent} has "
                f"{free / 1e9:.2f} GB left; choose another disk"
            )
        numbers = _stored(chain([first], frames), shape, path, kind, stored, calibration.full_scale)
        result = Result(
            path, numbers, shape, kind, calibration, first_frame, stored, about or Provenance()
        )
        form.write(beside, result)
        if next(numbers, None) is not None:  # a generator that was not asked may hold one more
            raise InputError(f"{path}: more than the expected {count} frames came")
        if about is not None:
            _remove_ours(beside_path)
    if about is not None:
        _write_beside(beside_path, result, form)
    return path


def _numbers(path: Path, dtype: Dtype, bit_depth: int | None) -> tuple[np.dtype[Any], int | None]:
    """What numbers are stored, and which one is intensity 1; None: floats, not scaled."""
    if dtype == "uint16":
        return np.dtype(np.uint16), FULL
    if dtype == "float32" or bit_depth is None:
        return np.dtype(np.float32), None
    if not 1 <= bit_depth <= 16:
        raise InputError(
            f"{path}: numbers of {bit_depth} bit cannot be stored: choose --dtype float32"
        )
    return np.dtype(np.uint8 if bit_depth <= 8 else np.uint16), 2**bit_depth - 1


def as_stored(frame: np.ndarray, dtype: Dtype, calibration: Calibration) -> np.ndarray:
    """A frame (H, W) in [0, 1] in the numbers that a result of that type holds."""
    kind, top = _numbers(Path(), dtype, calibration.bit_depth)
    scaled = frame * calibration.full_scale if top is None else np.rint(np.clip(frame, 0, 1) * top)
    stored: np.ndarray = scaled.astype(kind)
    return stored


def _stored(
    frames: Iterable[np.ndarray],
    shape: tuple[int, int, int],
    path: Path,
    kind: np.dtype[Any],
    top: int | None,
    full_scale: float,
) -> Iterator[np.ndarray]:
    done = cut = 0
    for i, frame in enumerate(frames):
        if i >= shape[0]:
            raise InputError(f"{path}: more than the expected {shape[0]} frames came")
        if frame.shape != shape[1:]:
            raise InputError(
                f"{path}: frame {i} is {frame.shape}, the first one {shape[1:]}; all "
                "frames must have one size"
            )
        missing = top is None and np.isnan(frame).all()
        if not np.isfinite(frame).all() and not missing:
            raise InputError(f"{path}: frame {i} holds values that are not finite")
        if top is None:
            yield (frame * full_scale).astype(kind)
        else:
            cut += np.count_nonzero(frame < -0.5 / top) + np.count_nonzero(frame > 1 + 0.5 / top)
            yield np.rint(np.clip(frame, 0, 1) * top).astype(kind)
        done = i + 1
    if done != shape[0]:
        raise InputError(f"{path}: only {done} of the expected {shape[0]} frames came")
    if cut > WORTH_TELLING * math.prod(shape):
        logger.warning(
            "%s: %.2g %% of the values lie below 0 or above full scale %g and were cut to that; "
            "--dtype float32 keeps them",
            *(path, 100 * cut / math.prod(shape), full_scale),
        )


def _remove_ours(path: Path) -> None:
    """Delete the text beside an older result, which would not be that of the new one."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and found.get("program") == PROGRAM:
            path.unlink()


def _write_beside(path: Path, result: Result, form: Format) -> None:
    """The text beside the result, and the maps that it does not hold."""
    files = {}
    if not form.holds_maps:
        for name, values in result.maps().items():
            file = result.path.with_name(f"{result.path.name}.{name}.tif")
            with replacing(file) as beside:
                tiff.write_map(beside, values, result)
            files[name] = file.name
    written = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = result.text(result=printable(result.path.name), written=written, map_files=files)
    write_atomic(path, lambda file: file.write(f"{text}\n".encode()))
