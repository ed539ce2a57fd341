"""Strong and weak scaling of the trainer: from one rank to as many as there are.

    python benchmarks/scaling.py                     1 and 2 ranks; files its results in results/
    python benchmarks/scaling.py --ranks 1,2,4       more ranks than cores share them
    python benchmarks/scaling.py --quick             a tiny model, about 50 s, files nothing
    python benchmarks/scaling.py --ranks 1,2,4,8 --device cuda --config configs/recommended.yaml
    python benchmarks/scaling.py --mpirun "mpiexec --ppn 4 --depth 8" --engines torch
    python benchmarks/scaling.py --ranks 1 --mpirun "" --engines torch          without any MPI

Start it without mpirun, on a cluster inside a job: it starts mpirun itself, once for each engine
and number of ranks, and lets these groups take turns (all but one are stopped; on more than one
node a group lives only for its own turn, and is started again for the next). So a slow spell of
the machine hits all of them, and ratios are medians over rounds of figures that were measured one
after the other.

weak      fixed batch of a rank; strong: fixed global batch, that of the most ranks
ceiling   as many processes side by side as there are ranks, each training alone: what the machine
          gives when nobody communicates. `weak_efficiency_ENGINE` is the engine's throughput over
          the ceiling's; `weak_efficiency_absolute_ENGINE` over that of one process alone times
          the number of ranks
exposed   time from a rank's last gradient to the averaged ones, on the rank that waits least: what
          the backward pass did not hide. What the others wait beyond that is for slower ranks.
          On GPUs, where the host cannot see it: the step's time beyond the ceiling's
overhead  a step of the engine on one rank against one of a loop written by hand without trainer or
          engine, in the same process, one after the other: the median of such pairs
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from filing import file_result, usage
from hpc_xvr import log
from hpc_xvr.config import Simulate
from hpc_xvr.data.simulate.corpus import simulate_corpus
from hpc_xvr.train.meters import describe_machine
from ranks_figure import draw
from starting import ROOT, environment, ranks_options, refuse_launcher

HERE = Path(__file__).parent
QUICK = (
    "model.embed_dim=48",
    "model.depths=[2,2]",
    "data.patch=48",
)
HALF_WIDTH = ("model.embed_dim=96",)  # the published depth at half its width
Row = dict[str, Any]


def _end_with_me() -> None:
    """mpirun ends its ranks, stopped ones too, when this program is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Group:
    """Ranks started by mpirun that measure when told to, and are stopped while others do."""

    def __init__(self, kind: str, size: int, arguments: list[str], mpirun: list[str]) -> None:
        self.kind, self.size = kind, size
        self._command = [*mpirun, "-n", str(size)] if mpirun else []
        self._command += [sys.executable, str(HERE / "scaling_worker.py"), kind, *arguments]
        self._process: subprocess.Popen | None = None
        self._pids: list[int] = []
        self.hello: dict[str, Any] = {}

    def start(self) -> Group:
        """Start the ranks; returns at once."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1")),
            preexec_fn=_end_with_me,
        )
        return self

    def ready(self) -> None:
        """Wait until all ranks have built their models."""
        self.hello = self._read()
        log.logger.info("%s on %d rank(s) is ready", self.kind, self.size)
        self._pids = [rank["pid"] for rank in self.hello["ranks"]]

    @property
    def one_node(self) -> bool:
        return len({rank["host"] for rank in self.hello["ranks"]}) == 1

    def run(self, what: str, steps: int) -> list[Row]:
        """Every rank's measurement."""
        assert self._process and self._process.stdin
        self._process.stdin.write(f"{what} {steps}\n")
        self._process.stdin.flush()
        return self._read()["ranks"]

    def _read(self) -> dict[str, Any]:
        assert self._process and self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise click.ClickException(f"{' '.join(self._command)} ended: see its message above")

    def pause(self) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGSTOP)

    def go_on(self) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGCONT)

    def end(self) -> None:
        if self._process is None:
            return
        if self.hello and self.one_node:
            self.go_on()
        assert self._process.stdin
        with contextlib.suppress(OSError):  # mpirun does not hand on the end of a file
            self._process.stdin.write("end\n")
            self._process.stdin.flush()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(10)
        self._process = None


