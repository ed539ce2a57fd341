"""Time to quality: MLPerf HPC's rules, in small.

    python benchmarks/time_to_quality.py                    1 and 2 ranks, 5 runs of each kind;
                                                            files its results in results/
    python benchmarks/time_to_quality.py --quick            one run of each kind, files nothing
    python benchmarks/time_to_quality.py --ranks 8,16,32 --models 4 --device cuda \\
        --config configs/key_propagation.yaml --set data.corpus=corpus --target 41 \\
        --work runs/quality --stage /local/scratch/quality

Start it without mpirun, on a cluster inside a job. It starts `hpc-xvr train` by mpirun, with a
config whose corpus, model and target are fixed (time_to_quality.yaml unless --config says another),
with another seed for each run. A run ends at the first validation that reaches the target
(train.target_psnr).

strong    minutes from the moment the corpus is opened to the target, all ranks train one model with
          the same global batch. Of the runs the fastest and the slowest are dropped, the others'
          mean counts. Copying the corpus to the nodes (staging) is within this time, and
          given apart
weak      models a minute: several models are trained at once, each on the first of --ranks; counted
          from the first that opens the corpus to the last that reaches the target
start     seconds from mpirun to the moment the corpus is opened; not counted by MLPerf, nor here
caches    before each run (--warm: not) the corpus is taken out of the nodes' page caches;
          `corpus_in_memory` is the share of it that stayed there

Every run has a log of `:::MLLOG` lines (with mlperf-logging installed: hpc_xvr[mlperf]), which that
package's checker of MLPerf HPC 3.0 has to accept; mllog_lines.py says what of it applies. Other
than there, staging counts, groups of models are repeated like single ones, and a run that misses
its target counts as the slowest: one is dropped, two make the figure void.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

import mllog_lines
from filing import file_result, usage
from hpc_xvr import log
from hpc_xvr.config import Config, load
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.simulate.corpus import simulate_if_missing
from hpc_xvr.errors import InputError
from hpc_xvr.train.meters import describe_machine
from starting import ROOT, environment, ranks_options, refuse_launcher

HERE = Path(__file__).parent
QUICK_TARGET = 32.8
NOTHING = 0.01  # share of a corpus that may stay in memory where it is called cold


@dataclass
class Result:
    """What a run took, in seconds; `reached` is infinite if it missed the target."""

    launched: float
    opened: float
    finished: float
    start_s: float
    staging_s: float
    reached: float
    steps: int
    psnr: float
    kwh: float | None


@dataclass
class Task:
    """What all runs have in common."""

    config: str
    settings: list[str]
    cfg: Config
    mpirun: list[str]
    hosts: str
    nodes: list[str]
    work: Path
    stage: Path
    cold: bool
    in_memory: list[float] = field(default_factory=list)

    @property
    def is_cold(self) -> bool:
        """Were the caches emptied, and did that help?"""
        return self.cold and max(self.in_memory, default=1.0) < NOTHING

    def freshen(self, ranks: int, staged: Sequence[Path]) -> None:
        """Delete copies on the nodes, and take the corpus out of their caches."""
        if not self.cold:
            return
        command = [*self._launcher(ranks, self.nodes), sys.executable, str(HERE / "fresh.py")]
        command += [str(self.cfg.data.corpus), *map(str, staged)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        shares = re.findall(r"in memory: ([\d.]+)", done.stdout)
        if done.returncode or not shares:
            raise click.ClickException(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        self.in_memory.append(max(map(float, shares)))

    def launch(self, name: str, ranks: int, engine: str, seed: int, nodes: list[str]) -> Started:
        """Start the training of one model."""
        run = self.work / name
        mine = {"run.dir": run, "run.seed": seed, "data.stage_dir": self.stage / name}
        command = [*self._launcher(ranks, nodes), sys.executable, "-m", "hpc_xvr", "train"]
        command += [self.config, "--engine", engine if ranks > 1 else "auto"]
        for setting in [*self.settings, *(f"{key}={value}" for key, value in mine.items())]:
            command += ["--set", setting]
        run.parent.mkdir(parents=True, exist_ok=True)
        threads, launched = os.environ.get("OMP_NUM_THREADS", "1"), time.time()
        with run.with_suffix(".log").open("w") as said:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(OMP_NUM_THREADS=threads),
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        return Started(run, ranks, launched, process)

    def _launcher(self, ranks: int, nodes: list[str]) -> list[str]:
        if not self.mpirun:
            return []
        return [*self.mpirun, "-n", str(ranks), *placed(self.hosts, nodes)]


@dataclass
class Started:
    """A training that runs."""

    run: Path
    ranks: int
    launched: float
    process: subprocess.Popen

    def result(self) -> Result:
        """Wait for it, and read what it took."""
        if self.process.wait():
            tail = self.run.with_suffix(".log").read_text(errors="replace")[-3000:]
            raise click.ClickException(f"{self.run.name} ended with an error:\n{tail}")
        cfg, lines = load(self.run / "config.yaml"), self.lines()
        start = next(line for line in lines if line["kind"] == "start")
        last = [line for line in lines if line["kind"] == "validation"][-1]
        opened, target = start["time"] - start["opening_s"], cfg.train.target_psnr
        assert target is not None
        energy = json.loads((self.run / "utilisation.json").read_text())["energy"]
        return Result(
            launched=self.launched,
            opened=opened,
            finished=last["time"],
            start_s=opened - self.launched,
            staging_s=start["staging_s"],
            reached=last["time"] - opened if last["psnr"] >= target else math.inf,
            steps=last["step"],
            psnr=last["psnr"],
            kwh=energy["kwh"] if energy else None,
        )

    def lines(self) -> list[dict[str, Any]]:
        """Of its metrics.jsonl."""
        return [json.loads(text) for text in (self.run / "metrics.jsonl").open()]


Run = tuple[Started, Result]


def olympic(values: Sequence[float]) -> float:
    """Mean without the best and the worst, as MLPerf counts; of one or two values that of all."""
    kept = sorted(values)[1:-1] if len(values) > 2 else values
    return statistics.fmean(kept)


def nodes_of_job() -> list[str]:
    """Names of the nodes of this job; nothing where no scheduler says so."""
    if "SLURM_JOB_NODELIST" in os.environ:
        command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.split()
    if "PBS_NODEFILE" in os.environ:
        return list(dict.fromkeys(Path(os.environ["PBS_NODEFILE"]).read_text().split()))
    return []


def placed(hosts: str, nodes: list[str]) -> list[str]:
    """The launcher's words for these nodes: '--host {name}:4' becomes --host a:4,b:4."""
    words = shlex.split(hosts) if nodes else []
    return [",".join(w.replace("{name}", n) for n in nodes) if "{name}" in w else w for w in words]


