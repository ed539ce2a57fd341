"""What a reconstruction starts from: the streams of both cameras, joined, and the units of its
result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from hpc_xvr.config import Config
from hpc_xvr.data.cameras import Recording
from hpc_xvr.data.cameras.recording import LEFT_OUT
from hpc_xvr.data.corpus import Corpus, Video
from hpc_xvr.data.corpus.layout import VideoInfo
from hpc_xvr.data.pairing.agreement import Grey, compare, grey_of, grey_to_match, told
from hpc_xvr.data.pairing.joining import Pair, Pairing, joined
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.methods import NamedMethod
from hpc_xvr.reconstruction.pipeline import WHOLE_GAP, common
from hpc_xvr.reconstruction.streams import (
    KeyFrames,
    Stream,
    recording_streams,
    streams_of_pair,
    streams_of_recording,
)
from hpc_xvr.reconstruction.writers import (
    Calibration,
)

SATURATED = 0.005
"""Share of pixels at the largest count that is told."""
_LISTED = 8
"""Fast frames that show nothing, after which no more are listed."""


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
Agreed = Callable[[Stream, KeyFrames, str, Pairing], Grey]


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
    doubt: str = ""
    """What certainly does not fit between the cameras, see `check_agreement`."""


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
    method: NamedMethod,
    fast: Recording,
    sharp: Recording,
    pairing: Pairing,
    crop: bool = False,
    agreed: Agreed | None = None,
) -> Material:
    """Join two cameras' recordings as a method needs them.

    If `pairing` states no gap, it follows from the frame rates or, if they are unknown, is the one
    that the model was trained with. A method without learning works at any scale: that of the
    registration, else that of the frames' sizes.

    Args:
        agreed: of recordings that still grow: gives the grey scale to take out, as it is found in
            complete ones.

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
    pair = joined(sharp, fast, pairing, scale, crop, growing=agreed is not None)
    lr, keys = streams_of_pair(pair, scale)
    if agreed is None:
        _look_at_greys(pair, lr, keys)
    name = f"{sharp.path} with {fast.path}"
    if agreed is None:
        slow, quick = sharp.frame_rate_hz, fast.frame_rate_hz
        rates = quick / slow if slow and quick else None
        grey, doubt = _agreed(lr, keys, name, pairing, rates)
    else:
        grey, doubt = agreed(lr, keys, name, pairing), ""
    matched = Stream(lr.shape, lambda t: grey.matched(lr[t]))
    material = _material(method, (matched, keys), _calibration(pair, grey))
    return replace(material, doubt=doubt)


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
            _refuse(problem, "choose them with --frames", force)
    gaps = [b - a for a, b in pairwise(times) if frames is None or common(range(a + 1, b), frames)]
    widest = max(gaps, default=0)
    if method.longest_gap is None or widest <= method.longest_gap:
        return
    problem = (
        f"{method.name}: key frames lie up to {widest} fast frames apart, these weights were "
        f"trained for {method.longest_gap} at most"
    )
    _refuse(problem, "check --gap, use other weights", force)


def check_agreement(doubt: str, force: bool = False) -> None:
    """Refuse cameras that certainly do not show the same at one time; `force`: warn.

    Args:
        doubt: see `Material`.

    Raises:
        InputError: says what does not fit, and what to check.
    """
    if doubt:
        _refuse(doubt, "", force)


def _refuse(problem: str, advice: str, force: bool) -> None:
    """Refuse, or, if that is wanted all the same, warn."""
    if not force:
        raise InputError(f"{problem}{advice and '; '}{advice}, or try with --force")
    logger.warning("%s: look at the result with care", problem)


def _material(
    method: NamedMethod,
    streams: tuple[Stream, KeyFrames],
    calibration: Calibration,
    truth: Callable[[int], np.ndarray] | None = None,
) -> Material:
    """The input of a reconstruction, of whose frames it is said if they show nothing. Such a key
    frame is refused by networks that carry key frames, and where others show something."""
    lr, keys = streams
    told: set[str] = set()

    def checked(frame: np.ndarray, name: str) -> np.ndarray:
        if _empty(frame) and name not in told and len(told) <= _LISTED:
            told.add(name)
            logger.warning(
                "%s: all its pixels are %g of full scale: was it lost, or not exposed?%s",
                *(name, frame.flat[0]),
                " Further ones are not listed." if len(told) > _LISTED else "",
            )
        return frame

    def key(t: int) -> np.ndarray:
        frame = keys[t]
        if _empty(frame) and (
            method.lr_frames == WHOLE_GAP or not all(_empty(keys[n]) for n in _beside(keys, t))
        ):
            raise InputError(
                f"the key frame at frame {t}: all its pixels are {frame.flat[0]:g} of full scale, "
                "so it shows nothing; was it lost, or not exposed? leave it out of the recording"
            )
        return checked(frame, f"the key frame at frame {t}")

    fast = Stream(lr.shape, lambda t: checked(lr[t], f"frame {t} of the fast camera"))
    return Material(fast, KeyFrames(list(keys), keys.shape, key), calibration, truth)


