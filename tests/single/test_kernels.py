"""Our own CPU kernels compute what the readable formulas do, and are there where they can be."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from hpc_xvr.model import kernels
from hpc_xvr.model.swin import SwinBlock, grid, keep_frames
from hpc_xvr.model.xvr import SwinXVR

needs_kernels = pytest.mark.skipif(
    not kernels.cpu_has_bf16() or platform.machine() not in ("x86_64", "AMD64"),
    reason="needs an x86-64 CPU with bf16 arithmetic (AVX-512 BF16)",
)


def distance(ours, exact):
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@needs_kernels
def test_the_kernels_were_built():
    assert kernels.available(), "bash jobs/setup.sh builds hpc_xvr/model/cpu"


def block_of(dim=48, heads=3, ratio=2.0, frames=5, window=4, drop=0.0):
    torch.manual_seed(0)
    block = SwinBlock(dim, heads, frames, window, ratio, drop)
    for p in block.parameters():
        nn.init.normal_(p, std=0.1)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
    return block


def run(block, x, step, keep=None, exact=False):
    """The block's output and the gradients of x and of its parameters, padding left out; `exact`:
    by the readable formulas in float64."""
    block = block.double() if exact else block.float()
    block.attn.kind = "explicit" if exact else "auto"
    x = x.to(block.fc1.weight.dtype).requires_grad_()
    torch.manual_seed(7)  # stochastic depth drops the same
    with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
        out, branch = block(x, None, step, keep)
    assert exact or branch is None, "the kernels were not used"
    out = out if branch is None else out + branch
    if step.layout.valid is not None:
        valid = step.layout.valid
        valid = valid if keep is None else keep_frames(valid, step.layout.groups, keep)
        out = out * valid.to(out.dtype)
    g = torch.Generator().manual_seed(3)
    probe = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * probe).sum(), [x, *block.parameters()])]


@needs_kernels
@pytest.mark.parametrize(
    "options, batch, size, name, keep",
    [
        ({"dim": 192, "window": 8}, 2, (16, 16), "to_plain", None),
        ({"dim": 192, "window": 8, "drop": 0.5}, 2, (16, 24), "to_shifted", None),
        ({}, 1, (13, 9), "first", None),  # with padding
        ({"drop": 0.4}, 2, (13, 9), "to_shifted", None),
        ({"heads": 1, "ratio": 1.0, "window": 3, "frames": 3}, 3, (7, 5), "to_shifted", None),
        ({"dim": 192, "window": 8}, 1, (16, 16), "to_shifted", slice(2, 3)),  # one frame asks
        ({"window": 5}, 1, (9, 11), "to_plain", slice(0, 3)),
    ],
)
def test_a_block_and_its_gradients(options, batch, size, name, keep):
    block = block_of(**options)
    frames = block.attn.frames
    layout = grid(batch, frames, *size, block.attn.window, torch.device("cpu"))
    step = getattr(layout, name)
    rows = batch * frames * size[0] * size[1] if name == "first" else len(step.there)
    x = torch.randn(rows, block.norm1.normalized_shape[0], generator=torch.Generator())
    exact = run(block, x, step, keep, exact=True)
    names = ["out", "x", *(name for name, _ in block.named_parameters())]
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            ours = run(block, x, step, keep)
            for label, a, b in zip(names, ours, exact, strict=True):
                assert a.dtype == torch.float32, label
                assert distance(a, b) < (6e-3 if label == "out" else 1.5e-2), label
            for recompute in ("mlp", "blocks"):
                block.recompute = recompute
                again = run(block, x, step, keep)
                assert all(map(torch.equal, again, ours)), recompute
        finally:
            block.recompute = "none"
            torch.set_num_threads(before)


@needs_kernels
def test_rows_need_not_lie_one_after_the_other():
    block, step = block_of(), grid(1, 5, 8, 8, 4, torch.device("cpu")).to_plain
    x = torch.randn(48, len(step.there)).t()
    assert all(map(torch.equal, run(block, x, step), run(block, x.contiguous(), step)))


@needs_kernels
def test_parameters_need_not_be_contiguous():
    block, step = block_of(), grid(1, 5, 8, 8, 4, torch.device("cpu")).to_plain
    x = torch.randn(len(step.there), 48)
    ours = run(block, x, step)
    wide = torch.zeros(96)
    wide[::2] = block.norm1.weight.detach()
    block.norm1.weight = nn.Parameter(wide[::2])
    assert all(map(torch.equal, run(block, x, step), ours))


@needs_kernels
@pytest.mark.parametrize("seed", range(4))
def test_every_combination_of_dropped_branches(seed):
    block = block_of(drop=0.5)
    step = grid(2, 5, 8, 8, 4, torch.device("cpu")).to_shifted
    factors = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 0.0], [2.0, 2.0]])[seed]
    kept = iter([factors, factors.flip(0)] * 2)
    block.drop_path.factor = lambda sample, batch: next(kept)[sample]
    x = torch.randn(len(step.there), 48)
    for a, b in zip(run(block, x, step), run(block, x, step, exact=True), strict=True):
        assert distance(a, b) < 1.5e-2 or float(a.abs().max()) == float(b.abs().max()) == 0


@needs_kernels
def test_compiled_blocks_do_without_so_that_they_are_recomputed():
    block, x = block_of(), torch.randn(160, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert block.fits_own_kernels(x, None) and not block.fits_own_kernels(x, x)
        block.compile()
        assert not block.fits_own_kernels(x, None)


@needs_kernels
def test_windows_that_do_not_fit_the_tokens_are_refused():
    block, step = block_of(), grid(1, 5, 8, 8, 4, torch.device("cpu")).to_plain
    block.attn.bias = lambda group, relative, dtype: torch.zeros(1, 3, 96, 96)
    with pytest.raises(RuntimeError, match="windows of 96 tokens"):
        run(block, torch.randn(len(step.there), 48), step)


@needs_kernels
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_neither_overflow_nor_vanish(sign):
    block, step = block_of(), grid(1, 5, 8, 8, 4, torch.device("cpu")).to_plain
    with torch.no_grad():
        block.attn.qkv.weight[:96] = 0
        block.attn.qkv.bias[:48] = 1e4
        block.attn.qkv.bias[48:96] = sign * 1e4  # every logit 4e8
    x = torch.randn(len(step.there), 48)
    assert distance(run(block, x, step)[0], run(block, x, step, exact=True)[0]) < 1e-2


@needs_kernels
def test_a_number_that_is_none_comes_out_again():
    """Training stops on NaN; a softmax that swallowed one would hide it."""
    block, step = block_of(), grid(1, 5, 4, 8, 4, torch.device("cpu")).to_plain
    x = torch.randn(160, 48)  # two windows
    x[step.there[3], 5] = float("nan")
    out, grad_x, *_ = run(block, x, step)
    assert out[:80].isnan().any() and out[80:].isfinite().all()
    assert grad_x[step.there[:80]].isnan().any() and grad_x[step.there[80:]].isfinite().all()


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


@needs_kernels
@pytest.mark.parametrize("output", ["centre", "sequence"])
def test_the_published_model_in_bf16_is_within_half_a_percent(output):
    torch.manual_seed(0)
    model = SwinXVR(output=output).eval()
    for stage in model.stages:
        for block in stage.blocks:
            nn.init.normal_(block.attn.bias_table, std=0.5)
    lr, hr = torch.rand(1, 3, 1, 16, 24), torch.rand(1, 2, 1, 64, 96)
    with torch.inference_mode():
        exact = model(lr, hr)
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(model(lr, hr), exact) < 5e-3


def test_without_the_kernels_a_model_runs_and_says_nothing():
    """A checkout that was never built, or a CPU without bf16: torch's kernels, no warning."""
    program = (
        "import importlib.util, torch\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n: None if n.endswith('_kernels') else find(n)\n"
        "from hpc_xvr.model import kernels\n"
        "from hpc_xvr.model.xvr import SwinXVR\n"
        "assert not kernels.available()\n"
        "model = SwinXVR(embed_dim=16, depths=(1, 1), heads=1, window=4, up_features=4)\n"
        "lr, hr = torch.rand(1, 3, 1, 8, 8), torch.rand(1, 2, 1, 32, 32)\n"
        "with torch.autocast('cpu', torch.bfloat16):\n"
        "    print(model(lr, hr).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0 and "32, 32]" in done.stdout, done.stderr


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
