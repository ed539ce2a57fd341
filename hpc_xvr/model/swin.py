"""Shifted-window attention over short videos, in one token layout from block to block.

Shapes: B batch, D frames, h w image grid (Hp Wp after padding to window multiples), C channels,
T = B*D*Hp*Wp tokens in window order, n windows of N tokens, A heads.

Tokens are kept in window order between blocks, those of all samples in one row. Everything outside
attention (LayerNorm, MLP, residuals) works on single tokens and does not care for their order, so
a block costs at most one gather: from the order of the block before to its own. A window at the
border of the shifted grid is the union of regions that must not see each other; they are simply
windows of half a side here, which needs no mask and, as the position bias depends on relative
positions only, no other table.

The residual stream stays in float32 under autocast; matrix products run in the autocast type.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpc_xvr.model import kernels
from hpc_xvr.model.attention import Kind, window_attention
from hpc_xvr.model.folding import Folding
from hpc_xvr.model.linear import autocast_to_bf16_on_cpu, linear, to_matmul_type

Recompute = Literal["none", "mlp", "blocks"]


@dataclass(frozen=True)
class Group:
    """Consecutive windows of one shape in a layout."""

    count: int
    height: int
    width: int
    tokens: int  # frames * height * width

    def rows(self, frames: slice) -> slice:
        """Tokens of a window that belong to these frames."""
        area = self.height * self.width
        return slice(frames.start * area, frames.stop * area)


@dataclass(frozen=True)
class Layout:
    """A token order: how it splits into windows, and the gathers from and to the image."""

    groups: tuple[Group, ...]
    relative: tuple[Tensor, ...]  # per group N*N: row of the bias table for each pair of tokens
    from_image: Tensor  # T: position in (B, D, h, w) of each token; padding points at 0
    to_image: Tensor  # B*D*h*w: token of each image position
    sample: Tensor  # T: which sample of the batch a token belongs to
    valid: Tensor | None  # T, 1: 0 for padding; None where there is none


@dataclass(frozen=True)
class Step:
    """The way into a block: where its tokens are in the order before, the way back, its layout."""

    there: Tensor  # T: row in the order before of each token
    back: Tensor
    layout: Layout
    batch: int


@dataclass(frozen=True)
class Grid:
    """The two token orders of a block grid, and the ways between them and from the image."""

    plain: Layout
    shifted: Layout
    first: Step  # image -> plain
    to_shifted: Step
    to_plain: Step


def _cuts(extent: int, window: int, shifted: bool) -> list[int]:
    """Sizes of the windows along an axis of `extent`; no shift where one window spans it or half a
    window is nothing."""
    count = extent // window
    if not shifted or count == 1 or window == 1:
        return [window] * count
    return [window // 2, *[window] * (count - 1), window - window // 2]


@lru_cache(maxsize=512)  # more than a training has shapes: recorded steps use them again
@torch.inference_mode(False)  # what is cached in inference may later be needed in training
def grid(
    batch: int, frames: int, height: int, width: int, window: int, device: torch.device
) -> Grid:
    """Token orders of `batch` (frames, height, width) images; cached per shape and device."""
    hp, wp = -(-height // window) * window, -(-width // window) * window
    positions = torch.arange(batch * frames * hp * wp).view(batch, frames, hp, wp)
    inside = positions[:, :, :height, :width].flatten()  # padded position of each image position
    image = torch.full((positions.numel(),), -1)
    image[inside] = torch.arange(inside.numel())
    padded = inside.numel() < positions.numel()

    def order(shifted: bool) -> tuple[Layout, Tensor]:
        windows: dict[tuple[int, int], list[Tensor]] = {}  # each B, D*height*width
        for strip in positions.split(_cuts(hp, window, shifted), dim=2):
            for cut in strip.split(_cuts(wp, window, shifted), dim=3):
                windows.setdefault((cut.shape[2], cut.shape[3]), []).append(cut.flatten(1))
        groups = tuple(
            Group(batch * len(same), *size, same[0].shape[1]) for size, same in windows.items()
        )
        tokens = torch.cat([torch.cat(same).flatten() for same in windows.values()])
        rank = torch.argsort(tokens)  # padded position -> token
        source = image[tokens]
        layout = Layout(
            groups,
            tuple(relative_position(frames, window, x.height, x.width, device) for x in groups),
            from_image=source.clamp(min=0).to(device),
            to_image=rank[inside].to(device),
            sample=(tokens // (frames * hp * wp)).to(device),
            valid=(source >= 0).float()[:, None].to(device) if padded else None,
        )
        return layout, tokens

    plain, tokens_plain = order(False)
    shifted, tokens_shifted = order(True)
    to_shifted = torch.argsort(tokens_plain)[tokens_shifted].to(device)
    to_plain = torch.argsort(tokens_shifted)[tokens_plain].to(device)
    return Grid(
        plain,
        shifted,
        Step(plain.from_image, plain.to_image, plain, batch),
        Step(to_shifted, to_plain, shifted, batch),
        Step(to_plain, to_shifted, plain, batch),
    )


def relative_position(
    frames: int, window: int, height: int, width: int, device: torch.device
) -> Tensor:
    """Row of the bias table for each pair of tokens of a (frames, height, width) window: N*N.

    The table spans offsets of a (frames, window, window) window; smaller windows use part of it.
    """
    axes = torch.meshgrid(
        torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij"
    )
    at = torch.stack(axes).flatten(1)  # 3, N
    step = at[:, :, None] - at[:, None, :]  # 3, N, N: query minus key
    side = 2 * window - 1
    index = ((step[0] + frames - 1) * side + step[1] + window - 1) * side + step[2] + window - 1
    return index.flatten().to(device)


class _Gather(torch.autograd.Function):
    """x[index] for a permutation of rows, whose gradient is the gather the other way round.

    (Padding takes a copy of row 0 and passes no gradient back; `back` skips it.) The generic
    backward of index_select adds into a zeroed tensor, row by row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, valid)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        back, valid = ctx.saved_tensors
        gradient = gradient.index_select(0, back)
        if valid is not None:
            gradient = gradient * valid.to(gradient.dtype)
        return gradient, None, None, None


