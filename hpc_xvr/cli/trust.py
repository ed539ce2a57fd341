"""Options that ask how far a movie may be believed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hpc_xvr.cli.common import File

if TYPE_CHECKING:
    from hpc_xvr.reconstruction.trust.examination import Asked

Command = TypeVar("Command", bound=Callable[..., Any])


def trust_options(command: Command) -> Command:
    """A decorator that adds `--check`, `--enforce`, `--uncertainty` and `--maps`."""
    for decorate in reversed(
        (
            click.option(
                "--check",
                is_flag=True,
                help="First leave out every other key frame, make it from its neighbours at twice "
                "the gap, and tell how well that went: an estimate of the error on the safe side.",
            ),
            click.option(
                "--enforce",
                is_flag=True,
                help="Make the frames agree with the fast camera's within their noise.",
            ),
            click.option(
                "--uncertainty",
                type=File(),
                help="Also write a standard deviation for each pixel, in the frames' units: .tif "
                "or .h5.",
            ),
            click.option(
                "--maps",
                type=File(),
                help="Also write maps of where frames contradict the fast camera and, with "
                "--check, of the error: .h5.",
            ),
        )
    ):
        command = decorate(command)
    return command


def take_asked(options: dict[str, Any]) -> Asked:
    """Take the options of `trust_options` out of those of a command."""
    from hpc_xvr.reconstruction.trust.examination import Asked

    names = "check", "enforce", "uncertainty", "maps"
    return Asked(**{name: options.pop(name) for name in names})
