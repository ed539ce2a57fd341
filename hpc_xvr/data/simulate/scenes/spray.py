"""A liquid jet that breaks up into drops."""

from __future__ import annotations

import numpy as np

from hpc_xvr.data.simulate.scenes.base import Scene
from hpc_xvr.data.simulate.scenes.conditions import CONDITIONS
from hpc_xvr.data.simulate.scenes.draw import cover, cylinder, noise, spheres, wobble


class Spray(Scene):
    """Waves grow on a round jet until it necks; ligaments, drops and mist fly on.

    Drawn with the jet pointing down the rows; wide frames are drawn turned, jet along the columns.
    """

    conditions = CONDITIONS["spray"]

    def build(self, rng: np.random.Generator) -> None:
        self.turned = self.shape[1] > 1.3 * self.shape[0]
        self.drawn = self.shape[::-1] if self.turned else self.shape
        along, across = self.drawn
        self.s = np.arange(along, dtype=np.float32)[:, None]  # L, 1
        self.q = np.arange(across, dtype=np.float32)  # A
        self.radius = across * rng.uniform(0.09, 0.13)
        self.bulk = 2 * self.radius * self.pixel
        self.axis = across * rng.uniform(0.42, 0.58)
        self.breakup = along * rng.uniform(0.45, 0.8)
        waves = 9
        length = self.radius * np.concatenate((rng.uniform(1.8, 6, 6), rng.uniform(0.7, 1.5, 3)))
        self.wave_k = 2 * np.pi / length
        self.wave_w = self.wave_k * self.speed * rng.uniform(0.85, 1.1, waves)
        self.wave_phase = rng.uniform(0, 2 * np.pi, waves)
        self.wave_size = np.concatenate((rng.uniform(0.15, 0.42, 6), np.zeros(3)))
        self.ripple_size = np.concatenate((np.zeros(6), rng.uniform(0.02, 0.05, 3)))
        self.sway_k = 2 * np.pi / (self.radius * rng.uniform(5, 10, 3))
        self.sway_w = self.sway_k * self.speed * rng.uniform(0.7, 1.0, 3)
        self.sway_phase = rng.uniform(0, 2 * np.pi, 3)
        self.sway_size = self.radius * rng.uniform(0.1, 0.3, 3)
        self.flap = wobble(rng, 15, 60)
        rows = along + int(np.ceil(self.speed * (self.frames + 4)))
        self.skin = 0.05 * (
            noise((rows, across), (2.2, 1.5), rng) + noise((rows, across), (6, 4), rng)
        )
        self._drops(rng)
        self.still = self._still(rng)

    def _still(self, rng: np.random.Generator) -> np.ndarray:
        """Nozzle and the drops that hit the windows earlier."""
        along, across = self.drawn
        out = np.zeros(self.drawn, np.float32)
        if rng.random() < 0.6:
            lip = along * rng.uniform(0.05, 0.1)
            bore = self.radius * (1.05 + 0.5 * np.maximum(lip - self.s, 0) / lip)
            wall = np.maximum(bore - np.abs(self.q - self.axis), self.s - lip)
            outer = np.abs(self.q - self.axis) - self.radius * 2.6 + 0.5 * self.s
            out += 4 * self.radius * cover(np.maximum(wall, outer), 2.0)
        n = rng.poisson(90 * self.density)
        r = 1.6 * np.exp(0.5 * rng.standard_normal(n))
        out += spheres(self.drawn, rng.uniform(0, along, n), rng.uniform(0, across, n), r, 1.3)
        # A dried film on the windows.
        film = noise(self.drawn, 1.2, rng) + noise(self.drawn, 5, rng)
        return out + self.radius * 0.012 * np.maximum(film + 1, 0)

    def _drops(self, rng: np.random.Generator) -> None:
        along = self.drawn[0]
        n = rng.poisson(self.density * 1.1 * (self.frames + along / self.speed))
        self.born = rng.uniform(-along / self.speed, self.frames, n)
        self.from_s = along * rng.uniform(0.1, 1, n) ** 0.7
        side = rng.choice([-1.0, 1.0], n)
        self.from_q = self.axis + side * self.radius * rng.uniform(0.2, 1.3, n)
        self.v_s = self.speed * rng.uniform(0.45, 1.25, n)
        self.v_q = side * self.speed * np.abs(rng.normal(0, 0.28, n))
        self.drag = rng.uniform(0.001, 0.01, n)
        self.r = np.clip(1.3 * np.exp(0.55 * rng.standard_normal(n)), 0.6, 0.4 * self.radius)

    def thickness(self, t: float) -> np.ndarray:
        s = self.s[:, 0]
        grown = np.minimum(np.exp(2.5 * (s / self.breakup - 1)), 1.6)  # L
        wave = np.sin(self.wave_k * s[:, None] - self.wave_w * t + self.wave_phase)
        half = self.radius * (
            1
            + grown * (wave @ self.wave_size)
            + wave @ self.ripple_size
            - 0.35 * np.minimum(s / self.breakup, 1.5)
        )
        half = 1.9 * self.radius * np.tanh(half / (1.9 * self.radius))  # no endless swelling
        bend = np.sin(self.sway_k * s[:, None] - self.sway_w * t + self.sway_phase)
        middle = self.axis + (grown + 0.05) * (bend @ self.sway_size) + 0.6 * self.flap(t)
        half, middle = (a.astype(np.float32)[:, None] for a in (half, middle))
        jet = cylinder(self.q - middle, np.maximum(half, 0))
        jet *= np.maximum(1 + self._skin(t) * (1 + grown[:, None]), 0.2).astype(np.float32)
        age = t - self.born
        fly = age > 0
        age = age[fly]
        slow = (1 - np.exp(-self.drag[fly] * age)) / self.drag[fly]
        out = self.still + jet
        out += spheres(
            self.drawn,
            self.from_s[fly] + self.v_s[fly] * slow,
            self.from_q[fly] + self.v_q[fly] * slow,
            self.r[fly] * np.minimum(age / 3, 1),
        )
        out *= np.float32(self.pixel)
        return out.T if self.turned else out

    def _skin(self, t: float) -> np.ndarray:
        """The jet's rough surface, carried along by the flow."""
        along = self.drawn[0]
        start = np.clip(len(self.skin) - along - self.speed * (t + 2), 0, len(self.skin) - along)
        first = min(int(start), len(self.skin) - along - 1)
        part = np.float32(start - first)
        return (1 - part) * self.skin[first : first + along] + part * self.skin[
            first + 1 : first + 1 + along
        ]
