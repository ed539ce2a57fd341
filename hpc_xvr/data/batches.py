"""Samples for training and evaluation, and the loader that reads them ahead.

A sample is a dict of float32 tensors in [0, 1]: `lr` (N_lr, 1, h, w), `hr` (2, 1, H, W), `target`
(N_out, 1, H, W), and `hr_offset` (2,), the signed distance of the key frames from the centre
frame in the sample's own LR frames. H = scale * h. Batches put B in front.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpc_xvr import config, log
from hpc_xvr.data.corpus import Corpus, DamagedVideo, Video
from hpc_xvr.data.degrade import CameraNoise, bin_down, fixed_pattern
from hpc_xvr.data.processes import end_with_parent
from hpc_xvr.data.shards import Slots, slots_of_rank
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

Sample = dict[str, Tensor]
Output = Literal["centre", "sequence"]
_WHOLE = slice(None)
_ATTEMPTS = 50  # samples tried in place of one that cannot be read
_CLEAN = CameraNoise()
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class TrainingSamples(Dataset):
    """Crops of the corpus' train split, indexed by (step, slot); picklable.

    Everything random about a sample (frame pairing, crop, flips, noise; pairing, intervals and
    noise as published) derives from (seed, step, slot).

    Raises:
        InputError: no train videos, a video smaller than the patch, or without the recorded
            low-resolution stream that `data.lr_source` asks for.
    """

    def __init__(
        self,
        corpus: Corpus | Path | str,
        data: config.Data,
        output: Output,
        global_batch: int,
        seed: int,
    ) -> None:
        corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
        self.path = corpus.path
        self.videos = corpus.split("train")
        if not self.videos:
            raise InputError(
                f"corpus {corpus.path}: none of its {len(corpus)} videos is in the "
                "train split; ingest or simulate some with split train"
            )
        for video in self.videos:
            height, width = video.shape[1:]
            if min(height, width) < data.patch:
                fits = min(height, width) // data.scale * data.scale
                raise InputError(
                    f"corpus {corpus.path}, video {video.id}: its frames of {height}x"
                    f"{width} are smaller than data.patch {data.patch}; set "
                    f"data.patch to {fits} or less, or ingest it into another split"
                )
            if data.lr_source == "recorded":
                _check_recorded(video, data.scale)
        self.data = data
        self.output = output
        self.global_batch = global_batch
        self.seed = seed
        self.slots = Slots(self.videos.frame_counts, data.lr_frames, global_batch, seed)
        self._damaged: set[str] = set()

    def __getitem__(self, index: tuple[int, int]) -> Sample:
        step, slot = index
        for attempt in range(_ATTEMPTS):
            number, t = self.slots.pick(step, slot, attempt)
            try:
                return self._read(step, slot, number, t)
            except DamagedVideo as error:
                if self.data.damaged == "stop":
                    raise
                if self.videos[number].id not in self._damaged:
                    self._damaged.add(self.videos[number].id)
                    logger.warning("%s; other samples take the place of those lost", error)
        raise InputError(
            f"corpus {self.path}: none of {_ATTEMPTS} samples could be read in place of a damaged "
            "one; check the corpus with hpc-xvr inspect --verify"
        )

    def videos_read(self, slots: Sequence[int], first_step: int, last_step: int) -> list[str]:
        """Ids of the recordings that some slots read in these steps."""
        return [self.videos[i].id for i in self.slots.videos(slots, first_step, last_step)]

    def _read(self, step: int, slot: int, number: int, t: int) -> Sample:
        data, patch = self.data, self.data.patch
        video = self.videos[number]
        frames, height, width = video.shape
        rng = np.random.default_rng([self.seed, step, slot])

        half = data.lr_frames // 2
        fits = min(t, frames - 1 - t) // half if half else 1
        interval = int(rng.integers(1, min(data.lr_interval, fits), endpoint=True))
        before = int(rng.integers(1, min(data.hr_gap, t), endpoint=True))
        after = int(rng.integers(1, min(data.hr_gap, frames - 1 - t), endpoint=True))
        # The two cameras' pixels line up only at multiples of scale.
        grid = data.scale if data.lr_source == "recorded" else 1
        y, x = (
            grid * int(rng.integers(0, (side - patch) // grid, endpoint=True))
            for side in (height, width)
        )
        flips = rng.integers(0, 2, 3) if data.augment else np.zeros(3, int)
        y, x = slice(y, y + patch), slice(x, x + patch)
        lr_noise, hr_noise = (
            _draw_noise(kind, photons, data, video, scale, y, x, flips, [self.seed, number], rng)
            for kind, photons, scale in (
                (data.noise, data.photons_log10, data.scale),
                (data.hr_noise, data.hr_photons_log10, 1),
            )
        )
        return _sample(
            video,
            data,
            self.output,
            lr_times=[t + interval * k for k in range(-half, half + 1)],
            keys=(t - before, t + after),
            t=t,
            interval=interval,
            y=y,
            x=x,
            flips=flips,
            lr_noise=lr_noise,
            hr_noise=hr_noise,
            rng=rng,
        )


def training_batches(
    dataset: TrainingSamples,
    rank: int,
    world: int,
    start_step: int,
    steps: int,
    micro_batch: int | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """Loader of one rank's share of steps start_step .. steps - 1, to iterate once.

    Yields share / micro_batch micro-batches for each step, in order (all of the share at once
    where micro_batch is None). `data.workers` processes read ahead; they live until the last step.

    Raises:
        InputError: the global batch cannot be shared by the ranks, or the share not be divided
            into micro-batches.
    """
    slots = slots_of_rank(rank, world, dataset.global_batch)
    micro_batch = micro_batch or len(slots)
    if len(slots) % micro_batch:
        raise InputError(
            f"train.micro_batch {micro_batch} does not divide a rank's share of "
            f"{len(slots)} samples (train.global_batch {dataset.global_batch} over "
            f"{world} ranks); choose a divisor of {len(slots)}"
        )
    options: dict[str, Any] = {}
    if dataset.data.workers:
        # A plain fork would copy MPI's, CUDA's and tensorstore's threads and locks half-way.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        options = {
            "num_workers": dataset.data.workers,
            "multiprocessing_context": context,
            "worker_init_fn": partial(_start_worker, rank),
        }
    plan = _Plan(slots, start_step, steps, micro_batch)
    return _Loader(dataset, batch_sampler=plan, pin_memory=pin_memory, **options)


def window_sample(
    video: Video,
    t: int,
    keys: tuple[int, int],
    data: config.Data,
    output: Output,
    photons: float | None = None,
    rng: np.random.Generator | None = None,
    y: slice = _WHOLE,
    x: slice = _WHOLE,
) -> Sample:
    """The sample for evaluating frame t: consecutive LR frames around it, HR at two key frames.

    LR frames beyond the clip repeat its first or last one. The crop (`y`, `x` in HR pixels) is
    trimmed at the bottom and right to multiples of scale. `photons` puts noise on binned frames.

    Raises:
        InputError: `data.lr_source` is recorded and the video has no such stream or one whose
            grid is not that of the HR frames / scale.
    """
    frames, height, width = video.shape
    half = data.lr_frames // 2
    if data.lr_source == "recorded":
        _check_recorded(video, data.scale)
    y, x = _trimmed(y, height, data.scale), _trimmed(x, width, data.scale)
    lr_times = [min(max(t + k, 0), frames - 1) for k in range(-half, half + 1)]
    return _sample(
        video,
        data,
        output,
        lr_times=lr_times,
        keys=keys,
        t=t,
        interval=1,
        y=y,
        x=x,
        flips=np.zeros(3, int),
        lr_noise=CameraNoise(photons),
        rng=rng or np.random.default_rng(),
    )


def key_frames(t: int, gap: int, frames: int) -> tuple[int, int]:
    """The key frames around frame t of a clip that has one every `gap` frames.

    The last gap ends with the clip's last frame, whether it is complete or not.
    """
    first = t // gap * gap
    if first == frames - 1 and first > 0:
        first -= gap
    return first, min(first + gap, frames - 1)


def _sample(
    video: Video,
    data: config.Data,
    output: Output,
    *,
    lr_times: Sequence[int],
    keys: tuple[int, int],
    t: int,
    interval: int,
    y: slice,
    x: slice,
    flips: np.ndarray,
    rng: np.random.Generator,
    lr_noise: CameraNoise,
    hr_noise: CameraNoise = _CLEAN,
) -> Sample:
    targets = [t] if output == "centre" else list(lr_times)
    recorded = data.lr_source == "recorded"
    wanted = sorted({*keys, *targets, *(() if recorded else lr_times)})
    crops = _oriented(video.intensity(wanted, y, x), flips)  # n, H, W
    row = {frame: i for i, frame in enumerate(wanted)}
    if recorded:
        clock = np.asarray(video.info.lr_times)
        nearest = np.abs(clock - np.asarray(lr_times)[:, None]).argmin(axis=1)
        coarse_y, coarse_x = (slice(s.start // data.scale, s.stop // data.scale) for s in (y, x))
        lr = _oriented(video.lr_intensity(nearest.tolist(), coarse_y, coarse_x), flips)
    else:
        lr = bin_down(crops[[row[frame] for frame in lr_times]], data.scale)
        lr = lr_noise.apply(lr, rng)
    offsets = np.array([(key - t) / interval for key in keys], np.float32)
    return {
        "lr": _tensor(lr),
        "hr": _tensor(hr_noise.apply(crops[[row[frame] for frame in keys]], rng)),
        "target": _tensor(crops[[row[frame] for frame in targets]]),
        "hr_offset": torch.from_numpy(offsets),
    }


def _draw_noise(
    kind: config.Noise,
    photons_log10: tuple[float, float],
    data: config.Data,
    video: Video,
    scale: int,
    y: slice,
    x: slice,
    flips: np.ndarray,
    seed: list[int],
    rng: np.random.Generator,
) -> CameraNoise:
    """Noise of one camera (pixels `scale` times as large as the sharp one's) for one sample; the
    fixed pattern belongs to the recording, `seed`."""
    if kind == "none":
        return _CLEAN
    photons = 10 ** rng.uniform(*photons_log10)
    if kind == "poisson":
        return CameraNoise(photons)
    read_noise = rng.uniform(*data.read_noise)
    if kind == "poisson_gaussian":
        return CameraNoise(photons, read_noise)
    height, width = (side // scale for side in video.shape[1:])
    gain = _pattern((height, width), data.pattern, (*seed, scale))
    rows, columns = (slice(s.start // scale, s.stop // scale) for s in (y, x))
    return CameraNoise(photons, read_noise, _oriented(gain[None, rows, columns], flips)[0])


@lru_cache(16)
def _pattern(shape: tuple[int, int], strength: float, seed: tuple[int, ...]) -> np.ndarray:
    return fixed_pattern(shape, strength, list(seed))


def _oriented(crops: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """One of the eight orientations of (n, H, W): flip rows, flip columns, transpose."""
    crops = crops[:, :: -1 if flips[0] else 1, :: -1 if flips[1] else 1]
    return crops.swapaxes(1, 2) if flips[2] else crops


def _tensor(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames, np.float32)[:, None])


def _trimmed(part: slice, side: int, scale: int) -> slice:
    start, stop, _ = part.indices(side)
    return slice(start, stop - (stop - start) % scale)


def _check_recorded(video: Video, scale: int) -> None:
    if video.lr_shape is None:
        raise InputError(
            f"video {video.path}: has no recorded low-resolution stream, which "
            "data.lr_source recorded needs; set it to binned or leave the video out"
        )
    expected = (video.shape[1] // scale, video.shape[2] // scale)
    if video.lr_shape[1:] != expected:
        raise InputError(
            f"video {video.path}: its low-resolution frames are {video.lr_shape[1:]}, "
            f"with data.scale {scale} they must be {expected}; register the two "
            "cameras when ingesting, or set data.lr_source to binned"
        )


class _Plan:
    """(step, slot) of each micro-batch."""

    def __init__(self, slots: range, start_step: int, steps: int, micro_batch: int) -> None:
        self._slots, self._micro_batch = slots, micro_batch
        self._steps = range(start_step, steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self._steps:
            for i in range(0, len(self._slots), self._micro_batch):
                yield [(step, slot) for slot in self._slots[i : i + self._micro_batch]]

    def __len__(self) -> int:
        return len(self._steps) * (len(self._slots) // self._micro_batch)


class _Loader(DataLoader):
    def __iter__(self) -> Any:
        if not self.num_workers:
            return super().__iter__()
        before = set(multiprocessing.active_children())
        with _signals_blocked():
            iterator = super().__iter__()
        # They ignore SIGTERM, so a run that ends with an exception would wait for them forever.
        for worker in set(multiprocessing.active_children()) - before:
            atexit.register(worker.kill)
        return _as_raised(iterator)


def _as_raised(batches: Iterator[Sample]) -> Iterator[Sample]:
    """A worker's InputError arrives with the worker's traceback as its message: keep the line."""
    try:
        yield from batches
        return
    except InputError as error:
        kind, line = type(error).__name__, str(error).rstrip().splitlines()[-1]
        # Tracebacks would keep the loader's workers until some later garbage collection, which
        # cannot end them in an orderly way.
        traceback.clear_frames(error.__traceback__)
    del batches
    raise InputError(line.partition(f"{kind}: ")[2] or line)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started here inherit the mask, so a signal to the whole job never ends them;
    our own signals wait until we are out again."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # starting the tracker unblocks some
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _start_worker(rank: int, _: int) -> None:
    log.setup(rank)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
