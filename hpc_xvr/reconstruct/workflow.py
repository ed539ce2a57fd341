"""`hpc-xvr reconstruct`: a run's model on two camera files, or on a recording of a corpus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_xvr.config import Config
from hpc_xvr.data.cameras import Recording, open_recording
from hpc_xvr.data.cameras.flatfield import transmission
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.pairing.treatment import Reading, field_of
from hpc_xvr.errors import InputError
from hpc_xvr.factory.execution import prepare, use_threads
from hpc_xvr.factory.weights import Which, model_of_run
from hpc_xvr.log import logger, track
from hpc_xvr.reconstruct.pipeline import (
    as_method,
    reconstruct,
    recording_streams,
    streams_from_files,
)
from hpc_xvr.reconstruct.writers import Calibration, check_movie, write_movie, write_sequence

MOVIE_FPS = 8


def reconstruct_run(
    run: Path,
    device: torch.device,
    *,
    out: Path,
    lr: Path | None = None,
    hr: Path | None = None,
    gap: int | None = None,
    corpus: Path | None = None,
    video: str | None = None,
    movie: Path | None = None,
    lr_dataset: str | None = None,
    hr_dataset: str | None = None,
    lr_bit_depth: int | None = None,
    hr_bit_depth: int | None = None,
    lr_flat: Path | None = None,
    lr_dark: Path | None = None,
    hr_flat: Path | None = None,
    hr_dark: Path | None = None,
    flip_rows: bool = False,
    which: Which = "newest",
) -> Path:
    """Reconstruct every frame from the first key frame to the last and write `out`.

    Either `lr` and `hr` (camera files) or `video` (a recording of `corpus`, degraded to what the
    two cameras would have seen). Dataset, bit depth, flat and dark fields and row order of the
    camera files: as they were ingested for training (`flip_rows` is the fast camera's). `movie`
    shows low resolution and result side by side, and the truth where it is known.

    Raises:
        InputError: no trained run, unreadable or unfitting files, an unwritable result.
    """
    if (video is None) == (lr is None or hr is None) or (lr is None) != (hr is None):
        raise InputError(
            "reconstruct from --lr and --hr (two camera files), or from --video "
            "(a recording of the corpus)"
        )
    model, config, step = model_of_run(run, which)
    use_threads(config.run.threads)
    gap = gap or config.data.hr_gap
    if video:
        fast, keys, calibration, truth = _from_corpus(
            config, corpus or config.data.corpus, video, gap
        )
    else:
        assert lr and hr
        low = _opened(lr, lr_flat, lr_dark, flip_rows, dataset=lr_dataset, bit_depth=lr_bit_depth)
        sharp = _opened(hr, hr_flat, hr_dark, dataset=hr_dataset, bit_depth=hr_bit_depth)
        fast, keys = streams_from_files(low, sharp, gap, config.data.scale)
        calibration, truth = Calibration(low.frame_rate_hz, sharp.pixel_size_um), None
    precision = prepare(model, config, device)
    method, n_out = as_method(model)
    first, last = min(keys), max(keys)
    count = last - first + 1
    logger.info(
        "%s at step %d: frames %d to %d of %dx%d pixels", run, step, first, last, *keys.shape
    )
    frames = reconstruct(
        method,
        fast,
        keys,
        lr_frames=config.data.lr_frames,
        n_out=n_out,
        device=device,
        precision=precision,
    )
    shown: list[tuple[np.ndarray, ...]] = []

    def results() -> Iterator[np.ndarray]:
        stride = -(-count // 60)
        for t, frame in track(frames, "reconstructing", total=count):
            if movie and (t - first) % stride == 0:
                shown.append((fast[t], frame, *([truth(t)] if truth else [])))
            yield frame

    if movie:
        check_movie(movie)
    write_sequence(out, results(), count, calibration, first_frame=first)
    logger.info("written: %s (%d frames)", out, count)
    if movie:
        labels = ["fast camera", "reconstruction", *(["truth"] if truth else [])]
        write_movie(movie, shown, MOVIE_FPS, labels)
        logger.info("written: %s", movie)
    return out


def _opened(
    path: Path, flat: Path | None, dark: Path | None, flip_rows: bool = False, **options: Any
) -> Recording:
    """A camera's file as ingest reads it."""
    Reading(flat=flat, dark=dark).check()
    recording = open_recording(path, own_flat=flat is None, **options)
    if (light := field_of(flat)) is not None:
        recording = transmission(recording, light, field_of(dark))
    return recording.flipped() if flip_rows else recording


def _from_corpus(config: Config, corpus: Path, name: str, gap: int):
    video = Corpus(corpus)[name]
    fast, keys = recording_streams(video, gap, config.data, seed=config.run.seed)
    info = video.info
    return (
        fast,
        keys,
        Calibration(info.frame_rate_hz, info.pixel_size_um, info.full_scale),
        video.intensity,
    )
