"""How far a movie may be believed: what contradicts the fast camera is flagged, key frames left out
tell the error, stated deviations hold, and nothing is claimed where nothing is known."""

import json
import re

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageSequence
from scipy.ndimage import gaussian_filter

import hpc_xvr as xvr
from hpc_xvr import metrics
from hpc_xvr.data.degrade import CameraNoise, bin_down
from hpc_xvr.data.simulate.experiment import simulate_video
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.result import open_result
from hpc_xvr.reconstruction.methods import NamedMethod, baseline_entry
from hpc_xvr.reconstruction.pipeline import reconstruct
from hpc_xvr.reconstruction.streams import KeyFrames, Stream
from hpc_xvr.reconstruction.trust.consistency import Comparison, compare_frame, enforce
from hpc_xvr.reconstruction.trust.examination import PER_FRAME, Examination, Examiner, Looked
from hpc_xvr.reconstruction.trust.held_out import check, left_out
from hpc_xvr.reconstruction.trust.observation import Observation, observe
from hpc_xvr.reconstruction.trust.uncertainty import deviation, surroundings
from support.disk import fill

GAP = 4


@pytest.fixture(scope="module")
def scene():
    """(25, 96, 128) frames of a simulated spray, in [0, 1]."""
    video = simulate_video("spray", (25, 96, 128), 3, lr_stream=False)
    return video.frames.astype(np.float32) / 4095


def seen_by(frames, photons=1000, seed=0, blur=0.0, read=0.0):
    """Fast frames of a camera of so many photons a pixel."""
    low = np.stack([gaussian_filter(f, blur) if blur else f for f in bin_down(frames, 4)])
    if photons is None:
        return low
    return CameraNoise(photons, read).apply(low, np.random.default_rng(seed))


def keys_of(frames, gap=GAP):
    return {t: frames[t] for t in range(0, len(frames), gap)}


def streams(lr, keys):
    shape = next(iter(keys.values())).shape
    return (
        Stream(lr.shape, lambda t: lr[t]),
        KeyFrames(list(keys), shape, lambda t: keys[t]),
    )


@pytest.mark.parametrize(("photons", "read", "blur"), [(1000, 0, 0), (300, 0.02, 0.6)])
def test_the_fast_camera_is_known_from_the_key_frames(scene, photons, read, blur):
    camera = observe(0.9 * seen_by(scene, photons, 1, blur, read) + 0.05, keys_of(scene))
    assert camera.scale == 4 and camera.keys == 7
    assert camera.blur == pytest.approx(blur, abs=0.16)
    assert camera.gain == pytest.approx(0.9, abs=0.02)
    assert camera.offset == pytest.approx(0.05, abs=0.01)
    level = 0.6  # gains of the grey scale change both
    wanted = 0.9**2 * ((level - 0.05) / 0.9 / photons + read**2)
    assert camera.read + level * camera.shot == pytest.approx(wanted, rel=0.2)
    assert "from the key frames" in camera.told()


def test_true_frames_do_not_contradict_and_their_chi_square_is_one(scene):
    for photons, low, high in ((1000, 0.85, 1.15), (30, 0.8, 1.2), (None, 0, 0.01)):
        lr = seen_by(scene, photons)
        camera = observe(lr, keys_of(scene))
        found = [compare_frame(scene[t], lr[t], camera) for t in range(25)]
        assert low <= np.mean([one.chi_square for one in found]) <= high
        assert not any(one.contradicts for one in found)


def spoil(frame, far):
    yield "another frame", far
    yield "shifted", np.roll(frame, 4, 1)
    hole = frame.copy()
    hole[44:52, 64:72] -= 0.15
    yield "invented", hole


