"""The command that makes movies of two cameras' recordings."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from hpc_xvr.cli.common import engine as engine_option
from hpc_xvr.cli.common import force as force_option
from hpc_xvr.cli.common import tile as tile_option
from hpc_xvr.cli.ending import then, typed
from hpc_xvr.cli.trust import take_asked, trust_options
from hpc_xvr.errors import InputError
from hpc_xvr.log import say

if TYPE_CHECKING:
    from collections.abc import Callable

    from hpc_xvr.data.ranks import Ranks
    from hpc_xvr.distributed.comm import Comm
    from hpc_xvr.reconstruction.material import CameraFiles, Material, Source
    from hpc_xvr.reconstruction.methods import NamedMethod
    from hpc_xvr.reconstruction.workflow import Wanted
    from hpc_xvr.reconstruction.writers import Dtype


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr reconstruct builtin --lr fast.tif --hr sharp.tif --gap 20 --out m.h5
    hpc-xvr reconstruct bayes --lr fast.tif --hr sharp.tif --gap 20 --out b.tif
    hpc-xvr reconstruct runs/quickstart --video sim-0001-spray --out spray.tif
    hpc-xvr reconstruct runs/mine --lr fast.dat --hr sharp.cihx --gap 8 \\
        --registration cameras.yaml --crop --out m.tif --movie m.gif
    mpirun -n 4 hpc-xvr reconstruct builtin --lr fast/ --hr sharp/ --gap 20 \\
        --out results/ --skip-bad
    hpc-xvr reconstruct builtin --lr fast.tif --hr sharp.tif --gap 20 --out m.h5 \\
        --check --uncertainty sigma.h5
""",
)
@a_method
@source_options
@click.option(
    "--pairs",
    type=File(),
    metavar="TABLE",
    help="Many shots: .csv or .yaml with lr and hr (paths) for each, and name, gap, start, "
    "registration where they differ.",
)
@click.option(
    "--out",
    required=True,
    type=File(),
    help="Result: .tif (a stack that Fiji opens), .h5 (DXchange), .nxs (NeXus), .zarr (OME-Zarr), "
    "or no suffix for a folder of PNG. OUT.json beside it says what made it. Of many shots: a "
    "folder, or a pattern such as results/{name}.h5.",
)
@click.option(
    "--frames",
    metavar="A:B",
    help="Frames of the fast camera from A up to, not including, B; only gaps that hold some of "
    "them are computed. [default: from the first key frame to the last]",
)
@click.option(
    "--beyond",
    is_flag=True,
    help="Also make the frames before the first and after the last key frame, each from that one "
    "alone; the result says which.",
)
@click.option(
    "--dtype",
    type=click.Choice(["uint16", "float32", "original"]),
    default="uint16",
    show_default=True,
    help="uint16: 0 to 65535, and what 65535 means; float32: physical values (transmission, "
    "counts); original: counts and bits of the sharp camera.",
)
@click.option(
    "--movie",
    type=File(),
    help="Movie to look at (.mp4, .gif, .webp) or strip (.png), with scale bar and time.",
)
@click.option(
    "--movie-shows",
    type=click.Choice(["side-by-side", "result"]),
    default="side-by-side",
    show_default=True,
    help="The fast camera beside the result (and the truth if it is known), or the result alone.",
)
@tile_option
@trust_options
@click.option(
    "--follow",
    is_flag=True,
    help="Reconstruct while the cameras record: HDF5 files or folders of numbered images that "
    "grow; each gap is written when its second key frame is there, into OUT.gaps until OUT is "
    "complete.",
)
@click.option(
    "--silence",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="With --follow: the recordings have ended when no frame has come for so long, unless "
    "their writers say so before. [default: 30]",
)
@click.option(
    "--wait",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="With --follow: time that the cameras have to begin. [default: 600, but a pva:// channel "
    "must be there within 10]",
)
@click.option(
    "--adapt",
    "to_recording",
    is_flag=True,
    help="First adapt the weights to the recording, see `hpc-xvr adapt`.",
)
@force_option
@click.option("--skip-bad", is_flag=True, help="Of many shots, skip those that cannot be used.")
@which_checkpoint
@device_of_run
@engine_option
def reconstruct(
    what: Path,
    device: str | None,
    engine: str | None,
    out: Path,
    frames: str | None,
    beyond: bool,
    dtype: Dtype,
    tile: int | None,
    movie: Path | None,
    movie_shows: str,
    force: bool,
    to_recording: bool,
    follow: bool,
    silence: float | None,
    wait: float | None,
    skip_bad: bool,
    which: Literal["newest", "best"],
    **options: Any,
) -> None:
    """Reconstruct sharp frames at the fast camera's rate.

    WHAT makes the frames: builtin (the weights that come with the package; builtin:NAME for others
    of them), a run folder, a file made by `hpc-xvr export`, weights of the authors' program, or a
    method without learning (bicubic, nearest_hr, linear_hr, detail, adaptive, bayes). The input is
    two camera files (--lr and --hr), two folders of them or a table (--pairs), or a recording of a
    corpus (--video): with its own fast stream or, if it has none or a --gap is given, as the
    cameras would have seen it.

    Give each camera the options that `hpc-xvr ingest` was given for its training data. Without
    --registration, the upper left corners of both cameras' frames must coincide, and a fast pixel
    must be `data.scale` sharp ones wide.

    Ranks share the gaps, or many shots. An interrupted call continues when it is repeated; until
    the result is complete, what is finished lies in a hidden folder beside it.
    """
    from hpc_xvr.config import Dist
    from hpc_xvr.reconstruction.material import CameraFiles
    from hpc_xvr.reconstruction.provenance import command_line
    from hpc_xvr.reconstruction.workflow import Wanted, reconstruct_run
    from hpc_xvr.reconstruction.writers import check_movie, check_sequence

    command = command_line(["hpc-xvr", *sys.argv[1:]])
    alone = movie_shows == "result"
    asked = take_asked(options)
    if asked.check and to_recording:
        raise InputError(
            "--check with --adapt: adapted weights have learned from the key frames that the check "
            "leaves out, and would look better than they are; use one of the two"
        )
    wanted = Wanted(_span(frames), beyond, dtype, force, alone, command, asked, tile)
    pairs = options.pop("pairs")
    if pairs is not None and (options["lr"] or options["hr"] or options["video"]):
        raise InputError("--pairs names the files of both cameras: leave --lr, --hr, --video out")
    if pairs is not None:
        options |= {"lr": pairs, "hr": pairs}  # to be replaced by those of the table
    source = take_source(options)
    serve, out = _channel_out(out)
    follow = follow or serve is not None or _from_channels(source)
    if silence is not None and not follow:
        raise InputError("--silence ends what --follow begins: give --follow, too")
    if wait is not None and not follow:
        raise InputError("--wait is for cameras that are yet to record: give --follow, too")
    if follow:
        _check_followed(source, pairs, to_recording, out)
    several = isinstance(source, CameraFiles) and not follow and _several(source, out, pairs)
    if not several:
        check_sequence(out, dtype)
        asked.verify(out)
        if movie:
            check_movie(movie)
    patient = Dist(timeout_s=7 * 86400)  # ranks may have very different shots
    comm = connect(engine or "auto", device or configured_device(what), patient)
    refine = _adapted if to_recording else None
    if several:
        assert isinstance(source, CameraFiles)
        _reconstruct_several(what, which, source, pairs, comm, out, movie, wanted, refine, skip_bad)
        if comm.is_root:
            then("evaluate", what, "--corpus", "CORPUS", "--out", "RESULTS")
    elif follow:
        from hpc_xvr.reconstruction.channels import follow_channels

        assert isinstance(source, CameraFiles)
        follow_channels(
            *(what, comm.device, source),
            out=out,
            serve=serve,
            movie=movie,
            which=which,
            wanted=wanted,
            silence=30.0 if silence is None else silence,
            wait=wait,
            ranks=comm,
        )
        if comm.is_root:
            _then_after(what, out, movie)
    else:
        reconstruct_run(
            what,
            comm.device,
            source,
            out=out,
            movie=movie,
            which=which,
            wanted=wanted,
            refine=refine,
            ranks=comm,
        )
        if comm.is_root:
            _then_after(what, out, movie)
    comm.close()
    comm.leave(0)


