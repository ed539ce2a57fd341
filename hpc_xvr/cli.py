"""The command line: one subcommand a workflow. Heavy modules load inside the commands."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpc_xvr import __version__
from hpc_xvr.errors import InputError

if TYPE_CHECKING:
    from hpc_xvr.dist.comm import Comm

UNFINISHED = 75  # "not done yet, start me again": what job scripts requeue on

_comm: Comm | None = None  # set by the commands that talk to other ranks

settings = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a config value, such as train.steps=100. May be given many times.",
)
a_config = click.argument("config", type=click.Path(path_type=Path))
a_run = click.argument("run", type=click.Path(path_type=Path))
engine = click.option(
    "--engine",
    type=click.Choice(["auto", "serial", "horovod", "torch"]),
    help="How ranks talk (config key dist.engine).",
)


device_of_run = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Default: as the run was trained."
)


class Examples(click.Command):
    """A command whose help ends with examples, printed as they are typed."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def get_short_help_str(self, limit: int = 45) -> str:
        return super().get_short_help_str(max(limit, 100))  # the whole first sentence

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        lines = self.examples.strip().splitlines()
        if lines:
            formatter.write("\nExamples:\n" + "".join(f"  {line.strip()}\n" for line in lines))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="hpc-xvr")
def cli() -> None:
    """A fast blurry camera and a slow sharp one in, a fast sharp x-ray movie out.

    \b
    From camera files to a movie:
      hpc-xvr ingest run12/*.mraw --corpus corpus     camera files -> corpus
      hpc-xvr inspect corpus                          what is in it, is it intact
      mpirun -n 4 hpc-xvr train my.yaml               corpus -> trained model in runs/NAME
      mpirun -n 4 hpc-xvr evaluate runs/NAME          compare on held-out recordings
      hpc-xvr reconstruct runs/NAME --lr fast.tif --hr slow.tif --gap 20 --out movie.tif
      hpc-xvr report runs/NAME                        one page with curves, tables, pictures

    No camera files yet? `hpc-xvr simulate configs/quickstart.yaml` makes a corpus of simulated
    experiments. Every value of a config can be changed with --set section.key=value.
    """


@cli.command(
    cls=Examples,
    examples="""
    hpc-xvr simulate configs/quickstart.yaml
    hpc-xvr simulate configs/quickstart.yaml --set simulate.videos=6 --set data.corpus=runs/six
""",
)
@a_config
@settings
def simulate(config: Path, overrides: tuple[str, ...]) -> None:
    """Make the corpus of simulated two-camera experiments that CONFIG describes.

    The section `simulate` says how many recordings, their size and scenes; `data.corpus` says
    where they go. The same seed gives the same corpus. Uses all cores.
    """
    from hpc_xvr.config import load
    from hpc_xvr.data.phantom import simulate_corpus

    cfg = load(config, overrides)
    if cfg.simulate is None:
        raise InputError(
            f"{config}: has no section 'simulate'; add one, such as "
            "'simulate: {videos: 24, size: [48, 128, 128]}'"
        )
    simulate_corpus(cfg.simulate, cfg.data.corpus)
    _show_corpus(cfg.data.corpus)


