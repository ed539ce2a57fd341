"""From a trained model and the recordings of two cameras to a file of sharp frames."""

from __future__ import annotations

import copy
import hashlib
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hpc_xvr.config import Config
from hpc_xvr.data.ranks import ONE_RANK, Ranks
from hpc_xvr.errors import BAD_INPUT, InputError, PassingError
from hpc_xvr.factory.execution import use_threads
from hpc_xvr.factory.weights import Which
from hpc_xvr.files import check_spared, remove_partials
from hpc_xvr.log import logger, progress_bar
from hpc_xvr.reconstruction.material import (
    Material,
    Source,
    check_agreement,
    check_gaps,
    material_of,
)
from hpc_xvr.reconstruction.methods import NamedMethod, model_entry, open_method
from hpc_xvr.reconstruction.overlap import Behind, Beside, Stopped, ahead
from hpc_xvr.reconstruction.pipeline import Piece, Reconstruction, common
from hpc_xvr.reconstruction.provenance import facts_of, provenance_of, read_places
from hpc_xvr.reconstruction.spool import Spool
from hpc_xvr.reconstruction.streams import (
    remembered,
)
from hpc_xvr.reconstruction.tiles import in_tiles
from hpc_xvr.reconstruction.trust import held_out
from hpc_xvr.reconstruction.trust.examination import (
    PER_FRAME,
    Asked,
    Examination,
    Examiner,
    Examining,
    examining,
    trust_file,
)
from hpc_xvr.reconstruction.trust.observation import SQUARE
from hpc_xvr.reconstruction.writers import (
    Calibration,
    Doubt,
    Dtype,
    check_movie,
    check_sequence,
    frames_shown,
    open_movie,
    write_sequence,
)
from hpc_xvr.version import __version__

MOVIE_FPS = {".mp4": 24.0}
"""Frames a second of the movie; of others 8."""
_AHEAD = 1
"""Passes of a method whose frames are read before they are needed."""
_REMEMBERED = 4
"""Gaps whose frames are kept for who looks at the result of a pass."""


class Finished(Protocol):
    """Knows which results of a call are there already."""

    def finished(self, out: Path, facts: Mapping[str, str]) -> bool:
        """Was `out` made from the same, and is it still as it was?"""
        ...

    def note(self, out: Path, facts: Mapping[str, str]) -> None:
        """`out` is finished."""
        ...


@dataclass(frozen=True)
class Wanted:
    """Which frames are made of a recording, and how.

    Args:
        frames: first one and the one after the last, numbers of fast frames; None: the first there
            is, and the end.
        beyond: also frames before the first and after the last key frame, from that one alone.
        dtype: of the numbers in the file, see `write_sequence`.
        force: go on where key frames lie further apart than the weights were trained for, or the
            cameras do not agree.
        alone: the movie shows the result only.
        command: the command line, stored with the result.
        trust: what is to be told of how far the result may be believed.
        tile: side in sharp pixels of the tiles that frames are made in; None: whole frames.
    """

    frames: tuple[int | None, int | None] = (None, None)
    beyond: bool = False
    dtype: Dtype = "uint16"
    force: bool = False
    alone: bool = False
    command: str = ""
    trust: Asked = field(default_factory=Asked)
    tile: int | None = None


def reconstruct_run(
    what: Path | str,
    device: torch.device,
    source: Source,
    *,
    out: Path,
    movie: Path | None = None,
    which: Which = "newest",
    wanted: Wanted = Wanted(),
    refine: Callable[[NamedMethod, Material], NamedMethod] | None = None,
    ranks: Ranks = ONE_RANK,
) -> Path:
    """Reconstruct every frame from the first key frame to the last and write `out`. All ranks call
    it alike and share the gaps.

    Camera files must be read as they were for training. `movie` shows low resolution and result
    side by side, and the truth if it is known. Finished gaps are kept beside `out` (see `spool`)
    until it is complete: the same call goes on where a killed one was.

    Args:
        what: see `open_method`.
        refine: makes of the method one that suits the recording better.

    Raises:
        InputError: there is no such method, files cannot be read or do not fit, or the result
            cannot be written.
    """
    method = open_method(what, device, which)
    use_threads((method.config or Config()).run.threads)
    reconstruct_with(
        method, device, source, out=out, movie=movie, wanted=wanted, refine=refine, ranks=ranks
    )
    return out


