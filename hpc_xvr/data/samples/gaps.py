"""Whole gaps of training recordings, for networks that carry key frames along the fast stream.

A sample is a dict of float32 tensors in [0, 1]: `lr` (T, 1, h, w) from key frame to key frame, `hr`
(2, 1, H, W) the key frames, taken with the first and the last of them, `target` (T - 2, 1, H, W)
all frames between. T - 1 is the gap; it is the same for all samples of a step. H = scale * h.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hpc_xvr import config
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.degrade import bin_down, shifted
from hpc_xvr.data.samples.sample import Greys, Misfit, Noise, Sample, Times, as_tensor
from hpc_xvr.data.samples.training import Recipe, TrainingSamples
from hpc_xvr.errors import InputError

# Tag of the random stream of gaps, which belong to steps: [seed, step, _GAP].
_GAP = 4
_SPED_UP = 0.35  # share of samples that skip frames
_MISFITTING = 0.2  # share of samples whose cameras do not quite fit


class GapSamples(TrainingSamples):
    """Crops of whole gaps of the corpus' train split, indexed by (step, slot); picklable.

    Everything random derives from (seed, step, slot), the gap from (seed, step): it is drawn from
    `data.gaps` evenly in its logarithm, so that short gaps, which cost less, come more often.
    """

    def __init__(
        self, corpus: Corpus | Path | str, data: config.Data, global_batch: int, seed: int
    ) -> None:
        for key in ("misregistration", "grey_mismatch"):
            if data.lr_source == "recorded" and getattr(data, key):
                raise InputError(
                    f"data.{key} {getattr(data, key):g}: is for binned frames, those of "
                    "data.lr_source recorded have their own; set it to 0"
                )
        # Any frame with one on each side can lie within a gap.
        super().__init__(
            corpus, data.model_copy(update={"lr_frames": 1}), "centre", global_batch, seed
        )
        longest = int(self.videos.frame_counts.max())
        if longest <= data.gaps[1]:
            raise InputError(
                f"corpus {self.path}: its longest train video has {longest} frames, data.gaps "
                f"{list(data.gaps)} needs {data.gaps[1] + 1}: set data.gaps to "
                f"[{min(data.gaps[0], longest - 1)}, {longest - 1}] or less, or add longer videos"
            )

    def gap(self, step: int) -> int:
        """Frames from key frame to key frame in a step."""
        low, high = self.data.gaps
        rng = np.random.default_rng([self.seed, step, _GAP])
        return min(high, int(low * ((high + 1) / low) ** rng.random()))

    def _fits(self, step: int, number: int) -> bool:
        return self.videos[number].shape[0] > self.gap(step)

    def _read(self, step: int, slot: int, number: int, t: int) -> Sample:
        data, video = self.data, self.videos[number]
        rng = np.random.default_rng([self.seed, step, slot])
        _, times, crop, noise, greys, misfit = self._draw(number, t, step, rng)
        sharp = crop.turned(video.intensity(times.lr, crop.y, crop.x))  # T, H, W
        if data.lr_source == "recorded":
            coarse = crop.coarse(data.scale)
            lr = coarse.turned(video.lr_intensity(video.nearest_lr(times.lr), coarse.y, coarse.x))
        else:
            sharp = greys.apply(sharp)
            lr = noise.lr.apply(seen_apart(sharp, data.scale, misfit), rng)
        return {
            "lr": as_tensor(lr),
            "hr": as_tensor(noise.hr.apply(sharp[[0, -1]], rng)),
            "target": as_tensor(sharp[1:-1]),
        }

    def _draw(self, number: int, t: int, step: int, rng: np.random.Generator) -> Recipe:
        shape = self.videos[number].shape
        frames = self._draw_frames(self.gap(step), t, shape[0], rng)
        crop = self._draw_crop(shape[1:], rng)
        noise = Noise(*(self._draw_noise(c, number, crop, rng) for c in self._cameras()))
        recipe = Recipe(number, Times(t, frames, (frames[0], frames[-1])), crop, noise)
        if self.data.lr_source == "recorded":
            return recipe
        greys = Greys.draw(rng) if self.data.regrey else Greys()
        return recipe._replace(greys=greys, misfit=self._draw_misfit(rng))

    def _draw_frames(self, gap: int, t: int, frames: int, rng: np.random.Generator) -> list[int]:
        """A gap around frame t: of every frame, or faster of every second or third one; forwards
        or backwards in time."""
        step = 1
        fastest = min(self.data.speed_up, (frames - 1) // gap)
        if fastest > 1 and rng.random() < _SPED_UP:
            step = int(rng.integers(1, fastest, endpoint=True))
        length = gap * step
        first = int(rng.integers(max(0, t - length + 1), min(t, frames - length), endpoint=False))
        times = list(range(first, first + length + 1, step))
        return times[::-1] if self.data.augment and rng.random() < 0.5 else times

    def _draw_misfit(self, rng: np.random.Generator) -> Misfit:
        """For some samples, evenly up to the limits of the config; none where these are 0."""
        data = self.data
        if not (data.misregistration or data.grey_mismatch) or rng.random() >= _MISFITTING:
            return Misfit()
        reach = data.misregistration * data.scale
        row, column = rng.uniform(-reach, reach, 2)
        gain, offset = rng.uniform(-data.grey_mismatch, data.grey_mismatch, 2)
        return Misfit((float(row), float(column)), 1 + float(gain), float(offset))


def seen_apart(sharp: np.ndarray, scale: int, misfit: Misfit) -> np.ndarray:
    """What a fast camera sees that is not quite aligned and calibrated: (T, H, W) -> (T, h, w)."""
    lr = bin_down(shifted(sharp, *misfit.shift), scale)
    return np.clip(lr * np.float32(misfit.gain) + np.float32(misfit.offset), 0, 1)
