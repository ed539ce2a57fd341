"""Simulated experiments: the physics against closed forms, the cameras, the recordings."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform, gaussian_filter

from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.simulate.beamline import SENSORS, Beamline, SimulatedCamera
from hpc_xvr.data.simulate.experiment import Experiment, simulate_video
from hpc_xvr.data.simulate.optics import MATERIALS, propagate
from hpc_xvr.data.simulate.scenes import SCENES, Scene
from hpc_xvr.data.simulate.scenes.draw import spheres
from hpc_xvr.data.simulate.scenes.layers import Layers, splined
from hpc_xvr.errors import InputError
from hpc_xvr.model.bases import transfer_detail, upsample

SMALL = (6, 64, 96)


@pytest.fixture(scope="module")
def videos():
    """One 22-frame recording of each scene, and by how much the fast camera's lens is softer."""
    made = {}
    for name in SCENES:
        experiment = Experiment(name, (22, 128, 128), seed=5)
        made[name] = SimpleNamespace(
            frames=np.stack(list(experiment.frames())),
            lr=experiment.lr,
            info=experiment.info("train"),
            softer=np.sqrt((4 * experiment.fast.spread) ** 2 - experiment.sharp.spread**2),
        )
    return made


class Slab(Scene):
    """1 mm of aluminium."""

    material, pixel, frame_rate, bulk, transmission, distance = (
        "aluminium",
        2e-6,
        1e5,
        1e-3,
        0.3,
        0.2,
    )

    def build(self, rng):
        pass

    def thickness(self, t):
        return np.full(self.shape, 1e-3, np.float32)


class Bar(Slab):
    """A wide absorbing bar that crosses the field at `speed` pixels a frame."""

    speed = 0.0
    distance = 0.0

    def thickness(self, t):
        edge = self.x - 20 - self.speed * t
        return np.tile(1e-3 * np.clip(0.5 - edge, 0, 1), (self.shape[0], 1)).astype(np.float32)


# Physics


def test_attenuation_is_the_published_one_between_and_on_table_points():
    assert MATERIALS["aluminium"].attenuation(20) == pytest.approx(344.1 * 2.699, rel=1e-3)
    # NIST: water at 50 keV 0.2269 cm2/g, not in our table.
    assert MATERIALS["water"].attenuation(50) == pytest.approx(22.69, rel=0.03)


@pytest.mark.parametrize(
    ("material", "energy", "delta"),
    [("titanium", 25, 1.386e-6), ("water", 10, 2.311e-6), ("aluminium", 20, 1.355e-6)],
)
def test_refractive_decrement_matches_tabulated_scattering_factors(material, energy, delta):
    assert MATERIALS[material].decrement(energy) == pytest.approx(delta, rel=0.02)


def test_beer_lambert_through_a_slab_of_known_thickness():
    line = Beamline(Slab((16, 16), 1, None), np.random.default_rng(0))
    expected = np.exp(-MATERIALS["aluminium"].attenuation(line.energy) * 1e-3)
    assert expected == pytest.approx(0.3, rel=1e-3)  # the energy was chosen for that
    np.testing.assert_allclose(line.state(0.0) / line.beam, expected, rtol=1e-5)


def test_spheres_have_the_volume_and_chord_of_spheres():
    for r in (1.0, 2.5, 7.3, 20.0):
        image = spheres((64, 64), np.array([30.3]), np.array([31.6]), np.array([r]))
        assert image.sum() == pytest.approx(4 / 3 * np.pi * r**3, rel=0.03)
        if r > 5:  # smaller ones are averaged over the pixel
            assert image.max() == pytest.approx(2 * r, rel=0.03)
    part = spheres((64, 64), np.array([0.0]), np.array([31.0]), np.array([8.0]))
    whole = spheres((64, 64), np.array([20.0]), np.array([31.0]), np.array([8.0]))
    np.testing.assert_allclose(part[:9], whole[20:29], atol=1e-4)


def test_phase_contrast_is_the_transport_of_intensity_equation_for_weak_objects():
    y, x = np.mgrid[-32:32, -32:32].astype(np.float64)
    size, height, strength = 6.0, 1e-5, 400.0
    bump = height * np.exp(-(x**2 + y**2) / (2 * size**2))
    laplacian = bump * ((x**2 + y**2) / size**4 - 2 / size**2)
    out = propagate(np.ones((64, 64), np.float32), bump.astype(np.float32), strength)
    np.testing.assert_allclose(
        out - 1, strength * laplacian, atol=2e-2 * strength * height * 2 / size**2
    )


