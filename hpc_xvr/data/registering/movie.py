"""The fast camera's movie: what it shows between its frames, and how it changes.

Between frames it is Catmull and Rom's cubic through the four nearest; between two frames only it
would be blurred by the motion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

from hpc_xvr.data.registering.placing import FLIPS, Flip, shrunk

STEADY = 1, 2, 4
"""Frames before and after two whose rate of change may be that between these."""
MOVING = 48
"""Fast frames by which what moves is told from noise."""
ALIKE = 2.5
"""Deviation, pixels, of the neighbourhood that moves alike."""
CALM = 20
"""Percent of the pixels that change by hardly more than noise."""
NOISY = 0.1
"""Of noise: change beyond it from which a pixel counts half as one that moves."""
UNSTEADY = 0.15
"""Of the third difference of four frames: what is not known of the movie between them."""


class Movie:
    """Frames (h, w) by their number, flipped, with a mean of 1.

    Args:
        frame: that of a number as it was recorded, or None where it is missing.
        shape: (h, w), what is left of it where it is thinned out.
        factor: by which it is thinned out.
        flip: see `FLIPS`.
    """

    def __init__(
        self,
        frame: Callable[[int], np.ndarray | None],
        shape: tuple[int, ...],
        factor: float,
        flip: Flip,
    ) -> None:
        self.frame, self.shape, self.factor, self.flip = frame, shape, factor, flip
        self._known: dict[int, np.ndarray | None] = {}
        self._moving: np.ndarray | None = None

    def __getitem__(self, number: int) -> np.ndarray | None:
        if number not in self._known:
            frame = self.frame(number)
            if frame is not None:
                frame = shrunk(frame[FLIPS[self.flip]], self.factor)[0]
                frame = frame / max(float(frame.mean()), 1e-9)
            self._known[number] = frame
        return self._known[number]

    def four(self, number: int) -> list[np.ndarray] | None:
        """The frames from one before a number to two after it."""
        four = [one for i in (-1, 0, 1, 2) if (one := self[number + i]) is not None]
        return four if len(four) == 4 else None

    def moving(self, times: np.ndarray) -> np.ndarray:
        """How much of the change of each pixel is not noise, 0 to 1, (h, w)."""
        if self._moving is None:
            first, last = math.floor(times.min()), math.ceil(times.max())
            power, mean, count = np.zeros(self.shape), np.zeros(self.shape), 0
            for n in np.unique(np.linspace(first, last - 1, MOVING).astype(int)).tolist():
                before, after = self[n], self[n + 4]
                if before is not None and after is not None:
                    power += (after - before) ** 2
                    mean += before
                    count += 1
            if not count:
                return np.ones(self.shape)
            # noise of photons goes with the mean
            power = gaussian_filter(power / np.maximum(mean, 1e-3 * count), ALIKE)
            excess = np.maximum(power / np.percentile(power, CALM) - 1, 0)
            self._moving = excess / (excess + NOISY)
        return self._moving

    def rates(self, number: int) -> list[np.ndarray]:
        """Of change between a frame and the next, from those before and after the two, the more the
        longer motion is taken to be steady."""
        change, weight, rates = np.zeros(self.shape, np.float32), 0.0, []
        for away in range(1, max(STEADY) + 1):
            before, after = self[number - away], self[number + 1 + away]
            if before is not None and after is not None:  # least squares of a straight line
                change = change + (away + 0.5) * (after - before)
                weight += 2 * (away + 0.5) ** 2
            if away in STEADY:
                rates.append(change / weight)
        return rates


def between(four: Sequence[np.ndarray], s: float) -> np.ndarray:
    """The picture at the share s of the way from the second of four frames to the third (Catmull
    and Rom 1974)."""
    a, b, c, d = four
    picture: np.ndarray = b + 0.5 * s * (
        (c - a) + s * (2 * a - 5 * b + 4 * c - d + s * (3 * (b - c) + d - a))
    )
    return picture


def steady(four: Sequence[np.ndarray]) -> np.ndarray:
    """(h, w), the weight of pixels whose value between the middle two of four frames is guessed
    from these: noise against what is not known where the frames do not change steadily."""
    a, b, c, d = four
    power = gaussian_filter((d - 3 * c + 3 * b - a) ** 2, ALIKE)
    noise = float(np.percentile(power, CALM))  # of 1 + 9 + 9 + 1 frames
    noise = max(noise, 1e-3 * float(power.mean()), 1e-20)
    unknown = UNSTEADY**2 * np.maximum(power - noise, 0)
    weight: np.ndarray = noise / 20 / (noise / 20 + unknown)
    return weight
