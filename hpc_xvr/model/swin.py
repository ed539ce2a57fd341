"""Shifted-window attention over short videos, in one token layout from block to block.

Shapes: B batch, D frames, h w image grid (Hp Wp after padding to window multiples), C channels,
T = D*Hp*Wp tokens in window order, n windows of N tokens, A heads.

Tokens are kept in window order between blocks. Everything outside attention (LayerNorm, MLP,
residuals) works on single tokens and does not care for their order, so a block costs at most one
gather: from the order of the block before to its own. A window at the border of the shifted grid
is the union of regions that must not see each other; they are simply windows of half a side here,
which needs no mask and, as the position bias depends on relative positions only, no other table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_xvr.model.attention import biased_attention


@dataclass(frozen=True)
class Group:
    """Consecutive windows of one shape in a layout."""

    count: int
    height: int
    width: int
    tokens: int  # frames * height * width


@dataclass(frozen=True)
class Layout:
    """A token order: how it splits into windows, and the gathers from and to the image."""

    groups: tuple[Group, ...]
    from_image: Tensor  # T: position in (D, h, w) of each token; padding points at 0
    to_image: Tensor  # D*h*w: token of each image position
    valid: Tensor | None  # T, 1: 0 for padding; None where there is none


@dataclass(frozen=True)
class Grid:
    """The two token orders of a block grid and the gathers between them."""

    plain: Layout
    shifted: Layout
    to_shifted: Tensor  # T: plain token of each shifted token
    to_plain: Tensor  # T: shifted token of each plain token


def _cuts(extent: int, window: int, shifted: bool) -> list[int]:
    """Sizes of the windows along an axis of `extent`; no shift where one window spans it."""
    count = extent // window
    if not shifted or count == 1:
        return [window] * count
    return [window // 2, *[window] * (count - 1), window - window // 2]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is cached in inference may later be needed in training
def grid(frames: int, height: int, width: int, window: int, device: torch.device) -> Grid:
    """Token orders of a (frames, height, width) image; cached per shape and device."""
    hp, wp = -(-height // window) * window, -(-width // window) * window
    padded = torch.arange(frames * hp * wp).view(frames, hp, wp)
    inside = padded[:, :height, :width].flatten()  # padded position of each image position
    image = torch.full((frames * hp * wp,), -1)
    image[inside] = torch.arange(inside.numel())

    def order(shifted: bool) -> tuple[Layout, Tensor]:
        windows: dict[tuple[int, int], list[Tensor]] = {}
        for strip in padded.split(_cuts(hp, window, shifted), dim=1):
            for cut in strip.split(_cuts(wp, window, shifted), dim=2):
                windows.setdefault((cut.shape[1], cut.shape[2]), []).append(cut.flatten())
        groups = tuple(Group(len(w), *size, w[0].numel()) for size, w in windows.items())
        tokens = torch.cat([cut for same in windows.values() for cut in same])
        rank = torch.argsort(tokens)  # padded position -> token
        source = image[tokens]
        valid = None if len(inside) == len(image) else (source >= 0).float()[:, None].to(device)
        layout = Layout(groups, source.clamp(min=0).to(device), rank[inside].to(device), valid)
        return layout, tokens

    plain, tokens_plain = order(False)
    shifted, tokens_shifted = order(True)
    return Grid(
        plain,
        shifted,
        to_shifted=torch.argsort(tokens_plain)[tokens_shifted].to(device),
        to_plain=torch.argsort(tokens_shifted)[tokens_plain].to(device),
    )


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def relative_position(
    frames: int, window: int, height: int, width: int, device: torch.device
) -> Tensor:
    """Row of the bias table for each pair of tokens of a (frames, height, width) window: (N, N).

    The table spans offsets of a (frames, window, window) window; smaller windows use part of it.
    """
    axes = torch.meshgrid(
        torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij"
    )
    at = torch.stack(axes).flatten(1)  # 3, N
    step = at[:, :, None] - at[:, None, :]  # 3, N, N: query minus key
    side = 2 * window - 1
    index = ((step[0] + frames - 1) * side + step[1] + window - 1) * side + step[2] + window - 1
    return index.to(device)


class _Gather(torch.autograd.Function):
    """x[:, index] for a permutation, whose gradient is the gather the other way round.

    (Padding takes a copy of token 0 and passes no gradient back; `back` skips it.) The generic
    backward of index_select adds into a zeroed tensor, token by token.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, back: Tensor, valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, valid)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        back, valid = ctx.saved_tensors
        gradient = gradient.index_select(1, back)
        if valid is not None:
            gradient = gradient * valid.to(gradient.dtype)
        return gradient, None, None, None


