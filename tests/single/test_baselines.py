"""Baselines against interpolation matrices written down here and closed forms."""

import numpy as np
import pytest
import torch

from hpc_xvr.errors import InputError
from hpc_xvr.reconstruction.baselines import BASELINES, find_baseline

OFFSETS = torch.tensor([[-3.0, 17.0], [-15.0, 5.0], [-10.0, 10.0], [0.0, 20.0]])


def sample(scale: int = 4, lr_frames: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    b = len(OFFSETS)
    return {
        "lr": torch.rand(b, lr_frames, 1, 6, 9, generator=g, dtype=torch.float64),
        "hr": torch.rand(b, 2, 1, 6 * scale, 9 * scale, generator=g, dtype=torch.float64),
        "hr_offset": OFFSETS,
    }


def cubic_matrix(n: int, scale: int) -> np.ndarray:
    """(n*scale, n): Keys' cubic, a = -0.75, pixel centres half-way, edge pixels repeated."""

    def kernel(d: float, a: float = -0.75) -> float:
        d = abs(d)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    matrix = np.zeros((n * scale, n))
    for i in range(n * scale):
        at = (i + 0.5) / scale - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            matrix[i, min(max(j, 0), n - 1)] += kernel(at - j)
    return matrix


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    h, w = frames.shape[-2:]
    return cubic_matrix(h, scale) @ frames @ cubic_matrix(w, scale).T


def shrink(frames: np.ndarray, scale: int) -> np.ndarray:
    *rest, h, w = frames.shape
    return frames.reshape(*rest, h // scale, scale, w // scale, scale).mean((-3, -1))


def weights() -> np.ndarray:
    """Share of the later key frame: how far the centre lies on the way to it."""
    return np.array([3 / 20, 15 / 20, 10 / 20, 0.0]).reshape(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("lr_frames", [1, 3, 5])
def test_bicubic_enlarges_the_centre_frame(scale, lr_frames):
    s = sample(scale, lr_frames)
    middle = s["lr"].numpy()[:, [lr_frames // 2]]
    found = BASELINES["bicubic"](s)
    assert found.shape == (4, 1, 1, 6 * scale, 9 * scale)
    np.testing.assert_allclose(found, enlarge(middle, scale), rtol=0, atol=1e-12)


def test_nearest_takes_the_closer_key_frame_and_the_earlier_one_half_way():
    s = sample()
    expected = torch.stack([s["hr"][i, k] for i, k in enumerate((0, 1, 0, 0))]).unsqueeze(1)
    assert torch.equal(BASELINES["nearest_hr"](s), expected)


def test_linear_weighs_key_frames_by_distance():
    s = sample()
    first, second = s["hr"].numpy()[:, :1], s["hr"].numpy()[:, 1:]
    expected = first + weights() * (second - first)
    np.testing.assert_allclose(BASELINES["linear_hr"](s), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [2, 4])
def test_detail_adds_what_binning_took_from_the_key_frames(scale):
    s = sample(scale)
    hr = s["hr"].numpy()
    detail = hr - enlarge(shrink(hr, scale), scale)
    expected = enlarge(s["lr"].numpy()[:, 1:2], scale)
    expected = expected + detail[:, :1] + weights() * (detail[:, 1:] - detail[:, :1])
    np.testing.assert_allclose(BASELINES["detail"](s), expected, rtol=0, atol=1e-6)


def test_detail_restores_a_scene_that_stands_still():
    s = sample()
    s["hr"][:, 1] = s["hr"][:, 0]
    s["lr"] = torch.from_numpy(shrink(s["hr"].numpy()[:, [0, 0, 0]], 4))
    np.testing.assert_allclose(BASELINES["detail"](s), s["hr"][:, :1], rtol=0, atol=1e-6)


def test_every_method_can_be_found_and_explained():
    assert list(BASELINES) == ["bicubic", "nearest_hr", "linear_hr", "detail", "adaptive", "bayes"]
    for name, baseline in BASELINES.items():
        assert find_baseline(name) is baseline
        assert 10 < len(baseline.description) < 80 and "\n" not in baseline.description
    assert len({baseline.description for baseline in BASELINES.values()}) == len(BASELINES)
    with pytest.raises(InputError) as error:
        find_baseline("lanczos")
    assert str(error.value) == (
        "unknown method 'lanczos': choose from bicubic, nearest_hr, linear_hr, detail, "
        "adaptive, bayes"
    )
