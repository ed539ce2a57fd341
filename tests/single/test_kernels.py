"""Our own CPU kernels compute what the readable formulas do, and are there where they can be."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from hpc_xvr.model import attention, kernels
from hpc_xvr.model.swin import SwinBlock
from hpc_xvr.model.xvr import SwinXVR

needs_kernels = pytest.mark.skipif(
    not kernels.cpu_has_bf16() or platform.machine() not in ("x86_64", "AMD64"),
    reason="needs an x86-64 CPU with bf16 arithmetic (AVX-512 BF16)",
)


def distance(ours, exact):
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@needs_kernels
def test_the_kernels_were_built():
    assert kernels.available(), "bash jobs/setup.sh builds hpc_xvr/model/kernels.cpp"


@needs_kernels
@pytest.mark.parametrize(
    "heads, channels, groups",  # a group: windows, tokens, those that ask
    [
        (3, 64, [(4, 320, slice(0, 320)), (2, 160, slice(0, 160)), (1, 80, slice(0, 80))]),
        (2, 16, [(3, 45, slice(9, 18))]),
        (1, 32, [(5, 20, slice(4, 8)), (2, 5, slice(0, 5))]),
        (3, 64, [(4, 320, slice(64, 128))]),
    ],
)
def test_attention_and_its_gradients(heads, channels, groups):
    g = torch.Generator().manual_seed(0)
    counts, sizes, rows = zip(*groups, strict=True)
    tokens = sum(n * size for n, size in zip(counts, sizes, strict=True))
    qkv = torch.randn(tokens, 3 * heads * channels, generator=g).bfloat16()
    biases = [torch.randn(1, heads, n, n, generator=g).bfloat16() for n in sizes]
    asking = sum(n * (r.stop - r.start) for n, r in zip(counts, rows, strict=True))
    probe = torch.randn(asking, heads * channels, generator=g).bfloat16()

    def run(kind, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (qkv, *biases)]
        out = attention.window_attention(leaves[0], leaves[1:], list(counts), list(rows), kind)
        return [out.detach(), *torch.autograd.grad(out, leaves, probe.to(out.dtype))]

    exact = run("explicit", torch.float64)
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for ours, reference in zip(run("auto", torch.bfloat16), exact, strict=True):
                assert distance(ours, reference) < 4e-3
        finally:
            torch.set_num_threads(before)


@needs_kernels
def test_rows_need_not_lie_one_after_the_other():
    qkv = torch.randn(96, 32).bfloat16().t()  # 32 tokens, a column each
    bias = torch.randn(1, 2, 32, 32)
    exact = attention.window_attention(qkv.double(), [bias.double()], [1], kind="explicit")
    assert distance(attention.window_attention(qkv, [bias], [1]), exact) < 4e-3


@needs_kernels
def test_large_logits_neither_overflow_nor_vanish():
    qkv = torch.zeros(32, 3 * 16, dtype=torch.bfloat16)
    qkv[:, :32] = 1e4  # every logit 4e8
    qkv[:, 32:] = torch.arange(32)[:, None]
    out = attention.window_attention(qkv, [torch.zeros(1, 1, 32, 32)], [1])
    torch.testing.assert_close(out, torch.full_like(out, 15.5))


@needs_kernels
def test_a_number_that_is_none_comes_out_again():
    """Training stops on NaN; a softmax that swallowed one would hide it."""
    qkv = torch.randn(64, 3 * 16).bfloat16()
    qkv[3, 5] = float("nan")  # a query of the first of two windows
    leaf = qkv.clone().requires_grad_()
    out = attention.window_attention(leaf, [torch.zeros(1, 1, 32, 32)], [2])
    assert out[3].isnan().all() and out[:3].isfinite().all() and out[4:].isfinite().all()
    out.sum().backward()
    assert leaf.grad[:32].isnan().any() and leaf.grad[32:].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("size", [(16, 24), (13, 9)])  # the second needs padding
def test_a_model_of_whole_blocks_is_the_same_model(size, monkeypatch):
    torch.manual_seed(0)
    model = SwinXVR(embed_dim=48, depths=(2, 2), heads=3, window=4, up_features=16).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    lr, hr = torch.rand(2, 3, 1, *size), torch.rand(2, 2, 1, *(4 * n for n in size))
    used = []
    whole = SwinBlock._forward_by_windows
    monkeypatch.setattr(SwinBlock, "_forward_by_windows", lambda *a: used.append(1) or whole(*a))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        ours = model(lr, hr)
        assert len(used) == 4
        monkeypatch.setattr(kernels, "available", lambda: False)
        torchs = model(lr, hr)
        assert len(used) == 4
    with torch.inference_mode():
        exact = model(lr, hr)
    assert distance(ours, exact) < 1.1 * distance(torchs, exact) + 1e-4


def test_without_the_kernels_a_model_runs_and_says_nothing():
    """A checkout that was never built, or a CPU without bf16: torch's kernels, no warning."""
    program = (
        "import importlib.util, torch\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n: None if n.endswith('_kernels') else find(n)\n"
        "from hpc_xvr.model import attention, kernels\n"
        "assert not kernels.available()\n"
        "x = torch.randn(32, 96).bfloat16()\n"
        "print(attention.window_attention(x, [torch.zeros(1, 2, 32, 32)], [1]).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0 and "[32, 32]" in done.stdout, done.stderr


@needs_kernels
def test_kernels_built_for_another_torch_are_left_alone_with_a_warning(tmp_path):
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(b"not a library")
    program = (
        "import importlib.util, types\n"
        "find = importlib.util.find_spec\n"
        f"spec = types.SimpleNamespace(origin={os.fspath(broken)!r})\n"
        "importlib.util.find_spec = lambda n: spec if n.endswith('_kernels') else find(n)\n"
        "from hpc_xvr.model import kernels\n"
        "print(kernels.available())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False" and "bash jobs/setup.sh" in done.stderr, done.stderr
