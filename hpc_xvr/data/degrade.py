"""What a camera does to a frame: larger pixels, few photons, read noise, a fixed pattern."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def bin_down(frames: np.ndarray, scale: int) -> np.ndarray:
    """Mean over boxes of scale x scale pixels: (..., H, W) -> float32 (..., H/scale, W/scale).

    Raises:
        ValueError: H or W is not a multiple of scale.
    """
    height, width = frames.shape[-2:]
    if height % scale or width % scale:
        raise ValueError(
            f"frames of {height}x{width} cannot be binned by {scale}: height and "
            "width must be multiples of it"
        )
    frames = np.asarray(frames, np.float32)
    # Sums of slices are five times as fast as a mean over two axes of small boxes.
    rows = frames[..., ::scale, :].copy()
    for i in range(1, scale):
        rows += frames[..., i::scale, :]
    boxes = rows[..., ::scale].copy()
    for i in range(1, scale):
        boxes += rows[..., i::scale]
    boxes *= np.float32(1 / scale**2)
    return boxes


def shifted(frames: np.ndarray, row: float, column: float) -> np.ndarray:
    """Frames (T, H, W) looked up at (y + row, x + column): linear between pixels, the border
    continued."""
    for axis, shift in ((1, row), (2, column)):
        if not shift:
            continue
        whole = math.floor(shift)
        share = np.float32(shift - whole)
        places = np.arange(frames.shape[axis])
        near, far = (
            frames.take(np.clip(places + at, 0, len(places) - 1), axis) for at in (whole, whole + 1)
        )
        frames = near * (1 - share) + far * share
    return frames


def poisson(lr: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    """Photon noise: clip(Poisson(lr * photons) / photons, 0, 1), float32 of the same shape.

    Args:
        lr: intensities in [0, 1].
        photons: photons per pixel at intensity 1.
    """
    counts = rng.poisson(lr.astype(np.float64) * photons)
    return np.clip(counts / photons, 0, 1).astype(np.float32)


@dataclass(frozen=True)
class CameraNoise:
    """Noise of a camera, in the order in which it arises; the defaults add none."""

    photons: float | None = None
    """Photons per pixel at intensity 1."""
    read_noise: float = 0.0
    """Standard deviation of the electronics' noise, as a share of full scale."""
    gain: np.ndarray | None = None
    """Sensitivity of each pixel (h, w), the same in all frames: see `fixed_pattern`."""

    def apply(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """clip(gain * Poisson(frames * photons) / photons + N(0, read_noise^2), 0, 1).

        Args:
            frames: (..., h, w), intensities in [0, 1].

        Returns:
            float32 of the same shape.
        """
        if self.photons is not None:
            frames = poisson(frames, self.photons, rng)
        if self.gain is not None:
            frames = frames * self.gain
        if self.read_noise:
            noise = rng.standard_normal(frames.shape, np.float32)
            frames = frames + np.float32(self.read_noise) * noise
        return np.clip(frames, 0, 1).astype(np.float32, copy=False)


def fixed_pattern(shape: tuple[int, int], strength: float, seed: list[int]) -> np.ndarray:
    """Gains (h, w) float32 around 1 with this standard deviation, half of their variance common
    to a column, as in CMOS sensors, which read each column through an amplifier of its own."""
    rng = np.random.default_rng(seed)
    pixels = rng.standard_normal(shape, np.float32)
    columns = rng.standard_normal(shape[1], np.float32)
    return 1 + np.float32(strength / 2**0.5) * (pixels + columns)
