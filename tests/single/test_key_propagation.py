"""The network that carries key frames along the fast stream: warps, greys, shapes, cost."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch.utils.flop_counter import FlopCounterMode

from hpc_xvr.model import key_propagation
from hpc_xvr.model.bases import upsample
from hpc_xvr.model.key_propagation import KeyPropagation
from hpc_xvr.model.warping import enlarged_by_taps, warp, warp_along

SMALL = {"features": 32, "blocks": 2, "heads": 1, "motion_features": 16, "frame_features": 8}


def small(**options):
    torch.manual_seed(0)
    return KeyPropagation(**{**SMALL, **options})


def gap(frames, h, w, scale=4, batch=1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    lr = torch.rand(batch, frames, 1, h, w, generator=rng)
    return lr, torch.rand(batch, 2, 1, scale * h, scale * w, generator=rng)


@pytest.mark.parametrize("lookup", ["linear", "both"])
@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize(
    ("frames", "h", "w"), [(3, 8, 8), (3, 1, 1), (9, 13, 21), (41, 6, 5), (5, 16, 24)]
)
def test_all_frames_of_a_gap_of_any_length_and_size(scale, frames, h, w, lookup):
    model = small(scale=scale, lookup=lookup)
    lr, hr = gap(frames, h, w, scale, batch=2)
    carried = model(lr, hr)
    assert carried.frames.shape == (2, frames - 2, 1, scale * h, scale * w)
    assert carried.forward.shape == carried.backward.shape
    assert carried.forward.shape == (2, frames - 2, 2, scale * h, scale * w)
    assert torch.isfinite(carried.frames).all()
    alone = model(lr[1:], hr[1:]).frames  # the other gaps of a batch do not matter
    torch.testing.assert_close(alone[0], carried.frames[1], rtol=0, atol=1e-5)


def wave_and_flow():
    """Waves of four pixels, and motion by half a sharp pixel."""
    wave = torch.sin(torch.arange(64.0) * torch.pi / 2 + 0.3).expand(1, 1, 64, 64)
    aside = torch.sin((torch.arange(64.0) + 0.5) * torch.pi / 2 + 0.3).expand(1, 1, 64, 64)
    flow = torch.zeros(1, 2, 16, 16)
    flow[:, 0] = 0.125
    return wave, aside, flow


def test_a_cubic_lookup_keeps_what_a_linear_one_blurs():
    wave, aside, flow = wave_and_flow()
    errors = {
        lookup: float((warp_along(wave, flow, 4, lookup=lookup) - aside)[..., 4:-4].abs().max())
        for lookup in ("linear", "cubic")
    }
    assert errors["linear"] > 0.25 and errors["cubic"] < 0.12


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tile", [None, 8])
def test_with_both_lookups_either_may_be_chosen(training, tile):
    """Six candidates carried or still as ever, then those of the cubic lookup."""
    wave, aside, _ = wave_and_flow()
    model = small(motions=1, lookup="both").train(training)
    with torch.no_grad():
        model.motion.last.weight.zero_()
        model.motion.last.bias.copy_(torch.tensor([0.125, 0.0]))
        model.choose.conv.weight.zero_()
    hr = wave.expand(1, 2, 1, 64, 64) * 0.25 + 0.5
    lr = torch.nn.functional.avg_pool2d(hr[:, 0], 4)[:, None].expand(-1, 3, -1, -1, -1)
    found = {}
    for name, number in (("linear", 0), ("cubic", 4)):
        with torch.no_grad():
            bias = model.choose.conv.bias.view(8, 16)  # 6 candidates, none, residual
            bias.zero_()
            bias[number] = 50.0
        frame = model(lr, hr, tile=tile).frames[0, 0, 0]
        found[name] = (frame - (aside[0, 0] * 0.25 + 0.5))[8:-8, 8:-8].abs().max()
    assert found["cubic"] < 0.5 * found["linear"]


def test_with_both_lookups_it_goes_on_from_weights_with_linear_ones():
    """Whatever was chosen is chosen again, half of it as looked up the other way."""
    linear, both = small().eval(), small(lookup="both").eval()
    with torch.no_grad():
        linear.choose.conv.bias.view(8, 16)[6] = 3  # 6 candidates, none, residual
    both.load_state_dict(both.widened(linear.state_dict()))
    lr, hr = gap(5, 16, 16)
    hr = torch.nn.functional.avg_pool2d(hr[:, :, 0], 9, 1, 4)[:, :, None]  # hardly any difference
    found, wanted = both(lr, hr).frames, linear(lr, hr).frames
    assert (found - wanted).abs().max() < 0.05 * (wanted - upsample(lr[:, 1:-1], 4)).abs().max()
    same = both.widened(both.state_dict())
    assert all(torch.equal(v, same[k]) for k, v in both.state_dict().items())


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_pictures_enlarged_by_taps_are_torchs_and_so_are_gradients(scale, how):
    x = torch.rand(3, 2, 5, 7, requires_grad=True)
    ours = enlarged_by_taps(x, scale, how)
    theirs = torch.nn.functional.interpolate(x, scale_factor=scale, mode=how, align_corners=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    weights = torch.rand_like(theirs)
    found, wanted = (torch.autograd.grad(y, x, weights)[0] for y in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def test_gradients_fade_through_what_a_step_of_the_motion_sees():
    """Not those of the motion that it continues."""
    step = small().motion
    features, low = torch.rand(2, 8, 6, 6), torch.rand(2, 1, 6, 6)
    warped = torch.rand(2, 2, 24, 24, requires_grad=True)
    flow = torch.rand(2, 4, 6, 6, requires_grad=True)
    with torch.no_grad():
        step.last.weight.mul_(1000)
    said = step(features, low, warped, flow)[1]
    alone = step.further(features, low, warped, flow)[1]
    faded, whole = (torch.autograd.grad(y.sum(), warped)[0] for y in (said, alone))
    torch.testing.assert_close(faded, key_propagation.FADING * whole)
    with torch.no_grad():
        step.last.weight.zero_()
        step.last.bias.zero_()
    (kept,) = torch.autograd.grad(step(features, low, warped, flow)[0].sum(), flow)
    torch.testing.assert_close(kept, torch.ones_like(kept))


@pytest.mark.parametrize("kind", ["smooth", "wild"])
def test_a_warp_looks_up_what_scipy_does(kind):
    """Linear between pixels, the border continued outside."""
    rng = np.random.default_rng(0)
    image = rng.random((11, 17), np.float32)
    flow = rng.normal(0, 9 if kind == "wild" else 1, (2, 11, 17)).astype(np.float32)
    y, x = np.mgrid[:11, :17]
    wanted = map_coordinates(image, [y + flow[1], x + flow[0]], order=1, mode="nearest")
    found = warp(torch.from_numpy(image)[None, None], torch.from_numpy(flow)[None])[0, 0]
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_a_key_frame_is_carried_by_the_motion_in_coarse_pixels():
    """A shift of one coarse pixel is one of `scale` sharp ones; each field has its own picture."""
    key = torch.rand(1, 1, 32, 48)
    flow = torch.zeros(1, 4, 8, 12)
    flow[:, 0] = 1  # the first field: x
    flow[:, 3] = -2  # the second one: y
    right, down = warp_along(key, flow, 4)[0]
    torch.testing.assert_close(right[:, :-4], key[0, 0, :, 4:], rtol=0, atol=1e-5)
    torch.testing.assert_close(right[:, -4:], key[0, 0, :, -1:].expand(-1, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(down[8:], key[0, 0, :-8], rtol=0, atol=1e-5)


def test_motion_is_chained_from_frame_to_frame_and_the_original_is_looked_up():
    """With a step that always moves half a coarse pixel, frame n shows the key frame n / 2 aside
    from either direction, as sharp as it was."""
    model = small(motions=1)
    with torch.no_grad():
        model.motion.last.weight.zero_()
        model.motion.last.bias.copy_(torch.tensor([0.5, 0.0]))
    lr, hr = gap(7, 8, 12)
    carried = model(lr, hr)
    for n in range(1, 6):
        shift = 2 * n
        ahead, back = carried.forward[0, n - 1, 0], carried.backward[0, 5 - n, 0]
        for found, key in ((ahead, hr[0, 0, 0]), (back, hr[0, 1, 0])):
            torch.testing.assert_close(
                found[:, :-shift], key[:, shift:], rtol=0, atol=1e-4, msg=f"step {n}"
            )


def test_a_still_scene_comes_back_exactly_where_the_choice_is_the_key_frame():
    model = small()
    _, hr = gap(6, 8, 12)
    hr = hr[:, :1].expand(-1, 2, -1, -1, -1)
    lr = torch.nn.functional.avg_pool2d(hr[:, 0], 4)[:, None].expand(-1, 6, -1, -1, -1)
    with torch.no_grad():
        bias = model.choose.conv.bias.view(8, 16)  # 6 candidates, none, residual
        bias[4] = 50.0  # the first key frame as it stood
        model.choose.conv.weight.zero_()
    out = model(lr, hr).frames
    torch.testing.assert_close(out, hr[:, :1].expand_as(out), rtol=0, atol=1e-5)


def test_with_no_candidate_chosen_it_is_bicubic_interpolation():
    model = small()
    lr, hr = gap(6, 8, 12)
    with torch.no_grad():
        model.choose.conv.bias.view(8, 16)[6] = 50.0
        model.choose.conv.weight.zero_()
    torch.testing.assert_close(model(lr, hr).frames, upsample(lr[:, 1:-1], 4), rtol=0, atol=1e-5)


def test_greys_are_relative_to_the_key_frames():
    """A darker recording of less contrast gives the same pictures, darker and of less contrast."""
    model = small()
    lr, hr = gap(6, 8, 12)
    out = model(lr, hr).frames
    dark = model(0.03 * lr + 0.01, 0.03 * hr + 0.01).frames
    torch.testing.assert_close(dark, 0.03 * out + 0.01, rtol=0, atol=1e-5)
    flat = model(lr.new_full(lr.shape, 0.3), hr.new_full(hr.shape, 0.3)).frames
    torch.testing.assert_close(flat, hr.new_full(out.shape, 0.3), rtol=0, atol=1e-4)


def test_every_parameter_learns():
    model = small()
    lr, hr = gap(5, 8, 8)
    with torch.no_grad():  # so small at first that its gradient is lost in float32
        model.motion.last.weight.normal_(std=0.1)
    carried = model(lr, hr)
    (carried.frames.square().mean() + carried.forward.square().mean()).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_bf16_is_close_to_float32():
    model = small(features=64, heads=2).eval()
    lr, hr = gap(9, 16, 24)
    with torch.inference_mode():
        wanted = model(lr, hr).frames
        with torch.autocast("cpu", torch.bfloat16):
            found = model(lr, hr).frames
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 4e-3


@pytest.mark.parametrize(("h", "w"), [(16, 24), (13, 21)])
def test_it_knows_what_it_costs(h, w):
    """Against torch's own counter; what is done once a gap or a key frame is left out."""
    model = small(attention="explicit").eval()
    lr, hr = gap(12, h, w)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(lr, hr)
    assert model.flops(h, w) == pytest.approx(counter.get_total_flops() / 10, rel=1e-6)


