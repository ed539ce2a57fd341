"""Camera files into a corpus: what is there, corrected, described, split by recording.

Many processes, of one rank or several, read files and write clips beside the corpus. One of them
hands the files out and makes the clips part of the corpus in the order of the files, so that ids,
splits and duplicates do not depend on how many there are, nor on how often they were killed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hpc_xvr.data.cameras import camera_files
from hpc_xvr.data.cameras.recording import guarded
from hpc_xvr.data.cameras.source import Source
from hpc_xvr.data.corpus.layout import Split
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.ingest.schedule import Orders, Outcome, Schedule
from hpc_xvr.data.ingest.sources import find_recordings
from hpc_xvr.data.ingest.treatment import Treatment
from hpc_xvr.data.ingest.workers import ProcessWorkers, Result, SerialWorker, start_workers
from hpc_xvr.data.pairing.joining import Pairing
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.data.processes import cores
from hpc_xvr.data.ranks import ONE_RANK, Ranks
from hpc_xvr.errors import InputError
from hpc_xvr.log import progress_bar

__all__ = ["Outcome", "find_recordings", "ingest"]

TICK = 0.2
"""Seconds between two meetings of the ranks."""
WINDOW = 8
"""Files a process may be ahead of the first one that is not finished yet."""
WORTH = 2**26
"""Bytes of camera files for which one more process is started, which takes a second."""


def ingest(
    paths: Sequence[Path | str],
    corpus: Path | str,
    *,
    lr: Sequence[Path | str] = (),
    lr_camera: CameraReading | None = None,
    pairing: Pairing | None = None,
    multiple_of: int = 4,
    crop: bool = False,
    scene: str | None = None,
    store: Literal["zarr", "hdf5"] = "zarr",
    split: Split | Literal["auto"] = "auto",
    skip_bad: bool = False,
    workers: int | None = None,
    ranks: Ranks = ONE_RANK,
    **camera: Any,
) -> list[Outcome]:
    """Add recordings to a corpus, which is created where it is missing. All ranks call it alike.

    Args:
        paths: camera files, globs, or folders, which are searched for camera files and for
            sequences of numbered images.
        lr: files of a second, fast camera, one for each recording, in order.
        lr_camera, pairing: how these are read, and how they belong to the recordings.
        multiple_of: divisor that height and width must have; `crop` cuts what is too much.
        crop: also cuts what the fast camera did not see.
        scene: what the recordings show.
        split: auto gives each recording to the split furthest below its share of 0.8/0.1/0.1.
        skip_bad: go on with the others after a file that cannot be used.
        workers: processes of this rank; None: one a core, fewer for little work.
        ranks: who share the work.
        camera: how the recordings are read, fields of CameraReading: flat, dark, bit_depth, ...

    Raises:
        InputError: the first bad file or option, on all ranks. Recordings that were finished stay.
            Without skip_bad those before a bad one, and those under way with it, are finished.
    """
    with contextlib.ExitStack() as stack:
        schedule: Schedule | None = None  # the root's

        def prepare() -> _Task:
            nonlocal schedule
            treatment = Treatment(
                CameraReading(**camera),
                lr_camera or CameraReading(),
                pairing or Pairing(),
                multiple_of,
                crop,
                scene,
            )
            treatment.check()
            found = find_recordings(paths, treatment.camera.dataset, bool(treatment.camera.missing))
            sources = _paired(found, lr, treatment.lr_camera)
            treatment = treatment.prepared()
            sources = [part for source in sources for part in treatment.unbroken(source)]
            writer = stack.enter_context(CorpusWriter(corpus, store=store))
            schedule = Schedule(writer, sources, treatment, split, skip_bad)
            return _Task(schedule.new, schedule.nbytes, writer.path, writer.store, treatment)

        def outcomes() -> list[Outcome]:
            assert schedule is not None
            return schedule.outcomes()

        task = ranks.on_root(prepare)
        count = workers or min(cores(), 1 + task.nbytes // WORTH)
        count = min(count, -(-task.new // ranks.size))
        alone = ranks.size == 1 and count == 1
        with (
            contextlib.suppress(_Failed),
            start_workers(0 if alone else count, task.corpus, task.store, task.treatment) as own,
        ):
            _work(own, schedule, ranks, WINDOW * count * ranks.size)
        ranks.gather(None)  # nobody writes any more: the writer may tidy up and leave
        ranks.on_root(stack.close)
    return ranks.on_root(outcomes)


class _Task(NamedTuple):
    """What every rank knows of the run."""

    new: int
    """Recordings to be read."""
    nbytes: int
    """Bytes of their files."""
    corpus: Path
    store: str
    treatment: Treatment


def _paired(sources: list[Source], lr: Sequence[Path | str], camera: CameraReading) -> list[Source]:
    """The recordings with their second camera's files."""
    if not lr:
        return sources
    if len(lr) != len(sources):
        names = ", ".join(source.name for source in sources[:5])
        raise InputError(
            f"{len(lr)} files of a fast camera for {len(sources)} recordings ({names}"
            f"{', ...' if len(sources) > 5 else ''}): give one --lr for each, in the same order"
        )
    pairs = []
    for source, path in zip(sources, lr, strict=True):
        with guarded(str(path)):
            files, inner = camera_files(path, bool(camera.missing))
        pairs.append(replace(source, lr=Source(tuple(files), inner or camera.dataset)))
    return pairs


class _Failed(Exception):
    """The disk, or a lost process, ends the work of all ranks; the schedule knows why."""


class _Report(NamedTuple):
    """What a rank tells the root."""

    results: list[Result]
    free: int
    """Jobs it has room for."""
    read: float
    """Bytes of camera files read so far."""


def _work(
    own: SerialWorker | ProcessWorkers, schedule: Schedule | None, ranks: Ranks, window: int
) -> None:
    """Read, write and decide until all is done. The root has the schedule.

    Raises:
        _Failed: on all ranks.
    """
    results: list[Result] = []
    with _progress(schedule) as show:
        if isinstance(own, SerialWorker):
            own.on_progress = show
        while True:
            reports = ranks.gather(_Report(results, own.free, own.read))
            show(sum(report.read for report in reports))
            orders = ranks.on_root(partial(_direct, schedule, reports, window))
            if orders.failed:
                raise _Failed
            if orders.done:
                return
            for job in orders.jobs[ranks.rank]:
                own.submit(job)
            results = own.finished(TICK)


def _direct(schedule: Schedule | None, reports: list[_Report], window: int) -> Orders:
    assert schedule is not None  # on the root
    schedule.take(result for report in reports for result in report.results)
    return schedule.orders([report.free for report in reports], window)


@contextlib.contextmanager
def _progress(schedule: Schedule | None) -> Iterator[Callable[[float], None]]:
    """show(bytes read)."""
    if schedule is None or not schedule.new:
        yield lambda read: None
        return
    shown = 0.0
    with progress_bar("ingesting", schedule.nbytes / 1e6, "MB") as advance:

        def show(read: float) -> None:
            nonlocal shown
            advance((read - shown) / 1e6)
            shown = read

        yield show