def _channel_out(out: Path) -> tuple[str | None, Path]:
    """The channel that the result is sent to, if it is pva://NAME, and the file it is kept in."""
    from hpc_xvr.data.cameras.pva import channel_of, check_installed

    channel = channel_of(out)
    if channel is None:
        return None, out
    check_installed()
    file = Path(re.sub(r"[^A-Za-z0-9_.-]+", "-", channel).strip("-._") + ".h5")
    say(f"frames are sent to {channel} and kept in {file}")
    return channel, file


def _from_channels(source: Source) -> bool:
    """Does a camera send its frames over EPICS?"""
    from hpc_xvr.data.cameras.pva import channel_of, check_installed
    from hpc_xvr.reconstruction.material import CameraFiles

    if not isinstance(source, CameraFiles):
        return False
    some = any(channel_of(path) for path in (source.lr, source.hr))
    if some:
        check_installed()
    return some


def _check_followed(source: Source, pairs: Path | None, to_recording: bool, out: Path) -> None:
    """Refuse what cannot be done while the cameras record."""
    from hpc_xvr.reconstruction.material import CameraFiles
    from hpc_xvr.reconstruction.recordings import NAME, holds_several

    if not isinstance(source, CameraFiles):
        raise InputError("--follow is for what two cameras record, --lr and --hr, not for --video")
    if pairs is not None or NAME in str(out) or holds_several(source):
        raise InputError(
            "--follow is for one shot, a recording of each camera (--lr and --hr): of several, "
            "start a command for each, or reconstruct them together when they are complete"
        )
    if to_recording:
        raise InputError(
            "--follow with --adapt: weights are adapted to a complete recording; adapt them to an "
            "earlier one (hpc-xvr adapt), or reconstruct once more at the end"
        )


