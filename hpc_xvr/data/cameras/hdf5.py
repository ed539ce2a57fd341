"""HDF5: the DXchange layout of synchrotrons, and any 2-D or 3-D dataset of another file.

DXchange: frames in /exchange/data (T, H, W), corrected by /exchange/data_white and data_dark.
"""

from __future__ import annotations

import math
import mmap
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_xvr.data.cameras.flatfield import mean_frame, transmission
from hpc_xvr.data.cameras.recording import Recording, array_recording, check_shape
from hpc_xvr.errors import InputError

DATA, WHITE, DARK = "exchange/data", "exchange/data_white", "exchange/data_dark"
DETECTOR = "measurement/instrument/detector"
RESOLUTION = "measurement/instrument/detection_system/objective/resolution"
BLOCK = 2**26
"""Bytes of frames read at once, and of the chunk cache."""
DEFLATE_LIMIT = 1100
"""Deflate shrinks nothing by more than 1 : 1032."""


def open_hdf5(
    path: Path,
    dataset: str | None = None,
    own_flat: bool = True,
    bit_depth: int | None = None,
    full_scale: float | None = None,
) -> Recording:
    """Open one dataset, (T, H, W) or (H, W): the named one, /exchange/data, or the only one.

    With `own_flat` the white and dark frames of a DXchange file are applied.

    Raises:
        InputError: no such dataset, several to choose from (they are listed), chunks that were
            never written, or a damaged file.
    """
    with _open(path) as file:
        name = _choose(path, file, dataset)
        white = _frames_in(file, WHITE) if name == DATA and own_flat else 0
        dark = _frames_in(file, DARK) if white else 0
        fields = _description(file)
    counts = bool(white)
    data = _recording(path, name, bit_depth, None if counts else full_scale, fields)
    if not white:
        return data
    flat_field = mean_frame(_recording(path, WHITE, None, None, {}))
    dark_field = mean_frame(_recording(path, DARK, None, None, {})) if dark else None
    return transmission(data, flat_field, dark_field, full_scale)


def _open(path: Path) -> h5py.File:
    stat = path.stat()
    _check_survivable(path, stat.st_size, stat.st_mtime_ns)
    return h5py.File(path, "r", locking=False, rdcc_nbytes=BLOCK)