@pytest.mark.parametrize("photons", [None, 1000])
@pytest.mark.parametrize("dark", [1.0, 0.02])
def test_what_is_wrong_is_flagged_and_placed(scene, photons, dark):
    """Also in a dark recording, such as counts of 10 bit in 16."""
    frames, lr = dark * scene, dark * seen_by(scene, photons)
    camera = observe(lr, keys_of(frames))
    assert not compare_frame(frames[10], lr[10], camera).contradicts
    for name, wrong in spoil(frames[10] / dark, frames[0] / dark):
        found = compare_frame(dark * wrong.astype(np.float32), lr[10], camera)
        assert found.contradicts, name
        assert found.aside.shape == (24, 32)
    assert abs(found.place[0] - 48) <= 12 and abs(found.place[1] - 68) <= 12
    if photons:  # too small for the frame as a whole
        assert found.chi_square < 1.5 < found.worst


def test_dead_pixels_of_the_fast_camera_accuse_nobody(scene):
    lr = seen_by(scene, 1000).copy()
    lr[:, 5, 7], lr[:, 11, 20] = 1.0, 0.0
    camera = observe(lr, keys_of(scene))
    assert camera.usable is not None and not camera.usable[5, 7] and not camera.usable[11, 20]
    assert np.count_nonzero(~camera.usable) <= 4
    found = compare_frame(scene[10], lr[10], camera)
    assert not found.contradicts and found.aside[5, 7] == 0
    agreed = enforce(scene[10], lr[10], camera)
    assert np.abs(agreed - scene[10])[20:24, 28:32].max() < 0.02


def uneven(height=24, width=32):
    """Gains of a fast camera that lacks its flat field: 12 % brighter in a corner."""
    rows, columns = np.mgrid[:height, :width]
    return 1 + 0.12 * np.exp(-((rows / height) ** 2 + (columns / width) ** 2) / 0.3)


@pytest.mark.parametrize("photons", [None, 1000])
def test_a_missing_flat_field_accuses_nobody_and_hides_nothing(scene, photons):
    lr = seen_by(scene, photons) * uneven()
    camera = observe(lr, keys_of(scene))
    assert camera.unevenness is not None and "as without flat fields" in camera.told()
    even = camera.unevenness * camera.gain / uneven()
    np.testing.assert_allclose(even, 1, atol=0.05)
    for t in (2, 10):
        assert not compare_frame(scene[t], lr[t], camera).contradicts
        assert compare_frame(scene[t - 2 if t == 2 else t + 4], lr[t], camera).contradicts
    agreed = enforce(scene[14], lr[10], camera)
    assert metrics.psnr(agreed, scene[10]) > metrics.psnr(scene[14], scene[10]) + 2
    assert observe(seen_by(scene, photons), keys_of(scene)).unevenness is None


def test_where_the_cameras_differ_by_themselves_nobody_is_accused(scene):
    """A scratch on the fast camera's window, and a corner that it does not see."""
    lr = seen_by(scene, 1000).copy()
    lr[:, 12, 5:14] *= 0.6
    lr[:, :3, :4] = 0.2
    camera = observe(lr, keys_of(scene))
    assert camera.usable is not None and not camera.usable[12, 5:14].any()
    assert 20 < np.count_nonzero(~camera.usable) < 77
    assert not any(compare_frame(scene[t], lr[t], camera).contradicts for t in range(25))
    shifted = np.roll(scene[10], 4, 1)
    assert compare_frame(shifted, lr[10], camera).contradicts


def test_two_real_cameras_without_flat_fields_accuse_nobody(realdata):
    """One real pair, taken for three fast frames and two sharp ones of a scene that rests."""
    folder = realdata("tomobank_xfusion_png")
    sharp, fast = (
        next(xvr.open_recording(folder / f"rad_00003_{name}_res.png").frames())
        for name in ("high", "low")
    )
    where = xvr.Registration(scale=2.918738, origin=(29.5127, 59.6854), rotation_deg=-0.46281)
    fast, sharp = np.stack([fast] * 3), np.stack([sharp] * 2)
    model = xvr.load_model("linear_hr")
    found = list(xvr.reconstruct_checked(model, fast, sharp, gap=2, registration=where, crop=True))
    assert [one.contradicts for one in found] == [False] * 3
    assert found[1].chi_square < 1.2
    moved = np.stack([sharp[0], np.roll(sharp[0], 9, 1)])  # three fast pixels
    given = {"gap": 2, "registration": where, "crop": True}
    with pytest.raises(InputError, match="columns of fast pixels beside"):
        xvr.reconstruct_checked(model, fast, moved, **given)
    assert list(xvr.reconstruct_checked(model, fast, moved, **given, force=True))[1].contradicts


