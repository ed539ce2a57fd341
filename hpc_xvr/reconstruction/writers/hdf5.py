"""HDF5 in the layout DXchange, as synchrotrons store their recordings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_xvr.data.cameras import results
from hpc_xvr.data.corpus.stores.hdf5 import DeferredErrorsFile
from hpc_xvr.reconstruction.writers.about import Result
from hpc_xvr.text import printable

IMPLEMENTS = "exchange:measurement:provenance"


def write(path: Path, result: Result) -> None:
    """Write /exchange/data and what says of it: times, units, rate and pixel size, flat and dark
    constants with which transmissions come out, angles that are not known."""
    calibration, (count, *size) = result.calibration, result.shape
    with new_file(path) as (file, check):
        file["implements"] = IMPLEMENTS
        file["exchange/title"] = printable(result.path.name)
        data = frames_dataset(file, "exchange/data", result)
        data.attrs["axes"] = "time:y:x"
        data.attrs["description"] = "frames reconstructed from two cameras"
        store_times(file["exchange"], result)
        # Tomography programs ask for angles, and make them up where there are none.
        file["exchange/theta"] = np.full(count, np.nan)
        file["exchange/theta"].attrs["units"] = "deg"
        file["exchange/theta"].attrs["description"] = "not known: these frames are a time series"
        if not calibration.unit:
            top = 1.0 if result.stored_full_scale is None else result.stored_full_scale
            white = top / (1.0 if result.stored_full_scale is None else calibration.full_scale)
            for name, value in (("data_white", white), ("data_dark", 0.0)):
                constant = file.create_dataset(
                    f"exchange/{name}", (1, *size), np.float32, fillvalue=value
                )
                constant.attrs["axes"] = "time:y:x"
                constant.attrs["description"] = (
                    "a constant: frames that are normalised by it are transmissions"
                )
        detector = file.create_group("measurement/instrument/detector")
        if calibration.frame_rate_hz:
            _quantity(detector, "frame_rate", calibration.frame_rate_hz, "Hz")
        if calibration.pixel_size_um:
            objective = file.create_group("measurement/instrument/detection_system/objective")
            _quantity(objective, "resolution", calibration.pixel_size_um, "um")
        for frame_number, frame in enumerate(result.frames):
            data[frame_number] = frame
            check()
        store_about(file.create_group("provenance"), result)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """A file to be written, and what raises OSError when the disk has refused something."""
    disk = DeferredErrorsFile(path, "w")
    with contextlib.closing(disk):
        with h5py.File(disk, "w") as file:
            yield file, disk.check
        disk.check()


def frames_dataset(file: h5py.Group, name: str, result: Result) -> h5py.Dataset:
    """The dataset of the frames, still empty, with what our own reader needs to know."""
    said, calibration = result.said, result.calibration
    data = file.create_dataset(name, result.shape, result.kind, chunks=(1, *result.shape[1:]))
    data.attrs["program"] = results.PROGRAM
    data.attrs["first_frame"] = result.first_frame
    data.attrs["full_scale"] = said.full_scale
    if said.stored_full_scale is not None:
        data.attrs["stored_full_scale"] = said.stored_full_scale
    if calibration.unit:
        data.attrs["units"] = printable(calibration.unit)
    if said.notes:
        data.attrs["notes"] = "\n".join(said.notes)
    if calibration.frame_rate_hz:
        data.attrs["frame_rate_hz"] = calibration.frame_rate_hz
    if calibration.pixel_size_um:
        data.attrs["pixel_size_um"] = calibration.pixel_size_um
    return data


def store_times(group: h5py.Group, result: Result) -> bool:
    """The time of each frame in s, from the first frame of the fast recording, if it is known."""
    if result.times_s is None:
        return False
    stamps = result.calibration.times_s is not None
    group["time"] = result.times_s
    group["time"].attrs.update({"units": "s", "origin": results.STAMPS if stamps else "frame rate"})
    return True


def store_about(group: h5py.Group, result: Result) -> None:
    """The JSON text, values a frame and maps, when all frames are there."""
    group["about"] = result.text()
    group["about"].attrs["type"] = "application/json"
    for name, values in result.per_frame().items():
        group[f"per_frame/{name}"] = _array(values)
    for name, picture in result.maps().items():
        group[f"maps/{name}"] = picture


def _array(values: list[Any]) -> Any:
    """Numbers as floats, with NaN for None, others as texts."""
    if all(isinstance(value, int | float | None) for value in values):
        return np.array([np.nan if value is None else value for value in values], np.float64)
    return [str(value) for value in values]


def _quantity(group: h5py.Group, name: str, value: float, unit: str) -> None:
    group[name] = value
    group[name].attrs["units"] = unit
