"""How well the instants of sharp frames can be known, from what two simulated cameras saw.

The bound of Cramer and Rao of the clock's start and gap, with the place, the blur and each frame's
grey scale unknown, too. A sharp frame's instant is told by how what the fast camera sees changes
between two frames, against the noise of these frames and of the sharp one. What lies between two
fast frames is known to nobody: it is taken to be the cubic through the four or the six nearest, and
a sharp frame from which that truly differs (a jump) tells as much less. So a program that knows how
things move could do better, and by chance any can; that a program has to learn from noisy frames
what moves is left out, so most do worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

FRAMES = 4, 6
"""The cubic may go through."""
WRONG_RATES = 1e-4
"""Of the gap, by which stated rates may be wrong."""


@dataclass(frozen=True)
class Noise:
    """Variances of a pixel at light `seen` are `per_light` x seen + `always`, squares of full
    scale."""

    fast: tuple[float, float]
    common: tuple[float, float]
    """Noise that is blurred by the camera: of x rays, in the fast and in the sharp frames."""
    sharp: tuple[float, float]
    """Of a sharp frame on fast pixels, blurred as well."""
    blur: float
    """Deviation of the camera's blur, fast pixels."""


def least_deviation(
    fast: np.ndarray,
    seen: np.ndarray,
    inside: np.ndarray,
    instants: np.ndarray,
    noise: Noise,
    rates: bool,
) -> float:
    """Deviation (fast frames) of the instant of the least certain sharp frame, at best.

    Args:
        fast: (T, h, w) what the fast camera sees, without noise, at instants 0 to T - 1.
        seen: (K, h, w) what it would see at the sharp frames' instants, without noise.
        inside: (h, w) pixels that the sharp camera sees.
        instants: (K,), in fast frames.
        rates: the gap is known, to `WRONG_RATES`.
    """
    return min(_deviation(fast, seen, inside, instants, noise, rates, n) for n in FRAMES)


def _deviation(
    fast: np.ndarray,
    seen: np.ndarray,
    inside: np.ndarray,
    instants: np.ndarray,
    noise: Noise,
    rates: bool,
    frames: int,
) -> float:
    y, x = (n[inside] - n.mean() for n in np.indices(inside.shape, float))
    half = float(np.ptp(instants)) / 2
    u = (instants - instants.mean()) / half
    information = np.zeros((7, 7))  # place 4, blur, time of the middle, half the time from it
    used = (instants >= 0) & (instants <= len(fast) - 1)
    for k in np.nonzero(used)[0]:
        first = math.floor(instants[k]) - frames // 2 + 1
        numbers = min(max(first, 0), len(fast) - frames) + np.arange(frames)
        share, slope, *_ = np.linalg.pinv(np.vander(numbers - instants[k], 4, increasing=True))
        speed = np.tensordot(slope, fast[numbers], 1)
        aside = (seen[k] - np.tensordot(share, fast[numbers], 1))[inside]
        down, right = np.gradient(seen[k])
        bend = (np.gradient(down, axis=0) + np.gradient(right, axis=1))[inside]
        down, right, light = down[inside], right[inside], seen[k][inside]
        late = -speed[inside]
        told = [down, right, down * y + right * x, right * y - down * x, bend, late, u[k] * late]
        free = np.linalg.qr(np.stack([light, np.ones_like(light)], 1))[0]  # the grey scale
        told_ = np.stack(told) - (np.stack(told) @ free) @ free.T
        aside = aside - free @ (free.T @ aside)
        moving = speed * inside
        power = float((moving**2).sum())
        through = float((gaussian_filter(moving, noise.blur) ** 2).sum()) / max(power, 1e-30)
        movie = float(share @ share)
        variance = movie * _variance(noise.fast, light) + through * (
            (1 + movie) * _variance(noise.common, light) + _variance(noise.sharp, light)
        )
        power = max(float((told_[5] ** 2 / variance).sum()), 1e-30)
        wrong = float((told_[5] * aside / variance).sum()) / power
        information += (told_ / variance) @ told_.T / (1 + wrong**2 * power)
    if rates:
        information[6, 6] += 1 / (WRONG_RATES * half) ** 2
    size = np.sqrt(np.diag(information)) + 1e-12
    if size[5] < 1e-6 * size[0]:
        return math.inf  # nothing moves
    covariance = np.linalg.pinv(information / np.outer(size, size)) / np.outer(size, size)
    basis = np.stack([np.ones(int(used.sum())), u[used]], 1)
    return math.sqrt(float(np.einsum("ki,ij,kj->k", basis, covariance[5:, 5:], basis).max()))


def _variance(of: tuple[float, float], light: np.ndarray) -> np.ndarray:
    variance: np.ndarray = of[0] * np.maximum(light, 0) + of[1]
    return variance