def test_key_frames_that_are_flagged_are_told_as_such(two_files, tmp_path, hpc_xvr):
    lr = tifffile.imread(tmp_path / "lr.tif")
    lr[8] = lr[0, ::-1, ::-1]
    tifffile.imwrite(tmp_path / "lr.tif", lr, photometric="minisblack")
    said = hpc_xvr("reconstruct", "nearest_hr", *two_files, "--out", tmp_path / "m.tif").err
    assert "1 of the flagged frames are key frames, as they were recorded (8): there the" in said


def test_frames_too_small_are_not_judged():
    frames = np.random.default_rng(0).random((9, 16, 16), np.float32)
    camera = observe(bin_down(frames, 4), keys_of(frames))
    assert camera.keys == 0
    assert not compare_frame(1 - frames[2], bin_down(frames[2], 4), camera).contradicts


def test_a_wrong_frame_is_made_to_agree_and_noise_is_not_copied(scene):
    for photons, gain in ((None, 1.0), (1000, 0.5)):
        lr = seen_by(scene, photons)
        camera = observe(lr, keys_of(scene))
        wrong = scene[8]
        agreed = enforce(wrong, lr[10], camera)
        better = metrics.psnr_float(agreed, scene[10]) - metrics.psnr_float(wrong, scene[10])
        assert better > gain
        before, after = (compare_frame(x, lr[10], camera) for x in (wrong, agreed))
        assert after.chi_square < 0.5 * before.chi_square + 0.6
        assert agreed.min() >= 0 and agreed.max() <= 1
    kept = enforce(scene[10], lr[10], camera)
    assert metrics.psnr_float(kept, scene[10]) > 45


def test_left_out_key_frames_are_never_shown(scene):
    """The method sees the neighbours of a key frame, at twice the gap, and no other truth."""
    keys = keys_of(scene)
    lr, key_frames = streams(bin_down(scene, 4), keys)
    shown = []

    def earlier(sample):
        shown.append(sample["hr"].numpy().copy())
        return sample["hr"][:, :1]

    around = surroundings(keys, observe(lr, keys))
    held = check(NamedMethod("earlier", "earlier", earlier), lr, key_frames, around)
    assert held.times == (4, 12, 20) and held.gap == 8
    for t, seen in zip(held.times, shown, strict=True):
        np.testing.assert_array_equal(seen[0, :, 0], scene[[t - 4, t + 4]])
    wanted = [metrics.psnr_float(scene[t - 4], scene[t]) for t in held.times]
    assert held.psnr == pytest.approx(wanted)
    square = np.mean([(scene[t - 4] - scene[t]) ** 2 for t in held.times], 0)
    np.testing.assert_allclose(held.error, np.sqrt(square), atol=1e-6)
    size = [np.sqrt(np.mean((scene[t - 4] - scene[t]) ** 2) / np.mean(scene[t] ** 2)) for t in (4,)]
    assert held.nrmse[0] == pytest.approx(size[0], rel=1e-4)
    assert held.expected_psnr > held.mean_psnr and "to be expected" in held.told()


def test_too_few_key_frames_are_told():
    assert left_out([0, 8, 16]) == [8]
    with pytest.raises(InputError, match=r"has 2 key frames; at least 3 .* without --check"):
        left_out([0, 8])


