"""Where the fast camera's pixels lie on the sharp camera's frames, found from what both saw.

A place is four numbers and a flip: origin, and scale times cosine and sine of the rotation (six
numbers with a shear). They are searched for coarsely, by masked normalised correlation over scales,
rotations and flips (Padfield 2012, IEEE Trans. Image Process. 21, 2706), and refined on the pixels
by Gauss-Newton steps (Lucas and Kanade 1981; Evangelidis and Psarakis 2008). Pictures are compared
after their local mean and contrast are taken out, so that neither the beam's shape nor gain, offset
and moderate blur count.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import fft
from scipy.ndimage import gaussian_filter, map_coordinates, uniform_filter, zoom

from hpc_xvr.data.degrade import bin_down

Flip = Literal["none", "rows", "columns", "both"]
FLIPS: dict[Flip, tuple[slice, slice]] = {
    "none": (slice(None), slice(None)),
    "rows": (slice(None, None, -1), slice(None)),
    "columns": (slice(None), slice(None, None, -1)),
    "both": (slice(None, None, -1), slice(None, None, -1)),
}
COARSE = 56.0
"""Pixels of the fast frame's longer side in the first search."""
MIDDLE = 112.0
"""The same while candidates are told apart."""
SCALE_STEP = 1.03
TURN_STEP = 2.0
"""Degrees."""
CANDIDATES = 24
LEAST_OVERLAP = 0.3
"""Of the smaller field of view, that both cameras must see."""
LOCAL = 5.0
"""Pixels compared over which mean and contrast are taken out."""
PIXEL = 0.29
"""Deviation of a box of width 1."""


@dataclass(frozen=True)
class Place:
    """HR (row, column) = origin + matrix @ (row, column) on the flipped fast frame; continuous
    coordinates, pixel k covers k to k + 1."""

    flip: Flip
    matrix: np.ndarray
    """(2, 2); a similarity: ((a, -b), (b, a))."""
    origin: np.ndarray
    """(2,)"""
    score: float = 0.0
    """Normalised correlation of what both saw."""
    overlap: float = 0.0
    """Share of the fast frame's pixels that lie on the sharp one."""

    @property
    def scale(self) -> float:
        return math.sqrt(abs(float(np.linalg.det(self.matrix))))

    @property
    def rotation_deg(self) -> float:
        (a, b), (c, d) = self.matrix
        return math.degrees(math.atan2(c - b, a + d))

    def at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """HR (row, column), (2, ...), of places on the flipped fast frame."""
        (a, b), (c, d) = self.matrix
        return np.stack(
            [self.origin[0] + a * rows + b * columns, self.origin[1] + c * rows + d * columns]
        )

    def corners(self, size: tuple[int, ...]) -> np.ndarray:
        """HR (row, column), (4, 2), of the corners of the flipped fast frame."""
        rows, columns = np.array([[0, 0, size[0], size[0]], [0, size[1], 0, size[1]]], float)
        return self.at(rows, columns).T


def similarity(flip: Flip, scale: float, degrees: float, origin: np.ndarray) -> Place:
    angle = math.radians(degrees)
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return Place(flip, np.array([[c, -s], [s, c]]), np.asarray(origin, float))


def levelled(picture: np.ndarray, width: float, mask: np.ndarray | None = None) -> np.ndarray:
    """A picture without its local mean, in units of its local contrast; 0 where it is masked.

    Args:
        width: pixels over which mean and contrast are local.
        mask: True where the picture holds something.
    """
    weight = np.ones(picture.shape, np.float32) if mask is None else mask.astype(np.float32)
    picture = picture.astype(np.float32) * weight

    def smooth(values: np.ndarray, side: float) -> np.ndarray:
        side = 2 * round(side / 2) + 1
        found: np.ndarray = uniform_filter(values, side, mode="constant")
        return uniform_filter(found, side, mode="constant")

    near = np.maximum(smooth(weight, width), 1e-2)
    rest = (picture - smooth(picture, width) / near) * weight
    power = smooth(rest * rest, 2 * width) / np.maximum(smooth(weight, 2 * width), 1e-2)
    usual = float(power[weight > 0].mean()) if (weight > 0).any() else 1.0
    level: np.ndarray = rest / np.sqrt(np.maximum(power, 0) + 0.1 * usual + 1e-12)
    return level


