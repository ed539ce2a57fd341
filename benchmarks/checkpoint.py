"""What a checkpoint costs the run that goes on meanwhile.

    python benchmarks/checkpoint.py              a minute or two; files its result in results/
    python benchmarks/checkpoint.py --quick      under 50 s, files nothing
    python benchmarks/checkpoint.py --folder /scratch/me     on the disk that matters

The published model trains on random numbers, one sample a step. Blocks of steps take turns: without
a checkpoint, with one written in the background, with one that is waited for. What a checkpoint
costs is the difference between the blocks, which holds everything: the copy, the disk, the cores
and the memory bandwidth that writing takes away from training. `cost_cpu_s` is the same in seconds
of one core, which do not depend on who else uses the machine.
"""

from __future__ import annotations

import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_xvr.factory.memory import keep_freed_memory

keep_freed_memory()

import click  # noqa: E402
import torch  # noqa: E402

from filing import file_result, usage  # noqa: E402
from hpc_xvr import checkpoint, log  # noqa: E402
from hpc_xvr.config import Config, load  # noqa: E402
from hpc_xvr.factory.build import build_model  # noqa: E402
from hpc_xvr.factory.execution import prepare  # noqa: E402
from hpc_xvr.train.meters import describe_machine, synchronise  # noqa: E402
from hpc_xvr.train.objective import l1  # noqa: E402
from hpc_xvr.train.optim import MovingAverage, adam  # noqa: E402

EVERY = Config().checkpoint.every


def training(cfg: Config, device: torch.device) -> tuple[Callable[[], None], Callable[[], dict]]:
    """A step, and the state of a run after it."""
    model = build_model(cfg)
    precision = prepare(model, cfg, device, training=True)
    optimizer, average = adam(model.parameters(), cfg.optim), MovingAverage(model, cfg.optim.ema)
    side, scale = cfg.data.patch // cfg.data.scale, cfg.data.scale
    lr = torch.rand(1, cfg.data.lr_frames, 1, side, side, device=device)
    hr = torch.rand(1, 2, 1, side * scale, side * scale, device=device)
    offset = torch.tensor([[-1.0, 1.0]], device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = model(lr, hr, offset)
        l1(output, hr[:, :1]).backward()
        optimizer.step()
        average.update()

    def state() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "ema": dict(average.mean),
            "optimizer": optimizer.state_dict(),
            "config": cfg.model_dump(mode="json"),
        }

    return step, state


def measure(folder: Path, steps: int, rounds: int, device: torch.device) -> dict[str, float]:
    cfg = load(None, ["train.precision=auto", "model.drop_path=0"])
    step, state = training(cfg, device)
    writer, number, blocked = checkpoint.CheckpointWriter(folder, keep=1), 0, []

    def save(wait: bool) -> None:
        nonlocal number
        number += 1
        before = writer.blocked
        writer.save({**state(), "step": number})
        if wait:
            writer.finish()
        else:
            blocked.append(writer.blocked - before)

    kinds: dict[str, Callable[[], None]] = {
        "none": lambda: None,
        "background": lambda: save(wait=False),
        "waited for": lambda: save(wait=True),
    }
    for _ in range(2):
        step()
        save(wait=True)  # memory for the copies
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    cpu: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, action in kinds.items():
            synchronise(device)
            start, busy = time.perf_counter(), time.process_time()
            action()
            for _ in range(steps):
                step()
            synchronise(device)
            seconds[kind].append(time.perf_counter() - start)
            writer.finish()
            cpu[kind].append(time.process_time() - busy)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    work = {kind: statistics.median(values) for kind, values in cpu.items()}
    step_s = medians["none"] / steps
    cost = max(medians["background"] - medians["none"], statistics.median(blocked))
    size = checkpoint.path_of(folder, number).stat().st_size
    spread = (max(seconds["none"]) - min(seconds["none"])) / medians["none"]
    return {
        "step_s": step_s,
        "checkpoint_mb": size / 1e6,
        "blocked_s": statistics.median(blocked),
        "slowest_write_s": writer.slowest,
        "cost_s": cost,
        "cost_cpu_s": work["background"] - work["none"],
        "cost_waited_for_s": medians["waited for"] - medians["none"],
        "stall_fraction": cost / (EVERY * step_s),
        "stall_fraction_every_100": cost / (100 * step_s),
        "every_for_2_percent": math.ceil(cost / (0.02 * step_s)),
        "spread_of_blocks": spread,
    }


@click.command(help=usage(__doc__))
@click.option("--quick", is_flag=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--steps", type=click.IntRange(1), help="Of a block. Default: by device.")
@click.option("--rounds", type=click.IntRange(1), help="Of blocks. Default: 5, quick 2 or 3.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
def main(
    quick: bool,
    out: Path | None,
    folder: Path | None,
    steps: int | None,
    rounds: int | None,
    device: str,
) -> None:
    log.setup()
    where = torch.device(device)
    gpu = where.type == "cuda"
    steps = steps or ((40 if gpu else 2) if quick else (200 if gpu else 8))
    rounds = rounds or ((3 if gpu else 2) if quick else 5)
    with tempfile.TemporaryDirectory(dir=folder) as base:
        result = measure(Path(base), steps, rounds, where)
    rows = [(name, f"{value:.4g}") for name, value in result.items()]
    log.print_table(f"a checkpoint every {EVERY} steps", ["figure", "value"], rows)
    context = describe_machine(where) | {"platform": platform.platform()}
    context |= {"every": EVERY, "steps": steps, "rounds": rounds}
    file_result("checkpoint", result, context, out, quick)


if __name__ == "__main__":
    main()
