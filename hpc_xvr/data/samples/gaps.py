"""Whole gaps of training recordings, for networks that carry key frames along the fast stream.

A sample is a dict of float32 tensors in [0, 1]: `lr` (T, 1, h, w) from key frame to key frame, `hr`
(2, 1, H, W) the key frames, taken with the first and the last of them, `target` (T - 2, 1, H, W)
all frames between. T - 1 is the gap; it is the same for all samples of a step. H = scale * h.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpc_xvr import config
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.degrade import bin_down, shifted
from hpc_xvr.data.samples.sample import Noise, Sample, as_tensor
from hpc_xvr.data.samples.training import TrainingSamples
from hpc_xvr.errors import InputError

# Tag of the random stream of gaps, which belong to steps: [seed, step, _GAP].
_GAP = 4
_SPED_UP = 0.35  # share of samples that skip frames
_MISFITTING = 0.2  # share of samples whose cameras do not quite fit
_MIRRORED_GREY, _OTHER_CONTRAST, _OTHER_GAMMA = 0.25, 0.5, 0.2


class Misfit(NamedTuple):
    """How the fast camera's frames differ from the binned sharp ones in a real pair."""

    shift: tuple[float, float] = (0.0, 0.0)
    """Rows and columns, in sharp pixels."""
    gain: float = 1.0
    offset: float = 0.0


class GapSamples(TrainingSamples):
    """Crops of whole gaps of the corpus' train split, indexed by (step, slot); picklable.

    Everything random derives from (seed, step, slot), the gap from (seed, step): it is drawn from
    `data.gaps` evenly in its logarithm, so that short gaps, which cost less, come more often.
    """

    def __init__(
        self, corpus: Corpus | Path | str, data: config.Data, global_batch: int, seed: int
    ) -> None:
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
        times = self._draw_frames(self.gap(step), t, video.shape[0], rng)
        crop = self._draw_crop(video.shape[1:], rng)
        lr_noise, hr_noise = (self._draw_noise(c, number, crop, rng) for c in self._cameras())
        noise = Noise(lr_noise, hr_noise)
        sharp = crop.turned(video.intensity(times, crop.y, crop.x))  # T, H, W
        if data.lr_source == "recorded":
            coarse = crop.coarse(data.scale)
            lr = coarse.turned(video.lr_intensity(video.nearest_lr(times), coarse.y, coarse.x))
        else:
            if data.regrey:
                sharp = regreyed(sharp, rng)
            lr = noise.lr.apply(seen_apart(sharp, data.scale, self._draw_misfit(rng)), rng)
        return {
            "lr": as_tensor(lr),
            "hr": as_tensor(noise.hr.apply(sharp[[0, -1]], rng)),
            "target": as_tensor(sharp[1:-1]),
        }

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


def regreyed(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same scene in other greys, still within [0, 1]: negative, of other contrast and
    brightness, on a bent scale; each with its own probability."""
    if rng.random() < _MIRRORED_GREY:
        frames = 1 - frames
    if rng.random() < _OTHER_CONTRAST:
        low, high = float(frames.min()), float(frames.max())
        contrast = min(2.0 ** rng.uniform(-1.5, 0.7), 1 / max(high - low, 1e-3))
        middle = float(frames.mean())
        frames = (frames - middle) * np.float32(contrast) + np.float32(rng.uniform(0.25, 0.75))
        frames = frames - np.float32(max(float(frames.max()) - 1, 0.0))
        frames = frames - np.float32(min(float(frames.min()), 0.0))
    if rng.random() < _OTHER_GAMMA:
        frames = np.clip(frames, 0, 1) ** np.float32(2.0 ** rng.uniform(-0.7, 0.7))
    return np.clip(frames, 0, 1).astype(np.float32, copy=False)
