"""Whole corpora of simulated experiments, made by many processes."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hpc_xvr import config
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.corpus.layout import MANIFEST
from hpc_xvr.data.corpus.writer import CorpusWriter, write_clip
from hpc_xvr.data.processes import cores, worker_pool
from hpc_xvr.data.ranks import ONE_RANK, Ranks
from hpc_xvr.data.simulate.experiment import Experiment
from hpc_xvr.errors import InputError
from hpc_xvr.files import check_own, commit, disk_errors
from hpc_xvr.log import logger, progress_bar
from hpc_xvr.version import __version__

SETTINGS = "simulate.json"
_ROUND_S = 3.0  # between two exchanges of the ranks
ClipEntry = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """One recording of a corpus."""

    id: str
    scene: str
    camera: str
    size: tuple[int, int, int]
    seed: int
    split: str


def simulate_corpus(
    simulate: config.Simulate,
    path: Path | str,
    workers: int | None = None,
    ranks: Ranks = ONE_RANK,
) -> None:
    """Simulate a whole corpus on all cores of all ranks; the same, bit for bit, on any number.

    It grows in a hidden folder beside `path` and is renamed when complete, so `path` exists
    complete or not at all. An interrupted call leaves the recordings that it finished; the next one
    with the same settings makes the missing ones.

    Args:
        workers: processes of this rank. Default: one for each core it may use.
        ranks: those that share the work; all of them must make this call.

    Raises:
        InputError: on all ranks, if `path` exists, a corpus of other settings is half finished
            there, another process is making it, or the disk cannot be written to.
    """
    path = Path(path)
    plan = plan_corpus(simulate)
    beside = path.with_name(f".{path.name}.building")
    with contextlib.ExitStack() as stack:
        writer: CorpusWriter | None = None  # the root's

        def start() -> set[str]:
            nonlocal writer
            writer = stack.enter_context(_start(simulate, path, beside))
            return _finished(beside)

        def commit_all(entries: list[ClipEntry]) -> None:
            assert writer is not None
            for entry in entries:
                writer.commit(entry)

        finished = ranks.on_root(start)  # from here on the other ranks may write, too
        if finished:
            logger.info("going on after %d of %d recordings", len(finished), len(plan))
        left = [item for item in plan if item.id not in finished]
        np.random.default_rng(simulate.seed).shuffle(left)  # scenes differ in cost
        mine = _make_all(simulate, beside, left[ranks.rank :: ranks.size], workers or cores())
        stack.callback(mine.close)
        advance = stack.enter_context(
            progress_bar("simulating", len(plan), "recordings", done=len(finished))
        )
        for entries in _rounds(mine, ranks, _ROUND_S if ranks.size > 1 else 0.0):
            ranks.on_root(partial(commit_all, entries))
            advance(len(entries))
        ranks.on_root(stack.close)
    ranks.on_root(partial(_finish, beside, path))  # nobody leaves before it is in its place
    logger.info("simulated %d recordings into %s", len(plan), path)


def simulate_if_missing(simulate: config.Simulate | None, path: Path) -> None:
    """Simulate the corpus of a config that describes one, where there is none at `path` yet.

    Raises:
        InputError: as `simulate_corpus`.
    """
    if simulate and not path.exists():
        logger.info("simulating %d recordings into %s", simulate.videos, path)
        simulate_corpus(simulate, path)


def refuse_existing(path: Path) -> None:
    """Raise InputError if `path` exists."""
    if path.exists():
        raise InputError(f"corpus {path}: exists; remove it or choose another folder")


@contextlib.contextmanager
def _start(simulate: config.Simulate, path: Path, beside: Path) -> Iterator[CorpusWriter]:
    """The writer of the corpus that grows in `beside`, once its settings are checked."""
    refuse_existing(path)
    check_own(beside)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"hpc_xvr": __version__, **simulate.model_dump(mode="json")}
    written = json.dumps(settings, indent=1) + "\n"
    with CorpusWriter(beside, simulate.store) as writer:
        kept = beside / SETTINGS
        with disk_errors(path):
            if not kept.exists() or not _finished(beside):
                (beside / f".{SETTINGS}").write_text(written)
                commit(beside / f".{SETTINGS}", kept)
            found = kept.read_text()
        if found != written:
            raise InputError(
                f"corpus {path}: was begun with other settings, see {kept}; finish it with those, "
                f"or remove {beside} to start over"
            )
        yield writer


def _finished(beside: Path) -> set[str]:
    return {video.id for video in Corpus(beside).videos}


def _finish(beside: Path, path: Path) -> None:
    """Put the complete corpus in its place, its manifest in the order of the recordings."""
    if path.exists():
        raise InputError(
            f"corpus {path}: another process has made it meanwhile; use that one, or remove it and "
            f"rename {beside}"
        )
    with disk_errors(path):
        lines = (beside / MANIFEST).read_bytes().splitlines(keepends=True)
        (beside / f".{MANIFEST}").write_bytes(b"".join(sorted(lines)))
        commit(beside / f".{MANIFEST}", beside / MANIFEST)
        beside.rename(path)


def _rounds(
    entries: Iterator[ClipEntry], ranks: Ranks, round_s: float
) -> Iterator[list[ClipEntry]]:
    """The entries that all ranks made in rounds of `round_s` seconds, until all are done."""
    while True:
        rounds = ranks.gather(ranks.together(partial(_round, entries, round_s)))
        yield [entry for made, _ in rounds for entry in made]
        if all(done for _, done in rounds):
            return


def _round(entries: Iterator[ClipEntry], round_s: float) -> tuple[list[ClipEntry], bool]:
    """The entries made in `round_s` seconds, at least one, and whether they were the last."""
    made: list[ClipEntry] = []
    end = time.monotonic() + round_s
    for entry in entries:
        made.append(entry)
        if time.monotonic() >= end:
            return made, False
    return made, True


def plan_corpus(simulate: config.Simulate) -> list[Planned]:
    """The recordings: scenes in turn, each with all cameras; every split a mix of all it can."""
    n = simulate.videos
    scenes = [simulate.scenes[i % len(simulate.scenes)] for i in range(n)]
    shares = {name: camera.share for name, camera in simulate.cameras.items()}
    cameras = []
    here: Counter[tuple[str, str]] = Counter()
    for i, scene in enumerate(scenes):
        # The camera that this scene, and then the corpus, is furthest short of.
        camera = max(
            shares,
            key=lambda name: (
                round(shares[name] * (1 + i // len(simulate.scenes)) - here[scene, name], 6),
                shares[name] * (1 + i) - here["", name],
            ),
        )
        cameras.append(camera)
        here[scene, camera] += 1
        here["", camera] += 1
    splits = _splits(simulate, list(zip(scenes, cameras, strict=True)))
    return [
        Planned(
            f"sim-{i:04d}-{scenes[i]}",
            scenes[i],
            cameras[i],
            simulate.size_of(cameras[i]),
            simulate.seed * 1_000_003 + i,
            splits[i],
        )
        for i in range(n)
    ]


def _splits(simulate: config.Simulate, kinds: list[tuple[str, str]]) -> list[str]:
    """The split of each recording, given its scene and camera."""
    n = len(kinds)
    shares = {name: share for name, share in simulate.splits.items() if share > 0}
    counts = {name: int(n * share) for name, share in shares.items()}
    by_rest = sorted(shares, key=lambda name: counts[name] - n * shares[name])
    for name in by_rest[: n - sum(counts.values())]:
        counts[name] += 1
    for name in (name for name in shares if not counts[name] and n >= len(shares)):
        counts[max(counts, key=counts.__getitem__)] -= 1
        counts[name] = 1
    free: dict[tuple[str, str], deque[int]] = {}
    for i in np.random.default_rng([simulate.seed, n]).permutation(n):
        free.setdefault(kinds[i], deque()).append(int(i))
    split = [""] * n
    for name in sorted(counts, key=counts.__getitem__):
        scenes_here: Counter[str] = Counter()
        kinds_here: Counter[tuple[str, str]] = Counter()
        for _ in range(counts[name]):
            # A scene new to this split first, then a camera new to it with that scene; of those
            # the one that the others have most left of.
            left: Counter[str] = Counter()
            for (scene, _), numbers in free.items():
                left[scene] += len(numbers)
            best = min(
                (kind for kind, numbers in free.items() if numbers),
                key=lambda k: (scenes_here[k[0]], -left[k[0]], kinds_here[k], -len(free[k])),
            )
            split[free[best].popleft()] = name
            scenes_here[best[0]] += 1
            kinds_here[best] += 1
    return split


def _make_all(
    simulate: config.Simulate, corpus: Path, items: list[Planned], workers: int
) -> Generator[ClipEntry, None, None]:
    """Simulate and write these recordings, in any process; entries for the writer to commit."""
    workers = min(workers, len(items))
    if workers <= 1:
        for item in items:
            yield _make(simulate, corpus, item)
        return
    waiting: deque[Future[ClipEntry]] = deque()
    with worker_pool(workers) as pool:
        for item in items:
            waiting.append(pool.submit(_make, simulate, corpus, item))
            if len(waiting) >= 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _make(simulate: config.Simulate, corpus: Path, item: Planned) -> ClipEntry:
    experiment = Experiment(
        item.scene,
        item.size,
        item.seed,
        simulate.scale,
        simulate.lr_stream,
        item.camera,
        simulate.light,
        simulate.focus,
        simulate.ordinary,
    )
    return write_clip(
        corpus,
        simulate.store,
        item.id,
        experiment.frames(),
        item.size,
        np.uint16,
        experiment.info(item.split),
        lr=experiment.lr,
    )
