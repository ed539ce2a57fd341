"""Two cameras that show the same are told from two that do not, and their greys are matched."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, shift

from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.pairing.agreement import Grey, compare, grey_of
from hpc_xvr.evaluate.result import open_result

GAP = 4


def moving(frames: int = 17, side: int = 64, speed: float = 2.0, grain: float = 2.0) -> np.ndarray:
    """A textured scene (T, side, side) in 0.1..0.9 that drifts `speed` pixels a frame to the
    right."""
    rng = np.random.default_rng(3)
    wide = gaussian_filter(rng.standard_normal((side, side + int(speed * frames) + 1)), grain)
    wide = 0.1 + 0.8 * (wide - wide.min()) / np.ptp(wide)
    starts = [int(speed * (frames - 1 - t)) for t in range(frames)]
    return np.stack([wide[:, s : s + side] for s in starts]).astype(np.float32)


def both(scene: np.ndarray, gap: int = GAP) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    return bin_down(scene, 4), {t: scene[t] for t in range(0, len(scene), gap)}


@pytest.mark.parametrize("size", [(1, 9), (9, 1), (2, 2), (3, 40)])
def test_of_frames_of_a_few_pixels_nothing_is_said(size):
    frames = np.random.default_rng(0).random((9, *(4 * n for n in size)), np.float32)
    assert compare(*both(frames)) is None


def test_what_belongs_together_fits():
    fast, keys = both(moving())
    found = compare(fast, keys)
    assert found.correlation > 0.999
    assert found.grey.gain == pytest.approx(1, abs=1e-3)
    assert found.grey.offset == pytest.approx(0, abs=1e-3)
    assert found.shift == pytest.approx((0, 0), abs=0.02)
    assert not any(lag for _, lag in found.lags)
    assert not found.turned


@settings(deadline=None, max_examples=60)
@given(
    gain=st.floats(0.05, 2),
    offset=st.floats(-0.05, 0.05),
    photons=st.sampled_from([None, 1e3, 1e5]),
    lag=st.integers(-3, 3),
)
def test_gain_offset_and_lag_are_found(gain, offset, photons, lag):
    scene = moving(25)
    fast, keys = bin_down(scene, 4), {t: scene[t + lag] for t in range(4, 21, GAP)}
    if photons:
        fast = np.random.default_rng(1).poisson(fast * photons) / photons
    found = compare((gain * fast + offset).astype(np.float32), keys)
    if not lag:
        assert found.grey.gain == pytest.approx(gain, rel=0.03)
        assert found.grey.offset == pytest.approx(offset, abs=0.02)
    assert {lag for _, lag in found.lags} == {lag}


@pytest.mark.parametrize(
    ("way", "name"),
    [
        (np.s_[:, ::-1], "upside down"),
        (np.s_[:, :, ::-1], "mirrored left to right"),
        (np.s_[:, ::-1, ::-1], "turned by 180 degrees"),
    ],
)
def test_a_turned_picture_is_recognised(way, name):
    fast, keys = both(moving())
    assert compare(fast[way], keys).turned == name


def test_shifts_are_measured():
    fast, keys = both(moving(speed=0, side=128, grain=6))
    for by in ((0.6, -0.3), (2.0, 1.0), (-3.4, 0.7)):
        moved = np.stack([shift(frame, by, order=3, mode="nearest") for frame in fast])
        assert compare(moved, keys).shift == pytest.approx(by, abs=0.25)


def test_blur_is_not_taken_for_a_gain():
    fast, keys = both(moving(speed=0, side=128, grain=4))
    for sigma in (0.4, 0.6, 1.0, 1.5):
        found = compare(gaussian_filter(fast, (0, sigma, sigma), mode="nearest"), keys)
        assert found.grey.gain == pytest.approx(1, abs=0.06)
        assert grey_of(found, "shot") == Grey()


def test_dead_pixels_and_zingers_do_not_change_the_grey():
    fast, keys = both(moving(speed=0, side=128, grain=6))
    spoilt = 0.8 * fast + 0.05
    spoilt[:, 5] = 0
    spoilt[:, 20, 20] = 40
    found = compare(spoilt, keys)
    assert found.grey.gain == pytest.approx(0.8, abs=0.02)
    assert found.grey.offset == pytest.approx(0.05, abs=0.02)


def test_a_plain_ramp_tells_nothing_of_a_shift():
    y, x = np.mgrid[:32, :48]
    scene = np.stack([0.2 + 0.01 * y + 0.005 * x] * 9).astype(np.float32)
    fast, keys = both(scene)
    assert compare(fast, keys).shift == (0, 0)
    assert compare(fast * 0 + 0.5, {0: np.full((32, 48), 0.5)}) is None


def test_matching_undoes_gain_and_offset():
    frame = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    assert np.allclose(Grey(0.5, 0.1).matched(0.5 * frame + 0.1), frame, atol=1e-6)


@pytest.mark.parametrize("bright", [1, 0.1, 0.005])
@pytest.mark.parametrize(
    ("gain", "offset", "photons", "matched"),
    [
        (1.1, -0.1, None, True),
        (1.0, 0.03, None, True),
        (1.1, -0.1, 200, True),  # uncertain, and told
        (1.0, 0.0, None, False),
        (1.02, -0.01, None, False),
        (1.0, 0.01, 200, False),
    ],
)
def test_greys_are_judged_alike_in_dark_and_bright_recordings(
    bright, gain, offset, photons, matched, caplog
):
    """10-bit counts in 16 bit are all dark."""
    fast, keys = both(moving())
    fast = gain * fast + offset
    if photons:
        fast = fast + np.random.default_rng(1).normal(0, photons**-0.5, fast.shape)
    found = compare(
        (bright * fast).astype(np.float32), {t: bright * key for t, key in keys.items()}
    )
    grey = grey_of(found, "a pair")
    assert (grey != Grey() or "not certain" in caplog.text) == matched
    if matched and not photons:
        assert grey.gain == pytest.approx(gain, rel=0.01)
        assert grey.offset == pytest.approx(bright * offset, abs=0.003 * bright)


def reconstruct(hpc_xvr, folder, fast, keys, *options, code=0):
    """Write both cameras' files and reconstruct: the result in the unit that it states (None if it
    was refused), and what was said there and on stderr."""
    for name, frames in (("fast", fast), ("sharp", keys)):
        tifffile.imwrite(folder / f"{name}.tif", frames, photometric="minisblack")
    out = folder / "out.tif"
    said = hpc_xvr(
        *("reconstruct", "linear_hr", "--lr", folder / "fast.tif", "--hr", folder / "sharp.tif"),
        *("--gap", GAP, "--out", out, *options),
        code=code,
    )
    if code:
        assert not out.exists()
        return None, said.err
    with tifffile.TiffFile(out) as file:
        info = file.imagej_metadata["Info"]
        white = float(re.search(r"value of 65535: (\S+)", info)[1])
        return file.asarray() / 65535 * white, info + said.err


def as_counts(frames: np.ndarray, top: int) -> np.ndarray:
    return np.rint(frames * top).astype(np.uint16)


def test_floats_of_two_maxima_keep_their_values(hpc_xvr, tmp_path):
    scene = moving(speed=0)[:9] * 3
    fast, keys = bin_down(scene, 4), scene[::GAP]
    result, said = reconstruct(hpc_xvr, tmp_path, fast, keys)
    assert np.allclose(result, scene, atol=1e-3)
    assert "brought to" not in said


def test_a_fast_camera_of_fewer_bits_is_brought_to_the_sharp_ones_grey(hpc_xvr, tmp_path):
    scene = moving(speed=0)[:9]
    fast, keys = as_counts(bin_down(scene, 4), 4095), as_counts(scene[::GAP], 65535)
    _, said = reconstruct(hpc_xvr, tmp_path, fast, keys)
    assert "brought to the sharp camera's grey scale" in said
    assert "--lr-bit-depth" in said


def test_matched_greys_make_frames_between_keys_right(hpc_xvr, tmp_path):
    scene = moving(speed=0)[:9]
    fast = as_counts(0.5 * bin_down(scene, 4) + 0.1, 65535)
    keys = as_counts(scene[::GAP], 65535)
    for options, factor, offset in (
        ((), 1, 0),
        (("--match-grey", "off"), 0.5, 0.1),
        (("--match-grey", "0.5,0.1"), 1, 0),
    ):
        write_out = tmp_path / "o.tif"
        tifffile.imwrite(tmp_path / "f.tif", fast, photometric="minisblack")
        tifffile.imwrite(tmp_path / "s.tif", keys, photometric="minisblack")
        hpc_xvr(
            *("reconstruct", "bicubic", "--lr", tmp_path / "f.tif", "--hr", tmp_path / "s.tif"),
            *("--gap", GAP, "--out", write_out, *options),
        )
        between = tifffile.imread(write_out)[2] / 65535
        assert between.mean() == pytest.approx(factor * scene.mean() + offset, abs=2e-3)
        text = tifffile.TiffFile(write_out).imagej_metadata["Info"]
        assert ("grey of the fast camera matched" in text) == ("off" not in options)
    grey = open_result(write_out).material.lr[1].mean()  # as the page reads it again
    assert grey == pytest.approx(scene.mean(), abs=2e-3)
    for wrong in ("on", "0,1", "1,nan", "1"):
        said = hpc_xvr(
            *("reconstruct", "bicubic", "--lr", tmp_path / "f.tif", "--hr", tmp_path / "s.tif"),
            *("--gap", GAP, "--out", write_out, "--match-grey", wrong),
            code=2,
        )
        assert "give auto, off, or GAIN,OFFSET" in said.err


def test_a_mirrored_camera_is_refused(hpc_xvr, tmp_path):
    scene = moving()
    fast, keys = bin_down(scene, 4)[:, ::-1], scene[::GAP]
    _, said = reconstruct(hpc_xvr, tmp_path, fast, keys, code=2)
    assert "upside down" in said
    assert "--lr-flip-rows" in said
    assert len(said.strip().splitlines()) == 1


def test_a_negative_is_refused(hpc_xvr, tmp_path):
    scene = moving()
    _, said = reconstruct(hpc_xvr, tmp_path, 1 - bin_down(scene, 4), scene[::GAP], code=2)
    assert "negative" in said


def forced(hpc_xvr, folder, fast, keys, *options):
    """What is said of cameras that do not agree, which only --force accepts."""
    _, said = reconstruct(hpc_xvr, folder, fast, keys, *options, code=2)
    refused = said.partition("hpc-xvr: error: ")[2]
    assert refused.endswith(", or try with --force\n") and refused.count("\n") == 1
    refused = refused.removesuffix(", or try with --force\n")
    _, said = reconstruct(hpc_xvr, folder, fast, keys, *options, "--force")
    assert f"{refused}: look at the result with care" in said
    (folder / "out.tif").unlink()
    return refused


def test_a_wrong_start_and_a_wrong_gap_are_refused(hpc_xvr, tmp_path):
    scene = moving(33, speed=1.5, grain=4)
    said = forced(hpc_xvr, tmp_path, bin_down(scene[2:], 4), scene[:29:GAP])
    assert "check --lr-start" in said
    said = forced(hpc_xvr, tmp_path, bin_down(scene, 4), scene[: 31 : GAP + 1])
    assert "--gap of about 5 instead of 4" in said


def test_a_shift_is_refused(hpc_xvr, tmp_path):
    scene = moving(17, speed=0, side=128, grain=6)
    moved = np.roll(scene, (8, -4), (1, 2))
    said = forced(hpc_xvr, tmp_path, bin_down(moved, 4), scene[::GAP])
    rows, columns = map(float, re.search(r"lies (\S+) rows and (\S+) columns", said).groups())
    assert (rows, columns) == pytest.approx((2, -1), abs=0.3)
    _, said = reconstruct(hpc_xvr, tmp_path, bin_down(np.roll(scene, 3, 2), 4), scene[::GAP])
    assert "lies" in said and "columns of fast pixels beside" in said
    keys = scene[::GAP].copy()
    keys[2] = np.roll(keys[2], 40, 1)  # one of five
    reconstruct(hpc_xvr, tmp_path, bin_down(scene, 4), keys)


def test_strangers_are_refused_unless_it_may_be_noise(hpc_xvr, tmp_path):
    scene = moving(17, speed=0, side=128, grain=6)
    other = bin_down(np.transpose(scene, (0, 2, 1)), 4)
    assert "although they resemble each other" in forced(hpc_xvr, tmp_path, other, scene[::GAP])
    strange = np.random.default_rng(5).uniform(0, 1, scene.shape).astype(np.float32)
    _, said = reconstruct(hpc_xvr, tmp_path, bin_down(strange, 4), scene[::GAP])
    assert "hardly resemble the sharp ones" in said
    noisy = bin_down(scene, 4)
    noisy = noisy + np.random.default_rng(5).normal(0, 2.5 * noisy.std(), noisy.shape)
    _, said = reconstruct(hpc_xvr, tmp_path, noisy.astype(np.float32) + 1, scene[::GAP] + 1)
    assert "noise, or do the two recordings not belong together" in said


def test_an_overlap_too_small_to_compare_is_no_crash(hpc_xvr, tmp_path):
    scene = moving(9, speed=0)
    where = "{scale: 4, origin: [60, 0]}"
    options = "--registration", where, "--crop"
    result, _ = reconstruct(hpc_xvr, tmp_path, bin_down(scene, 4), scene[::GAP], *options)
    assert result.shape == (9, 4, 64)


def test_greys_that_change_from_key_to_key_are_left_alone(hpc_xvr, tmp_path):
    scene = moving(17, speed=0, side=128, grain=6)
    gain = np.linspace(0.4, 0.9, len(scene), dtype=np.float32)[:, None, None]
    _, said = reconstruct(hpc_xvr, tmp_path, gain * bin_down(scene, 4), scene[::GAP])
    assert "this is not certain" in said
    assert "brought to" not in said and "matched" not in said


def test_greys_that_are_far_apart_but_not_certain_are_refused(hpc_xvr, tmp_path):
    scene = moving(17, speed=0)
    noise = np.random.default_rng(1).normal(0, 0.2, (17, 16, 16)).astype(np.float32)
    fast = as_counts(np.clip(bin_down(scene, 4) + noise, 0, 1), 65535)
    keys = as_counts(scene[::GAP], 4095)
    _, said = reconstruct(hpc_xvr, tmp_path, fast, keys, code=2)
    assert "differ by a factor of about 1" in said and "--hr-bit-depth" in said
    reconstruct(hpc_xvr, tmp_path, fast, keys, "--match-grey", "off")


def test_dead_pixels_do_not_make_greys_uncertain(hpc_xvr, tmp_path):
    scene = moving(17, speed=0)
    fast = bin_down(scene, 4) / 4
    fast[:, :, 5] = 0
    keys = as_counts(scene[::GAP], 65535)
    _, said = reconstruct(hpc_xvr, tmp_path, as_counts(fast, 65535), keys)
    assert "fast = 0.25 x sharp" in said and "brought to" in said


def test_frames_without_a_picture_are_told(hpc_xvr, tmp_path):
    scene = moving(17)
    fast, keys = bin_down(scene, 4), scene[::GAP].copy()
    fast[6] = 0
    _, said = reconstruct(hpc_xvr, tmp_path, fast, keys)
    assert "frame 6 of the fast camera: all its pixels are 0 of full scale" in said


def test_a_stated_grey_that_key_frames_contradict_is_told(hpc_xvr, tmp_path):
    scene = moving(17)
    cameras = 0.5 * bin_down(scene, 4), scene[::GAP]
    white = "--lr-full-scale", 1, "--hr-full-scale", 1
    _, said = reconstruct(hpc_xvr, tmp_path, *cameras, *white, "--match-grey", "0.5,0.01")
    assert "--match-grey states" not in said
    for stated in ("0.7,0", "0.5,0.1"):
        _, said = reconstruct(hpc_xvr, tmp_path, *cameras, *white, "--match-grey", stated)
        assert "but the key frames say 0.5 x sharp" in said


def test_pixel_sizes_that_contradict_the_scale_are_told(hpc_xvr, tmp_path):
    cameras = bin_down(moving(17), 4), moving(17)[::GAP]
    for size, wrong in ((8.5, False), (2, True)):
        sizes = "--lr-pixel-size", size, "--hr-pixel-size", 2
        _, said = reconstruct(hpc_xvr, tmp_path, *cameras, *sizes)
        assert ("a fast pixel is 1 sharp ones wide, but it is 4" in said) == wrong


def test_a_lost_key_frame_is_refused(hpc_xvr, tmp_path):
    scene = moving(17)
    keys = scene[::GAP].copy()
    keys[2] = 0.5
    _, said = reconstruct(hpc_xvr, tmp_path, bin_down(scene, 4), keys, code=2)
    assert "the key frame at frame 8: all its pixels are 0.5" in said


@pytest.mark.parametrize("camera", ["fast", "sharp"])
@pytest.mark.parametrize("level", [0, 700])
def test_a_camera_that_saw_nothing_is_refused(hpc_xvr, tmp_path, camera, level):
    fast, keys = (as_counts(x, 65535) for x in (bin_down(moving(17), 4), moving(17)[::GAP]))
    (fast if camera == "fast" else keys)[:] = level
    _, said = reconstruct(hpc_xvr, tmp_path, fast, keys, code=2)
    assert re.search(f"{camera}.tif: all pixels are equal, in each of . frames", said)
    if not level:
        fast[:], keys[:] = 0, 0
        _, said = reconstruct(hpc_xvr, tmp_path, fast, keys, code=2)
        assert "all pixels are equal" in said


def test_a_log_is_not_flooded_by_many_lost_frames(hpc_xvr, tmp_path):
    fast = bin_down(moving(41), 4)
    fast[np.arange(41) % GAP > 0] = 0
    _, said = reconstruct(hpc_xvr, tmp_path, fast, moving(41)[::GAP])
    assert said.count("was it lost") == 9
    assert said.count("Further ones are not listed") == 1


def test_a_gap_that_pictures_and_rates_contradict_is_refused(hpc_xvr, tmp_path):
    scene = moving(41)
    rates = "--lr-frame-rate", 12e3, "--hr-frame-rate", 4e3
    fast, keys = bin_down(scene, 4), scene[:31:3]  # as the rates say, but GAP is stated
    said = forced(hpc_xvr, tmp_path, fast, keys, *rates)
    assert "instead of 4 would explain it; the frame rates, too, say 3" in said
    # the rates alone may be wrong
    _, said = reconstruct(hpc_xvr, tmp_path, fast, scene[::GAP], *rates)
    assert "one is wrong" in said


def test_saturated_cameras_are_told(hpc_xvr, tmp_path):
    scene = moving(17)
    fast = as_counts(bin_down(scene, 4), 65535)
    keys = as_counts(np.minimum(2 * scene[::GAP], 1), 65535)
    _, said = reconstruct(hpc_xvr, tmp_path, fast, keys)
    assert re.search(r"sharp.tif: \S+ % of the pixels are 65535.*saturated", said)
    _, said = reconstruct(hpc_xvr, tmp_path, fast, as_counts(scene[::GAP], 65535))
    assert "largest count" not in said
