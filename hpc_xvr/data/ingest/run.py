"""Camera files into a corpus: what is there, corrected, described, split by recording.

Many processes, of one rank or several, read files and write clips beside the corpus. One of them
hands the files out and makes the clips part of the corpus in the order of the files, so that ids,
splits and duplicates do not depend on how many there are, nor on how often they were killed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hpc_xvr.data.cameras import camera_files
from hpc_xvr.data.cameras.recording import guarded
from hpc_xvr.data.cameras.source import Source
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.ingest.schedule import Orders, Outcome, Plan
from hpc_xvr.data.ingest.sources import find_recordings
from hpc_xvr.data.ingest.treatment import Treatment
from hpc_xvr.data.ingest.workers import Alone, Crew, Result, crew
from hpc_xvr.data.pairing.joining import Pairing
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.data.processes import cores
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger, progress_bar

__all__ = ["Outcome", "Ranks", "find_recordings", "ingest"]

TICK = 0.2
"""Seconds between two meetings of the ranks."""
NEWS = 60.0
"""Seconds between two lines about how far it is."""
WINDOW = 8
"""Files a process may be ahead of the first one that is not finished yet."""
WORTH = 2**26
"""Bytes of camera files for which one more process is started, which takes a second."""


@dataclass(frozen=True)
class Ranks:
    """Who shares the work: `gather(value)` gives the values of all ranks to all of them."""

    rank: int = 0
    world: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def from_first(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on rank 0, everywhere; its InputError too."""
        found = problem = None
        if self.rank == 0:
            try:
                found = action()
            except InputError as error:
                problem = str(error)
        found, problem = self.gather((found, problem))[0]
        if problem is not None:
            raise InputError(problem)
        return found


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
    split: Literal["auto", "train", "validation", "test"] = "auto",
    skip_bad: bool = False,
    workers: int | None = None,
    ranks: Ranks = Ranks(),
    **camera: Any,
) -> list[Outcome]:
    """Add recordings to a corpus, which is created where it is missing. All ranks call it alike.

    Args:
        paths: camera files, globs, or folders, which are searched for camera files and for
            sequences of numbered images.
        lr: files of a second, fast camera, one for each recording, in order.
        lr_camera, pairing: how these are read, and how they belong to the recordings.
        multiple_of, crop, scene: see treatment.Treatment.
        split: auto gives each recording to the split furthest below its share of 0.8/0.1/0.1.
        skip_bad: go on with the others after a file that cannot be used.
        workers: processes of this rank; None: one a core, fewer for little work.
        camera: how the recordings are read, fields of CameraReading: flat, dark, bit_depth, ...

    Raises:
        InputError: the first bad file or option, on all ranks. Recordings that were finished stay.
            Without skip_bad those before a bad one, and those under way with it, are finished.
    """
    with contextlib.ExitStack() as stack:
        plan: Plan | None = None

        def prepare() -> tuple[int, int, Path, str, Treatment]:
            nonlocal plan
            treatment = Treatment(
                CameraReading(**camera),
                lr_camera or CameraReading(),
                pairing or Pairing(),
                multiple_of,
                crop,
                scene,
            )
            treatment.check()
            found = find_recordings(paths, treatment.camera.dataset)
            sources = _paired(found, lr, treatment.lr_camera.dataset)
            treatment = treatment.prepared()
            writer = stack.enter_context(CorpusWriter(corpus, store=store))
            plan = Plan(writer, sources, treatment, split, skip_bad)
            return plan.new, plan.nbytes, writer.path, writer.store, treatment

        new, nbytes, *task = ranks.from_first(prepare)
        size = min(workers or min(cores(), 1 + nbytes // WORTH), -(-new // ranks.world))
        fatal = ""
        try:
            with crew(0 if ranks.world == 1 and size == 1 else size, *task) as ours:
                _work(ours, plan, ranks, WINDOW * size * ranks.world)
        except _Stop as stop:
            fatal = str(stop)
        ranks.gather(None)  # nobody writes any more: the writer may tidy up and leave
        ranks.from_first(stack.close)
    outcomes, problem = ranks.gather(
        (plan.outcomes, _problem(plan, skip_bad)) if plan is not None else None
    )[0]
    if fatal or problem:
        raise InputError(fatal or problem)
    return outcomes


def _paired(sources: list[Source], lr: Sequence[Path | str], dataset: str | None) -> list[Source]:
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
            files, inner = camera_files(path)
        pairs.append(replace(source, lr=Source(tuple(files), inner or dataset)))
    return pairs


class _Stop(Exception):
    """The disk, or a lost process, ends the work of all ranks."""


def _work(ours: Alone | Crew, plan: Plan | None, ranks: Ranks, window: int) -> None:
    """Read, write and decide until all is done.

    Raises:
        _Stop: on all ranks.
    """
    results: list[Result] = []
    with _progress(plan) as show:
        if isinstance(ours, Alone):
            ours.tell = show
        while True:
            news = ranks.gather((results, ours.free, ours.read))
            orders: Orders | None = None
            if plan is not None:
                show(sum(read for _, _, read in news))
                plan.take(result for found, _, _ in news for result in found)
                orders = plan.orders([free for _, free, _ in news], window)
            orders = ranks.gather(orders)[0]
            if orders.fatal:
                raise _Stop(orders.fatal)
            if orders.over:
                return
            for job in orders.jobs[ranks.rank]:
                ours.submit(job)
            results = ours.finished(TICK)


@contextlib.contextmanager
def _progress(plan: Plan | None) -> Iterator[Callable[[float], None]]:
    """show(bytes read): a bar on a terminal, a line a minute in a log."""
    if plan is None or not plan.new:
        yield lambda read: None
        return
    started = last = time.monotonic()
    shown = 0.0
    with progress_bar("ingesting", plan.nbytes / 1e6, "MB") as advance:

        def show(read: float) -> None:
            nonlocal shown, last
            advance((read - shown) / 1e6)
            shown, now = read, time.monotonic()
            if now - last > NEWS and read:
                last = now
                left = (now - started) * max(0.0, plan.nbytes / read - 1)
                logger.info(
                    "%d of %d recordings, %.0f of %.0f MB, about %.0f min left",
                    *(plan.decided, plan.new, read / 1e6, plan.nbytes / 1e6, left / 60),
                )

        yield show


def _problem(plan: Plan, skip_bad: bool) -> str:
    """What the run ends with, if not well."""
    done = [outcome for outcome in plan.outcomes if outcome.status != "bad"]
    if not plan.problem or (skip_bad and done):
        return ""
    if plan.total == 1:
        return plan.problem
    if skip_bad:
        return f"{plan.problem}; none of the {plan.total} recordings could be used"
    return (
        f"{plan.problem}; {len(done)} of {plan.total} recordings are in the corpus, --skip-bad "
        "goes on without the bad ones"
    )
