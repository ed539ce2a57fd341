"""A training step on N GPUs: compute, all-reduce, data, and the slowest of N.

    step = max over ranks of compute x noise   (the batch of a rank at its MFU, or its launches)
         + exposed all-reduce                  (buckets in a row, ready during the backward pass)
         + what reading takes longer than that

The noise of a step is drawn from what was measured (scaling.py), scaled to the assumed spread on
clusters. What is assumed of these is in CLUSTERS, from data sheets and the launch count of the
model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

SIZES = (4, 8, 16, 32, 40, 64, 128, 256, 512, 1024)
PUBLISHED_GPUS = 40  # A100, four a node
PUBLISHED_STEPS = 30_000
PUBLISHED_SPEEDUP = 10.0  # "about 10x", end to end, over a beamline's own machine that is not named
FLOPS = 250.9e9  # forward and backward of a published 96x96 sample
GRADIENTS = 40_036_132  # bytes in float32
SAMPLE = 6 * 96 * 96  # bytes read for one: three low-resolution crops' sources, two keys, the truth
BACKWARD = 2 / 3  # of compute: gradients become ready during it
DRAWS = 400
LOSSES = {"launches": "launch", "communication": "comm.", "stragglers": "late", "data": "data"}


@dataclass(frozen=True)
class Cluster:
    """Assumptions of a kind of node; bandwidths in bytes/s."""

    name: str
    per_node: int
    peak: float  # dense bf16 FLOP/s of a GPU
    mfu: float
    launches_s: float  # host time of a step's kernels: the least a step can take
    inside: float  # NVLink, of a GPU
    inside_s: float  # per hop
    between: float  # network, of a node
    between_s: float  # per hop
    start_s: float  # of each collective
    samples_s: float  # a rank's readers deliver
    storage: float  # shared file system
    noise: float  # standard deviation of a rank's step / its mean


CLUSTERS = (
    Cluster("A100", 4, 312e12, 0.30, 0.018, 200e9, 3e-6, 50e9, 12e-6, 20e-6, 1000.0, 100e9, 0.015),
    Cluster("H200", 8, 989e12, 0.25, 0.015, 360e9, 3e-6, 400e9, 8e-6, 20e-6, 1500.0, 100e9, 0.015),
)
# Weak scaling that others have published, of what one GPU or node does: (GPUs, efficiency, who).
ANCHORS = (
    (512, 0.90, "Horovod, ResNet-101"),
    (256, 0.97, "DDP, near linear"),
    (10_000, 0.955, "AERIS (Swin), 10,080 nodes"),
)


@dataclass(frozen=True)
class Choice:
    """What the user sets."""

    batch: int  # samples of a rank
    bucket_mb: float = 25.0
    packed: bool = False  # gradients in 16 bits


def collective(c: Cluster, gpus: int, size: float) -> float:
    """Seconds of an all-reduce: within nodes, then between them by ring or tree, the faster."""
    g, nodes = min(gpus, c.per_node), math.ceil(gpus / c.per_node)
    seconds = c.start_s
    if g > 1:
        seconds += 2 * (g - 1) * c.inside_s + 2 * (g - 1) / g * size / c.inside
    if nodes > 1:
        ring = 2 * (nodes - 1) * c.between_s + 2 * (nodes - 1) / nodes * size / c.between
        tree = 2 * math.ceil(math.log2(nodes)) * c.between_s + 2 * size / c.between
        seconds += min(ring, tree)
    return seconds


def exposed(compute: float, buckets: list[float]) -> float:
    """Seconds after the backward pass until the last of `buckets` (seconds each) is through.

    Bucket i is ready when its share of the backward pass is over, and waits for the one before.
    """
    free, n = 0.0, len(buckets)
    for i, seconds in enumerate(buckets, 1):
        free = max(free, compute * (1 - BACKWARD + BACKWARD * i / n)) + seconds
    return free - compute


def slowest(shape: np.ndarray, spread: float, ranks: int, rng: np.random.Generator) -> float:
    """Mean over steps of the slowest rank's factor; `shape` is noise of mean 0 and deviation 1.

    Few steps were measured and many ranks are drawn for: what lies in the slowest tenth is drawn
    from an exponential tail of the same mean, or the worst step seen would be the worst there is.
    """
    if not spread:
        return 1.0
    draws = rng.choice(shape, (DRAWS, ranks))
    edge = float(np.quantile(shape, 0.9))
    late = draws > edge
    excess = float((shape[shape > edge] - edge).mean()) if (shape > edge).any() else 0.0
    draws[late] = edge + rng.exponential(excess, int(late.sum()))
    return float((1 + spread * draws).max(axis=1).mean())


def step(c: Cluster, gpus: int, choice: Choice, shape: np.ndarray) -> dict[str, float]:
    """Seconds of a step and of its parts: ideal work, and what each loss adds."""
    rng = np.random.default_rng(0)
    ideal = choice.batch * FLOPS / (c.mfu * c.peak)
    compute = max(ideal, c.launches_s)
    size = GRADIENTS / (2 if choice.packed else 1)
    count = max(1, math.ceil(GRADIENTS / (choice.bucket_mb * 2**20)))
    waiting = 0.0
    if gpus > 1:
        waiting = exposed(compute, [collective(c, gpus, size / count)] * count)
    late = compute * (slowest(shape, c.noise, gpus, rng) - 1)
    without = compute + late + waiting
    reading = max(choice.batch / c.samples_s, gpus * choice.batch * SAMPLE / c.storage)
    return {
        "step": max(without, reading),
        "work": ideal,
        "launches": compute - ideal,
        "communication": waiting,
        "stragglers": late,
        "data": max(0.0, reading - without),
    }


def weak(c: Cluster, gpus: int, choice: Choice, shape: np.ndarray) -> float:
    """Efficiency against one GPU with the same batch."""
    return step(c, 1, choice, shape)["step"] / step(c, gpus, choice, shape)["step"]


def strong(c: Cluster, gpus: int, whole: int, choice: Choice, shape: np.ndarray) -> float:
    """Efficiency of a fixed global batch against GPUs that do ideal work at the same MFU."""
    each = step(c, gpus, replace(choice, batch=max(1, whole // gpus)), shape)
    return each["work"] / each["step"]


def speedup(c: Cluster, gpus: int, local: int, choice: Choice, shape: np.ndarray) -> float:
    """Samples a second of so many GPUs over those of a machine with `local` ones of the kind."""
    return gpus * weak(c, gpus, choice, shape) / (local * weak(c, local, choice, shape))


def limits(parts: dict[str, float]) -> str:
    """The largest loss, or nothing where it is under 1 %."""
    name = max(LOSSES, key=lambda loss: parts[loss])
    return LOSSES[name] if parts[name] > 0.01 * parts["step"] else "-"


def smallest_batch(c: Cluster, gpus: int, choice: Choice, shape: np.ndarray) -> int | None:
    """Samples of a GPU from which work is more than 90 % of a step."""
    for batch in (1, 2, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64):
        parts = step(c, gpus, replace(choice, batch=batch), shape)
        if parts["work"] > 0.9 * parts["step"]:
            return batch
    return None


def best_bucket(c: Cluster, gpus: int, choice: Choice, shape: np.ndarray) -> float:
    sizes = (1.0, 5.0, 10.0, 25.0, 50.0)
    return min(
        sizes, key=lambda mb: step(c, gpus, replace(choice, bucket_mb=mb), shape)["communication"]
    )


# Does it predict this machine?


def noise_of(scaling: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Measured steps of one rank alone: their noise with mean 0 and deviation 1, and its size."""
    steps = np.array(scaling["context"]["steps_alone"], float)
    relative = steps / steps.mean() - 1
    spread = float(relative.std())
    return (relative / spread if spread else relative), spread


