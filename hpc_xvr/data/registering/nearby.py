"""Pictures that are known at some pixels only, and what lies near each of these pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import gaussian_filter, uniform_filter

WIDE = 41
"""Pixels of each of two boxes over which the local mean is taken out."""
NEAR = 3.0
"""Deviation, pixels, of the neighbourhood whose motion is explained by the sharp frames."""
RIDGE = 0.05
"""Of their mean power, added where they show nothing."""


class Level:
    """Takes the local mean out of pictures that are known at some pixels only."""

    def __init__(self, inside: np.ndarray) -> None:
        self.inside = inside
        self.weight = np.maximum(self._mean(inside.astype(np.float32)), 1e-3)[inside]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Values (n,) of these pixels without their local mean, (n,)."""
        rest: np.ndarray = (
            values - self._mean(on_grid(values, self.inside))[self.inside] / self.weight
        )
        return rest

    @staticmethod
    def _mean(picture: np.ndarray) -> np.ndarray:
        for _ in range(2):
            picture = uniform_filter(picture, WIDE, mode="constant")
        return picture


class Explained:
    """What of a picture some features explain near each pixel: least squares in a window."""

    def __init__(self, inside: np.ndarray, features: Sequence[np.ndarray]) -> None:
        self.inside = inside
        self.features = [on_grid(values, inside) for values in features]
        n = len(features)
        normal = np.empty((n, n, int(inside.sum())))
        for i in range(n):
            for j in range(i, n):
                normal[i, j] = normal[j, i] = self._near(self.features[i] * self.features[j])
            normal[i, i] += RIDGE * normal[i, i].mean() + 1e-20
        self.inverse = np.linalg.inv(normal.transpose(2, 0, 1))

    def _near(self, picture: np.ndarray) -> np.ndarray:
        mean: np.ndarray = gaussian_filter(picture, NEAR, truncate=3, mode="constant")[self.inside]
        return mean

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """What of values (n,) is explained, (n,)."""
        picture = on_grid(values, self.inside)
        right = np.stack([self._near(picture * feature) for feature in self.features])
        found: np.ndarray = np.einsum(
            "nij,jn,in->n", self.inverse, right, np.stack([f[self.inside] for f in self.features])
        )
        return found.astype(np.float32)


def on_grid(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Values (n,) of the pixels `inside` (h, w), and 0 at the others: (h, w)."""
    picture = np.zeros(inside.shape, np.float32)
    picture[inside] = values
    return picture
