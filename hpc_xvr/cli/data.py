"""Commands that make, inspect and change a corpus: simulate, ingest, inspect, edit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from hpc_xvr.cli.cameras import (
    camera_options,
    links_option,
    pairing_options,
    take_pairing,
    take_readings,
)
from hpc_xvr.cli.common import Examples, File, NamedFile, a_config, connect, settings
from hpc_xvr.cli.ending import then
from hpc_xvr.errors import InputError
from hpc_xvr.log import say

if TYPE_CHECKING:
    from hpc_xvr.data.corpus import Corpus


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr simulate configs/quickstart.yaml
    hpc-xvr simulate configs/quickstart.yaml --set simulate.videos=6 \\
        --set data.corpus=runs/six
    mpirun -n 64 hpc-xvr simulate configs/corpus_1358.yaml \\
        --set data.corpus=/scratch/corpus
""",
)
@a_config
@settings
def simulate(config: Path, overrides: tuple[str, ...]) -> None:
    """Simulate the corpus of two-camera experiments that CONFIG describes.

    The section `simulate` of CONFIG sets the number of recordings, their size, cameras and scenes;
    `data.corpus` is the folder of the corpus. The same seed gives the same corpus, bit for bit.

    All cores are used, under mpirun those of all ranks. An interrupted command continues when it is
    repeated.
    """
    from hpc_xvr.config import load
    from hpc_xvr.data.simulate.corpus import simulate_corpus
    from hpc_xvr.distributed.launch import cpu_threads, discover

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
        comm = connect("auto", "cpu", cfg.dist)
        simulate_corpus(cfg.simulate, cfg.data.corpus, cpu_threads(launch), comm)
        comm.close()
    _show_corpus(cfg.data.corpus)
    then("train", config, *(word for text in overrides for word in ("--set", text)))


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr ingest run12.cihx --corpus corpus
    hpc-xvr ingest shots/*.cine --corpus corpus --scene keyhole
    mpirun -n 4 hpc-xvr ingest beamtime/ --corpus corpus --skip-bad
    hpc-xvr ingest frames/ --corpus corpus --frame-rate 1e6 --pixel-size 1.9
    hpc-xvr ingest scan.h5 --corpus corpus --flat flat.tif --dark dark.tif
    hpc-xvr ingest sharp.cihx --lr fast.dat --registration cameras.yaml \\
        --corpus corpus
""",
)
@click.argument("paths", nargs=-1, required=True, type=File())
@click.option(
    "--corpus",
    required=True,
    type=File(),
    help="Folder of the corpus; created if missing, else added to.",
)
@click.option(
    "--store",
    type=click.Choice(["zarr", "hdf5"]),
    default="zarr",
    show_default=True,
    help="File format of a new corpus.",
)
@camera_options("hr", short=True)
@click.option("--scene", help="What the recordings show, for tables by scene.")
@click.option(
    "--split",
    type=click.Choice(["auto", "train", "validation", "test"]),
    default="auto",
    show_default=True,
    help="Split of the recordings. auto: 80 % train, 10 % validation, 10 % test.",
)
@click.option(
    "--scale",
    type=int,
    default=4,
    show_default=True,
    help="Ratio of the two cameras' pixel sizes. Frame height and width must be multiples of it.",
)
@click.option(
    "--lr",
    multiple=True,
    type=File(),
    metavar="FILE",
    help="The fast camera's recording of the same shot; with several PATHS, one --lr for each in "
    "the same order. With --registration, its frames are resampled to the sharp grid / --scale.",
)
@camera_options("lr")
@pairing_options
@links_option
@click.option("--skip-bad", is_flag=True, help="Skip files that cannot be used, and list them.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes of each rank. [default: one per core, fewer for little work]",
)
def ingest(
    paths: tuple[Path, ...],
    corpus: Path,
    scale: int,
    workers: int | None,
    **options: Any,
) -> None:
    """Add the recordings in camera files to a corpus.

    PATHS are files, globs and folders, which are searched. Formats: Photron .mraw with .cih or
    .cihx (8, 12, 16 bit), Phantom .cine, Shimadzu HPV-X2 .dat, HDF5 (DXchange or any dataset), TIFF
    stacks, folders of numbered TIFF or PNG files, and OME-Zarr.

    Frame rate, pixel size, exposure, bit depth and camera are kept if the file states them. With
    --lr, the fast camera's own recording of the same shot is stored beside the sharp frames.

    A recording is in the corpus completely or not at all; an interrupted command continues when it
    is repeated. The result is the same on any number of processes and ranks.
    """
    from hpc_xvr.config import Dist
    from hpc_xvr.data.ingest.run import ingest as run
    from hpc_xvr.data.ranks import ONE_RANK
    from hpc_xvr.distributed.launch import cpu_threads, discover

    of_lr = [name for name, value in options.items() if name.startswith("lr_") and value]
    of_lr += [name for name in ("registration", "gap") if options[name]]
    if of_lr and not options["lr"]:
        names = ", ".join(f"--{name}" for name in of_lr)
        raise InputError(f"{names.replace('_', '-')}: for a fast camera's files; give --lr too")
    camera, lr_camera = take_readings(options)
    pairing = take_pairing(options)
    comm, launch = None, discover()
    if launch.size > 1:
        comm = connect("auto", "cpu", Dist(timeout_s=7 * 86400))
        workers = workers or cpu_threads(launch)

    def work() -> list[Any]:
        return run(
            paths,
            corpus,
            multiple_of=scale,
            lr_camera=lr_camera,
            pairing=pairing,
            workers=workers,
            ranks=comm or ONE_RANK,
            **asdict(camera),
            **options,
        )

    outcomes = work() if comm is None else comm.together(work)
    if comm is None or comm.is_root:
        _show_outcomes(outcomes)
        _show_corpus(corpus)
        then("inspect", corpus, "--verify", "--sheet")
    if comm is not None:
        comm.close()
        comm.leave(0)


def _show_outcomes(outcomes: list[Any]) -> None:
    """Print what became of the files; of many, only those that were not simply added."""
    from collections import Counter

    from hpc_xvr.log import print_table

    counts = Counter(o.status for o in outcomes)
    shown = [o for o in outcomes if o.status in ("duplicate", "bad") or len(outcomes) <= MANY]
    print_table(
        "Ingested: " + ", ".join(f"{n} {status}" for status, n in counts.items()),
        ["file", "result", "recording", "split"],
        [[o.path, f"bad: {o.problem}" if o.problem else o.status, o.id, o.split] for o in shown],
    )


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr inspect corpus
    hpc-xvr inspect corpus --verify
    hpc-xvr inspect corpus --sheet
    hpc-xvr inspect corpus --sheet frames.png --all
""",
)
@click.argument("corpus", type=File())
@click.option("--all", "everything", is_flag=True, help="List every recording, however many.")
@click.option(
    "--sheet",
    is_flag=False,
    flag_value="",
    type=NamedFile(),
    metavar="[FILE.png]",
    help="Write a contact sheet: first, middle and last frame of 48 recordings, spread evenly, or "
    "with --all of every recording, on several pages. [default: CORPUS-sheet.png]",
)
@click.option("--verify", is_flag=True, help="Read every recording and verify its checksum.")
def inspect(corpus: Path, everything: bool, sheet: str | None, verify: bool) -> None:
    """List the recordings of CORPUS, verify them, or draw a contact sheet.

    The exit code is 2 if --verify finds a damaged recording.
    """
    from hpc_xvr.log import logger, track

    opened = _show_corpus(corpus, everything)
    if sheet is not None:
        from hpc_xvr.data.corpus.contact_sheet import contact_sheet

        file = Path(sheet) if sheet else Path(f"{corpus.resolve().name}-sheet.png")
        for page in contact_sheet(opened, file, everything):
            say(f"contact sheet: {page}")
    if not verify:
        _after_inspection(corpus)
        return
    results = list(track(opened.verify(), "verifying", len(opened.videos), "recordings"))
    bad = [(name, problem) for name, problem in results if problem]
    for name, problem in bad:
        logger.warning("%s: %s", name, problem)
    if bad:
        raise InputError(
            f"{corpus}: {len(bad)} of {len(results)} recordings do not match their "
            f"checksums: {', '.join(name for name, _ in bad)}; remove them with `hpc-xvr edit "
            f"{corpus} ID --remove` and ingest them again from the camera files"
        )
    say(f"{len(results)} recordings verified: all intact")
    _after_inspection(corpus)


def _after_inspection(corpus: Path) -> None:
    then("train", "CONFIG.yaml", "--set", f"data.corpus={corpus}")


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr edit corpus shot7 shot8 --split test
    hpc-xvr edit corpus shot7 --rename spray-7
    hpc-xvr edit corpus shot7 --remove
""",
)
@click.argument("corpus", type=File())
@click.argument("recordings", nargs=-1, required=True)
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    help="Move them to this split.",
)
@click.option("--rename", "name", metavar="ID", help="Give one recording another id.")
@click.option("--remove", is_flag=True, help="Delete them from the corpus.")
def edit(
    corpus: Path,
    recordings: tuple[str, ...],
    split: Literal["train", "validation", "test"] | None,
    name: str | None,
    remove: bool,
) -> None:
    """Move RECORDINGS of CORPUS to another split, rename one, or remove them.

    RECORDINGS are ids as `hpc-xvr inspect CORPUS` lists them. Checksums and manifest follow; an
    interrupted command leaves a whole corpus. End what reads the corpus first: a training that runs
    would stop.
    """
    from hpc_xvr.data.corpus.writer import CorpusWriter

    if (split is not None) + (name is not None) + remove != 1:
        raise InputError("edit: give one of --split, --rename and --remove")
    if name is not None and len(recordings) != 1:
        raise InputError(f"--rename {name}: gives one recording another id; name just one")
    with CorpusWriter(corpus, store=None) as writer:
        if split is not None:
            writer.move(recordings, split)
        elif name is not None:
            writer.rename(recordings[0], name)
        else:
            writer.remove(recordings)
    done = f"now in {split}" if split else f"now called {name}" if name else "removed"
    say(f"{corpus}: {', '.join(dict.fromkeys(recordings))} {done}")
    then("inspect", corpus)


MANY = 50
"""Up to so many recordings are listed one by one."""
FIRST = 10
"""Recordings that are listed of more."""


def _show_corpus(corpus: Path, everything: bool = False) -> Corpus:
    from collections import Counter

    from hpc_xvr.data.corpus import Corpus
    from hpc_xvr.log import print_table

    def cell(value: float | None, unit: float = 1.0) -> str:
        return "-" if value is None else f"{value / unit:g}"

    opened = Corpus(corpus)
    videos = opened.videos
    splits = {s: sum(v.split == s for v in videos) for s in ("train", "validation", "test")}
    title = (
        f"{corpus}: {len(videos)} recordings, {sum(v.shape[0] for v in videos)} frames ("
        + ", ".join(f"{n} {s}" for s, n in splits.items())
        + ")"
    )
    many = len(videos) > MANY and not everything
    if many:
        kinds: Counter[tuple[str, str, str]] = Counter()
        for v in videos:
            info = v.info
            kinds[(info.scene, info.camera, info.split)] += 1
        rows: list[list[Any]] = []
        for scene, camera in sorted({kind[:2] for kind in kinds}):
            counts = [kinds[scene, camera, split] for split in splits]
            rows.append([scene, camera, sum(counts), *counts])
        print_table(title, ["scene", "camera", "recordings", *splits], rows)
        title = f"the first {FIRST} of {len(videos)} recordings; --all shows the others"
    print_table(
        title,
        ["recording", "split", "frames", "bits", "kHz", "um", "lr stream", "camera"],
        [
            [
                v.id,
                v.split,
                "x".join(map(str, v.shape)),
                v.info.bit_depth,
                cell(v.info.frame_rate_hz, 1e3),
                cell(v.info.pixel_size_um),
                "-" if v.lr_shape is None else "x".join(map(str, v.lr_shape)),
                v.info.camera,
            ]
            for v in (videos[:FIRST] if many else videos)
        ],
    )
    return opened
