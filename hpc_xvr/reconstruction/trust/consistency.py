"""Does a reconstructed frame agree with what the fast camera measured at its instant?

The frame is put through the fast camera (`observation`) and compared with the measured frame:
reduced chi-square, over the whole frame and in squares of a few fast pixels, in which something
small that is missing or invented shows. It can also be made to agree: what the fast camera saw
beyond its noise is added back, at the resolution that it has.

Shapes: h w the fast camera's grid, H = scale*h, W = scale*w.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.ndimage import uniform_filter

from hpc_xvr.model.bayes import BayesianFusion, Prior
from hpc_xvr.reconstruction.trust.observation import SQUARE, Observation

FRAME_LIMIT = 1.5
"""Chi-square of a frame above which it contradicts the measurement."""
SQUARE_LIMIT = 4.5
"""Chi-square of a square above which the frame does."""
SURE = 1.6
"""Chi-square of a square up to which what is left may be noise, and is not added back."""


@dataclass(frozen=True)
class Comparison:
    """A reconstructed frame beside the measured one."""

    chi_square: float
    """Reduced chi-square of the frame: about 1 where noise is all the difference."""
    worst: float
    """The same of the worst square."""
    place: tuple[int, int]
    """Centre of that square, in sharp pixels (row, column)."""
    aside: np.ndarray = field(repr=False, compare=False)
    """(h, w) float32: (measured - expected) / deviation; its square is the map of chi-square."""
    judged: bool = True
    """Was the fast camera's noise known?"""

    @property
    def contradicts(self) -> bool:
        """Does the measurement contradict the frame?"""
        return self.judged and (self.chi_square > FRAME_LIMIT or self.worst > SQUARE_LIMIT)


def compare_frame(frame: np.ndarray, measured: np.ndarray, camera: Observation) -> Comparison:
    """Compare a frame (H, W) with the fast camera's frame (h, w) of its instant."""
    seen = camera.seen(frame)
    aside = (measured - seen) / np.sqrt(camera.variance(seen))
    if camera.usable is not None:
        aside = np.where(camera.usable, aside, 0.0)
    squares = camera.squares(aside**2)
    row, column = np.unravel_index(int(np.argmax(squares)), squares.shape)
    usable = aside.size if camera.usable is None else np.count_nonzero(camera.usable)
    return Comparison(
        float((aside**2).sum() / max(usable, 1)),
        float(squares[row, column]),
        (
            int(row) * camera.scale + camera.scale // 2,
            int(column) * camera.scale + camera.scale // 2,
        ),
        aside.astype(np.float32),
        camera.keys > 0,
    )


def enforce(frame: np.ndarray, measured: np.ndarray, camera: Observation) -> np.ndarray:
    """The frame (H, W) nearest to `frame` that agrees with the measured one (h, w), clipped to
    [0, 1].

    The conditional mean of Bayesian fusion (step 4 of `model.bayes`), with the frame itself as what
    was expected. How far off it may be is taken from the residual in squares, less the noise: where
    noise explains the residual nothing is added, so noise is not copied into the picture.
    """
    seen = camera.seen(frame)
    noise = camera.noise(seen)
    residual = measured - seen
    if camera.usable is not None:
        residual = np.where(camera.usable, residual, 0.0)
    square = camera.squares(residual**2)
    excess = np.clip(square - SURE * uniform_filter(noise, SQUARE, mode="nearest"), 0, None)
    if not excess.any():
        return np.clip(frame, 0, 1)
    scale = camera.scale

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, np.float32))[None, None]

    fusion = BayesianFusion(blur=camera.blur)
    deviation = torch.nn.functional.interpolate(
        tensor(excess), scale_factor=scale, mode="bilinear", align_corners=False
    ).sqrt()
    gains = camera.gains
    y = tensor((measured - camera.offset) / gains)
    if camera.usable is not None:
        y = torch.where(tensor(camera.usable) > 0, y, tensor((seen - camera.offset) / gains))
    prior = Prior(tensor(frame), deviation)
    with torch.inference_mode():
        agreed = fusion.given(prior, y, tensor(noise / gains**2))
    out: np.ndarray = agreed[0, 0].clamp(0, 1).numpy()
    return out
