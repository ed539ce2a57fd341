"""A job: what is asked for, whether the site would take it, and the script that is sent.

The script has the scheduler's directives and one line that calls xvr_main of scripts/slurm.sh or
scripts/pbs.sh, which do the work.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc_xvr.errors import InputError
from hpc_xvr.submit.ranks import takes_ranks
from hpc_xvr.submit.site import Queue, Site, hours

SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Job:
    """One job, or several that follow each other, as the user asked for it.

    `arguments` are a subcommand of hpc-xvr, or a script, and all it takes; `run` and `steps` are
    the folder and the last step of a training run; times are in seconds.
    """

    site: Site
    arguments: Sequence[str]
    nodes: int
    time: int
    folder: Path
    name: str
    venv: Path
    directory: Path
    run: Path | None = None
    steps: int = 0
    account: str | None = None
    queue: str | None = None
    ranks_per_node: int | None = None
    until_done: bool = False
    margin: int | None = None
    variables: Sequence[str] = ()
    directives: Sequence[str] = field(default_factory=tuple)

    @property
    def per_node(self) -> int:
        return self.ranks_per_node or self.site.ranks_per_node

    @property
    def in_queue(self) -> str | None:
        """The queue it asks for, or the site's own."""
        return self.queue or self.site.queue

    @property
    def reserve(self) -> int:
        """Seconds before the end of the job at which the run is asked to stop."""
        return self.margin if self.margin is not None else min(300, self.time // 10)

    @property
    def title(self) -> str:
        """Name of the job in the queue: a letter first, nothing that a scheduler trips over."""
        what = self.run.name if self.run else Path(self.arguments[0]).stem
        return "xvr-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", what)[:40]

    @property
    def script(self) -> Path:
        return self.folder / f"{self.name}.{'sbatch' if self.site.scheduler == 'slurm' else 'pbs'}"


def check(job: Job) -> None:
    """Refuse what the scheduler, or the job itself, would refuse after the wait in the queue.

    Raises:
        InputError: says which limit of which queue, and what would be taken.
    """
    site = job.site
    given = {"account": job.account, "queue": job.in_queue}
    for needed in site.required:
        if not given[needed]:
            there = f"; {site.name} has {_names(site.queues)}" if needed == "queue" else ""
            raise InputError(f"{site.name} takes no job without --{needed}{there}")
    if job.in_queue and not site.values.get("XVR_QUEUE_DIRECTIVE"):
        raise InputError(
            f"--queue {job.in_queue}: {site.path} has no XVR_QUEUE_DIRECTIVE to ask for it with, "
            "such as --partition={queue}"
        )
    if job.nodes > 1 and not takes_ranks(job.arguments):
        raise InputError(f"{job.arguments[0]} is one process; ask for --nodes 1, not {job.nodes}")
    shortest = max(site.shortest, 1)
    if job.time < shortest:
        raise InputError(
            f"--time {hours(job.time)}: {site.name} runs jobs of {hours(max(shortest, 60))} or more"
        )
    if job.reserve >= job.time:
        raise InputError(f"--margin {job.reserve} leaves nothing of --time {hours(job.time)}")
    if site.gpus and job.per_node > site.gpus:
        raise InputError(
            f"--ranks-per-node {job.per_node}: one rank per GPU, and a node of {site.name} has "
            f"{site.gpus} GPUs"
        )
    if not str(job.folder).isprintable():
        raise InputError(f"{str(job.folder)!r}: a job's folder has no control characters")
    if site.scheduler == "pbs" and (odd := re.search(r"[\s:,]", str(job.folder))):
        raise InputError(f"{job.folder}: PBS takes no path with {odd[0]!r} in it for the output")
    if not (job.venv / "bin" / "hpc-xvr").exists():
        raise InputError(
            f"no hpc-xvr in {job.venv / 'bin'}, where the job looks for it; install hpc_xvr into a "
            "virtual environment of its own, and submit from there"
        )
    _check_queue(job)


def _check_queue(job: Job) -> None:
    """Raises InputError if the job's queue is not there, too small or too short for it."""
    site, queue, rows = job.site, job.in_queue, job.site.queues
    if not rows or queue is None:
        return
    taking = [r for r in rows if r.least <= job.nodes <= r.most and job.time <= r.longest]
    advice = f"; {_names(taking)} would take it" if taking else ""
    of_queue = [row for row in rows if row.name == queue]
    if not of_queue:
        raise InputError(f"--queue {queue}: {site.name} has {_names(rows)}{advice}")
    fitting = [row for row in of_queue if row.least <= job.nodes <= row.most]
    if not fitting:
        raise InputError(f"--nodes {job.nodes}: {site.name} takes {_names(of_queue)}{advice}")
    longest = max(row.longest for row in fitting)
    if job.time > longest:
        raise InputError(
            f"--time {hours(job.time)}: {site.name} runs jobs of {job.nodes} node(s) in {queue} "
            f"for at most {hours(longest)}; ask for less and add --chain until-done{advice}"
        )


def _names(queues: Sequence[Queue]) -> str:
    return ", ".join(map(str, queues))


def render(job: Job) -> str:
    """The script that is sent."""
    slurm = job.site.scheduler == "slurm"
    mark, directives = ("#SBATCH", _slurm(job)) if slurm else ("#PBS", _pbs(job))
    lines = ["#!/usr/bin/env bash", *(f"{mark} {text}" for text in directives), ""]
    lines += ["set -uo pipefail", f"cd {shlex.quote(str(job.directory))} || exit 2"]
    if not slurm:
        lines.append(f"xvr_script={shlex.quote(str(job.script))}")
    lines.append(f"source {shlex.quote(str(SCRIPTS / f'{job.site.scheduler}.sh'))} || exit 2")
    lines.append(f"xvr_main {shlex.join([*_options(job), *job.arguments])}")
    return "\n".join(lines) + "\n"


def _options(job: Job) -> list[str]:
    """What scripts/job.sh takes before the command."""
    out = ["--site", str(job.site.path), "--venv", str(job.venv), "--nodes", str(job.nodes)]
    out += ["--folder", str(job.folder), "--name", job.name]
    if job.run:
        out += ["--run", str(job.run), "--steps", str(job.steps)]
    if job.ranks_per_node:
        out += ["--ranks-per-node", str(job.ranks_per_node)]
    for variable in job.variables:
        out += ["--env", variable]
    if job.until_done:
        out.append("--until-done")
    if job.site.scheduler == "pbs":
        out.append("--log")
        if job.run:
            out += ["--clock", str(job.time - job.reserve)]
    return out


def _asked(job: Job) -> list[str]:
    """Directives of the site and of the user."""
    return [
        *job.site.directives(job.nodes, job.per_node, job.in_queue),
        *job.directives,
    ]


def _slurm(job: Job) -> list[str]:
    log = str(job.folder / f"{job.name}.log").replace("%", "%%")
    log = f'"{log}"' if " " in log else log
    out = [f"--job-name={job.title}", f"--time={hours(job.time)}", *_asked(job)]
    if job.account:
        out.append(f"--account={job.account}")
    if job.run:
        out.append(f"--signal=B:USR1@{job.reserve}")
    # A node that is lost does not end the job: it goes on with the others.
    return [*out, f"--output={log}", "--open-mode=append", "--requeue", "--no-kill"]


def _pbs(job: Job) -> list[str]:
    out = [f"-N {job.title}", f"-l walltime={hours(job.time)}", *_asked(job)]
    if job.account:
        out.append(f"-A {job.account}")
    return [*out, "-j oe", f"-o {job.folder / job.name}.out", "-r y"]
