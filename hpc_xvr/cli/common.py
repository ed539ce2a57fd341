"""What the commands share: options, help with examples, the connection to the other ranks."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpc_xvr.text import expanded, expanded_name

if TYPE_CHECKING:
    from hpc_xvr.config import Dist
    from hpc_xvr.distributed.comm import Comm

_comm: Comm | None = None  # set by the commands that talk to other ranks


class File(click.ParamType):
    """A path; ~ and $VARIABLE mean what they mean in a shell."""

    name = "path"

    def convert(
        self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        try:
            return expanded(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class NamedFile(click.ParamType):
    """NAME, PATH or NAME=PATH, the path as `File`."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return expanded_name(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


settings = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a config value, such as train.steps=100. May be repeated.",
)
a_config = click.argument("config", type=File())
a_run = click.argument("run", type=File())
a_method = click.argument("what", type=File())
engine = click.option(
    "--engine",
    type=click.Choice(["auto", "serial", "horovod", "torch"]),
    help="How ranks communicate. [default: config key dist.engine, or auto]",
)

tile = click.option(
    "--tile",
    type=click.IntRange(1),
    metavar="PIXELS",
    help="Make the frames in tiles of so many sharp pixels a side, with what they depend on around "
    "them: for frames that take more memory than there is. The result is the same to rounding.",
)
force = click.option(
    "--force",
    is_flag=True,
    help="Go on where key frames lie further apart than the weights were trained for, or the two "
    "cameras do not agree.",
)

which_checkpoint = click.option(
    "--checkpoint",
    "which",
    type=click.Choice(["newest", "best"]),
    default="newest",
    show_default=True,
    help="Which checkpoint of a run folder: the newest valid one, or that of the best validation.",
)
device_of_run = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: as the run was trained]"
)


class Examples(click.Command):
    """A command whose help ends with examples, printed as they are typed."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def get_short_help_str(self, limit: int = 45) -> str:
        return super().get_short_help_str(max(limit, 100))  # the whole first sentence

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        lines = inspect.cleandoc(self.examples).splitlines()
        if lines:
            formatter.write("\nExamples:\n" + "".join(f"  {line}\n" for line in lines))


def configured_device(run: Path) -> str:
    """The device that a run folder's config names, else auto."""
    from hpc_xvr.config import load

    return load(run / "config.yaml").run.device if (run / "config.yaml").exists() else "auto"


def connect(engine: str, device: str, dist: Dist | None = None, folder: Path | None = None) -> Comm:
    """Connect this rank to the others and set up its log."""
    global _comm
    from hpc_xvr import log
    from hpc_xvr.distributed.launch import discover
    from hpc_xvr.factory.memory import keep_freed_memory

    if device != "cuda":
        keep_freed_memory()
    from hpc_xvr.distributed.comm import connect as meet

    launch = discover()
    log.setup(launch.rank, launched=launch.launcher is not None)
    _comm = meet(engine, device, dist, folder)  # type: ignore[arg-type]
    return _comm


def connected() -> Comm | None:
    """The connection to the other ranks, if a command has made one."""
    return _comm
