"""All-reduce: seconds against bytes with each engine, and the latency and bandwidth that fit them.

    python benchmarks/allreduce.py                     2 ranks; files its results in results/
    python benchmarks/allreduce.py --quick             fewer sizes, under 50 s, files nothing
    python benchmarks/allreduce.py --ranks 4,8,16 --device cuda --mpirun "mpiexec --ppn 4"

Start it without mpirun: it starts mpirun itself. What is timed is what the trainer calls, from the
call to the sum on the slowest rank; for Horovod that includes the wait for its next cycle. The fit
is t = latency + 2 (N-1)/N bytes / bandwidth, as of a ring, by least squares of logarithms.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.optimize import least_squares

from filing import file_result, usage
from hpc_xvr import log
from hpc_xvr.train.meters import describe_machine, synchronise
from starting import environment, ranks_options, refuse_launcher


def worker(engine: str, device: str, sizes: list[int], seconds: float) -> None:
    """Time every size on all ranks; rank 0 prints the medians as JSON."""
    from hpc_xvr.distributed.comm import connect

    comm = connect(engine, device)  # type: ignore[arg-type]
    torch.set_num_threads(1)
    times = {}
    for size in sizes:
        tensor = torch.ones(size // 4, device=comm.device)
        comm.all_reduce(tensor)
        comm.barrier()
        start = time.perf_counter()
        comm.all_reduce(tensor)
        synchronise(comm.device)
        once = max(comm.gather(time.perf_counter() - start))
        mine = []
        for _ in range(max(5, min(200, int(seconds / max(once, 1e-5))))):
            comm.barrier()
            start = time.perf_counter()
            comm.all_reduce(tensor)
            synchronise(comm.device)
            mine.append(time.perf_counter() - start)
        times[size] = statistics.median(map(max, zip(*comm.gather(mine), strict=True)))
    if comm.is_root:
        print(json.dumps({"about": comm.describe(), "times": times}), flush=True)
    comm.close()
    comm.leave(0)


def fit(ranks: int, times: dict[int, float]) -> tuple[float, float]:
    """(latency in s, bandwidth in bytes/s): too long by a factor weighs as too short by it."""
    sizes, seconds = (np.array(list(v), float) for v in (times.keys(), times.values()))

    def errors(logs: np.ndarray) -> np.ndarray:
        return np.log(predict(ranks, sizes, *np.exp(logs)) / seconds)

    start = np.log([seconds.min(), (sizes / seconds).max()])
    latency, bandwidth = np.exp(least_squares(errors, start).x)
    return float(latency), float(bandwidth)


def predict(ranks: int, size: Any, latency: float, bandwidth: float) -> Any:
    """Seconds for each of `size` bytes."""
    return latency + 2 * (ranks - 1) / ranks * size / bandwidth


def measure(engine: str, ranks: int, device: str, sizes: list[int], mpirun: str, s: float) -> dict:
    command = [*shlex.split(mpirun), "-n", str(ranks), sys.executable, __file__]
    command += ["--worker", engine, "--device", device, "--sizes", ",".join(map(str, sizes))]
    command += ["--seconds", str(s)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise click.ClickException(f"{' '.join(command)} failed:\n{done.stderr}")
    result = json.loads(lines[0])
    result["times"] = {int(size): t for size, t in result["times"].items()}
    return result


def draw(curves: dict[str, dict[int, float]], fits: dict[str, tuple], path: Path) -> None:
    figure = Figure(figsize=(5.5, 3.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (name, times) in enumerate(curves.items()):
        colour = f"C{i % 10}"
        ranks, latency, bandwidth = fits[name]
        sizes = np.geomspace(min(times), max(times), 100)
        axes.plot(list(times), [1e3 * t for t in times.values()], "o", ms=4, color=colour)
        axes.plot(
            sizes,
            [1e3 * predict(ranks, n, latency, bandwidth) for n in sizes],
            color=colour,
            label=f"{name}: {1e6 * latency:.0f} µs, {bandwidth / 1e9:.2f} GB/s",
        )
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="ms", title="all-reduce")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path)


@click.command(help=usage(__doc__))
@click.option("--quick", is_flag=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@ranks_options(default="2")
@click.option("--worker", "engine", hidden=True)
@click.option("--sizes", hidden=True)
@click.option("--seconds", type=float, hidden=True)
def main(
    quick: bool,
    out: Path | None,
    ranks: str,
    engines: str,
    device: str,
    mpirun: str,
    engine: str | None,
    sizes: str | None,
    seconds: float | None,
) -> None:
    log.setup()
    if engine:
        assert sizes and seconds
        worker(engine, device, [int(n) for n in sizes.split(",")], seconds)
    refuse_launcher()
    largest = 28 if device == "cuda" else 26
    sweep = [4 * 4**k for k in range(0, (largest - 2) // 2 + 1, 2 if quick else 1)]
    result: dict[str, float] = {}
    curves: dict[str, dict[int, float]] = {}
    fits: dict[str, tuple] = {}
    about, errors_of = {}, {}
    for size in map(int, ranks.split(",")):
        for name in engines.split(","):
            measured = measure(name, size, device, sweep, mpirun, 0.3 if quick else 2.0)
            times = measured["times"]
            latency, bandwidth = fit(size, times)
            label = f"{name}, {size} ranks"
            curves[label], fits[label] = times, (size, latency, bandwidth)
            about[name] = measured["about"]
            errors = [abs(predict(size, n, latency, bandwidth) / t - 1) for n, t in times.items()]
            errors_of[label] = statistics.median(errors)
            result |= {
                f"latency_us[{name},{size}]": 1e6 * latency,
                f"bandwidth_gb_s[{name},{size}]": bandwidth / 1e9,
                f"fit_error[{name},{size}]": errors_of[label],
                **{f"seconds[{name},{size},{n}]": t for n, t in times.items()},
            }
    log.print_table(
        "all-reduce: t = latency + 2 (N-1)/N bytes / bandwidth",
        ["engine", "latency µs", "GB/s", "median error %", *(_bytes(n) for n in sweep[::3])],
        [
            (
                label,
                f"{1e6 * fits[label][1]:.0f}",
                f"{fits[label][2] / 1e9:.2f}",
                f"{100 * errors_of[label]:.0f}",
                *(f"{1e3 * times[n]:.2f} ms" for n in sweep[::3]),
            )
            for label, times in curves.items()
        ],
    )
    context: dict[str, Any] = describe_machine(torch.device(device)) | {"engines": about}
    path = file_result("allreduce", result, context, out, quick)
    if path:
        draw(curves, fits, path.with_suffix(".png"))


def _bytes(n: int) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1024 or unit == "MB":
            return f"{n:.0f} {unit}"
        n //= 1024
    raise AssertionError


if __name__ == "__main__":
    main()