def part(nodes: list[str], number: int, of: int) -> list[str]:
    """The nodes of one of several models; models share nodes if there are more of them."""
    first, end = number * len(nodes) // of, (number + 1) * len(nodes) // of
    return nodes[first : max(end, first + 1)]


def digest(corpus: Path) -> str:
    """The corpus in one number: of every recording its name and checksum."""
    text = "".join(f"{v.id} {v.info.sha256}\n" for v in Corpus(corpus).videos)
    return hashlib.sha256(text.encode()).hexdigest()


def strong(task: Task, name: str, ranks: int, engine: str, seed: int) -> Run:
    """One model on these ranks."""
    task.freshen(ranks, [task.stage / name])
    started = task.launch(name, ranks, engine, seed, task.nodes)
    return finish(started)


def weak(task: Task, name: str, models: int, ranks: int, engine: str, seed: int) -> list[Run]:
    """Several models at once, each on so many ranks."""
    names = [f"{name}/model-{number}" for number in range(models)]
    task.freshen(models * ranks, [task.stage / one for one in names])
    all_started = [
        task.launch(one, ranks, engine, seed + number, part(task.nodes, number, models))
        for number, one in enumerate(names)
    ]
    return [finish(started) for started in all_started]


def finish(started: Started) -> Run:
    """Wait for a training, and say what it took."""
    say("/".join(started.run.parts[-2:]), result := started.result())
    return started, result


def models_a_minute(results: Sequence[Result]) -> float:
    """Of models trained at once; those that missed the target do not count."""
    good = [one for one in results if math.isfinite(one.reached)]
    if not good:
        return 0.0
    return 60 * len(good) / (max(r.finished for r in good) - min(r.opened for r in good))


def figures_of(kind: str, results: list[Result]) -> dict[str, float]:
    """What goes on record of the runs of one kind."""
    minutes = [one.reached / 60 for one in results]
    figures = {
        f"start_s[{kind}]": olympic([one.start_s for one in results]),
        f"staging_s[{kind}]": olympic([one.staging_s for one in results]),
        f"steps[{kind}]": olympic([one.steps for one in results]),
        f"missed[{kind}]": sum(math.isinf(m) for m in minutes),
    }
    if all(one.kwh is not None for one in results):
        figures[f"kwh[{kind}]"] = olympic([one.kwh or 0.0 for one in results])
    return figures


