"""Speed and memory of the model against the plain baseline, same weights, same run.

    python benchmarks/model.py                  some minutes; files its result in results/
    python benchmarks/model.py --quick          small crops, under 50 s, files nothing
    python benchmarks/model.py --json out.json
    python benchmarks/model.py --memory-table   peak memory against batch and patch

Contestants take turns (A B C A B C ...), so that a slow spell of the machine hits all alike;
medians and the spread (largest - smallest) / median are reported. Ratios are baseline / ours, which
runs in bf16 where the device multiplies it itself, else in float32.
"""

from __future__ import annotations

import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_xvr.factory.memory import keep_freed_memory

keep_freed_memory()  # for all contestants, and before torch is imported

import click  # noqa: E402
import torch  # noqa: E402

from filing import file_result, usage  # noqa: E402
from hpc_xvr import log  # noqa: E402
from hpc_xvr.errors import InputError  # noqa: E402
from hpc_xvr.factory import execution  # noqa: E402
from hpc_xvr.model import kernels  # noqa: E402
from hpc_xvr.model.xvr import SwinXVR  # noqa: E402
from hpc_xvr.train.meters import (  # noqa: E402
    describe_machine,
    peak_memory,
    peak_tflops,
    reset_peak_memory,
    synchronise,
)
from hpc_xvr.train.optim import MovingAverage  # noqa: E402
from plain_swin import PlainSwinXVR  # noqa: E402

SMALL = {"embed_dim": 64, "depths": (2, 2), "heads": 1, "window": 4, "up_features": 32}

# What the profiler calls operations, by the part of the work they belong to; first match counts.
PARTS = {
    "optimizer": r"adam|foreach|lerp",
    "blocks in our CPU kernels": r"swin_?block",
    "attention": r"attention|softmax|fmha|flash",
    "convolution": r"conv|cudnn|implicit_gemm|xmma_fprop|wgrad|dgrad",
    "matrix products": r"mm$|addmm|bmm|linear|gemm|cutlass|nvjet",
    "norm": r"layer_norm",
    "copies and gathers": r"copy|cat|index|gather|fill|zero|permute",
    "element-wise": r"add|mul|gelu|sum|relu|sub|div|pool|elementwise|reduce|triton",
}


@dataclass(frozen=True)
class Sizes:
    """What is measured: low-resolution sizes, samples of a training step, rounds."""

    forward: tuple[int, int]
    crop: tuple[int, int]
    batch: int
    rounds: int


def sizes(quick: bool, device: torch.device) -> Sizes:
    if quick:
        if precision_of(device) == "bf16":
            return Sizes((24, 24), (16, 16), 1, 1)
        return Sizes((16, 16), (16, 8), 1, 1)  # such a CPU takes its time
    if device.type == "cuda":
        return Sizes((100, 256), (24, 24), 32, 5)
    return Sizes((64, 104), (24, 24), 4, 5)


def random_batch(size: tuple[int, int], count: int, device: torch.device) -> tuple:
    """lr, hr, target of random numbers."""
    g = torch.Generator().manual_seed(0)
    h, w = size
    shapes = ((count, 3, 1, h, w), (count, 2, 1, 4 * h, 4 * w), (count, 1, 1, 4 * h, 4 * w))
    return tuple(torch.rand(s, generator=g).to(device) for s in shapes)


def build(
    kind: type,
    device: torch.device,
    compile: execution.Compile = "none",
    recompute: str = "none",
    **options: Any,
) -> SwinXVR:
    """A model of seed 0; all kinds get the same weights."""
    torch.manual_seed(0)
    model = kind(drop_path=0.0, **options).to(device)
    execution.compile_model(model, compile, device)
    execution.recompute_activations(model, recompute)
    return model


def precision_of(device: torch.device) -> str:
    """What ours runs in: bf16 or float32."""
    return execution.resolve_precision("auto", device)


def forward(model: SwinXVR, size: tuple[int, int], bf16: bool, device: torch.device) -> Callable:
    """One inference pass of a batch of one."""
    lr, hr, _ = random_batch(size, 1, device)
    model.eval()

    def run() -> None:
        cast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
        with torch.inference_mode(), cast:
            model(lr, hr)

    return run


