"""Jobs for a scheduler: what a site allows, the script that is sent, and sending it.

A site is a file of KEY=VALUE lines in jobs/sites, read here and by the job script itself. The
script is the scheduler's template in jobs/ with its directives and one block filled in.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc_xvr.errors import InputError

JOBS = Path(__file__).resolve().parents[2] / "jobs"
PARALLEL = ("train", "evaluate")  # every other command is one process; jobs/job.sh knows it too
_LINE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)")


def hours(seconds: int) -> str:
    """3725 -> 01:02:05."""
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def seconds(text: str) -> int:
    """HH:MM:SS or whole minutes, in seconds; ValueError for anything else."""
    if match := re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", text):
        h, m, s = map(int, match.groups())
        return 3600 * h + 60 * m + s
    if re.fullmatch(r"\d+", text):
        return 60 * int(text)
    raise ValueError(text)


@dataclass(frozen=True)
class Queue:
    """Jobs of `least` to `most` nodes run for at most `longest` seconds in queue `name`."""

    name: str
    least: int
    most: int
    longest: int

    def __str__(self) -> str:
        nodes = str(self.least) if self.least == self.most else f"{self.least}-{self.most}"
        return f"{self.name} ({nodes} nodes, {hours(self.longest)})"


@dataclass(frozen=True)
class Site:
    """What a file of jobs/sites says."""

    name: str
    path: Path
    values: dict[str, str]

    @property
    def scheduler(self) -> str:
        return self.values["XVR_SCHEDULER"]

    def fill(self, argument: str, nodes: int) -> str:
        """An argument of a job with {nodes} and {scratch} filled in."""
        scratch = os.path.expandvars(self.values.get("XVR_SCRATCH", ""))
        if "{scratch}" in argument and not scratch:
            raise InputError(f"{argument}: {self.path} names no XVR_SCRATCH, a disk in each node")
        return argument.replace("{nodes}", str(nodes)).replace("{scratch}", scratch)

    @property
    def queues(self) -> list[Queue]:
        out = []
        for row in self._list("XVR_QUEUES"):
            name, nodes, time = row.split()
            least, _, most = nodes.partition("-")
            out.append(Queue(name, int(least), int(most or least), seconds(time)))
        return out

    @property
    def resources(self) -> list[str]:
        return self._list("XVR_RESOURCES")

    def _list(self, key: str) -> list[str]:
        return [part.strip() for part in self.values.get(key, "").split(";") if part.strip()]


def sites() -> list[str]:
    """Names of the sites that have a file."""
    return sorted(path.stem for path in (JOBS / "sites").glob("*.env"))


def read_site(name: str, changes: Sequence[str] = ()) -> Site:
    """A site by its name in jobs/sites, or by the path of a file of your own.

    Args:
        changes: KEY=VALUE, which take the place of the file's lines.

    Raises:
        InputError: there is no such site, or its file is not made of KEY=VALUE lines.
    """
    if not (JOBS / "job.sh").exists():
        raise InputError(
            f"no job scripts in {JOBS}: hpc_xvr was installed without its checkout; get one, and "
            "run jobs/setup.sh in it"
        )
    path = Path(name) if "/" in name else JOBS / "sites" / f"{name}.env"
    if not path.is_file():
        raise InputError(
            f"--site {name}: no such site; there are {', '.join(sites())}, or give the path of a "
            f"file like {JOBS / 'sites' / 'slurm.env'}"
        )
    values = {}
    for number, text in enumerate(path.read_text().splitlines(), 1):
        if not text.strip() or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        try:
            words = shlex.split(match[2]) if match else []
        except ValueError:
            words = ["", ""]
        if not match or len(words) > 1:
            raise InputError(f"{path}, line {number}: write KEY=VALUE, with quotes around spaces")
        values[match[1]] = words[0] if words else ""
    values |= dict(text.split("=", 1) for text in changes)
    site = Site(path.stem, path.resolve(), values)
    missing = {"XVR_SCHEDULER", "XVR_RESOURCES", "XVR_RANKS_PER_NODE", "XVR_LAUNCH"} - {*values}
    if missing or site.scheduler not in ("slurm", "pbs"):
        raise InputError(
            f"{path}: XVR_SCHEDULER must be slurm or pbs, and XVR_RESOURCES, XVR_RANKS_PER_NODE "
            "and XVR_LAUNCH be set"
        )
    return site


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
        return self.ranks_per_node or int(self.site.values["XVR_RANKS_PER_NODE"])

    @property
    def parallel(self) -> bool:
        return self.arguments[0] in PARALLEL or self.arguments[0].endswith(".py")

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
    site, rows = job.site, job.site.queues
    queue = job.queue or site.values.get("XVR_QUEUE")
    known = list(dict.fromkeys(row.name for row in rows))
    for needed in site.values.get("XVR_REQUIRED", "").split():
        if not {"account": job.account, "queue": queue}[needed]:
            there = f"; {site.name} has {', '.join(map(str, rows))}" if needed == "queue" else ""
            raise InputError(f"{site.name} takes no job without --{needed}{there}")
    if not job.parallel and job.nodes > 1:
        raise InputError(f"{job.arguments[0]} is one process; ask for --nodes 1, not {job.nodes}")
    shortest = seconds(site.values.get("XVR_MIN_TIME", "0:00:00"))
    if job.time < max(shortest, 1):
        raise InputError(
            f"--time {hours(job.time)}: {site.name} runs jobs of {hours(max(shortest, 60))} or more"
        )
    if job.reserve >= job.time:
        raise InputError(f"--margin {job.reserve} leaves nothing of --time {hours(job.time)}")
    gpus = site.values.get("XVR_GPUS", "").split()
    if gpus and job.per_node > len(gpus):
        raise InputError(
            f"--ranks-per-node {job.per_node}: one rank a GPU, and a node of {site.name} has "
            f"{len(gpus)} GPUs"
        )
    if site.scheduler == "pbs" and (odd := re.search(r"[\s:,]", str(job.folder))):
        raise InputError(f"{job.folder}: PBS takes no path with {odd[0]!r} in it for the output")
    if not rows or queue is None:
        return
    taking = [str(r) for r in rows if r.least <= job.nodes <= r.most and job.time <= r.longest]
    advice = f"; {', '.join(taking)} would take it" if taking else ""
    if queue not in known:
        raise InputError(f"--queue {queue}: {site.name} has {', '.join(map(str, rows))}{advice}")
    of_queue = [row for row in rows if row.name == queue]
    fitting = [row for row in of_queue if row.least <= job.nodes <= row.most]
    if not fitting:
        raise InputError(
            f"--nodes {job.nodes}: {site.name} takes {', '.join(map(str, of_queue))}{advice}"
        )
    longest = max(row.longest for row in fitting)
    if job.time > longest:
        raise InputError(
            f"--time {hours(job.time)}: {site.name} runs jobs of {job.nodes} node(s) in {queue} "
            f"for at most {hours(longest)}; ask for less and add --chain until-done{advice}"
        )


def render(job: Job) -> str:
    """The script that is sent: the scheduler's template with this job filled in."""
    slurm = job.site.scheduler == "slurm"
    template = (JOBS / ("slurm/train.sbatch" if slurm else "pbs/train.pbs")).read_text()
    mark = "#SBATCH " if slurm else "#PBS "
    lines = template.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(mark))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith(mark))
    lines[start:end] = [mark + text for text in (_slurm(job) if slurm else _pbs(job))]
    first, last = (next(i for i, line in enumerate(lines) if line == m) for m in (_FIRST, _LAST))
    lines[first + 1 : last] = _choices(job)
    return "\n".join(lines) + "\n"


