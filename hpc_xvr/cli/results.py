"""Commands about a trained model and its results: evaluate, export, report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from hpc_xvr.cli.common import (
    Examples,
    File,
    NamedFile,
    a_run,
    connect,
    settings,
    which_checkpoint,
)
from hpc_xvr.cli.common import engine as engine_option
from hpc_xvr.cli.common import tile as tile_option
from hpc_xvr.cli.ending import then
from hpc_xvr.errors import InputError
from hpc_xvr.log import say

if TYPE_CHECKING:
    from hpc_xvr.config import Config

TWO_CAMERAS = ("--lr", "FAST", "--hr", "SHARP", "--gap", "GAP", "--out", "MOVIE.tif")
"""Options of `reconstruct`, to be filled in."""


def _evaluation_config(
    path: Path | None, overrides: tuple[str, ...], wanted: dict[str, Any]
) -> Config:
    """Load a config and put the options that were given into its section `evaluate`."""
    from hpc_xvr.config import load, with_evaluate

    given = {
        key: [str(v) if isinstance(v, Path) else v for v in value]
        if isinstance(value, tuple)
        else value
        for key, value in wanted.items()
        if value not in (None, ())
    }
    return with_evaluate(load(path, overrides), **given)


def _data_of(weights: Path) -> tuple[str, ...]:
    """The section `data` that a file of our own weights was trained with, as an override."""
    from hpc_xvr.factory.weights import read_weights

    try:
        config = read_weights(weights).config
    except InputError:  # the authors' weights have no config; unreadable ones are refused later
        return ()
    return (f"data={json.dumps(config.model_dump(mode='json')['data'])}",)


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr evaluate runs/quickstart
    mpirun -n 2 hpc-xvr evaluate runs/a runs/b --gap 4 --gap 20 \\
        --noise none --noise 1e3
    hpc-xvr evaluate builtin bayes --corpus corpus --gap 8 --out comparison
    hpc-xvr evaluate peer=net_g_latest.pth \\
        --config configs/compare/published_protocol.yaml
""",
)
@click.argument("what", nargs=-1, type=NamedFile())
@click.option(
    "--config",
    type=File(),
    help="Config file for the sections evaluate, data and run. [default: that of the first run]",
)
@click.option(
    "--corpus",
    "corpora",
    multiple=True,
    type=File(),
    help="Corpus to evaluate on. May be repeated. [default: that of the first run]",
)
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    help="Recordings to evaluate. [default: test]",
)
@click.option(
    "--gap",
    multiple=True,
    type=click.IntRange(2),
    help="Frames from key frame to key frame. May be repeated. [default: data.hr_gap of the "
    "first run]",
)
@click.option(
    "--noise",
    multiple=True,
    metavar="LEVEL",
    help="Noise on the fast camera's frames: none, photons per pixel at full scale (1e3), or "
    "KIND:PHOTONS (see data.noise for kinds). May be repeated. [default: none]",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=NamedFile(),
    help="Compare with this method: bicubic, nearest_hr, linear_hr, detail, adaptive, bayes. "
    "May be repeated. [default: all, unless WHAT names some]",
)
@click.option("--reference", help="Method that all others are compared with. [default: detail]")
@click.option(
    "--out",
    type=File(),
    help="Folder of the results. [default: RUN/evaluation of the first run]",
)
@click.option(
    "--restart",
    is_flag=True,
    help="Score everything again, not only what an earlier call did not finish.",
)
@tile_option
@settings
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="[default: as the first run was trained]",
)
@which_checkpoint
@engine_option
def evaluate(
    what: tuple[str, ...],
    config: Path | None,
    out: Path | None,
    restart: bool,
    overrides: tuple[str, ...],
    engine: str | None,
    device: str | None,
    which: Literal["newest", "best"],
    **wanted: Any,
) -> None:
    """Compare trained models, and methods without training, on held-out recordings.

    Each WHAT is a run folder, builtin (the weights that come with the package; builtin:NAME for
    others of them), a file of weights (ours or the authors'), NAME=PATH to give one of these a
    name, or the name of a method without training.

    Each recording is degraded to what the fast camera would see, reconstructed from that and a key
    frame every --gap frames, and compared with the truth: PSNR (dB), SSIM and AAD on the 8-bit
    scale, edge sharpness and flicker, all without the key frames. Ranks share the recordings. An
    interrupted call continues when it is repeated.
    """
    from hpc_xvr.config import Dist, with_evaluate
    from hpc_xvr.factory.builtin import is_builtin
    from hpc_xvr.files import check_new_folder

    paths = [Path(text.rpartition("=")[2]) for text in what]
    models = [path for path in paths if path.exists() or is_builtin(path)]
    if out is None and (not models or is_builtin(models[0])):
        raise InputError("evaluate: without a run folder, say where the results go: --out FOLDER")
    folder = out or (models[0] if models[0].is_dir() else models[0].with_suffix("")) / "evaluation"
    check_new_folder(folder)
    if config is None and models:
        if models[0].is_dir():
            config = models[0] / "config.yaml"
        else:
            overrides = (*_data_of(models[0]), *overrides)
    cfg = _evaluation_config(config, overrides, wanted)
    if not wanted["methods"] and len(models) < len(what):
        cfg = with_evaluate(
            cfg, methods=[]
        )  # methods without training are named: compare only with those
    patient = Dist(timeout_s=7 * 86400)  # ranks may have very different recordings
    comm = connect(engine or "auto", device or cfg.run.device, patient)
    from hpc_xvr.evaluate.workflow import evaluate as run

    run(cfg, what, comm, folder, restart, which)
    if out is None and models[0].is_dir():
        then("report", models[0])
    else:
        then("reconstruct", what[paths.index(models[0])] if models else "builtin", *TWO_CAMERAS)
    comm.close()
    comm.leave(0)


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr export runs/quickstart --out quickstart.safetensors
    hpc-xvr export runs/mine --checkpoint best --raw --out mine.safetensors
    hpc-xvr export builtin --out base.safetensors
    hpc-xvr export builtin --mean-with runs/mine --out both.safetensors
    hpc-xvr reconstruct quickstart.safetensors --lr fast.tif --hr sharp.tif \\
        --gap 20 --out movie.tif
