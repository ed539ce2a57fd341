"""Two cameras are registered from what both saw, or refused."""

import math
import re
import shlex

import numpy as np
import pytest
import tifffile
import yaml
from click.testing import CliRunner
from scipy.ndimage import gaussian_filter, map_coordinates

import hpc_xvr as xvr
from hpc_xvr.cli import cli
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.pairing.joining import Pairing, joined
from hpc_xvr.data.registering.movie import steady
from hpc_xvr.data.registering.register import registered
from hpc_xvr.data.registering.timing import Clock
from hpc_xvr.data.registration import Registration, Sizes, Timing, read_registration
from hpc_xvr.errors import InputError

FAST, SHARP = (56, 80), (190, 250)
TRUTH = Registration(scale=3.3, origin=(12.5, -9.25), rotation_deg=2.2, flip="columns")
WAYS = {
    "none": (1, 1),
    "rows": (-1, 1),
    "columns": (1, -1),
    "both": (-1, -1),
}


class Scene:
    """Discs at rest, and discs that move, on a world that is larger than both fields of view."""

    pad = 40

    def __init__(self, seed: int, moving: bool = True) -> None:
        rng = np.random.default_rng(seed)
        self.shape = (SHARP[0] + 2 * self.pad, SHARP[1] + 2 * self.pad)
        n = 120
        self.at = rng.uniform(0, 1, (n, 2)) * self.shape
        self.radius = rng.uniform(2, 7, n)
        self.depth = rng.uniform(0.05, 0.25, n)
        speed = rng.uniform(1, 4, (n, 2)) * rng.choice([-1, 1], (n, 2))
        self.speed = speed * (np.arange(n) % 2)[:, None] * moving
        self.rows, self.columns = np.indices(self.shape, np.float32) + 0.5

    def light(self, t: float) -> np.ndarray:
        out = np.full(self.shape, 0.8, np.float32)
        for (r, c), radius, depth in zip(
            (self.at + t * self.speed) % self.shape, self.radius, self.depth, strict=True
        ):
            away = np.hypot(self.rows - r, self.columns - c) - radius
            out -= depth * np.clip(0.5 - away / 2, 0, 1)
        return np.maximum(out, 0.05)

    def sharp(self, t: float) -> np.ndarray:
        inner = self.light(t)[self.pad : -self.pad, self.pad : -self.pad]
        noise = np.random.default_rng(int(1000 * t) + 7).normal(0, 0.01, inner.shape)
        return np.clip(np.rint(4095 * (inner + noise)), 0, 4095).astype(np.uint16)

    def fast(self, t: float, truth: Registration = TRUTH) -> np.ndarray:
        """Other gain, offset, blur and noise than the sharp camera's."""
        rows, columns = (n.ravel() + 0.5 for n in np.indices(FAST))
        at = truth.to_hr(np.stack([rows, columns], 1)).T.reshape(2, *FAST) + self.pad - 0.5
        smooth = gaussian_filter(self.light(t), truth.scale * math.hypot(0.29, 0.6))
        down, right = WAYS[truth.flip]
        seen = map_coordinates(smooth, at, order=1, mode="nearest")[::down, ::right]
        noise = np.random.default_rng(int(1000 * t) + 3).normal(0, 0.01, FAST)
        return np.clip(np.rint(1023 * (0.6 * seen + 0.15 + noise)), 0, 1023).astype(np.uint16)


def recordings(sharp, fast, rates=(None, None)):
    return (
        xvr.open_recording(sharp, bit_depth=12, frame_rate_hz=rates[1]),
        xvr.open_recording(fast, bit_depth=10, frame_rate_hz=rates[0]),
    )


def shot(seed=1, gap=4.3, start=0.6, keys=5, bend=0.0, speed=1.0):
    """Sharp frame k is taken at fast frame start + gap k + bend k^2."""
    scene = Scene(seed)
    scene.speed = scene.speed * speed
    at = start + gap * np.arange(keys) + bend * np.arange(keys) ** 2
    sharp = np.stack([scene.sharp(t) for t in at])
    return sharp, np.stack([scene.fast(t) for t in range(math.ceil(at[-1]) + 2)])


