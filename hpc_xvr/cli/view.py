"""The command that shows a result on the screen: view."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_xvr.cli.common import Examples, File
from hpc_xvr.cli.ending import then


@click.command(cls=Examples, examples="hpc-xvr view movie.tif")
@click.argument("result", type=File())
def view(result: Path) -> None:
    """Look at the reconstruction in RESULT with napari.

    Frames are read when they are shown, beside those of the fast camera if the recordings are still
    where they were, and the uncertainty if it was written. Needs the extra `view`.
    """
    from hpc_xvr.evaluate.viewer import view as show

    show(result)
    then("report", result)
