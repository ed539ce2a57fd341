"""Our own kernels (kernels.cpp, built by setup.py) for CPUs that multiply bf16 themselves."""

from __future__ import annotations

import importlib.util
import platform
import warnings
from functools import cache

import torch


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
            "hpc_xvr again (bash jobs/setup.sh). Attention takes torch's kernels, about half as "
            "fast on this CPU.",
            stacklevel=2,
        )
        return False
    return True


def fit(x: torch.Tensor, channels: int) -> bool:
    """Whether the kernels can take x here and now, in heads of so many channels."""
    return (
        x.device.type == "cpu"
        and channels % 16 == 0
        and not torch.compiler.is_compiling()
        and available()
    )


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")
