"""What the fast camera makes of a sharp frame: its blur, its grey scale and its noise.

All of it is estimated from the key frames, of which both cameras hold a picture: the fast frame of
a key frame's instant is the binned key frame, blurred, times a gain, plus an offset and noise. The
noise's variance is fitted as a + b I + c G^2: a of read noise, b I of photons (I: intensity), and
c G^2 of what lies a little beside where it should (G: grey levels a fast pixel; sqrt(c) is the
displacement in fast pixels). So "noise" is everything by which the two cameras differ where they
show the same. Where flat fields are missing, the gain differs smoothly from place to place as well.

Shapes: h w the fast camera's grid, H = scale*h, W = scale*w.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.ndimage import gaussian_filter, uniform_filter
from scipy.optimize import nnls

from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.pairing.agreement import BLURS, LOOKED_AT

TOLERANCE = 0.0125
"""Deviation that is always allowed, as a share of the key frames' contrast (their standard
deviation): what a good method leaves where there is no noise at all."""
DISPLACEMENT = 0.05
"""Displacement that is always allowed, in fast pixels."""
ROUNDING = 1 / 65535
"""Least noise there is, of full scale."""
CLASSES = 24
"""Classes of intensity, and of slope, in which variances are taken."""
ODD = 5.0
"""Deviations by which a pixel must lie aside at most key frames to be left out: it is dead."""
ASIDE = 0.005
"""Share of the pixels that may be far aside for other reasons than noise."""
SQUARE = 5
"""Side in fast pixels of the squares that are looked at one by one."""
APART = 3.0
"""Chi-square of a square at most key frames above which the cameras themselves differ there: it is
left out. (Noise alone hardly reaches 2.)"""
SMOOTH = 1 / 12
"""Deviation of the Gaussian in which gains are compared, of the shorter side."""
UNEVEN = 0.02
"""Deviation of a place's gain that matters."""
SMALLEST = 64
"""Pixels of the fast frame below which no noise can be fitted."""


@dataclass(frozen=True)
class Observation:
    """The fast camera, as the key frames show it; see the module."""

    scale: int
    """Side of a fast pixel in sharp ones."""
    blur: float = 0.0
    """Standard deviation in fast pixels, besides the pixels' own size."""
    gain: float = 1.0
    offset: float = 0.0
    read: float = 0.0
    """a"""
    shot: float = 0.0
    """b: 1 / photons of a pixel at full scale, where photons are all there is."""
    slope: float = 0.0
    """c"""
    contrast: float = 1.0
    """Standard deviation of the binned key frames."""
    keys: int = 0
    """Key frames that it was estimated from; 0: nothing was."""
    usable: np.ndarray | None = field(default=None, repr=False, compare=False)
    """(h, w): pixels that are not dead, and where the cameras do not differ by themselves; None:
    all."""
    unevenness: np.ndarray | None = field(default=None, repr=False, compare=False)
    """(h, w): gain of each pixel, in units of `gain`; None: 1."""

    @property
    def gains(self) -> float | np.ndarray:
        """Gain of all pixels, or of each (h, w)."""
        return self.gain if self.unevenness is None else self.gain * self.unevenness

    def seen(self, frame: np.ndarray) -> np.ndarray:
        """The fast frame (h, w) without noise of a sharp frame (H, W)."""
        return self.gains * _blurred(bin_down(frame, self.scale), self.blur) + self.offset

    def variance(self, seen: np.ndarray) -> np.ndarray:
        """Of a fast frame around what `seen` gives: (h, w) -> same."""
        slope = max(self.slope, DISPLACEMENT**2) * _steepness(seen)
        variance: np.ndarray = self.noise(seen) + slope + (TOLERANCE * self.contrast) ** 2
        return variance

    def noise(self, seen: np.ndarray) -> np.ndarray:
        """The part of `variance` that is noise, and no tolerance. In the dark one photon is always
        possible (N + 1 instead of N)."""
        level = np.clip(seen, 0, None) + self.shot
        noise: np.ndarray = self.read + self.shot * level + ROUNDING**2
        return noise

    def squares(self, values: np.ndarray, usable: np.ndarray | None = None) -> np.ndarray:
        """Mean of the usable pixels of the square around each usable pixel, 0 where most of them
        are not: (h, w) -> same."""
        usable = self.usable if usable is None else usable
        if usable is None:
            mean: np.ndarray = uniform_filter(values, SQUARE, mode="reflect")
            return mean
        share = uniform_filter(usable.astype(float), SQUARE, mode="reflect")
        mean = uniform_filter(np.where(usable, values, 0.0), SQUARE, mode="reflect")
        return np.where(usable & (share > 0.5), mean / np.maximum(share, 0.5), 0.0)

    @property
    def uneven_by(self) -> float:
        """Largest deviation of a pixel's gain from that of all."""
        return 0.0 if self.unevenness is None else float(np.abs(self.unevenness - 1).max())

    def told(self) -> str:
        """In words."""
        if not self.keys:
            return "the fast camera's noise is not known"
        parts = [f"noise {100 * float(np.sqrt(self.read + self.shot)):.2g} % at full scale"]
        if self.shot > 0:
            parts.append(
                f"as of {1 / self.shot:.3g} photons a pixel with a read noise of "
                f"{100 * float(np.sqrt(self.read)):.2g} %"
            )
        if self.blur:
            parts.append(f"blur of {self.blur:g} fast pixels")
        if self.slope > DISPLACEMENT**2:
            parts.append(f"edges {float(np.sqrt(self.slope)):.2f} fast pixels aside")
        if self.unevenness is not None:
            parts.append(
                f"its gain {100 * self.uneven_by:.2g} % aside in places, as without flat fields"
            )
        if self.usable is not None:
            parts.append(
                f"{np.count_nonzero(~self.usable)} pixels left out, dead or apart at key frames"
            )
        return "fast camera, from the key frames: " + ", ".join(parts)


