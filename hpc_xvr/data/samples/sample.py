"""Samples for training and evaluation, and the loader that reads them ahead.

A sample is a dict of float32 tensors in [0, 1]: `lr` (N_lr, 1, h, w), `hr` (2, 1, H, W), `target`
(N_out, 1, H, W), and `hr_offset` (2,), the signed distance of the key frames from the centre
frame in the sample's own LR frames. H = scale * h. Batches put B in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hpc_xvr import config
from hpc_xvr.data.corpus import Video
from hpc_xvr.data.degrade import CameraNoise, bin_down, fixed_pattern
from hpc_xvr.errors import InputError

Sample = dict[str, Tensor]
OutputFrames = Literal["centre", "sequence"]
_WHOLE = slice(None)
_CLEAN = CameraNoise()


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
        _check_recorded(video, data.scale)
    y, x = _trimmed(y, height, data.scale), _trimmed(x, width, data.scale)
    lr_times = [min(max(t + k, 0), frames - 1) for k in range(-half, half + 1)]
    return _sample(
        video,
        data,
        output,
        lr_times=lr_times,
        keys=keys,
        t=t,
        interval=1,
        y=y,
        x=x,
        flips=np.zeros(3, int),
        lr_noise=CameraNoise(photons),
        rng=rng or np.random.default_rng(),
    )


def key_frames(t: int, gap: int, frames: int) -> tuple[int, int]:
    """The key frames around frame t of a clip that has one every `gap` frames.

    The last gap ends with the clip's last frame, whether it is complete or not.
    """
    first = t // gap * gap
    if first == frames - 1 and first > 0:
        first -= gap
    return first, min(first + gap, frames - 1)


def _sample(
    video: Video,
    data: config.Data,
    output: OutputFrames,
    *,
    lr_times: Sequence[int],
    keys: tuple[int, int],
    t: int,
    interval: int,
    y: slice,
    x: slice,
    flips: np.ndarray,
    rng: np.random.Generator,
    lr_noise: CameraNoise,
    hr_noise: CameraNoise = _CLEAN,
) -> Sample:
    targets = [t] if output == "centre" else list(lr_times)
    recorded = data.lr_source == "recorded"
    wanted = sorted({*keys, *targets, *(() if recorded else lr_times)})
    crops = _oriented(video.intensity(wanted, y, x), flips)  # n, H, W
    row = {frame: i for i, frame in enumerate(wanted)}
    if recorded:
        clock = np.asarray(video.info.lr_times)
        nearest = np.abs(clock - np.asarray(lr_times)[:, None]).argmin(axis=1)
        coarse_y, coarse_x = (slice(s.start // data.scale, s.stop // data.scale) for s in (y, x))
        lr = _oriented(video.lr_intensity(nearest.tolist(), coarse_y, coarse_x), flips)
    else:
        lr = bin_down(crops[[row[frame] for frame in lr_times]], data.scale)
        lr = lr_noise.apply(lr, rng)
    offsets = np.array([(key - t) / interval for key in keys], np.float32)
    return {
        "lr": _tensor(lr),
        "hr": _tensor(hr_noise.apply(crops[[row[frame] for frame in keys]], rng)),
        "target": _tensor(crops[[row[frame] for frame in targets]]),
        "hr_offset": torch.from_numpy(offsets),
    }


def _draw_noise(
    kind: config.NoiseKind,
    photons_log10: tuple[float, float],
    data: config.Data,
    video: Video,
    scale: int,
    y: slice,
    x: slice,
    flips: np.ndarray,
    seed: list[int],
    rng: np.random.Generator,
) -> CameraNoise:
    """Noise of one camera (pixels `scale` times as large as the sharp one's) for one sample; the
    fixed pattern belongs to the recording, `seed`."""
    if kind == "none":
        return _CLEAN
    photons = 10 ** rng.uniform(*photons_log10)
    if kind == "poisson":
        return CameraNoise(photons)
    read_noise = rng.uniform(*data.read_noise)
    if kind == "poisson_gaussian":
        return CameraNoise(photons, read_noise)
    height, width = (side // scale for side in video.shape[1:])
    gain = _pattern((height, width), data.pattern, (*seed, scale))
    rows, columns = (slice(s.start // scale, s.stop // scale) for s in (y, x))
    return CameraNoise(photons, read_noise, _oriented(gain[None, rows, columns], flips)[0])


@lru_cache(16)
def _pattern(shape: tuple[int, int], strength: float, seed: tuple[int, ...]) -> np.ndarray:
    return fixed_pattern(shape, strength, list(seed))


def _oriented(crops: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """One of the eight orientations of (n, H, W): flip rows, flip columns, transpose."""
    crops = crops[:, :: -1 if flips[0] else 1, :: -1 if flips[1] else 1]
    return crops.swapaxes(1, 2) if flips[2] else crops


def _tensor(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames, np.float32)[:, None])


def _trimmed(part: slice, side: int, scale: int) -> slice:
    start, stop, _ = part.indices(side)
    return slice(start, stop - (stop - start) % scale)


def _check_recorded(video: Video, scale: int) -> None:
    if video.lr_shape is None:
        raise InputError(
            f"video {video.path}: has no recorded low-resolution stream, which "
            "data.lr_source recorded needs; set it to binned or leave the video out"
        )
    expected = (video.shape[1] // scale, video.shape[2] // scale)
    if video.lr_shape[1:] != expected:
        raise InputError(
            f"video {video.path}: its low-resolution frames are {video.lr_shape[1:]}, "
            f"with data.scale {scale} they must be {expected}; register the two "
            "cameras when ingesting, or set data.lr_source to binned"
        )