def test_phase_contrast_keeps_the_light_and_stays_positive_even_where_it_is_strong():
    rng = np.random.default_rng(3)
    light = rng.uniform(0.01, 1, (50, 70)).astype(np.float32)
    out = propagate(light, rng.uniform(0, 1e-3, (50, 70)).astype(np.float32), 1e6)
    assert out.min() >= 0
    assert np.abs(out - light).max() > 0.1
    assert out.mean(dtype=np.float64) == pytest.approx(light.mean(dtype=np.float64), rel=1e-6)


def test_an_edge_gets_a_bright_fringe_outside_and_a_dark_one_inside():
    x = np.arange(64)
    step = np.tile(1e-5 / (1 + np.exp(-(x - 31.5))), (8, 1)).astype(np.float32)
    fringe = propagate(np.ones((8, 64), np.float32), step, 5e4)[4]
    assert fringe[:32].max() > 1.03 and fringe[32:].min() < 0.97
    assert 26 < fringe.argmax() < 32 <= fringe.argmin() < 38


# Cameras


def test_photon_noise_is_poisson_plus_read_noise():
    camera = SimulatedCamera(
        (200, 200),
        1,
        blur=0.0,
        photons=1000,
        read_noise=0.004,
        fixed_pattern=0.0,
        bit_depth=12,
        rng=np.random.default_rng(1),
    )
    for level in (0.1, 0.7):
        frame = camera.record(np.full((200, 200), level, np.float32)) / 4095
        assert frame.mean() == pytest.approx(level, rel=0.01)
        assert frame.var() == pytest.approx(level / 1000 + 0.004**2, rel=0.05)


def test_a_low_resolution_pixel_covers_its_own_square_of_high_resolution_pixels():
    camera = SimulatedCamera(
        (16, 16),
        4,
        blur=0.0,
        photons=1e6,
        read_noise=0.0,
        fixed_pattern=0.0,
        bit_depth=10,
        rng=np.random.default_rng(1),
    )
    scene = np.zeros((64, 64), np.float32)
    scene[4 * 5 : 4 * 6, 4 * 9 : 4 * 10] = 0.5
    frame = camera.record(scene)
    assert frame[5, 9] == pytest.approx(0.5 * 1023, abs=3)
    assert np.count_nonzero(frame) == 1


@pytest.mark.parametrize("scene", SCENES)
def test_both_cameras_saw_the_same_light(videos, scene):
    video = videos[scene]
    assert video.frames.shape == (22, 128, 128) and video.frames.dtype == np.uint16
    assert video.lr.shape == (22, 32, 32) and video.lr.dtype == np.uint16
    assert video.frames.max() <= 4095 and video.lr.max() <= 1023
    binned, lr = bin_down(video.frames / 4095, 4), video.lr / 1023
    assert lr.mean() == pytest.approx(binned.mean(), rel=5e-3)
    # The second lens is softer; brought to its sharpness, what is left is noise: 1/sqrt(photons),
    # read noise, gains, offsets, rounding.
    sigma = (0, video.softer, video.softer)
    soft = bin_down(gaussian_filter(video.frames / 4095, sigma, mode="nearest"), 4)
    noise = np.sqrt(soft / 5000 + 0.005**2 + (0.004 * soft) ** 2)
    assert np.sqrt(np.mean((lr - soft) ** 2)) < 1.3 * np.sqrt(np.mean(noise**2))
    centre = (slice(None), slice(1, -1), slice(1, -1))
    errors = {
        (dy, dx): np.square(np.roll(lr, (dy, dx), (1, 2)) - binned)[centre].mean()
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }
    assert min(errors, key=errors.get) == (0, 0)


def test_x_rays_are_too_few_for_both_cameras_alike():
    """Photon noise of the x rays is in the light, so both cameras see the same; theirs is not."""
    experiment = Experiment("tissue", (2, 128, 128), seed=2)
    line = experiment.line
    line.flicker[:], line.glare, line.afterglow, line.quanta = 0, np.float32(0), 0.0, 300.0
    quiet = line.exposed(0)
    light = next(line.frames())
    lit = quiet > 0.2
    noise = ((light - quiet) / np.sqrt(quiet / 300))[lit]
    assert noise.mean() == pytest.approx(0, abs=0.03) and noise.std() == pytest.approx(1, rel=0.03)
    sharp, fast = experiment.sharp, experiment.fast
    seen = bin_down(sharp.expose(light) - sharp.expose(quiet), 4)
    assert np.corrcoef(seen.ravel(), (fast.expose(light) - fast.expose(quiet)).ravel())[0, 1] > 0.7