def observe(fast: Sequence[np.ndarray], keys: Mapping[int, np.ndarray]) -> Observation:
    """Estimate the fast camera from up to 8 key frames spread over the recording.

    Args:
        fast: frames (h, w) in [0, 1].
        keys: fast frame number -> key frame (s h, s w) in [0, 1], with s a whole number.
    """
    times = sorted(keys)
    chosen = np.unique(np.linspace(0, len(times) - 1, LOOKED_AT).round().astype(int))
    frames = np.stack([np.asarray(fast[times[i]], np.float64) for i in chosen])
    sharp = keys[times[0]]
    scale = sharp.shape[0] // frames.shape[1]
    low = np.stack([bin_down(keys[times[i]], scale) for i in chosen]).astype(np.float64)
    if frames[0].size < SMALLEST:
        return Observation(scale)
    blur, gain, offset = _matched(low, frames)
    seen = gain * np.stack([_blurred(one, blur) for one in low])
    uneven = _unevenness(seen, frames - offset) if len(chosen) > 1 else None
    seen = (seen if uneven is None else uneven * seen) + offset
    aside = frames - seen
    read, shot, slope = _variances(seen, aside)
    contrast = float(low.std())
    found = Observation(
        *(scale, blur, gain, offset, read, shot, slope, contrast, len(chosen)), unevenness=uneven
    )
    square = aside**2 / np.stack([found.variance(one) for one in seen])
    # The largest were left out of the fit: as much noise is stated as there is.
    kept = square < ODD**2
    fitted = np.stack([found.noise(one) + slope * _steepness(one) for one in seen])
    factor = float(np.square(aside[kept]).sum() / fitted[kept].sum())
    found = replace(found, read=factor * read, shot=factor * shot, slope=factor * slope)
    square = aside**2 / np.stack([found.variance(one) for one in seen])
    dead = np.median(square, 0) > ODD**2
    for _ in range(50):  # what is left of a square may be worse than the whole
        apart = np.median([found.squares(one, ~dead) for one in square], 0) > APART
        if not (apart & ~dead).any():
            break
        dead |= apart
    if 0 < np.count_nonzero(dead) < dead.size // 10 and len(chosen) > 1:
        return replace(found, usable=~dead)
    return found


