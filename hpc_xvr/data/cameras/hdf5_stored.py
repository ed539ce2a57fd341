"""Whether all of a dataset was stored: HDF5 returns zeros for what was never written, for what no
part of a virtual dataset covers, and for parts and raw files that are missing or too short."""

from __future__ import annotations

import importlib
import math
import os
from contextlib import suppress
from typing import NamedTuple

import h5py
import numpy as np

from hpc_xvr.data.cameras.hdf5_links import Files, Place
from hpc_xvr.errors import InputError

BUDGET = 2**30
"""Bytes of a frame, and of a chunk: what is held in memory at once."""
DEFLATE_LIMIT = 1100
"""Deflate shrinks nothing by more than 1 : 1032."""
MOST_CELLS = 2**27
"""Of the grid on which the parts of a virtual dataset are laid."""
LONGEST = 2**27
"""Elements along one axis of a virtual dataset."""
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
_PREFIXES = ("HDF5_VDS_PREFIX", "HDF5_EXTFILE_PREFIX", "HDF5_EXT_PREFIX")


def check_stored(
    files: Files, place: Place, frame_axis: int = 0, within: tuple[tuple[str, str], ...] = ()
) -> None:
    """Refuse a dataset of which something is missing, damaged or not allowed.

    Args:
        frame_axis: the axis that is called frame in messages.
        within: the virtual datasets that it is part of.

    Raises:
        InputError: the message names the part or the frame.
    """
    dataset = files.item(place)
    if dataset.is_virtual or dataset.external is not None:
        for name in _PREFIXES:
            if os.environ.get(name):
                raise InputError(
                    f"{place}: consists of several files, and the environment variable {name} "
                    "says that they are elsewhere: unset it"
                )
    if dataset.is_virtual:
        _check_virtual(files, place, dataset, frame_axis, within)
        return
    _check_filters(place, dataset)
    if dataset.external is not None:
        if within:
            raise InputError(
                f"{place}: lies in raw files, which HDF5 does not find from a virtual dataset: "
                "read this file by itself"
            )
        _check_raw_files(files, place, dataset)
    elif dataset.chunks:
        _check_chunks(place, dataset, frame_axis)
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