def log_of(task: Task, started: Started, result: Result, accelerators: int) -> list[str] | None:
    """Write a run's MLLOG file; what its checker objects to, None without mlperf-logging."""
    machine = mllog_lines.Machine(
        platform=describe_machine(torch.device("cpu"))["device"],
        nodes=max(len(task.nodes), 1),
        accelerators=accelerators,
        ranks=started.ranks,
    )
    path = task.work / "mllog" / started.run.relative_to(task.work).with_suffix(".txt")
    cfg = load(started.run / "config.yaml")
    try:
        mllog_lines.write(path, cfg, machine, started.lines(), result.launched, task.is_cold)
        return mllog_lines.problems(path)
    except ImportError:
        return None


@click.command(help=usage(__doc__))
@click.option("--quick", is_flag=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@ranks_options(default="1,2", engines="auto")
@click.option("--config", default=str(HERE / "time_to_quality.yaml"))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
@click.option("--target", type=float, help="PSNR (dB). Default: train.target_psnr.")
@click.option("--runs", type=int, help="Of each kind. Default: 5, with --quick 1.")
@click.option("--models", type=int, help="At once. Default: the most ranks / the fewest; 0: none.")
@click.option("--warm", is_flag=True, help="Leave the corpus in the nodes' page caches.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep runs and logs here.")
@click.option("--stage", type=click.Path(path_type=Path), help="Node-local folder for copies.")
@click.option(
    "--hosts",
    default="",
    help="How --mpirun keeps a model to its nodes, such as '--host {name}:4'; the word with {name} "
    "is repeated for each of them. Needed for several models on several nodes.",
)
def main(
    quick: bool,
    out: Path | None,
    ranks: str,
    engines: str,
    device: str,
    mpirun: str,
    config: str,
    overrides: tuple[str, ...],
    target: float | None,
    runs: int | None,
    models: int | None,
    warm: bool,
    work: Path | None,
    stage: Path | None,
    hosts: str,
) -> None:
    log.setup()
    refuse_launcher()
    sizes = sorted({*map(int, ranks.split(","))})
    runs = runs or (1 if quick else 5)
    models = sizes[-1] // sizes[0] if models is None else models
    if sizes[-1] > 1 and not mpirun:
        raise click.UsageError("more than one rank needs --mpirun")
    nodes = nodes_of_job()
    if len(nodes) > 1 and not (work and stage):
        raise click.UsageError(
            f"this job has {len(nodes)} nodes: give --work, a folder that all of them see, and "
            "--stage, one on a disk of each"
        )
    if len(nodes) > 1 and models > 1 and "{name}" not in hosts:
        raise click.UsageError(f"{models} models at once on {len(nodes)} nodes need --hosts")
    with tempfile.TemporaryDirectory() as temporary:
        work = (work or Path(temporary) / "runs").resolve()
        settings = [f"run.device={device}", *overrides]
        if target or quick:
            settings.append(f"train.target_psnr={target or QUICK_TARGET}")
        task = Task(
            config,
            *fixed(config, settings, work),
            shlex.split(mpirun),
            hosts,
            nodes,
            work,
            stage or Path(temporary) / "stage",
            not warm,
        )
        found, together = measure(task, sizes, engines.split(","), runs, models)
        corpus = digest(task.cfg.data.corpus)
        result, by_run = summarise(found, together, sizes[0])
        every = [one for each in [*found.values(), *together] for one in each]
        result |= checked(task, every)
    if not warm:
        result["corpus_in_memory"] = max(task.in_memory)
    for name, value in result.items():
        print(f"{name:36} {value:.4g}")
    context = describe_machine(torch.device(device)) | {
        "config": Path(config).name,
        "settings": [s for s in task.settings if not s.startswith("data.corpus=")],
        "target_psnr": task.cfg.train.target_psnr,
        "corpus_sha256": corpus,
        "global_batch": task.cfg.train.global_batch,
        "ranks": sizes,
        "runs": runs,
        "models_at_once": models,
        "caches": "cold" if task.is_cold else "warm",
        "load_average": [round(v, 2) for v in os.getloadavg()],
        "rules": f"MLPerf HPC {mllog_lines.VERSION} in small",
        "by_run": by_run,
    }
    if device == "cpu":
        context["note"] = (
            "a shared machine: seconds and efficiencies depend on who else used it, steps do not"
        )
    file_result("time-to-quality", result, context, out, quick)


def fixed(config: str, settings: list[str], work: Path) -> tuple[list[str], Config]:
    """The settings of all runs, and the config they make; its corpus is there afterwards.

    Raises:
        click.ClickException: a bad config, or none with a target.
    """
    try:
        cfg = load(config, settings)
        more = [f"train.log_every={cfg.validation.every}"]  # a line right before each validation
        if cfg.simulate and not any(s.startswith("data.corpus=") for s in settings):
            more.append(f"data.corpus={work / 'corpus'}")
        cfg = load(config, [*settings, *more])
        if cfg.train.target_psnr is None:
            raise click.UsageError("no target: give --target, or train.target_psnr in --config")
        simulate_if_missing(cfg.simulate, cfg.data.corpus)
    except InputError as error:
        raise click.ClickException(str(error)) from None
    return [*settings, *more], cfg


def measure(
    task: Task, sizes: list[int], engines: list[str], runs: int, models: int
) -> tuple[dict[tuple[str, int], list[Run]], list[list[Run]]]:
    """Runs of each (engine, ranks), and groups of models at once; kinds take turns, so that a slow
    spell of the machine hits all of them."""
    kinds = [(engine, size) for size in sizes for engine in (engines if size > 1 else ["auto"])]
    found: dict[tuple[str, int], list[Run]] = {kind: [] for kind in kinds}
    together: list[list[Run]] = []
    for number in range(runs):
        for engine, size in kinds[:: -1 if number % 2 else 1]:  # nobody always comes first
            name = f"strong-{engine}-{size}/result_{number}"
            found[engine, size].append(strong(task, name, size, engine, number + 1))
        if models > 1:
            seed = 1 + runs + number * models
            name = f"weak/group_{number}"
            together.append(weak(task, name, models, sizes[0], kinds[0][0], seed))
    return found, together


def checked(task: Task, runs: list[Run]) -> dict[str, float]:
    """Write the MLLOG files; how many there are, and how many the checker accepts."""
    objections = [log_of(task, *one, torch.cuda.device_count()) for one in runs]
    if None in objections:
        log.logger.warning("no MLLOG lines without mlperf-logging: pip install 'hpc_xvr[mlperf]'")
        return {}
    for text in sorted({text for each in objections for text in each or []}):
        log.logger.warning("compliance checker: %s", text)
    return {"logs": len(runs), "logs_accepted": sum(not each for each in objections)}


def say(name: str, result: Result) -> None:
    """A line for each run."""
    took = "missed the target after" if math.isinf(result.reached) else "reached the target in"
    log.logger.info(
        "%s %s %.1f s, %d steps, %.2f dB (start %.1f s, staging %.2f s)",
        name,
        took,
        result.finished - result.opened,
        result.steps,
        result.psnr,
        result.start_s,
        result.staging_s,
    )


def summarise(
    found: dict[tuple[str, int], list[Run]],
    together: list[list[Run]],
    ranks: int,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Figures, and what some of them were in each run."""
    result: dict[str, float] = {}
    by_run: dict[str, list[float]] = {}
    for (engine, size), runs in found.items():
        kind = f"strong,{engine},{size}"
        results = [one for _, one in runs]
        minutes = [one.reached / 60 for one in results]
        result[f"minutes_to_target[{kind}]"] = olympic(minutes)
        by_run[f"minutes_to_target[{kind}]"] = [round(m, 4) for m in minutes if math.isfinite(m)]
        by_run[f"steps[{kind}]"] = [one.steps for one in results]
        result |= figures_of(kind, results)
    least = next(iter(found))
    alone = result[f"minutes_to_target[strong,{least[0]},{least[1]}]"]
    for engine, size in found:
        if size > least[1]:
            minutes_here = result[f"minutes_to_target[strong,{engine},{size}]"]
            result[f"strong_efficiency[{engine},{size}]"] = alone * least[1] / size / minutes_here
    if together:
        models = len(together[0])
        kind = f"weak,{models}x{ranks}"
        rates = [models_a_minute([one for _, one in group]) for group in together]
        result[f"models_a_minute[{kind}]"] = olympic(rates)
        by_run[f"models_a_minute[{kind}]"] = [round(rate, 4) for rate in rates]
        result[f"weak_efficiency[{kind}]"] = result[f"models_a_minute[{kind}]"] * alone / models
        result |= figures_of(kind, [one for group in together for _, one in group])
    return result, by_run


if __name__ == "__main__":
    main()
