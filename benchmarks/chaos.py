"""A run on two ranks, killed at random moments and started again until it is done.

    python benchmarks/chaos.py                   50 kills, some 20 minutes; files its result
    python benchmarks/chaos.py --kills 12        each kind once, some 5 minutes on two idle cores
    python benchmarks/chaos.py --quick           as many as fit into 50 s, files nothing
    python benchmarks/chaos.py --seed 7 --json out.json

What is done to it, in random order: SIGKILL of a rank, of mpirun, of all at once, of the rank that
is writing a checkpoint; the disk is full in the middle of one; the newest checkpoint is cut or one
of its bits is flipped; the clock jumps by up to a day; the file system is slow. Under the job
script of hpc_xvr/submit: SIGTERM to all processes with 30 s of grace, after which no step may be
lost (`steps_lost_max`); SIGKILL of a rank, and a limit of memory, after which the ranks start again
in the same job (`restarts_in_allocation`). At the end its weights must be those of the undisturbed
run, bit for bit. Then 200 damaged or foreign files take the place of the newest checkpoint, one
after the other; a run on two nodes loses one; and 1,000 restarts are decided in simulated time.

As root the run lies on a small tmpfs that is really filled; else its rank 0 may suddenly write no
more than some kB a file (RLIMIT_FSIZE).
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import psutil
import torch

from damaged import corrupt
from filing import file_result, usage
from hpc_xvr import checkpoint, log
from hpc_xvr.config import load
from hpc_xvr.data.simulate.corpus import simulate_corpus
from hpc_xvr.submit.job import SCRIPTS
from hpc_xvr.train.meters import describe_machine
from simulated_restarts import simulate

ROOT = Path(__file__).resolve().parents[1]
PULSE = ROOT / "configs" / "pulse.yaml"
EVERY = 4  # steps between two checkpoints
SHIM = ROOT / "benchmarks" / "chaos_shim.c"
SCRIPTED = ("term", "allocation", "memory")  # what the job script answers
SHIMMED = ("clock", "slow disk")
KINDS = ("rank", "mpirun", "all", "writing", "cut", "flipped", "full disk", *SCRIPTED, *SHIMMED)
PLAIN = ("rank", "mpirun", "all", "writing", "allocation", *SHIMMED)
GRACE = 30.0  # seconds from SIGTERM to SIGKILL
PATIENCE = 600.0  # seconds until something that should have happened is a failure


class Job:
    """One start of the run under mpirun, and all processes that come of it."""

    def __init__(
        self, run: Path, corpus: Path, steps: int, log_file: Path, shim: Shim | None = None
    ) -> None:
        self.run, self.log = run, log_file
        self.began = time.time()
        self._mark = f"chaos-{uuid.uuid4().hex}"  # in the environment of every descendant
        train = ["train", str(PULSE), "--resume"]
        for text in (
            f"run.dir={run}",
            f"data.corpus={corpus}",
            "run.threads=1",
            "run.device=cpu",
            f"train.steps={steps}",
            f"checkpoint.every={EVERY}",
            "validation.every=20",
            "model.drop_path=0.3",
        ):
            train += ["--set", text]
        self._output = log_file.open("w")
        self.process = subprocess.Popen(
            self._command(train, steps),
            cwd=ROOT,
            stdout=self._output,
            stderr=self._output,
            env={**os.environ, "HPC_XVR_CHAOS": self._mark, **(shim.environment if shim else {})},
            start_new_session=True,
        )
        atexit.register(lambda: self.kill(list(self.processes())))  # nothing outlives us

    def _command(self, train: list[str], steps: int) -> list[str]:
        start = ["mpirun", "-n", "2", "--oversubscribe", sys.executable, "-m", "hpc_xvr"]
        return [*start, *train]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All that are alive and carry this job's mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.environ().get("HPC_XVR_CHAOS") == self._mark:
                    found.append(process)
        return found

    def rank(self, number: int) -> psutil.Process | None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("OMPI_COMM_WORLD_RANK") == str(number):
                    return process
        return None

    def wait_until(self, condition: Any, what: str) -> bool:
        """False where the job ended before."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                self.end()
                raise SystemExit(f"waited {PATIENCE:.0f} s for {what}\n{self.text()[-2000:]}")
            time.sleep(0.005)
        return True

    def kill(self, processes: list[psutil.Process | None]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                if process:
                    process.send_signal(signal.SIGKILL)

    def end(self) -> int:
        """Wait for everything to be gone; kill what is not, and say how many that were."""
        end = time.monotonic() + 30
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        self.kill(list(left))
        self.process.wait()
        self._output.close()
        return len(left)


# A scheduler's part of the job script, for one machine that plays the nodes.
SCRIPT = """
set -uo pipefail
xvr_job=1 xvr_nodes={nodes} xvr_default_site={folder}/site.env xvr_hosts=""
xvr_again() {{ :; }}
xvr_cancel() {{ :; }}
xvr_answering() {{ [ ! -e {folder}/answering ] || cat {folder}/answering; }}
xvr_only() {{ :; }}
xvr_left() {{ :; }}
source {scripts}/job.sh
xvr_main --run {run} --steps {steps} --folder {folder} --name job --venv {venv} "$@"
"""
SITE = """
XVR_RANKS_PER_NODE={ranks}
XVR_LAUNCH='mpirun -n {{ranks}} --oversubscribe --bind-to none {{hosts}}'
XVR_PAUSE=1
"""


class ScriptedJob(Job):
    """The same, started by the job script of hpc_xvr/submit, on so many nodes."""

    nodes = 1

    def _command(self, train: list[str], steps: int) -> list[str]:
        self.folder = self.log.with_suffix(".job")
        self.folder.mkdir()
        (self.folder / "site.env").write_text(SITE.format(ranks=2 // self.nodes))
        text = SCRIPT.format(
            nodes=self.nodes,
            folder=self.folder,
            scripts=SCRIPTS,
            run=self.run,
            steps=steps,
            venv=sys.prefix,
        )
        return ["bash", "-c", text, "job", *train]

    def trains_again(self) -> bool:
        """Has the job script started the ranks once more, and do they train?"""
        return self.text().count("steps an epoch") > 1 and "launch 2 of" in self.text()

    def term(self) -> None:
        """SIGTERM to all processes, as a scheduler sends it."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGTERM)


class TwoNodeJob(ScriptedJob):
    """One rank on each of two nodes."""

    nodes = 2

    def lose_node(self) -> None:
        """Nothing answers there any more, and its rank is gone."""
        (self.folder / "answering").write_text("node1\n")
        self.kill([self.rank(1)])


class Shim:
    """A library that shifts the clock and slows the disk of a job; None without a C compiler."""

    def __init__(self, folder: Path) -> None:
        self._control = folder / "control"
        library = folder / "shim.so"
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SHIM), "-ldl"]
        self.built = bool(shutil.which("cc")) and subprocess.run(command).returncode == 0
        self.set(0, 0)
        self.environment = {"LD_PRELOAD": str(library), "CHAOS_CONTROL": str(self._control)}

    def set(self, clock: int, delay: float) -> None:
        """Seconds that the clock is off, and that each access to a file takes longer."""
        with self._control.open("r+b" if self._control.exists() else "wb") as file:
            file.write(struct.pack("qq", clock, round(1e6 * delay)))


class Chaos:
    """The disturbed run: what was done to it and what came of it."""

    def __init__(self, run: Path, corpus: Path, steps: int, logs: Path, rng: random.Random) -> None:
        self.run, self.corpus, self.steps, self.logs, self.rng = run, corpus, steps, logs, rng
        self.kills, self.orphans, self.leftovers, self.tracebacks = 0, 0, 0, 0
        self.damaged_loaded, self.restarts, self.died, self.overran = 0, 0, 0, 0
        self.lost: list[int] = []  # steps that are in no checkpoint after a SIGTERM
        self.shim = Shim(logs)
        self.repeated: dict[str, list[int]] = {kind: [] for kind in KINDS}
        self._numbers = itertools.count()

    def start(self, kind: str | None = None) -> Job:
        make = ScriptedJob if kind in SCRIPTED else Job
        log_file = self.logs / f"{next(self._numbers)}.log"
        self.shim.set(0, 0)
        shim = self.shim if kind in SHIMMED else None
        return make(self.run, self.corpus, self.steps, log_file, shim)

    def disturb(self, kind: str) -> bool:
        """Start, do `kind` to it at a random step. False: it was done before."""
        job = self.start(kind)
        before, resumed = self._follow(job)
        if before is None:
            self.orphans += job.end()
            return False
        self._count_leftovers(job)
        target = before + self.rng.randint(1, 2 * EVERY)
        alive = job.wait_until(lambda: reached(self.run) >= target, f"step {target}")
        damage = None
        if alive:
            damage = self._strike(job, kind)
        at = reached(self.run)
        self.orphans += job.end()
        if not alive:
            return False
        self.kills += 1
        self._last = (kind, at)
        if damage:
            damage()  # forgets `_last` where there was nothing to damage
        print(f"kill {self.kills}: {kind}, started at step {resumed}, ended at {at}", flush=True)
        return True

    def finish(self) -> int:
        """Undisturbed to the end; the exit code."""
        job = self.start()
        self._follow(job)
        self._count_leftovers(job)
        job.wait_until(lambda: False, "the end")
        self.orphans += job.end()
        self.leftovers += len(list(self.run.rglob(".*.partial*")))
        return job.process.returncode

    _last: tuple[str, int] | None = None

    def _follow(self, job: Job) -> tuple[int | None, int]:
        """Wait for the first step of a start; its number (None: ended before) and the step that
        the start resumed from."""
        old = metrics_size(self.run)

        def trains() -> bool:
            return "steps an epoch" in job.text() and metrics_size(self.run) != old

        alive = job.wait_until(trains, "the first step")
        match = re.search(r"resuming from \S+ \(step (\d+)\)", job.text())
        resumed = int(match[1]) if match else 0
        if self._last:
            kind, at = self._last
            self.repeated[kind].append(max(0, at - resumed))
            if kind in ("cut", "flipped") and "skipped: checkpoint" not in job.text():
                self.damaged_loaded += 1
            self._last = None
        self.tracebacks += "Traceback" in job.text() and "hpc_xvr" in job.text()
        return (reached(self.run) if alive else None), resumed

    def _count_leftovers(self, job: Job) -> None:
        for path in self.run.rglob(".*.partial*"):
            with contextlib.suppress(FileNotFoundError):
                self.leftovers += path.stat().st_mtime < job.began

    def _strike(self, job: Job, kind: str) -> Any:
        """Kill; returns what has to be done to the files once everything is gone."""
        if kind == "full disk":
            return self._fill(job)
        if kind == "term":
            return self._term(job)
        if kind in SCRIPTED:
            return self._start_again(job, kind)
        if kind in SHIMMED:
            return self._bear(job, kind)
        if kind == "writing":
            checkpoints = self.run / "checkpoints"
            job.wait_until(
                lambda: any(".partial" in n for n in os.listdir(checkpoints)),  # noqa: PTH208
                "a checkpoint being written",
            )
            job.kill([job.rank(0)])
        elif kind == "rank":
            job.kill([job.rank(self.rng.randrange(2))])
        elif kind == "mpirun":
            job.kill([psutil.Process(job.process.pid)])
        else:
            job.kill(list(job.processes()))
        return {"cut": self._cut, "flipped": self._flip}.get(kind)

    def _term(self, job: Any) -> None:
        """SIGTERM, and 30 s later SIGKILL."""
        job.term()
        end = time.monotonic() + GRACE
        while job.process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        self.overran += job.process.poll() is None
        job.kill(list(job.processes()))
        saved = checkpoint.list_checkpoints(self.run / "checkpoints")
        self.lost.append(reached(self.run) - (saved[0][0] if saved else 0))

    def _start_again(self, job: Any, kind: str) -> None:
        """A rank is lost: the job script starts all again."""
        if kind == "memory":
            for rank in (0, 1):
                process = job.rank(rank)
                if process:
                    used = process.memory_info().vms
                    resource.prlimit(process.pid, resource.RLIMIT_AS, (used, used))
        else:
            job.kill([job.rank(self.rng.randrange(2))])
        # It may get along with the memory it has.
        target = reached(self.run) + 10 * EVERY
        enough = lambda: kind == "memory" and reached(self.run) >= target  # noqa: E731
        job.wait_until(lambda: job.trains_again() or enough(), "another launch")
        self.restarts += job.trains_again()
        job.kill(list(job.processes()))

    def _bear(self, job: Job, kind: str) -> None:
        """It must go on, whatever the clock says and however slow the disk is."""
        day = 86400
        clock = self.rng.choice((-1, 1)) * self.rng.randint(60, day) if kind == "clock" else 0
        self.shim.set(clock, 0 if kind == "clock" else self.rng.uniform(0.05, 0.3))
        target = min(reached(self.run) + 2 * EVERY, self.steps)
        alive = job.wait_until(lambda: reached(self.run) >= target, "steps in spite of it")
        self.died += not alive and target < self.steps
        job.kill(list(job.processes()))

    def _fill(self, job: Job) -> Any:
        """No more room for a whole checkpoint: training must go on for a while, then end by itself,
        or be killed."""
        filler = self.run / "filler"
        if self.run.is_mount():
            size = max(path.stat().st_size for path in self.run.glob("checkpoints/step-*.pt"))
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            with contextlib.suppress(OSError):  # the next one breaks off in its middle
                os.truncate(filler, filler.stat().st_size - self.rng.randrange(size // 8, size))
        else:
            rank = job.rank(0)
            if rank:
                resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        job.wait_until(lambda: "training goes on" in job.text(), "a checkpoint that fails")
        if self.rng.random() < 0.5:
            job.kill(list(job.processes()))
        else:
            job.wait_until(lambda: False, "the end after three failures")
        return lambda: filler.unlink(missing_ok=True)

    def _cut(self) -> None:
        path = self._victim()
        if path:
            os.truncate(path, self.rng.randrange(path.stat().st_size))

    def _flip(self) -> None:
        path = self._victim()
        if path:
            data = bytearray(path.read_bytes())
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            path.write_bytes(data)

    def _victim(self) -> Path | None:
        """The newest checkpoint, if there is another one to go back to."""
        found = checkpoint.list_checkpoints(self.run / "checkpoints")
        if len(found) < 2:
            self._last = None
            return None
        return found[0][1]


def metrics_size(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def reached(run: Path) -> int:
    """The last step in metrics.jsonl."""
    step = 0
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines()[-20:] if path.exists() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            step = record["step"] if record["kind"] == "train" else step
    return step


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def same(a: Any, b: Any) -> bool:
    """Equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[bool]:
    """A tmpfs of that size at `path`, where this user may mount one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "chaos", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=False)


def lose_a_node(base: Path, corpus: Path) -> dict[str, int]:
    """A run of its own on two nodes, one of which is lost: it ends on the other one."""
    run, steps = base / "node", 6 * EVERY
    job = TwoNodeJob(run, corpus, steps, base / "node.log")
    job.wait_until(lambda: reached(run) > EVERY, "the first checkpoint")
    job.lose_node()
    job.wait_until(job.trains_again, "another launch")
    match = re.search(r"launch 2 of start 1, 1 node\(s\), from step (\d+)", job.text())
    lost = [step for step, _ in losses(run)]
    job.wait_until(lambda: False, "the end on one node")
    job.end()
    done = [step for step, _ in losses(run)]
    return {
        "node_loss_finished": int(job.process.returncode == 0 and done == [*range(1, steps + 1)]),
        "node_loss_steps_repeated": max(lost) - int(match[1]) if match and lost else -1,
    }


def measure(
    kills: int, seconds: float, seed: int, corpus: Path | None, quick: bool = False
) -> dict[str, Any]:
    """At most `kills`, as many as fit into `seconds`."""
    begin = time.monotonic()
    rng = random.Random(seed)
    print(f"seed {seed}", flush=True)
    base = Path(tempfile.mkdtemp(prefix="chaos-"))
    with small_disk(base / "run", 40) as mounted:
        if corpus is None:
            corpus = base / "corpus"
            simulate_corpus(load(PULSE).simulate, corpus)
        steps = EVERY * (2 * kills + 8)  # a kill costs about half of what a start gains
        whole = Job(base / "whole", corpus, steps, base / "whole.log")
        whole.wait_until(lambda: False, "the undisturbed run")
        whole.end()
        if whole.process.returncode != 0:
            raise SystemExit(whole.text())
        chaos = Chaos(base / "run", corpus, steps, base, rng)
        kinds = list(KINDS)
        for i in range(kills):
            if i % len(kinds) == 0:
                rng.shuffle(kinds)
            if chaos.kills and time.monotonic() - begin > seconds:
                break
            kind = kinds[i % len(kinds)]
            if kind in SHIMMED and not chaos.shim.built:
                continue
            if not chaos.disturb(kind):
                break
        code = chaos.finish()
        runs = [base / "whole", base / "run"]
        a, b = (checkpoint.load(checkpoint.path_of(r / "checkpoints", steps)) for r in runs)
        repeated = chaos.repeated
        more = {} if quick else lose_a_node(base, corpus)
        (base / "simulated").mkdir()
        result = {
            "kills": chaos.kills,
            "starts": chaos.kills + 1,
            "steps": steps,
            "checkpoint_every": EVERY,
            "exit_code": code,
            "weights_bitwise_equal": int(
                all(same(a[k], b[k]) for k in ("model", "ema", "optimizer", "step"))
            ),
            "losses_equal": int(losses(runs[0]) == losses(runs[1])),
            "done_marker": int((base / "run" / "done.json").exists()),
            "max_steps_repeated": max((n for k in PLAIN for n in repeated[k]), default=0),
            "max_steps_repeated_after_damage": max(
                (n for k in ("cut", "flipped") for n in repeated[k]), default=0
            ),
            "max_steps_repeated_after_full_disk": max(repeated["full disk"], default=0),
            "damaged_loaded": chaos.damaged_loaded,
            "steps_lost_max": max(chaos.lost, default=0),
            "restarts_in_allocation": chaos.restarts,
            "overran_grace": chaos.overran,
            "died_of_clock_or_slow_disk": chaos.died,
            **more,
            **simulate(base / "simulated", 1000, rng),
            "orphans": chaos.orphans,
            "leftovers": chaos.leftovers,
            "tracebacks_at_start": chaos.tracebacks,
            "real_full_disk": int(mounted),
            **{f"kills[{kind}]": len(repeated[kind]) for kind in KINDS},
            **corrupt(base / "whole", 200, rng),
        }
    result["seconds"] = round(time.monotonic() - begin, 1)
    shutil.rmtree(base, ignore_errors=True)
    return result


@click.command(help=usage(__doc__))
@click.option("--quick", is_flag=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.option("--kills", type=click.IntRange(1), help="At most. Default: 50, quick 3.")
@click.option("--seed", type=int, help="Repeats a run. Default: another one each time.")
@click.option("--corpus", type=click.Path(path_type=Path), help="Of configs/pulse.yaml.")
def main(
    quick: bool, out: Path | None, kills: int | None, seed: int | None, corpus: Path | None
) -> None:
    log.setup()
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    result = measure(kills or (3 if quick else 50), 20 if quick else 3600, seed, corpus, quick)
    rows = [(name, str(value)) for name, value in result.items() if "[" not in name]
    log.print_table("killed and started again", ["figure", "value"], rows)
    context = describe_machine(torch.device("cpu")) | {"platform": platform.platform()}
    context["seed"] = seed
    file_result("chaos", result, context, out, quick)
    sound = result["weights_bitwise_equal"] and not result["steps_lost_max"]
    if not (sound and result["exit_code"] == 0):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