def check(
    scaling: dict[str, Any], allreduce: dict[str, Any], shape: np.ndarray, spread: float
) -> list[dict[str, Any]]:
    """Predicted and measured step of each engine and number of ranks of a scaling measurement."""
    rows = []
    size = scaling["context"]["gradient_bytes"]
    for name, measured in scaling.items():
        if not name.startswith("step_s["):
            continue
        engine, ranks, kind = name[7:-1].split(",")
        n = int(ranks)
        # Processes side by side share memory and cores: their compute is the ceiling's.
        compute = scaling.get(f"step_s[independent,{n},{kind}]")
        if engine not in ("horovod", "torch") or compute is None:
            continue
        predicted, waiting = compute, 0.0
        known = [
            int(key.split(",")[1][:-1])
            for key in allreduce
            if key.startswith(f"latency_us[{engine},")
        ]
        if n > 1 and known:
            of = min(known, key=lambda k: abs(k - n))
            latency = 1e-6 * allreduce[f"latency_us[{engine},{of}]"]
            bandwidth = 1e9 * allreduce[f"bandwidth_gb_s[{engine},{of}]"]
            count = max(1, math.ceil(size / (25 * 2**20))) if engine == "torch" else 1
            each = latency + 2 * (n - 1) / n * size / count / bandwidth
            waiting = exposed(compute, [each] * count)
            rng = np.random.default_rng(0)
            predicted = compute * slowest(shape, spread, n, rng) + waiting
        rows.append(
            {
                "engine": engine,
                "ranks": n,
                "scaling": kind,
                "measured_s": measured,
                "predicted_s": predicted,
                "communication_s": waiting,
                "error": predicted / measured - 1,
            }
        )
    return rows
