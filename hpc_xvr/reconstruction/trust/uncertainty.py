"""One standard deviation of every pixel: how far a frame may be from what the sharp camera would
have recorded at that instant.

Two things are added in square: the sharp camera's own noise, and the method's error, whose
logarithm is linear in the logarithms of what tells of it:

    key      how far the frame is from the key frame that is nearer to it, around the pixel: where
             both key frames still fit, little can be wrong
    slope    of the frame: an edge a little aside is a large error
    misfit   what the fast camera saw and the frame does not show, beyond the noise
    noise    of the fast camera
    gap      frames from key frame to key frame

Deviations are in units of the key frames' contrast, so that a dark recording is judged as a bright
one is. The weights were fitted on simulated recordings with the built-in weights (benchmarks/
trust.py fits and tests them); a recording's own key frames, held out, then scale the result
(`held_out`).

Shapes: h w the fast camera's grid, H = scale*h, W = scale*w.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import uniform_filter

from hpc_xvr.data.pairing.agreement import LOOKED_AT
from hpc_xvr.reconstruction.trust.observation import ROUNDING, Observation

AROUND = 5
"""Side in sharp pixels of the neighbourhood that is looked at around a pixel."""
LEAST = 1e-5
"""Added to squares before their logarithm is taken, in units of the contrast's square."""
CONTRAST = 0.005
"""Least contrast, of full scale, that deviations are divided by."""
NAMES = ("key", "slope", "misfit", "noise", "gap")
CHI_1 = 0.4549
"""Median of chi-square of one degree of freedom."""


@dataclass(frozen=True)
class Weights:
    """What the parts count."""

    own: float
    """Factor on the sharp camera's noise."""
    error: Mapping[str, float]
    """Of the logarithms of NAMES."""
    constant: float
    """Logarithm of the method's error where all of these are 1."""


SIMULATED = Weights(
    0.859, dict(zip(NAMES, (0.438, 0.122, 0.026, 0.086, 0.082), strict=True)), -1.30
)
"""Fitted by benchmarks/trust.py on simulated recordings, clean and of 1000 photons, gaps of 4 to
16."""


@dataclass(frozen=True)
class Surroundings:
    """What the frames of a recording are judged by."""

    camera: Observation
    sharp_noise: float
    """Variance of the sharp camera's noise at intensity 1; it grows with the intensity."""
    contrast: float
    """Standard deviation of the key frames' pixels."""

    def own(self, frame: np.ndarray) -> np.ndarray:
        """Standard deviation of the sharp camera's noise: (H, W) -> same."""
        return np.sqrt(self.sharp_noise * np.clip(frame, 0, None) + ROUNDING**2).astype(np.float32)


def surroundings(keys: Mapping[int, np.ndarray], camera: Observation) -> Surroundings:
    """From up to 8 key frames spread over the recording, (H, W) in [0, 1] each."""
    times = sorted(keys)
    chosen = np.unique(np.linspace(0, len(times) - 1, LOOKED_AT).round().astype(int))
    noise, contrast = [], []
    for i in chosen:
        frame = np.asarray(keys[times[i]], np.float64)
        noise.append(_fine_variance(frame))
        contrast.append(frame.std())
    return Surroundings(camera, float(np.median(noise)), max(float(np.mean(contrast)), CONTRAST))


def parts(
    frame: np.ndarray,
    measured: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    gap: int,
    around: Surroundings,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logarithms of the sharp camera's noise and of NAMES, (H, W) each, in units of the contrast.

    Args:
        frame: (H, W), of an instant at which the fast camera `measured` (h, w).
        before, after: the key frames (H, W) around it, `gap` frames apart.
    """
    camera = around.camera
    seen = camera.seen(frame)
    noise = camera.noise(seen)
    misfit = uniform_filter((measured - seen) ** 2, 3) - uniform_filter(noise, 3)
    if camera.usable is not None:
        misfit = np.where(camera.usable, misfit, 0.0)
    down, right = np.gradient(frame)

    def log(square: np.ndarray) -> np.ndarray:
        logarithm: np.ndarray = 0.5 * np.log(square / around.contrast**2 + LEAST)
        return logarithm

    own = log(around.own(frame).astype(np.float64) ** 2)
    return own, {
        "key": log(np.minimum(_around((frame - before) ** 2), _around((frame - after) ** 2))),
        "slope": log(_around(down**2 + right**2)),
        "misfit": _enlarged(log(np.clip(misfit, 0, None)), camera.scale),
        "noise": _enlarged(log(noise), camera.scale),
        "gap": np.full_like(frame, np.log(gap), dtype=np.float64),
    }


def deviation(
    frame: np.ndarray,
    measured: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    gap: int,
    around: Surroundings,
    factor: float = 1.0,
    weights: Weights = SIMULATED,
) -> np.ndarray:
    """Standard deviation of each pixel (H, W) float32, of full scale; see `parts`.

    Args:
        factor: of this recording, from its own key frames.
    """
    own, found = parts(frame.astype(np.float64), measured, before, after, gap, around)
    error = weights.constant + sum(weights.error[name] * found[name] for name in NAMES)
    together = np.logaddexp(2 * (own + np.log(weights.own)), 2 * error)
    return (factor * around.contrast * np.exp(0.5 * together)).astype(np.float32)


def _around(square: np.ndarray) -> np.ndarray:
    mean: np.ndarray = uniform_filter(square, AROUND, mode="nearest")
    return mean


def _enlarged(low: np.ndarray, scale: int) -> np.ndarray:
    return np.repeat(np.repeat(low, scale, 0), scale, 1)


def _fine_variance(frame: np.ndarray) -> float:
    """Variance of the noise per intensity, robustly, from fourth-order differences, in which a
    scene has little: (H, W) -> number."""
    if min(frame.shape) < 3:
        return 0.0
    rows = frame[:-2] - 2 * frame[1:-1] + frame[2:]
    fine = (rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]) / 6  # white noise keeps its variance
    level = np.clip(frame[1:-1, 1:-1], 1e-3, None)
    return float(np.median(fine**2 / level)) / CHI_1
