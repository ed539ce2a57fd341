"""Pictures and motion looked up along motion, and what the two pixel grids make of a picture.

Shapes: K pictures; M motion fields of each; h w the low-resolution grid, H = scale*h, W = scale*w.
"""

from __future__ import annotations

from functools import cache, lru_cache
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
    here = _pixels(corner, flow.shape[-2:], image.device)
    there = here + flow.permute(0, 2, 3, 1)  # K, H', W', 2
    # grid_sample without aligned corners: pixel i of n lies at (2 i + 1) / n - 1.
    places = (2 * there + 1) / _size(width, height, image.device) - 1
    mode = "bilinear" if lookup == "linear" else "bicubic"
    return F.grid_sample(image, places, mode, "border", align_corners=False)


@lru_cache(64)
@torch.inference_mode(False)  # what is kept in inference may later be needed in training
def _pixels(corner: tuple[int, int], size: tuple[int, int], device: torch.device) -> Tensor:
    """Where the pixels of a part of a grid lie, (H', W', 2) as (x, y)."""
    y, x = (
        torch.arange(first, first + n, device=device, dtype=torch.float32)
        for first, n in zip(corner, size, strict=True)
    )
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


@lru_cache(64)
@torch.inference_mode(False)
def _size(width: int, height: int, device: torch.device) -> Tensor:
    """Kept on the device: to copy two numbers there would wait for everything it does."""
    return torch.tensor((width, height), dtype=torch.float32, device=device)


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
    fields = _enlarged(flow, scale, "bilinear") * scale
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
    return _enlarged(x, scale, "bicubic")


def _enlarged(x: Tensor, scale: int, how: Literal["bilinear", "bicubic"]) -> Tensor:
    if x.device.type == "cuda":
        return enlarged_by_taps(x, scale, how)
    return F.interpolate(x, scale_factor=scale, mode=how, align_corners=False)


def enlarged_by_taps(x: Tensor, scale: int, how: Literal["bilinear", "bicubic"]) -> Tensor:
    """The same as a sum of shifted pictures, in float32.

    torch's kernels for GPUs give a thread all pictures of a batch at one pixel, and their gradients
    are added up atomically: for thousands of small pictures that takes seven times as long.
    """
    taps = _taps(scale, how, x.device)  # count, scale
    count = len(taps)
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        first, last = ([x[..., i : i + 1 or None]] * (count // 2) for i in (0, -1))
        padded, width = torch.cat((*first, x, *last), dim=-1), x.shape[-1]
        wide = padded[..., :width, None] * taps[0]
        for k in range(1, count):
            wide = torch.addcmul(wide, padded[..., k : k + width, None], taps[k])
        x = wide.flatten(-2)
        first, last = ([x[..., i : i + 1 or None, :]] * (count // 2) for i in (0, -1))
        padded, height = torch.cat((*first, x, *last), dim=-2), x.shape[-2]
        high = padded[..., :height, None, :] * taps[0, :, None]
        for k in range(1, count):
            high = torch.addcmul(high, padded[..., k : k + height, None, :], taps[k, :, None])
        return high.flatten(-3, -2)


@cache
@torch.inference_mode(False)
def _taps(scale: int, how: Literal["bilinear", "bicubic"], device: torch.device) -> Tensor:
    """(3 or 5, scale): shares of a pixel and its neighbours in each of the finer ones (bicubic:
    Keys' polynomials, a = -0.75 as in torch)."""
    reach = 1 if how == "bilinear" else 2
    where = (torch.arange(scale, dtype=torch.float64) + 0.5) / scale - 0.5
    pixels = torch.arange(-reach, reach + 1, dtype=torch.float64)[:, None]
    far, a = (where - pixels).abs(), -0.75
    if how == "bilinear":
        taps = (1 - far).clamp(min=0)
    else:
        near = ((a + 2) * far - (a + 3)) * far * far + 1
        outer = a * (((far - 5) * far + 8) * far - 4)
        taps = torch.where(far <= 1, near, torch.where(far < 2, outer, torch.zeros_like(far)))
    return taps.float().to(device)
