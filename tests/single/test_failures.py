"""A rank that is killed, stopped or hangs ends the whole job, soon, and is named with its step."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = ["mpirun", "-n", "2", "--oversubscribe"]
LIMIT = 3  # dist.timeout_s

# `hpc-xvr` with a rank that meets its fate in the forward pass of its fourth step.
FATE = """
import os, signal, sys
import hpc_xvr.train.task as task
from mpi4py import MPI
real, calls = task._LOSSES["l1"], [0]
def l1(output, target):
    calls[0] += 1
    if calls[0] == 4 and MPI.COMM_WORLD.Get_rank() == {rank}:
        print("fate of process", os.getpid(), file=sys.stderr, flush=True)
        {fate}
    return real(output, target)
task._LOSSES["l1"] = l1
from hpc_xvr.cli import main
main()
"""
FATES = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "hanging": "import time; time.sleep(600)",
}


def run(engine, fate, rank, corpus, folder):
    """The job's stderr, how long it lived after its rank met its fate, and that rank's process."""
    command = [*MPIRUN, sys.executable, "-c", FATE.format(fate=FATES[fate], rank=rank)]
    command += ["train", str(ROOT / "configs/pulse.yaml"), "--engine", engine]
    for text in (
        f"run.dir={folder}/run",
        f"data.corpus={corpus}",
        "run.threads=1",
        "train.steps=500",
        "validation.every=500",
        "checkpoint.every=500",
        f"dist.timeout_s={LIMIT}",
    ):
        command += ["--set", text]
    job = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    lines, met, process = [], None, None
    for line in job.stderr:  # mpirun itself does not end before its ranks
        lines.append(line)
        if line.startswith("fate of process"):
            met, process = time.monotonic(), int(line.split()[-1])
    assert job.wait(timeout=20) != 0
    assert met, "".join(lines)
    return "".join(lines), time.monotonic() - met, process


def gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return "zombie" in Path(f"/proc/{process}/status").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "fate", "message"),
    [
        ("horovod", "killed", "rank 1 (process {pid} on {host}) died in step 4 ("),
        ("torch", "killed", "rank 1 (process {pid} on {host}) died in step 4 ("),
        ("horovod", "stopped", "has given no sign of life for 3 s; it was in step {step} ("),
        ("torch", "stopped", "has given no sign of life for 3 s; it was in step {step} ("),
        ("torch", "hanging", "the others wait for rank 1 (process {pid} on {host}) in step 4 ("),
    ],
)
def test_a_lost_rank_ends_the_job_and_is_named(engine, fate, message, pulse_corpus, tmp_path):
    log, seconds, process = run(engine, fate, 1, pulse_corpus, tmp_path)
    # What is told of a stopped rank may be a moment old.
    said = [message.format(pid=process, host=os.uname().nodename, step=step) for step in (3, 4)]
    assert any(text in log for text in said[fate != "stopped" :]), log
    told = [line for line in log.splitlines() if "hpc-xvr: error:" in line]
    assert len(told) == 1, log
    assert "Traceback" not in log, log
    assert seconds < (LIMIT if fate in ("stopped", "hanging") else 0) + 5
    if not gone(process):
        time.sleep(1)
    assert gone(process)


@pytest.mark.slow
def test_the_others_notice_that_rank_0_is_lost(pulse_corpus, tmp_path):
    log, seconds, process = run("horovod", "stopped", 0, pulse_corpus, tmp_path)
    assert "[rank 1] rank 0 has given no sign of life for 3 s, about when" in log, log
    assert re.search("this rank was in step [34]", log), log
    assert seconds < LIMIT + 5
    if not gone(process):
        time.sleep(1)
    assert gone(process)