def training(
    model: SwinXVR, size: tuple[int, int], count: int, bf16: bool, device: torch.device
) -> Callable:
    """One step: forward, backward, Adam (torch's default one for the plain model)."""
    lr, hr, target = random_batch(size, count, device)
    model.train()
    fused = {} if isinstance(model, PlainSwinXVR) else {"fused": True}
    optimizer = torch.optim.Adam(model.parameters(), 2e-4, **fused)

    def run() -> None:
        optimizer.zero_grad()
        cast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
        with cast:
            output = model(lr, hr)
        (output.float() - target).abs().mean().backward()
        optimizer.step()

    return run


def race(contestants: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list]:
    """Seconds of each contestant in each round, after one run each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for name, run in list(contestants.items()):  # what this machine cannot run is left out
        try:
            run()
        except Exception as error:
            if name.startswith("plain"):
                raise
            print(f"left out: {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            del contestants[name], times[name]
    for _ in log.track(range(rounds), "rounds"):
        for name, run in contestants.items():
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            times[name].append(time.perf_counter() - start)
    return times


def race_and_rate(
    contestants: dict[str, Callable], rounds: int, device: torch.device
) -> tuple[dict[str, list], float]:
    """`race`, and the FLOP/s of a large matrix product that runs with them: what the machine gives
    at most, meanwhile."""
    dtype = torch.bfloat16 if precision_of(device) == "bf16" else torch.float32
    a = torch.randn(4096, 4096, device=device).to(dtype)
    times = race({**contestants, "product": lambda: a @ a}, rounds, device)
    return times, 2 * 4096**3 / statistics.median(times.pop("product"))


def show(
    title: str, times: dict[str, list], flops: dict[str, float], device: torch.device
) -> dict[str, float]:
    """Print a table, first contestant = baseline; return the medians."""
    medians = {name: statistics.median(t) for name, t in times.items()}
    first = next(iter(medians.values()))
    peak = peak_tflops(device)
    rows = []
    for name, m in medians.items():
        rate = flops[name] / m / 1e12
        rows.append(
            (
                name,
                f"{m:.3f}",
                f"{100 * (max(times[name]) - min(times[name])) / m:.0f}",
                f"{rate:.3f}",
                f"{100 * rate / peak:.1f}" if peak else "",
                f"{first / m:.2f}",
            )
        )
    columns = ["contestant", "median s", "spread %", "TFLOP/s", "MFU %", "times faster"]
    log.print_table(title, columns, rows)
    return medians


def profile_parts(title: str, run: Callable, device: torch.device) -> dict[str, float]:
    """Share of the time that each part of the work takes."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    run()
    with profile(activities=activities) as recorded:
        run()
        synchronise(device)
    shares = dict.fromkeys([*PARTS, "other"], 0.0)
    on_gpu = device.type == "cuda"
    for event in recorded.key_averages():
        if on_gpu and (
            event.device_type != torch.autograd.DeviceType.CUDA
            or getattr(event, "is_user_annotation", False)
        ):
            continue  # kernels only: the operations that started them hold the same time again
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = event.key.lower()
        part = next((p for p, words in PARTS.items() if re.search(words, name)), "other")
        shares[part] += spent
    total = sum(shares.values())
    shares = {part: spent / total for part, spent in shares.items()}
    log.print_table(
        title, ["part", "% of time"], [(p, f"{100 * s:.0f}") for p, s in shares.items()]
    )
    return shares


def memory_of_step(kind: str, size: tuple[int, int], count: int, device: torch.device) -> int:
    """Bytes a training step adds at its peak: `plain`, or ours with recompute `kind`.

    On a CPU in a process of its own, so that nothing freed before is used again.
    """
    if device.type == "cpu":
        command = [sys.executable, __file__, "--memory-of", kind, "--batch", str(count)]
        command += ["--device", "cpu"]
        command += ["--size", *map(str, size)]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(out.stdout)
    return _memory_of_step(kind, size, count, device)