def test_the_source_blurs_across_and_only_as_the_distance_allows():
    edges = []
    for distance in (0.0, 0.3):
        scene = Bar((4, 64), 1, None)
        scene.distance = distance
        line = Beamline(scene, np.random.default_rng(0))
        line.strength = 0.0  # no fringes
        frame = (line.exposed(0) / line.beam)[2]
        edges.append(np.count_nonzero((frame > 0.32) & (frame < 0.98)))
        # 275 um seen from 35 to 70 m away through a pinhole at the sample, pixels of 2 um.
        assert distance * 275e-6 / 70 / 2e-6 <= line.penumbra <= distance * 275e-6 / 35 / 2e-6
    assert edges[1] > edges[0]


def test_the_scintillator_still_glows_in_the_next_frame_more_so_at_high_rates():
    def after(frame_rate):
        scene = Bar((4, 64), 2, None)
        scene.speed = 20.0
        line = Beamline(scene, np.random.default_rng(0), frame_rate)
        line.flicker[:], line.glare, line.quanta = 0, np.float32(0), np.float32(1e12)
        before, now = (line.exposed(t) for t in range(2))
        second = list(line.frames())[1]
        share = (second - now)[2, 25:35] / (before - now)[2, 25:35]
        assert share.std() < 1e-3
        return share.mean()

    slow, fast = after(1e5), after(5e6)
    assert 0.01 <= slow <= 0.04
    assert fast - slow == pytest.approx(np.exp(-200 / 70), rel=0.01)  # 70 ns decay, 200 ns frames


def test_the_open_beam_has_stripes_along_rows_marks_and_a_profile():
    line = Beamline(Slab((256, 256), 1, None), np.random.default_rng(1))
    rows = line.beam.mean(1) - gaussian_filter(line.beam.mean(1), 8)
    columns = line.beam.mean(0) - gaussian_filter(line.beam.mean(0), 8)
    assert rows[20:-20].std() > 4 * columns[20:-20].std()
    smooth = gaussian_filter(line.beam, 10)
    assert (line.beam / smooth).min() < 0.93  # the scintillator's marks
    assert smooth.min() / smooth.max() < 0.97
    assert 0.95 * line.open_beam < line.beam.max() < 1.15 * line.open_beam


def test_glare_fills_shadows_and_keeps_the_light():
    scene = Bar((64, 64), 1, None)
    line = Beamline(scene, np.random.default_rng(0))
    line.flicker[:], line.quanta, line.glare = 0, np.float32(1e12), np.float32(0.05)
    clean, light = line.exposed(0), next(line.frames())
    shadow, beside = slice(0, 12), slice(24, 36)  # the bar ends at 20
    assert (light - clean)[:, shadow].min() > 0 > (light - clean)[:, beside].max()
    assert light.mean() == pytest.approx(clean.mean(), rel=0.01)
    assert np.abs(light - clean).max() < 0.05


def test_pixels_keep_their_gains_and_offsets():
    sensor = SENSORS["sa-z"]
    camera = SimulatedCamera.of(sensor, (64, 64), 1, np.random.default_rng(3))
    for level in (0.0, 0.6):
        frames = np.stack(
            [camera.record(np.full((64, 64), level + 0.02, "f4")) for _ in range(300)]
        )
        mean = frames.mean(0) / 4095
        expected = (level + 0.02) * camera.gain + camera.offset
        rest = np.hypot(np.sqrt(0.62 / camera.photons), camera.read_noise) / np.sqrt(300)
        assert np.std(mean - expected) < 1.2 * rest + 1e-5
        assert np.std(mean) > 1.3 * np.std(mean - expected)


