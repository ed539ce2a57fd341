"""Sending jobs: what the scheduler is told, and what it says of jobs that were sent before."""

from __future__ import annotations

import subprocess

from hpc_xvr.errors import InputError
from hpc_xvr.submit.job import Job, render


def waiting_or_running(job: Job) -> str | None:
    """A job that was sent before for the same run and has not ended."""
    for path in sorted(job.folder.glob("*.jobs")):
        for number in path.read_text().split():
            if job.site.scheduler == "slurm":
                command = ["squeue", "-h", "-o", "%t", "-j", number]
            else:
                command = ["qstat", number]
            try:
                said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            except FileNotFoundError:
                return None
            words = said.split()
            if words and (job.site.scheduler == "slurm" or words[-2] not in "CFX"):
                return number
    return None


def send(job: Job, chain: int = 1) -> list[str]:
    """Write the script, hand it to the scheduler `chain` times, each job after the one before.

    Returns:
        The scheduler's job numbers.

    Raises:
        InputError: there is no scheduler here, or it refuses; in its own words.
    """
    slurm = job.site.scheduler == "slurm"
    if job.run and (other := waiting_or_running(job)):
        raise InputError(
            f"job {other} of {job.run} waits or runs; two at once would spoil the run: let it end, "
            f"or {'scancel' if slurm else 'qdel'} {other}"
        )
    job.folder.mkdir(parents=True, exist_ok=True)
    job.script.write_text(render(job))
    sent: list[str] = []
    for _ in range(chain):
        command = ["sbatch", "--parsable"] if slurm else ["qsub"]
        if sent:
            after = f"afterany:{sent[-1]}"
            command += [f"--dependency={after}"] if slurm else ["-W", f"depend={after}"]
        try:
            done = subprocess.run(
                [*command, str(job.script)], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise InputError(
                f"no {command[0]} here: submit on a login node of the cluster; --dry-run shows the "
                f"script, which is in {job.script}"
            ) from None
        if done.returncode or not done.stdout.strip():
            before = f" (already sent: {', '.join(sent)})" if sent else ""
            words = " ".join((done.stderr or done.stdout).split())
            raise InputError(f"{command[0]} refused {job.script}: {words}{before}")
        sent.append(done.stdout.split()[0].split(";")[0])
        if job.run:
            (job.folder / f"{job.name}.jobs").write_text("".join(f"{n}\n" for n in sent))
    return sent
