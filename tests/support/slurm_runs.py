"""A training run sent to Slurm, and looking at what becomes of it."""

import contextlib
import json
import re
import subprocess
import time
from pathlib import Path

import psutil

from support.paths import PULSE

PATIENCE = 150  # seconds for anything to happen on a busy machine

# Steps of some tenths of a second: long against the way of a signal through the cluster.
SMALL = ("train.steps=12", "train.global_batch=8", "data.patch=64", "validation.frames=2")
SMALL += ("validation.every=1000", "checkpoint.every=1000")
FOREVER = ("train.steps=1000000", "data.patch=32", "train.global_batch=4")
FOREVER += ("validation.every=1000000", "checkpoint.every=1000000")


def wait_for(what, condition):
    """Look until `condition()` is true, and return what it said."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if answer := condition():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"waited {PATIENCE} s for {what}")


def about(job):
    """What Slurm says of a job: {'JobState': 'RUNNING', ...}."""
    done = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True)
    return dict(re.findall(r"(\S+?)=(\S*)", done.stdout))


class Run:
    """A training run sent by `hpc-xvr submit`."""

    def __init__(self, folder, corpus):
        self.folder, self.corpus, self.jobs = folder, corpus, []

    def command(self, *options, site="slurm", overrides=()):
        out = ["hpc-xvr", "submit", "--site", site, "--nodes", "2", "--time", "5"]
        out += [*options, "train", str(PULSE)]
        sets = [f"run.dir={self.folder}", f"data.corpus={self.corpus}", "run.threads=1"]
        for text in [*sets, *SMALL, *overrides]:
            out += ["--set", text]
        return out

    def submit(self, *options, **more):
        done = subprocess.run(
            self.command(*options, **more), capture_output=True, text=True, cwd=self.folder.parent
        )
        assert done.returncode == 0, done.stderr
        self.jobs += re.split(", |: ", done.stdout)[: done.stdout.partition(":")[0].count(",") + 1]
        return self.jobs[-1]

    @property
    def log(self):
        paths = sorted(self.folder.glob("jobs/*.log"))
        return "".join(p.read_text(errors="replace") for p in paths)

    def metrics(self, kind="train"):
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [r for r in records if r["kind"] == kind]

    def curve(self):
        return [(r["step"], r["loss"], r["grad_norm"]) for r in self.metrics()]

    def reaches(self, step):
        wait_for(
            f"step {step} in {self.folder}\n{self.log}",
            lambda: any(r["step"] >= step for r in self.metrics()),
        )

    def ends(self, job, *states):
        """Wait for the job's end and check its state; what Slurm says of it."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(f"the end of job {job}", lambda: about(job)["JobState"] in over)
        said = about(job)
        assert said["JobState"] in states, f"{said}\n{self.log}"
        return said

    def warn(self, job):
        subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)

    def cancel(self):
        for job in self.jobs:
            subprocess.run(["scancel", "-Q", job])


def ranks_of(folder):
    """Processes of a run that are alive: pid -> rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().decode().split("\0")
            environment = (path / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        rank = next((v[21:] for v in environment if v.startswith("OMPI_COMM_WORLD_RANK=")), None)
        if f"run.dir={folder}" in line and rank is not None:
            found[int(path.name)] = int(rank)
    return found


def state_of(node):
    """What Slurm says of a node: idle, mix, alloc, down*, ..."""
    done = subprocess.run(["sinfo", "-h", "-n", node, "-o", "%t"], capture_output=True, text=True)
    return done.stdout.strip()


def lose_node(name):
    """End a node's daemon and everything that runs there, at once."""
    daemon = int(Path(f"/tmp/hpc_xvr-slurm/run/{name}.pid").read_text())
    doomed = {process.pid: process for process in psutil.Process(daemon).children(recursive=True)}
    for process in psutil.process_iter(["name", "environ"]):  # a step's daemon is nobody's child
        mine = (process.info["environ"] or {}).get("SLURMD_NODENAME") == name
        if mine or (process.info["name"] == "slurmstepd" and _step_of(process, name)):
            doomed[process.pid] = process
    psutil.Process(daemon).kill()
    for process in doomed.values():
        with contextlib.suppress(psutil.Error):
            process.kill()


def _step_of(process, name):
    return any(
        (child.environ() if child.is_running() else {}).get("SLURMD_NODENAME") == name
        for child in process.children(recursive=True)
    )