@cli.command(
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


@cli.command(
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


@cli.command(
    cls=Examples,
    examples="""
    mpirun -n 2 hpc-xvr train configs/pulse.yaml
    mpirun -n 5 hpc-xvr train configs/published.yaml --set data.corpus=corpus --resume
    hpc-xvr train configs/quickstart.yaml --set run.dir=runs/mine --set train.steps=100
    hpc-xvr train configs/published.yaml --find-batch
""",
)
@a_config
@settings
@engine
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the run folder's newest valid checkpoint, or start if none.",
)
@click.option(
    "--find-batch",
    is_flag=True,
    help="Train nothing: measure speed and memory of micro-batches, one process.",
)
def train(
    config: Path, overrides: tuple[str, ...], engine: str | None, resume: bool, find_batch: bool
) -> None:
    """Train the model of CONFIG; start it with mpirun for more than one rank.

    The global batch is fixed by the config and shared by the ranks, so the same run gives the
    same losses on any number of them. Everything goes to the run folder (run.dir): config,
    metrics.jsonl, TensorBoard events, checkpoints, sample pictures.

    Exit codes: 0 done, 2 bad input, 75 stopped by SIGUSR1, SIGTERM or SIGINT with a checkpoint
    (start again with --resume). Under mpirun send SIGUSR1: it reaches every rank.
    """
    from hpc_xvr.config import load

    cfg = load(config, overrides)
    comm = _connect(engine or cfg.dist.engine, cfg.run.device, cfg.dist.timeout_s)
    if find_batch:
        from hpc_xvr.train.find_batch import find_batch as measure

        measure(cfg, comm)
        return
    from hpc_xvr.train.engine import Trainer

    trainer = Trainer(cfg, comm, resume)
    finished = trainer.run()
    trainer.close()
    comm.close()
    comm.leave(0 if finished else UNFINISHED)


@cli.command(
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
@device_of_run
@engine
def evaluate(run: Path, engine: str | None, device: str | None, **options: Any) -> None:
    """Compare the model of RUN with methods that need no training, on held-out recordings.

    Each recording is degraded to what the fast camera would see, reconstructed from it and from a
    key frame every --gap frames, and compared with the truth: PSNR (dB), SSIM and AAD on the
    8-bit scale, key frames excluded. Ranks share the recordings.
    """
    comm = _connect(engine or "auto", device or _device_of(run), timeout_s=7 * 86400)
    from hpc_xvr.evaluate.workflow import evaluate_run

    evaluate_run(run, comm, **options)
    comm.close()
    comm.leave(0)


@cli.command(
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
@device_of_run
def reconstruct(run: Path, device: str | None, **options: Any) -> None:
    """Make the fast sharp movie with the model of RUN.

    Either from two camera files of the same field of view (--lr and --hr, first frames at the
    same instant, one sharp frame every --gap fast ones), or from a recording of a corpus.
    """
    from hpc_xvr.dist.launch import discover
    from hpc_xvr.reconstruct.workflow import reconstruct_run

    if discover().size > 1:
        raise InputError("reconstruct is one process; start it without mpirun")
    comm = _connect("serial", device or _device_of(run))
    reconstruct_run(run, comm.device, **options)


@cli.command(cls=Examples, examples="hpc-xvr report runs/quickstart")
@a_run
def report(run: Path) -> None:
    """Write RUN/report.html: one page with curves, tables, pictures and settings.

    The page needs nothing but itself: send it, archive it, open it anywhere.
    """
    from hpc_xvr.evaluate.report import write_report

    click.echo(f"written: {write_report(run)}")


def _device_of(run: Path) -> str:
    from hpc_xvr.config import load

    return load(run / "config.yaml").run.device if (run / "config.yaml").exists() else "auto"


def _connect(engine: str, device: str, timeout_s: float = 600.0) -> Comm:
    global _comm
    from hpc_xvr import log
    from hpc_xvr.dist.launch import discover, keep_freed_memory

    if device != "cuda":
        keep_freed_memory()
    from hpc_xvr.dist.comm import connect

    launch = discover()
    log.setup(launch.rank, launched=launch.launcher is not None)
    _comm = connect(engine, device, timeout_s)  # type: ignore[arg-type]
    return _comm


def _leave(code: int) -> None:
    """End with an exit code; every rank's buffers are written."""
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)


def main() -> None:
    """Run the command line; bad input is one line and exit code 2, on one rank or many."""
    from hpc_xvr import log

    log.setup()
    try:
        cli(prog_name="hpc-xvr", standalone_mode=False)
    except click.exceptions.Abort:
        _leave(130)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code, collective=True)
    except InputError as error:
        _fail(str(error), 2, collective=type(error).__name__ == "CollectiveError")
    except OSError as error:
        if error.errno is None:  # no trouble of the system's: one of our own
            _crash()
        from hpc_xvr.errors import explain_os_error

        _fail(f"{error.filename or 'input or output'}: {explain_os_error(error)}", 2)
    except Exception:
        _crash()


def _crash() -> None:
    """Print the traceback being handled and end every rank."""
    from hpc_xvr.dist.launch import abort_world

    where = "" if _comm is None or _comm.size == 1 else f"[rank {_comm.rank}] failed:\n"
    print(f"{where}{traceback.format_exc()}", file=sys.stderr, flush=True)
    if _comm is not None and _comm.size > 1:
        _comm.abort(1)
    abort_world(1)
    _leave(1)


def _fail(message: str, code: int, collective: bool = False) -> None:
    """Print one line and end the job; ranks that fail alike leave the talking to rank 0."""
    from hpc_xvr.dist.launch import abort_world, discover

    try:
        rank = discover().rank
    except InputError:
        rank = 0
    if rank and _comm is None:
        time.sleep(2)  # before the ranks know each other: rank 0 most likely has the same trouble
    if rank == 0 or not collective:
        where = f"[rank {rank}] " if rank else ""
        print(f"hpc-xvr: error: {where}{message}", file=sys.stderr, flush=True)
    if _comm is not None and _comm.size > 1 and not collective:
        _comm.abort(code)
    if _comm is not None:
        _comm.leave(code)
    abort_world(code)
    _leave(code)
