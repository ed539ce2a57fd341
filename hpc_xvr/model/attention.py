"""Scaled dot-product attention with a learned additive bias, fused.

Shapes: T tokens in window order, groups of n windows of N tokens, A heads, c channels a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

Kind = Literal["auto", "fused", "flex", "explicit"]

# cuDNN's kernel, torch's first choice on Hopper, has given NaN gradients for masks with token
# counts such as 320; the flash kernel takes no mask at all.
_ON_GPU = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def window_attention(
    qkv: Tensor,
    biases: list[Tensor],
    counts: list[int],
    rows: list[slice] | None = None,
    kind: Kind = "auto",
) -> Tensor:
    """Attention within windows: (T, 3*A*c) -> (T, A*c).

    Group i is `counts[i]` windows of N tokens with the bias `biases[i]`, (1, A, N, N). With `rows`,
    only the tokens `rows[i]` of each window are queries (all are keys) and come out.
    """
    windows = Windows(
        [(n, bias.shape[2], 3, bias.shape[1]) for n, bias in zip(counts, biases, strict=True)],
        rows or [slice(0, bias.shape[2]) for bias in biases],
    )
    fused = kind in ("auto", "fused")
    if fused and qkv.device.type == "cpu" and torch.is_grad_enabled() and biases[0].requires_grad:
        return _FusedOnCPU.apply(qkv, windows, *biases)
    attend = _fused if fused else _flex if kind == "flex" else _explicit
    mixed = []
    for (q, k, v), bias, asking in zip(windows.qkv(qkv), biases, windows.rows, strict=True):
        # FlexAttention adds up the bias' gradient over all windows in the bias' own type.
        mask = bias[:, :, asking] if kind == "flex" else bias[:, :, asking].to(q.dtype)
        y = attend(q[:, :, asking], k, v, mask)
        mixed.append(y.transpose(1, 2).flatten(0, 1).flatten(1))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


@dataclass(frozen=True)
class Windows:
    """How the rows of a token tensor fall into windows: per group (n, N, 3, A), and the queries."""

    shapes: list[tuple[int, int, int, int]]
    rows: list[slice]

    def qkv(self, qkv: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Views (n, A, N, c) of queries, keys and values, for each group."""
        parts = qkv.split([n * tokens for n, tokens, _, _ in self.shapes])
        for part, shape in zip(parts, self.shapes, strict=True):
            yield part.view(*shape, -1).permute(2, 0, 3, 1, 4).unbind(0)

    @property
    def asking(self) -> list[int]:
        """Tokens of each group that come out."""
        return [
            shape[0] * (rows.stop - rows.start)
            for shape, rows in zip(self.shapes, self.rows, strict=True)
        ]

    def out(self, y: Tensor) -> Iterator[Tensor]:
        """Views (n, A, asking tokens, c) of the output, for each group."""
        for part, (n, _, _, heads) in zip(y.split(self.asking), self.shapes, strict=True):
            yield part.view(n, len(part) // n, heads, -1).transpose(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    if q.device.type == "cuda":
        with sdpa_kernel(_ON_GPU):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + bias
    return logits.softmax(-1).to(v.dtype) @ v


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    bias = bias[0]

    def add_bias(score: Tensor, n: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return score + bias[head, row, column]

    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, score_mod=add_bias)
    return _compiled_flex()(q, k, v, score_mod=add_bias)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """Compiled on first use; not compiled it would build the whole matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


class _FusedOnCPU(torch.autograd.Function):
    """torch's fused CPU kernel has no gradient for the bias, so it is not chosen where one is
    needed. Here it runs forward, and the backward pass computes the weights a second time."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, windows: Windows, *biases: Tensor) -> Tensor:
        out = qkv.new_empty(sum(windows.asking), qkv.shape[1] // 3)
        for (q, k, v), y, bias, rows in zip(
            windows.qkv(qkv), windows.out(out), biases, windows.rows, strict=True
        ):
            mask = bias.detach()[:, :, rows].to(q.dtype)
            y.copy_(F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=mask))
        ctx.save_for_backward(qkv, *biases)
        ctx.windows = windows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        windows: Windows = ctx.windows
        qkv, *biases = ctx.saved_tensors
        grad_qkv, grad_biases = torch.zeros_like(qkv), []
        for (q, k, v), g, (grad_q, grad_k, grad_v), bias, rows in zip(
            windows.qkv(qkv),
            windows.out(grad.to(qkv.dtype)),
            windows.qkv(grad_qkv),
            biases,
            windows.rows,
            strict=True,
        ):
            grad_bias = torch.zeros_like(bias[0])
            mask = bias[:, :, rows].to(qkv.dtype)
            scale = q.shape[-1] ** -0.5
            for start in range(0, len(q), _CHUNK):
                i = slice(start, start + _CHUNK)
                qi, ki, vi, gi = (t.contiguous() for t in (q[i, :, rows], k[i], v[i], g[i]))
                qi = qi * scale
                weights = (qi @ ki.transpose(-1, -2)).add_(mask).softmax(-1)  # n, A, rows, N
                grad_v[i] = weights.transpose(-1, -2) @ gi
                inner = gi @ vi.transpose(-1, -2)
                inner = torch._softmax_backward_data(inner, weights, -1, weights.dtype)
                grad_q[i, :, rows] = (inner @ ki).mul_(scale)
                grad_k[i] = inner.transpose(-1, -2) @ qi
                grad_bias[:, rows] += inner.sum(0)
            grad_biases.append(grad_bias[None])
        return grad_qkv, None, *grad_biases


_CHUNK = 48  # windows whose weights the backward pass holds at a time