@pytest.mark.parametrize(
    ("lr", "hr", "words"),
    [
        ((1, 2, 1, 8, 8), (1, 2, 1, 32, 32), "T >= 3"),
        ((1, 5, 3, 8, 8), (1, 2, 1, 32, 32), "T >= 3"),
        ((5, 1, 8, 8), (1, 2, 1, 32, 32), "T >= 3"),
        ((1, 5, 1, 8, 8), (1, 2, 1, 32, 36), r"hr must be \(1, 2, 1, 32, 32\)"),
        ((1, 5, 1, 8, 8), (1, 3, 1, 32, 32), r"hr must be \(1, 2, 1, 32, 32\)"),
    ],
)
def test_wrong_shapes_are_named(lr, hr, words):
    with pytest.raises(ValueError, match=words):
        small()(torch.rand(lr), torch.rand(hr))
    with pytest.raises(ValueError, match="scale must be 2 or 4"):
        KeyPropagation(scale=3)
    with pytest.raises(ValueError, match="multiple of heads"):
        KeyPropagation(features=64, heads=3)


@pytest.mark.parametrize("blocks", [1, 4])
def test_parts_and_bands_give_the_same_frames(blocks, monkeypatch):
    """Eval mode fuses a few frames at a time, and large frames in bands of rows."""
    model = small(blocks=blocks, attention="explicit")
    with torch.no_grad():  # attention that reaches as far as it can
        for block in model.stage.blocks:
            block.attn.proj.weight.normal_(std=0.2)
        model.motion.last.weight.normal_(std=0.1)
        model.choose.conv.weight.normal_(std=0.1)
    lr, hr = gap(6, 123, 21, batch=2)
    with torch.inference_mode():
        wanted = model.train()(lr, hr).frames
        model.eval()
        for part, band in ((key_propagation.PART, key_propagation.BAND), (1, 1), (6000, 500)):
            monkeypatch.setattr(key_propagation, "PART", part)
            monkeypatch.setattr(key_propagation, "BAND", band)
            carried = model(lr, hr)
            torch.testing.assert_close(carried.frames, wanted, rtol=0, atol=2e-5)
            assert carried.forward is None and carried.backward is None


@pytest.mark.parametrize("only", [slice(0, 2), slice(3, 4), slice(None)])
def test_some_frames_of_a_gap_alone(only):
    """As they are among all of them, in training, in eval mode and in tiles."""
    model = small(attention="explicit")
    with torch.no_grad():
        model.motion.last.weight.normal_(std=0.1)
        model.choose.conv.weight.normal_(std=0.1)
    lr, hr = gap(7, 16, 11, batch=2)
    whole = model(lr, hr)
    for wanted, found in zip(whole, model(lr, hr, only=only), strict=True):
        torch.testing.assert_close(found, wanted[:, only], rtol=0, atol=2e-5)
    with torch.inference_mode():
        for tile in (None, 8):
            found = model.eval()(lr, hr, tile, only).frames
            torch.testing.assert_close(found, whole.frames[:, only], rtol=0, atol=2e-5)
