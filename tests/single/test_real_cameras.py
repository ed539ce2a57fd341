"""The main job on real camera files: ingest, train a few steps, evaluate, reconstruct, report."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile

from hpc_xvr.data.corpus import Corpus

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RECORDINGS = {
    "photron_pymraw/ball_12bit.cihx": ("train", (15, 384, 384)),
    "photron_pymraw/beam.cihx": ("train", (4, 80, 1024)),
    "pyidi_showcase/data_showcase.cih": ("train", (75, 40, 640)),
    "pyidi_showcase/data_small_cine.cine": ("train", (235, 32, 256)),
    "pims_cine/cine_legacy.cine": ("validation", (97, 128, 128)),
    "pims_cine/cine_781.cine": ("test", (15, 256, 256)),
    "trackpy_foam": ("train", (9, 768, 768)),
    "aps_2bm_radiography": ("train", (10, 500, 500)),
}


def hpc_xvr(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "hpc_xvr", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def corpus(realdata, tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "corpus"
    for name, (split, _) in RECORDINGS.items():
        hpc_xvr("ingest", realdata(name), "--corpus", path, "--split", split)
    spray = realdata("spray_xray_cc0")
    fields = spray / "spray_polychromatic_background.hdf5"
    hpc_xvr(
        "ingest",
        spray / "spray_polychromatic_Re-10600_frame0.hdf5",
        "--dataset",
        "Camera1",
        "--flat",
        f"{fields}::/flat/Camera1",
        "--dark",
        f"{fields}::/dark-current/Camera1",
        "--corpus",
        path,
        "--split",
        "train",
    )
    return path


@pytest.fixture(scope="module")
def run(corpus):
    folder = corpus.parent / "run"
    hpc_xvr(
        "train",
        ROOT / "configs/pulse.yaml",
        "--set",
        f"run.dir={folder}",
        "--set",
        f"data.corpus={corpus}",
        "--set",
        "data.patch=32",
        "--set",
        "train.steps=4",
    )
    return folder


def test_every_recording_is_there_with_its_shape_and_intact(corpus):
    shapes = [v.shape for v in Corpus(corpus).videos]
    for _, shape in RECORDINGS.values():
        assert shape in shapes
    assert any(shape[1:] == (512, 512) for shape in shapes)  # the spray
    assert "all intact" in hpc_xvr("inspect", corpus, "--verify").stdout


def test_training_evaluation_and_report_run_on_it(corpus, run):
    losses = [
        json.loads(line)["loss"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if '"train"' in line
    ]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    table = hpc_xvr("evaluate", run).stdout
    assert "SWIN-XVR" in table
    rows = json.loads((run / "evaluation/evaluation.json").read_text())["rows"]
    psnr = {row["method"]: row["psnr"] for row in rows if "cine_781" in row["recording"]}
    assert psnr["detail"] > psnr["bicubic"] > 25
    hpc_xvr("report", run)
    assert "cine_781" in (run / "report.html").read_text()


def test_the_movie_of_two_merging_drops(corpus, run, tmp_path):
    """cine_781: 15 frames, a key frame every 8th and the last."""
    out = tmp_path / "drops.tif"
    hpc_xvr(
        "reconstruct", run, "--video", "cine_781", "--out", out, "--movie", tmp_path / "drops.webp"
    )
    movie = tifffile.imread(out)
    assert movie.shape == (15, 256, 256)
    truth = Corpus(corpus)["cine_781"]
    for t in (0, 8, 14):  # key frames pass through
        np.testing.assert_allclose(movie[t] / 65535, truth.intensity(t), atol=1e-4)
    assert (tmp_path / "drops.webp").stat().st_size > 10_000


def test_two_camera_files_become_a_movie(realdata, run, tmp_path):
    """The foam's binned frames as the fast camera, every fourth sharp frame as the slow one."""
    files = sorted(realdata("trackpy_foam").glob("*.tif"))
    sharp = np.stack([tifffile.imread(f) for f in files])
    fast = sharp.reshape(9, 192, 4, 192, 4).mean((2, 4)).round().astype(np.uint8)
    tifffile.imwrite(tmp_path / "fast.tif", fast, photometric="minisblack")
    tifffile.imwrite(tmp_path / "slow.tif", sharp[::4], photometric="minisblack")
    out = tmp_path / "movie.h5"
    hpc_xvr(
        "reconstruct",
        run,
        "--lr",
        tmp_path / "fast.tif",
        "--hr",
        tmp_path / "slow.tif",
        "--gap",
        4,
        "--out",
        out,
    )
    with h5py.File(out) as file:
        movie = file["exchange/data"][()] / 65535
    assert movie.shape == (9, 768, 768)
    error = np.abs(movie[2] - sharp[2] / 255).mean()
    blurred = np.abs(np.kron(fast[2] / 255, np.ones((4, 4))) - sharp[2] / 255).mean()
    assert error < blurred
