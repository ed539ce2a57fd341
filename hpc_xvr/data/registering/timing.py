"""When the fast camera took its frames, in the sharp camera's count, found from what moves.

Each sharp frame, seen on the fast camera's pixels, is compared with all fast ones. What stands still
says nothing about time and is taken out; how fast the difference grows beside the right instant is
measured, so that instants between two frames are found without bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

INLIER = 0.75
"""Fast frames by which the instant of a sharp frame may lie aside of the line through all."""
SHARE = 0.6
"""Of the sharp frames in the fast camera's time, that must lie on the line."""
CLEAR = 5.0
"""Deviations by which the best line must stand out of the others."""
EXPONENTS = np.arange(1.0, 2.01, 0.1)
GRID = np.arange(-1.0, 1.001, 0.02)
LATE = 0.1
"""Fast frames by which a drift must bend the line to be told from none."""


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
    scatter: float = math.nan
    """Deviation of the instants of single sharp frames, in fast frames."""
    used: int = 0
    """Sharp frames."""
    clearness: float = math.nan

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
    """The clock that fits the pictures best; None where nothing moves, or nothing fits.

    Args:
        sharp: (K, n) pictures of the sharp camera on the fast one's pixels, rising in time.
        fast: (T, n) pictures of the fast camera; both without local means.
        sharp_numbers, fast_numbers: number of each in its camera's count, (K,) and (T,).
        gap: fast frames a sharp one, where it is known to a percent.
    """
    if len(fast) < 3 or (gap is None and len(sharp) < 3):
        return None
    weight = _moving(fast)
    sharp, fast = (pictures * weight for pictures in (sharp, fast))
    still = np.zeros(fast.shape[1], np.float32)
    changes = _unit(sharp - sharp.mean(0)) @ _unit(fast - fast.mean(0)).T
    if len(sharp) == 1:
        changes = _unit(sharp - fast.mean(0)) @ _unit(fast - fast.mean(0)).T
    line, clearness = _line(changes, sharp_numbers, fast_numbers, gap)
    if line is None or clearness < CLEAR:
        return None
    clock = None
    for _ in range(3):
        found = _instants(sharp, fast - still, sharp_numbers, fast_numbers, line)
        if found is None:
            return None
        which, instants, certainty = found
        clock = _fitted(sharp_numbers[which], instants, certainty, gap, len(sharp))
        if clock is None:
            return None
        line = clock
        at = clock.of_sharp(sharp_numbers)
        inside = (at >= fast_numbers[0]) & (at <= fast_numbers[-1])
        nearest = np.abs(fast_numbers[None] - at[inside, None]).argmin(1)
        if not inside.any():
            return None
        still = np.median(fast[nearest] - sharp[inside], 0)
    assert clock is not None
    return Clock(**{**clock.__dict__, "clearness": clearness})


def _moving(fast: np.ndarray) -> np.ndarray:
    """How much each pixel changes beyond noise, from 0 to 1: (n,)."""
    change = np.diff(fast, axis=0)
    noise = np.median(change**2, 0) / 2 / 0.455  # of single frames, where most are alike
    ever = fast.var(0)
    share = np.clip((ever - np.minimum(noise, np.median(noise))) / np.maximum(ever, 1e-12), 0, 1)
    weight: np.ndarray = np.sqrt(share * ever / max(float(ever.max()), 1e-12))
    return np.sqrt(weight).astype(np.float32)