def _check_chunks(place: Place, dataset: h5py.Dataset, frame_axis: int) -> None:
    chunk = dataset.dtype.itemsize * math.prod(dataset.chunks)
    if chunk > BUDGET:
        raise InputError(
            f"{place}: has chunks of {chunk} bytes, and more than {BUDGET} are not read at once: "
            "store it again with chunks of one frame"
        )
    counts = [math.ceil(n / c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)]
    wanted, written = math.prod(counts), dataset.id.get_num_chunks()
    if written < wanted:
        raise InputError(
            f"{place}: only {written} of {wanted} chunks were written"
            f"{_first_missing(dataset, counts, frame_axis)}: the recording is incomplete"
        )
    stored = dataset.id.get_storage_size()
    if dataset.compression in (None, "gzip") and wanted * chunk > DEFLATE_LIMIT * stored:
        raise InputError(
            f"{place}: states {wanted * chunk} bytes but stores {stored}: the file is damaged, "
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
    return f", not all of {_frames(first * size, min(stop * size, dataset.shape[axis]))}"


def _check_raw_files(files: Files, place: Place, dataset: h5py.Dataset) -> None:
    """External storage: pieces of files without structure, one after the other."""
    have = 0
    for name, offset, size in dataset.external:
        raw = files.beside(place.path, name, f"the raw file of dataset /{place.name}")
        left = dataset.nbytes - have
        wanted = min(left, size) if size != h5py.h5f.UNLIMITED else left
        there = max(0, min(wanted, raw.stat().st_size - offset))
        if there < wanted:
            raise InputError(
                f"{place}: its raw file {raw} has {there} of {wanted} bytes: the recording is "
                "incomplete, copy that file again"
            )
        have += there
    if have < dataset.nbytes:
        raise InputError(
            f"{place}: its raw files have {have} of {dataset.nbytes} bytes: the recording is "
            "incomplete"
        )


class _Spans(NamedTuple):
    """Pieces of one axis: where they begin, and the length of each."""

    starts: np.ndarray
    length: int

    @property
    def end(self) -> int:
        return int(self.starts[-1]) + self.length if self.starts.size else 0


_Box = tuple[_Spans, ...]


def _check_virtual(
    files: Files,
    place: Place,
    dataset: h5py.Dataset,
    frame_axis: int,
    within: tuple[tuple[str, str], ...],
) -> None:
    """The parts must be there, as large as the dataset says, and cover all of it.

    HDF5 crashes on a dataset that is part of itself.
    """
    within = (*within, (str(place.path.resolve()), place.name))
    boxes: list[_Box] = []
    done: set[Place] = set()
    for part in dataset.virtual_sources():
        if "%" in part.file_name or "%" in part.dset_name:
            raise InputError(
                f"{place}: its parts are named by the pattern {part.file_name}, which is not "
                "supported: read the parts one by one"
            )
        own = part.file_name == "."
        what = f"the part {part.file_name} of dataset /{place.name}"
        path = place.path if own else files.beside(place.path, part.file_name, what)
        there = files.locate(part.dset_name, Place(path))
        if there is not None and (str(there.path.resolve()), there.name) in within:
            raise InputError(f"{place}: is made of itself: the file is damaged, copy it again")
        source = None if there is None else files.item(there)
        mapped = _boxes(part.vspace, part.src_space, dataset, source)
        frames = _frames_of(mapped, frame_axis)
        if there is None or not isinstance(source, h5py.Dataset):
            raise InputError(
                f"{place}: {frames} should come from {part.file_name}, which has no dataset "
                f"{part.dset_name}: the recording is incomplete"
            )
        if not _holds(source, part.src_space, part.vspace):
            raise InputError(
                f"{place}: {frames} should come from {part.file_name}, whose dataset "
                f"{part.dset_name} has only the size {_size(source.shape)}: the recording is "
                "incomplete"
            )
        if not np.can_cast(source.dtype, dataset.dtype, "safe"):
            raise InputError(
                f"{place}: holds {dataset.dtype}, its part {part.file_name} {source.dtype}, which "
                "does not fit into it: read the parts one by one"
            )
        if there not in done:
            check_stored(files, there, frame_axis, within)
            done.add(there)
        boxes += mapped
    hole = _hole(place, dataset.shape, boxes)
    if hole is not None:
        raise InputError(
            f"{place}: nothing is stored for frame {hole[frame_axis]}, as no part is mapped to "
            f"{list(hole)}: the recording is incomplete"
        )


def _boxes(
    virtual: h5py.h5s.SpaceID,
    stated: h5py.h5s.SpaceID,
    dataset: h5py.Dataset,
    source: h5py.Dataset | None,
) -> list[_Box]:
    """What a mapping covers of a dataset; each box is the product of its spans."""
    kind = virtual.get_select_type()
    if kind == h5py.h5s.SEL_NONE:
        return []
    if kind == h5py.h5s.SEL_ALL:
        return [tuple(_Spans(np.zeros(1, np.int64), n) for n in dataset.shape)]
    if not virtual.is_regular_hyperslab():
        return [
            tuple(
                _Spans(np.array([low]), int(high - low) + 1)
                for low, high in zip(*corners, strict=True)
            )
            for corners in virtual.get_select_hyper_blocklist().astype(np.int64)
        ]
    slab = zip(*virtual.get_regular_hyperslab(), dataset.shape, strict=True)
    spans = []
    for axis, (start, stride, count, block, n) in enumerate(slab):
        unlimited = h5py.h5s.UNLIMITED in (count, block)
        if unlimited:  # as much as the part has
            count, block = _available(stated, source, axis, count, block)
        if max(start + stride * max(0, count - 1) + block, n) > LONGEST:
            raise InputError(f"dataset {dataset.name}: states an axis of {n}: the file is damaged")
        if stride == block or count == 1:
            spans.append(_Spans(np.array([start][: count * block]), count * block))
        else:
            spans.append(_Spans(start + stride * np.arange(count), block))
        if unlimited and spans[-1].end > n:
            spans[-1] = _Spans(np.array([start]), n - start)
    return [tuple(spans)]


def _available(
    stated: h5py.h5s.SpaceID, source: h5py.Dataset | None, axis: int, count: int, block: int
) -> tuple[int, int]:
    """Count and block of a selection without end."""
    if source is None or axis >= source.ndim:
        return 0, 0
    length, start, stride, own_block = source.shape[axis], 0, block, block
    if stated.get_select_type() == h5py.h5s.SEL_HYPERSLABS and stated.is_regular_hyperslab():
        start, stride, _, own_block = (int(v[axis]) for v in stated.get_regular_hyperslab())
    if h5py.h5s.UNLIMITED in (block, own_block):
        return 1, max(0, length - start)
    return max(0, (length - start - own_block) // stride + 1), block


def _holds(source: h5py.Dataset, stated: h5py.h5s.SpaceID, virtual: h5py.h5s.SpaceID) -> bool:
    """Whether what is mapped from a part lies within it."""
    kind = stated.get_select_type()
    if kind == h5py.h5s.SEL_ALL:
        return _unlimited(virtual) or bool(source.size == virtual.get_select_npoints())
    if kind != h5py.h5s.SEL_HYPERSLABS:
        return bool(kind == h5py.h5s.SEL_NONE)
    if len(stated.get_simple_extent_dims()) != source.ndim:
        return False
    if not _unlimited(stated):
        return all(
            high < n for high, n in zip(stated.get_select_bounds()[1], source.shape, strict=True)
        )
    slab = zip(*stated.get_regular_hyperslab(), source.shape, strict=True)
    return all(
        h5py.h5s.UNLIMITED in (count, block) or start + stride * (count - 1) + block <= n
        for start, stride, count, block, n in slab
    )


def _unlimited(space: h5py.h5s.SpaceID) -> bool:
    if space.get_select_type() != h5py.h5s.SEL_HYPERSLABS or not space.is_regular_hyperslab():
        return False
    _, _, counts, blocks = space.get_regular_hyperslab()
    return h5py.h5s.UNLIMITED in (*counts, *blocks)


def _hole(place: Place, shape: tuple[int, ...], boxes: list[_Box]) -> tuple[int, ...] | None:
    """The first element that no box covers.

    All spans begin and end at the lines of a grid, so that only one bit a cell is needed.
    """
    if not math.prod(shape):
        return None
    lines = []
    for axis, n in enumerate(shape):
        ends = [np.array([0, n])]
        for box in boxes:
            ends += [box[axis].starts, box[axis].starts + box[axis].length]
        unique = np.unique(np.concatenate(ends))
        lines.append(unique[unique <= n])
    cells = [len(line) - 1 for line in lines]
    if math.prod(cells) > MOST_CELLS:
        raise InputError(f"{place}: is made of too many pieces: read its parts one by one")
    covered = np.zeros(cells, bool)
    for box in boxes:
        covered[np.ix_(*(_cells(spans, line) for spans, line in zip(box, lines, strict=True)))] = (
            True
        )
    if covered.all():
        return None
    first = np.unravel_index(int(np.argmin(covered)), cells)
    return tuple(int(line[cell]) for line, cell in zip(lines, first, strict=True))


def _cells(spans: _Spans, lines: np.ndarray) -> np.ndarray:
    first = np.searchsorted(lines, spans.starts)
    stop = np.searchsorted(lines, spans.starts + spans.length)
    if first.size == 1:
        return np.arange(first[0], min(stop[0], len(lines) - 1))
    edges = np.zeros(len(lines) + 1, np.int64)
    np.add.at(edges, first, 1)
    np.add.at(edges, stop, -1)
    return np.flatnonzero(np.cumsum(edges)[: len(lines) - 1] > 0)


def _frames_of(boxes: list[_Box], axis: int) -> str:
    spans = [box[axis] for box in boxes if axis < len(box) and box[axis].starts.size]
    if not spans:
        return "some frames"
    return _frames(min(int(s.starts[0]) for s in spans), max(s.end for s in spans))


def _frames(start: int, stop: int) -> str:
    return f"frame {start}" if stop - start == 1 else f"frames {start} to {stop - 1}"


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