def take_turns(groups: list[Group], rounds: int, steps: int) -> dict[tuple, list[list[Row]]]:
    """(kind, ranks, what) -> every round's ranks; groups take turns within each round."""
    results: dict[tuple, list[list[Row]]] = {}
    groups[-1].start().ready()  # the most ranks
    apart = not groups[-1].one_node
    if apart:
        groups[-1].end()
    else:
        groups[-1].pause()
        for group in groups[:-1]:
            group.start()
        for group in groups[:-1]:
            group.ready()
            group.pause()
    for number in log.track(range(rounds), "rounds"):
        for group in groups[:: -1 if number % 2 else 1]:  # nobody always comes first
            if apart:
                group.start().ready()
            else:
                group.go_on()
            for what in group.hello["runs"]:
                rows = group.run(what, steps)
                results.setdefault((group.kind, group.size, what), []).append(rows)
            if group.size == 1:
                rows = group.run("beside", 2 * steps)
                results.setdefault((group.kind, 1, "beside"), []).append(rows)
            if apart:
                group.end()
            else:
                group.pause()
    whole = groups[-1].size * groups[-1].hello["runs"]["weak"]
    for group in groups:  # where the strong batch is the weak one, it was measured already
        runs = group.hello["runs"]
        if "strong" not in runs and runs["weak"] * group.size == whole:
            runs["strong"] = runs["weak"]
            results[group.kind, group.size, "strong"] = results[group.kind, group.size, "weak"]
    return results


def summarise(
    results: dict[tuple, list[list[Row]]], groups: list[Group], on_gpu: bool
) -> tuple[list[Row], dict[str, float], dict[str, list[float]]]:
    """A row for each group and batch, the figures that go on record, and some of each round."""
    about = {(g.kind, g.size): g.hello for g in groups}
    pairs = {key[0]: results.pop(key) for key in [*results] if key[2] == "beside"}
    rate = {key: _rates(rounds, about[key[:2]]["runs"][key[2]]) for key, rounds in results.items()}
    rows = []
    for key, rounds in results.items():
        kind, size, what = key
        row = _row(rounds, about[kind, size]["runs"][what], about[kind, size])
        alone = rate.get(("independent", 1, what), rate["independent", 1, "weak"])
        row |= {
            "engine": kind,
            "ranks": size,
            "scaling": what,
            "efficiency": _ratio(rate[key], alone) / size,
        }
        side = rate.get(("independent", size, what))
        if side and kind != "independent":
            row["of_ceiling"] = _ratio(rate[key], side)
            if not row["exposed"]:  # on GPUs
                row["exposed"] = max(0.0, 1 - row["of_ceiling"])
        row["compute"] = 1 - row["data"] - row["exposed"] - row["straggling"]
        rows.append(row)
    figures, by_round = _figures(rows, rate, on_gpu)
    for kind, rounds in pairs.items():
        name = f"overhead_{'trainer' if kind == 'independent' else kind}"
        each = [_each(ranks[0]["steps"], ranks[0]["plain"]) for ranks in rounds]
        figures[name] = statistics.median(ratio for ratios in each for ratio in ratios) - 1
        by_round[name] = [statistics.median(ratios) - 1 for ratios in each]
    by_hand = [s for ranks in pairs["independent"] for s in ranks[0]["plain"]]
    figures["step_by_hand_s"] = statistics.median(by_hand)
    return rows, figures, by_round