def _memory_of_step(kind: str, size: tuple[int, int], count: int, device: torch.device) -> int:
    plain = kind == "plain"
    model = build(PlainSwinXVR if plain else SwinXVR, device, recompute="none" if plain else kind)
    bf16 = not plain and precision_of(device) == "bf16"
    step = training(model, size, count, bf16, device)
    reset_peak_memory(device)
    before = peak_memory(device)
    step()
    return peak_memory(device) - before


def memory_table(device: torch.device) -> dict[str, float]:
    """Peak memory of a training step against batch and patch, and what recomputing saves."""
    out = {}
    for patch in (64, 96, 128):
        for count in (1, 2, 4):
            for kind in ("plain", "none", "mlp", "blocks"):
                size = (patch // 4, patch // 4)
                out[f"memory_gb[{patch},{count},{kind}]"] = (
                    memory_of_step(kind, size, count, device) / 1e9
                )
    rows = [
        (
            f"{patch}x{patch}",
            str(count),
            *(
                f"{out[f'memory_gb[{patch},{count},{k}]']:.2f}"
                for k in ("plain", "none", "mlp", "blocks")
            ),
        )
        for patch in (64, 96, 128)
        for count in (1, 2, 4)
    ]
    log.print_table(
        "peak GB of a training step, published configuration",
        [
            "patch",
            "batch",
            "plain float32",
            f"ours {precision_of(device)}",
            "recompute mlp",
            "recompute blocks",
        ],
        rows,
    )
    return out


def bookkeeping(model: SwinXVR, device: torch.device) -> float:
    """Seconds of what a step does besides forward and backward: gradient norm, Adam, averages."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-4, fused=True)
    average = MovingAverage(model, 0.999)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def run() -> None:
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        average.update()

    return statistics.median(race({"": run}, 5, device)[""])


def forward_contestants(
    size: tuple[int, int], device: torch.device, quick: bool, **options: Any
) -> dict[str, tuple[SwinXVR, bool]]:
    """Name -> model, bf16?"""
    fast = precision_of(device)
    plain, ours = build(PlainSwinXVR, device, **options), build(SwinXVR, device, **options)
    sequence = build(SwinXVR, device, output="sequence", **options)
    runs = {"plain, float32": (plain, False)}
    if fast == "bf16":
        runs["plain, bf16 autocast"] = (plain, True)
    runs |= {
        "ours, float32": (ours, False),
        f"ours, {fast}": (ours, fast == "bf16"),
        f"ours, {fast}, sequence": (sequence, fast == "bf16"),
    }
    if quick:
        return runs
    in_sequence = build(PlainSwinXVR, device, output="sequence", **options)
    runs["plain, float32, sequence"] = (in_sequence, False)
    kinds = ["parts", "blocks"] if device.type == "cuda" else ["parts"]
    if device.type == "cpu" and fast == "bf16" and kernels.available():
        kinds = []  # whole blocks are one kernel there already
    for kind in kinds:
        try:
            compiled = build(SwinXVR, device, kind, **options)
            in_sequence = build(SwinXVR, device, kind, output="sequence", **options)
        except InputError as error:
            print(f"left out: {error}")
            continue
        runs[f"ours, {fast}, compile {kind}"] = (compiled, fast == "bf16")
        runs[f"ours, {fast}, compile {kind}, sequence"] = (in_sequence, fast == "bf16")
    if device.type == "cuda":
        runs[f"ours, {fast}, flex"] = (
            build(SwinXVR, device, attention="flex", **options),
            fast == "bf16",
        )
    return runs


def training_contestants(
    device: torch.device, quick: bool, **options: Any
) -> dict[str, tuple[SwinXVR, bool]]:
    """Name -> model, bf16?"""
    fast = precision_of(device)
    plain, ours = build(PlainSwinXVR, device, **options), build(SwinXVR, device, **options)
    runs = {"plain, float32": (plain, False)}
    if fast == "bf16":
        runs["plain, bf16 autocast"] = (plain, True)
    runs |= {
        "ours, float32": (ours, False),
        f"ours, {fast}": (ours, fast == "bf16"),
        f"ours, {fast}, recompute blocks": (
            build(SwinXVR, device, recompute="blocks", **options),
            fast == "bf16",
        ),
    }
    if not quick:
        runs[f"ours, {fast}, recompute mlp"] = (
            build(SwinXVR, device, recompute="mlp", **options),
            fast == "bf16",
        )
    if device.type == "cuda" and not quick:
        for kind in ("parts", "blocks"):
            runs[f"ours, {fast}, compile {kind}"] = (
                build(SwinXVR, device, kind, **options),
                fast == "bf16",
            )
        runs[f"ours, {fast}, flex"] = (
            build(SwinXVR, device, attention="flex", **options),
            fast == "bf16",
        )
    return runs


def best(medians: dict[str, float], sequence: bool) -> float:
    """The fastest of ours without recomputing, centre or sequence."""
    return min(
        seconds
        for name, seconds in medians.items()
        if name.startswith("ours")
        and "recompute" not in name
        and name.endswith("sequence") == sequence
    )


def measure(what: Sizes, quick: bool, device: torch.device) -> dict[str, float]:
    """The published configuration: everything the project promises numbers for."""
    fast = precision_of(device)
    contestants = forward_contestants(what.forward, device, quick)
    flops = {name: float(model.flops(*what.forward)) for name, (model, _) in contestants.items()}
    runs = {n: forward(m, what.forward, bf16, device) for n, (m, bf16) in contestants.items()}
    title = "forward, LR {}x{}, batch 1, published configuration".format(*what.forward)
    times, rate = race_and_rate(runs, what.rounds, device)
    f = show(title, times, flops, device)
    plain = f["plain, float32"]
    result: dict[str, float] = {
        "matmul_tflops": rate / 1e12,
        "forward_speedup": plain / best(f, sequence=False),
        "forward_speedup_eager": plain / f[f"ours, {fast}"],
        "forward_speedup_over_autocast": f.get("plain, bf16 autocast", math.nan)
        / best(f, sequence=False),
        "sequence_speedup_per_frame": 3 * plain / best(f, sequence=True),
        "sequence_frames_per_s": 3 / best(f, sequence=True),
        "sequence_speedup_over_plain_sequence": f.get("plain, float32, sequence", math.nan)
        / best(f, sequence=True),
        "forward_times_floor": best(f, False) / (flops[f"ours, {fast}"] / rate),
        **{f"forward_s[{name}]": value for name, value in f.items()},
    }
    if not quick:
        shares = profile_parts(f"parts of a {fast} forward pass", runs[f"ours, {fast}"], device)
        result |= {f"forward_share[{part}]": share for part, share in shares.items()}

    contestants = training_contestants(device, quick)
    step_flops = 3.0 * what.batch * contestants[f"ours, {fast}"][0].flops(*what.crop)
    runs = {
        n: training(m, what.crop, what.batch, bf16, device) for n, (m, bf16) in contestants.items()
    }
    title = "training step, LR {}x{}, batch {}".format(*what.crop, what.batch)
    times, rate = race_and_rate(runs, what.rounds, device)
    t = show(title, times, dict.fromkeys(runs, step_flops), device)
    ours = best(t, sequence=False)
    result |= {
        "train_speedup": t["plain, float32"] / ours,
        "train_speedup_over_autocast": t.get("plain, bf16 autocast", math.nan) / ours,
        "train_tflops": step_flops / ours / 1e12,
        "train_matmul_tflops": rate / 1e12,
        "train_times_floor": ours / (step_flops / rate),
        "checkpointing_time_ratio": t[f"ours, {fast}, recompute blocks"] / t[f"ours, {fast}"],
        "bookkeeping_share": bookkeeping(contestants[f"ours, {fast}"][0], device) / ours,
        **{f"train_s[{name}]": value for name, value in t.items()},
    }
    if peak_tflops(device):
        result["train_mfu"] = result["train_tflops"] / peak_tflops(device)
    if not quick:
        shares = profile_parts(f"parts of a {fast} training step", runs[f"ours, {fast}"], device)
        result |= {f"train_share[{part}]": share for part, share in shares.items()}
    del contestants, runs
    return result | _memory(what, quick, device)


def _memory(what: Sizes, quick: bool, device: torch.device) -> dict[str, float]:
    kinds = ("plain", "none", "blocks") if quick else ("plain", "none", "mlp", "blocks")
    memory = {kind: memory_of_step(kind, what.crop, what.batch, device) for kind in kinds}
    log.print_table(
        f"peak memory of a training step (ours in {precision_of(device)}, by what is recomputed)",
        ["contestant", "GB", "% of plain"],
        [(k, f"{v / 1e9:.2f}", f"{100 * v / memory['plain']:.0f}") for k, v in memory.items()],
    )
    return {
        "train_memory_ratio": memory["none"] / memory["plain"],
        "checkpointing_memory_ratio": memory["blocks"] / memory["plain"],
    }


def measure_small(device: torch.device) -> dict[str, float]:
    """A small configuration (that of the quickstart): where overheads count."""
    size, crop, count, rounds = (32, 32), (16, 16), 8, 5
    fast = precision_of(device)
    contestants = forward_contestants(size, device, True, **SMALL)
    flops = {name: float(model.flops(*size)) for name, (model, _) in contestants.items()}
    runs = {n: forward(m, size, bf16, device) for n, (m, bf16) in contestants.items()}
    f = show("forward, LR 32x32, small configuration", race(runs, rounds, device), flops, device)
    plain, ours = build(PlainSwinXVR, device, **SMALL), build(SwinXVR, device, **SMALL)
    runs = {
        "plain, float32": training(plain, crop, count, False, device),
        f"ours, {fast}": training(ours, crop, count, fast == "bf16", device),
    }
    step_flops = dict.fromkeys(runs, 3.0 * count * ours.flops(*crop))
    title = f"training step, LR 16x16, batch {count}, small configuration"
    t = show(title, race(runs, rounds, device), step_flops, device)
    return {
        "small_forward_speedup": f["plain, float32"] / f[f"ours, {fast}"],
        "small_sequence_speedup_per_frame": 3 * f["plain, float32"] / f[f"ours, {fast}, sequence"],
        "small_train_speedup": t["plain, float32"] / t[f"ours, {fast}"],
    }


def ratios(result: dict[str, float]) -> Iterable[tuple[str, str]]:
    return ((name, f"{value:.3g}") for name, value in result.items() if "[" not in name)


@click.command(help=usage(__doc__))
@click.option("--quick", is_flag=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]),
    default="cuda" if torch.cuda.is_available() else "cpu",
)
@click.option("--memory-table", "table", is_flag=True)
@click.option("--memory-of", hidden=True)
@click.option("--size", type=int, nargs=2, hidden=True)
@click.option("--batch", "count", type=int, hidden=True)
def main(
    quick: bool,
    out: Path | None,
    device: str,
    table: bool,
    memory_of: str | None,
    size: tuple[int, int],
    count: int,
) -> None:
    where = torch.device(device)
    if memory_of:
        print(_memory_of_step(memory_of, size, count, where))
        return
    log.setup()
    torch.set_float32_matmul_precision("highest")  # the baseline is float32, not TF32
    torch.backends.cudnn.allow_tf32 = False
    what = sizes(quick, where)
    context = describe_machine(where) | {"platform": platform.platform()}
    context["precision"] = precision_of(where)
    if table:
        result = memory_table(where)
    else:
        result = measure(what, quick, where)
        if not quick:
            result |= measure_small(where)
        log.print_table("ratios are baseline / ours", ["figure", "value"], list(ratios(result)))
        context |= {"forward_size": what.forward, "train_size": what.crop}
        context |= {"train_batch": what.batch, "rounds": what.rounds}
    file_result("memory" if table else "model", result, context, out, quick)


if __name__ == "__main__":
    main()
