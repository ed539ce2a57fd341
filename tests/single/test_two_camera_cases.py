"""Two cameras with odd but ordinary files: the answers of shared/cases."""

from __future__ import annotations

import re
import shutil

import h5py
import numpy as np
import pytest
import tifffile

from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.pairing.reading import CameraReading

PAIRS = {
    "floats, each of its own maximum": ["lr_float.tif", "hr_float.tif"],
    "corrected by fields given": [
        *("lr.tif", "hr.tif", "--hr-flat", "hr_flat.tif", "--hr-dark", "hr_dark.tif"),
        *("--lr-flat", "lr_flat.tif", "--lr-dark", "lr_dark.tif"),
    ],
    "corrected by their own fields": ["lr.h5", "hr.h5"],
    "only the sharp one corrected": ["lr.tif", "hr.h5"],
}


@pytest.fixture
def case(tmp_path, monkeypatch, cases):
    def copied(name: str):
        shutil.copytree(cases(name), tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        return tmp_path / name

    return copied


def read_back(hpc_xvr, file) -> np.ndarray:
    """A result's frames in its own unit, after `ingest`."""
    hpc_xvr("ingest", file, "--corpus", "back", "--split", "test")
    [video] = Corpus("back").split("test")
    return video.intensity(range(video.shape[0])) * video.info.full_scale


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("out", ["o.tif", "o.h5", "float32"])
def test_every_frame_has_the_scenes_greys(pair, out, case, hpc_xvr):
    folder = case("reconstruct-grey")
    lr, hr, *options = pair
    file = folder / (out if "." in out else "f.tif")
    kind = [] if "." in out else ["--dtype", out]
    hpc_xvr(
        *("reconstruct", "detail", "--lr", lr, "--hr", hr, "--gap", 4, "--out", file),
        *(*options, *kind),
    )
    if file.suffix == ".h5":
        with h5py.File(file) as opened:
            data = opened["exchange/data"]
            frames = data[:] / data.attrs["stored_full_scale"] * data.attrs["full_scale"]
    else:
        frames, info = tifffile.imread(file), tifffile.TiffFile(file).imagej_metadata["Info"]
        if not kind:
            frames = frames / 65535 * float(re.search(r"value of 65535: (\S+)", info)[1])
    assert len(frames) == 9
    assert np.abs(frames - np.load("scene.npy")).max() < 0.02
    assert np.abs(read_back(hpc_xvr, file) - frames).max() < 1e-4


def test_the_gap_is_that_of_the_headers(case, hpc_xvr):
    folder = case("reconstruct-gap-against-headers")
    hpc_xvr("reconstruct", "builtin", "--lr", "lr.h5", "--hr", "hr.h5", "--out", "o.tif")
    assert tifffile.imread(folder / "o.tif").shape == (9, 32, 48)


def test_lost_fast_frames_leave_the_times_of_the_others_right(case, hpc_xvr):
    folder = case("cine-dropped-frames")
    hpc_xvr("ingest", "sharp.cine", "--lr", "fast.cine", "--corpus", "c", "--split", "test")
    times = Corpus(folder / "c")["sharp"].info.lr_times
    assert times == pytest.approx([0, 0.25, 0.5, 1.75, 2, 2.25, 2.5, 2.75, 3])
    hpc_xvr(
        *("reconstruct", "linear_hr", "--video", "sharp", "--corpus", "c", "--gap", 3),
        *("--out", "counts.tif"),
    )
    info = tifffile.TiffFile(folder / "counts.tif").imagej_metadata["Info"]
    assert "value of 65535: 4095 counts" in info
    said = hpc_xvr(
        *("reconstruct", "bicubic", "--lr", "fast.cine", "--hr", "sharp.cine", "--out", "o.h5")
    )
    assert "jump after frame 2" in said.err
    assert "lost its frames at the instant of sharp frame 1" in said.err
    with h5py.File(folder / "o.h5") as file:
        written = file["exchange/time"][:]
        assert file["exchange/data"].shape == (9, 32, 48)
    assert written * 1e5 == pytest.approx([0, 1, 2, 7, 8, 9, 10, 11, 12], abs=1e-3)
    said = hpc_xvr(
        *("reconstruct", "bicubic", "--lr", "fast.cine", "--hr", "sharp.cine", "--out", "o.tif")
    )
    assert "not equally spaced" in tifffile.TiffFile(folder / "o.tif").imagej_metadata["Info"]


def test_a_stated_rate_moves_the_time_stamps_with_it(case):
    fast = case("cine-dropped-frames") / "fast.cine"
    as_filed, stated = CameraReading().open(fast), CameraReading(frame_rate_hz=2e5).open(fast)
    assert stated.frame_rate_hz == 2e5
    assert stated.times_s == pytest.approx(as_filed.times_s / 2, rel=1e-3)
