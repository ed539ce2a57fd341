"""When the fast camera took its frames, in the sharp camera's count, found from what moves.

Each sharp frame, seen on the fast camera's pixels, is compared with the fast ones around its
instant. What stands still says nothing about time and is taken out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

INLIER = 0.75
"""Fast frames by which the instant of a sharp frame may lie aside of the line through all."""
SHARE = 0.6
"""Of the sharp frames in the fast camera's time, that must lie on the line."""
CHANCE = 0.00005
"""Largest probability that as many instants lie on one line by chance."""
REACH = 6
"""Fast frames to either side of a first guess in which an instant is looked for; all of them where
there are few sharp ones."""
FEW = 4
STEPS = 2
WIDTHS = 0.5, 1.0
"""Half the distance of the two fast frames that an instant is found between."""
STEADIER = 0.5
"""What a wider distance must leave of the scatter."""
EXPONENTS = np.arange(0.6, 2.01, 0.1)
UNCERTAIN = 0.5
"""Fast frames by which the start may be uncertain."""
FLOOR = 0.1
"""Share of the way between two fast frames, by which an instant is uncertain without any noise."""
UNSURE = 0.3
"""Fast frames by which noise may move the instant of a sharp frame, for it to be used."""
KNOWN = 0.0005
"""Of itself, by which a known gap may be wrong (1 sigma)."""
USUAL = 0.15
"""Deviation of the instant of a sharp frame, in fast frames."""
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
    chance: float = math.nan
    """That the instants lie on a line by chance."""

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
    weight = _moving(sharp, fast)
    sharp, fast = (pictures * weight for pictures in (sharp, fast))
    line = _line(
        _unit(sharp - (sharp.mean(0) if len(sharp) > 1 else fast.mean(0)))
        @ _unit(fast - fast.mean(0)).T,
        sharp_numbers,
        fast_numbers,
        gap,
    )
    if line is None:
        return None
    at = line.of_sharp(sharp_numbers)
    there = (at >= fast_numbers[0]) & (at <= fast_numbers[-1])
    beside = _between(fast, fast_numbers, at[there])
    sharp = sharp * (float((sharp[there] * beside).sum()) / float((sharp[there] ** 2).sum()))
    best: Clock | None = None
    for width in WIDTHS:
        clock = _followed(sharp, fast, sharp_numbers, fast_numbers, gap, line, width)
        better = best is None or (
            clock is not None
            and clock.used >= best.used
            and clock.scatter < STEADIER * best.scatter
        )
        if better:
            best = clock
    return best


def _followed(
    sharp: np.ndarray,
    fast: np.ndarray,
    sharp_numbers: np.ndarray,
    fast_numbers: np.ndarray,
    gap: float | None,
    line: Clock,
    width: float,
) -> Clock | None:
    """The clock beside a line, from the `width` fast frames to either side of each instant."""
    still = np.zeros(fast.shape[1], np.float32)
    for _ in range(STEPS):
        found = _instants(sharp, fast - still, sharp_numbers, fast_numbers, line, width)
        if found is None:
            return None
        which, instants, certainty = found
        clock = _fitted(sharp_numbers[which], instants, certainty, gap)
        if clock is None:
            return None
        line = clock
        at = line.of_sharp(sharp_numbers)
        inside = (at >= fast_numbers[0]) & (at <= fast_numbers[-1])
        if not inside.any():
            return None
        still = np.median(_between(fast, fast_numbers, at[inside]) - sharp[inside], 0)
    reach = _reach(len(sharp), len(fast))
    chance = _binomial(line.used, len(which), min(1.0, 2 * INLIER / (2 * reach + 1)))
    if chance > CHANCE or line.start_deviation * line.gap > UNCERTAIN:
        return None
    return replace(line, chance=chance)


