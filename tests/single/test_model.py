"""SWIN-XVR against vectors of the authors' program, an explicit oracle, and its own promises."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hpc_xvr.checkpoint import read_tensors
from hpc_xvr.errors import InputError
from hpc_xvr.model.attention import window_attention
from hpc_xvr.model.bases import transfer_detail, transfer_matching_detail, upsample
from hpc_xvr.model.swin import WindowAttention, grid, relative_position
from hpc_xvr.model.xfusion import load_xfusion
from hpc_xvr.model.xvr import BAYES, SwinXVR

SMALL = dict(embed_dim=24, depths=(2, 2), heads=3, up_features=16, drop_path=0.0)
SWIN = ["centre", "sequence", "centre_small", "centre_padded", "sequence_small"]
EDVR = ["edvr", "edvr_stf", "edvr_small", "edvr_stf_small"]


def vectors(path):
    data = np.load(path)
    state = {name[6:]: data[name] for name in data if name.startswith("param/")}
    return state, data["lr"], data["hr"], data["out"]


def inputs(model, batch=1, h=16, w=16, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    s = model.scale
    return (
        torch.rand(batch, model.lr_frames, 1, h, w, generator=g, dtype=dtype),
        torch.rand(batch, 2, 1, s * h, s * w, generator=g, dtype=dtype),
    )


def test_published_configuration_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in SwinXVR().parameters()) == 10_009_033


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("name", [*SWIN, *EDVR])
def test_output_equals_the_authors_program(reference, name, dtype, tolerance):
    state, lr, hr, expected = vectors(reference(f"{name}.npz"))
    model = load_xfusion(state).to(dtype)
    with torch.no_grad():
        out = model(torch.as_tensor(lr, dtype=dtype), torch.as_tensor(hr, dtype=dtype))
    out = out[:, 0] if expected.ndim == 4 else out
    assert out.shape == expected.shape
    error = np.abs(out.double().numpy() - expected).max() / np.abs(expected).max()
    assert error < tolerance


def test_names_and_shapes_of_the_published_state_dict_are_understood(reference):
    lines = reference("published_state_dict.txt").read_text().splitlines()
    state = {}
    for line in lines:
        name, shape, kind = line.split("\t")
        size = [int(n) for n in shape.strip("(),").replace(",", " ").split()]
        state[name] = torch.zeros(size, dtype=getattr(torch, kind.removeprefix("torch.")))
    model = load_xfusion({"params_ema": state})
    assert sum(p.numel() for p in model.parameters()) == 10_009_033
    assert (model.lr_frames, model.window, model.scale, len(model.stages)) == (3, 8, 4, 4)


def test_load_xfusion_reads_wrapped_files_and_prefers_averaged_weights(reference, tmp_path):
    state, lr, hr, expected = vectors(reference("centre.npz"))
    tensors = {k: torch.as_tensor(v) for k, v in state.items()}
    wrong = {k: torch.zeros_like(v) for k, v in tensors.items()}
    torch.save({"params": wrong, "params_ema": tensors}, tmp_path / "net_g.pth")
    state = read_tensors(tmp_path / "net_g.pth")
    out = load_xfusion(state)(torch.as_tensor(lr), torch.as_tensor(hr))
    assert np.abs(out[:, 0].detach().numpy() - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"foo": torch.zeros(3)}, "weights"),
        ({"params": [1, 2]}, "map names to arrays"),
    ],
)
def test_load_xfusion_refuses_other_things_in_one_line(content, message):
    with pytest.raises(ValueError, match=message) as problem:
        load_xfusion(content)
    assert "\n" not in str(problem.value)


def test_load_xfusion_names_a_missing_file_and_a_missing_parameter(reference, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_tensors(tmp_path / "nothing.pth")
    (tmp_path / "noise.pth").write_bytes(b"no checkpoint at all")
    with pytest.raises(InputError, match="not readable as tensors"):
        read_tensors(tmp_path / "noise.pth")
    state = vectors(reference("centre.npz"))[0]
    del state["conv_last.bias"]
    with pytest.raises(ValueError, match=r"last_conv\.bias"):
        load_xfusion(state)


def explicit_attention(attention, x, frames, h, w, shift):
    """Window attention written out: roll, partition, explicit matrix with mask, roll back."""
    side, heads, dim = attention.window, attention.heads, x.shape[-1]
    hp, wp = -(-h // side) * side, -(-w // side) * side
    sy = side // 2 if shift and h > side else 0
    sx = side // 2 if shift and w > side else 0
    x = F.pad(x, (0, 0, 0, wp - w, 0, hp - h))
    region = torch.zeros(hp, wp)
    for i, rows in enumerate(
        (
            slice(0, hp - side),
            slice(hp - side, hp - sy or None),
            slice(hp - sy, hp) if sy else slice(0, 0),
        )
    ):
        for j, columns in enumerate(
            (
                slice(0, wp - side),
                slice(wp - side, wp - sx or None),
                slice(wp - sx, wp) if sx else slice(0, 0),
            )
        ):
            region[rows, columns] = 3 * i + j
    x = torch.roll(x, (-sy, -sx), (2, 3))

    def windows(y):  # (B, D, hp, wp, C) -> (B, windows, D*side*side, C)
        b, d = y.shape[:2]
        y = y.reshape(b, d, hp // side, side, wp // side, side, -1)
        return y.permute(0, 2, 4, 1, 3, 5, 6).reshape(b, -1, d * side * side, y.shape[-1])

    tokens = windows(x)
    zone = windows(region.expand(1, frames, hp, wp)[..., None])[0, :, :, 0]
    mask = torch.where(zone[:, :, None] == zone[:, None, :], 0.0, -math.inf)
    index = relative_position(frames, side, side, side, x.device)
    bias = attention.bias_table[index].view(*mask.shape[-2:], heads).permute(2, 0, 1)
    q, k, v = (
        attention.qkv(tokens).unflatten(-1, (3, heads, dim // heads)).permute(3, 0, 1, 4, 2, 5)
    )
    weights = (q @ k.transpose(-1, -2) * (dim // heads) ** -0.5 + bias + mask[:, None]).softmax(-1)
    y = attention.proj((weights @ v).transpose(2, 3).flatten(-2))
    y = y.reshape(y.shape[0], hp // side, wp // side, frames, side, side, dim)
    y = y.permute(0, 3, 1, 4, 2, 5, 6).reshape(y.shape[0], frames, hp, wp, dim)
    return torch.roll(y, (sy, sx), (2, 3))[:, :, :h, :w]


@pytest.mark.parametrize("size", [(16, 24), (8, 16), (13, 21), (24, 8), (5, 19)])
@pytest.mark.parametrize("shift", [False, True])
def test_mask_free_windows_equal_explicit_masked_attention(size, shift):
    """Half windows at the border replace the mask; outputs and gradients, in float64."""
    torch.manual_seed(1)
    frames, (h, w) = 3, size
    attention = WindowAttention(12, 3, frames, 8).double()
    torch.nn.init.normal_(attention.bias_table)
    torch.nn.init.normal_(attention.qkv.bias)  # padded tokens then have keys and values
    x = torch.randn(2, frames, h, w, 12, dtype=torch.float64, requires_grad=True)
    g = grid(2, frames, h, w, 8, x.device)
    layout = g.shifted if shift else g.plain
    tokens = x.flatten(0, 3)[layout.from_image]
    if layout.valid is not None:
        tokens = tokens * layout.valid
    out = attention(tokens, layout)[layout.to_image].view(2, frames, h, w, 12)
    expected = explicit_attention(attention, x, frames, h, w, shift)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    names = [attention.bias_table, attention.qkv.weight, x]
    probe = torch.randn_like(out)
    ours = torch.autograd.grad((out * probe).sum(), names, retain_graph=True)
    theirs = torch.autograd.grad((expected * probe).sum(), names)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_equal_finite_differences_with_padding_and_shift():
    """The gathers carry their own backward pass; check it through a whole stage."""
    torch.manual_seed(0)
    model = SwinXVR(embed_dim=6, depths=(2,), heads=1, window=4, up_features=4).double().eval()
    lr, hr = inputs(model, h=6, w=5, dtype=torch.float64)
    probe = torch.randn(1, 1, 1, 24, 20, dtype=torch.float64)
    parameter = model.stages[0].blocks[0].attn.qkv.weight
    loss = (model(lr, hr) * probe).sum()
    gradient = torch.autograd.grad(loss, parameter)[0]
    for i, j in [(0, 0), (7, 3), (17, 5)]:
        with torch.no_grad():
            step, values = 1e-6, []
            for sign in (1, -1):
                parameter[i, j] += sign * step
                values.append((model(lr, hr) * probe).sum())
                parameter[i, j] -= sign * step
        assert float((values[0] - values[1]) / (2 * step)) == pytest.approx(
            float(gradient[i, j]), rel=1e-5, abs=1e-8
        )


@pytest.mark.parametrize("output", ["centre", "sequence"])
@pytest.mark.parametrize("scale", [2, 4])
def test_shapes_for_batches_frames_and_scales(output, scale):
    model = SwinXVR(lr_frames=5, output=output, scale=scale, **SMALL).eval()
    out = model(*inputs(model, batch=2, h=9, w=17))
    assert out.shape == (2, 1 if output == "centre" else 5, 1, 9 * scale, 17 * scale)


def test_centre_is_the_middle_of_the_sequence():
    torch.manual_seed(0)
    model = SwinXVR(**SMALL).eval()
    lr, hr = inputs(model)
    centre = model(lr, hr)
    model.output = "sequence"
    torch.testing.assert_close(model(lr, hr)[:, 1:2], centre, rtol=1e-4, atol=1e-5)


BASES = {
    "bicubic": lambda lr, hr, offset: upsample(lr, 4),
    "detail": transfer_detail,
    "adaptive": transfer_matching_detail,
    "bayes": lambda lr, hr, offset: BAYES(lr, hr),
}


@pytest.mark.parametrize("base", BASES)
def test_an_untrained_model_with_a_base_returns_the_base(base):
    model = SwinXVR(base=base, **SMALL).eval()
    lr, hr = inputs(model)
    offset = torch.tensor([[-3.0, 5.0]])
    expected = BASES[base](lr, hr, offset)
    torch.testing.assert_close(model(lr, hr, offset), expected[:, 1:2])
    model.output = "sequence"
    torch.testing.assert_close(model(lr, hr, offset), expected)


@pytest.mark.parametrize("base", BASES)
def test_a_base_lets_the_network_learn(base):
    model = SwinXVR(base=base, **SMALL)
    lr, hr = inputs(model)
    model(lr, hr, torch.tensor([[-3.0, 5.0]])).square().mean().backward()
    assert model.last_conv.weight.grad.abs().max() > 0


def test_adaptive_transfer_takes_detail_from_the_key_frame_that_fits_and_leaves_moved_places_out():
    g = torch.Generator().manual_seed(0)
    detail = torch.rand(1, 1, 1, 64, 64, generator=g) * 0.2 - 0.1
    still = 0.5 + detail
    moved = still.clone()
    moved[..., :32, :] = 1 - moved[..., :32, :] * 0.2  # another scene in the upper half
    lr = F.avg_pool2d(still[0], 4)[None]
    offset = torch.tensor([[-10.0, 10.0]])
    exact = transfer_matching_detail(lr, torch.cat((still, still), 1), offset)
    torch.testing.assert_close(exact, still, atol=1e-5, rtol=0)
    one_moved = transfer_matching_detail(lr, torch.cat((still, moved), 1), offset)
    torch.testing.assert_close(one_moved, still, atol=0.02, rtol=0)
    both_moved = transfer_matching_detail(lr, torch.cat((moved, moved), 1), offset)
    top = (..., slice(0, 24), slice(None))
    torch.testing.assert_close(both_moved[top], upsample(lr, 4)[top], atol=0.01, rtol=0)
    assert (
        float((transfer_detail(lr, torch.cat((still, moved), 1), offset) - still).abs().max())
        > 0.05
    )


def test_stochastic_depth_drops_branches_in_training_only():
    torch.manual_seed(0)
    model = SwinXVR(**{**SMALL, "drop_path": 0.9})
    lr, hr = inputs(model)
    a, b = model(lr, hr), model(lr, hr)
    assert not torch.equal(a, b)
    model.eval()
    assert torch.equal(model(lr, hr), model(lr, hr))


@pytest.mark.parametrize(
    ("lr", "hr"),
    [
        ((1, 4, 1, 16, 16), (1, 2, 1, 64, 64)),
        ((1, 3, 2, 16, 16), (1, 2, 1, 64, 64)),
        ((1, 3, 1, 16, 16), (1, 2, 1, 64, 60)),
        ((1, 3, 1, 16, 16), (2, 2, 1, 64, 64)),
        ((3, 1, 16, 16), (1, 2, 1, 64, 64)),
    ],
)
def test_wrong_shapes_are_refused_with_the_shapes(lr, hr):
    with pytest.raises(ValueError, match=r"must be \(.*got \("):
        SwinXVR(**SMALL)(torch.zeros(lr), torch.zeros(hr))


@pytest.mark.parametrize("output", ["centre", "sequence"])
def test_flops_agree_with_torchs_counter(output):
    model = SwinXVR(output=output, **SMALL).eval()
    lr, hr = inputs(model, h=24, w=16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(lr, hr)  # without gradients it folds its last convolutions into one
    assert model.flops(24, 16) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("name", SWIN)
def test_bf16_stays_close_to_the_authors_program(reference, name):
    state, lr, hr, expected = vectors(reference(f"{name}.npz"))
    model = load_xfusion(state)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(torch.as_tensor(lr), torch.as_tensor(hr))
    out = out[:, 0] if expected.ndim == 4 else out
    assert out.dtype == torch.float32
    error = np.linalg.norm(out.numpy() - expected) / np.linalg.norm(expected)
    assert error < 5e-3


def test_bf16_gradients_stay_close_to_those_of_float32():
    torch.manual_seed(0)
    model = SwinXVR(**SMALL)
    lr, hr = inputs(model, batch=2, h=13, w=17)
    names, parameters = zip(*model.named_parameters(), strict=True)
    probe = torch.randn(2, 1, 1, 52, 68)
    exact = torch.autograd.grad((model(lr, hr) * probe).sum(), parameters)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(lr, hr)
    rough = torch.autograd.grad((out * probe).sum(), parameters)
    for name, a, b in zip(names, exact, rough, strict=True):
        assert b.dtype == torch.float32, name
        assert float((a - b).norm()) < 0.1 * float(a.norm()) + 1e-4, name


def test_cached_biases_follow_the_weights():
    """Inference keeps the biases of a shape and type; a changed table must not meet old ones."""
    torch.manual_seed(0)
    model = SwinXVR(**SMALL).eval()
    lr, hr = inputs(model)
    with torch.inference_mode():
        before = model(lr, hr)
        assert torch.equal(before, model(lr, hr))
    with torch.no_grad():
        for stage in model.stages:
            for block in stage.blocks:
                block.attn.bias_table.normal_()
    with torch.inference_mode():
        after = model(lr, hr)
    assert not torch.equal(before, after)
    assert torch.allclose(after, model(lr, hr), atol=1e-5)  # with gradients nothing is cached
    model.eval()
    with torch.inference_mode():
        model(lr, hr)
    model.load_state_dict(SwinXVR(**SMALL).state_dict())
    with torch.inference_mode():
        loaded = model(lr, hr)
        exact = model.double()(lr.double(), hr.double()).float()
    assert torch.allclose(loaded, exact, atol=1e-5)


def test_cached_biases_follow_an_optimizer_that_leaves_no_trace_on_the_weights():
    """Fused Adam changes parameters without telling their version counters."""
    torch.manual_seed(0)
    model = SwinXVR(**SMALL).eval()
    lr, hr = inputs(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            kept = model(lr, hr)
            assert torch.allclose(kept, model(lr, hr))
        model(lr, hr).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        after = model(lr, hr)
    assert torch.allclose(after, model(lr, hr).detach(), atol=1e-2)  # of thousands


def test_cached_biases_know_how_many_frames_they_are_for():
    attention = WindowAttention(24, 3, 5, 4).eval()
    device = torch.device("cpu")
    with torch.inference_mode():
        for frames in (5, 3):
            layout = grid(1, frames, 8, 8, 4, device).plain
            bias = attention.bias(layout.groups[0], layout.relative[0], torch.float32)
            assert bias.shape[2] == frames * 16


@pytest.mark.parametrize("bf16", [False, True])
def test_windows_of_one_pixel_have_nothing_to_shift(bf16):
    model = SwinXVR(embed_dim=16, depths=(2, 2), heads=1, window=1, up_features=4)
    lr, hr = inputs(model, h=4, w=5)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(lr, hr).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("size", [(3, 9), (4, 4), (10, 13)])
def test_convolutions_folded_for_inference_are_the_same(scale, size, monkeypatch):
    """To the border; and they follow the weights, folded once for each."""
    torch.manual_seed(0)
    options = SMALL | {"scale": scale, "output": "sequence"}
    model = SwinXVR(**options).double().eval()
    folds, fold = [], model._fold
    monkeypatch.setattr(model, "_fold", lambda: folds.append(1) or fold())
    lr, hr = inputs(model, 2, *size, dtype=torch.float64)
    for times in (1, 2):
        for p in model.parameters():
            nn.init.normal_(p, std=0.2)
        exact = model(lr, hr).detach()
        with torch.no_grad():  # a pass with gradients may be followed by an optimizer's step
            torch.testing.assert_close(model(lr, hr), exact, rtol=1e-10, atol=1e-10)
        assert len(folds) == (times - 1 if min(size) > 3 else 0)
        model.eval()
        for mode in (torch.no_grad(), torch.inference_mode(), torch.no_grad()):
            with mode:
                torch.testing.assert_close(model(lr, hr), exact, rtol=1e-10, atol=1e-10)
        assert len(folds) == (times if min(size) > 3 else 0)


@pytest.mark.parametrize("kind", ["fused", "explicit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, [slice(3, 8), slice(0, 10)]])
def test_every_kind_of_attention_computes_the_same(kind, dtype, rows):
    g = torch.Generator().manual_seed(0)
    counts, sizes = [5, 40], [12, 20]  # more windows than the backward pass takes at a time
    tokens = sum(n * size for n, size in zip(counts, sizes, strict=True))
    qkv = torch.randn(tokens, 3 * 2 * 8, generator=g, dtype=torch.float64).to(dtype)
    biases = [torch.randn(1, 2, n, n, generator=g, dtype=torch.float64) for n in sizes]
    asking = 5 * 5 + 40 * 10 if rows else tokens
    probe = torch.randn(asking, 16, generator=g, dtype=torch.float64)

    def run(qkv, kind):
        leaves = [t.detach().requires_grad_() for t in (qkv, *biases)]
        out = window_attention(leaves[0], leaves[1:], counts, rows, kind)
        return [out.detach(), *torch.autograd.grad((out * probe).sum(), leaves)]

    tolerance = 1e-10 if dtype == torch.float64 else 3e-2
    for ours, exact in zip(run(qkv, kind), run(qkv.double(), "explicit"), strict=True):
        ours = ours.double()
        assert float((ours - exact).norm() / exact.norm()) < tolerance


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["fused", "flex"])
@pytest.mark.parametrize("tokens", [320, 160, 80])
def test_attention_on_a_gpu_has_the_gradients_of_the_explicit_one(tokens, kind):
    g = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(4 * tokens, 3 * 3 * 64, device="cuda", generator=g).requires_grad_()
    bias = torch.randn(1, 3, tokens, tokens, device="cuda", generator=g).requires_grad_()
    explicit = window_attention(qkv, [bias], [4], kind="explicit")
    fused = window_attention(qkv, [bias], [4], kind=kind)
    torch.testing.assert_close(fused, explicit, rtol=1e-3, atol=1e-3)
    ours = torch.autograd.grad(fused.square().sum(), [qkv, bias])
    theirs = torch.autograd.grad(explicit.square().sum(), [qkv, bias])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