class DropPath(nn.Module):
    """Stochastic depth: drop the whole branch of a sample with probability `rate` in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, sample: Tensor, batch: int) -> Tensor:
        """(T, C) -> (T, C), row i being of sample `sample[i]`."""
        factor = self.factor(sample, batch)
        return x if factor is None else x * factor[:, None].to(x.dtype)

    def factor(self, sample: Tensor, batch: int) -> Tensor | None:
        """What each token's branch is multiplied by now, (T,) float32; None where nothing drops."""
        if not self.training or self.rate == 0:
            return None
        keep = torch.rand(batch, device=sample.device) >= self.rate
        return (keep.float() / (1 - self.rate))[sample]


def add_norm(
    x: Tensor, branch: Tensor | None, norm: nn.LayerNorm, step: Step | None = None
) -> tuple[Tensor, Tensor]:
    """Close a residual branch and open the next one: the sum (T, C) in the order of `step`, and
    its LayerNorm in the type of matrix products, padding zeroed. One kernel when compiled."""
    if branch is not None:
        # In place where nobody looks back: x is a gathered copy of its own. A compiler does better.
        looked_back_at = torch.is_grad_enabled() or torch.compiler.is_compiling()
        x = x + branch if looked_back_at else x.add_(branch)
    if step is not None:
        x = _Gather.apply(x, step.there, step.back, None)
    y = norm(x)
    if step is not None and step.layout.valid is not None:
        y = y * step.layout.valid.to(y.dtype)
    return x, to_matmul_type(y)


