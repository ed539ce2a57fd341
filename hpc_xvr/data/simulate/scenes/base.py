"""The interface of all scenes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from hpc_xvr.data.simulate.scenes.conditions import Conditions


class Scene(ABC):
    """One random experiment.

    Args:
        shape: pixels (H, W) of the high-resolution camera.
        frames: length of the recording; events are spread over it.
        rng: everything random is drawn from it by the constructor, nothing later.
    """

    conditions: Conditions | None = None
    """Ranges of material, pixel, rate, distance and speed; None: the class sets them itself."""
    material: str
    """Key of optics.MATERIALS."""
    pixel: float
    """Pixel size at the sample in m."""
    frame_rate: float
    """Hz, of the fastest camera."""
    bulk: float
    """Projected thickness in m that should transmit `transmission`: fixes the photon energy."""
    transmission: float
    distance: float
    """Sample to scintillator in m."""
    speed: float
    """Pixels a frame."""

    def __init__(self, shape: tuple[int, int], frames: int, rng: np.random.Generator) -> None:
        self.shape = shape
        self.frames = frames
        self.y = np.arange(shape[0], dtype=np.float32)[:, None]  # H, 1
        self.x = np.arange(shape[1], dtype=np.float32)  # W
        self.density = shape[0] * shape[1] / 128**2
        if self.conditions is not None:
            self._draw(self.conditions, rng)
        self.build(rng)

    def _draw(self, conditions: Conditions, rng: np.random.Generator) -> None:
        self.material = str(rng.choice(conditions.materials))
        self.transmission = rng.uniform(*conditions.transmission)
        self.pixel = rng.uniform(*conditions.pixel_um) * 1e-6
        self.frame_rate = float(np.exp(rng.uniform(*np.log(conditions.frame_rate_hz))))
        self.distance = rng.uniform(*conditions.distance_m)
        self.speed = rng.uniform(*conditions.speed)

    @abstractmethod
    def build(self, rng: np.random.Generator) -> None:
        """Draw all that is random beyond the conditions, and set `bulk`."""

    @abstractmethod
    def thickness(self, t: float) -> np.ndarray:
        """Projected thickness (H, W) in m at time t (frames); any t, in any order."""

    def brightness(self, t: float) -> float:
        """Of the beam at time t (frames), relative to what it is on average: slow changes of it."""
        return 1.0
