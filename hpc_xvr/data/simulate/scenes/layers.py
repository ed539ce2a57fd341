"""Textured layers that move through each other: no experiment in particular, motion of every kind.

A radiograph adds up what lies behind each other, so most layers are transparent; some hide what is
behind them. They drift, speed up, sway, turn, grow and shrink, appear and vanish over a ground that
stands still or moves itself, in a beam whose brightness may drift. Networks that learn motion from
these carry over to recordings unlike any that they have seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import affine_transform, spline_filter
from scipy.spatial import cKDTree

from hpc_xvr.data.simulate.scenes.base import Scene
from hpc_xvr.data.simulate.scenes.conditions import CONDITIONS
from hpc_xvr.data.simulate.scenes.draw import cover, noise, smoothstep, spheres, wobble


@dataclass(frozen=True)
class Layer:
    """A textured patch of matter and its way through the picture."""

    texture: np.ndarray
    """Cubic spline coefficients (n, n) of the thickness as a share of the bulk's, float32: between
    pixels it is as sharp as on them."""
    mask: np.ndarray
    """Where there is matter (n, n), 0 to 1."""
    place: Callable[[float], tuple[float, float]]
    """Time (frames) -> row and column of its middle."""
    turn: float
    """Radians a frame."""
    growth: float
    """Relative growth a frame."""
    life: tuple[float, float]
    """Times at which it appears and vanishes."""
    hides: bool
    """It takes the place of what is behind it, instead of adding to it."""


class Layers(Scene):
    """A ground and up to a dozen layers over it."""

    conditions = CONDITIONS["layers"]

    def build(self, rng: np.random.Generator) -> None:
        self.bulk = 10 ** rng.uniform(-3.7, -2.7)
        side = max(self.shape)
        moving = rng.random() < 0.4
        margin = 1.0 + (0.5 if moving else 0.1)
        n = int(side * margin)
        still = self._path(rng, self.speed * 0.6 if moving else 0.0, middle=True)
        turn, growth = rng.normal(0, 0.003, 2) if moving else (0.0, 0.0)
        ground = splined(texture((n, n), rng))
        self.layers = [
            Layer(ground, np.ones((n, n), np.float32), still, turn, growth, (-np.inf, np.inf), True)
        ]
        for _ in range(rng.integers(1, 13)):
            n = max(12, int(side * rng.uniform(0.06, 0.6)))
            self.layers.append(
                Layer(
                    splined(texture((n, n), rng)),
                    outline(n, rng),
                    self._path(rng, self.speed),
                    rng.normal(0, 0.02),
                    rng.normal(0, 0.006),
                    self._life(rng),
                    rng.random() < 0.35,
                )
            )
        if rng.random() < 0.4:  # something in front that stands still: a window, dirt on it
            n = int(1.1 * side)
            spots = (noise((n, n), rng.uniform(1, 6), rng) > rng.uniform(0.8, 1.6)).astype("f4")
            place = self._path(rng, 0.0, middle=True)
            dirt = np.full((n, n), rng.uniform(0.1, 0.4), np.float32)
            self.layers.append(Layer(dirt, spots, place, 0, 0, (-np.inf, np.inf), False))
        self._drift = rng.uniform(0, 0.05) * (rng.random() < 0.5)
        self._beam = wobble(rng, 100, 400)

    def _path(
        self, rng: np.random.Generator, fastest: float, middle: bool = False
    ) -> Callable[[float], tuple[float, float]]:
        """A steady way with, now and then, an acceleration or a sway."""
        at = np.array(self.shape) * (0.5 if middle else rng.uniform(0, 1, 2))
        speed, angle = fastest * rng.uniform(0, 1) ** 1.5, rng.uniform(0, 2 * np.pi)
        velocity = speed * np.array([np.sin(angle), np.cos(angle)])
        pull = rng.normal(0, 0.02, 2) * (rng.random() < 0.5) * (fastest > 0)
        swaying = rng.uniform(0, 1.5) * (rng.random() < 0.5) * (fastest > 0)
        sway = wobble(rng, 12, 60, channels=2)
        half = self.frames / 2

        def place(t: float) -> tuple[float, float]:
            row, column = (
                at + velocity * (t - half) + pull * (t - half) ** 2 / 2 + swaying * sway(t)
            )
            return float(row), float(column)

        return place

    def _life(self, rng: np.random.Generator) -> tuple[float, float]:
        """Most are there all the time."""
        start, end = -np.inf, np.inf
        if rng.random() < 0.2:
            start = rng.uniform(0, self.frames)
        if rng.random() < 0.2:
            end = rng.uniform(0, self.frames)
        return start, end

    def brightness(self, t: float) -> float:
        return 1 + self._drift * float(self._beam(t)[0])

    def thickness(self, t: float) -> np.ndarray:
        total = np.zeros(self.shape, np.float32)
        for layer in self.layers:
            first, last = layer.life
            there = float(smoothstep(t - first) * smoothstep(last - t))
            if there < 0.01:
                continue
            box, matter, mask = self._seen(layer, t)
            mask *= np.float32(there)
            part = total[box]
            total[box] = part * (1 - mask) + matter * mask if layer.hides else part + matter * mask
        return total * np.float32(self.bulk)

    def _seen(self, layer: Layer, t: float) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
        """The rows and columns of the picture in which a layer lies at time t, its texture and its
        mask there."""
        angle = layer.turn * t
        size = float(np.exp(np.clip(layer.growth * (t - self.frames / 2), -0.7, 0.7)))
        back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / size
        middle = (np.array(layer.mask.shape) - 1) / 2
        place = np.array(layer.place(t))
        ground = layer is self.layers[0]
        first, last = np.zeros(2, int), np.array(self.shape)
        if not ground:
            reach = size * (middle + 1).max() * (abs(np.cos(angle)) + abs(np.sin(angle)))
            last = np.clip(np.ceil(place + reach).astype(int) + 1, 0, last)
            first = np.minimum(np.clip(np.floor(place - reach).astype(int), 0, None), last)
        box = slice(first[0], last[0]), slice(first[1], last[1])
        shape = tuple((last - first).tolist())
        offset = middle - back @ (place - first)
        matter = affine_transform(
            layer.texture,
            back,
            offset,
            shape,
            mode="mirror" if ground else "nearest",
            prefilter=False,
        )
        np.maximum(matter, 0, out=matter)  # splines overshoot
        if ground:
            return box, matter, np.ones_like(matter)
        mask = affine_transform(layer.mask, back, offset, shape, order=1, mode="constant")
        return box, matter, mask


def splined(picture: np.ndarray) -> np.ndarray:
    """What `affine_transform` takes of it to interpolate by cubic splines."""
    coefficients: np.ndarray = spline_filter(picture, output=np.float32, mode="mirror")
    return coefficients


def texture(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Thickness of random matter: cloudy, grainy, fibrous, ruled, of leaves that cover each other
    or of the walls of a foam; shares of the bulk's."""
    kinds = {"cloud": 0.2, "leaves": 0.3, "foam": 0.1, "grains": 0.1, "fibres": 0.1, "lines": 0.1}
    kind = rng.choice([*kinds, "plain"], p=[*kinds.values(), 0.1])
    if kind == "cloud":
        picture = _cloud(shape, rng)
    elif kind == "grains":
        count = rng.poisson(shape[0] * shape[1] / rng.uniform(30, 400))
        radius = rng.uniform(0.8, 6) * np.exp(0.3 * rng.standard_normal(count))
        places = rng.uniform(0, shape[0], count), rng.uniform(0, shape[1], count)
        picture = spheres(shape, *places, radius)
        picture += 0.2 * picture.std() * _cloud(shape, rng)
    elif kind == "fibres":
        grain = rng.uniform(0.6, 2), rng.uniform(6, 20)
        picture = noise(shape, grain if rng.random() < 0.5 else grain[::-1], rng)
    elif kind == "lines":
        y, x = (np.arange(n, dtype=np.float32) for n in shape)
        angle, period = rng.uniform(0, np.pi), rng.uniform(3, 20)
        along = np.cos(angle) * x + np.sin(angle) * y[:, None]
        picture = np.tanh(2 * np.sin(2 * np.pi * along / period)) + 0.3 * _cloud(shape, rng)
    elif kind == "leaves":
        picture = _leaves(shape, rng)
    elif kind == "foam":
        picture = _foam(shape, rng)
    else:
        picture = 0.1 * _cloud(shape, rng)
    contrast = 0.05 if kind == "plain" else rng.uniform(0.05, 0.5)
    picture = (picture - picture.mean()) / (picture.std() + 1e-6)
    return np.clip(rng.uniform(0.1, 0.8) + contrast * picture, 0, 2.0).astype(np.float32)


