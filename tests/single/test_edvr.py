"""Deformable convolution and EDVR against slow loops, torchvision and the authors' outputs."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hpc_xvr.model import deform
from hpc_xvr.model.deform import DeformConv, deform_conv2d, sampled_conv, torchvision_conv
from hpc_xvr.model.edvr import EDVR, EDVRSTF, infer_edvr

needs_torchvision = pytest.mark.skipif(
    deform._torchvision_op is None, reason="no torchvision that works with this torch"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SMALL = {"lr_frames": 3, "features": 8, "groups": 2, "extract_blocks": 1, "reconstruct_blocks": 1}


def problem(batch=2, channels=4, out=3, groups=2, h=5, w=7, k=3, reach=2.0, dtype=torch.float64):
    """x, offset, mask, weight, bias; the offsets reach far outside the picture."""
    g = torch.Generator().manual_seed(5)
    taps = groups * k * k
    return (
        torch.randn(batch, channels, h, w, generator=g, dtype=dtype),
        torch.randn(batch, taps * 2, h, w, generator=g, dtype=dtype) * reach,
        torch.rand(batch, taps, h, w, generator=g, dtype=dtype),
        torch.randn(out, channels, k, k, generator=g, dtype=dtype),
        torch.randn(out, generator=g, dtype=dtype),
    )


def slow_conv(x, offset, mask, weight, bias):
    """One number at a time, straight from the definition."""
    x, offset, mask, weight, bias = (v.numpy() for v in (x, offset, mask, weight, bias))
    (batch, channels, h, w), (outs, _, k, _) = x.shape, weight.shape
    groups = mask.shape[1] // k**2
    result = np.zeros((batch, outs, h, w))
    for b, o, i, j in np.ndindex(result.shape):
        total = bias[o]
        for c, ky, kx in np.ndindex(channels, k, k):
            tap = (c // (channels // groups)) * k**2 + ky * k + kx
            y = i + ky - k // 2 + offset[b, 2 * tap, i, j]
            z = j + kx - k // 2 + offset[b, 2 * tap + 1, i, j]
            value = 0.0
            for row in (math.floor(y), math.floor(y) + 1):
                for col in (math.floor(z), math.floor(z) + 1):
                    if 0 <= row < h and 0 <= col < w:
                        value += (1 - abs(y - row)) * (1 - abs(z - col)) * x[b, c, row, col]
            total += weight[o, c, ky, kx] * mask[b, tap, i, j] * value
        result[b, o, i, j] = total
    return result


@pytest.mark.parametrize("sizes", [{}, {"groups": 1, "h": 1}, {"groups": 4, "k": 1, "w": 1}])
def test_values_are_those_of_the_definition(sizes):
    inputs = problem(**sizes)
    np.testing.assert_allclose(deform_conv2d(*inputs), slow_conv(*inputs), rtol=0, atol=1e-12)


def test_whole_pixel_offsets_shift_the_picture():
    x, offset, mask, weight, bias = problem()
    offset[:, 0::2], offset[:, 1::2] = 1, -2
    moved = torch.zeros_like(x)
    moved[:, :, :-1, 2:] = x[:, :, 1:, :-2]
    wide = F.pad(x, (4, 4, 4, 4))  # taps beyond the border meet what is there before the shift
    expected = F.conv2d(wide, weight, bias, padding=1)[:, :, 5 : 5 + 5, 2 : 2 + 7]
    found = deform_conv2d(x, offset, torch.ones_like(mask), weight, bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradients_of_all_inputs():
    inputs = [v.requires_grad_() for v in problem(batch=1, h=3, w=4, reach=1.0)]
    assert torch.autograd.gradcheck(deform_conv2d, inputs)


def test_without_gradients_the_values_stay():
    inputs = problem(batch=3)
    with torch.no_grad():
        alone = deform_conv2d(*inputs)
    torch.testing.assert_close(alone, sampled_conv(*inputs), rtol=0, atol=1e-12)


def test_bfloat16_does_not_move_the_taps():
    x, offset, mask, weight, bias = problem(h=2, w=700, dtype=torch.float32)
    exact = deform_conv2d(x, offset.round(), mask, weight, bias)
    rough = deform_conv2d(*(v.bfloat16() for v in (x, offset.round(), mask, weight, bias)))
    assert rough.dtype == torch.bfloat16
    # 2^-8 for each of the few rounded factors; a tap on the wrong pixel is wrong by about 1.
    assert (rough - exact).abs().max() < 0.02 * exact.abs().max()


@needs_torchvision
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_to_torchvision(dtype):
    inputs = [v.requires_grad_() for v in problem(channels=8, groups=4, dtype=dtype)]
    ours, theirs = sampled_conv(*inputs), torchvision_conv(*inputs)
    tolerance = {"rtol": 0, "atol": 1e-11 if dtype == torch.float64 else 1e-4}
    torch.testing.assert_close(ours, theirs, **tolerance)
    upstream = torch.linspace(-1, 1, ours.numel(), dtype=dtype).view_as(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(theirs, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **tolerance)


@needs_gpu
def test_gpu_gives_what_the_cpu_gives():
    inputs = problem()
    found = deform_conv2d(*(v.cuda() for v in inputs)).cpu()
    torch.testing.assert_close(found, deform_conv2d(*inputs), rtol=0, atol=1e-11)


def test_deform_conv_starts_as_a_halved_convolution():
    conv, x = DeformConv(8, 2), torch.randn(2, 8, 6, 5)
    expected = F.conv2d(x, conv.weight / 2, conv.bias, padding=1)
    torch.testing.assert_close(conv(x, torch.randn_like(x)), expected, rtol=0, atol=1e-5)


def test_shapes_that_do_not_belong_together_are_named():
    x, offset, mask, weight, bias = problem()
    for wrong in (
        (x, offset[:, :-1], mask, weight, bias),
        (x, offset, mask[:, :-1], weight, bias),
        (x, offset, mask, weight[:, :-1], bias),
        (x[:, :, 1:], offset, mask, weight, bias),
    ):
        with pytest.raises(ValueError, match=r"deform_conv2d: x \(2, 4, "):
            deform_conv2d(*wrong)


def authors(path, dtype):
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    state = {n.removeprefix("param/"): v for n, v in arrays.items() if n.startswith("param/")}
    model = infer_edvr(state)
    model.load_state_dict(state, strict=True)
    return model.to(dtype), *(arrays[n].to(dtype) for n in ("lr", "hr")), arrays["out"]


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize(
    "name, kind",
    [
        ("edvr", EDVR),
        ("edvr_stf", EDVRSTF),
        ("edvr_small", EDVR),
        ("edvr_stf_small", EDVRSTF),
    ],
)
def test_authors_weights_give_the_authors_output(reference, name, kind, dtype, atol):
    model, lr, hr, expected = authors(reference(f"{name}.npz"), dtype)
    assert type(model) is kind
    with torch.no_grad():
        found = model(lr, hr)
    assert found.shape == (*lr.shape[:1], 1, *hr.shape[2:]) and found.dtype == dtype
    assert (found[:, 0].double() - expected).abs().max() < atol


def test_edvr_needs_no_key_frames(reference):
    model, lr, hr, _ = authors(reference("edvr.npz"), torch.float64)
    with torch.no_grad():
        assert torch.equal(model(lr), model(lr, hr + 1, torch.ones(2, 2)))


def test_stf_uses_both_key_frames(reference):
    model, lr, hr, expected = authors(reference("edvr_stf.npz"), torch.float64)
    for key in (0, 1):
        changed = hr.clone()
        changed[:, key] = changed[:, key].flip(-1)
        with torch.no_grad():
            assert (model(lr, changed)[:, 0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "model, published",
    [
        (lambda: EDVRSTF(3, 128, 8, 5, 40), 20_926_817),
        (lambda: EDVR(5, 128, 8, 5, 40), 20_630_369),
        (lambda: EDVR(5, 64, 8, 5, 10), 3_297_825),
    ],
)
def test_parameter_counts_are_the_published_ones(model, published):
    with torch.device("meta"):
        assert sum(p.numel() for p in model().parameters()) == published


@pytest.mark.parametrize("kind", [EDVR, EDVRSTF])
@pytest.mark.parametrize("changed", [{}, {"features": 12, "up_features": 6, "lr_frames": 5}])
def test_flops_are_the_counted_ones(kind, changed):
    model = kind(**(SMALL | changed))
    lr, hr = torch.rand(1, model.lr_frames, 1, 8, 12), torch.rand(1, 2, 1, 32, 48)
    with FlopCounterMode(display=False) as counter:
        model(lr, hr)
    assert model.flops(8, 12) == pytest.approx(counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize("kind", [EDVR, EDVRSTF])
def test_a_state_dict_tells_its_architecture(kind):
    with torch.device("meta"):
        model = kind(
            lr_frames=7,
            features=24,
            groups=3,
            extract_blocks=2,
            reconstruct_blocks=11,
            up_features=20,
        )
        found = infer_edvr(model.state_dict())
    assert type(found) is kind and found.lr_frames == 7
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in found.state_dict().items()} == shapes
    with pytest.raises(ValueError, match=r"not weights of EDVR: conv_first\.weight is missing"):
        infer_edvr({"stages.0.weight": torch.zeros(1)})


def test_wrong_shapes_are_named():
    lr, hr = torch.rand(1, 3, 1, 8, 12), torch.rand(1, 2, 1, 32, 48)
    edvr, stf = EDVR(**SMALL), EDVRSTF(**SMALL)
    for model, inputs, message in (
        (edvr, (lr[:, :2],), r"lr must be \(B,3,1,h,w\), it is \(1, 2, 1, 8, 12\)"),
        (edvr, (lr[0],), r"it is \(3, 1, 8, 12\)"),
        (edvr, (lr[..., :10],), r"\(1, 3, 1, 8, 10\): its height and width .* multiples of 4"),
        (stf, (lr,), r"hr must be \(1, 2, 1, 32, 48\) .* it is missing"),
        (stf, (lr, hr[..., :40]), r"must be \(1, 2, 1, 32, 48\) .* it is \(1, 2, 1, 32, 40\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*inputs)
    with pytest.raises(ValueError, match="features 8 must be a multiple of groups 3"):
        EDVR(**(SMALL | {"groups": 3}))
    with pytest.raises(ValueError, match="lr_frames must be odd, it is 4"):
        EDVR(**(SMALL | {"lr_frames": 4}))


def moving(kind):
    """A model whose offsets are not zero, as after some training."""
    torch.manual_seed(0)
    model = kind(**SMALL)
    for part in model.modules():
        if isinstance(part, DeformConv):
            torch.nn.init.normal_(part.conv_offset.weight, std=0.05)
            torch.nn.init.normal_(part.conv_offset.bias, std=0.5)
    return model


@pytest.mark.parametrize("kind", [EDVR, EDVRSTF])
def test_every_parameter_learns(kind):
    model = moving(kind)
    model(torch.rand(2, 3, 1, 8, 12), torch.rand(2, 2, 1, 32, 48)).square().sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_samples_of_a_batch_do_not_mix():
    model = moving(EDVRSTF).double()
    lr, hr = torch.rand(3, 3, 1, 8, 12).double(), torch.rand(3, 2, 1, 32, 48).double()
    both = model(lr, hr)
    alone = model(lr[1:2], hr[1:2])
    torch.testing.assert_close(both[1:2], alone, rtol=0, atol=1e-12)


def test_mixed_precision_stays_close():
    model = moving(EDVRSTF)
    lr, hr = torch.rand(1, 3, 1, 8, 12), torch.rand(1, 2, 1, 32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(lr, hr)
    exact = model(lr, hr)
    rough.float().sum().backward()
    assert model.pcd_align.cas_dcnpack.weight.grad.isfinite().all()
    spread = exact.std().item()
    assert (rough.float() - exact).abs().mean().item() < 0.05 * spread