def _matched(low: np.ndarray, frames: np.ndarray) -> tuple[float, float, float]:
    """Blur, gain and offset with which binned key frames are nearest to the fast ones (K, h, w).

    A blur is only believed where it leaves less than none does by more than chance.
    """
    fits = [
        (blur, *_line(np.stack([_blurred(one, blur) for one in low]), frames))
        for blur in (0.0, *BLURS)
    ]
    best = min(fits, key=lambda fit: fit[3])
    return (best if best[3] < 0.99 * fits[0][3] else fits[0])[:3]


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Gain and offset of y ~ gain x + offset, and the mean square that is left; pixels far aside
    do not count. A picture without contrast keeps gain 1."""
    x, y = x.ravel(), y.ravel()
    kept = np.ones(x.size, bool)
    gain, offset = 1.0, 0.0
    for _ in range(4):
        mean_x, mean_y = x[kept].mean(), y[kept].mean()
        spread = float(np.square(x[kept] - mean_x).mean())
        if spread > ROUNDING**2:
            gain = float(((x[kept] - mean_x) * (y[kept] - mean_y)).mean()) / spread
        offset = float(mean_y - gain * mean_x)
        aside = np.abs(y - gain * x - offset)
        limit = 6 * float(np.median(aside)) + ROUNDING
        kept = aside <= limit
    return gain, offset, float(np.square(np.minimum(aside, limit)).mean())


def _unevenness(seen: np.ndarray, frames: np.ndarray) -> np.ndarray | None:
    """Smooth gain (h, w) with which `seen` is nearest to `frames`, both (K, h, w); None where it
    hardly matters. Pixels far aside do not count."""
    aside = np.abs(frames - seen)
    weight = (aside <= 6 * np.median(aside) + ROUNDING).astype(float)
    sigma = SMOOTH * min(seen.shape[1:])
    both, own = (
        gaussian_filter((weight * seen * other).mean(0), sigma, mode="nearest")
        for other in (frames, seen)
    )
    level = float(np.square(seen).mean())
    if not level:
        return None
    gain: np.ndarray = (both + 0.01 * level) / (own + 0.01 * level)
    left, before = (float((weight * np.square(frames - g * seen)).mean()) for g in (gain, 1.0))
    return gain if left < 0.95 * before and np.abs(gain - 1).max() > UNEVEN else None


def _variances(seen: np.ndarray, aside: np.ndarray) -> tuple[float, float, float]:
    """a, b and c of the module, from what lies aside in classes of intensity and of slope.

    The largest of a class are left out, so that dead pixels do not count (no median: of few photons
    a median says nothing). Each class' weight is that of a variance of so many numbers, where it is
    as fitted so far.
    """
    level = np.clip(seen, 0, None).ravel()
    steep = np.stack([_steepness(one) for one in seen]).ravel()
    square = aside.ravel() ** 2
    rows, values, counts = [], [], []
    for by in (level, steep):
        for part in np.array_split(np.argsort(by, kind="stable"), CLASSES):
            kept = part[np.argsort(square[part])][: math.ceil((1 - ASIDE) * len(part))]
            rows.append((1.0, float(level[kept].mean()), float(steep[kept].mean())))
            values.append(float(square[kept].mean()))
            counts.append(len(kept))
    table, found = np.array(rows), np.array(values)
    expected = np.full(len(found), found.mean())
    for _ in range(5):
        weights = np.sqrt(counts) / (expected + ROUNDING**2)
        fit, _ = nnls(table * weights[:, None], found * weights)
        expected = np.maximum(table @ fit, 0.01 * found.mean())
    return float(fit[0]), float(fit[1]), float(fit[2])


def _blurred(low: np.ndarray, sigma: float) -> np.ndarray:
    return gaussian_filter(low, sigma, mode="nearest") if sigma else low


def _steepness(frame: np.ndarray) -> np.ndarray:
    """Squared slope in grey levels a pixel: (h, w) -> same."""
    if min(frame.shape) < 2:
        return np.zeros_like(frame)
    down, right = np.gradient(frame)
    steepness: np.ndarray = down**2 + right**2
    return steepness