class DropPath(nn.Module):
    """Stochastic depth: drop the whole branch of a sample with probability `rate` in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * (keep.to(x.dtype) / (1 - self.rate))


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned relative position bias."""

    def __init__(self, dim: int, heads: int, frames: int, window: int) -> None:
        super().__init__()
        self.heads, self.frames, self.window = heads, frames, window
        rows = (2 * frames - 1) * (2 * window - 1) ** 2
        self.bias_table = nn.Parameter(torch.empty(rows, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def bias(self, group: Group) -> Tensor:
        """Additive bias of a window shape: (1, A, N, N)."""
        index = relative_position(
            self.frames, self.window, group.height, group.width, self.bias_table.device
        )
        return self.bias_table.t()[:, index.flatten()].view(1, self.heads, *index.shape)

    def forward(self, x: Tensor, groups: tuple[Group, ...]) -> Tensor:
        """(B, T, C) tokens in window order -> (B, T, C)."""
        batch, _, dim = x.shape
        qkv = self.qkv(x)  # B, T, 3C
        mixed, start = [], 0
        for group in groups:
            stop = start + group.count * group.tokens
            part = qkv[:, start:stop].reshape(
                batch * group.count, group.tokens, 3, self.heads, dim // self.heads
            )
            q, k, v = part.permute(2, 0, 3, 1, 4)  # each B*n, A, N, C/A
            y = biased_attention(q, k, v, self.bias(group))
            mixed.append(y.transpose(1, 2).reshape(batch, stop - start, dim))
            start = stop
        return self.proj(mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1))


class SwinBlock(nn.Module):
    """LayerNorm, window attention, LayerNorm, MLP, each branch with a residual."""

    def __init__(
        self, dim: int, heads: int, frames: int, window: int, mlp_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, frames, window)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, groups: tuple[Group, ...], valid: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C); `valid` (T, 1) zeroes padding after the first LayerNorm."""
        y = self.norm1(x)
        if valid is not None:
            y = y * valid.to(y.dtype)
        x = x + self.drop_path(self.attn(y, groups))
        return x + self.drop_path(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class SwinStage(nn.Module):
    """Blocks with and without shift in turn, then a 3x3 convolution, around them a residual."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        frames: int,
        window: int,
        mlp_ratio: float,
        drop_path: list[float],
    ) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(
            SwinBlock(dim, heads, frames, window, mlp_ratio, drop_path[i]) for i in range(depth)
        )
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, image: Tensor, keep: slice = slice(None)) -> Tensor:
        """(B, D, h, w, C) -> the frames `keep` of (B, D, h, w, C)."""
        frames, height, width = image.shape[1:4]
        g = grid(frames, height, width, self.window, image.device)
        layout = g.plain
        x = _Gather.apply(image.flatten(1, 3), layout.from_image, layout.to_image, None)
        for i, block in enumerate(self.blocks):
            if i:
                there, back = (g.to_shifted, g.to_plain) if i % 2 else (g.to_plain, g.to_shifted)
                x = _Gather.apply(x, there, back, None)
                layout = g.shifted if i % 2 else g.plain
            x = block(x, layout.groups, layout.valid)
        x = _Gather.apply(x, layout.to_image, layout.from_image, layout.valid)
        x = x.view(image.shape)[:, keep]
        return conv2d(self.conv, x) + image[:, keep]


def conv2d(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 2-D convolution to each frame of (B, D, h, w, C), channels last in and out."""
    batch, frames = x.shape[:2]
    y = conv(x.flatten(0, 1).permute(0, 3, 1, 2))  # channels_last without a copy
    return y.permute(0, 2, 3, 1).unflatten(0, (batch, frames))