@pytest.mark.parametrize("photons", [None, 1000])
@pytest.mark.parametrize("name", ["bayes", "nearest_hr"])
def test_stated_deviations_hold(scene, photons, name):
    """68 % of the pixels lie within one: the weights are of another method, and the recording's
    own key frames correct that."""
    keys = keys_of(scene)
    fast = seen_by(scene, photons)
    lr, key_frames = streams(fast, keys)
    around = surroundings(keys, observe(lr, keys))
    held = check(baseline_entry(name), lr, key_frames, around)
    look = Examiner(lr, key_frames, around, deviations=True, factor=held.factor).look
    frames = reconstruct(baseline_entry(name).method, lr, key_frames, lr_frames=1, n_out=1)
    looked = [look(t, frame) for t, frame in frames]
    within = [
        (np.abs(one.frame - scene[one.t]) <= one.deviation).mean()
        for one in looked
        if one.t not in keys
    ]
    assert 0.55 < np.mean(within) < 0.85
    if name == "nearest_hr":  # a copy of a key frame: nothing but the average can be told
        return
    # Where little is known more is stated: errors grow with the deviations.
    error, stated = (
        np.concatenate([x.ravel() for x in arrays])
        for arrays in zip(
            *((np.abs(o.frame - scene[o.t]), o.deviation) for o in looked if o.t not in keys),
            strict=True,
        )
    )
    order = np.argsort(stated)
    small, large = (error[part].mean() for part in np.array_split(order, 2))
    assert large > 1.5 * small


def test_deviations_scale_with_the_recording(scene):
    """A recording at 2 % of full scale is judged as the bright one is."""
    found = []
    for dark in (1.0, 0.02):
        frames, lr = dark * scene, dark * seen_by(scene, None)
        around = surroundings(keys_of(frames), observe(lr, keys_of(frames)))
        place = lr[10], frames[8], frames[12], 4, around
        found.append(deviation(0.5 * (frames[8] + frames[12]), *place) / dark)
    np.testing.assert_allclose(found[0], found[1], rtol=0.3)


@pytest.fixture
def two_files(scene, tmp_path):
    """Options that name the files of both cameras."""
    lr = np.rint(seen_by(scene, 1000) * 4095).astype(np.uint16)
    lr[10] = lr[0, ::-1, ::-1]  # the camera saw something else than what is between the key frames
    sharp = np.rint(scene[::GAP] * 4095).astype(np.uint16)
    tifffile.imwrite(tmp_path / "lr.tif", lr, photometric="minisblack")
    tifffile.imwrite(tmp_path / "hr.tif", sharp, photometric="minisblack")
    return [
        *("--lr", tmp_path / "lr.tif", "--hr", tmp_path / "hr.tif", "--gap", GAP),
        *("--lr-bit-depth", 12, "--hr-bit-depth", 12),
    ]


def test_the_command_writes_what_is_asked_for(scene, two_files, tmp_path, hpc_xvr):
    out, sigma, maps = (tmp_path / name for name in ("m.tif", "s.h5", "maps.h5"))
    asked = ["--check", "--uncertainty", sigma, "--maps", maps, "--dtype", "float32"]
    said = hpc_xvr("reconstruct", "nearest_hr", *two_files, "--out", out, *asked)
    told = said.out + said.err
    assert "3 key frames left out" in told and "frames contradict" in told
    assert "most of all frame 10 around row" in told
    found = json.loads((tmp_path / "m-trust.json").read_text())
    assert {"frame", "row", "column"} == set(found["consistency"]["contradicts"][0])
    assert 10 in [one["frame"] for one in found["consistency"]["contradicts"]]
    assert 8 not in [one["frame"] for one in found["consistency"]["contradicts"]]
    assert found["consistency"]["frames"] == list(range(25))
    assert found["held_out"]["frames"] == [4, 12, 20]
    assert found["uncertainty"]["file"] == "s.h5" and found["uncertainty"]["factor"] > 0
    with h5py.File(sigma) as file:
        stated = file["exchange/data"][()]
        assert "one standard deviation" in file["exchange/data"].attrs["notes"]
    movie = tifffile.imread(out)
    assert stated.shape == movie.shape == scene.shape and stated.dtype == np.float32
    assert stated.min() > 0
    within = np.abs(movie / 4095 - scene) <= stated / 4095  # counts, as the movie has
    between = [t for t in range(25) if t % GAP and t != 10]
    assert 0.55 < within[between].mean() < 0.85
    other = ["--out", tmp_path / "n.tif", "--uncertainty", tmp_path / "t.h5"]
    hpc_xvr("reconstruct", "nearest_hr", *two_files, *other)
    with h5py.File(tmp_path / "t.h5") as file:
        ratio = stated[between] / file["exchange/data"][between]
    np.testing.assert_allclose(ratio, found["uncertainty"]["factor"], rtol=1e-3)
    with h5py.File(maps) as file:
        assert file["consistency/aside"].shape == (25, 24, 32)
        np.testing.assert_allclose(
            np.square(file["consistency/aside"][()]).mean(0),
            file["consistency/chi_square"][()],
            rtol=1e-4,
        )
        assert file["held_out/error"].shape == (96, 128)


