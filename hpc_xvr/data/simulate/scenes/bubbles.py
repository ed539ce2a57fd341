"""A foam one bubble deep in a flat cell: slow drift, sudden rearrangements, bursting walls."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import map_coordinates

from hpc_xvr.data.simulate.scenes.base import Scene
from hpc_xvr.data.simulate.scenes.conditions import CONDITIONS
from hpc_xvr.data.simulate.scenes.draw import noise, smoothstep, spheres

_MARGIN = 32
_MESH = 4


class Bubbles(Scene):
    """Liquid fills the corners between bubbles and carries stabilising particles.

    A pixel's wall distance is half the difference of its distances to the two nearest bubbles
    (centre distance less radius: walls are arcs, as between bubbles of unequal pressure).
    """

    conditions = CONDITIONS["bubbles"]

    def build(self, rng: np.random.Generator) -> None:
        height, width = self.shape
        metal = self.material == "aluminium"
        self.spacing = rng.uniform(21, 30)
        self.cell = (rng.uniform(1.0e-3, 1.6e-3) if metal else 0.3e-3) / self.pixel
        self.bulk = self.cell * self.pixel
        self.corner = self.spacing * rng.uniform(0.3, 0.42)
        rows = np.arange(-_MARGIN, height + _MARGIN, self.spacing * 0.866)
        columns = np.arange(-_MARGIN, width + _MARGIN, self.spacing)
        grid_y, grid_x = np.meshgrid(rows, columns, indexing="ij")
        grid_x[1::2] += self.spacing / 2
        y, x = grid_y.ravel(), grid_x.ravel()
        self.cy = y + rng.normal(0, 0.17 * self.spacing, y.size)
        self.cx = x + rng.normal(0, 0.17 * self.spacing, y.size)
        self.r = self.spacing * rng.uniform(-0.16, 0.16, y.size)
        bursts = rng.random(y.size) < 0.12
        self.bursts = np.where(bursts, rng.uniform(0, self.frames, y.size), np.inf)
        self.throb = rng.uniform(0, 2 * np.pi, y.size), 2 * np.pi / rng.uniform(15, 60, y.size)
        self._events(rng)
        # Particles sit in the liquid, on the walls of the first frame.
        n = rng.poisson(900 * self.density)
        py, px = rng.uniform(0, height - 1, n), rng.uniform(0, width - 1, n)
        at = self._wall(0.0)[py.astype(int), px.astype(int)] < 0.8 * self.corner
        self.py, self.px = py[at], px[at]
        self.pr = 0.9 * np.exp(0.4 * rng.standard_normal(at.sum()))
        self.weight = 0.035 * self.cell / 2 * rng.choice([1.0, 1.0, -0.7], at.sum())
        skin = noise(self.shape, 0.8, rng) + noise(self.shape, 4, rng)
        self.film = 0.04 * np.maximum(1 + 0.12 * skin, 0)

    def _events(self, rng: np.random.Generator) -> None:
        height, width = self.shape
        n = rng.poisson(self.frames / 5 * self.density) + 1
        self.event_t = rng.uniform(0, self.frames, n)
        self.event_y = rng.uniform(0, height, n)
        self.event_x = rng.uniform(0, width, n)
        angle = rng.uniform(0, 2 * np.pi, n)
        jump = rng.uniform(5, 13, n)
        self.event_d = jump * np.sin(angle), jump * np.cos(angle)
        self.event_size = self.spacing * rng.uniform(0.7, 1.3, n)
        self.event_last = rng.uniform(2, 6, n)
        # Bells in rows and columns: their product is an event's reach, on a mesh over the field.
        self.near = tuple(
            np.exp(
                -(
                    (
                        (np.arange(-_MARGIN, size + _MARGIN, _MESH) - at[:, None])
                        / self.event_size[:, None]
                    )
                    ** 2
                )
                / 2
            )
            for size, at in ((height, self.event_y), (width, self.event_x))
        )
        self.flow = rng.normal(0, 0.025), self.speed * rng.choice([-1, 1])

    def moved(self, y: np.ndarray, x: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Where the liquid that was at (y, x) at time 0 is at time t."""
        done = smoothstep((t - self.event_t) / self.event_last) - smoothstep(
            -self.event_t / self.event_last
        )
        at = (y + _MARGIN) / _MESH, (x + _MARGIN) / _MESH
        near_y, near_x = self.near
        down, right = (
            map_coordinates(
                np.einsum("ey,ex->yx", near_y * (done * d)[:, None], near_x),
                at,
                order=1,
                mode="nearest",
            )
            for d in self.event_d
        )
        drift, shear = self.flow
        return (y + down + drift * t, x + right + shear * t * (2 * y / self.shape[0] - 1))

    def _wall(self, t: float) -> np.ndarray:
        """Distance (H, W) from the nearest wall."""
        cy, cx = self.moved(self.cy, self.cx, t)
        phase, rate = self.throb
        r = self.r + 0.025 * self.spacing * np.sin(rate * t + phase)
        r = r - 0.9 * self.spacing * smoothstep((t - self.bursts) / 2.5)
        first = np.full(self.shape, 1e3, np.float32)
        second = first.copy()
        reach = int(1.7 * self.spacing)
        for y, x, less in zip(cy, cx, r, strict=True):
            rows = slice(max(0, int(y) - reach), max(0, int(y) + reach + 1))
            columns = slice(max(0, int(x) - reach), max(0, int(x) + reach + 1))
            a, b = first[rows, columns], second[rows, columns]
            if not a.size:
                continue
            far = (self.y[rows] - np.float32(y)) ** 2 + (self.x[columns] - np.float32(x)) ** 2
            np.sqrt(far, out=far)
            far -= np.float32(less)
            np.minimum(b, np.maximum(a, far), out=b)
            np.minimum(a, far, out=a)
        return 0.5 * (second - first)

    def thickness(self, t: float) -> np.ndarray:
        inward = 1 - np.minimum(self._wall(t) / np.float32(self.corner), 1)
        out = np.float32(self.cell) * (1 - np.sqrt(1 - 0.9 * inward**2) + self.film)
        py, px = self.moved(self.py, self.px, t)
        out += spheres(self.shape, py, px, self.pr, self.weight)
        return np.maximum(out, 0) * np.float32(self.pixel)
