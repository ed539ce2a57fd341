"""Laser melting of a metal plate under a powder bed, seen from the side."""

from __future__ import annotations

import numpy as np

from hpc_xvr.data.simulate.scenes.base import Scene
from hpc_xvr.data.simulate.scenes.conditions import CONDITIONS
from hpc_xvr.data.simulate.scenes.draw import cover, cylinder, noise, smoothstep, spheres, wobble

Spheres = tuple[np.ndarray, np.ndarray, np.ndarray]  # y, x, r
_GROUPS = 12
_LEAD = 60.0  # frames the laser has been on before the first one


class Keyhole(Scene):
    """A vapour depression scans through the plate, sheds pores and throws spatter.

    The powder in its way melts or flies; a bead and frozen pores stay behind.
    """

    conditions = CONDITIONS["keyhole"]

    def build(self, rng: np.random.Generator) -> None:
        height, width = self.shape
        # Larger detectors are used with a finer pixel, not only for a wider view.
        finest, coarsest = self.conditions.pixel_um
        pixel = rng.uniform(2.0, 3.6) * (128 / height) ** 0.4
        self.pixel = min(max(pixel, finest), coarsest) * 1e-6
        self.plate = rng.uniform(300e-6, 420e-6) / self.pixel
        self.bulk = self.plate * self.pixel
        um = 1e-6 / self.pixel
        # A ground edge, nearly along the rows.
        tilt = rng.normal(0, 0.008) * (self.x - width / 2)
        self.surface = height * rng.uniform(0.38, 0.46) + tilt + 0.25 * noise((width,), 8, rng)
        self.top = float(self.surface.mean())
        self.speed = self.speed * rng.choice([-1, 1])
        run = abs(self.speed) * self.frames
        middle = np.clip((width - run) / 2, 0.15 * width, 0.6 * width)
        start = middle * rng.uniform(0.6, 1.2)
        self.start = start if self.speed > 0 else width - 1 - start
        self.depth = min(rng.uniform(90, 170) * um, 0.42 * height)
        self.half_width = rng.uniform(16, 24) * um
        self.lean = rng.uniform(0.1, 0.4)
        self.track = rng.uniform(110, 170) * um
        self.sway = wobble(rng, 8, 40, channels=4)
        self.ripple = rng.uniform(0.15, 0.35, 2), rng.uniform(0.2, 0.7, 2)
        self.bead = rng.uniform(12, 22) * um * (1 + 0.3 * noise((width,), 20 * um, rng))
        self._powder(rng, um)
        self._pores(rng, um)
        self._spatter(rng, um)

    def _powder(self, rng: np.random.Generator, um: float) -> None:
        height, width = self.shape
        radius = rng.uniform(10, 15) * um
        bed = rng.uniform(60, 90) * um
        hills = 1 + rng.uniform(0.03, 0.2) * noise((width,), 20, rng)
        count = int(0.42 * bed * width * self.plate / (4.2 * radius**3 * 1.5))
        r = radius * np.exp(0.35 * rng.standard_normal(count))
        x = rng.uniform(-radius, width + radius, count)
        lift = rng.uniform(0, 1, count) ** 0.85 * bed
        at = np.clip(x, 0, width - 1).astype(int)
        y = self.surface[at] - r - lift * hills[at]
        r *= 1 - 0.25 * rng.uniform(0, 1, count) * (lift > 0.7 * bed)
        off = np.abs(rng.uniform(-0.5, 0.5, count)) * self.plate / self.track
        flies = rng.random(count) < 0.5
        leaves = (x - self.start) / self.speed - rng.uniform(2, 9, count)
        leaves = np.where(off < np.where(flies, 1.0, 0.7), leaves, np.inf)
        order = np.argsort(leaves)
        self.grain_y, self.grain_x, self.grain_r = y[order], x[order], r[order]
        self.leaves, self.flies = leaves[order], flies[order]
        self.grain_v = (
            rng.uniform(0.4, 2.2, count),
            rng.normal(-0.3 * np.sign(self.speed), 0.5, count),
        )
        # Grains in the order they leave, in groups; suffix[g]: all groups from g on, as one map.
        finite = np.isfinite(self.leaves).sum()
        self.cuts = np.linspace(np.searchsorted(self.leaves, 0), finite, _GROUPS + 1).astype(int)
        still = slice(finite, None)
        total = spheres(self.shape, self.grain_y[still], self.grain_x[still], self.grain_r[still])
        # Powder stuck to the windows, in front of everything, as in most such recordings.
        n = rng.poisson(45 * self.density)
        stuck_r = radius * np.exp(0.3 * rng.standard_normal(n)) * 0.9
        total += spheres(self.shape, rng.uniform(0, height, n), rng.uniform(0, width, n), stuck_r)
        self.suffix = [total]
        for a, b in zip(self.cuts[-2::-1], self.cuts[:0:-1], strict=True):
            total = total + spheres(self.shape, *self._grains(slice(a, b), 0))
            self.suffix.append(total)
        self.suffix.reverse()

    def _grains(self, part: slice, age: np.ndarray | float) -> Spheres:
        """Grains `age` frames after the vapour took hold of them: some fly off, some melt."""
        way = age**2 / (age + 5)
        up, side = (v[part] for v in self.grain_v)
        size = np.where(self.flies[part], 1, 1 - smoothstep((age - 4) / 2))
        return (
            self.grain_y[part] - up * way,
            self.grain_x[part] + side * way,
            self.grain_r[part] * size,
        )

    def _pores(self, rng: np.random.Generator, um: float) -> None:
        n = rng.poisson((self.frames + _LEAD) / rng.uniform(4, 8)) + 1
        self.pore_t = np.sort(rng.uniform(-_LEAD, self.frames, n))
        self.pore_r = rng.uniform(5, 15, n) * um
        self.pore_depth = rng.uniform(0.75, 1.0, n)
        self.pore_v = rng.uniform(0.5, 2.2, n), rng.uniform(-0.4, 0.9, n)  # behind, up
        self.pore_stop = rng.uniform(4, 12, n)

    def _spatter(self, rng: np.random.Generator, um: float) -> None:
        n = rng.poisson((self.frames + _LEAD) * rng.uniform(0.7, 1.6))
        self.drop_t = rng.uniform(-_LEAD, self.frames, n)
        angle = rng.normal(-0.35 * np.sign(self.speed), 0.55, n)
        speed = rng.uniform(0.7, 3.5, n)
        self.drop_v = speed * np.cos(angle), speed * np.sin(angle)  # up, sideways
        self.drop_r = np.minimum(6 * np.exp(0.6 * rng.standard_normal(n)), 22) * um
        self.drop_fall = rng.uniform(0.0, 0.02, n)

    def laser(self, t: np.ndarray | float) -> np.ndarray | float:
        """Column of the laser beam at time t."""
        return self.start + self.speed * t

    def thickness(self, t: float) -> np.ndarray:
        behind = -np.sign(self.speed)
        out = self.plate * cover(self.surface - self.y, soft=4.0)
        standing, flying = self._bed(t)
        out += standing
        # The melt pool is less dense than the plate; a solid bead replaces the powder behind it.
        back = (self.x - self.laser(t)) * behind  # W
        pool = cover(
            np.hypot(
                (back - 0.8 * self.depth) / (1.6 * self.depth),
                (self.y - self.top) / (0.85 * self.depth),
            )
            - 1,
            soft=0.08,
        )
        out -= 0.05 * self.track * pool * (self.y > self.surface)
        height = self.bead * smoothstep((back - 6) / 8)
        edge = np.maximum(self.surface - height - self.y, self.y - self.surface)
        out += self.track * cover(edge, soft=3.0)
        self._cavity(out, t, behind)
        pores = self._pores_at(t, behind)
        parts = zip(flying, pores, self._spatter_at(t), strict=True)
        y, x, r = (np.concatenate(part) for part in parts)
        weight = np.ones(len(r), np.float32)
        weight[len(flying[0]) : len(flying[0]) + len(pores[0])] = -1
        out += spheres(self.shape, y, x, r, weight)
        return np.maximum(out, 0) * np.float32(self.pixel)

    def _bed(self, t: float) -> tuple[np.ndarray, Spheres]:
        """The grains at rest, as a map, and those that the vapour has reached or soon will."""
        group = int(np.searchsorted(self.leaves[self.cuts[:-1]], t))
        part = slice(0, self.cuts[group])
        age = np.maximum(t - self.leaves[part], 0).astype(np.float32)
        return self.suffix[group], self._grains(part, age)

    def _cavity(self, out: np.ndarray, t: float, behind: float) -> None:
        a, b, c, d = self.sway(t)
        depth = self.depth * float(np.clip(1 + 0.16 * a, 0.5, 1.4))
        reach = 2.5 * self.half_width + self.lean * depth * 1.5
        centre = float(self.laser(t))
        x0, x1 = (int(np.clip(v, 0, self.shape[1])) for v in (centre - reach, centre + reach))
        y0 = int(np.clip(self.top - 4, 0, self.shape[0]))
        y1 = int(np.clip(self.top + depth + 2, 0, self.shape[0]))
        if x0 == x1 or y0 == y1:
            return
        s = np.clip((self.y[y0:y1] - self.top) / depth, 0, 1)
        axis = centre + behind * depth * (
            self.lean * (1 + 0.5 * b) * s**2 + 0.05 * np.sin(5 * s - 0.5 * t)
        )
        bulge = np.exp(-(((s - 0.8) / 0.16) ** 2)) * (0.5 + 0.45 * c)
        size, rate = self.ripple
        ripple = sum(
            m * np.sin(k * s - w * t)
            for m, k, w in zip(size, (9.0, 17.0), 2 * np.pi * rate / 3, strict=True)
        )
        half = self.half_width * np.maximum(
            np.sqrt(1 - s**2) * (0.75 + 0.2 * d + 0.6 * np.exp(-8 * s)) + bulge + ripple * s, 0.12
        )
        half = half * np.sqrt(np.clip((1.001 - s) * 12, 0, 1))
        gas = 1.5 * cylinder(self.x[x0:x1] - axis, half)
        inside = self.y[y0:y1] > self.surface[x0:x1] - 1
        out[y0:y1, x0:x1] -= np.minimum(gas, 0.9 * self.plate) * inside

    def _pores_at(self, t: float, behind: float) -> Spheres:
        age = t - self.pore_t
        shed = age > 0
        age, stop = age[shed], self.pore_stop[shed]
        away, up = (v[shed] * stop * (1 - np.exp(-age / stop)) for v in self.pore_v)
        return (
            self.top + self.depth * self.pore_depth[shed] - up,
            self.laser(self.pore_t[shed]) + behind * (self.lean * self.depth + away),
            self.pore_r[shed] * smoothstep(age - 1),
        )

    def _spatter_at(self, t: float) -> Spheres:
        age = t - self.drop_t
        fly = age > 0
        age = age[fly]
        up, side = (v[fly] for v in self.drop_v)
        return (
            self.top - 2 - up * age + self.drop_fall[fly] * age**2,
            self.laser(self.drop_t[fly]) + side * age,
            self.drop_r[fly],
        )