def reconstruct_with(
    method: NamedMethod,
    device: torch.device,
    source: Source,
    *,
    out: Path,
    movie: Path | None = None,
    wanted: Wanted = Wanted(),
    refine: Callable[[NamedMethod, Material], NamedMethod] | None = None,
    ranks: Ranks = ONE_RANK,
    ledger: Finished | None = None,
) -> bool:
    """The same with a method that is open.

    Returns False if the result was there already, as `ledger` says.
    """

    method = ranks.together(lambda: in_tiles(method, wanted.tile))
    beside = out.with_name(f"{out.name}.json"), trust_file(out)
    asked = movie, wanted.trust.uncertainty, wanted.trust.maps
    files = [path for path in (out, *beside, *asked) if path]

    def look() -> tuple[Material, range]:
        material = material_of(method, source)
        check_spared(files, read_places(method, source))
        frames = chosen_frames(material, wanted, str(out))
        check_agreement(material.doubt, wanted.force)
        check_gaps(method, list(material.keys), wanted.force, frames)
        check_sequence(out, wanted.dtype)  # before minutes of work
        if movie:
            check_movie(movie)
        if material.places is not None and wanted.dtype != "float32":
            raise InputError("--lr-missing nan: integers have no NaN; give --dtype float32 too")
        _check_trust(material, wanted, out)
        return material, frames

    material, frames = ranks.together(look)
    keys = material.keys
    facts = {
        "method": method.fingerprint,
        "adaptation": "yes" if refine else "no",
        "sources": facts_of(source),
        "pictures": _glance(material),
        "frames": f"{frames.start}:{frames.stop}",
        "numbers": wanted.dtype,
        "tile": str(wanted.tile),
        "device": device.type,
        "version": __version__,
    }
    of_result = {**facts, "trust": str(wanted.trust)}
    if ledger and ranks.on_root(lambda: ledger.finished(out, of_result)):
        return False
    kind = "uint16" if wanted.dtype == "uint16" else "float32"
    spool = Spool(out, facts, keys.shape, kind, ranks)
    keep = True
    if ranks.rank == 0:  # what killed calls have left
        for path in files:
            remove_partials(path)
    try:
        if refine:
            method = _refined(refine, method, material, spool, ranks)
        name = f"{method.name} at step {method.step}" if method.step else method.title
        if ranks.rank == 0:
            _say_frames(name, frames, material)
        calibration = _noted(material, frames)
        about, looked = None, _Looking()
        if ranks.rank == 0:
            lr, keys = remembered(material.lr, keys, _REMEMBERED)
            material = replace(material, lr=lr, keys=keys)
            about = provenance_of(
                method, source, wanted.command, dtype=wanted.dtype, force=wanted.force
            )
            about.settings |= {"tile": wanted.tile} if wanted.tile else {}
            about.settings |= {"adapted": True} if refine else {}
            about.extra["key_frames"] = [t for t in keys if t in frames]

        def write(made: Iterator[np.ndarray]) -> None:
            assert about
            written, first, count = looked.through(frames, made), frames.start, len(frames)
            numbers: list[int | None] = list(frames)
            if material.places is not None:
                places = material.places[frames.start : frames.stop]
                written = _with_gaps(written, places)
                first, count = int(places[0]), int(places[-1] - places[0]) + 1
                at = dict(zip((places - first).tolist(), frames, strict=True))
                numbers = [at.get(i) for i in range(count)]
            about.extra["trust"] = _Later(lambda: looked.found.gist(out))
            for name in PER_FRAME:
                about.per_frame[name] = _Later(partial(looked.per_frame, name, numbers))
            write_sequence(out, written, count, calibration, first, wanted.dtype, about)

        with ExitStack() as stack:
            ranks.on_root(
                lambda: looked.begin(
                    stack.enter_context(
                        examining(
                            *(method, (material.lr, keys), calibration, wanted.trust, out),
                            *(frames, device),
                        )
                    )
                )
            )
            ranks.together(lambda: _make(method, material, device, frames, spool, write, ranks))
            ranks.on_root(stack.pop_all().close)
        if movie and ranks.rank == 0:
            _show(movie, method, material, frames, spool, wanted, looked)
        if ledger and ranks.rank == 0:
            ledger.note(out, of_result)
        keep = False
    except PassingError:
        raise
    except InputError as error:
        keep = error.exit_code != BAD_INPUT
        raise
    finally:
        spool.close(keep)
    return True


