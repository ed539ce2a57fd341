"""Modulated deformable convolution (Zhu et al. 2019, arXiv 1811.11168).

Shapes: B batch, C input channels, O output channels, k side of the kernel, G offset groups
(each C/G neighbouring channels share their offsets), h w grid; stride 1, output as large as input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from torchvision.ops import deform_conv2d as _torchvision_op
except (ImportError, RuntimeError, OSError):  # the last two: a build that does not fit this torch
    _torchvision_op = None


def deform_conv2d(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution whose taps are displaced by `offset` and scaled by `mask`, pixel by pixel.

    Args:
        x: (B, C, h, w); it is 0 outside, in between pixels it is interpolated bilinearly.
        offset: (B, G*k*k*2, h, w) in pixels: for each group and tap (row by row) dy, then dx.
        mask: (B, G*k*k, h, w).
        weight: (O, C, k, k), k odd.
        bias: (O,).

    Returns:
        (B, O, h, w) in the type of x.

    Raises:
        ValueError: the shapes do not belong together.
    """
    (batch, channels, h, w), k = x.shape, weight.shape[-1]
    groups = mask.shape[1] // (k * k)
    ok = k % 2 == 1 and weight.shape[1:] == (channels, k, k) and groups > 0
    ok = ok and channels % groups == 0 and mask.shape == (batch, groups * k * k, h, w)
    if not (ok and offset.shape == (batch, groups * k * k * 2, h, w)):
        raise ValueError(
            f"deform_conv2d: x {tuple(x.shape)}, offset {tuple(offset.shape)}, mask "
            f"{tuple(mask.shape)}, weight {tuple(weight.shape)} do not fit (B,C,h,w), "
            "(B,G*k*k*2,h,w), (B,G*k*k,h,w), (O,C,k,k) with C a multiple of G and k odd"
        )
    if _torchvision_op is not None and x.is_cuda:
        # Its backward samples anew instead of keeping k*k times the features. On a CPU its one
        # thread loses to grid_sample: 4 times slower forward, 15 times backward.
        return torchvision_conv(x, offset, mask, weight, bias)
    if torch.is_grad_enabled():
        return sampled_conv(x, offset, mask, weight, bias)
    # Nothing is kept for a backward pass: one sample at a time bounds the memory of large frames.
    rows = zip(x.split(1), offset.split(1), mask.split(1), strict=True)
    return torch.cat([sampled_conv(*row, weight, bias) for row in rows])


def sampled_conv(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """deform_conv2d in plain torch: bilinear sampling of all taps, then one matrix product."""
    (batch, channels, h, w), k = x.shape, weight.shape[-1]
    groups = mask.shape[1] // (k * k)
    # bfloat16 has 8 bits: it cannot hold a position to a fraction of a pixel.
    exact = torch.promote_types(x.dtype, torch.float32)
    reach = torch.arange(k, device=x.device, dtype=exact) - k // 2
    rows = torch.arange(h, device=x.device, dtype=exact)
    columns = torch.arange(w, device=x.device, dtype=exact)
    moved = offset.to(exact).view(batch, groups, k, k, 2, h, w)
    y = moved[:, :, :, :, 0] + reach.view(k, 1, 1, 1) + rows.view(h, 1)  # B, G, k, k, h, w
    x_ = moved[:, :, :, :, 1] + reach.view(k, 1, 1) + columns
    grid = torch.stack(((2 * x_ + 1) / w - 1, (2 * y + 1) / h - 1), dim=-1)
    grid = grid.view(batch * groups, k * k * h, w, 2)
    planes = x.to(exact).reshape(batch * groups, channels // groups, h, w)
    taps = F.grid_sample(planes, grid, padding_mode="zeros", align_corners=False).to(x.dtype)
    taps = taps.view(batch, groups, channels // groups, k * k, h * w)
    taps = taps * mask.to(x.dtype).view(batch, groups, 1, k * k, h * w)
    out = weight.flatten(1) @ taps.view(batch, channels * k * k, h * w)
    return (out + bias.to(out.dtype).unsqueeze(-1)).view(batch, -1, h, w)


def torchvision_conv(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """deform_conv2d by torchvision's kernel, in float32 or float64; torchvision must be there."""
    assert _torchvision_op is not None
    exact = torch.promote_types(x.dtype, torch.float32)
    x32, offset, mask, weight, bias = (v.to(exact) for v in (x, offset, mask, weight, bias))
    padding = weight.shape[-1] // 2
    return _torchvision_op(x32, offset, weight, bias, padding=padding, mask=mask).to(x.dtype)


class DeformConv(nn.Module):
    """3x3 deformable convolution whose offsets and mask are convolved from other features.

    `conv_offset` gives three equal parts: the first two are the offsets, the third one, through
    a sigmoid, the mask. It starts at zero: a plain convolution with all taps halved.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        bound = (channels * 9) ** -0.5
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.conv_offset = nn.Conv2d(channels, groups * 27, 3, padding=1)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, motion: Tensor) -> Tensor:
        """Features to sample and features to take offsets from, both (B, C, h, w)."""
        found = self.conv_offset(motion)
        part = found.shape[1] // 3
        offset, mask = found.split((2 * part, part), dim=1)
        return deform_conv2d(x, offset, mask.sigmoid(), self.weight, self.bias)
