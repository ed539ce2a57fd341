"""Commands that make and look at a corpus: simulate, ingest, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hpc_xvr.cli.common import Examples, a_config, connect, settings
from hpc_xvr.errors import InputError


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr simulate configs/quickstart.yaml
    hpc-xvr simulate configs/quickstart.yaml --set simulate.videos=6 --set data.corpus=runs/six
    mpirun -n 64 hpc-xvr simulate configs/corpus_1358.yaml --set data.corpus=/scratch/corpus
""",
)
@a_config
@settings
def simulate(config: Path, overrides: tuple[str, ...]) -> None:
    """Make the corpus of simulated two-camera experiments that CONFIG describes.

    The section `simulate` says how many recordings, their size, cameras and scenes; `data.corpus`
    says where they go. The same seed gives the same corpus, bit for bit. Uses all cores, and under
    mpirun those of all ranks; after an interruption, repeat the command and it goes on.
    """
    from hpc_xvr.config import load
    from hpc_xvr.data.phantom import refuse_existing, simulate_corpus
    from hpc_xvr.dist.launch import cpu_threads, discover

    cfg = load(config, overrides)
    if cfg.simulate is None:
        raise InputError(
            f"{config}: has no section 'simulate'; add one, such as "
            "'simulate: {videos: 24, size: [48, 128, 128]}'"
        )
    launch = discover()
    if launch.size == 1:
        simulate_corpus(cfg.simulate, cfg.data.corpus)
    else:
        comm = connect("auto", "cpu", cfg.dist.timeout_s)
        comm.on_root(lambda: refuse_existing(cfg.data.corpus))
        cores = cpu_threads(launch)
        simulate_corpus(cfg.simulate, cfg.data.corpus, cores, comm.rank, comm.size, comm.gather)
        comm.close()
    _show_corpus(cfg.data.corpus)


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr ingest run12.cihx --corpus corpus
    hpc-xvr ingest shots/*.cine --corpus corpus --scene keyhole
    hpc-xvr ingest frames/ --corpus corpus --frame-rate 1e6 --pixel-size 1.9
    hpc-xvr ingest scan.h5 --corpus corpus --flat flat.tif --dark dark.tif
""",
)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--corpus",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the corpus: made if missing, added to if there.",
)
@click.option(
    "--store",
    type=click.Choice(["zarr", "hdf5"]),
    default="zarr",
    show_default=True,
    help="File format of a new corpus.",
)
@click.option("--flat", type=click.Path(path_type=Path), help="Beam without sample.")
@click.option("--dark", type=click.Path(path_type=Path), help="Camera without beam.")
@click.option("--dataset", help="Dataset inside HDF5 files, such as /exchange/data.")
@click.option("--flip-rows", is_flag=True, help="Turn Shimadzu frames upside down.")
@click.option("--frame-rate", type=float, metavar="HZ", help="Where the file does not say.")
@click.option("--pixel-size", type=float, metavar="UM", help="Where the file does not say.")
@click.option(
    "--bit-depth",
    type=click.IntRange(1, 16),
    help="Significant bits, where the file does not say (12-bit data in 16-bit TIFF).",
)
@click.option(
    "--full-scale",
    type=click.FloatRange(min=0, min_open=True),
    help="Value stored as white, for float files and "
    "transmissions. [default: the file's maximum; 1.5]",
)
@click.option("--camera", help="Name of the camera, where the file does not say.")
@click.option("--scene", help="What the recordings show, for tables by scene.")
@click.option(
    "--split",
    type=click.Choice(["auto", "train", "validation", "test"]),
    default="auto",
    show_default=True,
    help="auto: 80/10/10 by recording.",
)
@click.option(
    "--scale",
    type=int,
    default=4,
    show_default=True,
    help="Frame height and width must be multiples of this.",
)
@click.option("--crop", is_flag=True, help="Cut rows and columns that are too many for --scale.")
def ingest(
    paths: tuple[Path, ...],
    corpus: Path,
    scale: int,
    frame_rate: float | None,
    pixel_size: float | None,
    **options: Any,
) -> None:
    """Turn camera files PATHS into recordings of a corpus.

    \b
    Reads Photron .mraw with .cih/.cihx (8, 12, 16 bit), Phantom .cine, Shimadzu HPV-X2 .dat,
    DXchange and plain HDF5, TIFF stacks, and folders of numbered TIFF or PNG files.

    Frame rate, pixel size, exposure, bit depth and camera are kept where the file has them. A
    recording is in the corpus whole or not at all; repeat the command after an interruption and
    it goes on with what is missing.
    """
    from hpc_xvr.data.ingest import ingest as run
    from hpc_xvr.log import print_table

    outcomes = run(
        paths,
        corpus,
        multiple_of=scale,
        frame_rate_hz=frame_rate,
        pixel_size_um=pixel_size,
        **options,
    )
    print_table(
        "Ingested",
        ["file", "result", "recording", "split"],
        [[o.path, o.status, o.id, o.split] for o in outcomes],
    )
    _show_corpus(corpus)


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr inspect corpus
    hpc-xvr inspect corpus --verify
""",
)
@click.argument("corpus", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every recording and check its checksum.")
def inspect(corpus: Path, verify: bool) -> None:
    """Show the recordings of CORPUS; exit code 2 if --verify finds a damaged one."""
    _show_corpus(corpus)
    if not verify:
        return
    from hpc_xvr.data.corpus import Corpus
    from hpc_xvr.log import logger, track

    opened = Corpus(corpus)
    results = list(track(opened.verify(), "verifying", total=len(opened.videos)))
    bad = [(name, problem) for name, problem in results if problem]
    for name, problem in bad:
        logger.warning("%s: %s", name, problem)
    if bad:
        raise InputError(
            f"{corpus}: {len(bad)} of {len(results)} recordings do not match their "
            f"checksums: {', '.join(name for name, _ in bad)}; delete their folders "
            "under videos/ and ingest them again from the camera files"
        )
    click.echo(f"{len(results)} recordings verified: all intact")


def _show_corpus(corpus: Path) -> None:
    from hpc_xvr.data.corpus import Corpus
    from hpc_xvr.log import print_table

    def cell(value: float | None, unit: float = 1.0) -> str:
        return "-" if value is None else f"{value / unit:g}"

    videos = Corpus(corpus).videos
    rows = [
        [
            v.id,
            v.info.split,
            "x".join(map(str, v.shape)),
            v.info.bit_depth,
            cell(v.info.frame_rate_hz, 1e3),
            cell(v.info.pixel_size_um),
            "-" if v.lr_shape is None else "x".join(map(str, v.lr_shape)),
            v.info.camera,
        ]
        for v in videos
    ]
    splits = {s: sum(v.info.split == s for v in videos) for s in ("train", "validation", "test")}
    print_table(
        f"{corpus}: {len(videos)} recordings, {sum(v.shape[0] for v in videos)} frames ("
        + ", ".join(f"{n} {s}" for s, n in splits.items())
        + ")",
        ["recording", "split", "frames", "bits", "kHz", "um", "lr stream", "camera"],
        rows,
    )
