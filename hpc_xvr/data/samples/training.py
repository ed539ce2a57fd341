"""Random crops of a corpus' training recordings, by (step, slot)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from hpc_xvr import config
from hpc_xvr.data.corpus import Corpus, DamagedVideo
from hpc_xvr.data.samples.sample import OutputFrames, Sample, _check_recorded, _draw_noise, _sample
from hpc_xvr.data.samples.slots import Slots
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

_ATTEMPTS = 50  # samples tried in place of one that cannot be read


class TrainingSamples(Dataset):
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
                _check_recorded(video, data.scale)
        self.data = data
        self.output = output
        self.global_batch = global_batch
        self.seed = seed
        self.slots = Slots(self.videos.frame_counts, data.lr_frames, global_batch, seed)
        self._damaged: set[str] = set()

    def __getitem__(self, index: tuple[int, int]) -> Sample:
        step, slot = index
        for attempt in range(_ATTEMPTS):
            number, t = self.slots.pick(step, slot, attempt)
            try:
                return self._read(step, slot, number, t)
            except DamagedVideo as error:
                if self.data.damaged == "stop":
                    raise
                if self.videos[number].id not in self._damaged:
                    self._damaged.add(self.videos[number].id)
                    logger.warning("%s; other samples take the place of those lost", error)
        raise InputError(
            f"corpus {self.path}: none of {_ATTEMPTS} samples could be read in place of a damaged "
            "one; check the corpus with hpc-xvr inspect --verify"
        )

    def videos_read(self, slots: Sequence[int], first_step: int, last_step: int) -> list[str]:
        """Ids of the recordings that some slots read in these steps."""
        return [self.videos[i].id for i in self.slots.videos(slots, first_step, last_step)]

    def _read(self, step: int, slot: int, number: int, t: int) -> Sample:
        data, patch = self.data, self.data.patch
        video = self.videos[number]
        frames, height, width = video.shape
        rng = np.random.default_rng([self.seed, step, slot])

        half = data.lr_frames // 2
        fits = min(t, frames - 1 - t) // half if half else 1
        interval = int(rng.integers(1, min(data.lr_interval, fits), endpoint=True))
        before = int(rng.integers(1, min(data.hr_gap, t), endpoint=True))
        after = int(rng.integers(1, min(data.hr_gap, frames - 1 - t), endpoint=True))
        # The two cameras' pixels line up only at multiples of scale.
        grid = data.scale if data.lr_source == "recorded" else 1
        y, x = (
            grid * int(rng.integers(0, (side - patch) // grid, endpoint=True))
            for side in (height, width)
        )
        flips = rng.integers(0, 2, 3) if data.augment else np.zeros(3, int)
        y, x = slice(y, y + patch), slice(x, x + patch)
        lr_noise, hr_noise = (
            _draw_noise(kind, photons, data, video, scale, y, x, flips, [self.seed, number], rng)
            for kind, photons, scale in (
                (data.noise, data.photons_log10, data.scale),
                (data.hr_noise, data.hr_photons_log10, 1),
            )
        )
        return _sample(
            video,
            data,
            self.output,
            lr_times=[t + interval * k for k in range(-half, half + 1)],
            keys=(t - before, t + after),
            t=t,
            interval=interval,
            y=y,
            x=x,
            flips=flips,
            lr_noise=lr_noise,
            hr_noise=hr_noise,
            rng=rng,
        )
