"""Virtual datasets, read from their parts.

The HDF5 library returns fill values, zeros mostly, for parts that are missing, too short, or just
cannot be opened, as when a process has too many open files. So the parts are opened here.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import h5py
import numpy as np

from hpc_xvr.data.cameras.hdf5_links import Files, NotAllowed, Place
from hpc_xvr.data.cameras.recording import guarded
from hpc_xvr.errors import InputError

MOST_PIECES = 2**20
MOST_CELLS = 2**27
"""Of the grid on which the pieces of a virtual dataset are laid."""
UNLIMITED = h5py.h5s.UNLIMITED

Box = tuple[range, ...]
"""Indices along each axis."""


class Piece(NamedTuple):
    """A box of a virtual dataset, and the box of another dataset that it is mapped to."""

    place: Place
    own: Box
    theirs: Box
    axes: tuple[int | None, ...]
    """The own axis of each of theirs; None: it has one index."""


class Reader:
    """Reads boxes of datasets, of virtual ones from their parts.

    `lenient`: the datasets may have gaps, and it is an error only if a box has one.
    """

    def __init__(self, files: Files, lenient: bool = False) -> None:
        self._files = files
        self._gone: list[str] | None = [] if lenient else None
        self._pieces: dict[Place, tuple[list[Piece], np.ndarray, np.ndarray]] = {}

    def read(self, place: Place, box: Box) -> np.ndarray:
        """Values of a box whose indices rise by 1.

        Raises:
            InputError: a part is missing.
        """
        self._files.close_some()
        dataset = self._files.item(place)
        if not dataset.is_virtual:
            if self._gone is not None:
                _check_written(self._files, place, dataset, box)
            return np.asarray(dataset[tuple(slice(r.start, r.stop) for r in box)])
        values = np.empty([len(r) for r in box], dataset.dtype)
        if place not in self._pieces:
            pieces = pieces_of(self._files, place, gone=self._gone)
            first = np.array([[r[0] for r in piece.own] for piece in pieces])
            last = np.array([[r[-1] for r in piece.own] for piece in pieces])
            self._pieces[place] = pieces, first, last
        pieces, first, last = self._pieces[place]
        starts, stops = np.array([r.start for r in box]), np.array([r.stop for r in box])
        there = np.zeros(values.shape, bool) if self._gone is not None else None
        for k in np.flatnonzero(((first < stops) & (last >= starts)).all(1)) if pieces else ():
            self._copy(pieces[k], box, values, there)
        if there is not None and not there.all():
            why = self._gone[0] if self._gone else f"{place}: no part is mapped to it"
            raise InputError(
                f"{np.count_nonzero(~there)} of {there.size} values are missing ({why})"
            )
        return values

    def _copy(self, piece: Piece, box: Box, values: np.ndarray, there: np.ndarray | None) -> None:
        """What a piece has of a box into the values of the box; marks it as `there`."""
        cuts = [_within(own, r) for own, r in zip(piece.own, box, strict=True)]
        own = [r[cut] for r, cut in zip(piece.own, cuts, strict=True)]
        if not all(len(r) for r in own):
            return
        theirs = [
            r if axis is None else r[cuts[axis]]
            for r, axis in zip(piece.theirs, piece.axes, strict=True)
        ]
        whole = self.read(piece.place, tuple(range(r[0], r[-1] + 1) for r in theirs))
        part = whole[tuple(slice(None, None, r.step) for r in theirs)]
        inside = tuple(
            slice(r[0] - b.start, r[-1] + 1 - b.start, r.step)
            for r, b in zip(own, box, strict=True)
        )
        values[inside] = part.reshape([len(r) for r in own])
        if there is not None:
            there[inside] = True


def _within(own: range, box: range) -> slice:
    """Positions in `own` whose indices lie in `box`."""
    low, high = (-(-(edge - own.start) // own.step) for edge in (box.start, box.stop))
    return slice(max(0, low), max(0, min(len(own), high)))


def pieces_of(
    files: Files, place: Place, frame_axis: int = 0, gone: list[str] | None = None
) -> list[Piece]:
    """The pieces that a virtual dataset consists of; they cover all of it.

    Args:
        frame_axis: the axis that is called frame in messages.
        gone: gets what is wrong with parts that are missing or too short, which then are no error.

    Raises:
        InputError: a part is missing, outside the folders that are allowed, too small, or of
            another type, or nothing is mapped to some frame.
    """
    dataset = files.item(place)
    shape, dtype, sources = dataset.shape, dataset.dtype, dataset.virtual_sources()
    pieces: list[Piece] = []
    for source in sources:
        if "%" in source.file_name or "%" in source.dset_name:
            raise InputError(
                f"{place}: its parts are named by the pattern {source.file_name}, which is not "
                "supported: read the parts one by one"
            )
        which = _frames_of(source.vspace, shape, frame_axis)
        try:
            there, part = _part(files, place, source, which)
        except NotAllowed:
            raise
        except InputError as error:
            if gone is None:
                raise
            gone.append(str(error))
            continue
        if not np.can_cast(part.dtype, dtype, "safe"):
            raise InputError(
                f"{place}: holds {dtype}, its part {source.file_name} {part.dtype}, which does not "
                "fit into it: read the parts one by one"
            )
        mapped = _mapped(there, source.vspace, source.src_space, shape, part.shape)
        if mapped is None and gone is not None:
            promised = source.src_space.shape or _lengths(source.vspace, shape)
            fits = len(promised) == len(part.shape)
            whole = (
                _mapped(there, source.vspace, source.src_space, shape, promised) if fits else None
            )
            mapped = [short for piece in whole or [] for short in _as_far_as(part.shape, piece)]
            gone.append(f"{place}: the part {source.file_name} is too short")
        if mapped is None:
            raise InputError(
                f"{place}: {which} should come from {source.file_name}, whose "
                f"dataset {source.dset_name} has the size {' x '.join(map(str, part.shape))}, "
                "which does not fit: the recording is incomplete"
            )
        pieces += mapped
        if len(pieces) > MOST_PIECES:
            raise InputError(f"{place}: is made of too many pieces: read its parts one by one")
    hole = None if gone is not None else _hole(place, shape, pieces)
    if hole is not None:
        raise InputError(
            f"{place}: nothing is stored for frame {hole[frame_axis]}, as no part is mapped to "
            f"{list(hole)}: the recording is incomplete"
        )
    return pieces


def _part(
    files: Files, place: Place, source: h5py.VDSmap, which: str
) -> tuple[Place, h5py.Dataset]:
    """The dataset that some frames of a virtual dataset come from.

    Raises:
        InputError: it is missing, cannot be opened, or lies where reading is not allowed.
    """
    path = place.path
    if source.file_name != ".":
        what = f"the part {source.file_name} of dataset /{place.name}"
        path = files.beside(place.path, source.file_name, what)
    with guarded(str(path)):
        there = files.locate(source.dset_name, Place(path))
        part = None if there is None else files.item(there)
    if there is None or not isinstance(part, h5py.Dataset):
        raise InputError(
            f"{place}: {which} should come from {source.file_name}, which has no dataset "
            f"{source.dset_name}: the recording is incomplete"
        )
    return there, part


def _as_far_as(shape: tuple[int, ...], piece: Piece) -> list[Piece]:
    """What is left of a piece of a dataset that is smaller than it should be."""
    own, theirs = list(piece.own), list(piece.theirs)
    for k, (r, n) in enumerate(zip(piece.theirs, shape, strict=True)):
        there = r[: _within(r, range(n)).stop]
        if not there:
            return []
        theirs[k] = there
        if (axis := piece.axes[k]) is not None:
            own[axis] = own[axis][: len(there)]
    return [Piece(piece.place, tuple(own), tuple(theirs), piece.axes)]


def _check_written(files: Files, place: Place, dataset: h5py.Dataset, box: Box) -> None:
    """Refuse a box of which something was never stored."""
    if dataset.chunks:
        chunks = (
            range(r.start // c, -(-r.stop // c)) for r, c in zip(box, dataset.chunks, strict=True)
        )
        for index in itertools.product(*chunks):
            at = tuple(k * c for k, c in zip(index, dataset.chunks, strict=True))
            if dataset.id.get_chunk_info_by_coord(at).byte_offset is None:
                raise InputError(f"{place}: the chunk at {list(at)} was never written")
    elif dataset.external is not None:
        last = int(np.ravel_multi_index([r.stop - 1 for r in box], dataset.shape))
        have, problem = files.raw_bytes(place, dataset)
        if (last + 1) * dataset.dtype.itemsize > have:
            raise InputError(f"{place}: {problem}")


def _mapped(
    there: Place,
    virtual: h5py.h5s.SpaceID,
    source: h5py.h5s.SpaceID,
    shape: tuple[int, ...],
    part: tuple[int, ...],
) -> list[Piece] | None:
    """The pieces of one mapping; None if the part does not hold what is selected in it.

    HDF5 pairs the elements of two selections in their order, so that axes of one index may stand
    anywhere.
    """
    if h5py.h5s.SEL_NONE in (virtual.get_select_type(), source.get_select_type()):
        return []
    theirs = _selected(source, part, None)
    if theirs is None:
        return None
    lengths = [sum(map(len, ranges)) for ranges in theirs]
    own = _selected(virtual, shape, lengths)
    if own is None:
        return None
    if any(r[-1] >= n for ranges, n in zip(theirs, part, strict=True) for r in ranges if r):
        return None
    if any(r[-1] >= n for ranges, n in zip(own, shape, strict=True) for r in ranges if r):
        return None
    own_long, long = (
        [axis for axis, ranges in enumerate(side) if sum(map(len, ranges)) != 1]
        for side in (own, theirs)
    )
    if [sum(map(len, own[axis])) for axis in own_long] != [lengths[axis] for axis in long]:
        return None
    axes: list[int | None] = [None] * len(part)
    for axis, own_axis in zip(long, own_long, strict=True):
        axes[axis] = own_axis
    runs = [_paired(own[a], theirs[b]) for a, b in zip(own_long, long, strict=True)]
    if math.prod(map(len, runs)) > MOST_PIECES:
        return None
    pieces = []
    for run in itertools.product(*runs):
        ours, others = [ranges[0] for ranges in own], [ranges[0] for ranges in theirs]
        for own_axis, axis, (one, other) in zip(own_long, long, run, strict=True):
            ours[own_axis], others[axis] = one, other
        pieces.append(Piece(there, tuple(ours), tuple(others), tuple(axes)))
    return pieces


def _selected(
    space: h5py.h5s.SpaceID, shape: tuple[int, ...], lengths: list[int] | None
) -> list[list[range]] | None:
    """The indices along each axis that a selection is the product of; None if it is none.

    Args:
        lengths: how many there are where the selection has no end; None: all there are.
    """
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return [[range(n)] for n in shape]
    if space.get_select_type() != h5py.h5s.SEL_HYPERSLABS or not space.is_regular_hyperslab():
        return None
    slab = list(zip(*space.get_regular_hyperslab(), strict=True))
    if len(slab) != len(shape):
        return None
    selected = []
    for axis, (start, stride, count, block) in enumerate(slab):
        end = None
        if UNLIMITED in (count, block):
            if lengths is not None and len(lengths) != len(shape):
                return None
            end = max(0, shape[axis] - start) if lengths is None else lengths[axis]
            if block == UNLIMITED:
                count, block = 1, end
            elif lengths is None:  # whole blocks
                count = max(0, (end - block) // stride + 1)
            else:
                count = end // block
        ranges = _ranges(start, stride, count, block)
        if ranges is None:
            return None
        selected.append(ranges)
    return selected


def _lengths(space: h5py.h5s.SpaceID, shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many indices a selection has along each axis."""
    return tuple(sum(map(len, ranges)) for ranges in _selected(space, shape, list(shape)) or ())


