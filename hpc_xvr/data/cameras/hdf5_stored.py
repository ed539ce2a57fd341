"""Whether all of a dataset was stored: HDF5 returns zeros for what was never written, and for parts
and raw files that are missing or too short."""

from __future__ import annotations

import importlib
import itertools
import math
import os
from collections.abc import Collection
from contextlib import suppress

import h5py
import numpy as np

from hpc_xvr.data.cameras.hdf5_links import Files, Place
from hpc_xvr.data.cameras.hdf5_virtual import frames_named, pieces_of
from hpc_xvr.errors import InputError

BUDGET = 2**30
"""Bytes of a frame, and of a chunk: what is held in memory at once."""
DEFLATE_LIMIT = 1100
"""Deflate shrinks nothing by more than 1 : 1032."""
PREFIX = "HDF5_EXTFILE_PREFIX"
"""Environment variable by which HDF5 would read other raw files than those looked at."""
_FILTERS = {
    4: "szip",
    307: "bzip2",
    32000: "lzf",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32017: "sz",
    32018: "fcidecomp",
    32024: "sz3",
    32026: "blosc2",
    32028: "sperr",
}


def check_stored(
    files: Files,
    place: Place,
    frame_axis: int = 0,
    within: tuple[tuple[str, str], ...] = (),
    lenient: bool = False,
) -> None:
    """Refuse a dataset of which something is missing, damaged or not allowed.

    Args:
        frame_axis: the axis that is called frame in messages.
        within: the virtual datasets that it is part of.
        lenient: what is missing is no error here, but where it is read (see `hdf5_virtual.Reader`).

    Raises:
        InputError: the message names the part or the frame.
    """
    files.close_some()
    dataset = files.item(place)
    if dataset.is_virtual:
        own = (str(place.path.resolve()), place.name)
        if own in within:  # HDF5 crashes on it
            raise InputError(f"{place}: is made of itself: the file is damaged, copy it again")
        parts = dict.fromkeys(
            piece.place for piece in pieces_of(files, place, frame_axis, [] if lenient else None)
        )
        for part in parts:
            check_stored(files, part, frame_axis, (*within, own), lenient)
        return
    _check_filters(place, dataset)
    if dataset.external is not None:
        _check_raw_files(files, place, dataset, lenient)
    elif dataset.chunks:
        _check_chunks(place, dataset, frame_axis, lenient)
    elif (stored := dataset.id.get_storage_size()) < dataset.nbytes:
        raise InputError(
            f"{place}: stores {stored} of {dataset.nbytes} bytes: the recording is incomplete"
        )


def _check_filters(place: Place, dataset: h5py.Dataset) -> None:
    created = dataset.id.get_create_plist()
    codes = [created.get_filter(k)[0] for k in range(created.get_nfilters())]
    if all(h5py.h5z.filter_avail(code) for code in codes):
        return
    with suppress(ImportError):
        importlib.import_module("hdf5plugin")  # makes its filters known to HDF5
    for code in codes:
        if not h5py.h5z.filter_avail(code):
            name = _FILTERS.get(code, "a filter")
            raise InputError(
                f"{place}: is compressed with {name} (HDF5 filter {code}), which is not installed: "
                "pip install hdf5plugin, or store it again with gzip"
            )


def _check_chunks(place: Place, dataset: h5py.Dataset, frame_axis: int, lenient: bool) -> None:
    chunk = dataset.dtype.itemsize * math.prod(dataset.chunks)
    if chunk > BUDGET:
        raise InputError(
            f"{place}: has chunks of {chunk} bytes, and more than {BUDGET} are not read at once: "
            "store it again with chunks of one frame"
        )
    counts = [math.ceil(n / c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)]
    wanted, written = math.prod(counts), dataset.id.get_num_chunks()
    if written < wanted and not lenient:
        raise InputError(
            f"{place}: only {written} of {wanted} chunks were written"
            f"{_first_missing(dataset, counts, frame_axis)}: the recording is incomplete"
        )
    stored = dataset.id.get_storage_size()
    if dataset.compression in (None, "gzip") and written * chunk > DEFLATE_LIMIT * stored:
        raise InputError(
            f"{place}: states {written * chunk} bytes but stores {stored}: the file is damaged, "
            "copy it again"
        )


def _first_missing(dataset: h5py.Dataset, counts: list[int], axis: int) -> str:
    """ ", none of frames 7 to 9": the first gap along an axis, if it can be told."""
    if axis >= len(counts) or math.prod(counts) > 2**20 or not hasattr(dataset.id, "chunk_iter"):
        return ""
    there = np.zeros(counts[axis], np.int64)

    def count(info: h5py.h5d.StoreInfo) -> None:
        there[info.chunk_offset[axis] // dataset.chunks[axis]] += 1

    if dataset.id.get_num_chunks():
        dataset.id.chunk_iter(count)
    rows = np.flatnonzero(there < math.prod(counts) // counts[axis])
    if not rows.size:
        return ""
    size = dataset.chunks[axis]
    run = int(np.flatnonzero(np.diff(rows, append=-1) != 1)[0]) + 1  # rows without a break
    first, stop = int(rows[0]), int(rows[0]) + run
    return f", not all of {frames_named(first * size, min(stop * size, dataset.shape[axis]))}"


def stored_frames(
    dataset: h5py.Dataset,
    axis: int,
    known: int = 0,
    closed: bool = False,
    lost: Collection[int] = (),
) -> int:
    """Frames from the first one on of which all was written, of a dataset in chunks that grows.

    A chunk of several frames may be written when some of them are there, so it counts when one
    behind it was written, or the writer has `closed` the file.

    Args:
        axis: that counts frames.
        known: frames that were there at an earlier look.
        lost: frames, in chunks of their own, that will never be there and count as if they were.
    """
    size = dataset.chunks[axis]
    starts = [range(0, n, c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)]
    rows = len(starts[axis])

    def written(row: int) -> bool:
        starts[axis] = range(row * size, row * size + 1)
        return all(
            dataset.id.get_chunk_info_by_coord(at).byte_offset is not None
            for at in itertools.product(*starts)
        )

    row = known // size
    while row < rows and (row in lost or written(row)):
        row += 1
    if size > 1 and not closed:
        row = max(row - 1, 0)
    return int(min(row * size, dataset.shape[axis]))


def _check_raw_files(files: Files, place: Place, dataset: h5py.Dataset, lenient: bool) -> None:
    """External storage: pieces of files without structure, one after the other."""
    if os.environ.get(PREFIX):
        raise InputError(
            f"{place}: lies in raw files; the environment variable {PREFIX} leads elsewhere: "
            "unset it"
        )
    have, problem = files.raw_bytes(place, dataset)
    if have < dataset.nbytes and not lenient:
        raise InputError(f"{place}: {problem}")
