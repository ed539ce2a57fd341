"""Our own kernels (cpu/, built by setup.py) for CPUs that multiply bf16 themselves."""

from __future__ import annotations

import importlib.util
import platform
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices itself (AVX-512 BF16, with or without AMX)."""
    if not torch.backends.mkldnn.is_available():
        return False
    if _is_x86():  # oneDNN takes bf16 on any AVX-512, and emulates
        asks = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        if asks is not None and not asks():
            return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def available() -> bool:
    """Load the kernels, if they were built and this CPU can run them."""
    if not (_is_x86() and cpu_has_bf16()):
        return False
    built = importlib.util.find_spec("hpc_xvr.model._kernels")
    if built is None or built.origin is None:
        return False
    try:
        torch.ops.load_library(built.origin)
    except OSError as error:  # built for another torch
        warnings.warn(
            f"{built.origin} does not fit torch {torch.__version__} ({error.__cause__}); install "
            "hpc_xvr again (bash jobs/setup.sh). Blocks use torch's kernels, about half as fast "
            "on this CPU.",
            stacklevel=2,
        )
        return False
    return True


def fit(x: torch.Tensor, channels: int) -> bool:
    """Whether the kernels can process x now, in heads of so many channels."""
    return (
        x.device.type == "cpu"
        and channels % 16 == 0
        and bool(torch.backends.mkldnn.enabled)
        and not torch.compiler.is_compiling()
        and available()
    )


def swin_block(
    x: Tensor,
    there: Tensor,
    valid: Tensor | None,
    *,
    drops: list[Tensor | None],
    parameters: list[Tensor],
    eps: tuple[float, float],
    biases: list[Tensor],
    counts: list[int],
    rows: list[slice],
    recompute: str,
) -> Tensor:
    """A whole block on T tokens in window order, differentiable, its products in bf16.

    Args:
        x: residual stream (any rows, C) float32.
        there: (T,) row of x of each token.
        valid: (T, 1), 0 for padding; None where there is none.
        drops: factors (T,) of the attention and of the MLP branch; None for 1.
        parameters: weight and bias of norm1, qkv, proj, norm2, fc1, fc2, float32.
        eps: of the two norms.
        biases, counts, rows: per group of windows the position bias (1, A, N, N), how many there
            are, and which of a window's tokens are queries and come out.
        recompute: what the backward pass computes again: "none", "mlp" or "blocks".

    Returns:
        (query tokens, C) float32.
    """
    save = ("blocks", "mlp", "none").index(recompute) if torch.is_grad_enabled() else 0
    windows = (list(counts), [r.start for r in rows], [r.stop for r in rows])
    x, *parameters = (t.contiguous() for t in (x, *parameters))
    return _SwinBlock.apply(x, there, valid, drops, eps, windows, save, *parameters, *biases)


class _SwinBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        there: Tensor,
        valid: Tensor | None,
        drops: list[Tensor | None],
        eps: tuple[float, float],
        windows: tuple[list[int], list[int], list[int]],
        save: int,
        *rest: Tensor,
    ) -> Tensor:
        parameters, biases = rest[:12], rest[12:]
        out, saved = torch.ops.hpc_xvr.swin_block(
            x, there, valid, *drops, parameters, *eps, biases, *windows, save
        )
        ctx.save_for_backward(x, there, valid, *drops, *saved, *rest)
        ctx.eps, ctx.windows = eps, windows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, there, valid, drop1, drop2, *rest = ctx.saved_tensors
        saved, parameters, biases = rest[:4], rest[4:16], rest[16:]
        grad_x, grad_parameters, grad_biases = torch.ops.hpc_xvr.swin_block_backward(
            *(grad.float().contiguous(), x, there, valid, drop1, drop2, parameters),
            *(*ctx.eps, biases, *ctx.windows, saved),
        )
        return (grad_x, *(None,) * 6, *grad_parameters, *grad_biases)


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")