def test_cameras_are_as_fast_as_the_makers_say():
    photron, shimadzu = SENSORS["sa-z"], SENSORS["hpv-x2"]
    for shape, rate in (((1024, 1024), 20e3), ((280, 640), 100e3), ((56, 128), 0.9e6)):
        assert photron.fastest(shape) == pytest.approx(rate, rel=0.1)
    assert shimadzu.fastest((250, 400)) == pytest.approx(5e6)
    video = Experiment("crack", (2, 400, 1024), seed=0).info("train")
    assert video["frame_rate_hz"] == pytest.approx(50e3, rel=0.01)  # cracks run at up to 5 MHz
    video = Experiment("crack", (2, 40, 40), seed=0, camera="hpv-x2").info("train")
    assert video["frame_rate_hz"] > 2e5


@pytest.mark.parametrize("camera", SENSORS)
@pytest.mark.parametrize("scene", SCENES)
def test_conditions_are_those_of_the_table(scene, camera):
    table = SCENES[scene].conditions
    assert 1.3 <= table.pixel_um[0] < table.pixel_um[1] <= 8
    assert 20e3 <= table.frame_rate_hz[0] < table.frame_rate_hz[1] <= 5e6
    rates = []
    for seed in range(12):
        experiment = Experiment(scene, (1, 64, 64), seed, camera=camera)
        sample, line = experiment.sample, experiment.line
        info = experiment.info("test")
        assert sample.material in table.materials and sample.material in MATERIALS
        for value, (low, high) in (
            (info["pixel_size_um"], table.pixel_um),
            (info["metadata"]["energy_kev"], table.energy_kev),
            (sample.distance, table.distance_m),
            (abs(sample.speed), table.speed),
            (sample.transmission, table.transmission),
        ):
            assert low - 1e-9 <= value <= high + 1e-9
        assert 20e3 <= info["frame_rate_hz"] <= table.frame_rate_hz[1]
        assert info["camera"] == SENSORS[camera].name
        assert info["bit_depth"] == {"sa-z": 12, "hpv-x2": 10}[camera]
        rates.append(info["frame_rate_hz"])
        assert 0 < line.exposure / line.frame_rate < 1 / line.frame_rate
    assert max(rates) > 1.3 * min(rates)


def test_the_hpv_x2_class_camera_may_be_the_sharp_one():
    video = simulate_video("spray", (3, 64, 64), seed=1, camera="hpv-x2")
    assert 255 < video.frames.max() <= 1023 and video.lr.max() <= 1023
    assert video.frames.shape == (3, 64, 64) and video.lr.shape == (3, 16, 16)


# Motion and grey values


def test_motion_blur_grows_with_speed():
    widths = []
    for speed in (0.0, 4.0, 12.0):
        scene = Bar((4, 64), 1, None)
        scene.speed = speed
        line = Beamline(scene, np.random.default_rng(0))
        profile = (line.exposed(0) / line.beam)[2]
        widths.append(np.count_nonzero((profile > 0.32) & (profile < 0.98)))
    assert widths[0] < widths[1] < widths[2]


@pytest.mark.parametrize("scene", SCENES)
def test_matter_moves_far_beyond_the_noise(videos, scene):
    frames = videos[scene].frames / 4095
    noise = np.sqrt(frames / 9000 + 0.0015**2)
    for gap, share in ((1, 0.01), (20, 0.05)):
        moved = np.abs(frames[gap:] - frames[:-gap]) > 5 * np.sqrt(2) * noise[gap:]
        assert moved.mean() > share, f"{gap} frames apart"


@pytest.mark.parametrize("scene", SCENES)
def test_grey_values_use_the_range_without_clipping(videos, scene):
    video = videos[scene]
    grey = video.frames / 4095
    assert np.percentile(grey, 2) < 0.4
    assert 0.45 < np.percentile(grey, 97) < 1.0
    assert (video.frames == 4095).mean() < 0.01
    assert (video.frames == 0).mean() < 0.001
    assert 1.2 < video.info["full_scale"] < 1.7
    assert 0 < video.info["exposure_s"] < 1 / video.info["frame_rate_hz"]


def test_neither_camera_alone_is_enough_and_detail_transfer_beats_both(videos):
    """Fine texture defeats bicubic interpolation, motion defeats interpolation in time."""
    gains = []
    for video in videos.values():
        hr = torch.from_numpy(video.frames / np.float32(4095))
        truth, keys = hr[10], torch.stack((hr[0], hr[20]))[None, :, None]
        lr = torch.nn.functional.avg_pool2d(truth[None, None], 4)[None]
        pictures = upsample(lr, 4), keys.mean(1, keepdim=True), transfer_detail(lr, keys)
        bicubic, linear, detail = (
            -10 * float(torch.log10(torch.mean((p[0, 0, 0] - truth) ** 2))) for p in pictures
        )
        assert max(bicubic, linear, detail) < 37
        gains.append((detail - bicubic, detail - linear))
    to_bicubic, to_linear = np.mean(gains, axis=0)
    assert to_bicubic > 1 and to_linear > 1


