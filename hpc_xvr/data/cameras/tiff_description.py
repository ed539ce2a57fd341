"""What a TIFF file says of all its frames, in the words of ImageJ, OME and tifffile: axes, units,
calibration."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from hpc_xvr.data.cameras import units
from hpc_xvr.data.cameras.stamps import frame_times, rate_of
from hpc_xvr.data.cameras.tiff_pages import Directory
from hpc_xvr.errors import InputError

AXES = {"C": "channels", "S": "samples", "Z": "slices", "T": "times", "Q": "times", "I": "times"}


@dataclass
class Stated:
    """What the file says of all its frames together."""

    axes: list[tuple[int, str]] = field(default_factory=list)
    """Sizes and names, without those of size 1."""
    fields: dict[str, Any] = field(default_factory=dict)
    line: tuple[float, float] | None = None
    bits: int | None = None
    """Significant ones."""
    others: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    text: str = ""
    """What the file holds beside, in which results of this program say what they are."""

    @property
    def count(self) -> int:
        return math.prod(size for size, _ in self.axes)


def check_axes(path: Path, stated: Stated, shape: tuple[int, int]) -> None:
    if all(name == "times" for _, name in stated.axes) and len(stated.axes) < 2:
        return
    sizes = " x ".join(f"{size} {name}" for size, name in stated.axes)
    raise InputError(
        f"{path}: {sizes}: each of {shape[0]} x {shape[1]} pixels; frames have no axis but time: "
        "save one channel and one slice as a file of its own, or name the axis time if it is"
    )


def stated_by(path: Path, tif: tifffile.TiffFile, page: Any, frames: Sequence[Directory]) -> Stated:
    """What the file says, given its first frame's page and what the chain says of the frames'.

    Raises:
        InputError: several series, a microscope's own kind of TIFF, a damaged description, or a
            calibration that is no straight line.
    """
    for kind in ("lsm", "stk", "fluoview", "scanimage"):
        if getattr(tif, f"is_{kind}"):
            raise InputError(
                f"{path}: is a microscope's own kind of TIFF ({kind}): export it again"
            )
    if tif.is_ome:
        return _of_ome(path, str(tif.ome_metadata), page)
    if tif.is_imagej and tif.imagej_metadata is not None:
        return _of_imagej(path, tif.imagej_metadata, page)
    if frames[0].shape is not None:
        return _of_tifffile(path, page, frames)
    return Stated()


def _of_tifffile(path: Path, page: Any, frames: Sequence[Directory]) -> Stated:
    """Each series starts with a page that states its shape; those of one page each are one."""
    starts = [directory for directory in frames if directory.shape is not None]
    lengths = []
    for directory in starts:
        shape = directory.shape or ()
        if math.prod(shape) % math.prod(page.shape):
            return Stated()  # of another file: what wrote this one has kept the description
        lengths.append(math.prod(shape) // math.prod(page.shape))
    if len(starts) > 1:
        if set(lengths) == {1} and len(starts) == len(frames):
            return Stated([(len(frames), "times")])
        sizes = ", ".join(map(str, lengths[:8])) + (", ..." if len(lengths) > 8 else "")
        raise InputError(
            f"{path}: holds {len(starts)} series of {sizes} frames: save each as a file of its own"
        )
    shape, axes = starts[0].shape or (), starts[0].axes
    lead = len(shape) - len(page.shape)
    if shape[lead:] != page.shape:  # lengths of 1 somewhere else, as in (10, 16, 24, 1)
        lead = len([size for size in shape if size > 1]) - len([s for s in page.shape if s > 1])
        shape, axes = tuple(size for size in shape if size > 1), None
    if axes is None or len(axes) != len(shape):
        axes = "T" * len(shape) if sum(size > 1 for size in shape[:lead]) < 2 else "?" * len(shape)
    return Stated(
        [
            (size, AXES.get(axis, f"({axis})"))
            for size, axis in zip(shape[:lead], axes, strict=False)
            if size > 1
        ]
    )


def _of_imagej(path: Path, said: dict[str, Any], page: Any) -> Stated:
    def whole(name: str) -> int:
        value = said.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{path}: states {value} {name}: its description is damaged")
        return value

    channels, slices, times = whole("channels"), whole("slices"), whole("frames")
    if channels == page.samplesperpixel:
        channels = 1
    stated = Stated(_sized((channels, "channels"), (slices, "slices"), (times, "times")))
    stated.text = str(said.get("Info", ""))
    if not stated.axes:
        stated.axes = _sized((whole("images"), "times"))
    elif len(stated.axes) == 1 and stated.axes[0][1] != "times":
        size, name = stated.axes[0]
        # A plain stack of ImageJ has slices, whatever they are. tifffile (which writes 1.11a)
        # states channels for three dimensions without a name.
        plain = name == "slices" and not said.get("hyperstack")
        unnamed = name == "channels" and said.get("ImageJ") == "1.11a"
        if unnamed:
            stated.notes.append(
                f"its {size} images are named channels, as tifffile does by itself; they are read "
                "as frames in time"
            )
        if plain or unnamed:
            stated.axes = [(size, "times")]
    interval = _number(said.get("finterval"))
    if interval and (unit := units.factor(_unit(said.get("tunit", "sec")), "s")):
        stated.fields["frame_rate_hz"] = 1 / (interval * unit)
    factor = units.factor(_unit(said.get("unit", "")), "um")
    sizes = [_per_pixel(page, name) for name in ("XResolution", "YResolution")]
    if factor and sizes[0]:
        if sizes[1] and abs(sizes[1] / sizes[0] - 1) > 0.01:
            stated.notes.append("its pixels are not square: no pixel size is kept")
        else:
            stated.fields["pixel_size_um"] = float(f"{sizes[0] * factor:.6g}")
    if page.dtype.kind != "f":  # ImageJ calibrates integers only
        stated.line = _calibration(path, said)
    return stated


def _calibration(path: Path, said: dict[str, Any]) -> tuple[float, float] | None:
    """Offset and slope of ImageJ's calibration function; None without one."""
    function = said.get("cf", 20)  # 20: none
    if function == 20:
        return None
    try:
        offset, slope = float(said["c0"]), float(said["c1"])
    except (KeyError, TypeError, ValueError):
        offset = slope = math.nan
    if function != 0 or not math.isfinite(offset) or not 0 < abs(slope) < math.inf:
        raise InputError(
            f"{path}: has a calibration function (cf={function}) that is no straight line: convert "
            "it to 32 bit in ImageJ, which applies it"
        )
    return None if (offset, slope) == (0, 1) else (offset, slope)


