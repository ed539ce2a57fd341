"""Random crops of a corpus' training recordings, by (step, slot)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from hpc_xvr import config
from hpc_xvr.data.corpus import Corpus, DamagedVideo
from hpc_xvr.data.degrade import CameraNoise, fixed_pattern
from hpc_xvr.data.samples.sample import (
    CLEAN,
    Crop,
    Greys,
    Misfit,
    Noise,
    OutputFrames,
    Sample,
    Times,
    build_sample,
)
from hpc_xvr.data.samples.slots import Slots
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

_ATTEMPTS = 50  # samples tried in place of one that cannot be read


class TrainingSamples(Dataset[Sample]):
    """Crops of the corpus' train split, indexed by (step, slot); picklable.

    Everything random about a sample (frame pairing, crop, flips, noise; pairing, intervals and
    noise as published) derives from (seed, step, slot).

    Raises:
        InputError: no train videos, a video smaller than the patch, or without the recorded
            low-resolution stream that `data.lr_source` asks for.
    """

    def __init__(
        self,
        corpus: Corpus | Path | str,
        data: config.Data,
        output: OutputFrames,
        global_batch: int,
        seed: int,
    ) -> None:
        corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
        self.path = corpus.path
        self.videos = corpus.split("train")
        if not self.videos:
            raise InputError(
                f"corpus {corpus.path}: none of its {len(corpus)} videos is in the "
                "train split; ingest or simulate some with split train"
            )
        for video in self.videos:
            height, width = video.shape[1:]
            if min(height, width) < data.patch:
                fits = min(height, width) // data.scale * data.scale
                raise InputError(
                    f"corpus {corpus.path}, video {video.id}: its frames of {height}x"
                    f"{width} are smaller than data.patch {data.patch}; set "
                    f"data.patch to {fits} or less, or ingest it into another split"
                )
            if data.lr_source == "recorded":
                video.require_lr(data.scale)
        self.data = data
        self.output = output
        self.global_batch = global_batch
        self.seed = seed
        self.slots = Slots(self.videos.frame_counts, data.lr_frames, global_batch, seed)
        self._damaged: set[str] = set()

    def __getitem__(self, index: tuple[int, int]) -> Sample:
        step, slot = index
        for number, t in self._candidates(step, slot):
            try:
                return self._read(step, slot, number, t)
            except DamagedVideo as error:
                if self.data.damaged == "stop":
                    raise
                if self.videos[number].id not in self._damaged:
                    self._damaged.add(self.videos[number].id)
                    logger.warning("%s; other samples take the place of those lost", error)
        raise self._none_found()

    def draw(self, step: int, slot: int) -> Recipe:
        """What the sample of a slot shows, before any of its pixels is read."""
        found = next(self._candidates(step, slot), None)
        if found is None:
            raise self._none_found()
        return self._draw(*found, step, np.random.default_rng([self.seed, step, slot]))

    def _candidates(self, step: int, slot: int) -> Iterator[tuple[int, int]]:
        """(index of the video, frame) of a slot, and of what may take its place."""
        for attempt in range(_ATTEMPTS):
            number, t = self.slots.pick(step, slot, attempt)
            if self._fits(step, number):
                yield number, t

    def _none_found(self) -> InputError:
        return InputError(
            f"corpus {self.path}: none of {_ATTEMPTS} samples could be read in place of a damaged "
            "one; check the corpus with hpc-xvr inspect --verify"
        )

    def videos_read(self, slots: Sequence[int], first_step: int, last_step: int) -> list[str]:
        """Ids of the recordings that some slots read in these steps."""
        return [self.videos[i].id for i in self.slots.videos(slots, first_step, last_step)]

    def summary(self) -> dict[str, int | str]:
        """What the samples of all steps follow from, besides the config: the recordings' names and
        lengths in their order. For a checkpoint, to see on resume whether that has changed."""
        frames = self.videos.frame_counts
        digest = hashlib.sha256(frames.astype("<i8").tobytes())
        for video in self.videos:
            digest.update(f"{video.id}\n".encode())
        return {
            "count": len(self.videos),
            "frames": int(frames.sum()),
            "sha256": digest.hexdigest(),
        }

    def _fits(self, step: int, number: int) -> bool:
        """Whether a recording is long enough for the samples of a step."""
        return True

    def _read(self, step: int, slot: int, number: int, t: int) -> Sample:
        rng = np.random.default_rng([self.seed, step, slot])
        recipe = self._draw(number, t, step, rng)
        return build_sample(
            self.videos[number],
            self.data,
            self.output,
            recipe.times,
            recipe.crop,
            recipe.noise,
            rng,
        )

    def _draw(self, number: int, t: int, step: int, rng: np.random.Generator) -> Recipe:
        """Frames, part and noise of a sample around frame t of a video."""
        shape = self.videos[number].shape
        times = self._draw_times(t, shape[0], rng)
        crop = self._draw_crop(shape[1:], rng)
        lr, hr = (self._draw_noise(camera, number, crop, rng) for camera in self._cameras())
        return Recipe(number, times, crop, Noise(lr, hr))

    def _draw_times(self, t: int, frames: int, rng: np.random.Generator) -> Times:
        """Interval of the LR frames around t, and the key frames before and after."""
        data = self.data
        half = data.lr_frames // 2
        fits = min(t, frames - 1 - t) // half if half else 1
        interval = int(rng.integers(1, min(data.lr_interval, fits), endpoint=True))
        before = int(rng.integers(1, min(data.hr_gap, t), endpoint=True))
        after = int(rng.integers(1, min(data.hr_gap, frames - 1 - t), endpoint=True))
        lr = [t + interval * k for k in range(-half, half + 1)]
        return Times(t, lr, (t - before, t + after), interval)

    def _draw_crop(self, size: tuple[int, int], rng: np.random.Generator) -> Crop:
        data = self.data
        # The two cameras' pixels line up only at multiples of scale.
        grid = data.scale if data.lr_source == "recorded" else 1
        y, x = (
            grid * int(rng.integers(0, (side - data.patch) // grid, endpoint=True)) for side in size
        )
        rows, columns, transpose = rng.integers(0, 2, 3) if data.augment else (0, 0, 0)
        flips = bool(rows), bool(columns), bool(transpose)
        return Crop(slice(y, y + data.patch), slice(x, x + data.patch), flips)

    def _cameras(self) -> tuple[_Camera, _Camera]:
        """The fast and the sharp one."""
        data = self.data
        return (
            _Camera(data.noise, data.photons_log10, data.scale),
            _Camera(data.hr_noise, data.hr_photons_log10, 1),
        )

    def _draw_noise(
        self, camera: _Camera, number: int, crop: Crop, rng: np.random.Generator
    ) -> CameraNoise:
        if camera.noise == "none":
            return CLEAN
        photons = 10 ** rng.uniform(*camera.photons_log10)
        if camera.noise == "poisson":
            return CameraNoise(photons)
        read_noise = rng.uniform(*self.data.read_noise)
        if camera.noise == "poisson_gaussian":
            return CameraNoise(photons, read_noise)
        # The fixed pattern belongs to the recording, whichever part of it is shown.
        height, width = (side // camera.scale for side in self.videos[number].shape[1:])
        gain = _pattern((height, width), self.data.pattern, (self.seed, number, camera.scale))
        part = crop.coarse(camera.scale)
        return CameraNoise(photons, read_noise, part.turned(gain[None, part.y, part.x])[0])


class Recipe(NamedTuple):
    """Everything random about a sample but the noise itself."""

    video: int
    """Its index."""
    times: Times
    crop: Crop
    noise: Noise
    greys: Greys = Greys()
    misfit: Misfit = Misfit()


class _Camera(NamedTuple):
    """What the settings say of one camera's noise."""

    noise: config.NoiseKind
    photons_log10: tuple[float, float]
    scale: int
    """Size of its pixels / that of the sharp camera's."""


@lru_cache(16)
def _pattern(shape: tuple[int, int], strength: float, seed: tuple[int, ...]) -> np.ndarray:
    return fixed_pattern(shape, strength, list(seed))
