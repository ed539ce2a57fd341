"""Simulated experiments recorded by two cameras, and whole corpora of them."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpc_xvr import __version__, config
from hpc_xvr.data.beamline import SENSORS, Beamline, Camera
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.layout import MANIFEST, commit, disk_errors
from hpc_xvr.data.processes import cores, worker_pool
from hpc_xvr.data.scenes import SCENES
from hpc_xvr.data.writer import CorpusWriter, write_clip
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger, progress_bar

LR_SENSOR = SENSORS["hpv-x2"]
SETTINGS = "simulate.json"
_ROUND_S = 3.0  # between two meetings of the ranks
Entry = dict[str, Any]


class Experiment:
    """One experiment and the cameras that record it; the same seed gives the same bits.

    The high-resolution frames do not depend on lr_stream.

    Args:
        scene: name of one of SCENES.
        size: frames, height and width (T, H, W) of the high-resolution recording.
        scale: pixel size of the low-resolution camera / that of the high-resolution one.
        camera: which of SENSORS is the high-resolution one.

    Raises:
        InputError: unknown scene, or H or W no multiple of scale.
    """

    def __init__(
        self,
        scene: str,
        size: tuple[int, int, int] = (48, 128, 128),
        seed: int = 0,
        scale: int = 4,
        lr_stream: bool = True,
        camera: str = "sa-z",
    ) -> None:
        if scene not in SCENES:
            raise InputError(f"scene {scene!r}: choose one of {', '.join(SCENES)}")
        frames, height, width = size
        if min(size) < 1 or height % scale or width % scale:
            raise InputError(
                f"size {tuple(size)}: height and width must be positive multiples of scale {scale}"
            )
        streams = [np.random.default_rng([seed, list(SCENES).index(scene), i]) for i in range(4)]
        sensor = SENSORS[camera]
        sample = SCENES[scene]((height, width), frames, streams[0])
        self.scene, self.seed, self.scale, self.sensor, self.sample = (
            scene,
            seed,
            scale,
            sensor,
            sample,
        )
        self.shape = size
        self.frame_rate_hz = round(min(sample.frame_rate, sensor.fastest((height, width))))
        self.line = Beamline(sample, streams[1], self.frame_rate_hz)
        self.sharp = Camera.of(sensor, (height, width), 1, streams[2])
        self.fast = Camera.of(LR_SENSOR, (height // scale, width // scale), scale, streams[3])
        self.lr = np.empty((frames, *self.fast.shape), np.uint16) if lr_stream else None
        """(T, H/scale, W/scale) uint16, 0..2**LR_SENSOR.bit_depth - 1, filled as `frames` go by;
        pixel (i, j) covers the scale x scale pixels of a frame from (scale i, scale j)."""

    def frames(self) -> Iterator[np.ndarray]:
        """The high-resolution frames (H, W) uint16, 0..2**bit_depth - 1; to be called once."""
        for t, light in enumerate(self.line.frames()):
            if self.lr is not None:
                self.lr[t] = self.fast.record(light)
            yield self.sharp.record(light)

    def info(self, split: str) -> dict[str, Any]:
        """What a corpus keeps about the recording."""
        pixel_um = self.sample.pixel * 1e6
        info = {
            "camera": self.sensor.name,
            "frame_rate_hz": self.frame_rate_hz,
            "pixel_size_um": round(pixel_um, 3),
            "exposure_s": self.line.exposure / self.frame_rate_hz,
            "bit_depth": self.sensor.bit_depth,
            "scene": self.scene,
            "split": split,
            "source": "simulated",
            "full_scale": 1 / self.line.open_beam,
            "metadata": {
                "seed": self.seed,
                "material": self.sample.material,
                "energy_kev": round(self.line.energy, 2),
                "distance_m": round(self.sample.distance, 3),
            },
        }
        if self.lr is not None:
            info |= {
                "lr_times": [float(t) for t in range(len(self.lr))],
                "lr_bit_depth": LR_SENSOR.bit_depth,
            }
            info["metadata"] |= {
                "lr_camera": LR_SENSOR.name,
                "lr_bit_depth": LR_SENSOR.bit_depth,
                "lr_scale": self.scale,
                "lr_pixel_size_um": round(self.scale * pixel_um, 3),
            }
        return info


@dataclass(frozen=True)
class SimulatedVideo:
    """One experiment as both cameras saw it; the same moments, the same grey scale."""

    frames: np.ndarray
    """(T, H, W) uint16"""
    lr: np.ndarray | None
    """(T, H/scale, W/scale) uint16"""
    info: dict[str, Any]
    """VideoInfo's fields without sha256."""


