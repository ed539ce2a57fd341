"""Linear layers, and convolutions of one channel, at the speed the CPU's matrix unit allows.

Shapes: T tokens, C channels in, K channels out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hpc_xvr.model.kernels import cpu_has_bf16


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x) for (T, C) -> (T, K), in the autocast type where autocast is on."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and autocast_to_bf16_on_cpu():
        return _LinearOnCPU.apply(x.to(torch.bfloat16), layer.weight, layer.bias)
    return layer(x)


def to_matmul_type(x: Tensor) -> Tensor:
    """Cast to the type in which matrix products run: autocast's, where it is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def conv_of_one_channel(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 3x3 convolution of (B, 1, h, w) -> (B, K, h, w), channels_last out.

    On CPUs as a product with the nine shifted pictures: a channels_last bf16 convolution of one
    channel takes 20 times as long there.
    """
    if x.device.type != "cpu":
        return conv(x).contiguous(memory_format=torch.channels_last)
    batch, _, h, w = x.shape
    around = F.pad(x[:, 0], (1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)  # B, h, w, 3, 3
    columns = around.reshape(batch * h * w, 9)
    y = F.linear(columns, conv.weight.flatten(1), conv.bias)
    return y.view(batch, h, w, -1).permute(0, 3, 1, 2)


def autocast_to_bf16_on_cpu() -> bool:
    """Whether matrix products on CPUs run in bf16 now, which this CPU computes itself."""
    autocast = torch.is_autocast_enabled("cpu")
    return autocast and torch.get_autocast_dtype("cpu") == torch.bfloat16 and cpu_has_bf16()


class _LinearOnCPU(torch.autograd.Function):
    """oneDNN's matrix product with the bias in its epilogue; torch's own path first writes the
    bias to every row of the result and then reads it all back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias.to(x.dtype), "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        # In four parts and rows of 64, where they fit: oneDNN's product with a transposed left
        # side is a quarter faster on shorter columns, and a bf16 sum is vectorised along rows.
        parts = 4 if len(x) % 4 == 0 else 1
        rows = 64 if len(x) % 64 == 0 else 1
        tall, wide = (t.unflatten(0, (parts, -1)) for t in (grad, x))
        grad_weight = (tall.transpose(1, 2) @ wide).sum(0, dtype=torch.float32)
        grad_bias = grad.unflatten(0, (-1, rows)).sum(1).sum(0, dtype=torch.float32)
        return grad @ weight, grad_weight, grad_bias