def _unit(pictures: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(pictures, axis=1, keepdims=True)
    unit: np.ndarray = pictures / np.maximum(norm, 1e-9)
    return unit


def _line(
    likeness: np.ndarray, sharp: np.ndarray, fast: np.ndarray, gap: float | None
) -> tuple[Clock | None, float]:
    """The line of instants along which `likeness` (K, T) is largest, and how far its mean stands
    out of those of other lines."""
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
    best, values = (-math.inf, None), []
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
        values.append(mean[ok])
        top = int(np.where(ok, mean, -np.inf).argmax())
        if mean[top] > best[0]:
            best = (float(mean[top]), (float(g), float(starts[top])))
    if best[1] is None:
        return None, 0.0
    every = np.concatenate(values)
    # most lines are wrong ones: their scatter is that of chance
    middle = float(np.median(every))
    spread = 1.4826 * float(np.median(np.abs(every - middle))) + 1e-9
    g, first = best[1]
    return Clock(g, float(sharp[0]) - first / g), (best[0] - middle) / spread


def _instants(
    sharp: np.ndarray,
    fast: np.ndarray,
    sharp_numbers: np.ndarray,
    fast_numbers: np.ndarray,
    line: Clock,
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Of the sharp frames that lie within the fast camera's time: which they are, their instants
    in fast frames, and the certainty of each.

    Beside the right instant t the squared difference grows as c + a |n - t|^p; p, between 1 (what
    moves leaves its place at once) and 2 (it moves little), is the same for all.
    """
    rows, centres = [], []
    which = []
    for k, at in enumerate(line.of_sharp(sharp_numbers)):
        n = int(np.abs(fast_numbers - at).argmin())
        if not fast_numbers[0] - 0.5 <= at <= fast_numbers[-1] + 0.5:
            continue
        low, high = max(0, n - 4), min(len(fast), n + 5)
        error = ((fast[low:high] - sharp[k]) ** 2).sum(1)
        n = low + int(error.argmin())
        if n - 2 < low or n + 2 >= high:
            continue
        around = fast_numbers[n - 2 : n + 3]
        if not np.allclose(np.diff(around), 1):
            continue  # frames were lost
        rows.append(error[n - 2 - low : n + 3 - low])
        centres.append(fast_numbers[n])
        which.append(k)
    if not rows:
        return None
    errors = np.stack(rows)  # (K', 5)
    errors = errors - errors.min(1, keepdims=True)
    best = (math.inf, np.zeros(0), np.zeros(0))
    n = np.arange(-2.0, 3.0)
    for p in EXPONENTS:
        shape = np.abs(n[None] - GRID[:, None]) ** p  # (G, 5)
        rest = shape - shape.mean(1, keepdims=True)
        wanted = errors - errors.mean(1, keepdims=True)
        slope = wanted @ rest.T / (rest**2).sum(1)  # (K', G)
        left = (wanted**2).sum(1)[:, None] - np.maximum(slope, 0) ** 2 * (rest**2).sum(1)
        at = left.argmin(1)
        total = float(np.take_along_axis(left, at[:, None], 1).sum())
        if total < best[0]:
            strength = np.take_along_axis(np.maximum(slope, 0), at[:, None], 1)[:, 0]
            best = (total, GRID[at], strength)
    _, aside, strength = best
    return np.array(which), np.array(centres) + aside, strength


def _fitted(
    numbers: np.ndarray, instants: np.ndarray, certainty: np.ndarray, gap: float | None, keys: int
) -> Clock | None:
    """The clock through the instants of sharp frames; those far aside do not count."""
    weight = certainty / max(float(certainty.max()), 1e-12)
    if len(numbers) < 3 or np.ptp(numbers) == 0:
        if gap is None or not len(numbers):
            return None
        slope = gap
        first = np.average(instants - slope * numbers, weights=weight + 1e-9)
        aside = instants - slope * numbers - first
        if len(numbers) > 1 and np.abs(aside).max() > INLIER:
            return None
        return Clock(slope, -first / slope, 0.0, math.nan, math.nan, math.nan, len(numbers))
    # Theil's line is not misled by a third of wrong instants
    pairs = [(i, j) for j in range(len(numbers)) for i in range(j)]
    slopes = [(instants[j] - instants[i]) / (numbers[j] - numbers[i]) for i, j in pairs]
    slope = float(np.median(slopes))
    first = float(np.median(instants - slope * numbers))
    kept = np.abs(instants - first - slope * numbers) <= INLIER
    bent = len(numbers) >= 6
    if kept.sum() < max(2, math.ceil(SHARE * len(numbers))) or slope <= 0:
        return None
    order, fit, covariance, scatter = 1, np.array([slope, first]), np.zeros((2, 2)), 0.0
    for order in (2, 1) if bent else (1,):
        columns = np.stack([numbers**power for power in range(order, -1, -1)], 1).astype(float)
        for _ in range(3):
            w = np.sqrt(weight * kept)
            fit, *_ = np.linalg.lstsq(columns * w[:, None], instants * w, rcond=None)
            rest = instants - columns @ fit
            free = max(1, int(kept.sum()) - order - 1)
            scatter = math.sqrt(float((weight * kept * rest**2).sum() / weight[kept].sum()))
            scatter *= math.sqrt(kept.sum() / free)
            kept = np.abs(rest) <= max(0.2, min(INLIER, 3.5 * scatter))
            if kept.sum() < order + 1:
                return None
        normal = (columns * (weight * kept)[:, None]).T @ columns
        covariance = np.linalg.pinv(normal) * scatter**2
        if order == 2:
            bend = abs(fit[0]) * np.ptp(numbers) ** 2 / 4
            if bend > LATE and abs(fit[0]) > 4 * math.sqrt(covariance[0, 0]):
                break
    drift = 0.0
    if order == 2:  # instants = c + b k + a k^2  ->  k = start + u + drift u^2 / 2
        a, b, c = fit
        # instants n = g u; expand the inverse about n = 0
        root = math.sqrt(max(b * b - 4 * a * c, 1e-12))
        start = (-b + root) / (2 * a)
        slope = b + 2 * a * start  # dn/dk at n = 0
        drift = -2 * a / slope
        slope_deviation = math.sqrt(covariance[1, 1])
        first_deviation = math.sqrt(covariance[2, 2])
    else:
        slope, first = (float(v) for v in fit)
        start = -first / slope
        slope_deviation, first_deviation = (math.sqrt(v) for v in np.diag(covariance))
    return Clock(
        slope,
        start,
        drift,
        slope_deviation,
        first_deviation / slope,
        scatter,
        int(kept.sum()),
    )
