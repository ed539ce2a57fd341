"""PSNR, SSIM and AAD against scikit-image and closed forms."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from hpc_xvr.errors import InputError
from hpc_xvr.metrics import aad, flicker, psnr, psnr_float, psnr_gradient, ssim

ALL = (psnr, psnr_float, psnr_gradient, ssim, aad)


def pair(kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:41, :53]
    smooth = 0.5 + 0.4 * np.sin(x / 5) * np.cos(y / 7)
    return {
        "noise": (rng.random((41, 53)), rng.random((41, 53))),
        "similar": (smooth, smooth + 0.02 * rng.standard_normal(smooth.shape)),
        "flat": (np.full((9, 30), 0.3), np.full((9, 30), 0.7)),
        "outside": (smooth * 1.5 - 0.2, smooth),
        "smallest": (rng.random((7, 7)), rng.random((7, 7))),
    }[kind]


def eight_bit(frame: np.ndarray) -> np.ndarray:
    return np.round(np.clip(frame, 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("kind", ["noise", "similar", "flat", "outside", "smallest"])
def test_scikit_image_agrees(kind):
    a, b = pair(kind)
    u, v = eight_bit(a), eight_bit(b)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(u, v, data_range=255), abs=1e-10)
    assert ssim(a, b) == pytest.approx(structural_similarity(u, v, data_range=255), abs=1e-10)
    assert aad(a, b) == pytest.approx(np.abs(u.astype(int) - v).mean(), abs=1e-12)
    exact = peak_signal_noise_ratio(a.clip(0, 1), b.clip(0, 1), data_range=1)
    assert psnr_float(a, b) == pytest.approx(exact, abs=1e-10)
    for metric in ALL:
        assert metric(a, b) == metric(b, a)
    padded = [np.pad(p.clip(0, 1), 1, mode="reflect", reflect_type="odd") for p in (a, b)]
    with np.errstate(divide="ignore"):  # flat frames have equal gradients
        exact = peak_signal_noise_ratio(*(central(p) for p in padded), data_range=1)
    assert psnr_gradient(a, b) == pytest.approx(exact, abs=1e-10)


def central(p: np.ndarray) -> np.ndarray:
    """Differences over two pixels; odd reflection makes them one-sided at the edge."""
    return np.stack([p[2:, 1:-1] - p[:-2, 1:-1], p[1:-1, 2:] - p[1:-1, :-2]]) / 2


def test_flicker_sees_changes_and_not_levels():
    a, b = pair("similar")
    assert flicker(a, a * 0.9, a, a * 0.9) == 0
    assert flicker(a * 0.5, a * 0.6, a * 0.5 + 0.1, a * 0.6 + 0.1) == pytest.approx(0, abs=1e-12)
    half = np.full((8, 8), 0.5)
    assert flicker(half, half + 0.1, half, half - 0.1) == pytest.approx(0.2 * 255)
    first, second = np.random.default_rng(0).random((2, 2, 8, 9))
    expected = np.abs(np.diff(first, axis=0) - np.diff(second, axis=0)).mean() * 255
    assert flicker(*first, *second) == pytest.approx(expected)
    with pytest.raises(InputError, match="must be the same"):
        flicker(a, b, a, half)
    with pytest.raises(InputError, match="frames of a sequence"):
        flicker(a, half, a, half)


def test_blur_costs_edges_more_than_a_shift_of_level():
    x = np.tile(np.arange(40), (40, 1))
    edge = (x > 20) * 0.6 + 0.2
    blurred = 0.2 + 0.6 * np.clip((x - 17) / 7, 0, 1)
    assert psnr_gradient(edge, edge + 0.05) > 200
    assert psnr_gradient(edge, blurred) < 30


def test_scikit_image_agrees_on_a_large_frame():
    rng = np.random.default_rng(0)
    a = rng.random((700, 900)) * 0.01 + 0.95
    b = a + 0.004 * rng.standard_normal(a.shape)
    expected = structural_similarity(eight_bit(a), eight_bit(b), data_range=255)
    assert ssim(a, b) == pytest.approx(expected, abs=1e-9)


def test_equal_frames():
    frame = pair("noise")[0]
    assert psnr(frame, frame) == psnr_float(frame, frame) == math.inf
    assert ssim(frame, frame) == pytest.approx(1) and aad(frame, frame) == 0


def test_differences_below_half_a_step_only_count_unrounded():
    frame = np.round(pair("noise")[0] * 255) / 255
    near = frame + np.where(frame < 0.5, 0.0015, -0.0015)  # a step is 0.0039
    assert psnr(frame, near) == math.inf and aad(frame, near) == 0
    assert psnr_float(frame, near) == pytest.approx(-20 * math.log10(0.0015))


def test_one_step_everywhere():
    low, high = np.full((8, 8), 100 / 255), np.full((8, 8), 101 / 255)
    assert psnr(low, high) == pytest.approx(20 * math.log10(255))
    assert aad(low, high) == 1


def test_tensors_and_float32_are_welcome():
    a, b = (frame.astype(np.float32) for frame in pair("similar"))
    for metric in ALL:
        assert metric(torch.from_numpy(a), torch.from_numpy(b)) == metric(a, b)


@pytest.mark.parametrize("metric", ALL)
def test_a_nan_is_not_hidden(metric):
    a, b = pair("noise")
    a[3, 4] = np.nan
    assert math.isnan(metric(a, b))


@pytest.mark.parametrize("metric", ALL)
def test_frames_that_cannot_be_compared(metric):
    frame = np.zeros((8, 9))
    for other in (np.zeros((9, 8)), np.zeros((1, 8, 9))):
        with pytest.raises(InputError, match=r"\(8, 9\) and \(.*must be the same \(H, W\)"):
            metric(frame, other)
    with pytest.raises(InputError, match="both must be the same"):
        metric(frame[None], frame[None])


def test_ssim_needs_a_neighbourhood():
    with pytest.raises(InputError, match=r"\(6, 20\) pixels: both sides must be 7 or longer"):
        ssim(np.zeros((6, 20)), np.zeros((6, 20)))
