"""Who reads what: the frames of an epoch are dealt to the slots of the global batch.

Slot g of step k is the same sample however many ranks there are; a rank serves a range of slots.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hpc_xvr.errors import InputError

_TOLERANCE = 0.02
# Tags keep these random streams apart from each other and from the samples' [seed, step, slot].
_DEAL, _SHUFFLE, _SUBSTITUTE = 1, 2, 3


class Span(NamedTuple):
    """Centre frames start .. stop - 1 of a video (its index)."""

    video: int
    start: int
    stop: int


def centres(frames: int, lr_frames: int) -> range:
    """Frames of a clip that can be a training centre: the others of its window must exist.

    At least one frame lies on each side, as a key frame before and one after are needed.
    """
    half = max(1, lr_frames // 2)
    return range(half, max(half, frames - half))


def slots_of_rank(rank: int, world: int, global_batch: int) -> range:
    """Slots that a rank serves.

    Raises:
        InputError: the global batch cannot be shared evenly.
    """
    if global_batch % world:
        near = max(1, round(global_batch / world)) * world
        raise InputError(
            f"train.global_batch {global_batch} cannot be shared by {world} ranks: "
            f"each would get {global_batch / world:g} samples; choose a multiple of "
            f"{world}, such as {near}"
        )
    share = global_batch // world
    return range(rank * share, (rank + 1) * share)


class Slots:
    """The plan of one run; step k depends on (seed, k) alone.

    Each epoch every centre frame belongs to exactly one slot, and each slot's frames come in
    their own random order. Slots differ in length by at most 2 % or one frame: the longer ones
    drop (others each epoch) what exceeds `steps_per_epoch`, the shorter ones start over.

    Args:
        frames: frames of each training video.
        lr_frames: low-resolution frames of a sample.
        global_batch: number of slots.
        seed: of the whole plan.

    Raises:
        InputError: no video is long enough.
    """

    def __init__(
        self, frames: Sequence[int] | np.ndarray, lr_frames: int, global_batch: int, seed: int
    ) -> None:
        self._first = centres(0, lr_frames).start
        self._counts = np.maximum(np.asarray(frames, np.int64) - 2 * self._first, 0)
        self._slots = global_batch
        self._seed = seed
        total = int(self._counts.sum())
        if total == 0:
            raise InputError(
                f"data.lr_frames {lr_frames} needs training videos of at least "
                f"{max(3, lr_frames)} frames; the longest of {len(frames)} has "
                f"{max(frames, default=0)}: lower it or add longer videos"
            )
        self.steps_per_epoch = math.ceil(total / global_batch)
        self._epochs: dict[int, list[_Stream]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}}

    def pick(self, step: int, slot: int, attempt: int = 0) -> tuple[int, int]:
        """(index of the video, centre frame) of a slot; steps count from 0 over all epochs.

        Attempts from 1 on are substitutes from anywhere in the epoch, for a frame that cannot be
        read.
        """
        epoch, k = divmod(step, self.steps_per_epoch)
        streams = self._streams(epoch)
        if attempt:
            rng = np.random.default_rng([self._seed, step, slot, _SUBSTITUTE, attempt])
            slot, k = (int(n) for n in rng.integers([self._slots, self.steps_per_epoch]))
        return streams[slot].pick(k)

    def videos(self, slots: Iterable[int], first_step: int, last_step: int) -> list[int]:
        """Indices of the videos that some slots read in these steps, in the order of the epochs."""
        found: dict[int, None] = {}
        readable = int((self._counts > 0).sum())
        for epoch in range(
            first_step // self.steps_per_epoch, last_step // self.steps_per_epoch + 1
        ):
            streams = self._streams(epoch)
            for slot in slots:
                found.update(dict.fromkeys(streams[slot].videos()))
            if len(found) == readable:
                break
        return list(found)

    def _streams(self, epoch: int) -> list[_Stream]:
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:
                del self._epochs[min(self._epochs)]
            streams = [
                _Stream(spans, [self._seed, epoch, slot, _SHUFFLE])
                for slot, spans in enumerate(self.deal(epoch))
            ]
            filled = [stream for stream in streams if len(stream)]
            # Fewer frames than slots: the empty slots borrow, so that a step is always whole.
            self._epochs[epoch] = [
                stream if len(stream) else filled[slot % len(filled)]
                for slot, stream in enumerate(streams)
            ]
        return self._epochs[epoch]

    def deal(self, epoch: int) -> list[list[Span]]:
        """What each slot reads in an epoch."""
        rng = np.random.default_rng([self._seed, epoch, 0, _DEAL])
        shuffled = rng.permutation(len(self._counts))
        shuffled = shuffled[self._counts[shuffled] > 0]
        slots, loads = self._whole_videos(shuffled)
        spread = max(loads) - min(loads)
        if spread > 1 and spread > _TOLERANCE * sum(loads) / self._slots:
            slots = self._equal_parts(shuffled)
        return slots

    def _whole_videos(self, shuffled: np.ndarray) -> tuple[list[list[Span]], list[int]]:
        slots: list[list[Span]] = [[] for _ in range(self._slots)]
        loads = [(0, slot) for slot in range(self._slots)]
        for video in shuffled[np.argsort(-self._counts[shuffled], kind="stable")]:
            load, slot = loads[0]
            slots[slot].append(self._span(video, 0, self._counts[video]))
            heapq.heapreplace(loads, (load + int(self._counts[video]), slot))
        return slots, [load for load, _ in loads]

    def _equal_parts(self, shuffled: np.ndarray) -> list[list[Span]]:
        """All videos laid end to end, cut in equal parts."""
        ends = np.cumsum(self._counts[shuffled])
        total = int(ends[-1])
        slots: list[list[Span]] = []
        for slot in range(self._slots):
            position, stop = slot * total // self._slots, (slot + 1) * total // self._slots
            spans = []
            while position < stop:
                i = int(np.searchsorted(ends, position, side="right"))
                begin = int(ends[i]) - int(self._counts[shuffled[i]])
                until = min(stop, int(ends[i]))
                spans.append(self._span(shuffled[i], position - begin, until - begin))
                position = until
            slots.append(spans)
        return slots

    def _span(self, video: int, start: int, stop: int) -> Span:
        return Span(int(video), self._first + int(start), self._first + int(stop))


class _Stream:
    """The frames of a slot in the order of an epoch."""

    def __init__(self, spans: list[Span], seed: list[int]) -> None:
        self._video, self._start, stop = np.array(spans, np.int32).reshape(-1, 3).T.copy()
        self._ends = np.cumsum(stop - self._start, dtype=np.int64)
        self._count = int(self._ends[-1]) if len(spans) else 0
        self._keys = np.random.default_rng(seed).integers(0, 2**32, 4).tolist()

    def __len__(self) -> int:
        return self._count

    def videos(self) -> list[int]:
        numbers: list[int] = self._video.tolist()
        return numbers

    def pick(self, k: int) -> tuple[int, int]:
        row = permuted(k % self._count, self._count, self._keys)
        span = int(np.searchsorted(self._ends, row, side="right"))
        into = row - (int(self._ends[span - 1]) if span else 0)
        return int(self._video[span]), int(self._start[span]) + into


def permuted(i: int, count: int, keys: Sequence[int]) -> int:
    """Where a pseudo-random permutation of range(count) puts i.

    A Feistel network over the next power of four, walked until it lands inside (as in
    format-preserving encryption: Black and Rogaway 2002).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for key in keys:
            mixed = ((right ^ key) * 0x9E3779B1) & 0xFFFFFFFF
            mixed = ((mixed ^ mixed >> 15) * 0x85EBCA77) & 0xFFFFFFFF
            left, right = right, left ^ ((mixed ^ mixed >> 13) & mask)
        i = left << half | right
        if i < count:
            return i
