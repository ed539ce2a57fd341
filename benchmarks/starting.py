"""Starting programs of this checkout, on one rank or on many."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from hpc_xvr.distributed.launch import discover

ROOT = Path(__file__).resolve().parents[1]
Command = TypeVar("Command", bound=Callable[..., Any])


def environment(**more: str) -> dict[str, str]:
    """That of children, in which this checkout's hpc_xvr is found first."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def refuse_launcher() -> None:
    """For programs that start ranks themselves.

    Raises:
        click.UsageError: a launcher has started this one.
    """
    if discover().launcher:
        raise click.UsageError("start it without mpirun: it starts mpirun itself")


def ranks_options(default: str, engines: str = "horovod,torch") -> Callable[[Command], Command]:
    """Options of programs that start ranks: --ranks, --engines, --device, --mpirun."""
    options = (
        click.option(
            "--mpirun",
            default="mpirun --oversubscribe",
            envvar="XVR_MPIRUN",  # what the site's file says, in a job of hpc-xvr submit
            help="How ranks are started.",
        ),
        click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu"),
        click.option("--engines", default=engines),
        click.option("--ranks", default=default, help="How many ranks are measured: 1,2,4."),
    )
    return lambda command: reduce(lambda made, option: option(made), options, command)
