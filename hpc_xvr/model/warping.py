"""Pictures and motion looked up along motion, and what the two pixel grids make of a picture.

Shapes: K pictures; M motion fields of each; h w the low-resolution grid, H = scale*h, W = scale*w.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Lookup = Literal["linear", "cubic"]
"""Interpolation between the pixels of a picture (cubic: four by four of them)."""


def chain(flow: Tensor, further: Tensor, corner: tuple[int, int] = (0, 0)) -> Tensor:
    """Motion so far (K, 2M, h, w), and from there on (K, 2M, h', w') in the part of the grid that
    begins at `corner` -> both together, (K, 2M, h', w')."""
    so_far, d = (f.unflatten(1, (-1, 2)).flatten(0, 1) for f in (flow, further))  # K*M, 2, h, w
    moved = warp(so_far, d, corner) + d
    return moved.unflatten(0, (len(flow), -1)).flatten(1, 2)


def warp(
    image: Tensor, flow: Tensor, corner: tuple[int, int] = (0, 0), lookup: Lookup = "linear"
) -> Tensor:
    """image (K, C, H, W) looked up at p + flow(p), flow (K, 2, H', W') as (x, y) in its pixels, p
    from `corner` on; the nearest border pixel outside."""
    height, width = image.shape[-2:]
    # grid_sample without aligned corners: pixel i of n lies at (2 i + 1) / n - 1.
    y, x = (
        torch.arange(first, first + n, device=image.device, dtype=torch.float32)
        for first, n in zip(corner, flow.shape[-2:], strict=True)
    )
    here = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # H', W', 2
    there = here + flow.permute(0, 2, 3, 1)  # K, H', W', 2
    places = (2 * there + 1) / there.new_tensor((width, height)) - 1
    mode = "bilinear" if lookup == "linear" else "bicubic"
    return F.grid_sample(image, places, mode, "border", align_corners=False)


def warp_along(
    key: Tensor,
    flow: Tensor,
    scale: int,
    corner: tuple[int, int] = (0, 0),
    lookup: Lookup = "linear",
) -> Tensor:
    """The key frame (K, 1, H, W) carried along each field of (K, 2M, h, w): (K, M, H, W), or the
    part of it that begins at `corner` of the coarse grid.

    The original is looked up once, however long the way: nothing blurs from step to step.
    """
    fields = F.interpolate(flow, scale_factor=scale, mode="bilinear", align_corners=False) * scale
    place = corner[0] * scale, corner[1] * scale
    fields = fields.unflatten(1, (-1, 2))  # K, M, 2, H', W'
    keys = key.expand(-1, fields.shape[1], -1, -1).flatten(0, 1)[:, None]  # K*M, 1, H, W
    warped = warp(keys, fields.flatten(0, 1), place, lookup)
    return warped.unflatten(0, fields.shape[:2])[:, :, 0]


def detail(pictures: Tensor, scale: int) -> Tensor:
    """What the fast camera cannot see of (K, C, H, W): what binning and bicubic interpolation
    lose."""
    pictures = pictures.float()
    return pictures - enlarge(F.avg_pool2d(pictures, scale), scale)


def enlarge(x: Tensor, scale: int) -> Tensor:
    """Bicubic interpolation, (K, C, h, w) -> (K, C, H, W)."""
    return F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)
