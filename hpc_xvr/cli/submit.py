"""The command that submits a job to a scheduler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hpc_xvr.cli.common import Examples, NamedFile
from hpc_xvr.cli.ending import then
from hpc_xvr.errors import InputError
from hpc_xvr.log import say
from hpc_xvr.submit.site import seconds, sites


def _one_line(
    ctx: click.Context, param: click.Parameter, value: str | tuple[str, ...] | None
) -> Any:
    """Text that goes into a line of the job script and may not begin another one."""
    for text in (value,) if isinstance(value, str) else value or ():
        if not text.isprintable():
            raise click.BadParameter(f"{text!r}: is one line without control characters")
    return value


def _time(ctx: click.Context, param: click.Parameter, value: str) -> int:
    try:
        return seconds(value)
    except ValueError:
        raise click.BadParameter(f"{value!r}: write HH:MM:SS, or minutes") from None


def _nodes(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    try:
        nodes = [int(part) for part in value.split(",")]
    except ValueError:
        nodes = [0]
    if min(nodes) < 1:
        raise click.BadParameter(f"{value!r}: write a number, or several such as 1,2,4")
    return nodes


def _chain(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "until-done":
        return None
    if not value.isdigit() or not 1 <= int(value) <= 100:
        raise click.BadParameter(f"{value!r}: write a number up to 100, or until-done")
    return int(value)


def _assignments(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    for value in values:
        if not value.partition("=")[0].isidentifier() or "=" not in value:
            raise click.BadParameter(f"{value!r}: write KEY=VALUE")
    return values


@click.command(
    cls=Examples,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    examples="""
    hpc-xvr submit --site polaris --nodes 10 --time 3:00:00 --queue prod \\
        --account MYPROJECT --chain until-done train configs/published.yaml \\
        --set train.global_batch=40 --set data.corpus=corpus \\
        --set data.stage_dir={scratch}/corpus
    hpc-xvr submit --site slurm --nodes 2 --time 30 --dry-run \\
        train configs/recommended.yaml
    hpc-xvr submit --site mine.env --nodes 4 --time 60 \\
        ingest beamtime/ --corpus corpus --skip-bad
    hpc-xvr submit --site perlmutter --nodes 4 --time 30 --account m1234 \\
        --queue debug benchmarks/scaling.py --ranks 4,8,16 --device cuda