def _ranges(start: int, stride: int, count: int, block: int) -> list[range] | None:
    if count <= 1 or stride == block:
        return [range(start, start + count * block)]
    if block == 1:
        return [range(start, start + stride * (count - 1) + 1, stride)]
    if count > MOST_PIECES:
        return None
    firsts = range(start, start + stride * count, stride)
    return [range(first, first + block) for first in firsts]


def _paired(own: list[range], theirs: list[range]) -> list[tuple[range, range]]:
    """Two sequences of ranges of the same total length, cut so that they go in step."""
    ends = [set(itertools.accumulate(map(len, side))) for side in (own, theirs)]
    cuts = sorted({0} | ends[0] | ends[1])
    pairs, at = [], [0, 0]
    done = [0, 0]
    for start, stop in itertools.pairwise(cuts):
        pair = []
        for side, ranges in enumerate((own, theirs)):
            while start - done[side] >= len(ranges[at[side]]):
                done[side] += len(ranges[at[side]])
                at[side] += 1
            pair.append(ranges[at[side]][start - done[side] : stop - done[side]])
        pairs.append((pair[0], pair[1]))
    return pairs


def _hole(place: Place, shape: tuple[int, ...], pieces: list[Piece]) -> tuple[int, ...] | None:
    """The first element that no piece covers.

    All pieces begin and end at the lines of a grid, so that only one bit a cell is needed.
    """
    if not math.prod(shape):
        return None
    lines = []
    for axis, n in enumerate(shape):
        edges = [np.array([0, n])]
        for r in {piece.own[axis] for piece in pieces}:
            edges += (
                [np.array([r.start, r.stop])] if r.step == 1 else [np.array(r), np.array(r) + 1]
            )
        lines.append(np.unique(np.concatenate(edges)))
    cells = [len(line) - 1 for line in lines]
    if math.prod(cells) > MOST_CELLS:
        raise InputError(f"{place}: is made of too many pieces: read its parts one by one")
    covered = np.zeros(cells, bool)
    for piece in pieces:
        covered[np.ix_(*(_cells(r, line) for r, line in zip(piece.own, lines, strict=True)))] = True
    if covered.all():
        return None
    first = np.unravel_index(int(np.argmin(covered)), cells)
    return tuple(int(line[cell]) for line, cell in zip(lines, first, strict=True))


def _cells(r: range, lines: np.ndarray) -> np.ndarray:
    if r.step == 1:
        return np.arange(*np.searchsorted(lines, [r.start, r.stop]))
    return np.searchsorted(lines, np.array(r))


def _frames_of(space: h5py.h5s.SpaceID, shape: tuple[int, ...], axis: int) -> str:
    selected = _selected(space, shape, list(shape))
    if selected is None or axis >= len(selected) or not selected[axis][-1]:
        return "some frames"
    return frames_named(selected[axis][0][0], selected[axis][-1][-1] + 1)


def frames_named(start: int, stop: int) -> str:
    """Frames start..stop-1, for messages."""
    return f"frame {start}" if stop - start == 1 else f"frames {start} to {stop - 1}"