def _empty(frame: np.ndarray) -> bool:
    return bool(frame.min() == frame.max())


def _beside(keys: KeyFrames, t: int) -> list[int]:
    """The key frames before and after one."""
    times = list(keys)
    at = times.index(t)
    return [*times[max(0, at - 1) : at], *times[at + 1 : at + 2]]


def _look_at_greys(pair: Pair, lr: Stream, keys: KeyFrames) -> None:
    """Warn of counts that are the largest possible in more than a few pixels of some frames.

    Raises:
        InputError: one camera shows nothing at all: only black, only white, or one grey where the
            other camera sees something.
    """
    times = list(keys)[:: -(-len(keys) // 4)]
    cameras = (
        (pair.fast, [lr[t] for t in times]),
        (pair.sharp, [keys[t] for t in times]),
    )
    empty = [all(map(_empty, frames)) for _, frames in cameras]
    for (recording, frames), nothing in zip(cameras, empty, strict=True):
        if nothing and (not all(empty) or {float(frame.flat[0]) for frame in frames} <= {0.0, 1.0}):
            raise InputError(
                f"{recording.path}: all pixels are equal, in each of {len(frames)} frames that "
                "were looked at: was the beam off, or is it another camera's file?"
            )
        share = float(np.mean([frame >= 1 for frame in frames]))
        if share > SATURATED and not recording.in_floats():
            logger.warning(
                "%s: %.2g %% of the pixels are %d, the largest count of %d bit: saturated, and "
                "what is brighter is not known",
                *(recording.path, 100 * share, 2**recording.bit_depth - 1, recording.bit_depth),
            )


def _agreed(
    lr: Stream,
    keys: Mapping[int, np.ndarray],
    name: str,
    pairing: Pairing,
    rates: float | None = None,
) -> tuple[Grey, str]:
    """Compare the cameras at the key frames' instants; the grey scale to take out, and what
    certainly does not fit.

    Args:
        rates: the gap as the frame rates say, if they are known.
    """
    found = compare(lr, keys)
    doubt = told(found, name, pairing.gap or math.nan, rates) if found else ""
    return grey_to_match(found, name, pairing.match_grey), doubt


def _calibration(pair: Pair, grey: Grey) -> Calibration:
    """Units of what is made from two cameras: greys are the sharp camera's."""
    sharp, fast = pair.sharp, pair.fast
    white, unit = sharp.full_scale, str(sharp.metadata.get("unit", ""))
    floats = sharp.in_floats()
    if white == 1.0 and not floats:  # and no file states what its counts mean
        white, unit = float(2**sharp.bit_depth - 1), "counts"
    left_out = fast.metadata.get(LEFT_OUT)
    missing = (f"missing frames of the fast camera: {left_out}",) if left_out else ()
    cut = _cut_note(pair)
    if cut:
        logger.info("%s with %s: %s", sharp.path, fast.path, *cut)
    return Calibration(
        fast.frame_rate_hz,
        sharp.pixel_size_um,
        white,
        unit=unit,
        times_s=fast.times_s,
        notes=(*cut, *missing, *_grey_notes(grey)),
        bit_depth=None if floats else sharp.bit_depth,
    )


def _cut_note(pair: Pair) -> tuple[str, ...]:
    """Which part of the sharp camera's frames the result shows, if not all."""
    (_, top, left), size = pair.origin["hr_cut_from"], pair.origin["hr_camera_size"]
    height, width = pair.sharp.shape[1:]
    if [height, width] == list(size):
        return ()
    return (
        f"shows rows {top} to {top + height - 1} of {size[0]} and columns {left} to "
        f"{left + width - 1} of {size[1]} of the sharp camera: outside, the fast one saw nothing",
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
    found, grey, doubt = compare(lr, keys), Grey(), ""
    if found is not None:
        doubt = told(found, name, 1 / interval)
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
    matched = Stream(lr.shape, lambda t: grey.matched(lr[t]))
    return replace(_material(method, (matched, keys), calibration), doubt=doubt)


def _white(info: VideoInfo) -> tuple[float, str]:
    """Value of white, and its unit."""
    if info.full_scale == 1.0 and info.bit_depth < 16:  # floats are stored with 16
        return float(2**info.bit_depth - 1), "counts"
    return info.full_scale, ""


def _grey_notes(grey: Grey) -> tuple[str, ...]:
    if grey == Grey():
        return ()
    return (f"grey of the fast camera matched: fast = {grey.gain:.6g} x sharp {grey.offset:+.6g}",)
