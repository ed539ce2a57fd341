"""Frames a second of key propagation, against SWIN-XVR and methods without learning, same run.

    python benchmarks/gaps.py                  400x1024 pixels, a gap of 20; some minutes
    python benchmarks/gaps.py --quick          100x256 pixels, a gap of 8; under 50 s
    python benchmarks/gaps.py --json out.json

Contestants take turns, so that a slow spell of the machine hits all alike; medians are reported. A
frame of SWIN-XVR (published size, sequence output) is a third of one of its passes. For key
propagation a training step is timed too, and how much of it convolutions and products take.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from hpc_xvr.factory.memory import keep_freed_memory

keep_freed_memory()  # for all contestants, and before torch is imported

import click  # noqa: E402
import torch  # noqa: E402

from filing import file_result, usage  # noqa: E402
from hpc_xvr import log  # noqa: E402
from hpc_xvr.config import load  # noqa: E402
from hpc_xvr.factory.build import build_model  # noqa: E402
from hpc_xvr.factory.execution import resolve_precision  # noqa: E402
from hpc_xvr.model.bayes import BayesianFusion  # noqa: E402
from hpc_xvr.model.key_propagation import KeyPropagation  # noqa: E402
from hpc_xvr.model.xvr import SwinXVR  # noqa: E402
from hpc_xvr.train.meters import describe_machine, synchronise  # noqa: E402
from hpc_xvr.train.task import task_of  # noqa: E402
from starting import ROOT  # noqa: E402

CONFIGS = {
    "base": ROOT / "configs" / "key_propagation_sharp.yaml",
    "small": ROOT / "configs" / "key_propagation_small.yaml",
}
MATRICES = r"conv|swin_?block|mm$|addmm|linear|brgemm|cudnn|gemm"
"""Operations that are products: convolutions, linear layers, and blocks in our CPU kernels."""


def passes(
    h: int, w: int, gap: int, device: torch.device
) -> tuple[dict[str, tuple[Callable, int]], dict[str, float]]:
    """Name -> (one pass, frames that come out of it); and GFLOP a frame."""
    lr = torch.rand(1, gap + 1, 1, h, w, device=device)
    hr = torch.rand(1, 2, 1, 4 * h, 4 * w, device=device)
    bf16 = resolve_precision("auto", device) == "bf16"

    def inference(run: Callable[[], object], low: bool) -> Callable:
        def once() -> None:
            cast = torch.autocast(device.type, torch.bfloat16, enabled=low)
            with torch.inference_mode(), cast:
                run()

        return once

    swin = SwinXVR(output="sequence", drop_path=0.0).to(device).eval()
    found = {"swin_xvr": (inference(lambda: swin(lr[:, :3], hr), bf16), 3)}
    gflop = {"swin_xvr": swin.flops(h, w) / 3e9}
    for name, path in CONFIGS.items():
        model = build_model(load(path)).to(device).eval()
        found[name] = (inference(lambda m=model: m(lr, hr), bf16), gap - 1)
        found[f"{name}, float32"] = (inference(lambda m=model: m(lr, hr), False), gap - 1)
        gflop[name] = model.flops(h, w) / 1e9
    bayes = BayesianFusion()
    found["bayes"] = (inference(lambda: bayes(lr[:, 1:2], hr), False), 1)
    return found, gflop


def races(found: dict[str, tuple[Callable, int]], rounds: int, device: torch.device) -> dict:
    """Median seconds a frame of each."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 1):  # the first warms up
        for name, (once, frames) in found.items():
            synchronise(device)
            start = time.perf_counter()
            once()
            synchronise(device)
            if turn:
                times[name].append((time.perf_counter() - start) / frames)
    return {name: statistics.median(values) for name, values in times.items()}


def training(device: torch.device, gap: int = 8) -> tuple[float, float, float]:
    """Seconds of a step of configs/key_propagation.yaml on a gap, its TFLOP/s, and the share of
    operations' own time that products take."""
    config = load(CONFIGS["base"])
    task, model = task_of(config), build_model(config).to(device)
    assert isinstance(model, KeyPropagation)
    side, batch = config.data.patch // 4, config.train.global_batch
    sample = {
        "lr": torch.rand(batch, gap + 1, 1, side, side, device=device),
        "hr": torch.rand(batch, 2, 1, 4 * side, 4 * side, device=device),
        "target": torch.rand(batch, gap - 1, 1, 4 * side, 4 * side, device=device),
    }
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    bf16 = resolve_precision("auto", device) == "bf16"

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = model(sample["lr"], sample["hr"])
        task.loss(output, sample).backward()
        optimizer.step()

    seconds = races({"step": (step, 1)}, 5, device)["step"]
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        step()
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [(event.key.lower(), getattr(event, own)) for event in profile.key_averages()]
    matrices = sum(time for name, time in events if re.search(MATRICES, name))
    flops = 3 * batch * (gap - 1) * model.flops(side, side)
    return seconds, flops / seconds / 1e12, matrices / sum(time for _, time in events)


@click.command(help=usage(__doc__))
@click.option("--quick", is_flag=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
def main(quick: bool, out: Path | None, device: str) -> None:
    """Race, profile, print, file."""
    log.setup(0)
    where = torch.device(device)
    h, w, gap, rounds = (25, 64, 8, 1) if quick else (100, 256, 20, 3)
    found, gflop = passes(h, w, gap, where)
    seconds = races(found, rounds, where)
    result = {f"frames_s[{name}]": 1 / value for name, value in seconds.items()}
    result |= {f"gflop_a_frame[{name}]": value for name, value in gflop.items()}
    for name in CONFIGS:
        result[f"speedup_to_swin_xvr[{name}]"] = seconds["swin_xvr"] / seconds[name]
        result[f"speedup_of_bf16[{name}]"] = seconds[f"{name}, float32"] / seconds[name]
    step, rate, share = training(where)
    result |= {"train_s": step, "train_tflop_s": rate, "train_share_of_products": share}
    print(f"{4 * h}x{4 * w} pixels, a gap of {gap}")
    for name, value in result.items():
        print(f"  {name:40} {value:10.3f}")
    file_result("gaps", result, describe_machine(where), out, quick)


if __name__ == "__main__":
    main()
