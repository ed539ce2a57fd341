"""TIFF: a stack that Fiji opens as a time series with its scale and frame interval.

Up to 4 GB it is ImageJ's own hyperstack, which also Fiji's virtual stacks and plain ImageJ open;
beyond, and for `.ome.tif`, BigTIFF or TIFF with OME's description, which Bio-Formats opens.
"""

from __future__ import annotations

import errno
import math
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from hpc_xvr.reconstruction.writers.about import Result
from hpc_xvr.text import printable

TIFF_LIMIT = 2**32 - 2**26  # bytes of pixels; a classic TIFF addresses 4 GiB


def write(path: Path, result: Result) -> None:
    """Write the stack; its texts at the end, when all is known.

    Raises:
        OSError: the disk refuses.
    """
    try:
        _write(path, result)
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy's, of fewer bytes written than asked for
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def _write(path: Path, result: Result) -> None:
    big = result.kind.itemsize * math.prod(result.shape) > TIFF_LIMIT
    if big or result.path.name.lower().endswith((".ome.tif", ".ome.tiff")):
        _write_ome(path, result, big)
    else:
        _write_imagej(path, result)


def write_map(path: Path, values: np.ndarray, result: Result) -> None:
    """Write one picture of floats in the scale of the frames."""
    unit, resolution = _resolution(result)
    tifffile.imwrite(
        path, values, imagej=True, metadata={"axes": "YX", **unit}, resolution=resolution
    )


def _write_imagej(path: Path, result: Result) -> None:
    calibration, top = result.calibration, result.stored_full_scale
    unit, resolution = _resolution(result)
    metadata: dict[str, Any] = {"axes": "TYX", "Info": "-", **unit}  # written anew below
    if top is None:
        metadata |= {"min": 0.0, "max": calibration.full_scale}  # what is shown as black and white
    else:
        if result.said.slope is not None:
            # ImageJ's calibration function: it shows values, not the numbers that stand for them.
            metadata |= {"cf": 0, "c0": 0.0, "c1": result.said.slope}
            metadata["vunit"] = printable(calibration.unit) or "Gray Value"
        metadata |= {"min": 0.0, "max": float(top)}
    if calibration.frame_rate_hz:
        metadata |= {"fps": calibration.frame_rate_hz, "finterval": 1 / calibration.frame_rate_hz}
    with tifffile.TiffWriter(path, imagej=True) as file:
        file.write(
            result.frames,
            shape=result.shape,
            dtype=result.kind,
            photometric="minisblack",
            metadata=metadata,
            resolution=resolution,
        )
    with tifffile.TiffFile(path, mode="r+") as tif:
        info = {"Info": "\n".join((*_told(result), result.text()))}  # shown by Show Info
        for tag in tifffile.tifffile.imagej_metadata_tag(info, tif.byteorder):
            tif.pages.first.tags[tag[0]].overwrite(tag[3])


def _write_ome(path: Path, result: Result, big: bool) -> None:
    calibration = result.calibration
    metadata: dict[str, Any] = {"Name": printable(result.path.name)}
    if calibration.frame_rate_hz:
        metadata |= {"TimeIncrement": 1 / calibration.frame_rate_hz, "TimeIncrementUnit": "s"}
    if calibration.pixel_size_um:
        for axis in "XY":
            metadata |= {
                f"PhysicalSize{axis}": calibration.pixel_size_um,
                f"PhysicalSize{axis}Unit": "µm",
            }
    if result.stored_full_scale is not None:
        metadata["SignificantBits"] = result.stored_full_scale.bit_length()
    if result.times_s is not None:
        metadata["Plane"] = {
            "DeltaT": result.times_s.tolist(),
            "DeltaTUnit": ["s"] * result.shape[0],
        }
    with tifffile.TiffWriter(path, bigtiff=big, ome=False) as file:
        file.write(
            result.frames,
            shape=result.shape,
            dtype=result.kind,
            photometric="minisblack",
            description="-",
            metadata=None,
            resolution=_resolution(result)[1],
        )
    text = "\n".join((*_told(result), result.text()))
    # Not a random name: the same result is the same file.
    name = uuid.uuid5(uuid.NAMESPACE_OID, text)
    xml = tifffile.OmeXml(UUID=f"urn:uuid:{name}")
    count, height, width = result.shape
    xml.addimage(
        result.kind,
        (count, height, width),
        (count, 1, 1, height, width, 1),
        axes="TYX",
        Description=text,
        **metadata,
    )
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages.first.tags["ImageDescription"].overwrite(xml.tostring(declaration=True).encode())


def _resolution(result: Result) -> tuple[dict[str, Any], tuple[float, float] | None]:
    """ImageJ's unit, and pixels per unit, as TIFF counts them."""
    size = result.calibration.pixel_size_um
    return ({"unit": "um"}, (1 / size, 1 / size)) if size else ({}, None)


def _told(result: Result) -> list[str]:
    """Lines to be read by people."""
    return [
        f"first frame: {result.first_frame}",
        result.meaning(),
        *map(printable, result.calibration.notes),
        *_lost(result),
    ]


def _lost(result: Result) -> list[str]:
    """A line that says so where the frames are not equally spaced."""
    if result.calibration.times_s is None or result.times_s is None:
        return []
    steps = np.diff(result.times_s)
    if len(steps) == 0 or steps.max() < 1.5 * np.median(steps):
        return []
    return ["frames not equally spaced in time, as the fast camera lost some: see times_s below"]