def outline(n: int, rng: np.random.Generator) -> np.ndarray:
    """A shape within (n, n): ellipse, blob or polygon, its edge a pixel wide or soft."""
    axis = np.linspace(-1, 1, n, dtype=np.float32)
    y, x = axis[:, None], axis
    kind = rng.choice(["ellipse", "blob", "polygon"])
    if kind == "ellipse":
        away = np.hypot(x, y / rng.uniform(0.3, 1)) - 0.85
    elif kind == "blob":
        rim = noise((n, n), n / rng.uniform(6, 16), rng)
        away = np.hypot(x, y) - 0.6 - 0.18 * np.clip(rim, -1.5, 1.5)
    else:
        angles = rng.uniform(0, 2 * np.pi, rng.integers(3, 8))
        sides = [x * np.cos(a) + y * np.sin(a) - rng.uniform(0.25, 0.8) for a in angles]
        away = np.maximum(np.max(np.stack(np.broadcast_arrays(*sides)), 0), np.hypot(x, y) - 0.95)
    soft = 1.0 if rng.random() < 0.7 else rng.uniform(2, 8)
    return cover(away * (n / 2), soft)


def _cloud(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Noise whose power falls with frequency as f^-beta, as in most natural pictures; mean 0,
    deviation 1."""
    beta = rng.uniform(1.2, 3.5)
    f = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])) + 1 / max(shape)
    white = np.fft.rfft2(rng.standard_normal(shape, dtype=np.float32))
    picture = np.fft.irfft2(white * f ** (-beta / 2), shape)
    return ((picture - picture.mean()) / (picture.std() + 1e-9)).astype(np.float32)


def _leaves(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Discs and squares of all sizes, each covering those before it (dead leaves: edges and scales
    as in photographs; A. B. Lee, D. Mumford, J. Huang, IJCV 41, 35 (2001))."""
    picture = np.zeros(shape, np.float32)
    smallest, largest = rng.uniform(1.5, 4), max(shape) / rng.uniform(2, 6)
    while largest > smallest:  # large ones first, four times as many of half the size
        count = int(1.5 * shape[0] * shape[1] / (np.pi * largest**2)) + 1
        for _ in range(min(count, 400)):
            radius = largest * rng.uniform(0.5, 1)
            row, column = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
            r0, c0 = max(int(row - radius) - 1, 0), max(int(column - radius) - 1, 0)
            part = picture[r0 : int(row + radius) + 2, c0 : int(column + radius) + 2]
            y = np.arange(r0, r0 + part.shape[0], dtype=np.float32)[:, None] - row
            x = np.arange(c0, c0 + part.shape[1], dtype=np.float32) - column
            square = rng.random() < 0.25
            away = np.maximum(abs(y), abs(x)) * 1.25 if square else np.hypot(y, x)
            covered = cover(away - radius, 1.0)
            shade = rng.uniform(0, 1) + rng.normal(0, 0.3 / max(shape)) * x
            part += covered * (shade - part)
        largest /= 2
    return picture + rng.uniform(0, 0.1) * _cloud(shape, rng)


def _foam(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Walls of cells (Voronoi) of about one size: thick where two cells are equally near."""
    count = max(4, int(shape[0] * shape[1] / rng.uniform(8, 30) ** 2))
    seeds = rng.uniform(0, 1, (count, 2)) * shape
    y, x = np.mgrid[: shape[0], : shape[1]]
    nearest, _ = cKDTree(seeds).query(np.stack([y, x], -1).reshape(-1, 2), k=2)
    wall = (nearest[:, 1] - nearest[:, 0]).reshape(shape) / rng.uniform(1, 3)
    return np.exp(-(wall**2)).astype(np.float32) + rng.uniform(0, 0.2) * _cloud(shape, rng)
