"""The loader that reads a rank's samples ahead."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from hpc_xvr import log
from hpc_xvr.data.processes import end_with_parent
from hpc_xvr.data.samples.sample import Sample
from hpc_xvr.data.samples.slots import slots_of_rank
from hpc_xvr.data.samples.training import TrainingSamples
from hpc_xvr.errors import InputError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def training_batches(
    dataset: TrainingSamples,
    rank: int,
    world: int,
    start_step: int,
    steps: int,
    micro_batch: int | None = None,
    pin_memory: bool = False,
) -> DataLoader[Sample]:
    """Loader of one rank's share of steps start_step .. steps - 1, to iterate once.

    Yields share / micro_batch micro-batches for each step, in order (all of the share at once
    where micro_batch is None). `data.workers` processes read ahead; they live until the last step.

    Raises:
        InputError: the global batch cannot be shared by the ranks, or the share not be divided
            into micro-batches. Iterating raises what `dataset` raises, in whichever process.
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
    return _Loader(
        _ErrorsAsValues(dataset),
        batch_sampler=_MicroBatches(slots, start_step, steps, micro_batch),
        collate_fn=_collate,
        pin_memory=pin_memory,
        **options,
    )


class _MicroBatches:
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


class _ErrorsAsValues(Dataset[Sample]):
    """The samples of a micro-batch, or the InputError that prevents it.

    An exception that leaves a worker comes out of DataLoader with the worker's traceback in place
    of its message.
    """

    def __init__(self, samples: TrainingSamples) -> None:
        self._samples = samples

    def __getitems__(self, indices: Sequence[tuple[int, int]]) -> list[Sample] | InputError:
        try:
            return [self._samples[index] for index in indices]
        except InputError as error:
            return error.with_traceback(None)


def _collate(samples: list[Sample] | InputError) -> Sample | InputError:
    return samples if isinstance(samples, InputError) else default_collate(samples)


class _Loader(DataLoader[Sample]):
    def __iter__(self) -> Any:
        if not self.num_workers:
            return _raise_errors(super().__iter__())
        before = set(multiprocessing.active_children())
        with _signals_blocked():
            iterator = super().__iter__()
        # They ignore SIGTERM, so a run that ends with an exception would wait for them forever.
        for worker in set(multiprocessing.active_children()) - before:
            atexit.register(worker.kill)
        return _raise_errors(iterator)


def _raise_errors(batches: Iterator[Sample | InputError]) -> Iterator[Sample]:
    for batch in batches:
        if isinstance(batch, InputError):
            break
        yield batch
    else:
        return
    # The error's traceback would keep the loader's workers until some later garbage collection,
    # which cannot end them in an orderly way.
    del batches
    raise batch


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
