"""Speed and memory of the model against the plain baseline, same weights, same run.

    python benchmarks/model.py                 published configuration, some minutes on two cores
    python benchmarks/model.py --quick         smaller crops, under 50 s
    python benchmarks/model.py --json out.json

Contestants take turns (A B C A B C ...), so that a slow spell of the machine hits all alike;
medians and the spread (largest - smallest) / median are reported. Ratios are baseline / ours.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

# glibc gives freed memory back and page faults then dominate; the same setting for everyone.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_MMAP_MAX_": "0"}

import click  # noqa: E402
import torch  # noqa: E402
from plain_swin import PlainSwinXVR  # noqa: E402

from hpc_xvr import log  # noqa: E402
from hpc_xvr.model.xvr import SwinXVR  # noqa: E402
from hpc_xvr.train.meters import describe_machine  # noqa: E402


def batch(size: tuple[int, int], count: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """lr, hr, target of random numbers."""
    g = torch.Generator().manual_seed(0)
    h, w = size
    shapes = ((count, 3, 1, h, w), (count, 2, 1, 4 * h, 4 * w), (count, 1, 1, 4 * h, 4 * w))
    return tuple(torch.rand(s, generator=g).to(device) for s in shapes)


def build(kind: type, device: torch.device, **options: object) -> SwinXVR:
    """A model of seed 0; both kinds get the same weights."""
    torch.manual_seed(0)
    return kind(**options).to(device)


def forward(model: SwinXVR, size: tuple[int, int], bf16: bool, device: torch.device) -> Callable:
    """One inference pass of a batch of one."""
    lr, hr, _ = batch(size, 1, device)
    model.eval()

    def run() -> None:
        cast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
        with torch.inference_mode(), cast:
            model(lr, hr)

    return run


def training(
    model: SwinXVR, size: tuple[int, int], count: int, bf16: bool, fused: bool, device: torch.device
) -> Callable:
    """One step: forward, backward, Adam."""
    lr, hr, target = batch(size, count, device)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-4, **({"fused": True} if fused else {}))

    def run() -> None:
        optimizer.zero_grad()
        cast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
        with cast:
            output = model(lr, hr)
        (output.float() - target).abs().mean().backward()
        optimizer.step()

    return run


def race(contestants: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list]:
    """Seconds of each contestant in each round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in log.track(range(rounds + 1), "rounds"):
        for name, run in contestants.items():
            _synchronise(device)
            start = time.perf_counter()
            run()
            _synchronise(device)
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(title: str, times: dict[str, list], flops: dict[str, float]) -> dict[str, float]:
    """Print a table, first contestant = baseline; return the medians."""
    medians = {name: statistics.median(t) for name, t in times.items()}
    first = next(iter(medians.values()))
    log.print_table(
        title,
        ["contestant", "median s", "spread %", "GFLOP/s", "times faster"],
        [
            (
                name,
                f"{m:.3f}",
                f"{100 * (max(times[name]) - min(times[name])) / m:.0f}",
                f"{flops[name] / m / 1e9:.0f}",
                f"{first / m:.2f}",
            )
            for name, m in medians.items()
        ],
    )
    return medians


def peak_memory(kind: str, size: tuple[int, int], count: int) -> float:
    """Bytes a training step adds to the process at its peak, in a process of its own (CPU)."""
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        kind,
        "--size",
        *map(str, size),
        "--batch",
        str(count),
    ]
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **MALLOC}
    )
    return float(out.stdout)


def _measure_memory(kind: str, size: tuple[int, int], count: int) -> None:
    device = torch.device("cpu")
    options = {"drop_path": 0.0}
    plain = kind.startswith("plain")
    model = build(PlainSwinXVR if plain else SwinXVR, device, **options)
    step = training(model, size, count, not plain, not plain, device)
    Path("/proc/self/clear_refs").write_text("5")  # peak := now; ru_maxrss would keep the parent's
    before = _high_water()
    step()
    print(_high_water() - before)


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


@click.command(help=__doc__)
@click.option("--quick", is_flag=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--memory-of", hidden=True)
@click.option("--size", type=int, nargs=2, hidden=True)
@click.option("--batch", "count", type=int, hidden=True)
def main(
    quick: bool,
    out: Path | None,
    device: str,
    memory_of: str | None,
    size: tuple[int, int],
    count: int,
) -> None:
    if memory_of:
        _measure_memory(memory_of, size, count)
        return
    if device == "cpu" and "MALLOC_MMAP_MAX_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    log.setup()
    where = torch.device(device)
    torch.set_float32_matmul_precision("highest")
    big, crop, samples, rounds = (
        ((24, 24), (24, 24), 1, 2) if quick else ((64, 104), (24, 24), 4, 3)
    )

    plain = build(PlainSwinXVR, where, drop_path=0.0)
    ours = build(SwinXVR, where, drop_path=0.0)
    sequence = build(SwinXVR, where, drop_path=0.0, output="sequence")
    count_flops = {"plain": plain.flops(*big), "ours": ours.flops(*big)}
    runs = {
        "plain, float32": forward(plain, big, False, where),
        "plain, bf16 autocast": forward(plain, big, True, where),
        "ours, float32": forward(ours, big, False, where),
        "ours, bf16": forward(ours, big, True, where),
        "ours, bf16, sequence (3 frames)": forward(sequence, big, True, where),
    }
    flops = {
        name: sequence.flops(*big) if "sequence" in name else count_flops["ours"] for name in runs
    }
    f = show(
        f"forward, LR {big[0]}x{big[1]}, batch 1, published configuration",
        race(runs, rounds, where),
        flops,
    )

    runs = {
        "plain, float32": training(plain, crop, samples, False, False, where),
        "plain, bf16 autocast": training(plain, crop, samples, True, False, where),
        "ours, float32": training(ours, crop, samples, False, True, where),
        "ours, bf16": training(ours, crop, samples, True, True, where),
    }
    step_flops = 3 * samples * ours.flops(*crop)
    t = show(
        f"training step, LR {crop[0]}x{crop[1]}, batch {samples}",
        race(runs, rounds, where),
        dict.fromkeys(runs, step_flops),
    )

    result = {
        "forward_speedup": f["plain, float32"] / f["ours, bf16"],
        "forward_speedup_over_autocast": f["plain, bf16 autocast"] / f["ours, bf16"],
        "sequence_speedup_per_frame": 3
        * f["plain, float32"]
        / f["ours, bf16, sequence (3 frames)"],
        "train_speedup": t["plain, float32"] / t["ours, bf16"],
        "train_speedup_over_autocast": t["plain, bf16 autocast"] / t["ours, bf16"],
        **{f"forward_s[{name}]": value for name, value in f.items()},
        **{f"train_s[{name}]": value for name, value in t.items()},
    }
    if where.type == "cpu":
        memory = {kind: peak_memory(kind, crop, samples) for kind in ("plain", "ours")}
        result["train_memory_ratio"] = memory["ours"] / memory["plain"]
        log.print_table(
            "peak memory of a training step",
            ["contestant", "GB", "of plain %"],
            [(k, f"{v / 1e9:.2f}", f"{100 * v / memory['plain']:.0f}") for k, v in memory.items()],
        )
    log.print_table(
        "ratios, baseline / ours",
        ["figure", "value"],
        [(k, f"{v:.2f}") for k, v in result.items() if "[" not in k],
    )
    if out:
        context = {
            **describe_machine(where),
            "forward_size": big,
            "train_size": crop,
            "train_batch": samples,
            "platform": platform.platform(),
        }
        out.write_text(json.dumps({**result, "context": context}, indent=1) + "\n")


if __name__ == "__main__":
    main()
