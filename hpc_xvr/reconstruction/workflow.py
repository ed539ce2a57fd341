"""From a trained model and the recordings of two cameras to a file of sharp frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from hpc_xvr.config import Config
from hpc_xvr.data.cameras import Recording
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.pairing.agreement import Grey, compare, grey_of, told
from hpc_xvr.data.pairing.joining import Pair, Pairing, joined
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.errors import InputError
from hpc_xvr.factory.execution import use_threads
from hpc_xvr.factory.weights import Which
from hpc_xvr.log import logger, track
from hpc_xvr.reconstruction.methods import NamedMethod, open_method
from hpc_xvr.reconstruction.pipeline import WHOLE_GAP, reconstruct
from hpc_xvr.reconstruction.streams import (
    KeyFrames,
    Stream,
    recording_streams,
    remembered,
    streams_of_pair,
)
from hpc_xvr.reconstruction.trust.examination import Wanted, examining
from hpc_xvr.reconstruction.writers import (
    Calibration,
    check_movie,
    check_sequence,
    write_movie,
    write_sequence,
)

MOVIE_FPS = 8


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
    """A recording of a corpus, degraded to what the two cameras would have seen or, with
    `data.lr_source: recorded`, with the fast camera's own stream."""

    corpus: Path | None
    """None: the corpus that the model was trained on."""
    video: str
    gap: float | None = None
    """Frames from key frame to key frame; None: as the model was trained."""


Source = CameraFiles | CorpusRecording


@dataclass(frozen=True)
class Material:
    """The input of a reconstruction, and the units of its result."""

    lr: Stream
    keys: KeyFrames
    calibration: Calibration
    truth: Callable[[int], np.ndarray] | None = None
    """Time -> true frame (H, W) in [0, 1], if it is known."""


def reconstruct_run(
    what: Path | str,
    device: torch.device,
    source: Source,
    *,
    out: Path,
    movie: Path | None = None,
    which: Which = "newest",
    force: bool = False,
    dtype: Literal["uint16", "float32"] = "uint16",
    refine: Callable[[NamedMethod, Material], NamedMethod] | None = None,
    wanted: Wanted | None = None,
) -> Path:
    """Reconstruct every frame from the first key frame to the last and write `out`.

    Camera files must be read as they were for training. `movie` shows low resolution and result
    side by side, and the truth if it is known.

    Args:
        what: see `open_method`.
        force: go on where key frames lie further apart than the weights were trained for.
        dtype: of the numbers in `out`, see `write_sequence`.
        refine: makes of the method one that suits the recording better.
        wanted: what is to be told of how far the result may be believed.

    Raises:
        InputError: there is no such method, files cannot be read or do not fit, or the result
            cannot be written.
    """
    method = open_method(what, device, which)
    config = method.config or Config()
    use_threads(config.run.threads)
    material = material_of(method, source)
    keys, truth = material.keys, material.truth
    check_gaps(method, list(keys), force)
    check_sequence(out)  # before minutes of work
    wanted = wanted or Wanted()
    wanted.verify(out)
    if movie:
        check_movie(movie)
    if refine:
        method = refine(method, material)
    first, last = min(keys), max(keys)
    count = last - first + 1
    name = f"{what} at step {method.step}" if method.step else method.title
    logger.info("%s: frames %d to %d of %dx%d pixels", name, first, last, *keys.shape)
    shown: list[tuple[np.ndarray, ...]] = []

    def results(frames: Iterator[tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
        stride = -(-count // 60)
        for t, frame in track(frames, "reconstructing", count, "frames"):
            if movie and (t - first) % stride == 0:
                shown.append((material.lr[t], frame, *([truth(t)] if truth else [])))
            yield frame

    lr, keys = streams = remembered(material.lr, keys)
    material = replace(material, lr=lr, keys=keys)
    with examining(method, streams, material.calibration, wanted, out, device) as looked:
        frames = looked.through(frames_of(method, material, device))
        write_sequence(out, results(frames), count, material.calibration, first, dtype)
    logger.info("written: %s (%d frames)", out, count)
    if movie:
        labels = ["fast camera", "reconstruction", *(["truth"] if truth else [])]
        write_movie(movie, shown, MOVIE_FPS, labels)
        logger.info("written: %s", movie)
    return out


def frames_of(
    method: NamedMethod, material: Material, device: torch.device | str
) -> Iterator[tuple[int, np.ndarray]]:
    """All frames from the first key frame to the last, see `reconstruct`."""
    return reconstruct(
        method.method,
        material.lr,
        material.keys,
        lr_frames=1 if method.lr_frames is None else method.lr_frames,
        n_out=method.n_out,
        device=device,
        precision=method.precision,
    )


def _material(
    method: NamedMethod,
    streams: tuple[Stream, KeyFrames],
    calibration: Calibration,
    truth: Callable[[int], np.ndarray] | None = None,
) -> Material:
    """The input of a reconstruction; networks that carry key frames refuse those that show
    nothing."""
    lr, keys = streams
    if method.lr_frames == WHOLE_GAP:
        read = keys.__getitem__
        keys = KeyFrames(list(keys), keys.shape, lambda t: _with_a_picture(read(t), t))
    return Material(lr, keys, calibration, truth)


def _with_a_picture(frame: np.ndarray, t: int) -> np.ndarray:
    if frame.min() == frame.max():
        raise InputError(
            f"the key frame at frame {t}: all its pixels are {frame.flat[0]:g} of full scale, so "
            "there is nothing to carry; was it lost, or not exposed? leave it out"
        )
    return frame


def check_gaps(method: NamedMethod, times: Sequence[int], force: bool = False) -> None:
    """Refuse key frames that lie further apart than a method was trained for; `force`: warn.

    Raises:
        InputError: says how far, and how far it may be.
    """
    widest = max((b - a for a, b in pairwise(sorted(times))), default=0)
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
    return from_recordings(method, fast, sharp, source.pairing, source.crop)


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
    grey = _agreed(pair, lr, keys, pairing)
    matched = Stream(lr.shape, lambda t: grey.matched(lr[t]))
    return _material(method, (matched, keys), _calibration(pair, grey))


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
    white, unit = sharp.full_scale, ""
    if white == 1.0 and not sharp.in_floats():  # and no file states what its counts mean
        white, unit = float(2**sharp.bit_depth - 1), "counts"
    notes = []
    if grey != Grey():
        notes.append(
            f"grey of the fast camera matched: fast = {grey.gain:.6g} x sharp {grey.offset:+.6g}"
        )
    return Calibration(
        fast.frame_rate_hz,
        sharp.pixel_size_um,
        white,
        unit=unit,
        times_s=fast.times_s,
        notes=tuple(notes),
    )


def _from_corpus(method: NamedMethod, source: CorpusRecording) -> Material:
    config = method.config or Config()
    gap = source.gap or config.data.hr_gap
    if gap != int(gap):
        raise InputError(
            f"gap {gap:g}: must be a whole number of frames for a recording of a corpus"
        )
    video = Corpus(source.corpus or config.data.corpus)[source.video]
    streams = recording_streams(video, int(gap), config.data, seed=config.run.seed)
    info = video.info
    white, unit = info.full_scale, ""
    if white == 1.0 and info.bit_depth < 16:  # floats are stored with 16
        white, unit = float(2**info.bit_depth - 1), "counts"
    calibration = Calibration(info.frame_rate_hz, info.pixel_size_um, white, unit)
    return _material(method, streams, calibration, video.intensity)
