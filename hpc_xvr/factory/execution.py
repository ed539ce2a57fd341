"""How a model is run: threads, precision, compilation, recomputation; what this machine can do."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from hpc_xvr.config import Config
from hpc_xvr.distributed.launch import rank_threads
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger
from hpc_xvr.model.attention import Kind
from hpc_xvr.model.kernels import cpu_has_bf16
from hpc_xvr.model.swin import Recompute, SwinBlock, WindowAttention, add_norm

Precision = Literal["auto", "float32", "bf16", "float64"]
Compile = Literal["none", "parts", "blocks"]
T = TypeVar("T")


def use_threads(wish: int | None = None) -> int:
    """Give torch the CPU threads of this rank, and return how many (see `rank_threads`).

    Args:
        wish: config key run.threads.

    Raises:
        InputError: OMP_NUM_THREADS is not a positive number.
    """
    threads = rank_threads(wish)
    torch.set_num_threads(threads)
    return threads


def resolve_precision(precision: Precision, device: torch.device) -> str:
    """The precision to run in: `auto` is bf16 where the device multiplies it itself.

    Raises:
        InputError: bf16 on a device that would only emulate it.
    """
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(device)
    else:
        able, name = cpu_has_bf16(), "this CPU"
    if precision == "bf16" and not able:
        raise InputError(
            f"train.precision bf16: {name} has no bf16 arithmetic; set it to float32, or to auto"
        )
    if precision == "auto":
        return "bf16" if able else "float32"
    return precision


def compile_model(model: nn.Module, kind: Compile, device: torch.device) -> None:
    """Compile parts of a model in place with torch.compile.

    parts: only the kernels that close a residual branch and normalise; the least to compile, and
    fastest on CPUs. blocks: each transformer block; all blocks share a few compiled forms.

    Raises:
        InputError: a model without such blocks, or no compiler on this machine.
    """
    if kind == "none":
        return
    blocks = [module for module in model.modules() if isinstance(module, SwinBlock)]
    if not blocks:
        raise InputError(
            f"train.compile {kind}: only swin_xvr and "
            "key_propagation can be compiled; set it to none"
        )
    _check_compiler(f"train.compile {kind}", "set it to none", device)
    allow_many_forms()
    compiled = torch.compile(add_norm) if kind == "parts" else None
    for block in blocks:
        if compiled:
            block.add_norm = compiled
        else:
            block.compile()


def allow_many_forms() -> None:
    """Let torch.compile make a form for every shape of window, in training and inference, and keep
    DistributedDataParallel from cutting what is compiled into its buckets."""
    torch._dynamo.config.cache_size_limit = 64
    torch._dynamo.config.optimize_ddp = False


def recompute_activations(model: nn.Module, kind: Recompute) -> None:
    """Keep fewer activations for the backward pass and compute them a second time there.

    mlp: those of the MLPs, a sixth of the memory. blocks: all but the residual stream, half of
    it (benchmarks/NOTES.md).

    Raises:
        InputError: a model without transformer blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, SwinBlock)]
    if kind != "none" and not blocks:
        raise InputError(
            f"train.recompute {kind}: only swin_xvr and key_propagation have it; set it to none"
        )
    for block in blocks:
        block.recompute = kind


def check_attention(kind: str, device: torch.device, training: bool) -> None:
    """Refuse a kind of attention that cannot work here.

    Raises:
        InputError: FlexAttention without a compiler, or in training on a CPU.
    """
    if kind != "flex":
        return
    if training and device.type == "cpu":
        raise InputError(
            "model.attention flex: FlexAttention has no backward pass on CPUs; set it to auto"
        )
    _check_compiler("model.attention flex", "set it to auto", device)
    allow_many_forms()


def set_attention(model: nn.Module, kind: Kind) -> None:
    """Choose how a model computes attention."""
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.kind = kind


def _check_compiler(setting: str, otherwise: str, device: torch.device) -> None:
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise InputError(f"{setting}: needs Triton on GPUs; pip install triton, or {otherwise}")
        if not any(shutil.which(c) for c in (os.environ.get("CC", ""), "gcc", "clang", "cc")):
            raise InputError(
                f"{setting}: Triton found no C compiler; install gcc or load your site's compiler "
                f"module, or {otherwise}"
            )
        return
    where = Path(torch.__file__).parent
    if len(str(where).split()) > 1:
        raise InputError(
            f"{setting}: PyTorch does not compile where its own folder has a space in its name, "
            f"as {where} has; install into another, or {otherwise}"
        )
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise InputError(
            f"{setting}: found no C++ compiler; install g++ or load your site's compiler module, "
            f"set CXX to it, or {otherwise}"
        ) from None


def prepare(model: nn.Module, config: Config, device: torch.device, training: bool = False) -> str:
    """Move a model to `device`, set up as the config says; returns the precision to run it in.

    A run may be used on another machine than it was trained on: where that one cannot do what the
    config says, inference goes on without it, with a warning.

    Raises:
        InputError: in training, settings that this device, model or machine cannot do.
    """
    train = config.train

    def attempt(action: Callable[[], T], otherwise: Callable[[], T]) -> T:
        try:
            return action()
        except InputError as problem:
            if training:
                raise
            logger.warning("%s (going on without it)", str(problem).split(";")[0])
            return otherwise()

    precision = attempt(lambda: resolve_precision(train.precision, device), lambda: "float32")
    attempt(
        lambda: check_attention(config.model.attention, device, training),
        lambda: set_attention(model, "auto"),
    )
    torch.set_float32_matmul_precision("high" if train.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = train.tf32
    if training:
        recompute_activations(model, train.recompute)
    attempt(lambda: compile_model(model, train.compile, device), lambda: None)
    model.to(device, torch.float64 if precision == "float64" else torch.float32)
    return precision
