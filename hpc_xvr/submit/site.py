"""A site: what a file of sites/ says of a cluster, its scheduler and its queues.

The file is made of KEY=VALUE lines, read here and by the job script itself (scripts/job.sh);
sites/slurm.env says how it is written.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_xvr.errors import InputError
from hpc_xvr.text import first_line

SITES = Path(__file__).parent / "sites"
_LINE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)")
_REQUIRED = ("account", "queue")


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
    """What a site's file says."""

    name: str
    path: Path
    values: dict[str, str]

    @property
    def scheduler(self) -> str:
        return self.values["XVR_SCHEDULER"]

    @property
    def ranks_per_node(self) -> int:
        return int(self.values["XVR_RANKS_PER_NODE"])

    @property
    def queue(self) -> str | None:
        """The queue of jobs that do not ask for one."""
        return self.values.get("XVR_QUEUE") or None

    @property
    def queues(self) -> list[Queue]:
        out = []
        for row in self._list("XVR_QUEUES"):
            name, nodes, time = row.split()
            least, _, most = nodes.partition("-")
            out.append(Queue(name, int(least), int(most or least), seconds(time)))
        return out

    @property
    def required(self) -> list[str]:
        """Options that no job may leave out: "account", "queue"."""
        return self.values.get("XVR_REQUIRED", "").split()

    @property
    def shortest(self) -> int:
        """Seconds that a job must ask for at least."""
        return seconds(self.values.get("XVR_MIN_TIME", "0:00:00"))

    @property
    def gpus(self) -> int | None:
        """GPUs of a node, where the file says so."""
        return len(self.values.get("XVR_GPUS", "").split()) or None

    def directives(self, nodes: int, per_node: int, queue: str | None) -> list[str]:
        """The scheduler's directives for a job of this size in this queue."""
        texts = self._list("XVR_RESOURCES")
        if queue:
            if "XVR_QUEUE_DIRECTIVE" not in self.values:
                raise InputError(
                    f"{self.path}: a queue needs XVR_QUEUE_DIRECTIVE, which is not set"
                )
            texts.append(self.values["XVR_QUEUE_DIRECTIVE"])
        filling = {"nodes": nodes, "per_node": per_node, "queue": queue}
        for key, value in filling.items():
            texts = [text.replace(f"{{{key}}}", str(value)) for text in texts]
        return texts

    def fill(self, argument: str, nodes: int) -> str:
        """An argument of a job with {nodes} and {scratch} filled in."""
        scratch = os.path.expandvars(self.values.get("XVR_SCRATCH", ""))
        if "{scratch}" in argument and not scratch:
            raise InputError(f"{argument}: {self.path} names no XVR_SCRATCH, a disk in each node")
        return argument.replace("{nodes}", str(nodes)).replace("{scratch}", scratch)

    def _list(self, key: str) -> list[str]:
        return [part.strip() for part in self.values.get(key, "").split(";") if part.strip()]


def sites() -> list[str]:
    """Names of the sites that come with the package."""
    return sorted(path.stem for path in SITES.glob("*.env"))


def read_site(name: str, changes: Sequence[str] = ()) -> Site:
    """A site that comes with the package, by its name, or a file of your own, by its path.

    Args:
        changes: KEY=VALUE, which take the place of the file's lines.

    Raises:
        InputError: there is no such site, or its file does not say what it has to.
    """
    own = "/" in name or name.endswith(".env")
    path = Path(name) if own else SITES / f"{name}.env"
    if not path.is_file():
        raise InputError(
            f"--site {name}: no such site; there are {', '.join(sites())}, or give the path of a "
            f"file like {SITES / 'slurm.env'}"
        )
    values = _values(path) | dict(text.split("=", 1) for text in changes)
    site = Site(path.stem, path.resolve(), values)
    _check(site)
    return site


def _values(path: Path) -> dict[str, str]:
    """KEY -> VALUE, as bash would read the file."""
    values = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from None
    for number, text in enumerate(lines, 1):
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
    return values


def _check(site: Site) -> None:
    """Raises InputError unless the values are there and can be read."""
    path, values = site.path, site.values
    missing = {"XVR_SCHEDULER", "XVR_RESOURCES", "XVR_RANKS_PER_NODE", "XVR_LAUNCH"} - {*values}
    if missing or site.scheduler not in ("slurm", "pbs"):
        raise InputError(
            f"{path}: XVR_SCHEDULER must be slurm or pbs, and XVR_RESOURCES, XVR_RANKS_PER_NODE "
            "and XVR_LAUNCH be set"
        )
    forms: dict[str, tuple[Callable[[], object], str]] = {
        "XVR_RANKS_PER_NODE": (lambda: range(site.ranks_per_node)[0], "a number from 1"),
        "XVR_QUEUES": (lambda: site.queues, "'NAME NODES HH:MM:SS', with ';' between queues"),
        "XVR_MIN_TIME": (lambda: site.shortest, "HH:MM:SS"),
        "XVR_REQUIRED": (lambda: list(map(_REQUIRED.index, site.required)), " ".join(_REQUIRED)),
    }
    for key, (read, form) in forms.items():
        try:
            read()
        except (ValueError, IndexError):
            raise InputError(f"{path}: {key}={values[key]}: write {form}") from None
