"""Camera files into a corpus: real ones, repeated, interrupted, damaged."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image

from hpc_xvr.data.cameras import open_camera_file
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.ingest import workers
from hpc_xvr.data.ingest.run import find_recordings, ingest
from hpc_xvr.errors import InputError
from support.camera_files import counts, write_cine, write_dxchange, write_photron


def whole(video) -> np.ndarray:
    return np.stack([video.read(t) for t in range(video.shape[0])])


def sound(path) -> Corpus:
    """The corpus, after its checksums were recomputed."""
    corpus = Corpus(path)
    assert [problem for _, problem in corpus.verify() if problem] == []
    assert not list(path.rglob("*.incoming*")) and not list(path.glob(".incoming/*"))
    return corpus


def statuses(outcomes) -> list[str]:
    return [outcome.status for outcome in outcomes]


@pytest.mark.slow
@pytest.mark.parametrize("store", ["zarr", "hdf5"])
def test_real_recordings(realdata, tmp_path, store):
    paths = [
        realdata("photron_pymraw/beam.cihx"),
        realdata("photron_pymraw/beam.mraw"),
        realdata("pyidi_showcase"),
        realdata("pims_cine"),
        realdata("aps_2bm_radiography"),
    ]
    outcomes = ingest(paths, tmp_path / "c", store=store)
    corpus = sound(tmp_path / "c")
    assert statuses(outcomes) == ["added"] * 6  # the beam once, though its two files are given
    assert {video.id: video.shape for video in corpus.videos} == {
        "beam": (4, 80, 1024),
        "cine_781": (15, 256, 256),
        "cine_legacy": (97, 128, 128),
        "data_showcase": (75, 40, 640),
        "data_small_cine": (235, 32, 256),
        "radiography_2BM": (10, 500, 500),
    }
    legacy = corpus["cine_legacy"]
    recording = open_camera_file(realdata("pims_cine/cine_legacy.cine"))
    np.testing.assert_array_equal(whole(legacy), list(recording.frames()))
    info = legacy.info
    assert (info.camera, info.bit_depth, info.frame_rate_hz) == ("Phantom v7.3", 14, 35_087)
    assert info.exposure_s == recording.exposure_s and info.source == "cine_legacy.cine"
    assert info.metadata["serial"] == 7327
    assert corpus["radiography_2BM"].info.source == "radiography_2BM_*.tif"
    assert sorted(video.info.split for video in corpus.videos) == ["train"] * 5 + ["validation"]


def test_real_spray_with_flat_and_dark_of_another_file(realdata, tmp_path):
    frame0 = realdata("spray_xray_cc0/spray_polychromatic_Re-10600_frame0.hdf5")
    background = realdata("spray_xray_cc0/spray_polychromatic_background.hdf5")
    options = {
        "flat": f"{background}::flat/Camera1",
        "dark": f"{background}::dark-current/Camera1",
        "scene": "spray",
        "pixel_size_um": 44.0,
        "camera": "Camera 1",
    }
    outcomes = ingest([frame0], tmp_path / "c", dataset="Camera1", **options)
    video = sound(tmp_path / "c")[outcomes[0].id]
    assert video.id == "spray_polychromatic_Re-10600_frame0-Camera1"
    assert (video.info.bit_depth, video.info.full_scale) == (16, 1.5)
    assert (video.info.scene, video.info.pixel_size_um, video.info.camera) == (
        "spray",
        44.0,
        "Camera 1",
    )
    light = np.median(video.intensity(0)[200:300]) * video.info.full_scale
    assert 0.5 < light < 1.1
    # Another camera of the same shot: another video, in the same split.
    ingest([frame0], tmp_path / "c", dataset="Camera2", split="test")
    other = ingest([frame0], tmp_path / "c", dataset="Camera3")
    assert other[0].split == "train" and len(sound(tmp_path / "c").videos) == 3


def test_repeat_and_duplicates(tmp_path):
    values = counts((4, 8, 8))
    write_photron(tmp_path, values, 16, "a")
    corpus = tmp_path / "c"
    assert statuses(ingest([tmp_path / "a.cih"], corpus)) == ["added"]
    again = ingest([tmp_path / "a.mraw"], corpus)
    assert statuses(again) == ["already there"] and again[0].id == "a"
    (tmp_path / "copy").mkdir()
    write_photron(tmp_path / "copy", values, 12, "b")  # the same pixels, another file
    copy = ingest([tmp_path / "copy"], corpus)
    assert statuses(copy) == ["duplicate"] and copy[0].id == "a"
    write_photron(tmp_path / "copy", counts((4, 8, 8)), 16, "a")
    assert ingest([tmp_path / "copy/a.cih"], corpus)[0].id == "a-2"
    # The same file with another treatment is another video.
    assert ingest([tmp_path / "a.cih"], corpus, flip_rows=True)[0].id == "a-3"
    assert [video.id for video in sound(corpus).videos] == ["a", "a-2", "a-3"]
    np.testing.assert_array_equal(whole(Corpus(corpus)["a-3"]), values[:, ::-1])


def test_interrupted_ingest_goes_on_where_it_was(tmp_path, monkeypatch):
    films = [counts((4, 8, 8)) for _ in range(3)]
    paths = [write_photron(tmp_path, film, 16, f"film{k}") for k, film in enumerate(films)]
    corpus = tmp_path / "c"
    checked = workers._checked

    def killed(recording):
        for index, frame in enumerate(checked(recording)):
            if recording.path.stem == "film1" and index == 2:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(workers, "_checked", killed)
    with pytest.raises(KeyboardInterrupt):
        ingest(paths, corpus)
    assert [video.id for video in sound(corpus).videos] == ["film0"]
    monkeypatch.undo()
    assert statuses(ingest(paths, corpus)) == ["already there", "added", "added"]
    assert [video.id for video in sound(corpus).videos] == ["film0", "film1", "film2"]


def test_bad_file_stops_and_keeps_what_is_finished(tmp_path):
    good = write_photron(tmp_path, counts((3, 8, 8)), 16, "good")
    broken = counts((3, 8, 8))
    broken[2, 0, 0] = 60_000
    bad = write_photron(tmp_path, broken, 16, "bad")
    later = write_photron(tmp_path, counts((3, 8, 8)), 16, "later")
    line = r"bad\.mraw: frame 2 holds the value 60000.*; 1 of 3 recordings are in .*--skip-bad"
    with pytest.raises(InputError, match=line):
        ingest([good, bad, later], tmp_path / "c")
    assert [video.id for video in sound(tmp_path / "c").videos] == ["good"]
    with pytest.raises(InputError, match=r"frame 2"):
        ingest([bad], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    outcomes = ingest([good, bad, later], tmp_path / "c", skip_bad=True)
    assert statuses(outcomes) == ["already there", "bad", "added"]
    assert "60000" in outcomes[1].problem and len(sound(tmp_path / "c")) == 2
    with pytest.raises(InputError, match=r"frame 2"):
        ingest([bad], tmp_path / "new", skip_bad=True)
    assert not (tmp_path / "new").exists()


def test_nan_frame(tmp_path):
    values = np.ones((3, 8, 8), np.float32)
    values[1, 2, 2] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack")
    with pytest.raises(InputError, match=r"a\.tif: frame 1 holds 1 values that are NaN"):
        ingest([tmp_path / "a.tif"], tmp_path / "c", full_scale=2.0)
    assert not (tmp_path / "c").exists()


def test_sizes_and_crop(tmp_path):
    values = counts((3, 10, 15))
    path = write_cine(tmp_path / "a.cine", values)
    with pytest.raises(InputError, match=r"10 x 15 pixels .* of 4: pass --crop .* 8 x 12"):
        ingest([path], tmp_path / "c")
    assert statuses(ingest([path], tmp_path / "c", crop=True)) == ["added"]
    np.testing.assert_array_equal(whole(Corpus(tmp_path / "c")["a"]), values[:, :8, :12])
    assert statuses(ingest([path], tmp_path / "c", crop=True)) == ["already there"]
    ingest([path], tmp_path / "d", multiple_of=5)
    assert Corpus(tmp_path / "d")["a"].shape == (3, 10, 15)
    with pytest.raises(InputError, match=r"of 16$"):
        ingest([path], tmp_path / "e", multiple_of=16, crop=True)


@pytest.mark.slow
def test_splits_fill_up_and_older_ones_stay(tmp_path):
    paths = [write_photron(tmp_path, counts((2, 4, 4)), 16, f"f{k:02d}") for k in range(20)]
    ingest(paths[:11], tmp_path / "c")
    before = {video.id: video.info.split for video in Corpus(tmp_path / "c").videos}
    assert sorted(before.values()).count("train") in (8, 9)
    assert set(before.values()) == {"train", "validation", "test"}
    ingest(paths, tmp_path / "c")
    after = {video.id: video.info.split for video in Corpus(tmp_path / "c").videos}
    assert before.items() <= after.items()
    assert [list(after.values()).count(split) for split in ("train", "validation", "test")] == [
        16,
        2,
        2,
    ]
    extra = write_photron(tmp_path, counts((2, 4, 4)), 16, "extra")
    assert ingest([extra], tmp_path / "c", split="test")[0].split == "test"


def test_flat_and_dark_stacks_in_counts(tmp_path):
    """Float averages, packed 12 bit and 16-bit TIFF mix, since all are counts of the camera."""
    clean = np.linspace(0.1, 1.4, 3 * 8 * 8).reshape(3, 8, 8)
    raw = np.rint(50 + clean * 2000).astype(np.uint16)
    path = write_photron(tmp_path, raw, 12, "shot")
    flats = np.full((4, 8, 8), 2050, np.uint16) + np.array([-3, -1, 1, 3])[:, None, None]
    tifffile.imwrite(tmp_path / "flat.tif", flats.astype(np.uint16), photometric="minisblack")
    tifffile.imwrite(
        tmp_path / "dark.tif", np.full((8, 8), 50, np.float32), photometric="minisblack"
    )
    ingest([path], tmp_path / "c", flat=tmp_path / "flat.tif", dark=tmp_path / "dark.tif")
    video = Corpus(tmp_path / "c")["shot"]
    ours = np.stack([video.intensity(t) for t in range(3)]) * video.info.full_scale
    np.testing.assert_allclose(ours, (raw - 50.0) / 2000, atol=3e-5)
    with pytest.raises(InputError, match="needs a flat field"):
        ingest([path], tmp_path / "c", dark=tmp_path / "dark.tif")
    small = tmp_path / "small.tif"
    tifffile.imwrite(small, flats[:, :4].astype(np.uint16), photometric="minisblack")
    with pytest.raises(InputError, match="the flat field is 4 x 8"):
        ingest([path], tmp_path / "c", flat=small)


def test_given_flat_replaces_that_of_the_file(tmp_path):
    data = np.full((2, 8, 8), 500, np.uint16)
    path = write_dxchange(tmp_path / "a.h5", data, np.full((2, 8, 8), 1000, np.uint16))
    tifffile.imwrite(tmp_path / "flat.tif", np.full((8, 8), 2000, np.uint16))
    ingest([path], tmp_path / "own")
    ingest([path], tmp_path / "given", flat=tmp_path / "flat.tif")
    for name, expected in (("own", 0.5), ("given", 0.25)):
        video = Corpus(tmp_path / name)["a"]
        assert video.intensity(1).max() * video.info.full_scale == pytest.approx(expected, abs=3e-5)


def test_finding_recordings_in_folders(tmp_path):
    write_photron(tmp_path, counts((2, 4, 4)), 16, "a")
    write_cine(tmp_path / "b.cine", counts((2, 4, 4)))
    (tmp_path / "notes.txt").write_text("not a film")
    for folder, names in (
        ("x", ["s1_9.png", "s1_10.png", "s2_1.png", "s2_2.png"]),
        ("y", ["0.png", "1.png"]),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.fromarray(counts((4, 4), 8)).save(tmp_path / folder / name)
    for k in range(2):
        tifffile.imwrite(
            tmp_path / "x" / f"stack{k}.tif", counts((3, 4, 4), 16), photometric="minisblack"
        )
    found = [[file.name for file in source.files] for source in find_recordings([tmp_path])]
    assert sorted(found) == [
        ["0.png", "1.png"],
        ["a.mraw"],
        ["b.cine"],
        ["s1_9.png", "s1_10.png"],
        ["s2_1.png", "s2_2.png"],
        ["stack0.tif"],
        ["stack1.tif"],
    ]
    # What the shell makes of x/s1_*.png x/stack*.tif, and the same not expanded.
    listed = [*sorted((tmp_path / "x").glob("s1_*.png")), *(tmp_path / "x").glob("stack*.tif")]
    for given in (listed, [tmp_path / "x/s1_*.png", tmp_path / "x/stack*.tif"]):
        names = [[file.name for file in source.files] for source in find_recordings(given)]
        assert sorted(names) == [["s1_9.png", "s1_10.png"], ["stack0.tif"], ["stack1.tif"]]
    outcomes = ingest([tmp_path], tmp_path / "corpus", store="hdf5")
    assert {outcome.id for outcome in outcomes} == {"a", "b", "y", "s1", "s2", "stack0", "stack1"}
    # The corpus now lies in the searched folder and is no recording.
    assert set(statuses(ingest([tmp_path], tmp_path / "corpus", store="hdf5"))) == {"already there"}


def test_bad_requests(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    path = write_photron(tmp_path, counts((2, 4, 4)), 16)
    for paths, options, words in [
        ([], {}, "no files"),
        ([tmp_path / "notes.txt"], {}, "unknown kind"),
        ([tmp_path / "nowhere"], {}, "no such file"),
        ([path], {"frame_rate_hz": -1.0}, "-1"),
        ([path], {"pixel_size_um": float("nan")}, "pixel size"),
        ([path], {"multiple_of": 0}, "0"),
        ([path], {"flat": tmp_path / "none.tif"}, "none.tif"),
        ([path], {"dataset": "x"}, "HDF5"),
    ]:
        with pytest.raises(InputError, match=words) as error:
            ingest(paths, tmp_path / "c", **options)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "c").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no recordings"):
        ingest([tmp_path / "empty"], tmp_path / "c")


def test_frame_rate_is_kept_or_given(tmp_path, caplog):
    path = write_photron(tmp_path, counts((2, 4, 4)), 16, **{"Save Step": 3})
    ingest([path], tmp_path / "c")
    assert Corpus(tmp_path / "c")["run"].info.frame_rate_hz == 20_000
    ingest([path], tmp_path / "d", frame_rate_hz=5.0)
    assert Corpus(tmp_path / "d")["run"].info.frame_rate_hz == 5
    tifffile.imwrite(tmp_path / "t.tif", counts((4, 4)))
    ingest([tmp_path / "t.tif"], tmp_path / "d")
    assert "state its bit depth" in caplog.text
    ingest([tmp_path / "t.tif"], tmp_path / "e", bit_depth=12)
    assert Corpus(tmp_path / "e")["t"].info.bit_depth == 12