@pytest.mark.parametrize("suffix", ["tif", "h5", "nxs", "zarr"])
def test_flags_are_stored_in_the_result_and_read_back(two_files, tmp_path, hpc_xvr, suffix):
    out = tmp_path / f"m.{suffix}"
    hpc_xvr("reconstruct", "nearest_hr", *two_files, "--frames", "3:23", "--check", "--out", out)
    found = json.loads((tmp_path / "m-trust.json").read_text())
    flagged = [one["frame"] for one in found["consistency"]["contradicts"]]
    assert 10 in flagged
    about = json.loads((tmp_path / f"m.{suffix}.json").read_text())
    assert set(about["per_frame"]) == set(PER_FRAME)
    flags = about["per_frame"]["contradicts"]
    assert [t for t, flag in zip(range(3, 23), flags, strict=True) if flag] == flagged
    assert about["per_frame"]["chi_square"] == found["consistency"]["chi_square"]
    gist = about["extra"]["trust"]
    assert gist["file"] == "m-trust.json" and gist["contradicts"] == flagged and gist["judged"]
    assert gist["held_out_psnr_db"] == found["held_out"]["mean_psnr_db"]
    (tmp_path / "m-trust.json").unlink()  # the result itself still says so
    result = open_result(out, sources=False)
    assert [int(result.numbers[k]) for k in result.flagged] == flagged
    assert result.per_frame["chi_square"] == about["per_frame"]["chi_square"]
    if suffix == "h5":
        with h5py.File(out) as file:
            (stored,) = [v[()] for v in every(file) if v.name.endswith("per_frame/contradicts")]
        assert stored.tolist() == [float(flag) for flag in flags]


def every(group):
    """All datasets of an HDF5 file."""
    found = []
    group.visititems(lambda _, node: found.append(node) if isinstance(node, h5py.Dataset) else None)
    return found


def test_missing_frames_have_no_flags():
    found = Examination(surroundings_known())
    for t, chi in ((4, 1.0), (5, 9.0)):
        found.add(Looked(t, np.zeros((4, 4)), Comparison(chi, chi, (2, 2), np.zeros((1, 1)))))
    assert found.per_frame([4, None, 5]) == {
        "chi_square": [1.0, None, 9.0],
        "worst_square": [1.0, None, 9.0],
        "contradicts": [False, None, True],
    }


def surroundings_known():
    scene = np.random.default_rng(0).random((9, 96, 128), np.float32)
    return surroundings(keys_of(scene), observe(seen_by(scene, 1000), keys_of(scene)))


