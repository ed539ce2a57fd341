"""What benchmarks/realism.py measures, on frames whose noise and spectrum are known."""

import numpy as np
import pytest

import realism


@pytest.fixture
def wedge():
    """(20, 240, 240): photon noise, 4,000 at level 1, on grey steps."""
    level = np.repeat(np.linspace(0.1, 1.0, 10), 24)
    still = np.tile(level, (240, 1))
    return np.random.default_rng(0).poisson(still * 4000, (20, 240, 240)) / 4000


def test_noise_is_found_at_its_level_in_space_and_in_time(wedge):
    expected = np.sqrt(realism.LEVELS / 4000)
    for found, tolerance in (
        (realism.noise_in_space(wedge[0]), 0.2),
        (realism.noise_in_time(wedge), 0.3),  # the quietest fifth of pixels, 19 differences each
    ):
        there = np.isfinite(found)
        assert there.sum() >= 10
        np.testing.assert_allclose(found[there], expected[there], rtol=tolerance)
        assert realism.slope(found) == pytest.approx(0.5, abs=0.06)


def test_the_spectrum_of_white_noise_is_flat_at_its_variance():
    frame = np.random.default_rng(1).normal(1, 0.1, (256, 300))
    np.testing.assert_allclose(realism.spectrum(frame)[1:], 10 * np.log10(0.01), atol=1.0)
    assert realism.spectrum(frame).shape == (realism.BINS,)


def test_equal_frames_have_no_distance():
    frames = [1 + 0.1 * np.random.default_rng(s).normal(size=(240, 240)) for s in (1, 2)]
    same = realism.merits("x", frames, frames)
    assert same["x_spectrum_rms_db"] == 0 and same["x_grey_level_distance"] == 0
    assert same["x_noise_ratio"] == 1
    louder = realism.merits("x", frames, [1 + 2 * (f - 1) for f in frames])
    assert louder["x_spectrum_rms_db"] == pytest.approx(20 * np.log10(2), abs=0.1)


def test_the_real_frames_can_be_read(realdata, monkeypatch):
    monkeypatch.setattr(realism, "REAL", realdata("tomobank_xfusion_png").parent)
    for kind in realism.KINDS.values():
        for name in kind.real:
            frame = realism.real_frame(name)
            assert frame.ndim == 2 and np.isfinite(frame).all() and frame.max() > 0.5
