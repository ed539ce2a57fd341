"""Scaled dot-product attention with a learned additive bias, fused wherever torch can.

Shapes: n windows of N tokens, A heads, c channels a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c) + bias) v for (n, A, N, c) and bias (1, A, N, N)."""
    bias = bias.to(q.dtype)
    if q.device.type == "cpu" and torch.is_grad_enabled() and bias.requires_grad:
        return _FusedOnCPU.apply(q, k, v, bias)
    if q.device.type == "cuda":
        # cuDNN's kernel, torch's first choice on Hopper, has given NaN gradients for masks with
        # token counts such as 320; the flash kernel takes no mask at all.
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class _FusedOnCPU(torch.autograd.Function):
    """torch's fused CPU kernel has no gradient for the bias, so it is not chosen where one is
    needed. Here it runs forward, and the backward pass computes the weights a second time."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.detach())
        ctx.save_for_backward(q, k, v, bias, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, bias, out = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        grad = grad.to(q.dtype)
        scaled = q * scale
        weights = (scaled @ k.transpose(-1, -2)).add_(bias).softmax(-1)  # n, A, N, N
        grad_v = weights.transpose(-1, -2) @ grad
        delta = (grad * out).sum(-1, keepdim=True)
        inner = (grad @ v.transpose(-1, -2)).sub_(delta).mul_(weights)  # gradient of the logits
        grad_q = (inner @ k).mul_(scale)
        grad_k = inner.transpose(-1, -2) @ scaled
        wide = torch.float32 if inner.dtype == torch.bfloat16 else inner.dtype
        grad_bias = inner.sum(0, keepdim=True, dtype=wide).to(bias.dtype)
        return grad_q, grad_k, grad_v, grad_bias
