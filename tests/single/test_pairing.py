"""Two cameras of one shot: the fast one's stream is stored with the recording, on its grid."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
import tifffile
import torch
from scipy.ndimage import affine_transform, gaussian_filter

from hpc_xvr.cli import main
from hpc_xvr.config import load
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.ingest.run import ingest
from hpc_xvr.data.pairing.joining import Pairing
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.data.registration import Registration, read_registration
from hpc_xvr.data.simulate.experiment import simulate_video
from hpc_xvr.errors import InputError
from hpc_xvr.factory.build import build_model
from hpc_xvr.reconstruction import workflow
from hpc_xvr.reconstruction.methods import model_entry
from support.camera_files import counts, shimadzu_parts, write_photron
from support.paths import PULSE


def seen_by(registration: Registration, frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What a fast camera of `size` would see of sharp frames, computed by scipy: the frames
    blurred to its pixel, looked up at the centres of its pixels."""
    angle = np.deg2rad(registration.rotation_deg)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = registration.scale * turn
    start = np.array(registration.origin) + matrix @ (0.5, 0.5) - 0.5
    blurred = gaussian_filter(frames.astype(float), (0, *[0.35 * registration.scale] * 2))
    out = np.stack(
        [affine_transform(f, matrix, start, output_shape=size, order=3) for f in blurred]
    )
    rows = slice(None, None, -1 if registration.flip in ("rows", "both") else 1)
    columns = slice(None, None, -1 if registration.flip in ("columns", "both") else 1)
    return np.clip(np.rint(out[:, rows, columns]), 0, None).astype(np.uint16)


def write_pair(folder, sharp, fast, name="shot", rate=60_000, fast_rate=None):
    path = write_photron(folder, sharp, 12, name, **{"Record Rate(fps)": rate})
    tifffile.imwrite(folder / f"{name}-fast.tif", fast, photometric="minisblack")
    return path, folder / f"{name}-fast.tif"


def whole(video) -> tuple[np.ndarray, np.ndarray]:
    return video.read(range(video.shape[0])), video.read_lr(range(video.lr_shape[0]))


def smooth(shape=(4, 96, 128)) -> np.ndarray:
    y, x, t = np.meshgrid(*(np.arange(n) for n in (shape[1], shape[2], shape[0])), indexing="ij")
    wave = np.sin(x / 7 + t) * np.cos(y / 9 - t) + 0.5 * np.sin((x + 2 * y) / 17)
    return np.moveaxis(2000 + 1000 * wave, 2, 0).astype(np.uint16)