@pytest.mark.parametrize("shows", ["side-by-side", "result"])
@pytest.mark.parametrize("suffix", ["webp", "gif", "png", "mp4"])
def test_a_movie_marks_frames_that_contradict_the_measurement(
    two_files, tmp_path, hpc_xvr, suffix, shows
):
    if suffix == "mp4":
        pytest.importorskip("av")
    movie = tmp_path / f"m.{suffix}"
    call = ["reconstruct", "nearest_hr", *two_files, "--frames", "8:12"]
    call += ["--out", tmp_path / "m.tif"]
    said = hpc_xvr(*call, "--movie", movie, "--movie-shows", shows).err
    found = json.loads((tmp_path / "m-trust.json").read_text())["consistency"]
    flagged = {one["frame"]: (one["row"], one["column"]) for one in found["contradicts"]}
    assert 10 in flagged and 8 not in flagged
    assert f"m.{suffix} marks the frames that contradict the fast camera" in said
    assert f"it shows {len(flagged)} of these {len(flagged)}" in said
    sheets = pictures_of(movie, 4)
    for t, sheet in zip(range(8, 12), sheets, strict=True):
        half = sheet.shape[1] // 2 if shows == "side-by-side" else 0
        band = sheet[2:18, half + 8 : -8]  # over the result: white letters on black, or not
        assert (np.median(band) < 60) == (t in flagged), t
        if half:
            assert np.median(sheet[2:18, 8 : half - 8]) > 200
        if t not in flagged:
            continue
        panel = sheet[22:, half + 4 if half else 0 :].astype(int)
        factor = panel.shape[1] / 128
        row, column = ((place + 0.5) * factor for place in flagged[t])
        left = max(column - 2.5 * 4 * factor, 0)
        near = slice(max(int(left) - 4, 0), int(left) + 8)
        line = panel[min(max(int(row), 4), panel.shape[0] - 5), near]
        assert np.abs(np.diff(line)).max() > 60, "the side of a square, white on black"


def pictures_of(movie, count):
    """(H, W) of each frame of a movie, or of a strip's pictures."""
    if movie.suffix == ".mp4":
        import av

        with av.open(str(movie)) as file:
            return [frame.to_ndarray(format="gray") for frame in file.decode(video=0)]
    with Image.open(movie) as image:
        if movie.suffix == ".png":
            sheet = np.asarray(image.convert("L"))
            height = (sheet.shape[0] + 4) // count
            return [sheet[i * height : (i + 1) * height - 4] for i in range(count)]
        return [np.asarray(one.convert("L")) for one in ImageSequence.Iterator(image)]


def test_the_table_of_many_shots_names_those_with_flags(two_files, tmp_path, hpc_xvr):
    table = tmp_path / "pairs.csv"
    table.write_text("name,lr,hr\nbad,lr.tif,hr.tif\n")
    call = ["reconstruct", "nearest_hr", "--pairs", table, *two_files[4:], "--out", tmp_path / "o"]
    said = hpc_xvr(*call).out
    found = json.loads((tmp_path / "o" / "bad-trust.json").read_text())["consistency"]
    words = re.sub(r"[^\w ]+", " ", said).split()
    assert "flagged" in words and words[words.index("made") :][1] == f"{len(found['contradicts'])}"
    assert len(found["contradicts"]) > 0


