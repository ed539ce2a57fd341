"""Worker processes: they use one thread each, do not hear Ctrl-C and end with their parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class _Deaf(SpawnProcess):
    """Does not hear Ctrl-C: not while it starts, either, when Python would print a traceback."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Spawning(SpawnContext):
    Process = _Deaf


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def worker_pool(
    workers: int, start: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes, each of which first calls start(*arguments).

    An exception in the block (Ctrl-C too) kills them at once, whatever they are doing.
    """
    before = set(multiprocessing.active_children())
    with _single_threaded():
        pool = ProcessPoolExecutor(workers, _Spawning(), start_worker, (start, arguments))
        try:
            yield pool
        except BaseException:
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def start_worker(start: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()) -> None:
    """Initialise a worker: it ends when its parent does."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    if start is not None:
        start(*arguments)


def end_with_parent() -> None:
    """End this worker when its parent has ended, even if the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a worker"
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Processes started in this block use one thread each: there is one for each core."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
