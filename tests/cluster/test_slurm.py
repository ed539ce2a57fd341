"""What happens to a run at night: warnings, time limits, cancelled jobs, ranks that die."""

import datetime
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import tifffile

from hpc_xvr.checkpoint import list_checkpoints, load
from hpc_xvr.data.corpus import Corpus
from support.paths import PULSE, ROOT
from support.slurm_runs import FOREVER, about, lose_node, ranks_of, state_of, wait_for


def test_two_nodes_run_to_the_end_and_the_dry_run_is_the_script(whole):
    assert json.loads((whole.folder / "done.json").read_text())["step"] == 12
    assert "2 rank(s)" in whole.log
    assert "done at step 12" in whole.log
    assert [step for step, *_ in whole.curve()] == list(range(1, 13))
    assert about(whole.jobs[0])["NumNodes"] == "2"
    assert whole.printed == (whole.folder / "jobs/train-1.sbatch").read_text()


def test_a_warning_means_checkpoint_requeue_resume_and_the_same_losses(run, whole):
    job = run.submit("--chain", "until-done")
    run.reaches(3)
    run.warn(job)
    again = subprocess.run(run.command(), capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 2
    assert "already used; add --resume" in again.stderr
    again = subprocess.run([*run.command(), "--resume"], capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 2
    assert f"job {job} of {run.folder} waits or runs" in again.stderr
    assert run.ends(job, "COMPLETED")["Restarts"] == "1"
    assert run.curve() == whole.curve()
    assert [r["psnr"] for r in run.metrics("validation")] == [
        r["psnr"] for r in whole.metrics("validation")
    ]
    assert "start 1, 2 node(s), from step 0" in run.log  # both in one log

    stopped = int(re.search(r"checkpoint of step (\d+)", run.log)[1])
    assert f"start 2, 2 node(s), from step {stopped}" in run.log
    asked = re.search(r"== (\S+ \S+) USR1: asking", run.log)[1]
    # From the batch script to the ranks a signal needs a moment.
    asked = datetime.datetime.strptime(asked, "%Y-%m-%d %H:%M:%S.%f").timestamp() + 0.1
    after = [r["step"] for r in run.metrics() if r["step"] <= stopped and r["time"] > asked]
    assert len(after) <= 2, (stopped, after, asked)
    assert load(list_checkpoints(run.folder / "checkpoints")[-1][1])["step"] == stopped


def test_the_script_by_hand_evaluates_on_two_nodes(whole):
    """A warning is for runs that can save something; `evaluate` goes on to its end."""
    path = whole.folder / "by-hand.log"
    command = ["sbatch", "--parsable", "--nodes=2", "--time=30", f"--output={path}"]
    command += ["jobs/slurm/train.sbatch", "--venv", sys.prefix, "evaluate", str(whole.folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    wait_for("the job's mpirun", lambda: path.exists() and "mpirun -n 2" in path.read_text())
    whole.warn(job)
    whole.ends(job, "COMPLETED")
    log = path.read_text(errors="replace")
    assert "USR1: the time is nearly up, and there is nothing to save" in log
    assert "evaluate ended with exit code 0" in log
    assert list((whole.folder / "evaluation").iterdir())


def test_a_chain_stops_once_the_run_is_done(whole):
    first, second = whole.jobs
    assert whole.waits_for.startswith(f"afterany:{first}")
    whole.ends(second, "CANCELLED")
    assert "start 2" not in whole.log


def test_the_time_limit_is_never_reached_and_the_next_job_of_the_chain_goes_on(run):
    """Slurm itself sends the warning."""
    run.submit("--time", "2", "--margin", "100", "--chain", "2", overrides=FOREVER)
    first, second = run.jobs
    assert run.ends(first, "FAILED")["ExitCode"] == "75:0"
    assert "USR1: asking the ranks for a checkpoint" in run.log
    assert "the next job of the chain goes on" in run.log
    ((step, path),) = list_checkpoints(run.folder / "checkpoints")
    assert load(path)["step"] == step == run.metrics()[-1]["step"]
    started = f"job {second}, start 2, 2 node(s), from step {step}"
    wait_for("the second job", lambda: started in run.log)


def test_a_cancelled_job_loses_no_step_and_leaves_no_rank_behind(run):
    """scancel: SIGTERM to all processes on all nodes, and 30 s later SIGKILL (KillWait)."""
    job = run.submit("--chain", "until-done", overrides=FOREVER)
    run.reaches(4)
    subprocess.run(["scancel", job], check=True)
    run.ends(job, "CANCELLED")
    wait_for("the ranks' end", lambda: not ranks_of(run.folder))
    assert "TERM: asking the ranks for a checkpoint" in run.log
    ((step, path),) = list_checkpoints(run.folder / "checkpoints")
    assert load(path)["step"] == step == run.metrics()[-1]["step"]
    if len(sys.prefix.split()) == 1:  # else the job says that mpirun is not shielded
        assert f"checkpoint of step {step}" in run.log


def kill_rank(run, number):
    pid = next(pid for pid, rank in ranks_of(run.folder).items() if rank == number)
    os.kill(pid, signal.SIGKILL)


def test_a_rank_that_dies_is_started_again_in_the_same_job(run):
    job = run.submit("--chain", "until-done", overrides=[*FOREVER, "checkpoint.every=2"])
    run.reaches(4)
    kill_rank(run, 1)
    wait_for("another launch", lambda: "launch 2 of start 1, 2 node(s), from step" in run.log)
    step = int(re.search(r"launch 2 of .* from step (\d+)", run.log)[1])
    assert step >= 2
    run.reaches(step + 20)
    assert about(job)["Restarts"] == "0"


def test_a_rank_that_dies_at_once_is_not_tried_for_ever(run):
    job = run.submit(
        "--chain", "until-done", "--env", "XVR_MAX_LAUNCHES=0", "--env", "XVR_PAUSE=1",
        overrides=FOREVER,
    )  # fmt: skip
    for start in range(1, 6):
        wait_for("a start", lambda n=start: f"start {n}, 2 node(s), from step 0" in run.log)
        wait_for(
            "its steps",
            lambda n=start: run.log.count("steps an epoch") == n and ranks_of(run.folder),
        )
        kill_rank(run, 1)
    run.ends(job, "FAILED")
    assert "5 launches in a row came no further than 0" in run.log
    wait_for("the other rank's end", lambda: not ranks_of(run.folder))


def test_a_node_that_is_lost_costs_its_ranks_and_not_the_job(run):
    """The global batch stays; Slurm sees it 30 s later (SlurmdTimeout) and spares the job, too."""
    job = run.submit("--chain", "until-done", overrides=[*FOREVER, "checkpoint.every=2"])
    run.reaches(4)
    lose_node("node2")
    try:
        wait_for("another launch", lambda: "launch 2 of start 1, 1 node(s), from step" in run.log)
        assert "1 of 2 node(s) do not answer; these do: node1" in run.log
        wait_for("Slurm's notice", lambda: state_of("node2") in ("down", "down*"))
        assert about(job)["JobState"] == "RUNNING"
        run.reaches(run.metrics()[-1]["step"] + 4)
        assert "= 1 rank(s) x 1 micro-batch(es) x 4 sample(s)" in run.log
        steps = [r["step"] for r in run.metrics()]
        assert steps == list(range(1, len(steps) + 1))
    finally:
        run.cancel()
        subprocess.run(["slurmd", "-N", "node2"], check=True)
        wait_for("the node's return", lambda: state_of("node2") == "idle")


def test_two_nodes_simulate_a_corpus_and_read_camera_files_together(tmp_path):
    """simulate and ingest share their work among ranks, too."""
    frames = np.random.default_rng(1).integers(0, 60_000, (2, 9, 64, 64), np.uint16)
    for name, stack in zip(("a", "b"), frames, strict=True):
        tifffile.imwrite(tmp_path / f"{name}.tif", stack, photometric="minisblack")
    for command in (
        ["simulate", str(PULSE), "--set", "data.corpus=simulated"],
        ["ingest", "a.tif", "b.tif", "--corpus", "ingested"],
    ):
        sent = ["hpc-xvr", "submit", "--site", "slurm", "--nodes", "2", "--time", "5", *command]
        done = subprocess.run(sent, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        log = tmp_path / f"runs/jobs/{command[0]}-1.log"
        ended = f"{command[0]} ended with exit code "
        wait_for(ended, lambda p=log, e=ended: p.exists() and e in p.read_text(errors="replace"))
        said = log.read_text(errors="replace")
        assert f"{ended}0" in said and "mpirun -n 2" in said, said
    assert len(Corpus(tmp_path / "simulated").videos) == 6
    assert len(Corpus(tmp_path / "ingested").videos) == 2


@pytest.fixture
def size_of_world(tmp_path):
    """A script that starts as many ranks as its second argument says and writes how many met."""
    script = tmp_path / "size.py"
    script.write_text(
        "import os, subprocess, sys\nfrom pathlib import Path\n"
        "command = [*os.environ['XVR_MPIRUN'].split(), '-n', sys.argv[2]]\n"
        "program = 'from mpi4py.MPI import COMM_WORLD as w; print(w.size if w.rank == 0 else 0)'\n"
        "done = subprocess.run([*command, sys.executable, '-c', program], capture_output=True)\n"
        "Path(sys.argv[1]).write_text(str(max(map(int, done.stdout.split()))))\n"
    )
    return script


def test_scaling_is_a_job_for_each_number_of_nodes(size_of_world, tmp_path):
    command = ["hpc-xvr", "submit", "--site", "slurm", "--nodes", "1,2", "--time", "1"]
    done = subprocess.run(
        [*command, str(size_of_world), "ranks-{nodes}.txt", "{nodes}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for nodes in ("1", "2"):
        written = tmp_path / f"ranks-{nodes}.txt"
        wait_for(f"the job of {nodes} node(s)", lambda p=written: p.exists() and p.read_text())
        assert written.read_text() == nodes


def test_scaling_as_an_array(size_of_world, tmp_path):
    command = ["sbatch", "--wait", "--array=1-2", "--nodes=2", "--time=1"]
    command += [f"--output={tmp_path}/array-%a.log", "jobs/slurm/train.sbatch"]
    command += ["--venv", sys.prefix, "--folder", str(tmp_path), str(size_of_world)]
    command += [f"{tmp_path}/task-{{task}}.txt", "{task}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    logs = "".join(p.read_text(errors="replace") for p in tmp_path.glob("array-*.log"))
    assert done.returncode == 0, done.stderr + logs
    assert [(tmp_path / f"task-{n}.txt").read_text() for n in (1, 2)] == ["1", "2"]


def test_a_pbs_job_stops_by_its_own_clock_and_sends_itself_again(run):
    """Through Debian's qsub, which runs #PBS scripts on Slurm."""
    options = ["--chain", "until-done", "--margin", "282", "--env", "XVR_MAX_STARTS=2"]
    first = run.submit(*options, site="pbs", overrides=FOREVER)
    run.ends(first, "FAILED")
    second = re.search(r"goes on as job (\d+)", run.log)[1]
    run.jobs.append(second)
    run.ends(second, "FAILED")
    third = re.findall(r"goes on as job (\d+)", run.log)[-1]
    run.jobs.append(third)
    run.ends(third, "FAILED")
    assert run.log.count("max-time is nearly over") == 2, run.log
    assert "this would be start 3; XVR_MAX_STARTS is 2" in run.log
    steps = [r["step"] for r in run.metrics()]
    assert steps == list(range(1, len(steps) + 1))
    stops = [int(step) for step in re.findall(r"checkpoint of step (\d+)", run.log)]
    assert 0 < stops[0] < stops[1] == steps[-1]
    assert (run.folder / "jobs/train-1.pbs").read_text().startswith("#!/usr/bin/env bash\n#PBS ")
    assert str(ROOT) in run.log
