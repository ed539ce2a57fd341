"""Start-up and step time of this version beside those of an earlier one, on two ranks.

    git worktree add /tmp/before 9ae2ec1         the version before
    python benchmarks/before_after.py /tmp/before         ten minutes; files its result
    python benchmarks/before_after.py /tmp/before --quick    one round, files nothing

Both train the smallest network on a common corpus, in turns, one step and many steps each. Figures
are medians over the rounds; `_spread` is half the distance of the quartiles as a share of the
median. Those in seconds of a core (`cpu`, of all processes together) depend little on who else uses
the machine; of the others only the ratios (`..._ratio`, after to before, the median of the rounds'
ratios) are worth a look on a shared one.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch

from filing import file_result, usage
from hpc_xvr.train.meters import describe_machine
from starting import ROOT, refuse_launcher

FIGURES = ("start_s", "start_cpu_s", "step_s", "step_cpu_s", "help_cpu_s")


def _cpu() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _run(tree: Path, words: list[str]) -> float:
    """Seconds of a core that a command of that version takes."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    before = _cpu()
    subprocess.run(words, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    return _cpu() - before


def measure(tree: Path, folder: Path, steps: int, mpirun: str) -> dict[str, float]:
    """Figures of one version, of one round."""
    program = [sys.executable, "-m", "hpc_xvr"]
    result = {"help_cpu_s": _run(tree, [*program, "--help"])}
    cpu, lines, begin = {}, [], 0.0
    for count in (1, steps + 1):
        run = Path(tempfile.mkdtemp(dir=folder)) / "run"
        settings = {
            "run.dir": run,
            "data.corpus": folder / "corpus",
            "train.steps": count,
            "validation.every": 10**6,
            "checkpoint.every": 10**6,
        }
        changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        begin = time.time()
        train = [*shlex.split(mpirun), "-n", "2", *program, "train", "configs/pulse.yaml"]
        cpu[count] = _run(tree, [*train, *changes])
        text = (run / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        lines = [line for line in lines if line["kind"] == "train"]
    result["start_s"] = lines[0]["time"] - begin
    result["step_s"] = statistics.median(line["step_s"] for line in lines[1:])
    result["start_cpu_s"] = cpu[1]
    result["step_cpu_s"] = (cpu[steps + 1] - cpu[1]) / steps
    return result


@click.command(help=usage(__doc__ or ""))
@click.argument("before", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=30, show_default=True)
@click.option("--mpirun", default="mpirun --oversubscribe", envvar="XVR_MPIRUN")
@click.option("--quick", is_flag=True, help="One round.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where the result goes.")
def main(before: Path, rounds: int, steps: int, mpirun: str, quick: bool, out: Path | None) -> None:
    refuse_launcher()
    trees = {"before": before.resolve(), "after": ROOT}
    if quick:
        rounds, steps = 1, 5
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for tree in trees.values():  # makes the corpus, and what Python compiles
            measure(tree, folder, 1, mpirun)
        for number in range(rounds):
            for name in sorted(trees, reverse=bool(number % 2)):
                found[name].append(measure(trees[name], folder, steps, mpirun))
                print(name, {k: round(v, 4) for k, v in found[name][-1].items()}, flush=True)
    result = {}
    for figure in FIGURES:
        series = {name: np.array([one[figure] for one in each]) for name, each in found.items()}
        for name, values in series.items():
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
            result[f"{figure}_{name}"] = float(middle)
            result[f"{figure}_{name}_spread"] = float((high - low) / 2 / middle)
        result[f"{figure}_ratio"] = float(np.median(series["after"] / series["before"]))
    for name, value in result.items():
        print(f"{name:32} {value:.4g}")
    context = describe_machine(torch.device("cpu"))
    context |= {"before": str(before), "rounds": rounds, "steps": steps, "ranks": 2}
    file_result("before-after", result, context, out, quick)


if __name__ == "__main__":
    main()
