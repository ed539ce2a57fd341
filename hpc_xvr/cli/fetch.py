"""The command that downloads published test sets."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_xvr.cli.common import Examples, File, settings
from hpc_xvr.cli.ending import then
from hpc_xvr.log import say


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr fetch rad_00001 --corpus published/rad_00001
    hpc-xvr fetch rad_00002 --corpus published/rad_00002 \\
        --set fetch.folder=/scratch/downloads
    hpc-xvr fetch mine --corpus mine \\
        --set fetch.address.mine=https://host/frames.zip
""",
)
@click.argument("name")
@click.option(
    "--corpus",
    required=True,
    type=File(),
    help="Folder of the corpus; created if missing, else added to.",
)
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="test",
    show_default=True,
    help="Split that the recording goes into.",
)
@click.option("--config", type=File(), help="Config file with a section `fetch`.")
@settings
def fetch(
    name: str, corpus: Path, split: str, config: Path | None, overrides: tuple[str, ...]
) -> None:
    """Download the published test set NAME (rad_00001, rad_00002) into a corpus.

    The archive is downloaded to fetch.folder, where it stays, and checked against fetch.sha256, if
    that is set. Its sharp and low-resolution frames become one recording. An interrupted download
    continues when the command is repeated. Neither GPU nor torch nor MPI is needed.
    """
    from hpc_xvr.config import load
    from hpc_xvr.data.fetch import fetch as run

    cfg = load(config, overrides)
    added = run(name, corpus, cfg.fetch, split=split, scale=cfg.data.scale)
    say(f"{corpus}: {added} added")
    then("evaluate", "builtin", "--corpus", corpus, "--split", split, "--out", "RESULTS")
