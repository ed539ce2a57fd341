"""HDF5: the layout DXchange of synchrotrons, NeXus with the masters of Eiger detectors, MATLAB
v7.3, and any dataset of frames of another file.

DXchange: frames in /exchange/data (T, H, W), corrected by /exchange/data_white and data_dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_xvr.data.cameras import results, units
from hpc_xvr.data.cameras.flatfield import mean_frame, transmission
from hpc_xvr.data.cameras.hdf5_axes import Order, axis_order, names_in, text
from hpc_xvr.data.cameras.hdf5_choice import (
    DATA,
    MASK,
    FramesDataset,
    choose,
    holds_frames,
    is_mask,
    named,
)
from hpc_xvr.data.cameras.hdf5_links import BLOCK, Files, Place, written_in_swmr
from hpc_xvr.data.cameras.hdf5_stored import BUDGET, check_stored
from hpc_xvr.data.cameras.hdf5_virtual import Reader
from hpc_xvr.data.cameras.recording import Recording, array_recording, check_shape
from hpc_xvr.data.cameras.stamps import frame_times, rate_of
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

WHITE, DARK = "exchange/data_white", "exchange/data_dark"
TIME = "exchange/time"
DETECTOR = "measurement/instrument/detector"
RESOLUTION = "measurement/instrument/detection_system/objective/resolution"
LARGEST_TEXT = 4096
"""Bytes of a number or a text that describes the recording."""
LARGEST_CHUNK = 2**24
"""Bytes of the chunk that it is stored in."""


def open_hdf5(
    path: Path,
    dataset: str | None = None,
    own_flat: bool = True,
    bit_depth: int | None = None,
    full_scale: float | None = None,
    allow_links: Sequence[Path | str] = (),
    missing: bool = False,
    frames: int | None = None,
) -> Recording:
    """Open the frames of one recording: the named dataset, /exchange/data, the default data of
    NeXus with its numbered parts in turn, or the only dataset.

    Axes are put in the order frames, rows, columns, as far as the file says which is which. With
    `own_flat` the white and dark frames of a DXchange file are applied. Links, parts of virtual
    datasets and raw files are followed into the file's own folder and those of `allow_links`.
    `missing`: frames that are not stored, or not all of them, are left out. `frames`: only so many
    first ones are read, which are known to be complete, of a dataset that still grows.

    Raises:
        InputError: no such dataset, several to choose from (they are listed), axes in no order we
            can tell, parts or chunks that are missing or not allowed, counts of more than 16 bit
            or below 0 whose scale is not given, or a damaged file.
    """
    flat_field = dark_field = None
    with Files(path, allow_links) as files:
        if frames is None and written_in_swmr(path):
            logger.warning(
                "%s: is still being written (SWMR), or its writer was killed: the frames that are "
                "there now are read",
                path,
            )
        found = choose(files, dataset)
        fields = _description(files, found[0].name)
        stack = _stack(files, found, missing=missing, frames=frames)
        ours = is_result(files.item(found[0].place))
        stamps = None if ours else _stamps(files, found[0], stack, frames is not None)
        times = None if stamps is None else frame_times(path, stamps)
        if times is not None:
            rate = rate_of(path, times, fields.get("frame_rate_hz"))
            fields = {**fields, "times_s": times, "frame_rate_hz": rate}
        if own_flat and found[0].name == DATA and not ours:
            white, dark = (_field(files, name, stack) for name in (WHITE, DARK))
            _say_what_is_not_used(files, stack, white is not None)
            if white is not None:
                flat_field = mean_frame(_recording(white, allow_links, needs_scale=False))
                if dark is not None:
                    dark_field = mean_frame(_recording(dark, allow_links, needs_scale=False))
    if flat_field is None:
        return _recording(stack, allow_links, bit_depth, full_scale, fields, own_flat)
    data = _recording(stack, allow_links, bit_depth, None, fields, needs_scale=False)
    return transmission(data, flat_field, dark_field, full_scale)


@dataclass(frozen=True)
class _Stack:
    """Frames of one or several datasets, one after the other."""

    path: Path
    parts: tuple[tuple[Place, Order, int], ...]
    """Each with the order of its axes and its frames."""
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    block: int
    """Frames to read at once."""
    line: tuple[float, float] | None = None
    """Offset and slope from stored numbers to values, where the file states them."""
    white: float | None = None
    """Value of the largest number that can be stored, where `line` makes floats of integers, and of
    full scale in results of this program that are floats."""
    bits: int | None = None
    """Of a camera's counts in results of this program."""
    missing: bool = False
    """Whether frames may be missing: reading one of those is an error."""
    holes: tuple[float, ...] = ()
    """Stored numbers that stand for pixels without a value."""

    def frames(
        self, allow_links: Sequence[Path | str], start: int, stop: int
    ) -> Iterator[np.ndarray]:
        """Frames start..stop-1, (H, W)."""
        with Files(self.path, allow_links) as files:
            reader, before = Reader(files, self.missing), 0
            for place, order, count in self.parts:
                first, last = max(start - before, 0), min(stop - before, count)
                before += count
                for at in range(first, last, self.block):
                    yield from read_frames(
                        reader, files, place, order, at, min(at + self.block, last)
                    )

    def whole(self, frames: Iterable[np.ndarray], start: int) -> Iterator[np.ndarray]:
        """Frames from number `start` on, none of which has pixels without a value."""
        for index, frame in enumerate(frames, start):
            if bad := sum(np.count_nonzero(frame == hole) for hole in self.holes):
                numbers = ", ".join(f"{hole:g}" for hole in self.holes)
                raise InputError(
                    f"{self.path}: frame {index} holds {bad} pixels without a value, which the "
                    f"file marks by {numbers} (_FillValue): repair the frame or leave it out, or "
                    "give --bit-depth to read all numbers as counts"
                )
            yield frame


