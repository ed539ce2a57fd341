"""NeXus: silx and h5web show a movie with a slider; NXtomo's reader finds frames and pixel size."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from hpc_xvr.reconstruction.writers.about import Result
from hpc_xvr.reconstruction.writers.hdf5 import frames_dataset, new_file, store_about, store_times
from hpc_xvr.text import printable
from hpc_xvr.version import __version__


def write(path: Path, result: Result) -> None:
    """Write /entry/data (NXdata, the default) over the frames in /entry/instrument/detector/data.

    The entry is an application definition NXtomo as far as a movie can be: all frames are
    projections, and their angle is not a number, as it is not known.
    """
    calibration, (count, height, width) = result.calibration, result.shape
    with new_file(path) as (file, check):
        file.attrs.update({"NX_class": "NXroot", "default": "entry", "creator": "hpc_xvr"})
        entry = _group(file, "entry", "NXentry")
        entry.attrs.update({"default": "data", "version": 2.1})  # of nxtomo's paths
        entry["definition"] = "NXtomo"
        entry["title"] = printable(result.path.name)
        detector = _group(_group(entry, "instrument", "NXinstrument"), "detector", "NXdetector")
        frames = frames_dataset(detector, "data", result)
        frames.attrs["interpretation"] = "image"
        frames.attrs["long_name"] = _label(result)
        for name in ("image_key", "image_key_control"):
            detector[name] = np.zeros(count, np.int32)  # projections
        sample = _group(entry, "sample", "NXsample")
        sample["name"] = printable(result.path.stem)
        sample["rotation_angle"] = np.full(count, np.nan)
        sample["rotation_angle"].attrs["units"] = "degree"
        if calibration.frame_rate_hz:
            detector["frame_time"] = 1 / calibration.frame_rate_hz
            detector["frame_time"].attrs["units"] = "s"
        if calibration.pixel_size_um:
            for name in ("x_pixel_size", "y_pixel_size"):  # on the object
                for group in (detector, sample):
                    group[name] = calibration.pixel_size_um * 1e-6
                    group[name].attrs["units"] = "m"
        data = _group(entry, "data", "NXdata")
        data["data"] = frames
        data.attrs.update({"signal": "data", "axes": ["time", "y", "x"], "interpretation": "image"})
        if not store_times(data, result):
            data["time"] = np.arange(result.first_frame, result.first_frame + count)
        data["time"].attrs["long_name"] = "frame" if result.times_s is None else "time (s)"
        side, unit = (
            calibration.pixel_size_um or 1.0,
            "um" if calibration.pixel_size_um else "pixel",
        )
        for name, size in (("y", height), ("x", width)):
            data[name] = np.arange(size) * side
            data[name].attrs.update({"units": unit, "long_name": f"{name} ({unit})"})
        for name, source in (
            ("rotation_angle", sample["rotation_angle"]),
            ("image_key", detector["image_key"]),
        ):
            data[name] = source
        if (slope := result.said.slope) is not None:
            data["data_scaling_factor"] = slope
            data["data_scaling_factor"].attrs["long_name"] = "data times this is physical"
        for number, frame in enumerate(result.frames):
            frames[number] = frame
            check()
        process = _group(entry, "reconstruction", "NXprocess")
        process["program"], process["version"] = "hpc_xvr", __version__
        note = _group(process, "note", "NXnote")
        store_about(note, result)
        note["type"] = "application/json"


def _label(result: Result) -> str:
    """What viewers write beside the colours, which they show of the numbers that are stored."""
    if result.calibration.unit:
        return result.meaning()
    return (
        "transmission" if result.stored_full_scale is None else f"transmission, {result.meaning()}"
    )


def _group(parent: h5py.Group, name: str, kind: str) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs["NX_class"] = kind
    return group
