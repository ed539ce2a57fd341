"""A specimen under load in which a crack runs and branches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import map_coordinates, spline_filter

from hpc_xvr.data.simulate.scenes.base import Scene
from hpc_xvr.data.simulate.scenes.conditions import CONDITIONS
from hpc_xvr.data.simulate.scenes.draw import cover, noise, smoothstep, spheres, wander, wobble


class Crack(Scene):
    """Grains, pores and inclusions part where the crack passes, by jumps and creep.

    The specimen is pulled: rows move more the farther they lie from the fixed grip.
    """

    conditions = CONDITIONS["crack"]

    def build(self, rng: np.random.Generator) -> None:
        height, width = self.shape
        # As far away as makes fringes a pixel or two wide, whatever the pixel.
        self.distance = rng.uniform(0.8e10, 1.8e10) * self.pixel**2
        self.depth = rng.uniform(0.6e-3, 1.2e-3) / self.pixel
        self.bulk = self.depth * self.pixel
        self.path = wander(height, 0.11 * height, rng)
        fine, coarse = wander(height, 1.5, rng), wander(height, 5, rng)
        self.rough = lambda s: fine(s) + 2 * coarse(s)
        self.lean = rng.normal(0, 0.15)
        self.foot = width * rng.uniform(0.4, 0.6)
        self.down = bool(rng.random() < 0.5)  # runs down the rows, else up
        jumps = max(4, rng.poisson(self.frames / 7))
        self.jump_t = np.sort(rng.uniform(0, self.frames, jumps))
        run = rng.exponential(1.0, jumps) + 0.2
        self.jump_s = run / run.sum() * height * rng.uniform(0.5, 0.75)
        self.jump_last = rng.uniform(0.4, 1.6, jumps)
        self.notch = height * rng.uniform(0.12, 0.25)
        self.creep = rng.uniform(0.05, 0.2)
        self.open = rng.uniform(2.0, 3.5), rng.uniform(0.05, 0.12)  # px, px/frame
        self.strain = self.speed * rng.choice([-1, 1])  # px/frame at the moving grip
        self.shake = wobble(rng, 5, 30, channels=2)
        branches = int(np.clip(rng.poisson(2.5 * height / 128), 1, 9))
        self.branch_s = height * rng.uniform(0.2, 0.75, branches)
        self.branch_slope = rng.uniform(0.35, 0.9, branches) * rng.choice([-1, 1], branches)
        self.branch_run = height * rng.uniform(0.15, 0.4, branches)
        self.branch_rough = [wander(height, 4, rng) for _ in range(branches)]
        self._specimen(rng)
        n = rng.poisson(0.8 * self.frames)
        self.chip_t = rng.uniform(-5, self.frames, n)
        self.chip_s = rng.uniform(0, self.notch + 0.5 * height, n)
        self.chip_q = rng.normal(0, 3, n)
        self.chip_v = rng.uniform(0.3, 2.2, n), rng.normal(0, 0.6, n)
        self.chip_r = rng.uniform(0.8, 2.4, n)

    def _specimen(self, rng: np.random.Generator) -> None:
        height, width = self.shape
        self.pad = pad = 24
        shape = (height + 2 * pad, width + 2 * pad)
        x = np.arange(shape[1], dtype=np.float32)
        edge = width * rng.uniform(0.04, 0.1)
        left = pad + edge + 1.2 * noise((shape[0],), 5, rng)[:, None]
        right = shape[1] - (pad + edge + 1.2 * noise((shape[0],), 5, rng)[:, None])
        body = cover(np.maximum(left - x, x - right), 3.0)
        grains = noise(shape, 1.5, rng) + 1.5 * noise(shape, 4, rng) + 2 * noise(shape, 12, rng)
        out = self.depth * (1 + 0.009 * grains)
        for weight, r, count in ((-0.5, 2.6, 80), (0.6, 2.0, 90), (-0.35, 5.0, 10)):
            n = rng.poisson(count * self.density)
            size = r * np.exp(0.4 * rng.standard_normal(n))
            out += (
                weight
                * self.depth
                / 60
                * spheres(shape, rng.uniform(0, shape[0], n), rng.uniform(0, shape[1], n), size)
            )
        self.reference = spline_filter(out * body, output=np.float32)

    def thickness(self, t: float) -> np.ndarray:
        height = self.shape[0]
        y = self.y if self.down else height - 1 - self.y  # H, 1: along the crack
        gone = smoothstep((t - self.jump_t) / self.jump_last)
        tip = self.notch + float(gone @ self.jump_s) + self.creep * t
        crack = (self.foot + 0.07 * height * self.path(y) + self.rough(y) + self.lean * y).astype(
            np.float32
        )
        wide, rate = self.open
        shape = np.sqrt(np.maximum(tip - y, 0) / height)
        opening = (wide + rate * t) * shape * 1.4
        u_x = 0.5 * opening * np.clip((self.x - crack) / 1.5, -1, 1)
        dy, dx = 0.25 * self.shake(t)
        grip = self.strain * t * (self.y / height - 0.15)
        at = np.broadcast_arrays(self.y - grip - dy + self.pad, self.x - u_x - dx + self.pad)
        out = map_coordinates(self.reference, at, order=3, prefilter=False, mode="nearest")
        out *= 1 - 0.92 * cover(np.abs(self.x - crack) - opening / 2, 1.4) * np.minimum(opening, 1)
        for s, slope, run, rough in zip(
            self.branch_s, self.branch_slope, self.branch_run, self.branch_rough, strict=True
        ):
            self._branch(out, y, tip, s, slope, run, rough, opening)
        age = t - self.chip_t
        loose = (age > 0) & (self.chip_s < tip)
        down, side = (v[loose] * age[loose] for v in self.chip_v)
        s = self.chip_s[loose] - down
        at_x = np.interp(
            s, y[:, 0] if self.down else y[::-1, 0], crack[:, 0] if self.down else crack[::-1, 0]
        )
        out += (
            self.depth
            / 40
            * spheres(
                self.shape,
                s if self.down else height - 1 - s,
                at_x + self.chip_q[loose] + side,
                self.chip_r[loose],
            )
        )
        return np.maximum(out, 0) * np.float32(self.pixel)

    def _branch(
        self,
        out: np.ndarray,
        y: np.ndarray,
        tip: float,
        s: float,
        slope: float,
        run: float,
        rough: Callable[[np.ndarray], np.ndarray],
        opening: np.ndarray,
    ) -> None:
        """A side crack that leaves the main one at row s once its tip has passed."""
        length = min(0.7 * (tip - s), run)
        if length <= 1:
            return
        along = y - s
        at = np.array([s], np.float32)
        start = self.foot + 0.07 * len(y) * self.path(at) + self.rough(at) + self.lean * s
        line = start + self.lean * along + slope * along + 1.5 * rough(along)
        share = np.clip((length - along) / length, 0, 1) * (along > 0)
        gap = 0.6 * float(opening.max()) * np.sqrt(share)
        # Side cracks do not run straight through the specimen: only part of its depth is open.
        out *= 1 - 0.6 * cover(np.abs(self.x - line) - gap / 2, 1.6) * (share > 0)