def read_frames(
    reader: Reader, files: Files, place: Place, order: Order, start: int, stop: int
) -> np.ndarray:
    """Frames of a dataset, (stop - start, H, W)."""
    box = [range(1) for _ in files.item(place).shape]
    for axis in order[1:]:
        box[axis] = range(files.item(place).shape[axis])
    if order[0] is not None:
        box[order[0]] = range(start, stop)
    kept = [axis for axis in order if axis is not None]
    rest = [axis for axis in range(len(box)) if axis not in kept]  # of length 1
    values = reader.read(place, tuple(box)).transpose([*rest, *kept])
    return np.ascontiguousarray(values.reshape(-1, *values.shape[-2:]))


def _stack(
    files: Files,
    found: Sequence[FramesDataset],
    like: _Stack | None = None,
    missing: bool = False,
    frames: int | None = None,
) -> _Stack:
    """The frames of datasets, after a look at whether all is there, unless some may be `missing` or
    only the first `frames` are wanted; `like`: whose axes they have where they do not say."""
    parts: list[tuple[Place, Order, int]] = []
    sizes, types, block = [], [], BLOCK
    for name, place, routes in found:
        dataset = files.item(place)
        where = f"{files.path}, dataset /{name}"
        chunks, dtype = dataset.chunks, dataset.dtype
        other = like.parts[0][1] if like is not None and dataset.ndim == 3 else None
        order = axis_order(where, files, dataset, routes, other)
        axis, rows, columns = order
        count = 1 if axis is None else dataset.shape[axis]
        count = count if frames is None else min(count, frames)
        size = dataset.shape[rows], dataset.shape[columns]
        check_shape(files.path, (count, *size))
        per_frame = dtype.itemsize * size[0] * size[1]
        if per_frame > BUDGET:
            raise InputError(
                f"{where}: has frames of {per_frame} bytes, and more than {BUDGET} are not read "
                "at once: cut or bin them"
            )
        check_stored(files, place, axis or 0, lenient=missing or frames is not None)
        parts.append((place, order, count))
        sizes.append(size)
        types.append(dtype)
        in_turn = axis is None or axis < min(rows, columns)
        chunk = chunks[axis] if chunks and axis is not None else 1
        block = min(block, max(1, min(chunk if in_turn else BLOCK, BLOCK // per_frame)))
        block = 1 if missing else block  # so that each frame is there or not
        if (size, dtype) != (sizes[0], types[0]):
            raise InputError(
                f"{where}: has frames of {size[0]} x {size[1]} {dtype}, /{found[0].name} "
                f"of {sizes[0][0]} x {sizes[0][1]} {types[0]}: all must be alike; choose one with "
                "--dataset"
            )
    total = sum(count for _, _, count in parts)
    line, white = _line(files, found[0]) or (None, None)
    shape = (total, *sizes[0])
    bits = _counts_of_result(files.item(found[0].place))
    if bits:
        line, white = None, None
    elif types[0].kind == "f" and is_result(files.item(found[0].place)):
        white = _number(files.item(found[0].place), "full_scale")
    holes = _holes(files.item(found[0].place))
    _tell_of_mask(files, found[0])
    return _Stack(
        files.path, tuple(parts), shape, types[0], block, line, white, bits, missing, holes
    )


def _recording(
    stack: _Stack,
    allow_links: Sequence[Path | str],
    bit_depth: int | None = None,
    full_scale: float | None = None,
    fields: dict[str, Any] | None = None,
    needs_scale: bool = True,
) -> Recording:
    """The recording of a stack. Integers of more than 16 bit or with a sign need a scale, unless
    only their values are wanted (not `needs_scale`), for a correction."""
    path, native = stack.path, stack.dtype
    links = tuple(allow_links)

    def source(start: int, stop: int) -> Iterator[np.ndarray]:
        frames = stack.frames(links, start, stop)
        return stack.whole(frames, start) if stack.holes and bit_depth is None else frames

    def floats(start: int, stop: int) -> Iterator[np.ndarray]:
        return (frame.astype(np.float64) for frame in source(start, stop))

    def counts(start: int, stop: int) -> Iterator[np.ndarray]:
        for index, frame in enumerate(source(start, stop), start):
            if (least := int(frame.min())) < 0:
                raise InputError(
                    f"{path}: frame {index} holds the value {least}, but counts begin at 0: give "
                    "a full scale instead of the bit depth, and what is below 0 becomes 0"
                )
            yield frame

    if stack.bits and bit_depth is None:
        return array_recording(
            *(path, stack.shape, native, source, stack.bits, full_scale, stack.missing),
            **(fields or {}),
        )
    if stack.white is not None and native.kind == "f" and stack.line is None:
        full_scale = full_scale or stack.white
    if stack.line is not None and bit_depth is None:
        native, full_scale = np.dtype(np.float64), full_scale or stack.white
        offset, slope = stack.line

        def physical(start: int, stop: int) -> Iterator[np.ndarray]:
            return (offset + slope * frame.astype(np.float64) for frame in source(start, stop))

        return array_recording(
            *(path, stack.shape, native, physical, None, full_scale, stack.missing),
            **(fields or {}),
        )
    plain = native.kind == "f" or (native.kind == "u" and native.itemsize <= 2)
    if plain:
        chosen = source
    elif not needs_scale:
        native, chosen = np.dtype(np.float64), floats
        bit_depth, full_scale = None, float(np.iinfo(stack.dtype).max)
    elif (bit_depth is None) == (full_scale is None):
        raise InputError(
            f"{path}: holds {native.name} counts, whose scale the file does not state: give either "
            "--bit-depth N (of values from 0 to 2^N - 1, N up to 16) or --full-scale X (the value "
            "that is stored as white)"
        )
    elif bit_depth is not None:
        native, chosen = np.dtype(np.uint16), counts
    else:
        native, chosen = np.dtype(np.float64), floats
    return array_recording(
        path, stack.shape, native, chosen, bit_depth, full_scale, stack.missing, **(fields or {})
    )


def _line(files: Files, found: FramesDataset) -> tuple[tuple[float, float], float | None] | None:
    """Offset and slope from stored numbers to values, and the value of the largest number: of
    results of this program, by the attributes of netCDF, or by fields of NeXus.

    Raises:
        InputError: the slope is 0 or no number.
    """
    item = files.item(found.place)
    white, largest = (_number(item, name) for name in ("full_scale", "stored_full_scale"))
    counts = item.dtype.kind == "u" and item.dtype.itemsize <= 2
    if white and largest and counts:
        return (0.0, white / largest), white
    slope, offset = (item.attrs.get(name) for name in ("scale_factor", "add_offset"))
    for group, name in found.routes:
        if text(files.item(group).attrs.get("NX_class")) == "NXdata":
            for prefix in (f"{name}_", ""):
                slope = _single(files, group, f"{prefix}scaling_factor") if slope is None else slope
                offset = _single(files, group, f"{prefix}offset") if offset is None else offset
    if slope is None and offset is None:
        return None
    line = _first(0.0 if offset is None else offset), _first(1.0 if slope is None else slope)
    if not (math.isfinite(line[0]) and 0 < abs(line[1]) < math.inf):
        raise InputError(
            f"{files.path}, dataset /{found.name}: states the offset {line[0]:g} and the scale "
            f"{line[1]:g} of its numbers: correct them, or give --bit-depth to read them as counts"
        )
    if line == (0.0, 1.0):
        return None
    logger.info("%s: values are %g + %g x stored number, as it states", files.path, *line)
    top = np.iinfo(item.dtype).max if counts and line[1] > 0 else None
    return line, None if top is None else line[0] + line[1] * top


def _holes(item: h5py.Dataset) -> tuple[float, ...]:
    """Numbers that stand for missing pixels, by the attributes of netCDF."""
    values = [item.attrs[name] for name in ("_FillValue", "missing_value") if name in item.attrs]
    numbers = [np.asarray(value).reshape(-1) for value in values]
    found = {n.item() for each in numbers if each.dtype.kind in "iuf" for n in each[:8]}
    return tuple(sorted(n for n in found if math.isfinite(n)))


def _tell_of_mask(files: Files, found: FramesDataset) -> None:
    """Warn of pixels that the file's own mask marks as bad."""
    for group, _ in found.routes[-1:]:
        place = files.locate(MASK, group)
        if place is None:
            continue
        item = files.item(place)
        if isinstance(item, h5py.Dataset) and is_mask(item) and item.nbytes <= BUDGET:
            check_stored(files, place)
            if bad := np.count_nonzero(item[()]):
                logger.warning(
                    "%s: its %s marks %d pixels as bad; they are used as they are: repair them "
                    "first if they show",
                    *(files.path, MASK, bad),
                )


def _counts_of_result(item: h5py.Dataset) -> int | None:
    """Bits of a camera's counts that stand for themselves in a result of this program."""
    white, largest = (_number(item, name) for name in ("full_scale", "stored_full_scale"))
    if not (white and largest and item.dtype.kind == "u"):
        return None
    return results.Frames((1, 1, 1), item.dtype.name, white, int(largest)).counts_bits


def _single(files: Files, group: Place, name: str) -> Any:
    """A single number in a group; None if there is none."""
    place = files.locate(name, group)
    item = None if place is None else files.item(place)
    if not isinstance(item, h5py.Dataset) or item.size != 1 or item.is_virtual:
        return None
    return item[()] if item.dtype.kind in "iuf" else None


def _first(value: Any) -> float:
    return float(np.asarray(value).reshape(-1)[0])


def time_axes(files: Files, found: FramesDataset, axis: int) -> list[h5py.Dataset]:
    """What may hold the time of each frame: a scale of HDF5, an axis of NeXus, or the times that
    results of this program have."""
    dataset = files.item(found.place)
    candidates = list(dataset.dims[axis].values())
    for group, _ in found.routes:
        names = names_in(files.item(group).attrs.get("axes"))
        place = files.locate(names[axis], group) if len(names) == dataset.ndim else None
        candidates += [files.item(place)] if place is not None else []
    place = files.locate(TIME) if found.name == DATA else None
    candidates += [files.item(place)] if place is not None else []
    return [item for item in candidates if isinstance(item, h5py.Dataset) and item.ndim == 1]


def _stamps(
    files: Files, found: FramesDataset, stack: _Stack, growing: bool = False
) -> np.ndarray | None:
    """Time of each frame in seconds, if the file has a time axis; `growing`: with times of further
    frames, or not of all."""
    axis = stack.parts[0][1][0]
    if axis is None or len(stack.parts) > 1:
        return None
    length = files.item(found.place).shape[axis]
    for item in dict.fromkeys(time_axes(files, found, axis)):
        more = growing and item.maxshape == (None,) and len(item) >= stack.shape[0]
        unit, name = text(item.attrs.get("units")), str(item.name).rpartition("/")[2]
        factor = units.factor(unit, "s")
        numbers = item.dtype.kind in "iuf" and not item.is_virtual
        fits = more or len(item) == length
        if fits and factor is not None and numbers:
            return np.asarray(item[: stack.shape[0]], np.float64) * factor
        if name.lower() in ("t", "time", "times", "timestamps"):
            if not fits:
                problem = f"has {len(item)} values for {length} frames"
            elif not unit:
                problem = "has no unit (attribute units)"
            else:
                problem = f"holds no numbers in s or the like, but {item.dtype} in {unit!r}"
            logger.warning(
                "%s: its time axis %s %s and is not used", files.path, item.name, problem
            )
    return None


def _field(files: Files, name: str, data: _Stack) -> _Stack | None:
    """White or dark frames, if there are any."""
    place = files.locate(name)
    if place is None or not holds_frames(files, place) or not files.item(place).size:
        return None
    return _stack(files, [named(files, name)], data)


def _say_what_is_not_used(files: Files, data: _Stack, corrected: bool) -> None:
    """Frames beside /exchange/data that do not count, although they may be meant to."""
    folder = DATA.rpartition("/")[0]
    folder_place = files.locate(folder)
    assert folder_place is not None
    group = files.item(folder_place)
    names = [f"{folder}/{key}" for key in sorted(group)]
    for name in names:
        if name in (DATA, WHITE, DARK if corrected else DATA):
            continue
        try:
            place = files.locate(name)
        except InputError as error:
            logger.warning("%s", error)
            continue
        if place is None or not holds_frames(files, place):
            continue
        dataset = files.item(place)
        if not dataset.size or dataset.shape[-2:] != data.shape[1:]:
            continue
        if name == DARK:
            logger.warning(
                "%s: its dark field /%s is not used, as it has no flat field: give one with --flat",
                *(files.path, name),
            )
        else:
            logger.warning(
                "%s: its dataset /%s is not used: if it is a flat or dark field, pass it as --flat "
                "or --dark %s::/%s",
                *(files.path, name, files.path, name),
            )


def _description(files: Files, name: str) -> dict[str, Any]:
    """Camera, frame rate, exposure and pixel size where a DXchange or NeXus file states them."""
    maker, model = (_scalar(files, f"{DETECTOR}/{key}")[0] for key in ("manufacturer", "model"))
    camera = " ".join(str(part) for part in (maker, model) if isinstance(part, str) and part)
    fields: dict[str, Any] = {"camera": camera} if camera else {}
    nexus = f"{name.partition('/')[0]}/instrument/detector"
    for field, where, unit in (
        ("frame_rate_hz", f"{DETECTOR}/frame_rate", "Hz"),
        ("exposure_s", f"{DETECTOR}/exposure_time", "s"),
        ("pixel_size_um", RESOLUTION, "um"),
        ("frame_time_s", f"{nexus}/frame_time", "s"),
        ("exposure_s", f"{nexus}/count_time", "s"),
    ):
        value, stated = _scalar(files, where)
        if field in fields or not isinstance(value, float):
            continue
        factor = units.factor(stated, unit) if stated else 1.0
        if factor is None:
            logger.warning(
                "%s: /%s is in %r, which is no unit of %s that we know: not used",
                *(files.path, where, stated, unit),
            )
        elif 0 < (value * factor) < float("inf"):
            fields[field] = value * factor
    place = files.locate(name)
    item = None if place is None else files.item(place)
    for field in ("frame_rate_hz", "pixel_size_um"):  # as `reconstruct` writes them
        if item is not None and field not in fields and (value := _number(item, field)):
            fields[field] = value
    if item is not None and is_result(item):
        times = _times(files, f"{name.rpartition('/')[0]}/time", item.shape[0])
        if times is not None:
            fields["times_s"] = times - times[0]
        if unit := text(item.attrs.get("units")):
            fields["metadata"] = {"unit": unit}
    period = fields.pop("frame_time_s", None)
    if period is not None and 1 / period < float("inf"):
        fields.setdefault("frame_rate_hz", 1 / period)
    return fields


def is_result(item: h5py.Dataset) -> bool:
    """Whether a dataset of frames was written by this program."""
    return text(item.attrs.get("program")) == results.PROGRAM


def _times(files: Files, name: str, count: int) -> np.ndarray | None:
    """Time stamps in s beside the frames of a result, if they are one a frame, and rise."""
    place = files.locate(name)
    item = None if place is None else files.item(place)
    if not isinstance(item, h5py.Dataset) or item.shape != (count,) or item.dtype.kind != "f":
        return None
    if text(item.attrs.get("origin")) != results.STAMPS or item.is_virtual or item.external:
        return None
    times = np.asarray(item[()], np.float64)
    return times if np.isfinite(times).all() and (np.diff(times) > 0).all() else None


def _number(item: h5py.Dataset, attribute: str) -> float | None:
    """A number above 0 among the attributes of a dataset."""
    value = np.asarray(item.attrs.get(attribute, 0))
    if value.size != 1 or value.dtype.kind not in "iuf" or not 0 < value.item() < math.inf:
        return None
    return float(value.item())


def _scalar(files: Files, name: str) -> tuple[str | float | None, str]:
    """One number or text, and its unit; None if there is none, or a link to it leads nowhere."""
    try:
        place = files.locate(name)
    except InputError:
        return None, ""
    item = None if place is None else files.item(place)
    if not isinstance(item, h5py.Dataset) or item.size != 1 or item.is_virtual or item.external:
        return None, ""
    chunk = item.dtype.itemsize * math.prod(item.chunks or ())
    if item.dtype.itemsize > LARGEST_TEXT or chunk > LARGEST_CHUNK:
        return None, ""
    unit = text(item.attrs.get("units"))
    value = item[()]
    value = value.reshape(-1)[0] if isinstance(value, np.ndarray) else value
    if isinstance(value, bytes):
        return value.decode(errors="replace").strip("\0 "), unit
    return float(value) if np.issubdtype(type(value), np.number) else str(value), unit