# Reproducibility


def test_more_light_is_less_noise_in_both_cameras_and_else_the_same():
    usual, bright, quiet = (
        simulate_video("layers", SMALL, seed=3, light=(light, light)) for light in (1, 100, 1e6)
    )
    for camera in ("frames", "lr"):
        few, many, truth = (np.float64(getattr(v, camera)) for v in (usual, bright, quiet))
        assert np.std(few - truth) > 5 * np.std(many - truth) > 0
    drawn = [Experiment("layers", SMALL, seed, light=(1, 1000)).light for seed in range(40)]
    assert 1 <= min(drawn) < 10 and 100 < max(drawn) <= 1000  # logarithmically


def test_a_lens_in_focus_shows_pixels_that_radiography_blurs():
    """Of the sharp camera; the scene, the light and the fast camera stay as they were."""
    light = (1e4, 1e4)
    usual, sharp = (
        simulate_video("layers", SMALL, seed=3, light=light, focus=(f, f)) for f in (1, 0.15)
    )
    finest = [np.abs(np.diff(np.float64(v.frames), 2)).mean() for v in (usual, sharp)]
    assert finest[1] > 1.5 * finest[0]
    assert np.array_equal(usual.lr, sharp.lr)
    drawn = [Experiment("layers", SMALL, seed, focus=(0.1, 1)).focus for seed in range(40)]
    assert 0.1 <= min(drawn) < 0.15 and 0.7 < max(drawn) <= 1


def test_some_recordings_stay_as_radiography_has_them():
    """A share of them; the others are what they are without it."""
    ranges = dict(light=(2, 1000), focus=(0.1, 0.9))
    other, some = (
        [Experiment("layers", SMALL, seed, **ranges, **more) for seed in range(60)]
        for more in ({}, {"ordinary": 0.4})
    )
    usual = [e.light == e.focus == 1 for e in some]
    assert 12 <= sum(usual) <= 36
    for a, b, ordinary in zip(other, some, usual, strict=True):
        assert ordinary or (a.light, a.focus) == (b.light, b.focus)


def test_layers_are_as_sharp_between_pixels_as_on_them():
    """A fine texture keeps its contrast as it moves by parts of a pixel."""
    scene = SCENES["layers"](SMALL[1:], 48, np.random.default_rng(0))
    rows, columns = np.mgrid[:64, :64]
    wave = np.float32(1 + 0.3 * np.sin((rows + columns) * 1.4))
    fine = replace(
        scene.layers[1], texture=splined(wave), mask=np.ones_like(wave), turn=0.0, growth=0.0
    )
    contrast = []
    for aside in (0.0, 0.25, 0.5):
        moved = replace(fine, place=lambda t, a=aside: (31.5 + a, 31.5 + a))
        contrast.append(scene._seen(moved, 0)[1][8:40, 8:40].std())
    assert min(contrast) > 0.93 * max(contrast)


@pytest.mark.parametrize("scene", SCENES)
def test_a_seed_fixes_every_bit(scene):
    first = simulate_video(scene, SMALL, seed=3)
    again = simulate_video(scene, SMALL, seed=3)
    alone = simulate_video(scene, SMALL, seed=3, lr_stream=False)
    other = simulate_video(scene, SMALL, seed=4)
    assert np.array_equal(first.frames, again.frames) and np.array_equal(first.lr, again.lr)
    assert alone.lr is None and np.array_equal(first.frames, alone.frames)
    assert not np.array_equal(first.frames, other.frames)
    assert first.info == again.info


@pytest.mark.parametrize("scene", SCENES)
def test_a_scene_may_be_asked_for_any_moment_in_any_order(scene):
    make = SCENES[scene]((48, 64), 10, np.random.default_rng(2))
    late, early = make.thickness(8.3), make.thickness(0.2)
    assert np.array_equal(make.thickness(8.3), late)
    assert np.array_equal(make.thickness(0.2), early)
    assert late.dtype == np.float32 and late.min() >= 0 and late.max() < 5e-3