def _between(pictures: np.ndarray, numbers: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Pictures at instants between those of `numbers`, linearly."""
    place = np.interp(at, numbers, np.arange(len(numbers)))
    low = np.minimum(place.astype(int), len(numbers) - 2)
    share = (place - low)[:, None].astype(np.float32)
    between: np.ndarray = pictures[low] * (1 - share) + pictures[low + 1] * share
    return between


def _binomial(least: int, tries: int, chance: float) -> float:
    """Probability of at least so many successes."""
    return sum(
        math.comb(tries, n) * chance**n * (1 - chance) ** (tries - n)
        for n in range(least, tries + 1)
    )


def _reach(sharp: int, fast: int) -> int:
    return fast if sharp <= FEW else REACH


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


def _instants(
    sharp: np.ndarray,
    fast: np.ndarray,
    sharp_numbers: np.ndarray,
    fast_numbers: np.ndarray,
    line: Clock,
    width: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Of the sharp frames that lie within the fast camera's time: which they are, their instants
    in fast frames, and the certainty of each.

    A sharp frame at the share s of the way between two fast ones differs from them by d0 and d1
    (squared, summed), these from each other by m. Where things move little, d0 = s^2 m and d1 =
    (1 - s)^2 m; where they leave their places at once, d0 = s m and d1 = (1 - s) m: in both cases s
    = 1/2 + (d0 - d1) / 2m. Noise adds the same to d0 and d1, and `_noise` to m.
    """
    reach = _reach(len(sharp), len(fast))
    noise = _noise(fast)
    power = fast.var(0)  # pixels that hardly move have little weight, and count for little
    pixels = float(power.sum()) ** 2 / max(float((power**2).sum()), 1e-12)
    which, instants, certainty = [], [], []
    for k, at in enumerate(line.of_sharp(sharp_numbers)):
        if not fast_numbers[0] - 0.5 <= at <= fast_numbers[-1] + 0.5:
            continue
        n = int(np.abs(fast_numbers - at).argmin())
        low, high = max(0, n - reach), min(len(fast), n + reach + 1)
        error = ((fast[low:high] - sharp[k]) ** 2).sum(1)
        n = low + int(error.argmin())
        ends = [(n - 1, n), (n, n + 1)] if width < 1 else [(n - int(width), n + int(width))]
        found = []
        for a, b in ends:
            if a < 0 or b >= len(fast) or fast_numbers[b] - fast_numbers[a] != b - a:
                continue  # at an end, or frames were lost
            apart = float(((fast[a] - fast[b]) ** 2).sum())
            apart = max(apart - noise, 0.01 * apart)
            d0, d1 = (float(((fast[i] - sharp[k]) ** 2).sum()) for i in (a, b))
            share = 0.5 + (d0 - d1) / (2 * apart)
            time = float(fast_numbers[a]) + (b - a) * share
            if abs(time - fast_numbers[n]) > 1 + width:
                continue
            # that which holds the instant counts
            outside = max(0.0, -share, share - 1)
            # noise of sums over n pixels scatters by 1 / sqrt(n) of itself
            unsure = (b - a) * math.hypot(FLOOR, noise / math.sqrt(pixels) / apart)
            if unsure <= UNSURE:
                found.append((time, 1 / unsure**2 / (1 + 100 * outside)))
        if not found:
            continue
        times, weights = np.array(found).T
        which.append(k)
        instants.append(float(np.average(times, weights=weights)))
        certainty.append(float(weights.max()))
    if not which:
        return None
    return np.array(which), np.array(instants), np.array(certainty)


def _noise(fast: np.ndarray) -> float:
    """What noise alone makes of the squared difference of two fast frames: differences grow with
    their distance j as c + a j^p, and c is it."""
    lags = np.arange(1, min(6, len(fast) - 1) + 1)
    apart = np.array([float(((fast[j:] - fast[:-j]) ** 2).sum(1).mean()) for j in lags])
    best = (math.inf, 0.0)
    for p in EXPONENTS:
        columns = np.stack([np.ones(len(lags)), lags**p], 1)
        (c, a), *_ = np.linalg.lstsq(columns, apart, rcond=None)
        left = float(((columns @ (c, a) - apart) ** 2).sum())
        if left < best[0] and a > 0:
            best = left, float(c)
    return min(max(best[1], 0.0), 0.95 * float(apart[0]))


def _fitted(
    numbers: np.ndarray, instants: np.ndarray, certainty: np.ndarray, gap: float | None
) -> Clock | None:
    """The clock through the instants of sharp frames; those far aside do not count."""
    weight = certainty / max(float(certainty.max()), 1e-12)
    if len(numbers) < 3 or np.ptp(numbers) == 0:
        if gap is None or not len(numbers):
            return None
        slope = gap
        first = float(np.average(instants - slope * numbers, weights=weight + 1e-9))
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
            left, right_ = columns * w[:, None], instants * w
            if gap is not None:  # one more observation: the gap that is known
                row = np.zeros(order + 1)
                row[-2] = USUAL / (KNOWN * gap)
                left, right_ = np.vstack([left, row]), np.append(right_, row[-2] * gap)
            fit, *_ = np.linalg.lstsq(left, right_, rcond=None)
            rest = instants - columns @ fit
            free = max(1, int(kept.sum()) - order - 1)
            scatter = math.sqrt(float((weight * kept * rest**2).sum() / weight[kept].sum()))
            scatter *= math.sqrt(kept.sum() / free)
            kept = np.abs(rest) <= max(0.2, min(INLIER, 3.5 * scatter))
            if kept.sum() < order + 1:
                return None
        covariance = np.linalg.pinv(left.T @ left) * max(scatter, 0.02) ** 2
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
        slope = float(b + 2 * a * start)  # dn/dk at n = 0
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