@pytest.fixture(scope="module")
def frames():
    return shot()


@pytest.fixture(scope="module")
def files(frames, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shot")
    for name, stack in zip(("sharp.tif", "fast.tif"), frames, strict=True):
        tifffile.imwrite(folder / name, stack)
    return folder


def aside(found: Registration, truth: Registration) -> float:
    """Fast pixels between two registrations, at the worst of 5 x 5 places."""
    places = np.stack([n.ravel() for n in np.meshgrid(*(np.linspace(0, n, 5) for n in FAST))], 1)
    return float(np.linalg.norm(found.to_hr(places) - truth.to_hr(places), axis=1).max()) / (
        truth.scale
    )


def command(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def refused(*words) -> str:
    result = command(*words)
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


@pytest.mark.parametrize("rates", [(4.3e4, 1e4), (None, None)])
def test_place_and_clock_are_found_with_and_without_frame_rates(frames, rates):
    found = registered(*recordings(*frames, rates)).registration
    assert found.flip == TRUTH.flip and aside(found, TRUTH) < 0.1
    assert found.found["corner_deviation_lr_px"] < 0.1 and found.found["score"] > 0.7
    assert found.time is not None
    mine = (np.arange(5) - found.time.lr_start) * found.time.gap
    np.testing.assert_allclose(mine, 0.6 + 4.3 * np.arange(5), atol=0.1)


def instants(found: Registration, keys: int) -> np.ndarray:
    """Fast frames at which sharp ones were taken, by a registration."""
    assert found.time is not None
    return Clock(found.time.gap, found.time.lr_start, found.time.drift).of_sharp(np.arange(keys))


def test_slow_motion_and_dust_on_one_camera_bias_neither_clock_nor_place():
    sharp, fast = shot(seed=5, keys=6, speed=0.3)
    fast = fast.copy()
    dust = np.random.default_rng(0).integers(0, FAST[0] * FAST[1], 40)
    fast.reshape(len(fast), -1)[:, dust] -= 60  # of 1023, a third of the scene's contrast
    found = registered(*recordings(sharp, fast, (4.3e4, 1e4))).registration
    truth = 0.6 + 4.3 * np.arange(6)
    aside_by = np.abs(instants(found, 6) - truth).max()
    assert aside_by < 0.1 and aside(found, TRUTH) < 0.05
    assert aside_by < 4 * found.found["time_deviation_lr_frames"] < 0.4


def noisy(fast: np.ndarray, counts: float) -> np.ndarray:
    noise = np.random.default_rng(5).normal(0, counts, fast.shape)
    return np.clip(np.rint(fast + noise), 0, 1023).astype(np.uint16)


def test_slow_motion_in_noise_still_tells_the_clock():
    sharp, fast = shot(keys=7, gap=5.3, speed=0.12)  # a fast pixel in 7 to 27 frames
    found = registered(*recordings(sharp, noisy(fast, 15), (5.3e4, 1e4))).registration
    aside_by = np.abs(instants(found, 7) - (0.6 + 5.3 * np.arange(7))).max()
    assert aside_by < 0.1 and aside_by < 3 * found.found["time_deviation_lr_frames"] < 0.3


def test_a_place_is_found_from_structure_of_two_fast_pixels():
    """The coarse grid, 56 pixels wide, shows nothing of it; the fast frame has 80."""
    scene = Scene(1, moving=False)
    rng = np.random.default_rng(3)
    axes = (np.fft.fftfreq(side) for side in scene.shape)
    waves = np.hypot(*np.meshgrid(*axes, indexing="ij")) * TRUTH.scale
    grain = np.fft.fft2(rng.normal(size=scene.shape)) * ((waves > 1 / 2.2) & (waves < 1 / 2.02))
    grain = np.real(np.fft.ifft2(grain))
    scene.light = lambda t: np.clip(0.5 + 0.15 * grain / grain.std(), 0.05, 1)
    fast = noisy(scene.fast(0)[None], 10)
    found = registered(*recordings(scene.sharp(0)[None], fast)).registration
    assert found.flip == TRUTH.flip and aside(found, TRUTH) < 0.2


def test_a_drift_of_the_clock_is_found():
    sharp, fast = shot(keys=7, gap=3, bend=0.05)
    found = registered(*recordings(sharp, fast)).registration
    truth = 0.6 + 3 * np.arange(7) + 0.05 * np.arange(7) ** 2
    np.testing.assert_allclose(instants(found, 7), truth, atol=0.1)


def drifting(noise, still):
    """Sharp frames (one in 8) and fast ones of a texture that drifts 2 sharp pixels a frame, before
    one that stands still."""
    rng = np.random.default_rng(0)
    field, before = (gaussian_filter(rng.random((128, 400)), 2, mode="wrap") for _ in range(2))
    light = np.stack([field[:, 2 * t : 2 * t + 192] for t in range(97)])
    light = light + still * before[:, :192]
    light = (light - light.min()) / np.ptp(light)
    fast = bin_down(light.astype(np.float32), 4) + rng.normal(0, noise, (97, 32, 48))
    return (
        np.rint(4095 * light[::8]).astype(np.uint16),
        np.clip(np.rint(1023 * fast), 0, 1023).astype(np.uint16),
    )


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_where_all_moves_alike_place_and_time_are_not_guessed(noise):
    """It was found 16 sharp pixels and 8 fast frames aside, as if it were certain."""
    with pytest.raises(InputError, match="all that both saw moves alike"):
        registered(*recordings(*drifting(noise, 0)))


def test_something_still_tells_place_and_time_apart():
    found = registered(*recordings(*drifting(0.01, 1))).registration
    assert aside(found, Registration(scale=4)) < 0.1
    np.testing.assert_allclose(instants(found, 13), 8 * np.arange(13), atol=0.15)


def test_motion_that_fits_no_clock_leaves_the_time_open(frames, caplog):
    sharp, fast = frames
    backwards = fast[::-1]
    found = registered(*recordings(sharp, backwards, (4.3e4, 1e4))).registration
    assert found.time is None and aside(found, TRUTH) < 0.3
    assert "when the fast camera started is not known" in caplog.text


def test_a_gap_that_motion_contradicts_gives_way_and_is_said(caplog):
    found = registered(*recordings(*shot(keys=9, gap=3), (3.03e4, 1e4))).registration
    np.testing.assert_allclose(instants(found, 9), 0.6 + 3 * np.arange(9), atol=0.1)
    assert "fast frames a sharp one by what moves, 3.03 by the frame rates" in caplog.text


def test_a_clock_is_the_inverse_of_the_instants_it_was_made_from():
    k = np.arange(8)
    for bend in (0.0, 0.05):
        at = 1.5 + 4 * k + bend * k**2
        clock = Clock.of_instants(k, at, 2 if bend else 1)
        assert clock is not None and (clock.drift < 0) == (bend > 0)
        np.testing.assert_allclose(clock.of_sharp(k), at, atol=0.05 if bend else 1e-9)
        np.testing.assert_allclose(clock.of_fast(clock.of_sharp(k)), k, atol=1e-9)
    assert Clock.of_instants(k, 1.5 - 4.0 * k, 1) is None


def test_instants_that_no_clock_tells_give_none():
    """Not a drift that the file of a registration refuses."""
    k = np.arange(8)
    for bend, is_clock in ((-0.08, True), (-0.25, False)):
        clock = Clock.of_instants(k, 1.5 + 4 * k + bend * k**2, 2)
        assert (clock is not None) is is_clock
        if clock is not None:
            Timing(gap=clock.gap, lr_start=clock.start, drift=clock.drift)


@pytest.mark.parametrize("flip", ["none", "rows", "both"])
def test_any_flip_scale_and_partial_overlap_of_a_still_scene(flip):
    truth = Registration(scale=2.6, origin=(31, 70), rotation_deg=-4, flip=flip)
    scene = Scene(3, moving=False)
    fast = np.stack([scene.fast(t, truth) for t in (0, 1)])
    found = registered(*recordings(scene.sharp(0)[None], fast)).registration
    assert found.flip == flip and aside(found, truth) < 0.1
    assert found.time is None  # nothing moves: the start is not guessed


def test_another_recording_and_noise_are_refused(frames):
    sharp, fast = frames
    with pytest.raises(InputError, match="no place is convincing"):
        registered(*recordings(sharp, shot(seed=2)[1]))
    noise = np.random.default_rng(0).integers(100, 900, fast.shape).astype(np.uint16)
    with pytest.raises(InputError, match="no place is convincing"):
        registered(*recordings(sharp, noise))


def test_swapped_cameras_are_named(frames):
    sharp, fast = frames
    with pytest.raises(InputError, match="are the two files swapped"):
        registered(xvr.open_recording(fast, bit_depth=10), xvr.open_recording(sharp, bit_depth=12))


@pytest.mark.parametrize("which", ["sharp", "fast"])
@pytest.mark.parametrize(
    ("value", "says"), [(0, "one value everywhere, 0"), (37, "one value everywhere, 37")]
)
def test_dark_and_constant_recordings_are_refused(frames, which, value, says):
    stacks = dict(zip(("sharp", "fast"), frames, strict=True))
    stacks[which] = np.full_like(stacks[which], value)
    with pytest.raises(InputError, match=says):
        registered(*recordings(stacks["sharp"], stacks["fast"]))


def test_saturated_frames_are_left_out_or_refused(frames, caplog):
    sharp, fast = (stack.copy() for stack in frames)
    fast[3, :50] = 1023
    found = registered(*recordings(sharp, fast, (4.3e4, 1e4))).registration
    assert aside(found, TRUTH) < 0.1
    assert "frame 3 is saturated" in caplog.text
    fast[:, :50] = 1023
    with pytest.raises(InputError, match="is saturated, and so on for all"):
        registered(*recordings(sharp, fast))


def test_the_command_writes_a_file_that_reconstruct_takes(files, tmp_path):
    out = tmp_path / "cameras.yaml"
    names = files / "fast.tif", files / "sharp.tif"
    depths = ("--lr-bit-depth", 10, "--hr-bit-depth", 12)
    result = command("register", *names, "--gap", 4.3, "--out", out, *depths)
    assert result.exit_code == 0, result.output
    assert out.with_suffix(".png").stat().st_size > 10_000
    found = read_registration(str(out))
    assert found.made_for == Sizes(lr=FAST, hr=SHARP)
    assert found.time is not None and aside(found, TRUTH) < 0.1
    assert found.found["lr"].endswith("fast.tif") and "hpc_xvr" in found.found["made_by"]
    movie = tmp_path / "movie.tif"
    result = command(
        *("reconstruct", "bayes", "--lr", names[0], "--hr", names[1], *depths),
        *("--registration", out, "--crop", "--out", movie),
    )
    assert result.exit_code == 0, (result.output, result.exception)
    made = tifffile.imread(movie)
    assert len(made) == 18 and made.shape[1] % 3 == 0  # fast frames 1 to 18
    scene, white = Scene(1), float(made.max())
    cut = joined(
        *recordings(*map(tifffile.imread, names[::-1])), Pairing(registration=found), 3, crop=True
    ).origin["hr_cut_from"]
    top, left = (Scene.pad + n for n in cut[1:])
    truth = scene.light(8)[top : top + made.shape[1], left : left + made.shape[2]]
    assert np.corrcoef(made[7].ravel() / white, truth.ravel())[0, 1] > 0.8


def test_the_command_that_it_names_next_works_as_it_is(files, tmp_path, hpc_xvr, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = files / "fast.tif", files / "sharp.tif"
    depths = ("--lr-bit-depth", 10, "--hr-bit-depth", 12)
    said = hpc_xvr("register", *names, "--gap", 4.3, "--out", "cameras.yaml", *depths)
    (follows,) = re.findall(r"next: hpc-xvr (.*)", said.err)
    assert "--gap" not in follows  # found, and more exactly
    hpc_xvr(*shlex.split(follows.replace("builtin", "bayes")), "--frames", "2:4")
    assert (tmp_path / "MOVIE.tif").exists()
    for name, path in zip(("fast", "sharp"), names, strict=True):
        tifffile.imwrite(f"{name}.tif", tifffile.imread(path)[0], photometric="minisblack")
    said = hpc_xvr("register", "fast.tif", "sharp.tif", "--out", "one.yaml", *depths)
    assert "next:" not in said.err and "one sharp frame makes no movie" in said.out


def test_a_registration_of_other_sizes_is_refused(files, tmp_path):
    where = tmp_path / "r.yaml"
    words = (
        "reconstruct",
        "bayes",
        "--lr",
        files / "fast.tif",
        "--hr",
        files / "sharp.tif",
        "--crop",
        "--out",
        tmp_path / "m.tif",
        "--registration",
        where,
        "--gap",
        4,
    )
    other = TRUTH.model_copy(update={"made_for": Sizes(lr=(250, 400), hr=(800, 1280))})
    where.write_text(yaml.safe_dump(other.model_dump(mode="json")))
    assert "was made for 250x400 fast and 800x1280 sharp pixels" in refused(*words)
    turned = TRUTH.model_copy(update={"made_for": Sizes(lr=SHARP, hr=FAST)})
    where.write_text(yaml.safe_dump(turned.model_dump(mode="json")))
    assert "are the two files swapped?" in refused(*words)
    assert not (tmp_path / "m.tif").exists()


def test_what_is_stated_goes_before_the_times_of_a_registration(frames, caplog):
    sharp, fast = recordings(*frames)
    timing = Timing(gap=4.3, lr_start=-0.6 / 4.3)
    where = TRUTH.model_copy(update={"time": timing})
    times = joined(sharp, fast, Pairing(registration=where), 3, crop=True).times
    np.testing.assert_allclose(times[:2], [-0.6 / 4.3, 0.4 / 4.3])
    assert "gives way" not in caplog.text
    joined(sharp, fast, Pairing(4.0, registration=where), 3, crop=True)
    assert "the gap of the registration, 4.3, gives way to the one you state, 4" in caplog.text


def test_drift_bends_the_clock(frames):
    sharp, fast = recordings(*frames)
    where = TRUTH.model_copy(update={"time": Timing(gap=4, lr_start=0, drift=0.01)})
    times = joined(sharp, fast, Pairing(registration=where), 3, crop=True).times
    assert times[8] - times[0] == pytest.approx(2 + 0.01 * 2**2 / 2)


def test_an_affine_matrix_takes_the_place_of_scale_and_rotation():
    matrix = ((3.0, 0.1), (-0.05, 3.1))
    where = Registration(scale=3.05, origin=(2, 3), affine=matrix)
    places = np.array([[4.0, 7.0]])
    np.testing.assert_allclose(where.to_hr(places), [[2 + 12.7, 3 + 21.5]])
    np.testing.assert_allclose(where.to_lr(where.to_hr(places), FAST), places)
    with pytest.raises(ValueError, match="but scale is 4"):
        Registration(scale=4, affine=matrix)


def test_the_real_pair_of_a_phantom_and_an_hpv_x2(realdata):
    folder = realdata("tomobank_xfusion_png")
    sharp = xvr.open_recording(folder / "rad_00003_high_res.png")
    fast = xvr.open_recording(folder / "rad_00003_low_res.png")
    found = registered(sharp, fast).registration
    assert found.scale == pytest.approx(2.92, abs=0.02) and found.flip == "none"
    middle = found.to_hr(np.array([[125.0, 200.0]]))[0] - 2.92 * np.array([125, 200])
    np.testing.assert_allclose(middle, (34, 57), atol=1.5)  # of a frame that is not turned


def test_what_jumps_between_two_frames_counts_less_than_what_moves_steadily():
    rng = np.random.default_rng(0)
    rows, columns = np.indices((60, 90))
    texture = gaussian_filter(rng.normal(0, 1, (60, 130)), 3) * 3
    noise = rng.normal(0, 0.01, (4, 60, 90))
    four = np.stack([texture[:, 10 + t // 4 : 100 + t // 4] for t in range(4)]) + noise  # at rest
    four[:, 10:25] += np.linspace(0, 0.5, 4)[:, None, None]
    jumping = np.hypot(rows - 42, columns - 60) < 8
    four[2:, jumping] += 0.5
    weight = steady(list(four))
    assert (steady([np.ones((20, 30))] * 4) == 1).all()  # without noise, nothing moves
    assert weight[12:23].mean() > 0.8
    assert weight[jumping].max() < 0.1