def shrunk(picture: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """A picture on pixels `factor` times as wide, as many as fit, in its middle; and (row, column)
    of the upper left corner of the first of them."""
    factor = max(1.0, factor)
    sides = np.array([max(1, math.floor(side / factor)) for side in picture.shape])
    first = (np.array(picture.shape) - factor * sides) / 2
    if factor == 1:
        return picture.astype(np.float32), first
    smooth = gaussian_filter(
        picture.astype(np.float32), PIXEL * math.sqrt(factor**2 - 1), truncate=3
    )
    rows, columns = (
        at + (np.arange(side) + 0.5) * factor - 0.5 for at, side in zip(first, sides, strict=True)
    )
    at = np.stack(np.meshgrid(rows, columns, indexing="ij"))
    return map_coordinates(smooth, at, order=1, mode="nearest"), first


class Thinned:
    """A sharp picture (H, W), and the same on pixels 2, 4, ... times as wide, made when needed."""

    def __init__(self, picture: np.ndarray) -> None:
        self.shape = picture.shape
        self._levels = [picture.astype(np.float32)]

    def for_pixel(self, pixel: float) -> tuple[np.ndarray, int]:
        """The picture on the widest pixels of which at least 2.5 fit in one of `pixel`, and how
        wide these are."""
        level = max(0, math.floor(math.log2(max(1.0, pixel / 2.5))))
        while len(self._levels) <= level:
            last = self._levels[-1]
            h, w = (side - side % 2 for side in last.shape)
            self._levels.append(bin_down(last[:h, :w], 2))
        return self._levels[level], 2**level

    def smooth(self, pixel: float, blur: float = 0.0) -> tuple[np.ndarray, int]:
        """As a camera of so wide pixels would see it, but thinned out less; and how much. `blur`:
        deviation beyond that of the pixel, in such pixels."""
        picture, thin = self.for_pixel(pixel)
        sigma = math.sqrt(max(0.0, PIXEL**2 * (pixel**2 - thin**2) + (blur * pixel) ** 2)) / thin
        return gaussian_filter(picture, sigma, truncate=3, mode="nearest"), thin


def candidates(
    sharp: Thinned,
    fasts: Sequence[np.ndarray],
    scales: tuple[float, float],
    turns: float,
    longest: float = COARSE,
    flips: Sequence[Flip] = tuple(FLIPS),
) -> list[tuple[Place, int]]:
    """Places that fit best on a coarse grid, the best first, each apart from the others, and the
    number of the fast picture that fits there.

    Args:
        sharp: (H, W).
        fasts: pictures (h, w) of one size, any of which may fit.
        scales: smallest and largest scale.
        turns: largest rotation, degrees.
        longest: pixels of the fast frame's longer side; more are slower and see finer structure.
    """
    size = fasts[0].shape
    factor = max(1.0, max(size) / longest)
    fineness = math.sqrt(longest / COARSE)
    count = math.ceil(math.log(scales[1] / scales[0]) / math.log(SCALE_STEP) * fineness) + 1
    turning = math.ceil(turns / TURN_STEP * fineness)
    lows = [shrunk(fast, factor) for fast in fasts]
    sought, first = _Sought([low for low, _ in lows], flips), lows[0][1]
    found: list[tuple[float, Place, int]] = []
    for scale in np.geomspace(*scales, count):
        blurred, thin = sharp.smooth(scale * factor)
        pixel = scale * factor / thin
        for degrees in np.linspace(-turns, turns, 2 * turning + 1) if turning else (0.0,):
            place = similarity("none", float(pixel), float(degrees), np.zeros(2))
            picture, mask, corner = _seen(blurred, place)
            if min(picture.shape) < 8:
                continue
            level = levelled(picture, LOCAL, mask)
            for shift, score, number, flip in sought.on(level, mask):
                matrix = place.matrix * (thin / factor)
                origin = thin * place.at(*(corner + shift)) - matrix @ first
                found.append((score, Place(flip, matrix, origin), number))
    found.sort(key=lambda one: -one[0])
    kept: list[tuple[Place, int]] = []
    for score, place, number in found:
        near = 5 * factor * place.scale
        mine = place.corners(size)
        if all(
            other.flip != place.flip or np.abs(other.corners(size) - mine).max() > near
            for other, _ in kept
        ):
            kept.append((replace(place, score=score), number))
        if len(kept) == CANDIDATES:
            break
    return kept


def _seen(sharp: np.ndarray, place: Place) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The whole sharp frame on the grid of `place`: picture, mask, and the grid's first corner."""
    back = np.linalg.inv(place.matrix)
    corners = np.array(list(itertools.product((0, sharp.shape[0]), (0, sharp.shape[1]))), float)
    ends = corners @ back.T
    low = np.floor(ends.min(0))
    sides = np.ceil(ends.max(0) - low).astype(int)
    rows, columns = np.meshgrid(
        *(low[axis] + np.arange(sides[axis]) + 0.5 for axis in (0, 1)), indexing="ij"
    )
    at = place.at(rows, columns)
    inside = _inside(at, sharp.shape)
    picture = map_coordinates(sharp, at - 0.5, order=1, mode="nearest")
    return picture, inside, low


def _inside(at: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    inside: np.ndarray = (
        (at[0] >= 0.5) & (at[0] <= size[0] - 0.5) & (at[1] >= 0.5) & (at[1] <= size[1] - 0.5)
    )
    return inside


class _Sought:
    """The fast camera's pictures, each in every flip, to be found on sharp ones."""

    def __init__(self, lows: Sequence[np.ndarray], flips: Sequence[Flip]) -> None:
        self.grid = lows[0].shape
        self.ways = [(number, flip) for number in range(len(lows)) for flip in flips]
        levels = [levelled(low, LOCAL) for low in lows]
        self._pictures = np.stack([levels[n][FLIPS[flip]] for n, flip in self.ways])
        self._known: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def on(
        self, sharp: np.ndarray, mask: np.ndarray
    ) -> Iterator[tuple[np.ndarray, float, int, Flip]]:
        """Of each picture and flip: where on `sharp`, levelled, it fits best, how well, which it
        is.

        Levelled pictures have mean 0 and variance 1 everywhere, so that a sum of products is a
        correlation.
        """
        shape = tuple(
            fft.next_fast_len(-(-(a + b) // 12) * 12, real=True)
            for a, b in zip(sharp.shape, self.grid, strict=True)
        )
        if shape not in self._known:
            self._known[shape] = (
                np.conj(fft.rfft2(np.ones(self.grid, np.float32), shape)),
                np.conj(fft.rfft2(self._pictures, shape)),
            )
        ones, pictures = self._known[shape]
        count = fft.irfft2(fft.rfft2(mask.astype(np.float32), shape) * ones, shape)
        least = max(100.0, LEAST_OVERLAP * min(float(mask.sum()), math.prod(self.grid)))
        weight = np.where(count >= least, 1 / np.sqrt(np.maximum(count, 1)), 0)
        scores = fft.irfft2(fft.rfft2(sharp, shape) * pictures, shape) * weight
        for (number, flip), score in zip(self.ways, scores, strict=True):
            place = np.array(np.unravel_index(int(score.argmax()), score.shape))
            wrapped = place > np.array(sharp.shape)
            best = float(score[tuple(place)])
            yield place - np.where(wrapped, shape, 0), best, number, flip


@dataclass(frozen=True)
class Fit:
    """A place, and how certain it is."""

    place: Place
    covariance: np.ndarray
    """Of the parameters (origin row and column, then those of the matrix)."""
    blur: float
    """Deviation of a Gaussian, fast pixels, by which the fast camera is less sharp than a binned
    sharp frame."""

    def corner_deviation(self, size: tuple[int, ...]) -> float:
        """Deviation, fast pixels, of the least certain corner of the field of view (h, w)."""
        h, w = size
        worst = 0.0
        count = len(self.covariance)
        for r, c in itertools.product((-h / 2, h / 2), (-w / 2, w / 2)):
            j = np.zeros((2, count))
            j[:, :2] = np.eye(2)
            j[:, 2:] = [[r, -c], [c, r]] if count == 4 else [[r, c, 0, 0], [0, 0, r, c]]
            worst = max(worst, float(np.trace(j @ self.covariance @ j.T)))
        return math.sqrt(worst) / self.place.scale


class Comparison:
    """Pairs of pictures of the same instants on one grid of fast pixels, `factor` of them wide.

    Args:
        sharps: pictures (H, W).
        fasts: pictures (h, w), not flipped.
        scale: about that of the places that are tried.
        blur: deviation, fast pixels, beyond that of the pixel itself.
        width: pixels compared over which mean and contrast are taken out.
    """

    def __init__(
        self,
        sharps: Sequence[Thinned],
        fasts: Sequence[np.ndarray],
        scale: float,
        factor: float = 1.0,
        blur: float = 0.0,
        width: float = LOCAL,
    ) -> None:
        self.factor = max(1.0, factor)
        self.scale, self.blur = scale, blur
        self.size = fasts[0].shape
        pixel = scale * self.factor
        self.hr_shape = sharps[0].shape
        self.sharps = []
        for sharp in sharps:
            smooth, self.thin = sharp.smooth(pixel, blur / self.factor)
            level = levelled(smooth, width * pixel / self.thin)
            self.sharps.append((level, *np.gradient(level)))
        lows = [shrunk(fast, self.factor) for fast in fasts]
        self.fasts = [levelled(low, width) for low, _ in lows]
        first, grid = lows[0][1], self.fasts[0].shape
        self.rows, self.columns = np.meshgrid(
            *(first[axis] + self.factor * (np.arange(grid[axis]) + 0.5) for axis in (0, 1)),
            indexing="ij",
        )

    def seen(self, place: Place) -> tuple[np.ndarray, np.ndarray]:
        """Where on the (thinned) sharp frames the fast pixels lie, (2, h, w), and which lie on
        them, away from the rim."""
        at = place.at(self.rows, self.columns)
        margin = place.scale * self.factor
        inside = (
            (at[0] >= margin)
            & (at[0] <= self.hr_shape[0] - margin)
            & (at[1] >= margin)
            & (at[1] <= self.hr_shape[1] - margin)
        )
        return at / self.thin - 0.5, inside

    def score(self, place: Place) -> Place:
        """`place` with its correlation and overlap."""
        at, inside = self.seen(place)
        if inside.sum() < 50:
            return replace(place, score=0.0, overlap=float(inside.mean()))
        a = np.concatenate([sampled(sharp, at, inside) for sharp, *_ in self.sharps])
        b = np.concatenate([fast[FLIPS[place.flip]][inside] for fast in self.fasts])
        return replace(place, score=correlation(a, b), overlap=float(inside.mean()))

    def clearness(self, place: Place) -> tuple[float, float]:
        """How far the correlation at `place` stands out of those at shifts of 3 to 12 pixels, in
        deviations of these; and the largest of these, as a share of it."""
        at, inside = self.seen(place)
        if inside.sum() < 50:
            return 0.0, math.inf
        rows, columns = np.nonzero(inside)
        view = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
        surface: np.ndarray | float = 0.0
        reach = 12
        for (level, *_), fast in zip(self.sharps, self.fasts, strict=True):
            a = map_coordinates(level, at[:, view[0], view[1]], order=1) * inside[view]
            b = fast[FLIPS[place.flip]][view] * inside[view]
            shape = [fft.next_fast_len(side + reach, real=True) for side in a.shape]
            product = fft.rfft2(a, shape) * np.conj(fft.rfft2(b, shape))
            surface = surface + fft.irfft2(product, shape)
        assert isinstance(surface, np.ndarray)
        around = np.roll(surface, (reach, reach), (0, 1))[: 2 * reach + 1, : 2 * reach + 1]
        r, c = np.indices(around.shape) - reach
        outside = around[np.maximum(abs(r), abs(c)) > 2]
        here = float(around[reach, reach])
        clear = (here - outside.mean()) / max(outside.std(), 1e-9)
        full = fft.rfft2(inside[view].astype(np.float32), shape)
        count = np.roll(fft.irfft2(full * np.conj(full), shape), (reach, reach), (0, 1))
        mean = around / np.maximum(count[: 2 * reach + 1, : 2 * reach + 1], 1)
        here = float(mean[reach, reach])
        fine = zoom(mean, 4, order=3)  # the pattern may repeat itself between pixels
        r, c = np.indices(fine.shape) * (2 * reach / (len(fine) - 1)) - reach
        next_best = float(fine[np.maximum(abs(r), abs(c)) > 2].max())
        return float(clear), next_best / max(here, 1e-9)

    def refined(self, place: Place, affine: bool = False, steps: int = 30) -> Fit:
        """Gauss-Newton steps from `place`, with a gain and an offset for each pair."""
        count = 6 if affine else 4
        centre = np.array(self.size) / 2  # parameters about the middle hardly depend on each other
        middle = place.at(*centre)
        matrix = place.matrix.copy()
        damping, last = 1e-3, math.inf
        normal, error, best = np.eye(count), 1.0, (middle, matrix)
        for _ in range(steps):
            now = Place(place.flip, matrix, middle - matrix @ centre)
            found = self._equations(now, affine, centre)
            if found is None:
                break
            a, g, error = found
            if error > last * (1 + 1e-9):
                middle, matrix = best
                damping *= 10
                if damping > 1e3:
                    break
            else:
                if last - error < 1e-7 * error:
                    best, normal, last = (middle, matrix), a, error
                    break
                best, normal, last = (middle, matrix), a, error
                gradient, damping = g, max(damping / 10, 1e-6)
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient)
            longest = np.abs(step[:2]).max() / (2 * self.factor * place.scale)
            step /= max(1.0, longest)
            middle = best[0] + step[:2]
            if affine:
                matrix = best[1] + step[2:].reshape(2, 2)
            else:
                c, s = step[2:]
                matrix = best[1] + np.array([[c, -s], [s, c]])
        middle, matrix = best
        final = self.score(Place(place.flip, matrix, middle - matrix @ centre))
        covariance = self._covariance(final, affine, centre)
        return Fit(final, covariance, self.blur)

    def _equations(
        self, place: Place, affine: bool, centre: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, float] | None:
        """Normal matrix and right-hand side of a step, and the share of the fast pictures that is
        left; None where they hardly overlap."""
        at, inside = self.seen(place)
        if inside.sum() < 50:
            return None
        rows, columns = self.rows[inside] - centre[0], self.columns[inside] - centre[1]
        count = 6 if affine else 4
        a, g, total, weight = np.zeros((count, count)), np.zeros(count), 0.0, 0.0
        for (level, down, right), fast in zip(self.sharps, self.fasts, strict=True):
            model = sampled(level, at, inside)
            dy, dx = (sampled(part, at, inside) / self.thin for part in (down, right))
            data = fast[FLIPS[place.flip]][inside]
            gain = float(model @ data) / max(float(model @ model), 1e-9)
            gain = max(gain, 0.05)
            residual = data - gain * model
            limit = 3 * float(np.median(np.abs(residual))) + 1e-6
            w = 1 / np.maximum(1, np.abs(residual) / limit)
            if affine:
                parts = [dy, dx, dy * rows, dy * columns, dx * rows, dx * columns]
            else:
                parts = [dy, dx, dy * rows + dx * columns, dx * rows - dy * columns]
            jacobian = gain * np.stack(parts)
            a += (jacobian * w) @ jacobian.T
            g += (jacobian * w) @ residual
            # relative to the data: a smaller overlap must not look better
            total += float((w * residual) @ residual)
            weight += float(w @ (data * data))
        return a, g, total / max(weight, 1e-9)

    def _covariance(self, place: Place, affine: bool, centre: np.ndarray) -> np.ndarray:
        """Of the parameters about the middle, from the scatter of the residuals; neighbouring
        residuals are alike, which counts as fewer pixels."""
        found = self._equations(place, affine, centre)
        count = 6 if affine else 4
        if found is None:
            return np.full((count, count), np.inf)
        normal = found[0]
        at, inside = self.seen(place)
        rows, columns = self.rows[inside] - centre[0], self.columns[inside] - centre[1]
        middle = np.zeros((count, count))
        for (level, down, right), fast in zip(self.sharps, self.fasts, strict=True):
            model = sampled(level, at, inside)
            dy, dx = (sampled(part, at, inside) / self.thin for part in (down, right))
            data = fast[FLIPS[place.flip]][inside]
            gain = max(float(model @ data) / max(float(model @ model), 1e-9), 0.05)
            residual = data - gain * model
            if affine:
                parts = [dy, dx, dy * rows, dy * columns, dx * rows, dx * columns]
            else:
                parts = [dy, dx, dy * rows + dx * columns, dx * rows - dy * columns]
            scores = gain * np.stack(parts) * residual
            # sandwich: sums over blocks of pixels, which are nearly independent of each other
            block = 8 * self.factor
            number = (self.rows[inside] // block).astype(int) * 10000 + (
                self.columns[inside] // block
            ).astype(int)
            _, index = np.unique(number, return_inverse=True)
            sums = np.stack([np.bincount(index, score) for score in scores])
            middle += sums @ sums.T
        try:
            inverse = np.linalg.inv(normal)
        except np.linalg.LinAlgError:
            return np.full((count, count), np.inf)
        covariance: np.ndarray = inverse @ middle @ inverse
        return covariance


def sampled(picture: np.ndarray, at: np.ndarray, inside: np.ndarray) -> np.ndarray:
    found: np.ndarray = map_coordinates(picture, at[:, inside], order=1, mode="nearest")
    return found


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(dtype=float), b - b.mean(dtype=float)
    norm = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / norm if norm > 0 else 0.0
