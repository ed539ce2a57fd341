"""How far a reconstructed frame is from the true one: PSNR, SSIM and AAD as published, and more.

Frames are (H, W), float, 0 dark to 1 full scale; what lies outside is clipped. psnr, ssim and aad
round them to the 256 steps of an 8-bit picture first, as published; psnr_float, psnr_gradient and
flicker do not. No border is cut off. A frame that holds a NaN gives NaN. All functions are
symmetric and raise InputError for frames that are not two-dimensional or differ in shape.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from hpc_xvr.errors import InputError

STEPS = 255  # largest value of an 8-bit picture
WINDOW = 7  # side of the square neighbourhood of SSIM in pixels


def psnr(a: ArrayLike, b: ArrayLike) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / MSE); inf for equal pictures."""
    a, b = _pictures(a, b)
    return _decibel(a, b, STEPS)


def psnr_float(a: ArrayLike, b: ArrayLike) -> float:
    """Peak signal-to-noise ratio in dB without rounding to 8 bits, 10 log10(1 / MSE)."""
    a, b = _frames(a, b)
    return _decibel(a, b, 1)


def psnr_gradient(a: ArrayLike, b: ArrayLike) -> float:
    """Edge sharpness: PSNR in dB of the frames' gradients, 10 log10(1 / MSE), not rounded.

    Both components count, intensity a pixel: central differences inside, one-sided at the edge.
    """
    a, b = _frames(a, b)
    if min(a.shape) < 2:
        raise InputError(f"gradients of frames of {a.shape} pixels: both sides must be 2 or longer")
    return _decibel(np.stack(np.gradient(a)), np.stack(np.gradient(b)), 1)


def flicker(a0: ArrayLike, a1: ArrayLike, b0: ArrayLike, b1: ArrayLike) -> float:
    """Temporal consistency: mean |(a1 - a0) - (b1 - b0)| in grey levels of 255, not rounded.

    `a0`, `a1` follow each other in one sequence, `b0`, `b1` in the other: 0 if all changes from
    frame to frame are the same, however much the frames themselves differ.
    """
    a0, b0 = _frames(a0, b0)
    a1, b1 = _frames(a1, b1)
    if a0.shape != a1.shape:
        raise InputError(f"frames of a sequence have shapes {a0.shape} and {a1.shape}")
    return float(STEPS * np.abs((a1 - a0) - (b1 - b0)).mean())


def aad(a: ArrayLike, b: ArrayLike) -> float:
    """Average absolute difference in steps of an 8-bit picture (0 to 255)."""
    a, b = _pictures(a, b)
    return float(np.abs(a - b).mean())


def ssim(a: ArrayLike, b: ArrayLike) -> float:
    """Structural similarity (Wang et al. 2004), -1 to 1: mean over all 7x7 neighbourhoods.

    Uniform weights, sample covariance, K1 = 0.01, K2 = 0.03, range 255.

    Raises:
        InputError: also for frames smaller than a neighbourhood.
    """
    a, b = _pictures(a, b)
    if min(a.shape) < WINDOW:
        raise InputError(
            f"SSIM of frames of {a.shape} pixels: both sides must be {WINDOW} or longer"
        )
    count = WINDOW**2
    sum_a, sum_b = _box_sums(a), _box_sums(b)
    # Whole numbers below 2^53, so these differences are exact.
    spread = count / (count - 1) / count**2
    variances = (count * _box_sums(a * a + b * b) - sum_a**2 - sum_b**2) * spread
    covariance = (count * _box_sums(a * b) - sum_a * sum_b) * spread
    mean_a, mean_b = sum_a / count, sum_b / count
    c1, c2 = (0.01 * STEPS) ** 2, (0.03 * STEPS) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))).mean())


def _frames(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.asarray(frame, dtype=np.float64) for frame in (a, b))
    if a.ndim != 2 or a.shape != b.shape or a.size == 0:
        raise InputError(
            f"frames to compare have shapes {a.shape} and {b.shape}: both must be the same (H, W)"
        )
    return a.clip(0, 1), b.clip(0, 1)


def _pictures(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = _frames(a, b)
    return np.round(a * STEPS), np.round(b * STEPS)


def _decibel(a: np.ndarray, b: np.ndarray, peak: float) -> float:
    error = float(np.square(a - b).mean())
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))


def _box_sums(x: np.ndarray) -> np.ndarray:
    """Sum over each neighbourhood that lies inside: (H, W) -> (H - 6, W - 6)."""
    total = np.zeros((x.shape[0] + 1, x.shape[1] + 1))
    np.cumsum(x, axis=0, out=total[1:, 1:])
    np.cumsum(total[1:, 1:], axis=1, out=total[1:, 1:])
    rows = total[WINDOW:] - total[:-WINDOW]
    return rows[:, WINDOW:] - rows[:, :-WINDOW]
