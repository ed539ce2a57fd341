"""Commands that use a trained model: evaluate, reconstruct, export, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from hpc_xvr.cli.common import (
    Examples,
    a_run,
    configured_device,
    connect,
    device_of_run,
    which_checkpoint,
)
from hpc_xvr.cli.common import engine as engine_option
from hpc_xvr.errors import InputError


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr evaluate runs/quickstart
    mpirun -n 2 hpc-xvr evaluate runs/quickstart --gap 8 --photons 1000
    hpc-xvr evaluate runs/quickstart --corpus other --split train
""",
)
@a_run
@click.option("--corpus", type=click.Path(path_type=Path), help="Default: the run's own.")
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    help="Recordings to evaluate. [default: test]",
)
@click.option(
    "--gap",
    type=click.IntRange(2),
    help="Frames from key frame to key frame. [default: the run's data.hr_gap]",
)
@click.option(
    "--photons",
    type=click.FloatRange(min=0, min_open=True),
    help="Photons per pixel at full scale on the fast camera. [default: no noise]",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    help="Compare with this method: bicubic, "
    "nearest_hr, linear_hr, detail, adaptive. May be given many times. [default: all]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Default: RUN/evaluation.")
@which_checkpoint
@device_of_run
@engine_option
def evaluate(run: Path, engine: str | None, device: str | None, **options: Any) -> None:
    """Compare the model of RUN with methods that need no training, on held-out recordings.

    RUN is a run folder, or a file of hpc-xvr export.

    Each recording is degraded to what the fast camera would see, reconstructed from it and from a
    key frame every --gap frames, and compared with the truth: PSNR (dB), SSIM and AAD on the
    8-bit scale, key frames excluded. Ranks share the recordings.
    """
    from hpc_xvr.config import Dist

    patient = Dist(timeout_s=7 * 86400)  # ranks may have very different recordings
    comm = connect(engine or "auto", device or configured_device(run), patient)
    from hpc_xvr.evaluate.workflow import evaluate_run

    evaluate_run(run, comm, **options)
    comm.close()
    comm.leave(0)


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr reconstruct runs/quickstart --video sim-0001-spray --out spray.tif
    hpc-xvr reconstruct runs/mine --lr fast.tif --hr slow.tif --gap 20 --out movie.h5
    hpc-xvr reconstruct runs/mine --lr fast.dat --hr slow.cihx --gap 8 --out m.tif --movie m.gif
""",
)
@a_run
@click.option("--lr", type=click.Path(path_type=Path), help="File of the fast camera.")
@click.option("--hr", type=click.Path(path_type=Path), help="File of the slow, sharp camera.")
@click.option(
    "--gap",
    type=click.IntRange(1),
    help="Fast frames from one sharp frame to the next. [default: the run's data.hr_gap]",
)
@click.option("--lr-dataset", help="Dataset inside an HDF5 --lr file.")
@click.option("--hr-dataset", help="Dataset inside an HDF5 --hr file.")
@click.option("--lr-bit-depth", type=click.IntRange(1, 16), help="As for ingest: --lr file.")
@click.option("--hr-bit-depth", type=click.IntRange(1, 16), help="As for ingest: --hr file.")
@click.option("--flip-rows", is_flag=True, help="As for ingest: Shimadzu --lr file.")
@click.option("--corpus", type=click.Path(path_type=Path), help="Default: the run's own.")
@click.option("--video", help="Reconstruct this recording of the corpus instead of two files.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Result: .tif (16-bit stack) or .h5 (DXchange).",
)
@click.option(
    "--movie", type=click.Path(path_type=Path), help="Side-by-side animation: .gif or .webp."
)
@which_checkpoint
@device_of_run
def reconstruct(run: Path, device: str | None, **options: Any) -> None:
    """Make the fast sharp movie with the model of RUN, a run folder or a file of hpc-xvr export.

    Either from two camera files of the same field of view (--lr and --hr, first frames at the
    same instant, one sharp frame every --gap fast ones), or from a recording of a corpus.
    """
    from hpc_xvr.dist.launch import discover
    from hpc_xvr.reconstruct.workflow import reconstruct_run

    if discover().size > 1:
        raise InputError("reconstruct is one process; start it without mpirun")
    comm = connect("serial", device or configured_device(run))
    reconstruct_run(run, comm.device, **options)


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr export runs/quickstart --out quickstart.safetensors
    hpc-xvr export runs/mine --checkpoint best --raw --out mine.safetensors
    hpc-xvr reconstruct quickstart.safetensors --lr fast.tif --hr slow.tif --gap 20 --out m.tif
""",
)
@a_run
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Result: a .safetensors file."
)
@click.option("--raw", is_flag=True, help="The weights of the last step, not their average.")
@which_checkpoint
def export(run: Path, out: Path, raw: bool, which: Literal["newest", "best"]) -> None:
    """Write the trained weights of RUN, with its config, to one file to keep or to give away.

    The file holds numbers and text only. It takes the place of RUN in evaluate and reconstruct,
    and is a start for another training (config key train.weights).
    """
    from hpc_xvr.reconstruct.weights import export_weights

    trained = export_weights(run, out, which, raw)
    count = sum(value.numel() for value in trained.weights.values())
    click.echo(f"written: {out} (step {trained.step}, {count:,} numbers)")


@click.command(cls=Examples, examples="hpc-xvr report runs/quickstart")
@a_run
def report(run: Path) -> None:
    """Write RUN/report.html: one page with curves, tables, pictures and settings.

    The page needs nothing but itself: send it, archive it, open it anywhere.
    """
    from hpc_xvr.evaluate.report import write_report

    click.echo(f"written: {write_report(run)}")
