"""One sample: which frames of a recording it shows, which part of them, with what noise.

A sample is a dict of float32 tensors in [0, 1]: `lr` (N_lr, 1, h, w), `hr` (2, 1, H, W), `target`
(N_out, 1, H, W), and `hr_offset` (2,), the signed distance of the key frames from the centre
frame in the sample's own LR frames. H = scale * h. Batches put B in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpc_xvr import config
from hpc_xvr.data.corpus import Video
from hpc_xvr.data.degrade import CameraNoise, bin_down

Sample = dict[str, Tensor]
OutputFrames = Literal["centre", "sequence"]
_WHOLE = slice(None)
CLEAN = CameraNoise()
_MIRRORED_GREY, _OTHER_CONTRAST, _OTHER_GAMMA = 0.25, 0.5, 0.2


class Times(NamedTuple):
    """The frames of a sample, counted in HR frames of the recording."""

    centre: int
    lr: Sequence[int]
    keys: tuple[int, int]
    interval: int = 1
    """From one LR frame to the next."""


class Crop(NamedTuple):
    """A part of the frames, and how it is turned."""

    y: slice
    x: slice
    """First pixel and last + 1."""
    flips: tuple[bool, bool, bool] = (False, False, False)
    """Flip rows, flip columns, then transpose: the eight orientations."""

    def coarse(self, scale: int) -> Crop:
        """The same part on a grid whose pixels are `scale` times as large."""
        y, x = (slice(part.start // scale, part.stop // scale) for part in (self.y, self.x))
        return Crop(y, x, self.flips)

    def turned(self, frames: np.ndarray) -> np.ndarray:
        """Frames (n, H, W) that show this part alone, turned."""
        rows, columns, transpose = self.flips
        frames = frames[:, :: -1 if rows else 1, :: -1 if columns else 1]
        return frames.swapaxes(1, 2) if transpose else frames


class Noise(NamedTuple):
    """What the two cameras add."""

    lr: CameraNoise = CLEAN
    hr: CameraNoise = CLEAN


class Misfit(NamedTuple):
    """How the fast camera's frames differ from the binned sharp ones in a real pair."""

    shift: tuple[float, float] = (0.0, 0.0)
    """Rows and columns, in sharp pixels."""
    gain: float = 1.0
    offset: float = 0.0


class Greys(NamedTuple):
    """The same scene in other greys, still within [0, 1]."""

    negative: bool = False
    contrast: tuple[float, float] | None = None
    """Factor on the distance to the mean grey (less where the scene would not fit) and the new
    mean."""
    gamma: float | None = None
    """Exponent of a bent scale."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Greys:
        """Each change with its own probability."""
        negative = rng.random() < _MIRRORED_GREY
        contrast = gamma = None
        if rng.random() < _OTHER_CONTRAST:
            contrast = 2.0 ** rng.uniform(-1.5, 0.7), rng.uniform(0.25, 0.75)
        if rng.random() < _OTHER_GAMMA:
            gamma = 2.0 ** rng.uniform(-0.7, 0.7)
        return cls(bool(negative), contrast, gamma)

    def apply(self, frames: np.ndarray) -> np.ndarray:
        """(T, H, W) float32 in [0, 1] -> the same."""
        if self == Greys():
            return frames
        if self.negative:
            frames = 1 - frames
        if self.contrast:
            low, high = float(frames.min()), float(frames.max())
            contrast = min(self.contrast[0], 1 / max(high - low, 1e-3))
            middle = float(frames.mean())
            frames = (frames - middle) * np.float32(contrast) + np.float32(self.contrast[1])
            frames = frames - np.float32(max(float(frames.max()) - 1, 0.0))
            frames = frames - np.float32(min(float(frames.min()), 0.0))
        if self.gamma:
            frames = np.clip(frames, 0, 1) ** np.float32(self.gamma)
        return np.clip(frames, 0, 1).astype(np.float32, copy=False)


def window_sample(
    video: Video,
    t: int,
    keys: tuple[int, int],
    data: config.Data,
    output: OutputFrames,
    photons: float | None = None,
    rng: np.random.Generator | None = None,
    y: slice = _WHOLE,
    x: slice = _WHOLE,
) -> Sample:
    """The sample for evaluating frame t: consecutive LR frames around it, HR at two key frames.

    LR frames beyond the clip repeat its first or last one. The crop (`y`, `x` in HR pixels) is
    trimmed at the bottom and right to multiples of scale. `photons` puts noise on binned frames.

    Raises:
        InputError: `data.lr_source` is recorded and the video has no such stream or one whose
            grid is not that of the HR frames / scale.
    """
    frames, height, width = video.shape
    half = data.lr_frames // 2
    if data.lr_source == "recorded":
        video.require_lr(data.scale)
    lr = [min(max(t + k, 0), frames - 1) for k in range(-half, half + 1)]
    crop = Crop(_trimmed(y, height, data.scale), _trimmed(x, width, data.scale))
    noise = Noise(lr=CameraNoise(photons))
    return build_sample(
        video, data, output, Times(t, lr, keys), crop, noise, rng or np.random.default_rng()
    )


def key_frames(t: int, gap: int, frames: int) -> tuple[int, int]:
    """The key frames around frame t of a clip that has one every `gap` frames.

    The last gap ends with the clip's last frame, whether it is complete or not.
    """
    first = t // gap * gap
    if first == frames - 1 and first > 0:
        first -= gap
    return first, min(first + gap, frames - 1)


def build_sample(
    video: Video,
    data: config.Data,
    output: OutputFrames,
    times: Times,
    crop: Crop,
    noise: Noise,
    rng: np.random.Generator,
) -> Sample:
    """The sample of these frames; `rng` draws the noise, that of recorded LR frames is their own.

    Raises:
        DamagedVideo: frames cannot be read.
    """
    targets = [times.centre] if output == "centre" else times.lr
    recorded = data.lr_source == "recorded"
    wanted = sorted({*times.keys, *targets, *(() if recorded else times.lr)})
    sharp = crop.turned(video.intensity(wanted, crop.y, crop.x))  # n, H, W
    row = {t: i for i, t in enumerate(wanted)}

    def at(frames: Sequence[int]) -> np.ndarray:
        return sharp[[row[t] for t in frames]]

    if recorded:
        coarse = crop.coarse(data.scale)
        nearest = video.nearest_lr(times.lr)
        lr = coarse.turned(video.lr_intensity(nearest, coarse.y, coarse.x))
    else:
        lr = noise.lr.apply(bin_down(at(times.lr), data.scale), rng)
    offsets = np.array([(key - times.centre) / times.interval for key in times.keys], np.float32)
    return {
        "lr": as_tensor(lr),
        "hr": as_tensor(noise.hr.apply(at(times.keys), rng)),
        "target": as_tensor(at(targets)),
        "hr_offset": torch.from_numpy(offsets),
    }


def as_tensor(frames: np.ndarray) -> Tensor:
    """Frames (n, H, W) as (n, 1, H, W) float32."""
    return torch.from_numpy(np.ascontiguousarray(frames, np.float32)[:, None])


def _trimmed(part: slice, side: int, scale: int) -> slice:
    start, stop, _ = part.indices(side)
    return slice(start, stop - (stop - start) % scale)