def test_layers_move_through_each_other_in_every_way():
    scenes = [SCENES["layers"](SMALL[1:], 48, np.random.default_rng(seed)) for seed in range(40)]
    layers = [layer for scene in scenes for layer in scene.layers[1:]]
    assert 0.15 < np.mean([layer.hides for layer in layers]) < 0.5  # opaque ones
    for end in (0, 1):  # some appear, some vanish
        assert 0.1 < np.mean([np.isfinite(layer.life[end]) for layer in layers]) < 0.3
    assert np.std([layer.turn for layer in layers]) > 0.01
    assert np.std([layer.growth for layer in layers]) > 0.003
    ways = [np.subtract(layer.place(47), layer.place(0)) for layer in layers]
    assert np.mean([np.hypot(*way) > 10 for way in ways]) > 0.4
    ranges = [np.ptp([scene.brightness(t) for t in range(48)]) for scene in scenes]
    assert 0.3 < np.mean(np.array(ranges) > 0.002) < 0.7  # beams that drift
    assert max(ranges) < 0.2
    scene = scenes[0]
    _, front = scene.layers[0], scene.layers[1]
    for hides in (True, False):
        scene.layers = [scene.layers[0], replace(front, hides=hides, life=(-np.inf, np.inf))]
        scene.layers[1].mask[:] = 1
        behind = scene._seen(scene.layers[0], 0)[1]
        box, before, mask = scene._seen(scene.layers[1], 0)
        inside = mask == 1
        assert inside.any()
        wanted = before if hides else before + behind[box]
        np.testing.assert_allclose(
            scene.thickness(0)[box][inside], (scene.bulk * wanted)[inside], rtol=1e-5
        )


def test_a_beam_that_drifts_is_seen_by_both_cameras():
    class Drifting(Slab):
        def brightness(self, t):
            return 1 + 0.02 * t

    scene = Drifting((32, 32), 6, np.random.default_rng(0))
    beam = Beamline(scene, np.random.default_rng(1))
    beam.flicker[:] = 0
    found = np.array([beam.exposed(t).mean() for t in range(6)])
    np.testing.assert_allclose(found / found[0], 1 + 0.02 * np.arange(6), rtol=1e-4)


def test_powder_is_neither_lost_nor_doubled_as_it_leaves_the_bed():
    """The bed is kept as summed maps of grains at rest; drawing every grain gives the same."""
    scene = SCENES["keyhole"]((64, 96), 20, np.random.default_rng(4))
    rest = []
    for t in (0.0, 4.4, 11.2, 19.9, 60.0):
        standing, flying = scene._bed(t)
        every = scene._grains(slice(None), np.maximum(t - scene.leaves, 0))
        rest.append(standing + spheres((64, 96), *flying) - spheres((64, 96), *every))
    for other in rest[1:]:
        np.testing.assert_allclose(other, rest[0], atol=1e-2)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("size", [(1, 16, 16), (2, 32, 160), (2, 160, 32)])
def test_small_and_lopsided_fields(scene, size):
    video = simulate_video(scene, size, seed=1, scale=2)
    assert video.frames.shape == size and video.lr.shape == (size[0], size[1] // 2, size[2] // 2)


def test_bad_requests_say_what_is_allowed():
    with pytest.raises(InputError, match="keyhole, spray"):
        simulate_video("weld")
    with pytest.raises(InputError, match="multiples of scale 4"):
        simulate_video("spray", (2, 30, 32))


@pytest.mark.parametrize("seed", range(4))
def test_a_layer_is_drawn_where_it_lies_and_is_nowhere_else(seed):
    """Only its rows and columns are drawn: the same numbers as of the whole picture."""
    scene = Layers((72, 104), 30, np.random.default_rng(seed))
    for t in (-3.0, 11.4, 30.0):
        for layer in scene.layers[1:]:
            (rows, columns), _, mask = scene._seen(layer, t)
            size = np.exp(np.clip(layer.growth * (t - 15), -0.7, 0.7))
            cos, sin = np.cos(layer.turn * t), np.sin(layer.turn * t)
            back = np.array([[cos, sin], [-sin, cos]]) / size
            offset = (np.array(layer.mask.shape) - 1) / 2 - back @ layer.place(t)
            whole = affine_transform(
                layer.mask, back, offset, scene.shape, order=1, mode="constant"
            )
            drawn = np.zeros_like(whole)
            drawn[rows, columns] = mask
            np.testing.assert_allclose(drawn, whole, atol=1e-5)
