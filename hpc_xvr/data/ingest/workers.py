"""The processes that read camera files and write clips beside the corpus, each for itself."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpc_xvr.data.cameras import Recording
from hpc_xvr.data.cameras.source import Source
from hpc_xvr.data.corpus.writer import write_clip
from hpc_xvr.data.ingest.treatment import Treatment
from hpc_xvr.data.processes import worker_pool
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

QUEUE = 2
"""Files handed to a process beyond the one it reads, so that it never waits for the next."""


@dataclass(frozen=True)
class Job:
    """One recording to read and write."""

    number: int
    source: Source
    fingerprint: str
    nbytes: int


@dataclass(frozen=True)
class Result:
    """What came of a job: a clip beside the corpus (what `write_clip` returned), or an error.

    `fatal`: the error is not the file's, and the others would meet it too.
    """

    number: int
    entry: dict[str, Any] = field(default_factory=dict)
    error: InputError | None = None
    fatal: bool = False
    notes: list[str] = field(default_factory=list)
    """Warnings to log."""


class ClipWriter:
    """Writes the clips of one run's jobs beside the corpus at `corpus`."""

    def __init__(
        self, corpus: Path, store: str, treatment: Treatment, advance: Callable[[float], None]
    ) -> None:
        self._corpus, self._store, self._treatment = corpus, store, treatment
        self._advance = advance

    def write(self, job: Job) -> Result:
        """Read the files of a job to their end and write its clip."""
        broken: list[InputError] = []  # what is wrong with the file
        try:
            recording, fast, info = self._treatment.open(job.source)
            lr = None
            if fast is not None:
                lr = np.empty(fast.shape, fast.dtype)
                for index, frame in enumerate(fast.frames()):
                    lr[index] = frame
        except InputError as error:
            return Result(job.number, error=error.with_traceback(None))  # it would hold arrays

        def frames() -> Iterator[np.ndarray]:
            try:
                for frame in _checked(recording):
                    yield frame
                    self._advance(job.nbytes / recording.shape[0])
            except InputError as error:
                broken.append(error)
                raise

        info["metadata"]["fingerprint"] = job.fingerprint
        try:
            entry = write_clip(
                self._corpus,
                self._store,
                job.source.stem,
                frames(),
                recording.shape,
                recording.dtype,
                info,
                lr=lr,
            )
        except InputError as error:
            return Result(job.number, error=error.with_traceback(None), fatal=not broken)
        return Result(job.number, entry)


def _checked(recording: Recording) -> Iterator[np.ndarray]:
    """The frames; warns where a container seems to have more bits than the camera."""
    largest = 0
    for frame in recording.frames():
        largest = max(largest, int(frame.max()))
        yield frame
    bits = recording.bit_depth
    if bits >= 15 and recording.full_scale == 1 and largest < 2 ** (bits - 2):
        logger.warning(
            "%s: stored as %d bit, but no value exceeds %d: if the camera has fewer bits, state "
            "its bit depth",
            recording.path,
            bits,
            largest,
        )


class SerialWorker:
    """This process by itself: reads a file when it is handed one."""

    def __init__(self, corpus: Path, store: str, treatment: Treatment) -> None:
        self.read = 0.0
        """Bytes of camera files that were read."""
        self.on_progress: Callable[[float], None] = lambda read: None
        """Called with `read` after each frame."""
        self._writer = ClipWriter(corpus, store, treatment, self._advance)
        self._done: list[Result] = []

    def _advance(self, nbytes: float) -> None:
        self.read += nbytes
        self.on_progress(self.read)

    @property
    def free(self) -> int:
        """Jobs it takes now."""
        return 1 - len(self._done)

    def submit(self, job: Job) -> None:
        self._done.append(self._writer.write(job))

    def finished(self, seconds: float) -> list[Result]:
        """Results since the last call; waits for one, at most so long."""
        done, self._done = self._done, []
        return done


class ProcessWorkers:
    """The worker processes of this rank."""

    def __init__(self, pool: ProcessPoolExecutor, size: int, counter: Any) -> None:
        self._pool, self._counter = pool, counter
        self._room = size * (1 + QUEUE)
        self._jobs: dict[Future[Result], Job] = {}
        self._lost: Result | None = None

    @property
    def read(self) -> float:
        return float(self._counter.value)

    @property
    def free(self) -> int:
        return self._room - len(self._jobs)

    def submit(self, job: Job) -> None:
        try:
            self._jobs[self._pool.submit(_write, job)] = job
        except BrokenProcessPool:
            self._lost = self._lost or _lost([job])

    def finished(self, seconds: float) -> list[Result]:
        if self._jobs:
            wait(self._jobs, timeout=seconds, return_when=FIRST_COMPLETED)
        elif not self._lost:
            time.sleep(seconds)
        results = []
        for future in [future for future in self._jobs if future.done()]:
            try:
                results.append(future.result())
            except BrokenProcessPool:
                self._lost = self._lost or _lost(list(self._jobs.values()))
            del self._jobs[future]
        return results + ([self._lost] if self._lost else [])


@contextlib.contextmanager
def start_workers(
    count: int, corpus: Path, store: str, treatment: Treatment
) -> Iterator[SerialWorker | ProcessWorkers]:
    """`count` processes, or this one alone if that is 0; an exception ends them at once."""
    if not count:
        yield SerialWorker(corpus, store, treatment)
        return
    counter = multiprocessing.get_context("spawn").Value("d", 0.0)
    with worker_pool(count, _start, (corpus, store, treatment, counter)) as pool:
        yield ProcessWorkers(pool, count, counter)


_writer: ClipWriter  # of a worker process
_notes: list[str] = []


class _Notes(logging.Handler):
    """What a worker would log goes with its result, and is logged by the process that schedules:
    once, and in the order of the files."""

    def emit(self, record: logging.LogRecord) -> None:
        _notes.append(record.getMessage())


def _start(corpus: Path, store: str, treatment: Treatment, counter: Any) -> None:
    global _writer

    def advance(nbytes: float) -> None:
        with counter.get_lock():
            counter.value += nbytes

    _writer = ClipWriter(corpus, store, treatment, advance)
    logger.handlers[:] = [_Notes(logging.WARNING)]
    logger.propagate = False


def _write(job: Job) -> Result:
    _notes.clear()
    result = _writer.write(job)
    return replace(result, notes=list(_notes))


def _lost(jobs: list[Job]) -> Result:
    names = sorted({str(job.source.path) for job in jobs})
    some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    error = InputError(
        "a process that read camera files was killed, or crashed, or memory ran out; it had one "
        f"of {some}: repeat the command, with fewer --workers if it happens again"
    )
    return Result(-1, error=error, fatal=True)
