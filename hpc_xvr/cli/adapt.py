"""The command that fits weights to one recording."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import click

from hpc_xvr.cli.cameras import source_options, take_source
from hpc_xvr.cli.common import (
    Examples,
    File,
    a_method,
    configured_device,
    connect,
    device_of_run,
    which_checkpoint,
)
from hpc_xvr.cli.common import force as force_option
from hpc_xvr.cli.common import tile as tile_option
from hpc_xvr.cli.ending import then, typed
from hpc_xvr.errors import InputError
from hpc_xvr.log import say


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr adapt builtin --lr fast.tif --hr sharp.tif --gap 20 \\
        --out mine.safetensors
    hpc-xvr reconstruct mine.safetensors --lr fast.tif --hr sharp.tif --gap 20 \\
        --out movie.tif
""",
)
@a_method
@source_options
@click.option("--out", required=True, type=File(), help="Result: a .safetensors file.")
@click.option(
    "--steps", default=120, show_default=True, type=click.IntRange(1), help="Optimizer steps."
)
@click.option(
    "--minutes",
    default=3.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Stop earlier, after this time.",
)
@click.option("--seed", default=0, show_default=True, help="Of the crops that are learned from.")
@tile_option
@force_option
@which_checkpoint
@device_of_run
def adapt(
    what: Path,
    device: str | None,
    out: Path,
    steps: int,
    minutes: float,
    seed: int,
    tile: int | None,
    force: bool,
    which: Literal["newest", "best"],
    **options: Any,
) -> None:
    """Adapt weights to one recording: its own key frames are the truth to learn from.

    Each key frame lies between two others: the network is shown these and the fast frames around
    it, and learns the one between, at twice the gap. Every third key frame is held back (at most
    four): the new weights are kept only if they make these better by 0.05 dB or more; otherwise the
    file holds the weights as they were, and the command says so. At least four key frames are
    needed. WHAT: builtin, or a run folder or file of weights of model.name key_propagation.
    """
    from hpc_xvr.adaptation import adapt as run
    from hpc_xvr.distributed.launch import discover
    from hpc_xvr.factory.weights import Trained, check_weights_name, read_weights, write_weights
    from hpc_xvr.files import check_new_file
    from hpc_xvr.reconstruction.material import check_agreement, check_gaps, material_of
    from hpc_xvr.reconstruction.methods import open_method
    from hpc_xvr.reconstruction.provenance import command_line, provenance_of
    from hpc_xvr.reconstruction.tiles import in_tiles

    if discover().size > 1:
        raise InputError("adapt runs in one process; start it without mpirun")
    source = take_source(options)
    check_weights_name(out)
    check_new_file(out)
    comm = connect("serial", device or configured_device(what))
    method = in_tiles(open_method(what, comm.device, which), tile)
    material = material_of(method, source)
    check_gaps(method, list(material.keys), force)
    check_agreement(material.doubt, force)
    adapted = run(method, material, steps=steps, minutes=minutes, seed=seed)
    assert method.config, "no method without learning can be adapted"
    command = command_line(["hpc-xvr", *sys.argv[1:]])
    how = {"steps": steps, "minutes": minutes, "seed": seed}
    origin = provenance_of(method, source, command, **how).origin()
    _, named, where = str(what).partition("=")
    old = read_weights(Path(where) if named else what, which)
    trained = Trained(adapted.state, method.config, method.step, old.facts)
    about = {"adapted": adapted.told(), "adapted_to": json.dumps(origin), "command": command}
    write_weights(out, trained, {"weights": "averaged", **old.facts, **about})
    say(f"adapt: {adapted.told()}")
    say(f"written: {out}")
    of_adapt = ("out", "steps", "minutes", "seed", "which")
    then("reconstruct", out, *typed(of_adapt), "--out", "MOVIE.tif")