def simulate_video(scene: str, *args: Any, **kwargs: Any) -> SimulatedVideo:
    """A whole experiment in memory; arguments and errors are those of `Experiment`."""
    experiment = Experiment(scene, *args, **kwargs)
    frames = np.stack(list(experiment.frames()))
    return SimulatedVideo(frames, experiment.lr, experiment.info("train"))


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
    rank: int = 0,
    world: int = 1,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> None:
    """Simulate a whole corpus on all cores of all ranks; the same, bit for bit, on any number.

    It grows in a hidden folder beside `path` and is renamed when complete: `path` is there whole
    or not at all. A call that was interrupted leaves the recordings it finished; the next one with
    the same settings goes on with what is missing.

    Args:
        workers: processes of this rank. Default: one for each core it may use.
        rank, world: which share of the recordings is this process's.
        gather: gives every rank the values of all, in rank order. Every rank calls it alike.

    Raises:
        InputError: something is at `path` already, a corpus of other settings is half made there,
            another process is making it, or the disk refuses.
    """
    path = Path(path)
    plan = plan_corpus(simulate)
    beside = path.with_name(f".{path.name}.building")
    workers = workers or cores()
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(_started(simulate, path, beside)) if rank == 0 else None
        # Also the moment from which the others may write.
        finished = gather(_finished(beside) if rank == 0 else None)[0]
        left = [item for item in plan if item.id not in finished]
        np.random.default_rng(simulate.seed).shuffle(left)  # scenes differ in cost
        mine = _made(simulate, beside, left[rank::world], workers)
        stack.callback(mine.close)
        advance = stack.enter_context(progress_bar("simulating", len(plan), "recordings"))
        advance(len(finished))
        if finished and rank == 0:
            logger.info("going on after %d of %d recordings", len(finished), len(plan))
        for entry in _gathered(mine, gather, _ROUND_S if world > 1 else 0.0):
            if writer is not None:
                writer.commit(entry)
            advance()
    if rank == 0:
        _finish(beside, path)
        logger.info("simulated %d recordings into %s", len(plan), path)
    gather(None)  # nobody leaves before the corpus is in its place


def refuse_existing(path: Path) -> None:
    """Raises InputError if something is there already."""
    if path.exists():
        raise InputError(f"corpus {path}: exists; remove it or choose another folder")


@contextlib.contextmanager
def _started(simulate: config.Simulate, path: Path, beside: Path) -> Iterator[CorpusWriter]:
    """The writer of the corpus that grows in `beside`, after checking whose it is."""
    refuse_existing(path)
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
                f"or remove {beside} to begin anew"
            )
        yield writer


def _finished(beside: Path) -> set[str]:
    return {video.id for video in Corpus(beside).videos}


def _finish(beside: Path, path: Path) -> None:
    """Put the complete corpus in its place, its manifest in the order of the recordings."""
    if path.exists():
        raise InputError(
            f"corpus {path}: another process made it meanwhile; use that one, or remove it and "
            f"rename {beside}"
        )
    with disk_errors(path):
        lines = (beside / MANIFEST).read_bytes().splitlines(keepends=True)
        (beside / f".{MANIFEST}").write_bytes(b"".join(sorted(lines)))
        commit(beside / f".{MANIFEST}", beside / MANIFEST)
        beside.rename(path)


def _gathered(
    entries: Iterator[Entry], gather: Callable[[Any], list[Any]], round_s: float
) -> Iterator[Entry]:
    """The entries of all ranks, told each other every `round_s` seconds until all are done."""
    while True:
        batch: list[Entry] = []
        end = time.monotonic() + round_s
        done = False
        while not done and (not batch or time.monotonic() < end):
            entry = next(entries, None)
            done = entry is None
            batch += [] if done else [entry]
        told = gather((batch, done))
        yield from (entry for batch, _ in told for entry in batch)
        if all(done for _, done in told):
            return


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
        here: Counter[str] = Counter()
        for _ in range(counts[name]):
            # A scene new to this split first, then a camera new to it with that scene; of those
            # the one that the others have most left of.
            left = Counter()
            for (scene, _), numbers in free.items():
                left[scene] += len(numbers)
            best = min(
                (kind for kind, numbers in free.items() if numbers),
                key=lambda k: (here[k[0]], -left[k[0]], here[k], -len(free[k])),
            )
            split[free[best].popleft()] = name
            here[best[0]] += 1
            here[best] += 1
    return split


def _made(
    simulate: config.Simulate, corpus: Path, items: list[Planned], workers: int
) -> Iterator[Entry]:
    """Simulate and write these recordings, in any process; entries for the writer to commit."""
    workers = min(workers, len(items))
    if workers <= 1:
        for item in items:
            yield _make(simulate, corpus, item)
        return
    waiting: deque[Future[Entry]] = deque()
    with worker_pool(workers) as pool:
        for item in items:
            waiting.append(pool.submit(_make, simulate, corpus, item))
            if len(waiting) >= 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _make(simulate: config.Simulate, corpus: Path, item: Planned) -> Entry:
    experiment = Experiment(
        item.scene, item.size, item.seed, simulate.scale, simulate.lr_stream, item.camera
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
