"""From a trained model and the recordings of two cameras to a file of sharp frames."""

from __future__ import annotations

import copy
import glob
import hashlib
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hpc_xvr.config import Config
from hpc_xvr.data.cameras import Recording, camera_files
from hpc_xvr.data.cameras.recording import LEFT_OUT
from hpc_xvr.data.corpus import Corpus, Video
from hpc_xvr.data.corpus.layout import VideoInfo
from hpc_xvr.data.pairing.agreement import Grey, compare, grey_of, told
from hpc_xvr.data.pairing.joining import Pair, Pairing, joined
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.data.ranks import ONE_RANK, Ranks
from hpc_xvr.errors import BAD_INPUT, InputError, PassingError
from hpc_xvr.factory.execution import use_threads
from hpc_xvr.factory.weights import Which
from hpc_xvr.files import remove_partials
from hpc_xvr.log import logger, progress_bar
from hpc_xvr.reconstruction.methods import NamedMethod, model_entry, open_method
from hpc_xvr.reconstruction.overlap import Behind, Beside, Stopped, ahead
from hpc_xvr.reconstruction.pipeline import WHOLE_GAP, Piece, Reconstruction, common
from hpc_xvr.reconstruction.provenance import method_facts, sources_of
from hpc_xvr.reconstruction.spool import Spool
from hpc_xvr.reconstruction.streams import (
    KeyFrames,
    Stream,
    recording_streams,
    remembered,
    streams_of_pair,
    streams_of_recording,
)
from hpc_xvr.reconstruction.trust import held_out
from hpc_xvr.reconstruction.trust.examination import (
    Asked,
    Examiner,
    Examining,
    examining,
    trust_file,
)
from hpc_xvr.reconstruction.writers import (
    Calibration,
    Dtype,
    Provenance,
    check_movie,
    check_sequence,
    open_movie,
    write_sequence,
)
from hpc_xvr.version import __version__

MOVIE_FPS = {".mp4": 24.0}
"""Frames a second of the movie; of others 8."""
SATURATED = 0.005
"""Share of pixels at the largest count that is told."""
_AHEAD = 1
"""Passes of a method whose frames are read before they are needed."""
_REMEMBERED = 4
"""Gaps whose frames are kept for who looks at the result of a pass."""


@dataclass(frozen=True)
class CameraFiles:
    """The files of both cameras of one shot, and how to read and join them."""

    lr: Path
    hr: Path
    lr_camera: CameraReading = field(default_factory=CameraReading)
    hr_camera: CameraReading = field(default_factory=CameraReading)
    pairing: Pairing = field(default_factory=Pairing)
    crop: bool = False


@dataclass(frozen=True)
class CorpusRecording:
    """A recording of a corpus: with its fast camera's own stream or, if it has none or a gap is
    stated, degraded to what two cameras would have seen."""

    corpus: Path | None
    """None: the corpus that the model was trained on."""
    video: str
    gap: float | None = None
    """Frames from key frame to key frame; None: its own, or as the model was trained."""


Source = CameraFiles | CorpusRecording


@dataclass(frozen=True)
class Material:
    """The input of a reconstruction, and the units of its result."""

    lr: Stream
    keys: KeyFrames
    calibration: Calibration
    truth: Callable[[int], np.ndarray] | None = None
    """Time -> true frame (H, W) in [0, 1], if it is known."""
    places: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Place of each frame of `lr` in a result that has a frame of NaN where one is missing; None:
    it has none."""


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
        force: go on where key frames lie further apart than the weights were trained for.
        alone: the movie shows the result only.
        command: the command line, stored with the result.
        trust: what is to be told of how far the result may be believed.
    """

    frames: tuple[int | None, int | None] = (None, None)
    beyond: bool = False
    dtype: Dtype = "uint16"
    force: bool = False
    alone: bool = False
    command: str = ""
    trust: Asked = field(default_factory=Asked)


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

    def look() -> tuple[Material, range]:
        material = material_of(method, source)
        frames = chosen_frames(material, wanted, str(out))
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
        beside = out.with_name(f"{out.name}.json"), trust_file(out)
        for path in (out, *beside, movie, wanted.trust.uncertainty, wanted.trust.maps):
            if path:
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
            about.extra["key_frames"] = [t for t in keys if t in frames]

        def write(made: Iterator[np.ndarray]) -> None:
            written, first, count = looked.through(frames, made), frames.start, len(frames)
            if material.places is not None:
                places = material.places[frames.start : frames.stop]
                written = _with_gaps(written, places)
                first, count = int(places[0]), int(places[-1] - places[0]) + 1
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
    finished = spool.finished(pieces, ranks)
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

    mine = missing[ranks.rank :: ranks.size]
    writing = Beside(write_all) if ranks.rank == 0 else None
    begun = time.perf_counter()
    try:
        with (
            writing or nullcontext(),
            ahead(work.load(mine), _AHEAD) as loads,
            _saving(spool) as saving,
        ):
            made = work.run(loads)
            for piece in mine:
                results = [frame for _, frame in islice(made, len(piece.frames))]
                saving.give((piece, results))
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


