"""Ends of a job on PBS. Where there is no OpenPBS a stand-in sends what it sends, and when.

The stand-in gives 30 s from SIGTERM to SIGKILL (`kill_delay`). On a real OpenPBS, `qsub` and `qdel`
are used as they are there; what only the stand-in can do (cut a walltime, lose a node) is skipped.
"""

import os
import re
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from hpc_xvr.checkpoint import list_checkpoints, load
from support.pbs_standin import Pbs
from support.slurm_runs import FOREVER, Run, ranks_of, wait_for

pytestmark = pytest.mark.skipif(
    len(sys.prefix.split()) > 1,
    reason="by pbs_tmrsh, mpirun starts nothing in a folder with a space in its name",
)

OFTEN = [*FOREVER, "checkpoint.every=2"]


def real_pbs():
    """Is qsub OpenPBS's own, and not Debian's for Slurm?"""
    if not shutil.which("qsub"):
        return False
    said = subprocess.run(["qsub", "--version"], capture_output=True, text=True)
    return "pbs_version" in said.stdout + said.stderr


class RealPbs:
    environment = None  # this one

    def delete(self, job):
        subprocess.run(["qdel", job], check=True)

    def state(self, job):
        done = subprocess.run(["qstat", "-x", job], capture_output=True, text=True)
        return done.stdout.split()[-2]

    def close(self):
        pass

    def __getattr__(self, name):
        pytest.skip(f"{name}: only the stand-in can do that")


@pytest.fixture
def pbs(tmp_path):
    made = RealPbs() if real_pbs() else Pbs(tmp_path / "pbs")
    yield made
    made.close()


@pytest.fixture
def run(tmp_path, pulse_corpus, pbs):
    """submit(*options, overrides) sends a run of two ranks and returns the run; see its `jobs`."""
    made = Run(tmp_path / "run", pulse_corpus)

    def submit(*options, overrides=FOREVER, nodes=1):
        command = made.command(*options, site="pbs", overrides=overrides)
        command[command.index("--nodes") + 1] = str(nodes)
        command[command.index("train") : 0] = []
        command[command.index("train") : command.index("train")] = [
            "--ranks-per-node", str(2 // nodes), "--env", "XVR_BIND=none", "--env", "XVR_PAUSE=1",
            "--env", "XVR_LAUNCH=mpirun -n {ranks} {hosts} {binding} --oversubscribe",
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=pbs.environment
        )
        assert done.returncode == 0, done.stderr
        made.jobs = (made.folder / "jobs/train-1.jobs").read_text().split()
        return made

    return submit


def over(pbs, job, run):
    wait_for(f"the end of job {job}\n{run.log}", lambda: pbs.state(job) == "F")
    wait_for("the ranks' end", lambda: not ranks_of(run.folder))


def lost_nothing(run):
    """The newest checkpoint is of the last step that was done; that step."""
    step, path = list_checkpoints(run.folder / "checkpoints")[0]
    assert load(path)["step"] == step == run.metrics()[-1]["step"], run.log
    return step


def test_qdel_loses_no_step(pbs, run):
    run = run("--chain", "until-done")
    (job,) = run.jobs
    run.reaches(4)
    pbs.delete(job)
    over(pbs, job, run)
    step = lost_nothing(run)
    assert "TERM: asking the ranks for a checkpoint" in run.log
    assert f"not done, exit code 75, checkpoint of step {step}" in run.log
    assert "whoever sent it decides whether this job starts again" in run.log
    assert "goes on as job" not in run.log
    if isinstance(pbs, Pbs):
        said = (pbs.folder / "mom.log").read_text()
        assert pbs.exit_code(job) == 75
        assert int(re.search(r"deleted: SIGTERM to (\d+) processes", said)[1]) >= 4
        assert f"{job}: SIGKILL" not in said


def test_the_walltime_loses_no_step_and_the_next_job_goes_on_from_there(pbs, run):
    pbs.shorten(30)
    run = run("--chain", "2")
    first, second = run.jobs
    over(pbs, first, run)
    step = int(re.search(r"not done, exit code 75, checkpoint of step (\d+)", run.log)[1])
    assert "TERM: asking the ranks for a checkpoint" in run.log
    assert f"{first}: SIGKILL" not in (pbs.folder / "mom.log").read_text()
    wait_for("the next job", lambda: f"job {second}, start 2" in run.log)
    assert f"start 2, 1 node(s), from step {step}" in run.log
    run.reaches(step + 1)
    steps = [r["step"] for r in run.metrics()]
    assert steps == list(range(1, len(steps) + 1))
    records = {r["step"]: r["time"] for r in run.metrics()}
    assert max(s for s, t in records.items() if t < records[step + 1]) == step


def test_a_killed_rank_is_started_again_in_the_same_job(pbs, run):
    run = run("--chain", "until-done", overrides=OFTEN)
    run.reaches(4)
    os.kill(next(pid for pid, rank in ranks_of(run.folder).items() if rank == 1), signal.SIGKILL)
    wait_for("another launch", lambda: "launch 2 of start 1, 1 node(s), from step" in run.log)
    run.reaches(run.metrics()[-1]["step"] + 4)
    assert pbs.state(run.jobs[0]) == "R"


def test_no_rank_outlives_a_job_script_that_is_killed(pbs, run):
    run = run()
    run.reaches(1)
    (rank, *_) = ranks_of(run.folder)
    scripts = [
        p
        for p in psutil.Process(rank).parents()
        if p.cmdline()[-1:] == [str(run.folder / "jobs/train-1.pbs")]
    ]
    assert len(scripts) == 1
    scripts[0].kill()
    wait_for("the ranks' end", lambda: not ranks_of(run.folder))
