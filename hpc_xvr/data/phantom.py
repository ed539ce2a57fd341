"""Simulated experiments recorded by two cameras, and whole corpora of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from hpc_xvr import config
from hpc_xvr.data.layout import disk_errors
from hpc_xvr.data.optics import MATERIALS, Camera, propagate, transmit
from hpc_xvr.data.scenes import SCENES, Scene
from hpc_xvr.data.writer import CorpusWriter
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger, progress_bar

HR_CAMERA = "Photron FASTCAM SA-Z (simulated)"
LR_CAMERA = "Shimadzu HPV-X2 (simulated)"
HR_BITS = 12
LR_BITS = 10
_STATES = 3
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class SimulatedVideo:
    """One experiment as both cameras saw it; the same moments, the same grey scale."""

    scene: str
    frames: np.ndarray
    """(T, H, W) uint16, 0..2**bit_depth - 1"""
    lr: np.ndarray | None
    """(T, H/scale, W/scale) uint16, 0..2**lr_bit_depth - 1; pixel (i, j) covers the scale x scale
    pixels of `frames` from (scale i, scale j)"""
    frame_rate_hz: float
    pixel_size_um: float
    exposure_s: float
    full_scale: float
    """Transmission of the largest stored value."""
    metadata: dict[str, str | int | float]
    camera: str = HR_CAMERA
    bit_depth: int = HR_BITS
    lr_bit_depth: int = LR_BITS


class Beamline:
    """Source, sample and scintillator: the light that both cameras look at.

    Args:
        scene: the moving sample.
        rng: draws beam, exposure and afterglow.
    """

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        material = MATERIALS[scene.material]
        self.scene = scene
        self.energy = material.energy_for(scene.bulk, scene.transmission)
        self.attenuation = material.attenuation(self.energy)
        self.strength = scene.distance * material.decrement(self.energy) / scene.pixel**2
        self.exposure = rng.uniform(0.3, 0.8)
        """Share of the frame interval."""
        self.afterglow = rng.uniform(0.01, 0.04)
        """Share of a frame's light that still comes in the next one."""
        self.open_beam = rng.uniform(0.62, 0.78)
        """Brightest open beam / full scale."""
        height, width = scene.shape
        y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in (height, width))
        y0, x0 = rng.uniform(-0.3, 0.3, 2)
        y_size, x_size = rng.uniform(2.0, 3.0), rng.uniform(2.5, 4.0)
        self.beam = np.float32(self.open_beam) * np.exp(
            -(((y[:, None] - y0) / y_size) ** 2 + ((x - x0) / x_size) ** 2) / 2
        )

    def state(self, t: float) -> np.ndarray:
        """Intensity (H, W), 1 = full scale, at one instant (frames)."""
        thickness = self.scene.thickness(t)
        return self.beam * propagate(
            transmit(thickness, self.attenuation), thickness, self.strength
        )

    def exposed(self, t: int) -> np.ndarray:
        """Mean intensity over the exposure of frame t."""
        instants = (np.arange(_STATES) + 0.5) / _STATES * self.exposure
        return sum(self.state(t + float(dt)) for dt in instants) / np.float32(_STATES)

    def frames(self) -> Iterator[np.ndarray]:
        """The scintillator's light (H, W) in each frame, with what the one before left."""
        before = None
        for t in range(self.scene.frames):
            now = self.exposed(t)
            if before is None:
                before = now
            yield gaussian_filter((1 - self.afterglow) * now + self.afterglow * before, 0.35)
            before = now


