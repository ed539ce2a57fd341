"""What training minimises."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_xvr.model.key_propagation import Carried

SOFT = 1e-3
"""Error (full scale 1) below which Charbonnier's loss is quadratic."""


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference, the published loss; in float32 at least."""
    return _difference(output, target).abs().mean()


def charbonnier(output: Tensor, target: Tensor) -> Tensor:
    """Mean of sqrt(d^2 + SOFT^2): the absolute difference, smooth around 0."""
    return _softened(_difference(output, target)).mean()


def carried(output: Carried, target: Tensor) -> Tensor:
    """How far the carried key frames are from the truth, of each direction's motion fields the
    nearest one at each pixel: it teaches the motion where the pictures do not."""
    total = target.new_zeros(())
    for pictures in (output.forward, output.backward):  # B, N, M, H, W
        assert pictures is not None, "kept in training mode only"
        nearest = _softened(_difference(pictures, target)).amin(2)
        total = total + nearest.mean() / 2
    return total


def _difference(output: Tensor, target: Tensor) -> Tensor:
    wide = output.dtype if output.dtype.itemsize >= 4 else target.dtype
    return output.to(wide) - target


def _softened(difference: Tensor) -> Tensor:
    return torch.sqrt(difference.square() + SOFT**2)