def _of_ome(path: Path, text: str, page: Any) -> Stated:
    images = ElementTree.fromstring(text).findall("{*}Image")
    every = [pixels for image in images for pixels in image.findall("{*}Pixels")]
    if len(every) > 1:
        sizes = ", ".join(
            f"{pixels.get('SizeT')} x {pixels.get('SizeY')} x {pixels.get('SizeX')}"
            for pixels in every[:8]
        )
        raise InputError(
            f"{path}: holds {len(every)} series ({sizes}): save each as a file of its own"
        )
    if not every:
        return Stated()  # what it has is described in another file
    pixels = every[0]
    channels, slices, times = (int(pixels.get(f"Size{axis}", "1")) for axis in "CZT")
    if channels == page.samplesperpixel:
        channels = 1
    names = {uuid.get("FileName", "") for uuid in pixels.iter() if uuid.tag.endswith("}UUID")}
    stated = Stated(_sized((channels, "channels"), (slices, "slices"), (times, "times")))
    stated.text = images[0].findtext("{*}Description", "")
    stated.others = tuple(sorted(names - {"", path.name})) if len(names) > 1 else ()
    bits = pixels.get("SignificantBits", "")
    if bits.isdecimal() and 0 < int(bits) <= page.bitspersample and page.dtype.kind == "u":
        stated.bits = int(bits)
    interval = _number(pixels.get("TimeIncrement"))
    if interval and (unit := units.factor(pixels.get("TimeIncrementUnit", "s"), "s")):
        stated.fields["frame_rate_hz"] = 1 / (interval * unit)
    _add_planes(path, pixels.findall("{*}Plane"), stated)
    wide, high = (_number(pixels.get(f"PhysicalSize{axis}")) for axis in "XY")
    factor = units.factor(pixels.get("PhysicalSizeXUnit", "um"), "um")
    if wide and factor:
        same = pixels.get("PhysicalSizeYUnit", "um") == pixels.get("PhysicalSizeXUnit", "um")
        if high and same and abs(high / wide - 1) > 0.01:
            stated.notes.append("its pixels are not square: no pixel size is kept")
        else:
            stated.fields["pixel_size_um"] = wide * factor
    return stated


def _add_planes(path: Path, planes: Sequence[ElementTree.Element], stated: Stated) -> None:
    """When the frames were taken and how long they were exposed, where each states it."""
    if not planes or len(planes) != stated.count or stated.others:
        return
    planes = sorted(planes, key=lambda plane: int(plane.get("TheT", "0")))
    for name in ("DeltaT", "ExposureTime"):
        unit = units.factor(planes[0].get(f"{name}Unit", "s"), "s")
        values = np.array([plane.get(name, "nan") for plane in planes], float)
        if unit is None or not np.isfinite(values).all():
            continue
        if name == "ExposureTime" and values[0] > 0:
            stated.fields["exposure_s"] = float(values[0] * unit)
        elif name == "DeltaT" and (times := frame_times(path, values * unit)) is not None:
            stated.fields["times_s"] = times
            rate = stated.fields.get("frame_rate_hz")
            stated.fields["frame_rate_hz"] = rate_of(path, times, rate)


def _sized(*axes: tuple[int, str]) -> list[tuple[int, str]]:
    return [axis for axis in axes if axis[0] != 1]


def _unit(text: object) -> str:
    """A unit of ImageJ, which spells the sign for micro as an escape."""
    return str(text).replace("\\u00b5", "u").replace("\\u00B5", "u")


def _number(value: object) -> float | None:
    """A finite number above 0, or None."""
    with contextlib.suppress(TypeError, ValueError):
        number = float(value)  # type: ignore[arg-type]
        return number if 0 < number < math.inf else None
    return None


def _per_pixel(page: Any, name: str) -> float | None:
    """The inverse of a resolution tag, a fraction."""
    if name not in page.tags:
        return None
    pixels, units = page.tags[name].value
    return units / pixels if pixels > 0 and units > 0 else None