class WindowAttention(Folding):
    """Multi-head self-attention within windows, with a learned relative position bias."""

    def __init__(self, dim: int, heads: int, frames: int, window: int, kind: Kind = "auto") -> None:
        super().__init__()
        self.heads, self.frames, self.window, self.kind = heads, frames, window, kind
        rows = (2 * frames - 1) * (2 * window - 1) ** 2
        self.bias_table = nn.Parameter(torch.empty(rows, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def bias(self, group: Group, relative: Tensor, dtype: torch.dtype) -> Tensor:
        """Additive bias of a window shape, (1, A, N, N).

        In the table's own type in training; in inference in `dtype`, and kept for the next call.
        """
        table, shape = self.bias_table, (1, self.heads, group.tokens, group.tokens)

        def gather() -> Tensor:
            return table.t().index_select(1, relative).view(shape)

        key = (group.tokens, group.height, group.width, dtype)
        kept = self.folded(key, (table,), lambda: gather().to(dtype))
        return gather() if kept is None else kept

    def forward(self, x: Tensor, layout: Layout, keep: slice | None = None) -> Tensor:
        """(T, C) tokens in window order -> (T, C), or those of the frames `keep` only."""
        qkv, groups = linear(self.qkv, x), layout.groups
        biases = [
            self.bias(group, relative, qkv.dtype)
            for group, relative in zip(groups, layout.relative, strict=True)
        ]
        rows = [group.rows(keep) for group in groups] if keep else None
        counts = [group.count for group in groups]
        return linear(self.proj, window_attention(qkv, biases, counts, rows, self.kind))


class SwinBlock(nn.Module):
    """LayerNorm, window attention, LayerNorm, MLP, each branch with a residual."""

    def __init__(
        self,
        dim: int,
        heads: int,
        frames: int,
        window: int,
        mlp_ratio: float,
        drop_path: float,
        attention: Kind = "auto",
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, frames, window, attention)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop_path = DropPath(drop_path)
        self.add_norm = add_norm  # factory.execution may put a compiled one here
        self.recompute: Recompute = "none"

    def forward(
        self, x: Tensor, branch: Tensor | None, step: Step, keep: slice | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (T, C) and the branch before, still to be added to them (None: nothing is) ->
        the same of this block, in its own token order; of the frames `keep` only, where given."""
        layout, sample = step.layout, step.layout.sample
        if self.fits_own_kernels(x, branch):
            return self._forward_by_windows(x, step, keep), None
        x, y = self.add_norm(x, branch, self.norm1, step)
        if keep:
            x, sample = (keep_frames(t, layout.groups, keep) for t in (x, sample))
        y = self.drop_path(self.attn(y, layout, keep), sample, step.batch)
        x, y = self.add_norm(x, y, self.norm2)
        if self.recompute == "mlp" and torch.is_grad_enabled():
            y = checkpoint(self._mlp, y, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self._mlp(y)
        return x, self.drop_path(y, sample, step.batch)

    def _mlp(self, y: Tensor) -> Tensor:
        return linear(self.fc2, F.gelu(linear(self.fc1, y)))

    def fits_own_kernels(self, x: Tensor, branch: Tensor | None) -> bool:
        """Whether this block runs in our CPU kernels, which recompute for themselves."""
        return (
            branch is None
            and self._compiled_call_impl is None
            and self.attn.kind == "auto"
            and kernels.fit(x, x.shape[1] // self.attn.heads)
            and x.dtype == self.fc1.weight.dtype == torch.float32
            and autocast_to_bf16_on_cpu()
            and self.fc1.out_features % 16 == 0
        )

    def _forward_by_windows(self, x: Tensor, step: Step, keep: slice | None) -> Tensor:
        """The same, a window at a time in the cache."""
        layout, attn = step.layout, self.attn
        layers = (self.norm1, attn.qkv, attn.proj, self.norm2, self.fc1, self.fc2)
        rows = [group.rows(keep) if keep else slice(0, group.tokens) for group in layout.groups]
        return kernels.swin_block(
            x,
            step.there,
            layout.valid,
            drops=[self.drop_path.factor(layout.sample, step.batch) for _ in range(2)],
            parameters=[p for layer in layers for p in (layer.weight, layer.bias)],
            eps=(self.norm1.eps, self.norm2.eps),
            biases=[
                attn.bias(group, relative, torch.float32)
                for group, relative in zip(layout.groups, layout.relative, strict=True)
            ],
            counts=[group.count for group in layout.groups],
            rows=rows,
            recompute=self.recompute,
        )


def keep_frames(x: Tensor, groups: tuple[Group, ...], frames: slice) -> Tensor:
    """The tokens of these frames: (T, ...) -> (fewer, ...), in the order of their own grid."""
    parts = x.split([group.count * group.tokens for group in groups])
    return torch.cat(
        [
            part.unflatten(0, (-1, group.tokens))[:, group.rows(frames)].flatten(0, 1)
            for part, group in zip(parts, groups, strict=True)
        ]
    )


class SwinStage(nn.Module):
    """Blocks with and without shift in turn, then a 3x3 convolution, around them a residual."""

    def __init__(self, blocks: Iterable[SwinBlock], dim: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(blocks)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, image: Tensor, keep: slice | None = None) -> Tensor:
        """(B, D, h, w, C) -> the same, or for the last stage the frames `keep` of it.

        The last stage's convolution runs in float32 (see `SwinXVR.forward`).
        """
        batch, frames, height, width = image.shape[:4]
        g = grid(batch, frames, height, width, self.window, image.device)
        x, branch = image.flatten(0, 3), None
        for i, block in enumerate(cast("Iterable[SwinBlock]", self.blocks)):
            step = g.first if i == 0 else g.to_shifted if i % 2 else g.to_plain
            # The last block of the last stage lets only those frames ask that are kept.
            last = i == len(self.blocks) - 1
            inputs = x, branch, step, keep if last else None
            again = block.recompute == "blocks" and torch.is_grad_enabled()
            if again and not block.fits_own_kernels(x, branch):
                x, branch = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, branch = block(*inputs)
        if keep:
            g = grid(batch, keep.stop - keep.start, height, width, self.window, image.device)
            image = image[:, keep]
        layout = (g.plain, g.shifted)[(len(self.blocks) - 1) % 2]
        x = x if branch is None else x + branch
        x = _Gather.apply(x, layout.to_image, layout.from_image, layout.valid)
        x = x.view(image.shape)
        with torch.autocast(x.device.type, enabled=False) if keep else nullcontext():
            return conv2d(self.conv, x) + image


def conv2d(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 2-D convolution to each frame of (B, D, h, w, C), channels last in and out."""
    batch, frames = x.shape[:2]
    y = conv(x.flatten(0, 1).permute(0, 3, 1, 2))  # channels_last without a copy
    return y.permute(0, 2, 3, 1).unflatten(0, (batch, frames))