_FIRST, _LAST = "# >>> hpc-xvr submit", "# <<<"


def _choices(job: Job) -> list[str]:
    options = ["--site", str(job.site.path), "--venv", str(job.venv), "--nodes", str(job.nodes)]
    options += ["--folder", str(job.folder), "--name", job.name]
    if job.run:
        options += ["--run", str(job.run), "--steps", str(job.steps)]
    if job.ranks_per_node:
        options += ["--ranks-per-node", str(job.ranks_per_node)]
    for variable in job.variables:
        options += ["--env", variable]
    if job.until_done:
        options.append("--until-done")
    out = [
        f"xvr_root={shlex.quote(str(JOBS.parent))}",
        f"cd {shlex.quote(str(job.directory))} || exit 2",
    ]
    if job.site.scheduler == "pbs":
        options.append("--log")
        if job.run:
            options += ["--clock", str(job.time - job.reserve)]
        out.append(f"xvr_script={shlex.quote(str(job.script))}")
    return [*out, f"set -- {shlex.join([*options, *job.arguments])}"]


def _filled(job: Job, text: str) -> str:
    queue = job.queue or job.site.values.get("XVR_QUEUE", "")
    for key, value in (("nodes", job.nodes), ("per_node", job.per_node), ("queue", queue)):
        text = text.replace(f"{{{key}}}", str(value))
    return text


def _asked(job: Job) -> list[str]:
    """Directives of the site, the queue and the user."""
    texts = list(job.site.resources)
    if job.queue or job.site.values.get("XVR_QUEUE"):
        texts.append(job.site.values["XVR_QUEUE_DIRECTIVE"])
    return [_filled(job, text) for text in texts] + list(job.directives)


def _slurm(job: Job) -> list[str]:
    log = str(job.folder / f"{job.name}.log").replace("%", "%%")
    log = f'"{log}"' if " " in log else log
    out = [f"--job-name={job.title}", f"--time={hours(job.time)}", *_asked(job)]
    if job.account:
        out.append(f"--account={job.account}")
    if job.run:
        out.append(f"--signal=B:USR1@{job.reserve}")
    return [*out, f"--output={log}", "--open-mode=append", "--requeue"]


def _pbs(job: Job) -> list[str]:
    out = [f"-N {job.title}", f"-l walltime={hours(job.time)}", *_asked(job)]
    if job.account:
        out.append(f"-A {job.account}")
    return [*out, "-j oe", f"-o {job.folder / job.name}.out", "-r y"]


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