def simulate_video(
    scene: str,
    size: tuple[int, int, int] = (48, 128, 128),
    seed: int = 0,
    scale: int = 4,
    lr_stream: bool = True,
) -> SimulatedVideo:
    """Simulate one experiment of `size` (T, H, W); the same seed gives the same bits.

    The high-resolution frames do not depend on lr_stream.

    Raises:
        InputError: unknown scene, or H or W no multiple of scale.
    """
    if scene not in SCENES:
        raise InputError(f"scene {scene!r}: choose one of {', '.join(SCENES)}")
    frames, height, width = size
    if min(size) < 1 or height % scale or width % scale:
        raise InputError(
            f"size {tuple(size)}: height and width must be positive multiples of scale {scale}"
        )
    streams = [np.random.default_rng([seed, list(SCENES).index(scene), i]) for i in range(4)]
    sample = SCENES[scene]((height, width), frames, streams[0])
    line = Beamline(sample, streams[1])
    draw = streams[2].uniform
    hr_camera = Camera(
        (height, width),
        1,
        blur=draw(0.7, 1.0),
        photons=draw(9e3, 2e4),
        read_noise=0.0015,
        fixed_pattern=0.002,
        bit_depth=HR_BITS,
        rng=streams[2],
    )
    draw = streams[3].uniform
    lr_camera = Camera(
        (height // scale, width // scale),
        scale,
        blur=draw(0.25, 0.35),
        photons=draw(5e3, 1.2e4),
        read_noise=0.002,
        fixed_pattern=0.002,
        bit_depth=LR_BITS,
        rng=streams[3],
    )
    hr = np.empty(size, np.uint16)
    lr = np.empty((frames, *lr_camera.shape), np.uint16) if lr_stream else None
    for t, light in enumerate(line.frames()):
        hr[t] = hr_camera.record(light)
        if lr is not None:
            lr[t] = lr_camera.record(light)
    metadata = {
        "seed": seed,
        "material": sample.material,
        "energy_kev": round(line.energy, 2),
        "distance_m": round(sample.distance, 3),
    }
    if lr_stream:
        metadata |= {
            "lr_camera": LR_CAMERA,
            "lr_bit_depth": LR_BITS,
            "lr_scale": scale,
            "lr_pixel_size_um": round(scale * sample.pixel * 1e6, 3),
        }
    return SimulatedVideo(
        scene=scene,
        frames=hr,
        lr=lr,
        frame_rate_hz=round(sample.frame_rate),
        pixel_size_um=round(sample.pixel * 1e6, 3),
        exposure_s=line.exposure / sample.frame_rate,
        full_scale=1 / line.open_beam,
        metadata=metadata,
    )


def simulate_corpus(simulate: config.Simulate, path: Path, workers: int | None = None) -> None:
    """Simulate a whole corpus on all cores (or `workers` processes); the same on any number.

    It is built beside `path` and renamed into place: `path` is there whole or not at all.

    Raises:
        InputError: something is at `path` already, or the disk refuses.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"corpus {path}: exists; remove it or choose another folder")
    plan = _plan(simulate)
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    beside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.building")
    try:
        with (
            CorpusWriter(beside, simulate.store) as writer,
            progress_bar("simulating", len(plan), "recordings") as advance,
        ):
            for (id, _, split), video in _simulated(simulate, plan, workers):
                writer.add(
                    id,
                    video.frames,
                    video.frames.shape,
                    video.frames.dtype,
                    _info(video, split),
                    video.lr,
                )
                advance()
        if path.exists():
            raise InputError(
                f"corpus {path}: another process made it meanwhile; use that one or remove it"
            )
        with disk_errors(path):
            beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    logger.info("simulated %d recordings into %s", len(plan), path)


def _plan(simulate: config.Simulate) -> list[tuple[str, str, str]]:
    """(id, scene, split) of each recording: scenes in turn, every split with all scenes it can."""
    n = simulate.videos
    scenes = [simulate.scenes[i % len(simulate.scenes)] for i in range(n)]
    shares = {name: share for name, share in simulate.splits.items() if share > 0}
    counts = {name: int(n * share) for name, share in shares.items()}
    by_rest = sorted(shares, key=lambda name: counts[name] - n * shares[name])
    for name in by_rest[: n - sum(counts.values())]:
        counts[name] += 1
    for name in (name for name in shares if not counts[name] and n >= len(shares)):
        counts[max(counts, key=counts.__getitem__)] -= 1
        counts[name] = 1
    rng = np.random.default_rng([simulate.seed, n])
    free = [int(i) for i in rng.permutation(n)]
    split = [""] * n
    for name in sorted(counts, key=counts.__getitem__):
        here: Counter[str] = Counter()
        for _ in range(counts[name]):
            # A scene new to this split first, of those the one that the others have most left of.
            left = Counter(scenes[i] for i in free)
            best = min(free, key=lambda i: (here[scenes[i]], -left[scenes[i]]))
            free.remove(best)
            split[best] = name
            here[scenes[best]] += 1
    return [(f"sim-{i:04d}-{scenes[i]}", scenes[i], split[i]) for i in range(n)]


def _simulated(
    simulate: config.Simulate, plan: list[tuple[str, str, str]], workers: int
) -> Iterator[tuple[tuple[str, str, str], SimulatedVideo]]:
    """The planned recordings in order; at most two per worker are held in memory."""
    jobs = [
        (scene, simulate.size, simulate.seed * 1_000_003 + i, simulate.scale, simulate.lr_stream)
        for i, (_, scene, _) in enumerate(plan)
    ]
    workers = min(workers, len(jobs))
    if workers <= 1:
        for item, job in zip(plan, jobs, strict=True):
            yield item, simulate_video(*job)
        return
    waiting: deque[Future[SimulatedVideo]] = deque()
    with (
        _single_threaded(),
        ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as pool,
    ):
        try:
            for i, item in enumerate(plan):
                while len(waiting) < 2 * workers and i + len(waiting) < len(jobs):
                    waiting.append(pool.submit(simulate_video, *jobs[i + len(waiting)]))
                yield item, waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _start_worker() -> None:
    """The parent alone answers Ctrl-C; workers end when it is gone, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Workers started within use one thread each: the cores are shared out already."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _info(video: SimulatedVideo, split: str) -> dict[str, object]:
    lr = (
        {}
        if video.lr is None
        else {
            "lr_times": [float(t) for t in range(len(video.lr))],
            "lr_bit_depth": video.lr_bit_depth,
        }
    )
    return {
        "camera": video.camera,
        "frame_rate_hz": video.frame_rate_hz,
        "pixel_size_um": video.pixel_size_um,
        "exposure_s": video.exposure_s,
        "bit_depth": video.bit_depth,
        "scene": video.scene,
        "split": split,
        "source": "simulated",
        "full_scale": video.full_scale,
        "metadata": video.metadata,
        **lr,
    }


def _sweep(path: Path) -> None:
    """Remove what killed processes of this host left beside `path`."""
    for left in path.parent.glob(f".{path.name}.{socket.gethostname()}.*.building"):
        try:
            os.kill(int(left.name.split(".")[-2]), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (PermissionError, ValueError):
            continue
