"""Pictures made without learning: what a network may add its output to, and must beat.

Shapes: B batch, N low-resolution frames, h w low-resolution grid, H = scale*h, W = scale*w.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(lr: Tensor, scale: int) -> Tensor:
    """Bicubic interpolation of each frame: (B, N, 1, h, w) -> (B, N, 1, H, W)."""
    up = F.interpolate(lr.flatten(0, 1), scale_factor=scale, mode="bicubic", align_corners=False)
    return up.unflatten(0, lr.shape[:2])


def key_weights(hr_offset: Tensor, frames: int) -> Tensor:
    """Weights of the two key frames, linear in time: (B, 2) offsets -> (B, frames, 2).

    `hr_offset` holds the key frames' signed distance from the centre frame in low-resolution
    frames; the `frames` frames are centred on it. Outside the two keys the nearer one counts.
    """
    t = torch.arange(frames, device=hr_offset.device, dtype=hr_offset.dtype) - frames // 2  # N
    before, after = hr_offset[:, :1], hr_offset[:, 1:]  # B, 1
    late = ((t - before) / (after - before).clamp(min=1e-6)).clamp(0, 1)  # B, N
    return torch.stack((1 - late, late), dim=-1)


def interpolate_keys(hr: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of two frames: (B, 2, 1, H, W), weights (B, N, 2) -> (B, N, 1, H, W)."""
    return torch.einsum("bkchw,bnk->bnchw", hr, weights.to(hr.dtype))


def transfer_detail(lr: Tensor, hr: Tensor, hr_offset: Tensor | None = None) -> Tensor:
    """Bicubic low-resolution frames plus the fine detail of the key frames.

    The detail of a key frame is what bicubic interpolation of its own binned version lacks; the
    two are interpolated in time (`hr_offset`, (B, 2); equal weights where it is None).
    (B, N, 1, h, w), (B, 2, 1, H, W) -> (B, N, 1, H, W).
    """
    scale = hr.shape[-1] // lr.shape[-1]
    binned = F.avg_pool2d(hr.flatten(0, 1), scale).unflatten(0, hr.shape[:2])
    detail = hr - upsample(binned, scale)
    if hr_offset is None:
        weights = hr.new_full((lr.shape[0], lr.shape[1], 2), 0.5)
    else:
        weights = key_weights(hr_offset, lr.shape[1])
    return upsample(lr, scale) + interpolate_keys(detail, weights)