""",
)
@a_run
@click.option("--out", required=True, type=File(), help="Result: a .safetensors file.")
@click.option(
    "--raw", is_flag=True, help="The weights of the last step instead of their moving average."
)
@click.option(
    "--mean-with",
    type=File(),
    metavar="WEIGHTS",
    help="Write the mean of RUN's weights and these, where one was trained on from the other: what "
    "was learned anew, with less of the old forgotten.",
)
@which_checkpoint
def export(
    run: Path, out: Path, raw: bool, mean_with: Path | None, which: Literal["newest", "best"]
) -> None:
    """Write the trained weights of RUN (or builtin), with its config, to one file.

    The file holds only numbers and text, so it is safe to share. It can replace RUN in `evaluate`
    and `reconstruct`, and training can start from it (config key train.weights).
    """
    from hpc_xvr.factory.weights import check_weights_name, export_weights
    from hpc_xvr.files import check_new_file
    from hpc_xvr.reconstruction.baselines import BASELINES
    from hpc_xvr.reconstruction.provenance import command_line

    if str(run) in BASELINES and not run.exists():
        raise InputError(f"{run}: is a method without learning; it has no weights to export")
    check_weights_name(out)
    check_new_file(out)
    command = command_line(["hpc-xvr", *sys.argv[1:]])
    trained = export_weights(run, out, which, raw, command, mean_with)
    count = sum(value.numel() for value in trained.weights.values())
    say(f"written: {out} (step {trained.step}, {count:,} numbers)")
    then("reconstruct", out, *TWO_CAMERAS)


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr report runs/quickstart
    hpc-xvr report movie.tif
""",
)
@a_run
def report(run: Path) -> None:
    """Write RUN/report.html: one page with curves, tables, pictures and settings.

    For a folder made by `evaluate --out`, write its comparison.html with tables and pictures. For
    the file of a reconstruction, write STEM-report.html beside it: frames of the fast camera,
    result, key frames and differences side by side, a line across them, flags and uncertainty, as
    far as the sources are there. The page is self-contained: send it, archive it, open it anywhere.
    """
    from hpc_xvr.evaluate.result import is_result
    from hpc_xvr.report import write_report

    say(f"written: {write_report(run)}")
    if is_result(run):
        then("view", run)
    elif (run / "config.yaml").exists():
        then("reconstruct", run, *TWO_CAMERAS)
    else:
        then("evaluate", "RUN", "--gap", "GAP", "--noise", "LEVEL", "--out", run)
