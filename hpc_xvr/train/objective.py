"""What training minimises."""

from __future__ import annotations

from torch import Tensor


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference, the published loss; in float32 at least."""
    wide = output.dtype if output.dtype.itemsize >= 4 else target.dtype
    return (output.to(wide) - target).abs().mean()