def test_without_options_frames_are_compared_and_nothing_is_changed(two_files, tmp_path, hpc_xvr):
    for name, extra in (("a", []), ("b", ["--enforce"])):
        out = tmp_path / f"{name}.tif"
        hpc_xvr("reconstruct", "nearest_hr", *two_files, "--out", out, *extra)
    plain, agreed = (tifffile.imread(tmp_path / f"{name}.tif") for name in "ab")
    sharp = tifffile.imread(tmp_path / "hr.tif")
    for t in range(0, 25, GAP):  # key frames are what was recorded
        np.testing.assert_allclose(plain[t] / 65535, sharp[t // GAP] / 4095, atol=1e-5)
        np.testing.assert_array_equal(plain[t], agreed[t])
    assert np.abs(plain[10].astype(float) - agreed[10]).max() > 1000
    first, second = (json.loads((tmp_path / f"{n}-trust.json").read_text()) for n in "ab")
    assert first["consistency"]["enforced"] is False and second["consistency"]["enforced"] is True
    assert first["consistency"]["contradicts"] == second["consistency"]["contradicts"]
    assert first["held_out"] is None and first["uncertainty"] is None
    written = {path.name for path in tmp_path.iterdir()}
    results = {f"{name}{end}" for name in "ab" for end in (".tif", ".tif.json", "-trust.json")}
    assert written == {"lr.tif", "hr.tif", *results}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--uncertainty", "m.tif"], "need a file each"),
        (["--uncertainty", "s.gif"], "unknown format .gif"),
        (["--uncertainty", "no/s.tif"], "does not exist"),
        (["--maps", "maps.tif"], "end the name in .h5"),
        (["--maps", "no/maps.h5"], "does not exist"),
        (["--check", "--adapt"], "would look better than they are"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(two_files, tmp_path, hpc_xvr, extra, words):
    extra = [tmp_path / one if "." in one else one for one in extra]
    before = set(tmp_path.iterdir())
    said = hpc_xvr("reconstruct", "bayes", *two_files, "--out", tmp_path / "m.tif", *extra, code=2)
    assert words in said.err and "reconstructing" not in said.err
    assert set(tmp_path.iterdir()) == before


def test_check_with_two_key_frames_is_refused(scene, tmp_path, hpc_xvr):
    tifffile.imwrite(tmp_path / "lr.tif", bin_down(scene[:5], 4), photometric="minisblack")
    tifffile.imwrite(tmp_path / "hr.tif", scene[[0, 4]], photometric="minisblack")
    source = ["--lr", tmp_path / "lr.tif", "--hr", tmp_path / "hr.tif", "--gap", GAP]
    said = hpc_xvr("reconstruct", "bayes", *source, "--out", tmp_path / "m.tif", "--check", code=2)
    assert "has 2 key frames; at least 3 are needed" in said.err
    assert not list(tmp_path.glob("m*"))


def test_a_full_disk_under_the_uncertainty_leaves_nothing(two_files, tmp_path, small_disk, hpc_xvr):
    fill(small_disk)
    files = ["--out", tmp_path / "m.tif", "--uncertainty", small_disk / "s.tif"]
    said = hpc_xvr("reconstruct", "bayes", *two_files, *files, code=74)
    assert "s.tif" in said.err
    assert not list(tmp_path.glob("m*")) and not list(small_disk.glob("*s*"))


def test_the_python_interface(scene):
    fast = seen_by(scene, 1000)
    fast[10] = fast[0, ::-1, ::-1]
    model = xvr.load_model("nearest_hr", device="cpu")
    held = xvr.check_keys(model, fast, scene[::GAP], gap=GAP)
    assert isinstance(held, xvr.HeldOut) and held.times == (4, 12, 20)
    frames = list(
        xvr.reconstruct_checked(model, fast, scene[::GAP], gap=GAP, check=held, enforce=True)
    )
    assert [one.t for one in frames] == list(range(25))
    assert all(isinstance(one, xvr.CheckedFrame) for one in frames)
    assert frames[10].contradicts and not frames[8].contradicts
    assert frames[10].deviation.shape == frames[10].frame.shape == (96, 128)
    plain = dict(xvr.reconstruct(model, fast, scene[::GAP], gap=GAP))
    np.testing.assert_array_equal(frames[8].frame, plain[8])
    assert np.abs(frames[10].frame - plain[10]).max() > 0.05
    wide = list(xvr.reconstruct_checked(model, fast, scene[::GAP], gap=GAP))
    ratio = frames[9].deviation / wide[9].deviation
    assert np.median(ratio) == pytest.approx(held.factor, rel=0.2)
    with pytest.raises(xvr.InputError, match="at least 3 are needed"):
        xvr.check_keys(model, fast[:5], scene[:5:GAP], gap=GAP)


def test_an_unknown_camera_says_so():
    assert "not known" in Observation(4).told()
