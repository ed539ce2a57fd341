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


def motion_weights(lr: Tensor, hr: Tensor, weights: Tensor, tolerance: float = 0.06) -> Tensor:
    """Lower the weight of a key frame where the scene has moved between it and the frame.

    Compares each low-resolution frame with the binned key frames: a difference of `tolerance`
    (full scale 1) lowers the weight to 1/e, and the other key frame takes over where it fits
    better. (B, N, 1, h, w), (B, 2, 1, H, W), weights (B, N, 2) -> (B, N, 2, h, w).
    """
    scale = hr.shape[-1] // lr.shape[-1]
    binned = F.avg_pool2d(hr.squeeze(2), scale)  # B, 2, h, w
    distance = (lr - binned[:, None]).abs().flatten(0, 1)  # B*N, 2, h, w
    distance = F.avg_pool2d(F.pad(distance, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    match = torch.exp(-((distance / tolerance) ** 2)).unflatten(0, lr.shape[:2])
    share = match * weights[..., None, None].to(match.dtype)
    return share / share.sum(2, keepdim=True).clamp(min=1e-3) * match.amax(2, keepdim=True)


def transfer_detail(lr: Tensor, hr: Tensor, hr_offset: Tensor | None = None) -> Tensor:
    """Bicubic low-resolution frames plus the fine detail of the key frames.

    The detail of a key frame is what bicubic interpolation of its own binned version lacks; the
    two are interpolated in time (`hr_offset`, (B, 2); equal weights where it is None).
    (B, N, 1, h, w), (B, 2, 1, H, W) -> (B, N, 1, H, W).
    """
    scale = hr.shape[-1] // lr.shape[-1]
    weights = _weights_in_time(lr, hr_offset)
    return upsample(lr, scale) + interpolate_keys(_detail(hr, scale), weights)


def transfer_matching_detail(
    lr: Tensor, hr: Tensor, hr_offset: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """Detail transfer that leaves a key frame's detail out where the scene has moved.

    `gate` (B, N, 2, h, w), where given, is a learned correction: the logarithm of a factor on
    each key frame's weight. Shapes otherwise as for `transfer_detail`.
    """
    scale = hr.shape[-1] // lr.shape[-1]
    share = motion_weights(lr, hr, _weights_in_time(lr, hr_offset))
    if gate is not None:
        share = (share * gate.to(share.dtype).exp()).clamp(max=1.5)
    share = F.interpolate(share.flatten(0, 1), scale_factor=scale, mode="bilinear")
    detail = _detail(hr, scale).squeeze(2)[:, None]  # B, 1, 2, H, W
    return upsample(lr, scale) + (share.unflatten(0, lr.shape[:2]) * detail).sum(2, keepdim=True)


def _weights_in_time(lr: Tensor, hr_offset: Tensor | None) -> Tensor:
    if hr_offset is None:
        return lr.new_full((*lr.shape[:2], 2), 0.5)
    return key_weights(hr_offset, lr.shape[1])


def _detail(hr: Tensor, scale: int) -> Tensor:
    binned = F.avg_pool2d(hr.flatten(0, 1), scale).unflatten(0, hr.shape[:2])
    return hr - upsample(binned, scale)