""",
)
@click.option(
    "--site",
    required=True,
    type=NamedFile(),
    help=f"{', '.join(sites())}, or the path of a site file of your own.",
)
@click.option(
    "--nodes",
    default="1",
    show_default=True,
    callback=_nodes,
    help="Nodes of the job; several numbers, such as 1,2,4, submit a job for each.",
)
@click.option(
    "--time",
    required=True,
    metavar="HH:MM:SS",
    callback=_time,
    help="Time limit of one job; a plain number is minutes.",
)
@click.option("--account", callback=_one_line, help="Project to charge.")
@click.option(
    "--queue",
    callback=_one_line,
    help="Queue, partition or quality of service. [default: the site's]",
)
@click.option(
    "--chain",
    default="1",
    metavar="N|until-done",
    callback=_chain,
    show_default=True,
    help="N jobs, one after the other; or one that is submitted again until the run is done.",
)
@click.option(
    "--ranks-per-node", type=click.IntRange(1), help="Ranks on each node. [default: one per GPU]"
)
@click.option(
    "--margin",
    type=click.IntRange(1),
    metavar="SECONDS",
    help="Stop the run this long before its time limit. [default: a tenth of it, at most 300]",
)
@click.option(
    "--env",
    "variables",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_assignments,
    help="Set a variable of the job, in place of the site file's value. May be repeated.",
)
@click.option(
    "--directive",
    "directives",
    multiple=True,
    callback=_one_line,
    help="Additional directive for the scheduler, such as --gpus-per-node=4. May be repeated.",
)
@click.option("--dry-run", is_flag=True, help="Print the job script and submit nothing.")
@click.argument("job", nargs=-1, required=True, type=click.UNPROCESSED)
def submit(
    site: str,
    nodes: list[int],
    chain: int | None,
    dry_run: bool,
    job: tuple[str, ...],
    **asked: Any,
) -> None:
    """Submit JOB, an hpc-xvr command or a script, to a cluster's scheduler.

    JOB includes all arguments of the command or script. {nodes} in it stands for the number of
    nodes, {scratch} for the site's node-local disk. The job runs in the environment of this
    command.

    A training run stops with a checkpoint before its time is up and continues from there when it
    starts again; a run that fails without a new checkpoint is not started again. Script, log and a
    record of the starts are in RUN/jobs, or in runs/jobs if the job has no run folder.

    What the queue or the job itself would refuse is refused here, with the reason.
    """
    from hpc_xvr.submit.job import Job, check, render
    from hpc_xvr.submit.scheduler import send
    from hpc_xvr.submit.site import read_site

    where = read_site(site, asked["variables"])
    jobs: list[Job] = []
    for count in nodes:
        arguments = [where.fill(text, count) for text in job]
        inspect = _inspect_script if arguments[0].endswith(".py") else _inspect_command
        folder, of_run, ranks_fit = inspect(arguments)
        made = Job(
            site=where,
            arguments=arguments,
            nodes=count,
            folder=folder,
            name=_free_name(folder, Path(arguments[0]).stem, len(jobs)),
            venv=Path(sys.prefix),
            directory=Path.cwd(),
            until_done=chain is None,
            **of_run,
            **asked,
        )
        check(made)
        ranks_fit(count * made.per_node)
        if chain != 1 and not made.run:
            raise InputError(
                f"--chain is for train; {arguments[0]} has no checkpoints to continue from"
            )
        jobs.append(made)
    for made in jobs:
        if dry_run:
            click.echo(render(made), nl=False)
            continue
        sent = send(made, chain or 1)
        say(f"{', '.join(sent)}: {made.nodes} node(s), log {made.folder / made.name}.log")
    if dry_run:
        return
    if jobs[0].run:
        then("report", jobs[0].run)
    else:
        then("-f", jobs[0].folder / f"{jobs[0].name}.log", program="tail")


_Inspected = tuple[Path, dict[str, Any], Callable[[int], None]]


def _inspect_script(arguments: list[str]) -> _Inspected:
    if not Path(arguments[0]).is_file():
        raise InputError(f"{arguments[0]}: no such file")
    return Path("runs/jobs").resolve(), {}, lambda ranks: None


def _inspect_command(arguments: list[str]) -> _Inspected:
    """Parse the command as the job will, so that errors are reported now."""
    from hpc_xvr.cli import cli

    name = arguments[0]
    command = cli.get_command(click.Context(cli), name)
    if command is None or name == "submit":
        known = ", ".join(n for n in sorted(cli.commands) if n != "submit")
        raise InputError(f"{name}: neither a script (NAME.py) nor a command; there are {known}")
    given = command.make_context(f"hpc-xvr {name}", arguments[1:]).params
    if name != "train" or given["find_batch"]:
        run: Path | None = given.get("run")
        folder = run / "jobs" if run and run.is_dir() else Path("runs/jobs")
        return folder.resolve(), {}, lambda ranks: None
    return _inspect_training(given)


def _inspect_training(given: dict[str, Any]) -> _Inspected:
    from hpc_xvr.config import load
    from hpc_xvr.data.samples.slots import slots_of_rank

    cfg = load(given["config"], given["overrides"])
    run = cfg.run.dir.resolve()
    used = (run / "metrics.jsonl").exists() or any(run.glob("checkpoints/*.pt"))
    if used and not given["resume"]:
        raise InputError(
            f"run folder {run} is already used; add --resume to continue it, or choose another "
            "with --set run.dir=..."
        )
    if cfg.simulate is None and not cfg.data.corpus.exists():
        raise InputError(f"data.corpus {cfg.data.corpus}: no such folder")

    def ranks_fit(ranks: int) -> None:
        slots_of_rank(0, ranks, cfg.train.global_batch)

    return run / "jobs", {"run": run, "steps": cfg.train.steps}, ranks_fit


def _free_name(folder: Path, stem: str, taken: int) -> str:
    numbers = [
        int(p.stem.rpartition("-")[2])
        for p in folder.glob(f"{stem}-*.*")
        if p.stem.rpartition("-")[2].isdigit()
    ]
    return f"{stem}-{max(numbers, default=0) + 1 + taken}"