def provenance_of(
    method: NamedMethod, source: Source, command: str = "", **settings: Any
) -> Provenance:
    """What is stored with a result: what made it, of what. Checksums are computed meanwhile.

    Raises:
        InputError: a source cannot be read.
    """
    about = Provenance(command, method_facts(method), dict(settings))
    if isinstance(source, CorpusRecording):
        config = method.config or Config()
        corpus = source.corpus or config.data.corpus
        info = Corpus(corpus)[source.video].info
        about.sources = [
            {
                "role": "recording of a corpus",
                "path": str(corpus),
                "recording": source.video,
                "camera_file": info.source,
                "sha256": info.sha256,
            }
        ]
        own = source.gap is None and info.lr_times is not None
        about.settings["gap"] = None if own else source.gap or config.data.hr_gap
        registration = info.registration
    else:
        cameras = {"lr": (source.lr, source.lr_camera), "hr": (source.hr, source.hr_camera)}
        files: dict[str, Path | str | None] = {}
        for role, (path, reading) in cameras.items():
            files |= {role: path, f"{role} flat": reading.flat, f"{role} dark": reading.dark}
            about.settings[role] = reading.described()
        about.sources = sources_of(
            files, {role: bool(reading.missing) for role, (_, reading) in cameras.items()}
        )
        pairing = source.pairing
        registration = pairing.registration
        about.settings |= {
            "gap": pairing.gap,
            "start": pairing.start,
            "match_grey": pairing.match_grey,
            "crop": source.crop,
        }
    about.registration = registration.model_dump(mode="json") if registration else None
    return about


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