def _check_trust(material: Material, wanted: Wanted, out: Path) -> None:
    """Refuse what cannot be told of this recording, before minutes of work."""
    asked = wanted.trust
    asked.verify(out)
    if asked.check:
        held_out.left_out(list(material.keys))
    if asked.uncertainty and wanted.beyond:
        raise InputError(
            "--uncertainty with --beyond: how far frames made from one key frame are wrong is not "
            "known; leave one of the two out"
        )
    if (asked.uncertainty or asked.maps) and material.places is not None:
        raise InputError(
            "--uncertainty and --maps have no frames of NaN: give --lr-missing skip instead of nan"
        )


class _Later:
    """A value of a provenance that is known when all frames are made."""

    def __init__(self, value: Callable[[], Any]) -> None:
        self.result = value


class _Looking:
    """Compares the frames with the fast camera's on their way to the file."""

    def __init__(self) -> None:
        self._examining: Examining | None = None

    def begin(self, examining: Examining) -> None:
        """From now on."""
        self._examining = examining

    def through(self, frames: range, made: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The frames as they are to be written."""
        assert self._examining
        numbered = zip(frames, made, strict=True)
        return (frame for _, frame in self._examining.through(numbered))

    @property
    def found(self) -> Examination:
        """What was found so far."""
        assert self._examining
        return self._examining.found

    def per_frame(self, name: str, numbers: Sequence[int | None]) -> list[Any]:
        """See `Examination.per_frame`."""
        return self.found.per_frame(numbers)[name]

    @property
    def examiner(self) -> Examiner:
        """Which looks at single frames."""
        assert self._examining
        return self._examining.examiner


def _make(
    method: NamedMethod,
    material: Material,
    device: torch.device,
    frames: range,
    spool: Spool,
    write: Callable[[Iterator[np.ndarray]], None],
    ranks: Ranks,
) -> None:
    """Make what is missing, this rank's share of it, and on rank 0 `write` the frames meanwhile."""
    work = work_of(method, material, device, frames)
    pieces = work.pieces()
    finished = spool.finished(pieces, ranks, work.made_of)
    missing = [piece for piece in pieces if piece not in finished]
    behind = len(frames) - sum(len(piece.frames) for piece in missing)
    if ranks.rank == 0:
        if behind:
            logger.info("%s: %d of %d frames were finished before", spool.out, behind, len(frames))
        _check_room(spool, len(frames), len(frames) - behind)

    def write_all(over: threading.Event) -> None:
        with progress_bar("reconstructing", len(frames), "frames", behind) as advance:

            def results() -> Iterator[np.ndarray]:
                for piece in pieces:
                    yield from spool.frames([piece], over)
                    if piece not in finished:
                        advance(len(piece.frames))

            write(results())

    mine: deque[Piece] = deque()

    def dealt() -> Iterator[Piece]:
        for piece in spool.deal(missing, ranks):
            mine.append(piece)
            yield piece

    writing = Beside(write_all) if ranks.rank == 0 else None
    begun = time.perf_counter()
    try:
        with (
            writing or nullcontext(),
            ahead(work.load(dealt()), _AHEAD) as loads,
            _saving(spool) as saving,
        ):
            made = work.run(loads)
            for _, first in made:
                piece = mine.popleft()
                rest = islice(made, len(piece.frames) - 1)
                saving.give((piece, [first, *(frame for _, frame in rest)]))
                if writing:
                    writing.check()
                if spool.failed():
                    raise Stopped
    except Stopped:
        return  # the rank that failed says why
    except BaseException:
        spool.fail()
        raise
    if ranks.rank == 0:
        seconds = time.perf_counter() - begun
        logger.info(
            "written: %s (%d frames, %.3g frames/s)",
            *(spool.out, len(frames), (len(frames) - behind) / seconds),
        )


def _with_gaps(frames: Iterator[np.ndarray], places: np.ndarray) -> Iterator[np.ndarray]:
    """The frames, and frames of NaN at the places that none of them has."""
    before = int(places[0]) - 1
    for place, frame in zip(places.tolist(), frames, strict=True):
        for _ in range(place - before - 1):
            yield np.full_like(frame, np.nan)
        yield frame
        before = place


def _saving(spool: Spool) -> Behind[tuple[Piece, list[np.ndarray]]]:
    return Behind(lambda done: spool.save(*done))


def _check_room(spool: Spool, count: int, missing: int) -> None:
    """Refuse a disk that cannot hold the result and, until it is complete, its pieces."""
    needed = spool.bytes_of(count + missing)
    free = shutil.disk_usage(spool.folder).free
    if needed > free:
        raise PassingError(
            f"{spool.out}: needs {needed / 1e9:.2f} GB while it is made (the file, and as much for "
            f"finished frames), {spool.out.parent} has {free / 1e9:.2f} GB left; choose another "
            "disk, or make it in parts with --frames"
        )


def work_of(
    method: NamedMethod, material: Material, device: torch.device | str, frames: range | None = None
) -> Reconstruction:
    """How a method makes frames of a recording; default: all from the first key frame to the
    last."""
    return Reconstruction(
        method.method,
        material.lr,
        material.keys,
        lr_frames=1 if method.lr_frames is None else method.lr_frames,
        n_out=method.n_out,
        device=device,
        precision=method.precision,
        frames=frames,
    )


def frames_of(
    method: NamedMethod,
    material: Material,
    device: torch.device | str,
    frames: range | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """All frames from the first key frame to the last, or these, see `reconstruct`."""
    work = work_of(method, material, device, frames)
    return work.run(work.load(work.pieces()))


def chosen_frames(material: Material, wanted: Wanted, name: str) -> range:
    """The frames that are made.

    Raises:
        InputError: there are none, or some lie where they cannot be made.
    """
    first, last = min(material.keys), max(material.keys)
    there = range(len(material.lr)) if wanted.beyond else range(first, last + 1)
    start, stop = wanted.frames
    start = there.start if start is None else start
    stop = there.stop if stop is None else stop
    if not there.start <= start < stop <= there.stop:
        more = "" if wanted.beyond else _beyond(material)
        raise InputError(
            f"{name}: frames {start}:{stop} are asked for (the second one is the end, not made); "
            f"frames {there.start}:{there.stop} of the fast camera can be made{more}"
        )
    return range(start, stop)


def _beyond(material: Material) -> str:
    first, last, length = min(material.keys), max(material.keys), len(material.lr)
    if first == 0 and last == length - 1:
        return ""
    return (
        f", as key frames are there from {first} to {last}; with --beyond 0:{length}, those "
        "outside from one key frame alone"
    )


def one_sided(material: Material, frames: range) -> list[range]:
    """Those of the frames that lie beyond the first or the last key frame."""
    first, last = min(material.keys), max(material.keys)
    sides = common(frames, range(first)), common(frames, range(last + 1, len(material.lr)))
    return [side for side in sides if side]


def _noted(material: Material, frames: range) -> Calibration:
    """Units of the result, and which of its frames are worth less."""
    notes = [
        f"frames {side.start} to {side.stop - 1} are one-sided: they lie beyond the outermost key "
        "frame and are made from that one alone"
        for side in one_sided(material, frames)
    ]
    calibration = material.calibration
    return replace(calibration, notes=(*calibration.notes, *notes)) if notes else calibration


def _say_frames(name: str, frames: range, material: Material) -> None:
    size = material.keys.shape
    logger.info("%s: frames %d to %d of %dx%d pixels", name, frames[0], frames[-1], *size)
    if all(t in material.keys for t in frames):
        logger.warning(
            "all of these %d frames are key frames, which are passed through as recorded: nothing "
            "is reconstructed; check --gap and --frames",
            len(frames),
        )
    for side in one_sided(material, frames):
        logger.warning(
            "frames %d to %d lie beyond the outermost key frame: they are made from that one "
            "alone, look at them with care",
            *(side[0], side[-1]),
        )
    first, last = min(material.keys), max(material.keys)
    if frames == range(first, last + 1):
        for side in one_sided(material, range(len(material.lr))):
            logger.info(
                "frames %d to %d lie beyond the outermost key frame and are left out; --beyond "
                "makes them, too",
                *(side[0], side[-1]),
            )


def _glance(material: Material) -> str:
    """A checksum of some pictures: the files may be as they were, but not what they lead to."""
    digest = hashlib.sha256()
    times = sorted(material.keys)
    for t in (times[0], times[len(times) // 2], times[-1]):
        for frame in (material.keys[t], material.lr[t]):
            digest.update(np.ascontiguousarray(frame).data)
    return digest.hexdigest()[:16]


def _refined(
    refine: Callable[[NamedMethod, Material], NamedMethod],
    method: NamedMethod,
    material: Material,
    spool: Spool,
    ranks: Ranks,
) -> NamedMethod:
    """The refined method; its weights stay with the finished pieces, as another time others might
    come out."""
    file = spool.folder / "weights.pt"

    def make() -> None:
        if file.exists():
            logger.info("%s: the weights of the unfinished run are used", spool.out)
            return
        refined = refine(method, material).network
        assert refined is not None
        beside = file.with_name(f".{file.name}")
        torch.save(refined.state_dict(), beside)
        beside.replace(file)

    ranks.on_root(make)
    network = copy.deepcopy(method.network)
    assert network is not None
    network.load_state_dict(torch.load(file, weights_only=True))
    refined = model_entry(method.name, network.eval(), method.precision)
    refined = replace(refined, config=method.config, step=method.step)
    return in_tiles(refined, method.tile, quiet=True)


def _show(
    movie: Path,
    method: NamedMethod,
    material: Material,
    frames: range,
    spool: Spool,
    wanted: Wanted,
    looked: _Looking,
) -> None:
    """The movie of the result."""
    truth = material.truth
    labels = ["fast camera", "reconstruction", *(["truth"] if truth else [])]
    labels = labels[1:2] if wanted.alone else labels
    shown = frames_shown(movie, frames, material.keys)
    fps = MOVIE_FPS.get(movie.suffix.lower(), 8.0) / shown.step
    about, result = material.calibration, 0 if wanted.alone else 1
    with open_movie(movie, fps, labels, calibration=about, comment=wanted.command) as film:
        made = spool.frames(work_of(method, material, "cpu", frames).pieces())
        for t, frame in zip(frames, made, strict=True):
            if t not in shown:
                continue
            if wanted.trust.enforce:
                frame = looked.examiner.look(t, frame).frame
            panels = [material.lr[t], frame, *([truth(t)] if truth else [])]
            told = [*labels]
            if t in material.keys:
                told[result] = "key frame, as recorded"
            doubt = _doubt(looked.found, t, result)
            film.add(panels[1:2] if wanted.alone else panels, t, doubt, told)
    logger.info("written: %s", movie)
    if flagged := looked.found.contradicts:
        logger.info(
            "%s marks the frames that contradict the fast camera; it shows %d of these %d",
            *(movie, len(film.marked), len(flagged)),
        )


def _doubt(found: Examination, t: int, panel: int) -> Doubt | None:
    """The mark of a frame that contradicts the measurement."""
    if t not in found.place:
        return None
    side = SQUARE * found.around.camera.scale
    return Doubt(panel, "contradicts fast camera", found.place[t], side)
