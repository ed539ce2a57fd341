"""When the fast camera took its frames, in the sharp camera's count, roughly found from what moves.

Each sharp frame, seen on the fast camera's pixels, is compared with all fast ones; the clock is the
line of instants along which they are most alike. What stands still says nothing about time and is
taken out. `joint` refines what is found here, to parts of a fast frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hpc_xvr.data.registration import MOST_DRIFT


@dataclass(frozen=True)
class Clock:
    """Time of fast frame n, in sharp frames from the first one: start + u + drift u^2 / 2 with
    u = n / gap."""

    gap: float
    start: float
    drift: float = 0.0
    gap_deviation: float = math.nan
    start_deviation: float = math.nan
    """In sharp frames."""
    deviation: float = math.nan
    """Of the instant of the least certain sharp frame, in fast frames."""
    scatter: float = math.nan
    """Deviation of what single sharp frames say, in fast frames."""
    used: int = 0
    """Sharp frames."""

    @classmethod
    def of_instants(cls, numbers: np.ndarray, at: np.ndarray, order: int) -> Clock | None:
        """The clock by which sharp frames were taken at the fast frames `at`, with a drift if
        `order` is 2, without if it is 1; None where `at` does not rise, or bends more
        than clocks do."""
        if np.any(np.diff(at) <= 0):
            return None
        start, rate, *bend = np.polynomial.polynomial.polyfit(at, numbers, order)
        drift = float(2 * sum(bend) / rate**2)
        if abs(drift) >= MOST_DRIFT:
            return None
        return cls(float(1 / rate), float(start), drift)

    def of_fast(self, numbers: np.ndarray) -> np.ndarray:
        u = np.asarray(numbers, float) / self.gap
        time: np.ndarray = self.start + u + self.drift * u * u / 2
        return time

    def of_sharp(self, numbers: np.ndarray) -> np.ndarray:
        """Number of the fast frame, with a fraction, at the instants of sharp ones."""
        v = np.asarray(numbers, float) - self.start
        bend = 1 + 2 * self.drift * v
        u = 2 * v / (1 + np.sqrt(np.maximum(bend, 0)))
        fast: np.ndarray = u * self.gap
        return fast


def clock_of(
    sharp: np.ndarray,
    fast: np.ndarray,
    sharp_numbers: np.ndarray,
    fast_numbers: np.ndarray,
    gap: float | None,
) -> Clock | None:
    """The clock, to about a fast frame, by which the pictures are most alike; None where there are
    too few.

    Args:
        sharp: (K, n) pictures of the sharp camera on the fast one's pixels, rising in time.
        fast: (T, n) pictures of the fast camera; both without local means.
        sharp_numbers, fast_numbers: number of each in its camera's count, (K,) and (T,).
        gap: fast frames a sharp one, where it is known to a percent.
    """
    if len(fast) < 3 or (gap is None and len(sharp) < 3):
        return None
    weight = _moving(sharp, fast)
    sharp, fast = (pictures * weight for pictures in (sharp, fast))
    return _line(
        _unit(sharp - (sharp.mean(0) if len(sharp) > 1 else fast.mean(0)))
        @ _unit(fast - fast.mean(0)).T,
        sharp_numbers,
        fast_numbers,
        gap,
    )


def _moving(sharp: np.ndarray, fast: np.ndarray) -> np.ndarray:
    """How much each pixel changes beyond noise, from 0 to 1: (n,); told by the sharp frames, which
    have less noise on the fast camera's pixels."""
    change = sharp.var(0) if len(sharp) > 1 else fast.var(0)
    weight: np.ndarray = (change / (change + 4 * np.median(change) + 1e-12)) ** 2
    return weight.astype(np.float32)


def _unit(pictures: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(pictures, axis=1, keepdims=True)
    unit: np.ndarray = pictures / np.maximum(norm, 1e-9)
    return unit


def _line(
    likeness: np.ndarray, sharp: np.ndarray, fast: np.ndarray, gap: float | None
) -> Clock | None:
    """The line of instants along which `likeness` (K, T) is largest."""
    span = float(fast[-1] - fast[0])
    keys = float(sharp[-1] - sharp[0]) or 1.0
    if gap is None:
        step = 0.5 / keys
        gaps = np.arange(1.0, max(1.0 + step, 1.5 * span / keys), step)
    elif len(sharp) == 1:
        gaps = np.array([gap])
    else:
        near = np.linspace(-0.01, 0.01, 2 * math.ceil(0.01 * gap * keys / 0.5) + 1)
        gaps = gap * (1 + near)
    least = max(min(2, len(sharp)), math.ceil(0.5 * min(len(sharp), span / gaps.max() + 1)))
    best: tuple[float, tuple[float, float] | None] = -math.inf, None
    for g in gaps:
        starts = np.arange(fast[0] - g * keys * 0.5, fast[-1] + 0.5, 0.5)  # fast number of key 0
        at = starts[:, None] + g * (sharp - sharp[0])[None]
        inside = (at >= fast[0]) & (at <= fast[-1])
        place = np.interp(at, fast, np.arange(len(fast)))
        low = np.minimum(place.astype(int), len(fast) - 2)
        share = place - low
        rows = np.arange(len(sharp))[None]
        found = likeness[rows, low] * (1 - share) + likeness[rows, low + 1] * share
        count = inside.sum(1)
        mean = np.where(inside, found, 0).sum(1) / np.sqrt(np.maximum(count, 1))
        ok = count >= least
        if not ok.any():
            continue
        top = int(np.where(ok, mean, -np.inf).argmax())
        if mean[top] > best[0]:
            best = (float(mean[top]), (float(g), float(starts[top])))
    if best[1] is None:
        return None
    g, first = best[1]
    return Clock(g, float(sharp[0]) - first / g)
