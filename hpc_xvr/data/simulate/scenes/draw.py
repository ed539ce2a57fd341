"""Shapes, textures and motions that scenes are made of; thicknesses in pixels, float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d

_CHUNK = 1 << 21
# Half sides of the squares that spheres are drawn in.
_SIZES = np.concatenate((np.arange(1, 5), np.arange(6, 16, 2), np.arange(16, 4096, 8)))


def spheres(
    shape: tuple[int, int],
    y: np.ndarray,
    x: np.ndarray,
    r: np.ndarray,
    weight: np.ndarray | float = 1.0,
) -> np.ndarray:
    """Sum of the chords 2 sqrt(r^2 - d^2) of spheres (n,) at (y, x), times weight: (H, W)."""
    height, width = shape
    y, x, r = (np.atleast_1d(np.asarray(a, np.float32)) for a in (y, x, r))
    seen = (r > 0.2) & (y > -r) & (y < height - 1 + r) & (x > -r) & (x < width - 1 + r)
    weight = np.broadcast_to(np.asarray(weight, np.float32), r.shape)[seen]
    y, x, r = y[seen], x[seen], r[seen]
    half = _SIZES[np.searchsorted(_SIZES, np.ceil(r + 0.75))]
    pad = 2 * int(half.max(initial=0))  # no sphere reaches beyond, so none needs cutting
    canvas = np.zeros((height + 2 * pad, width + 2 * pad))
    for size in np.unique(half):
        step = max(1, _CHUNK // (2 * size + 1) ** 2)
        members = np.flatnonzero(half == size)
        for start in range(0, len(members), step):
            part = members[start : start + step]
            _splat(canvas, y[part] + pad, x[part] + pad, r[part], weight[part], int(size))
    return canvas[pad : pad + height, pad : pad + width].astype(np.float32)


def _splat(
    canvas: np.ndarray, y: np.ndarray, x: np.ndarray, r: np.ndarray, weight: np.ndarray, half: int
) -> None:
    offsets = np.arange(-half, half + 1)
    near_y, near_x = np.rint(y), np.rint(x)
    dy = (near_y - y)[:, None] + offsets.astype(np.float32)  # n, s
    dx = (near_x - x)[:, None] + offsets.astype(np.float32)
    r2 = (r * r)[:, None]
    # Spheres of a pixel or two would flicker as they move if sampled at pixel centres only.
    points = (-0.25, 0.25) if half <= 4 else (0.0,)
    chord = None
    for a in points:
        rest = r2 - np.square(dy + np.float32(a))
        for b in points:
            inside = rest[:, :, None] - np.square(dx + np.float32(b))[:, None]
            np.maximum(inside, 0, out=inside)
            np.sqrt(inside, out=inside)
            chord = inside if chord is None else np.add(chord, inside, out=chord)
    chord *= (np.float32(2 / len(points) ** 2) * weight)[:, None, None]
    row = (near_y.astype(np.intp)[:, None] + offsets) * canvas.shape[1]
    column = near_x.astype(np.intp)[:, None] + offsets
    index = row[:, :, None] + column[:, None]
    flat = canvas.reshape(-1)
    flat += np.bincount(index.ravel(), chord.ravel(), minlength=flat.size)


def cylinder(distance: np.ndarray, r: np.ndarray | float) -> np.ndarray:
    """Chord of a round tube of radius r seen from the side, by distance from its axis."""
    return 2 * np.sqrt(np.maximum(np.square(r) - np.square(distance), 0, dtype=np.float32))


def cover(distance: np.ndarray, soft: float = 1.0) -> np.ndarray:
    """1 inside (distance < 0), 0 outside, with an edge `soft` pixels wide."""
    return np.clip(0.5 - distance / np.float32(soft), 0, 1, dtype=np.float32)


def smoothstep(x: np.ndarray | float) -> np.ndarray:
    """Rise from 0 to 1 around x = 0; 90 % of it within -1..1."""
    return 0.5 + 0.5 * np.tanh(1.5 * np.asarray(x, np.float32))


def noise(
    shape: tuple[int, ...], grain: float | tuple[float, ...], rng: np.random.Generator
) -> np.ndarray:
    """Random texture of zero mean and unit variance; grain: Gaussian sigma in pixels."""
    white = rng.standard_normal(shape, dtype=np.float32)
    smooth = (
        gaussian_filter1d(white, grain, mode="wrap")
        if len(shape) == 1
        else gaussian_filter(white, grain, mode="wrap")
    )
    return (smooth - smooth.mean()) / (smooth.std() + 1e-9)


def wobble(
    rng: np.random.Generator, fast: float, slow: float, channels: int = 1, waves: int = 4
) -> Callable[[float], np.ndarray]:
    """Smooth random functions of time, unit variance: t -> (channels,).

    Sums of sines with periods log-uniform in fast..slow (frames).
    """
    omega = 2 * np.pi / np.exp(rng.uniform(np.log(fast), np.log(slow), (channels, waves)))
    phase = rng.uniform(0, 2 * np.pi, (channels, waves))
    size = rng.uniform(0.5, 1.0, (channels, waves))
    size /= np.sqrt((size**2).sum(1, keepdims=True) / 2)
    return lambda t: (size * np.sin(omega * t + phase)).sum(1).astype(np.float32)


def wander(n: int, grain: float, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """Smooth random function of a place -n..2n, unit variance, zero at 0."""
    line = noise((3 * n + 1,), grain, rng)
    line -= line[n]
    places = np.arange(-n, 2 * n + 1, dtype=np.float32)
    return lambda s: np.interp(s, places, line).astype(np.float32)
