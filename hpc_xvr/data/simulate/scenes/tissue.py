"""A living insect's body: layered soft tissue that bends, a gut that pumps, air tubes."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import map_coordinates, spline_filter

from hpc_xvr.data.simulate.scenes.base import Scene
from hpc_xvr.data.simulate.scenes.conditions import CONDITIONS
from hpc_xvr.data.simulate.scenes.draw import cylinder, noise, spheres, wander, wobble


class Tissue(Scene):
    """Cuticle in segments, fat body, striped muscle, a peristaltic gut, tracheae, blood cells.

    All are laid out in the frame of the resting body (rows v, columns u) and bend with it.
    """

    conditions = CONDITIONS["tissue"]

    def build(self, rng: np.random.Generator) -> None:
        height, width = self.shape
        self.half = height * rng.uniform(0.34, 0.4)
        self.bulk = 2.2 * self.half * self.pixel
        self.middle = wander(width, max(40, 0.25 * width), rng)
        self.segment = height * rng.uniform(0.2, 0.34)
        self.sway = wobble(rng, 14, 45, channels=3)
        self.sway_size = rng.uniform(0.5, 2.2, 3)
        self.sway_k = 2 * np.pi / (max(height, width) * rng.uniform(0.9, 2, 3))
        self.sway_phase = rng.uniform(0, 2 * np.pi, 3)
        self.gut = height * rng.uniform(0.08, 0.13), rng.uniform(-0.12, 0.12) * height
        self.gut_k = 2 * np.pi / (self.gut[0] * rng.uniform(3.5, 6))
        self.gut_w = 2 * np.pi / rng.uniform(14, 30) * rng.choice([-1, 1])
        tubes = int(rng.integers(4, 7))
        self.tube_v = self.half * rng.uniform(-0.8, 0.8, tubes)
        self.tube_line = [wander(width, height * rng.uniform(0.17, 0.3), rng) for _ in range(tubes)]
        self.tube_r = rng.uniform(1.6, 4.2, tubes) * (height / 128) ** 0.5
        self.tube_slope = rng.normal(0, 0.2, tubes)
        self.ring = 2 * np.pi / rng.uniform(2.6, 4.0, tubes)
        self.pump = wobble(rng, 12, 30, channels=tubes)
        n = rng.poisson(40 * width / 128)
        self.cell_u = rng.uniform(0, width + 40, n)
        self.cell_q = rng.normal(0, 0.4, n)
        self.cell_speed = self.speed * rng.uniform(0.7, 1.3, n) * rng.choice([-1, 1])
        self.cell_r = rng.uniform(1.0, 2.2, n)
        self.vessel = self.half * rng.uniform(-0.8, -0.55)
        self._rest(rng)

    def _rest(self, rng: np.random.Generator) -> None:
        """Thickness map of what moves only with the body."""
        height, width = self.shape
        self.pad = pad = 24
        shape = (height + 2 * pad, width + 2 * pad)
        v = np.arange(shape[0], dtype=np.float32)[:, None] - pad
        u = np.arange(shape[1], dtype=np.float32) - pad
        axis = self.axis(u)
        fold = np.abs(np.sin(np.pi * (u / self.segment + 0.1 * noise((shape[1],), 10, rng))))
        half = self.half * (1 - 0.05 * (1 - fold) ** 3)
        body = 1.1 * cylinder(v - axis, half)
        shell = body - 1.1 * cylinder(v - axis, half - 2.5)
        inside = np.minimum(body / (0.4 * self.half), 1)
        fat = np.zeros(shape, np.float32)
        for r, count, weight in ((8.0, 40, 0.3), (4.0, 120, 0.4), (1.8, 250, 0.5)):
            n = rng.poisson(count * self.density)
            fat += weight * spheres(
                shape,
                rng.uniform(0, shape[0], n),
                rng.uniform(0, shape[1], n),
                r * np.exp(0.35 * rng.standard_normal(n)),
                rng.choice([1.0, -0.6], n),
            )
        fibres = noise(shape, (1.4, 12.0), rng)
        stripes = np.sin(2 * np.pi * (u / rng.uniform(3.6, 5.0) + 0.5 * noise(shape, (6, 12), rng)))
        bands = np.maximum(noise(shape, (7, 30), rng), 0)
        muscle = bands * (fibres + 0.8 * stripes)
        hairs = self._hairs(shape, v, axis, rng)
        tissue = body + 0.35 * shell * (1 + 0.5 * (fold < 0.2)) + 0.9 * inside * fat
        tissue += inside * self.half * (0.022 * muscle + 0.008 * noise(shape, 1.2, rng)) + hairs
        self.reference = spline_filter(tissue, output=np.float32)

    def _hairs(
        self, shape: tuple[int, int], v: np.ndarray, axis: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Bristles on the cuticle."""
        n = rng.poisson(14 * self.shape[1] / 128)
        at = rng.uniform(0, shape[1] - 1, n)
        side = rng.choice([-1.0, 1.0], n)
        s = np.linspace(0, 1, 40)[:, None]  # along a bristle
        long = rng.uniform(6, 18, n)
        y = axis[at.astype(int)] + self.pad + side * (self.half * 0.93 + long * s)
        x = at + rng.normal(0, 5, n) * s + 3 * s**2
        return spheres(shape, y.ravel(), x.ravel(), (1.5 * (1 - 0.5 * s) + 0 * y).ravel(), 0.35)

    def axis(self, u: np.ndarray) -> np.ndarray:
        """Row of the body's middle line at column u."""
        return 0.5 * self.shape[0] + 0.05 * self.shape[0] * self.middle(u)

    def bend(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Displacement down (H, W) and right (W,) of the body at time t."""
        a, b, c = self.sway(t) * self.sway_size
        k, phase = self.sway_k, self.sway_phase
        down = a * np.sin(k[0] * self.x + phase[0]) + 0.5 * b * np.sin(k[1] * self.y + phase[1])
        right = 0.6 * c * np.sin(k[2] * self.x + phase[2])
        return down.astype(np.float32), right.astype(np.float32)

    def thickness(self, t: float) -> np.ndarray:
        down, right = self.bend(t)
        v, u = self.y - down, self.x - right  # (H, W), (W,)
        at = np.broadcast_arrays(v + self.pad, u + self.pad)
        out = map_coordinates(self.reference, at, order=3, prefilter=False, mode="nearest")
        axis = self.axis(u)
        inside = np.maximum(1 - ((v - axis) / self.half) ** 2, 0)
        radius, place = self.gut
        wave = np.sin(self.gut_k * u - self.gut_w * t)
        r = radius * (0.8 + 0.4 * wave + 0.15 * np.sin(2.3 * self.gut_k * u + 0.4))
        off = v - axis - place
        out += 0.55 * (cylinder(off, r + 2.2) - 1.35 * cylinder(off, r))
        for i, pump in enumerate(self.pump(t)):
            line = axis + self.tube_v[i] + 0.05 * self.shape[0] * self.tube_line[i](u)
            line += self.tube_slope[i] * (u - 0.5 * self.shape[1])
            r = self.tube_r[i] * (1 + 0.28 * pump) * (1 + 0.08 * np.sin(self.ring[i] * u))
            out -= 1.8 * cylinder(v - line, np.maximum(r, 0.3)) * np.minimum(2 * inside, 1)
        cell = np.mod(self.cell_u + self.cell_speed * t, self.shape[1] + 40) - 20
        at = np.clip(np.rint(cell).astype(int), 0, self.shape[1] - 1)
        row = self.axis(cell) + self.vessel + 2 * self.cell_q
        out += 2.0 * spheres(
            self.shape,
            row + down[np.clip(np.rint(row).astype(int), 0, self.shape[0] - 1), at],
            cell,
            self.cell_r,
        )
        return np.maximum(out, 0) * np.float32(self.pixel)