def _then_after(what: Path, out: Path, movie: Path | None) -> None:
    from hpc_xvr.reconstruction.baselines import BASELINES

    if str(what) in BASELINES:
        then("reconstruct", "builtin", *typed(["out"]), "--out", _beside(out, "builtin"))
    elif movie is None:
        then("reconstruct", what, *typed(), "--movie", out.with_suffix(".webp"))
    else:
        then("report", out)


def _span(text: str | None) -> tuple[int | None, int | None]:
    """A:B, either may be left out."""
    if text is None:
        return None, None
    start, colon, stop = text.partition(":")
    if not colon or not all(part.isdecimal() or not part for part in (start, stop)):
        raise InputError(
            f"--frames {text}: give A:B, the first frame and the one after the last (numbers of "
            "the fast camera's frames, the first is 0)"
        )
    return (int(start) if start else None), (int(stop) if stop else None)


def _several(source: CameraFiles, out: Path, pairs: Path | None) -> bool:
    """Are there many shots? Then `out` is a folder or a pattern."""
    from hpc_xvr.reconstruction.recordings import NAME, holds_several

    pattern = NAME in str(out) or out.is_dir()
    if pairs is None and not holds_several(source):
        return pattern and source.lr.is_dir() and source.hr.is_dir()
    if not pattern and out.suffix:
        where = f"{pairs} may name" if pairs else f"{source.lr} and {source.hr} hold"
        raise InputError(
            f"--out {out}: {where} several recordings; give a folder, or a pattern such as "
            "results/{name}" + out.suffix
        )
    return True


def _reconstruct_several(
    what: Path,
    which: Literal["newest", "best"],
    source: CameraFiles,
    pairs: Path | None,
    comm: Comm,
    out: Path,
    movie: Path | None,
    wanted: Wanted,
    refine: Callable[[NamedMethod, Material], NamedMethod] | None,
    skip_bad: bool,
) -> None:
    from hpc_xvr.config import Config
    from hpc_xvr.factory.execution import use_threads
    from hpc_xvr.log import print_table
    from hpc_xvr.reconstruction import recordings
    from hpc_xvr.reconstruction.methods import open_method
    from hpc_xvr.reconstruction.workflow import reconstruct_with

    if movie and recordings.NAME not in str(movie):
        raise InputError(
            f"--movie {movie}: of many shots, give a pattern such as movies/{{name}}.webp"
        )
    trust = wanted.trust
    for file in filter(None, (trust.uncertainty, trust.maps)):
        if recordings.NAME not in str(file):
            raise InputError(f"{file}: of many shots, give a pattern such as maps/{{name}}.h5")
    shots = comm.on_root(
        lambda: (
            recordings.read_pairs(pairs, source) if pairs else recordings.matched(source, skip_bad)
        )
    )
    method = comm.together(lambda: open_method(what, comm.device, which))
    use_threads((method.config or Config()).run.threads)

    def make(shot: recordings.Shot, place: Path, ranks: Ranks, ledger: recordings.Ledger) -> bool:
        asked = replace(
            trust,
            uncertainty=trust.uncertainty and recordings.place_of(trust.uncertainty, shot.name),
            maps=trust.maps and recordings.place_of(trust.maps, shot.name),
        )
        return reconstruct_with(
            method,
            comm.device,
            shot.source,
            out=place,
            movie=recordings.place_of(movie, shot.name) if movie else None,
            wanted=replace(wanted, trust=asked),
            refine=refine,
            ranks=ranks,
            ledger=ledger,
        )

    outcomes = recordings.reconstruct_all(shots, make, out, skip_bad, comm)
    print_table(
        f"Reconstructed: {len(outcomes)} recordings",
        ["recording", "result", "flagged", "file"],
        [
            [o.name, f"bad: {o.problem}" if o.problem else o.status, _flagged(o.out), o.out]
            for o in outcomes
        ],
    )


def _flagged(out: Path) -> str:
    """How many frames of a result contradict the fast camera's."""
    from hpc_xvr.reconstruction.trust.examination import flags_of

    found = flags_of(out)
    return f"{found[0]} of {found[1]}" if found else "-"


def _beside(path: Path, mark: str) -> Path:
    """Another file of that kind."""
    return path.with_name(f"{path.stem}-{mark}{path.suffix}")


def _adapted(method: NamedMethod, material: Material) -> NamedMethod:
    from hpc_xvr.adaptation import adapt

    adapted = adapt(method, material)
    say(f"adapt: {adapted.told()}")
    return adapted.method