def _figures(
    rows: list[Row], rate: dict[tuple, list[float]], on_gpu: bool
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Medians that go on record, and what some of them were in each round."""
    fits = math.inf if on_gpu else os.cpu_count() or 1
    most = max(row["ranks"] for row in rows if row["ranks"] <= fits)  # a core for each rank
    figures: dict[str, float] = {}
    rounds: dict[str, list[float]] = {}
    exposed = []
    for row in rows:
        name = f"{row['engine']},{row['ranks']},{row['scaling']}"
        figures[f"samples_per_s[{name}]"] = row["samples_per_s"]
        figures[f"step_s[{name}]"] = row["step_median_s"]
        figures[f"step_cv[{name}]"] = row["step_cv"]
        if row["engine"] in ("horovod", "torch") and row["ranks"] > 1:
            figures[f"{row['scaling']}_efficiency[{name}]"] = row["efficiency"]
            figures[f"exposed[{name}]"] = row["exposed"]
            if row["ranks"] == most and row["scaling"] == "weak":
                figures[f"weak_efficiency_{row['engine']}"] = row["of_ceiling"]
                mine, side = (rate[k, most, "weak"] for k in (row["engine"], "independent"))
                rounds[f"weak_efficiency_{row['engine']}"] = _each(mine, side)
                figures[f"weak_efficiency_absolute_{row['engine']}"] = row["efficiency"]
                exposed.append(row["exposed"])
    if exposed:
        figures["exposed_communication_fraction"] = max(exposed)
    return figures, rounds


def _rates(rounds: list[list[Row]], batch: int) -> list[float]:
    """Samples a second of all ranks together, from the median step of each, in each round."""
    return [sum(batch / statistics.median(r["steps"]) for r in ranks) for ranks in rounds]


def _each(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def _ratio(a: list[float], b: list[float]) -> float:
    """Median over rounds of a / b."""
    return statistics.median(_each(a, b))


def _row(rounds: list[list[Row]], batch: int, about: dict[str, Any]) -> Row:
    steps = [s for ranks in rounds for r in ranks for s in r["steps"]]
    medians = [
        statistics.median(s for ranks in rounds for s in ranks[i]["steps"])
        for i in range(len(rounds[0]))
    ]
    total = sum(steps)
    least, rest = 0.0, 0.0
    for ranks in rounds:
        for waits in zip(*(r["wait"] for r in ranks), strict=True):
            least += min(waits) * len(waits)
            rest += sum(waits) - min(waits) * len(waits)
    return {
        "batch_of_rank": batch,
        "global_batch": batch * len(medians),
        "step_min_s": min(medians),
        "step_median_s": statistics.median(medians),
        "step_max_s": max(medians),
        "step_cv": statistics.stdev(steps) / statistics.mean(steps) if len(steps) > 1 else 0.0,
        "samples_per_s": statistics.median(_rates(rounds, batch)),
        "of_ceiling": None,
        "data": sum(w for ranks in rounds for r in ranks for w in r["data"]) / total,
        "exposed": least / total,
        "straggling": rest / total,
        "memory_gb": max(r["memory"] for ranks in rounds for r in ranks) / 1e9,
        "versions": about["engine"],
    }


COLUMNS: list[tuple[str, Callable[[Row], str]]] = [
    ("engine", lambda r: "none" if r["engine"] == "independent" else r["engine"]),
    ("ranks", lambda r: str(r["ranks"])),
    ("batch", lambda r: f"{r['scaling']} {r['batch_of_rank']}"),
    ("step s", lambda r: f"{r['step_median_s']:.3f}"),
    ("samples/s", lambda r: f"{r['samples_per_s']:.2f}"),
    ("eff.", lambda r: f"{100 * r['efficiency']:.0f}"),
    ("of ceiling", lambda r: _percent(r["of_ceiling"])),
    ("exposed", lambda r: _percent(r["exposed"])),
    ("late", lambda r: _percent(r["straggling"])),
    ("data", lambda r: _percent(r["data"])),
    ("GB", lambda r: f"{r['memory_gb']:.2f}"),
]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def save_beside(rows: list[Row], context: dict[str, Any], result: Path) -> None:
    """The rows as CSV and, of more than one number of ranks, as a figure."""
    with result.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if len(context["ranks"]) > 1:
        draw(rows, context, result.with_suffix(".png"))


def simulated(work: Path, quick: bool) -> Path:
    """A small corpus to train on."""
    side = 64 if quick else 128
    about = Simulate(videos=4, size=(16, side, side), scenes=["bubbles"])
    simulate_corpus(about.model_copy(update={"splits": {"train": 1.0}}), work / "corpus")
    return work / "corpus"


def show(rows: list[Row], figures: dict[str, float], by_round: dict[str, list[float]]) -> None:
    """Print what was measured."""
    log.print_table(
        "scaling (efficiencies and shares in %)",
        [title for title, _ in COLUMNS],
        [[text(row) for _, text in COLUMNS] for row in rows],
    )
    log.print_table(
        "on record",
        ["figure", "value"],
        [(n, f"{v:.3f}") for n, v in figures.items() if "[" not in n],
    )
    count = max(map(len, by_round.values()), default=0)
    log.print_table(
        "the same in each round",
        ["figure", *(str(i) for i in range(1, count + 1))],
        [(n, *(f"{v:.3f}" for v in values)) for n, values in by_round.items()],
    )


@click.command(help=usage(__doc__))
@click.option("--quick", is_flag=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@ranks_options(default="1,2")
@click.option("--config", default=str(ROOT / "configs/published.yaml"))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
@click.option("--batch", default=1, help="Samples of a rank in weak scaling.")
@click.option("--rounds", type=int)
@click.option("--steps", type=int, help="Of a group in a round.")
@click.option("--corpus", type=click.Path(path_type=Path), help="Default: a simulated one.")
def main(
    quick: bool,
    out: Path | None,
    ranks: str,
    engines: str,
    config: str,
    overrides: tuple[str, ...],
    batch: int,
    rounds: int | None,
    steps: int | None,
    device: str,
    mpirun: str,
    corpus: Path | None,
) -> None:
    log.setup()
    refuse_launcher()
    sizes = sorted({1, *map(int, ranks.split(","))})  # one is always among them
    rounds, steps = rounds or (2 if quick else 5), steps or (3 if quick else 2)
    if sizes[-1] > 1 and not mpirun:
        raise click.UsageError("more than one rank needs --mpirun")
    settings = [*overrides]
    if device == "cpu":  # a core for each rank; half width, or a step takes too long here
        small = QUICK if quick else HALF_WIDTH
        settings = ["run.threads=1", "data.workers=0", *small, *overrides]
    with tempfile.TemporaryDirectory() as work:
        fixed = [f"run.device={device}", "train.steps=1000000", "dist.timeout_s=86400"]
        fixed += [f"data.corpus={corpus or simulated(Path(work), quick)}", f"run.dir={work}/runs"]
        arguments = [config, str(batch), str(batch * sizes[-1]), *fixed, *settings]
        groups = [
            Group(kind, size, arguments, shlex.split(mpirun))
            for size in sizes
            for kind in ("independent", *engines.split(","))
        ]
        try:
            results = take_turns(groups, rounds, steps)
        finally:
            for group in groups:
                group.end()
    rows, figures, by_round = summarise(results, groups, device == "cuda")
    show(rows, figures, by_round)
    alone = results["independent", 1, "weak"]
    context = describe_machine(torch.device(device)) | {
        "config": config.removeprefix(f"{ROOT}/"),
        "settings": settings,
        "batch_of_rank": batch,
        "rounds": rounds,
        "ranks": sizes,
        "one_node": groups[-1].one_node,
        "cores": os.cpu_count(),
        "gradient_bytes": groups[0].hello["gradient_bytes"],
        "steps_alone": [round(s, 5) for ranks in alone for s in ranks[0]["steps"]],
        "flops_per_sample": groups[0].hello["flops_per_sample"],
        "by_round": {n: [round(v, 4) for v in values] for n, values in by_round.items()},
    }
    path = file_result("scaling", figures, context, out, quick)
    if path:
        save_beside(rows, context, path)


if __name__ == "__main__":
    main()