@pytest.mark.parametrize("store", ["zarr", "hdf5"])
def test_a_stream_is_kept_as_it_is(tmp_path, store):
    """Without a registration; the Shimadzu's .dat has its own rate, start and bit depth."""
    sharp, fast = counts((3, 16, 24)), counts((7, 250, 400), 10)
    path = write_photron(tmp_path, sharp, 12, **{"Record Rate(fps)": 1_000_000})
    (tmp_path / "hpv.dat").write_bytes(b"".join(shimadzu_parts(fast)))
    pairing = Pairing(start=-0.2)  # 5 MHz, from 0.2 sharp frames before the first one
    ingest(
        [path], tmp_path / "c", lr=[tmp_path / "hpv.dat"], store=store, pairing=pairing, crop=True
    )
    video = Corpus(tmp_path / "c")["run"]
    frames, lr = whole(video)
    np.testing.assert_array_equal(frames, sharp[:2])  # the fast frames end at 1.0
    np.testing.assert_array_equal(lr, fast)
    info = video.info
    assert info.lr_times == pytest.approx([-0.2, 0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert (info.lr_bit_depth, info.registration) == (10, None)
    assert info.metadata["lr_camera"] == "Shimadzu HPV-X2"
    assert info.metadata["lr_frame_rate_hz"] == pytest.approx(5e6)
    assert info.metadata["lr_source"] == "hpv.dat"
    again = ingest(
        [path], tmp_path / "c", lr=[tmp_path / "hpv.dat"], store=store, pairing=pairing, crop=True
    )
    assert again[0].status == "already there"
    # Without the stream it is another recording.
    assert ingest([path], tmp_path / "c", store=store)[0].status == "added"


def test_cameras_that_lie_exactly_over_each_other_keep_every_value(tmp_path):
    sharp, fast = counts((4, 16, 24)), counts((4, 4, 6))
    paths = write_pair(tmp_path, sharp, fast)
    pairing = Pairing(gap=1, registration=Registration(scale=4))
    ingest(
        [paths[0]],
        tmp_path / "c",
        lr=[paths[1]],
        lr_camera=CameraReading(bit_depth=12),
        pairing=pairing,
    )
    frames, lr = whole(Corpus(tmp_path / "c")["shot"])
    np.testing.assert_array_equal(frames, sharp)
    np.testing.assert_array_equal(lr, fast)


@pytest.mark.parametrize(
    "registration",
    [
        Registration(scale=4, origin=(8, 4)),
        Registration(scale=2.92, origin=(3.4, 5.7)),
        Registration(scale=2.92, origin=(3.4, 5.7), flip="rows"),
        Registration(scale=3.3, origin=(9, 3.2), rotation_deg=4, flip="both"),
        Registration(scale=5.1, origin=(-4, -6), rotation_deg=-3, flip="columns"),
    ],
)
def test_registered_frames_are_those_of_the_sharp_camera_binned(tmp_path, registration):
    sharp = smooth()
    fast = seen_by(registration, sharp, (24, 32))
    paths = write_pair(tmp_path, sharp, fast)
    ingest(
        [paths[0]],
        tmp_path / "c",
        lr=[paths[1]],
        lr_camera=CameraReading(bit_depth=12),
        crop=True,
        pairing=Pairing(gap=1, registration=registration),
    )
    video = Corpus(tmp_path / "c")["shot"]
    frames, lr = whole(video)
    assert lr.shape[1:] == (frames.shape[1] // 4, frames.shape[2] // 4)
    assert video.info.registration == registration
    _, top, left = video.info.metadata["hr_cut_from"]
    assert video.info.metadata["lr_camera_size"] == [24, 32]
    np.testing.assert_array_equal(
        frames, sharp[:, top : top + frames.shape[1], left : left + frames.shape[2]]
    )
    assert frames.shape[1] * frames.shape[2] > 2500  # of 12,288
    wanted = bin_down(frames.astype(np.float32), 4)
    inner = np.s_[:, 1:-1, 1:-1]  # scipy's camera has no light beyond the sharp frame
    error = np.abs(lr[inner] - wanted[inner]).mean()
    assert error < 60
    moved = np.abs(np.roll(lr, 1, 2)[inner] - wanted[inner]).mean()
    assert error < moved / 4  # one pixel aside, and it fits no more


def test_what_the_fast_camera_did_not_see_is_cut_or_refused(tmp_path):
    sharp = smooth((9, 96, 128))
    fast = seen_by(Registration(scale=3, origin=(6, 8)), sharp[2:6], (20, 30))
    paths = write_pair(tmp_path, sharp, fast)
    pairing = Pairing(1, 2.0, Registration(scale=3, origin=(6, 8)))
    line = r"frames 2 to 5 of 9, rows 6 to 66 of 96 and columns 8 to 96 of 128: pass --crop"
    with pytest.raises(InputError, match=line):
        ingest([paths[0]], tmp_path / "c", lr=[paths[1]], pairing=pairing)
    ingest([paths[0]], tmp_path / "c", lr=[paths[1]], pairing=pairing, crop=True)
    video = Corpus(tmp_path / "c")["shot"]
    np.testing.assert_array_equal(whole(video)[0], sharp[2:6, 6:66, 8:96])
    assert video.lr_shape == (4, 15, 22) and video.info.lr_times == [0, 1, 2, 3]


@pytest.mark.parametrize("lost", [(1, 0), (0, 3), (3, 2)])
def test_a_fast_pixel_that_sticks_out_of_the_sharp_frame_is_cut_too(tmp_path, lost):
    """A sharp frame a few rows or columns short, without a registration."""
    whole_frames = smooth((3, 96, 128))
    fast = np.rint(bin_down(whole_frames.astype(np.float32), 4)).astype(np.uint16)
    height, width = 96 - lost[0], 128 - lost[1]
    sharp = np.ascontiguousarray(whole_frames[:, :height, :width])
    paths = write_pair(tmp_path, sharp, fast)
    one = {"lr": [paths[1]], "pairing": Pairing(1)}
    with pytest.raises(InputError, match="pass --crop"):
        ingest([paths[0]], tmp_path / "c", **one)
    ingest([paths[0]], tmp_path / "c", crop=True, **one)
    rows, columns = height // 4, width // 4
    frames, lr = whole(Corpus(tmp_path / "c")["shot"])
    np.testing.assert_array_equal(frames, whole_frames[:, : 4 * rows, : 4 * columns])
    np.testing.assert_array_equal(lr, fast[:, :rows, :columns])
    more = write_pair(tmp_path, sharp, np.pad(fast, ((0, 0), (0, 1), (0, 0))), "more")
    ingest([more[0]], tmp_path / "c", crop=True, lr=[more[1]], pairing=Pairing(1))
    with pytest.raises(InputError, match="low-resolution frames are"):  # another view
        Corpus(tmp_path / "c")["more"].require_lr(4)


@pytest.mark.parametrize(
    "pairing, words",
    [
        (Pairing(), "frame rate of the fast camera is unknown: give --lr-frame-rate, or --gap"),
        (Pairing(gap=2, start=100), "span sharp frames 100 to 101.5, but there are frames 0 to 3"),
        (Pairing(gap=2, start=-9), "check --lr-start"),
        (Pairing(gap=1, start=float("nan")), "gap 1, start nan"),
        (Pairing(gap=1, registration=Registration(scale=4, origin=(500, 0))), "saw none"),
    ],
)
def test_pairs_that_do_not_fit(tmp_path, pairing, words):
    paths = write_pair(tmp_path, counts((4, 16, 24)), counts((4, 4, 6)))
    with pytest.raises(InputError, match=words) as error:
        ingest([paths[0]], tmp_path / "c", lr=[paths[1]], pairing=pairing)
    assert "\n" not in str(error.value) and not (tmp_path / "c").exists()


def test_requests_that_do_not_fit(tmp_path, monkeypatch, capfd):
    paths = write_pair(tmp_path, counts((4, 16, 24)), counts((4, 4, 6)))

    def refused(*arguments: object) -> str:
        command = ["hpc-xvr", "ingest", paths[0], "--corpus", tmp_path / "c", *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        with pytest.raises(SystemExit) as stop:
            main()
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
        assert stop.value.code == 2 and not (tmp_path / "c").exists()
        return line

    pair = ("--lr", paths[1], "--gap", 1)
    assert "--gap: for a fast camera's files; give --lr too" in refused("--gap", 2)
    assert "--lr-bit-depth: for a fast camera's" in refused("--lr-bit-depth", 12)
    assert "2 files of a fast camera for 1 recordings" in refused(*pair, "--lr", paths[1])
    assert "no such file" in refused("--lr", tmp_path / "none.dat")
    assert "cannot be read" in refused(*pair, "--registration", tmp_path / "none.yaml")
    assert "scale: Field required" in refused(*pair, "--registration", "{origin: [1, 2]}")
    assert "greater than 0" in refused(*pair, "--registration", "{scale: -1}")
    assert "is not valid YAML" in refused(*pair, "--registration", "{scale: [")
    (tmp_path / "r.yaml").write_text("- 1")
    assert "not a mapping" in refused(*pair, "--registration", tmp_path / "r.yaml")
    (tmp_path / "r.json").write_text(json.dumps({"scale": 3, "origin": [1, 2], "flip": "rows"}))
    assert read_registration(str(tmp_path / "r.json")).flip == "rows"


def test_training_from_a_pair_without_simulated_degradation(tmp_path, monkeypatch):
    """Two simulated shots whose fast camera sits askew, as files, into a run that reads `lr`."""
    registration = Registration(scale=3.2, origin=(2.5, 4.25), rotation_deg=1, flip="rows")
    pairs = []
    for seed in (1, 2):
        video = simulate_video("bubbles", (24, 96, 128), seed, lr_stream=False)
        fast = seen_by(registration, video.frames, (28, 37))
        pairs.append(write_pair(tmp_path, video.frames, fast, f"shot{seed}"))

    def hpc_xvr(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["hpc-xvr", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            assert not stop.code

    common = ["--gap", 1, "--registration", registration.model_dump_json(), "--lr-bit-depth", 12]
    for split, (sharp, fast) in zip(("train", "validation"), pairs, strict=True):
        files = [sharp, "--lr", fast, "--corpus", tmp_path / "c", "--split", split]
        hpc_xvr("ingest", *files, "--crop", *common)
    video = Corpus(tmp_path / "c")["shot1"]
    assert video.lr_shape[1:] == (video.shape[1] // 4, video.shape[2] // 4)
    overrides = {
        "run.dir": tmp_path / "run",
        "data.corpus": tmp_path / "c",
        "data.lr_source": "recorded",
        "data.patch": 32,
        "train.steps": 3,
        "validation.every": 3,
    }
    told = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    hpc_xvr("train", PULSE, *told)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"train"' in line]
    assert len(losses) == 3 and np.isfinite(losses).all()


@pytest.mark.parametrize("suffix", [".tif", ".h5"])
def test_a_model_is_applied_to_the_raw_pair_with_the_options_of_ingest(
    tmp_path, monkeypatch, suffix
):
    """What the model sees of two files equals what ingest stores of them; the result is the sharp
    camera's cut, at the fast camera's rate, with what white and a pixel mean."""
    registration = Registration(scale=3.2, origin=(2.5, 4.25), rotation_deg=1, flip="rows")
    shot = simulate_video("bubbles", (25, 96, 128), 1, lr_stream=False)
    sharp, fast = write_pair(
        tmp_path, shot.frames[::4], seen_by(registration, shot.frames, (28, 37)), rate=10_000
    )
    options = ["--lr", fast, "--gap", 4, "--registration", registration.model_dump_json()]
    options += ["--lr-bit-depth", 12, "--lr-frame-rate", 4e4, "--hr-pixel-size", 1.5, "--crop"]
    config = load(
        None, ["model.embed_dim=8", "model.depths=[1]", "model.heads=1", "model.base=bicubic"]
    )
    entry = replace(model_entry("small", build_model(config).eval()), config=config)
    monkeypatch.setattr(workflow, "open_method", lambda *_: entry)

    def hpc_xvr(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["hpc-xvr", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            assert not stop.code

    hpc_xvr("ingest", sharp, "--corpus", tmp_path / "c", *options)
    out = tmp_path / f"r{suffix}"
    hpc_xvr("reconstruct", tmp_path, "--hr", sharp, *options, "--out", out)
    video = Corpus(tmp_path / "c")["shot"]
    if suffix == ".h5":
        with h5py.File(out) as file:
            frames, said = file["exchange/data"][()] / 65535, dict(file["exchange/data"].attrs)
        assert (said["frame_rate_hz"], said["pixel_size_um"], said["full_scale"]) == (
            4e4,
            1.5,
            4095,
        )
    else:
        with tifffile.TiffFile(out) as file:
            frames, said = file.asarray() / 65535, file.imagej_metadata
        assert (said["fps"], said["unit"]) == (4e4, "um")
    assert frames.shape == (25, *video.shape[1:])
    for k in range(7):
        np.testing.assert_allclose(frames[4 * k], video.intensity(k), atol=1e-5)
    for t in (5, 14):
        low = torch.from_numpy(video.lr_intensity(t))[None, None]
        bicubic = torch.nn.functional.interpolate(low, scale_factor=4, mode="bicubic")
        np.testing.assert_allclose(frames[t], bicubic[0, 0].clamp(0, 1), atol=2e-3)
    top, left = video.info.metadata["hr_cut_from"][1:]
    truth = shot.frames[:, top : top + frames.shape[1], left : left + frames.shape[2]] / 4095
    assert np.abs(frames - truth).mean() < 0.75 * np.abs(np.roll(frames, 3, 2) - truth).mean()


def test_the_real_pair(realdata, tmp_path):
    """Phantom and HPV-X2 at the same instant: scale 2.92, corner near row 34, column 57."""
    folder = realdata("tomobank_xfusion_png")
    sharp, fast = folder / "rad_00003_high_res.png", folder / "rad_00003_low_res.png"

    def likeness(origin: tuple[float, float], name: str) -> float:
        """Correlation of the stored stream with the sharp frame binned, large shades taken out."""
        ingest(
            [sharp],
            tmp_path / name,
            lr=[fast],
            crop=True,
            pairing=Pairing(gap=1, registration=Registration(scale=2.92, origin=origin)),
        )
        video = Corpus(tmp_path / name).videos[0]
        assert video.shape == (1, 728, 1168) and video.lr_shape == (1, 182, 292)
        ours, theirs = video.lr_intensity(0), bin_down(video.intensity(0)[None], 4)[0]
        flat = [part - gaussian_filter(part, 12) for part in (ours, theirs)]
        return float(np.corrcoef(flat[0].ravel(), flat[1].ravel())[0, 1])

    there = likeness((34, 57), "there")
    assert there > 0.7
    assert max(likeness((46, 57), "below"), likeness((34, 45), "left")) < 0.5 * there
