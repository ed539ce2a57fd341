"""From a trained model and the recordings of two cameras to a file of sharp frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from hpc_xvr.config import Config
from hpc_xvr.data.cameras import Recording
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.pairing.joining import Pairing, joined
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.errors import InputError
from hpc_xvr.factory.execution import prepare, use_threads
from hpc_xvr.factory.weights import Which, open_model
from hpc_xvr.log import logger, track
from hpc_xvr.reconstruction.pipeline import as_method, reconstruct
from hpc_xvr.reconstruction.streams import KeyFrames, Stream, recording_streams, streams_of_pair
from hpc_xvr.reconstruction.writers import Calibration, check_movie, write_movie, write_sequence

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


@dataclass(frozen=True)
class Material:
    """The input of a reconstruction, and the units of its result."""

    lr: Stream
    keys: KeyFrames
    calibration: Calibration
    truth: Callable[[int], np.ndarray] | None = None
    """Time -> true frame (H, W) in [0, 1], if it is known."""


def reconstruct_run(
    run: Path,
    device: torch.device,
    source: CameraFiles | CorpusRecording,
    *,
    out: Path,
    movie: Path | None = None,
    which: Which = "newest",
) -> Path:
    """Reconstruct every frame from the first key frame to the last and write `out`.

    Camera files must be read as they were for training. `movie` shows low resolution and result
    side by side, and the truth if it is known.

    Raises:
        InputError: there is no trained model, files cannot be read or do not fit, or the result
            cannot be written.
    """
    model, config, step = open_model(run, which)
    use_threads(config.run.threads)
    if isinstance(source, CorpusRecording):
        material = _from_corpus(config, source)
    else:
        sharp = source.hr_camera.open(source.hr)
        fast = source.lr_camera.on_scale_of(source.hr_camera).open(source.lr)
        material = from_recordings(config, fast, sharp, source.pairing, source.crop)
    precision = prepare(model, config, device)
    method, n_out = as_method(model)
    keys, truth = material.keys, material.truth
    first, last = min(keys), max(keys)
    count = last - first + 1
    logger.info(
        "%s at step %d: frames %d to %d of %dx%d pixels", run, step, first, last, *keys.shape
    )
    frames = reconstruct(
        method,
        material.lr,
        keys,
        lr_frames=n_out and config.data.lr_frames,
        n_out=n_out,
        device=device,
        precision=precision,
    )
    shown: list[tuple[np.ndarray, ...]] = []

    def results() -> Iterator[np.ndarray]:
        stride = -(-count // 60)
        for t, frame in track(frames, "reconstructing", total=count):
            if movie and (t - first) % stride == 0:
                shown.append((material.lr[t], frame, *([truth(t)] if truth else [])))
            yield frame

    if movie:
        check_movie(movie)
    write_sequence(out, results(), count, material.calibration, first_frame=first)
    logger.info("written: %s (%d frames)", out, count)
    if movie:
        labels = ["fast camera", "reconstruction", *(["truth"] if truth else [])]
        write_movie(movie, shown, MOVIE_FPS, labels)
        logger.info("written: %s", movie)
    return out


def from_recordings(
    config: Config, fast: Recording, sharp: Recording, pairing: Pairing, crop: bool = False
) -> Material:
    """Join two cameras' recordings as a model of this config needs them.

    If `pairing` states no gap, it follows from the frame rates or, if they are unknown, is the one
    that the model was trained with.

    Raises:
        InputError: the recordings do not fit each other or the model.
    """
    if pairing.gap is None:
        gap, source = float(config.data.hr_gap), "as the model was trained"
        if fast.frame_rate_hz and sharp.frame_rate_hz:
            gap, source = fast.frame_rate_hz / sharp.frame_rate_hz, "from the frame rates"
        logger.info("a sharp frame every %g fast ones, %s (state it with --gap)", gap, source)
        pairing = replace(pairing, gap=gap)
    pair = joined(sharp, fast, pairing, config.data.scale, crop)
    calibration = Calibration(fast.frame_rate_hz, sharp.pixel_size_um, sharp.full_scale)
    return Material(*streams_of_pair(pair, config.data.scale), calibration)


def _from_corpus(config: Config, source: CorpusRecording) -> Material:
    gap = source.gap or config.data.hr_gap
    if gap != int(gap):
        raise InputError(
            f"gap {gap:g}: must be a whole number of frames for a recording of a corpus"
        )
    video = Corpus(source.corpus or config.data.corpus)[source.video]
    streams = recording_streams(video, int(gap), config.data, seed=config.run.seed)
    info = video.info
    calibration = Calibration(info.frame_rate_hz, info.pixel_size_um, info.full_scale)
    return Material(*streams, calibration, video.intensity)