@lru_cache(maxsize=1024)
def _check_survivable(path: Path, size: int, changed: int) -> None:
    """Refuse a file that crashes the HDF5 library, which some damaged virtual datasets do.

    Another process opens all that is in the file first. As that takes a fifth of a second, it is
    done only where the file has a global heap, which holds the parts of virtual datasets.

    Raises:
        InputError: the process was killed by a signal.
    """
    if not _has_global_heap(path, size):
        return
    done = subprocess.run(
        [sys.executable, "-I", "-c", _LOOK_AT_ALL, str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode < 0:
        raise InputError(
            f"{path}: the HDF5 library crashes when it opens what is in this file: it is damaged, "
            "copy or export it again"
        )


_LOOK_AT_ALL = """
import sys, h5py
with h5py.File(sys.argv[1], "r", locking=False) as file:
    file.visititems(lambda name, item: None)
"""


def _has_global_heap(path: Path, size: int) -> bool:
    """Whether the mark of one stands in the first or last bytes of a file."""
    if size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(b"GCOL", 0, BLOCK) >= 0 or data.find(b"GCOL", max(0, size - BLOCK)) >= 0


def _recording(
    path: Path, name: str, bit_depth: int | None, full_scale: float | None, fields: dict[str, Any]
) -> Recording:
    with _open(path) as file:
        dataset = file[name]
        shape = dataset.shape if dataset.ndim == 3 else (1, *dataset.shape)
        native, flat = dataset.dtype, dataset.ndim == 2
        check_shape(path, shape)
        _check_stored(path, dataset)
        per_frame = native.itemsize * shape[1] * shape[2]
        chunk = dataset.chunks[0] if dataset.chunks and not flat else 1
    block = max(1, min(chunk, BLOCK // per_frame))

    def source(start: int, stop: int) -> Iterator[np.ndarray]:
        with _open(path) as file:
            dataset = file[name]
            for first in range(start, stop, block):
                yield from [dataset[()]] if flat else dataset[first : min(first + block, stop)]

    return array_recording(path, shape, native, source, bit_depth, full_scale, **fields)


def _choose(path: Path, file: h5py.File, dataset: str | None) -> str:
    if dataset is not None:
        found = file.get(dataset.strip("/"))
        if isinstance(found, h5py.Dataset) and found.ndim in (2, 3):
            return dataset.strip("/")
        raise InputError(
            f"{path}: has no 2-D or 3-D dataset {dataset}: choose from {_listed(_candidates(file))}"
        )
    if isinstance(file.get(DATA), h5py.Dataset) and file[DATA].ndim in (2, 3):
        return DATA
    names = _candidates(file)
    if len(names) == 1:
        return names[0]
    if not names:
        raise InputError(
            f"{path}: holds no 2-D or 3-D dataset of numbers: frames are (H, W) or (frames, H, W)"
        )
    raise InputError(f"{path}: holds several datasets, choose one with --dataset: {_listed(names)}")


def _candidates(file: h5py.File) -> list[str]:
    names: list[str] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim in (2, 3) and item.dtype.kind in "uif":
            names.append(name)

    file.visititems(visit)
    return names


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"/{name}" for name in names[:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown or "none"


def _frames_in(file: h5py.File, name: str) -> int:
    found = file.get(name)
    if not isinstance(found, h5py.Dataset) or found.ndim not in (2, 3) or not found.size:
        return 0
    return found.shape[0] if found.ndim == 3 else 1


def _check_stored(path: Path, dataset: h5py.Dataset) -> None:
    """HDF5 returns zeros for what was never written: refuse that, and damaged sizes."""
    nbytes = dataset.dtype.itemsize * math.prod(dataset.shape)
    if dataset.is_virtual:
        _check_parts(path, dataset, [])
        return
    stored = dataset.id.get_storage_size()
    if dataset.chunks:
        wanted = math.prod(
            math.ceil(n / c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)
        )
        written = dataset.id.get_num_chunks()
        if written < wanted:
            raise InputError(
                f"{path}, dataset {dataset.name}: only {written} of {wanted} chunks "
                "were written: the recording is incomplete"
            )
        chunk = dataset.dtype.itemsize * math.prod(dataset.chunks)
        if dataset.compression in (None, "gzip") and wanted * chunk > DEFLATE_LIMIT * stored:
            raise InputError(
                f"{path}, dataset {dataset.name}: states {wanted * chunk} bytes but "
                f"stores {stored}: the file is damaged, copy it again"
            )
    elif dataset.external is None and stored < nbytes:
        raise InputError(
            f"{path}, dataset {dataset.name}: stores {stored} of {nbytes} bytes: the "
            "recording is incomplete"
        )


def _check_parts(path: Path, dataset: h5py.Dataset, within: list[tuple[str, str]]) -> None:
    """Parts of a virtual dataset must exist; HDF5 crashes on a dataset that is part of itself."""
    within = [*within, (str(path.resolve()), dataset.name.strip("/"))]
    for part in dataset.virtual_sources():
        there = path if part.file_name == "." else path.parent / part.file_name
        if not there.exists():
            raise InputError(
                f"{path}, dataset {dataset.name}: its part {part.file_name} is "
                "missing: put it beside the file"
            )
        if (str(there.resolve()), part.dset_name.strip("/")) in within:
            raise InputError(
                f"{path}, dataset {dataset.name}: is made of itself: the file is damaged, copy it "
                "again"
            )
        with _open(there) as file:
            found = file.get(part.dset_name)
            if isinstance(found, h5py.Dataset) and found.is_virtual:
                _check_parts(there, found, within)


def _description(file: h5py.File) -> dict[str, Any]:
    """Camera, frame rate, exposure and pixel size where a DXchange file states them."""
    maker, model = (_scalar(file, f"{DETECTOR}/{key}") for key in ("manufacturer", "model"))
    camera = " ".join(str(part) for part in (maker, model) if isinstance(part, str) and part)
    fields: dict[str, Any] = {"camera": camera} if camera else {}
    for field, name in (
        ("frame_rate_hz", f"{DETECTOR}/frame_rate"),
        ("exposure_s", f"{DETECTOR}/exposure_time"),
        ("pixel_size_um", RESOLUTION),
    ):
        value = _scalar(file, name)
        if isinstance(value, float) and 0 < value < float("inf"):
            fields[field] = value
    return fields


def _scalar(file: h5py.File, name: str) -> str | float | None:
    item = file.get(name)
    if not isinstance(item, h5py.Dataset) or item.size != 1:
        return None
    value = item[()]
    value = value.reshape(-1)[0] if isinstance(value, np.ndarray) else value
    if isinstance(value, bytes):
        return value.decode(errors="replace").strip("\0 ")
    return float(value) if np.issubdtype(type(value), np.number) else str(value)