def facts_of(source: Source) -> str:
    """A checksum of which files and options a reconstruction comes from: their names, sizes and
    times of change, not their contents."""
    if isinstance(source, CorpusRecording):
        facts: list[Any] = [str(source.corpus), source.video, source.gap]
    else:
        cameras = source.lr_camera, source.hr_camera
        facts = [repr(source.pairing), source.crop, *(c.described() for c in cameras)]
        recordings: list[tuple[Path | str, CameraReading]]
        recordings = [(source.lr, cameras[0]), (source.hr, cameras[1])]
        recordings += [(f, c) for c in cameras for f in (c.flat, c.dark) if f]
        for path, camera in recordings:
            for file in camera_files(path, bool(camera.missing))[0]:
                for one in (file, *_beside_header(file)):
                    found = one.stat()
                    facts.append([str(one.resolve()), found.st_size, found.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def _beside_header(file: Path) -> list[Path]:
    """A Photron recording is a header and its pixels."""
    kinds = (".mraw", ".cih", ".cihx")
    if file.suffix.lower() not in kinds:
        return []
    around = file.parent.glob(f"{glob.escape(file.stem)}.*")
    return sorted(other for other in around if other.suffix.lower() in kinds)


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
    return replace(refined, config=method.config, step=method.step)


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
    fps = MOVIE_FPS.get(movie.suffix.lower(), 8.0)
    about = material.calibration
    with open_movie(movie, fps, labels, calibration=about, comment=wanted.command) as film:
        made = spool.frames(work_of(method, material, "cpu", frames).pieces())
        for t, frame in zip(frames, made, strict=True):
            if not film.wanted:
                film.add(None, t)
                continue
            if wanted.trust.enforce:
                frame = looked.examiner.look(t, frame).frame
            if wanted.alone:
                film.add([frame], t)
            else:
                film.add([material.lr[t], frame, *([truth(t)] if truth else [])], t)
    logger.info("written: %s", movie)


def _material(
    method: NamedMethod,
    streams: tuple[Stream, KeyFrames],
    calibration: Calibration,
    truth: Callable[[int], np.ndarray] | None = None,
) -> Material:
    """The input of a reconstruction; networks that carry key frames refuse those that show
    nothing."""
    lr, keys = streams
    told: set[str] = set()

    def checked(frame: np.ndarray, name: str) -> np.ndarray:
        if frame.min() == frame.max() and name not in told:
            told.add(name)
            logger.warning(
                "%s: all its pixels are %g of full scale: was it lost, or not exposed?",
                *(name, frame.flat[0]),
            )
        return frame

    def key(t: int) -> np.ndarray:
        frame = keys[t]
        if method.lr_frames == WHOLE_GAP:
            return _with_a_picture(frame, t)
        return checked(frame, f"the key frame at frame {t}")

    fast = Stream(lr.shape, lambda t: checked(lr[t], f"frame {t} of the fast camera"))
    return Material(fast, KeyFrames(list(keys), keys.shape, key), calibration, truth)


def _with_a_picture(frame: np.ndarray, t: int) -> np.ndarray:
    if frame.min() == frame.max():
        raise InputError(
            f"the key frame at frame {t}: all its pixels are {frame.flat[0]:g} of full scale, so "
            "there is nothing to carry; was it lost, or not exposed? leave it out"
        )
    return frame


def check_gaps(
    method: NamedMethod,
    times: Sequence[int],
    force: bool = False,
    frames: range | None = None,
) -> None:
    """Refuse key frames that lie further apart than a method was trained for; `force`: warn.

    Args:
        frames: only those that these frames are made from. Beyond the outermost key frame a gap is
            twice as long as what is beyond, see `pipeline.Piece`.

    Raises:
        InputError: says how far, and how far it may be.
    """
    times = sorted(times)
    if frames is not None and method.longest_gap is not None:
        sides = max(times[0] - frames.start, frames.stop - 1 - times[-1])
        if 2 * sides > method.longest_gap:
            problem = (
                f"{method.name}: frames are asked for up to {sides} beyond the outermost key "
                f"frame, with these weights {method.longest_gap // 2} can be made"
            )
            if not force:
                raise InputError(f"{problem}; choose them with --frames, or try with --force")
            logger.warning("%s: look at the result with care", problem)
    gaps = [b - a for a, b in pairwise(times) if frames is None or common(range(a + 1, b), frames)]
    widest = max(gaps, default=0)
    if method.longest_gap is None or widest <= method.longest_gap:
        return
    problem = (
        f"{method.name}: key frames lie up to {widest} fast frames apart, these weights were "
        f"trained for {method.longest_gap} at most"
    )
    if not force:
        raise InputError(f"{problem}; check --gap, use other weights, or try with --force")
    logger.warning("%s: look at the result with care", problem)


def material_of(method: NamedMethod, source: Source) -> Material:
    """Open a recording of a corpus, or read the files of both cameras and join them (see
    `from_recordings`)."""
    if isinstance(source, CorpusRecording):
        return _from_corpus(method, source)
    sharp = source.hr_camera.open(source.hr)
    fast = source.lr_camera.on_scale_of(source.hr_camera).open(source.lr)
    material = from_recordings(method, fast, sharp, source.pairing, source.crop)
    if source.lr_camera.missing != "nan" or fast.numbers is None:
        return material
    places = np.rint(fast.numbers).astype(int)
    if (np.diff(places) < 1).any():
        raise InputError(
            f"{fast.path}: its time stamps are too uneven for frames of NaN at the missing ones: "
            "give --lr-missing skip"
        )
    calibration = replace(material.calibration, times_s=None)  # equally spaced again
    return replace(material, places=places, calibration=calibration)


def from_recordings(
    method: NamedMethod, fast: Recording, sharp: Recording, pairing: Pairing, crop: bool = False
) -> Material:
    """Join two cameras' recordings as a method needs them.

    If `pairing` states no gap, it follows from the frame rates or, if they are unknown, is the one
    that the model was trained with. A method without learning works at any scale: that of the
    registration, else that of the frames' sizes.

    Raises:
        InputError: the recordings do not fit each other or the model, or the gap is not known.
    """
    pairing = pairing.timed(f"{sharp.path} with {fast.path}")
    if pairing.gap is None:
        if fast.frame_rate_hz and sharp.frame_rate_hz:
            gap, source = fast.frame_rate_hz / sharp.frame_rate_hz, "from the frame rates"
        elif method.config:
            gap, source = float(method.config.data.hr_gap), "as the model was trained"
        else:
            raise InputError(
                f"{sharp.path} with {fast.path}: no frame rates are known, so neither is the gap; "
                "state it with --gap (fast frames from one sharp frame to the next)"
            )
        say = logger.info if fast.frame_rate_hz and sharp.frame_rate_hz else logger.warning
        say("a sharp frame every %g fast ones, %s (state it with --gap)", gap, source)
        pairing = replace(pairing, gap=gap)
    if method.config:
        scale: int = method.config.data.scale
    else:
        registration = pairing.registration
        ratio = registration.scale if registration else sharp.shape[1] / fast.shape[1]
        scale = max(1, round(ratio))
    pair = joined(sharp, fast, pairing, scale, crop)
    lr, keys = streams_of_pair(pair, scale)
    _say_if_saturated(pair, lr, keys)
    grey = _agreed(pair, lr, keys, pairing)
    matched = Stream(lr.shape, lambda t: grey.matched(lr[t]))
    return _material(method, (matched, keys), _calibration(pair, grey))


def _say_if_saturated(pair: Pair, lr: Stream, keys: KeyFrames) -> None:
    """Warn of counts that are the largest possible in more than a few pixels of some frames."""
    times = list(keys)[:: -(-len(keys) // 4)]
    for recording, frames in (
        (pair.fast, [lr[t] for t in times]),
        (pair.sharp, [keys[t] for t in times]),
    ):
        share = float(np.mean([frame >= 1 for frame in frames]))
        if share > SATURATED and not recording.in_floats():
            logger.warning(
                "%s: %.2g %% of the pixels are %d, the largest count of %d bit: saturated, and "
                "what is brighter is not known",
                *(recording.path, 100 * share, 2**recording.bit_depth - 1, recording.bit_depth),
            )


def _agreed(pair: Pair, lr: Stream, keys: KeyFrames, pairing: Pairing) -> Grey:
    """Compare the cameras at the key frames' instants; the grey scale to take out."""
    found = compare(lr, keys)
    if found is None:
        return Grey()
    name = f"{pair.sharp.path} with {pair.fast.path}"
    told(found, name, pairing.gap or math.nan)
    return grey_of(found, name) if pairing.match_grey else Grey()


def _calibration(pair: Pair, grey: Grey) -> Calibration:
    """Units of what is made from two cameras: greys are the sharp camera's."""
    sharp, fast = pair.sharp, pair.fast
    white, unit = sharp.full_scale, str(sharp.metadata.get("unit", ""))
    floats = sharp.in_floats()
    if white == 1.0 and not floats:  # and no file states what its counts mean
        white, unit = float(2**sharp.bit_depth - 1), "counts"
    left_out = fast.metadata.get(LEFT_OUT)
    missing = (f"missing frames of the fast camera: {left_out}",) if left_out else ()
    return Calibration(
        fast.frame_rate_hz,
        sharp.pixel_size_um,
        white,
        unit=unit,
        times_s=fast.times_s,
        notes=(*missing, *_grey_notes(grey)),
        bit_depth=None if floats else sharp.bit_depth,
    )


def _from_corpus(method: NamedMethod, source: CorpusRecording) -> Material:
    """A recording of a corpus: with its fast camera's own stream, where it has one and no gap is
    stated, else as the cameras would have seen it."""
    config = method.config or Config()
    video = Corpus(source.corpus or config.data.corpus)[source.video]
    if source.gap is None and video.lr_shape is not None:
        return _from_own_stream(method, video)
    gap = source.gap or config.data.hr_gap
    if gap != int(gap):
        raise InputError(
            f"gap {gap:g}: must be a whole number of frames for a recording of a corpus"
        )
    streams = recording_streams(video, int(gap), config.data, seed=config.run.seed)
    info = video.info
    calibration = Calibration(
        info.frame_rate_hz, info.pixel_size_um, *_white(info), bit_depth=info.bit_depth
    )
    return _material(method, streams, calibration, video.intensity)


def _from_own_stream(method: NamedMethod, video: Video) -> Material:
    """All fast frames of a recording that two cameras took, at the fast camera's times."""
    assert video.lr_shape is not None
    scale = method.config.data.scale if method.config else round(video.shape[1] / video.lr_shape[1])
    lr, keys = streams_of_recording(video, scale)
    name = f"recording {video.id}"
    logger.info("%s: %d frames of its own fast camera, %d key frames", name, len(lr), len(keys))
    info = video.info
    steps = np.diff(info.lr_times or [])
    interval = float(np.median(steps)) if len(steps) else math.nan
    found, grey = compare(lr, keys), Grey()
    if found is not None:
        told(found, name, 1 / interval)
        grey = grey_of(found, name)
    rate, times = info.metadata.get("lr_frame_rate_hz"), None
    if info.frame_rate_hz:
        rate = rate or info.frame_rate_hz / interval
        times = (np.asarray(info.lr_times) - (info.lr_times or [0])[0]) / info.frame_rate_hz
    white, unit = _white(info)
    calibration = Calibration(
        *(rate, info.pixel_size_um, white, unit),
        times_s=times,
        notes=_grey_notes(grey),
        bit_depth=info.bit_depth,
    )
    return _material(method, (Stream(lr.shape, lambda t: grey.matched(lr[t])), keys), calibration)


def _white(info: VideoInfo) -> tuple[float, str]:
    """Value of white, and its unit."""
    if info.full_scale == 1.0 and info.bit_depth < 16:  # floats are stored with 16
        return float(2**info.bit_depth - 1), "counts"
    return info.full_scale, ""


def _grey_notes(grey: Grey) -> tuple[str, ...]:
    if grey == Grey():
        return ()
    return (f"grey of the fast camera matched: fast = {grey.gain:.6g} x sharp {grey.offset:+.6g}",)
