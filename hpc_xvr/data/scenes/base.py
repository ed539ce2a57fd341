"""What every scene offers to the simulated beamline."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np


class Scene(ABC):
    """One random experiment.

    Args:
        shape: pixels (H, W) of the high-resolution camera.
        frames: length of the recording; events are spread over it.
        rng: everything random is drawn from it on construction, nothing later.
    """

    material: str
    """Key of optics.MATERIALS."""
    pixel: float
    """Pixel size at the sample in m."""
    frame_rate: float
    """Hz"""
    bulk: float
    """Projected thickness in m that should transmit `transmission`: fixes the photon energy."""
    transmission: float
    distance: float
    """Sample to scintillator in m."""

    def __init__(self, shape: tuple[int, int], frames: int, rng: np.random.Generator) -> None:
        self.shape = shape
        self.frames = frames
        self.y = np.arange(shape[0], dtype=np.float32)[:, None]  # H, 1
        self.x = np.arange(shape[1], dtype=np.float32)  # W
        self.density = shape[0] * shape[1] / 128**2
        self.build(rng)

    @abstractmethod
    def build(self, rng: np.random.Generator) -> None:
        """Draw all that is random."""

    @abstractmethod
    def thickness(self, t: float) -> np.ndarray:
        """Projected thickness (H, W) in m at time t (frames); any t, in any order."""
