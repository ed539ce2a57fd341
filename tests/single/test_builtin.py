"""Weights that come with the package, by name, and methods without learning, by theirs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import tifffile
import torch

import hpc_xvr as xvr
from hpc_xvr.config import load
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.simulate.corpus import simulate_corpus
from hpc_xvr.data.simulate.experiment import simulate_video
from hpc_xvr.errors import InputError
from hpc_xvr.factory.build import build_model
from hpc_xvr.factory.builtin import builtin_names, file_of
from hpc_xvr.factory.weights import initial_weights, read_weights, write_weights
from hpc_xvr.metrics import psnr
from hpc_xvr.reconstruction import pipeline
from hpc_xvr.reconstruction.baselines import BASELINES
from hpc_xvr.reconstruction.methods import open_methods

GAP = 8


@pytest.fixture(scope="module")
def shot():
    """A recording that nothing was trained on: (17, 96, 96) counts of 12 bits."""
    return simulate_video("bubbles", (17, 96, 96), 987_654, lr_stream=False).frames


@pytest.fixture
def files(shot, tmp_path):
    """What two cameras saw of it, as options of the command line."""
    lr = np.rint(bin_down(shot.astype(np.float32), 4)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "hr.tif", shot[::GAP], photometric="minisblack")
    tifffile.imwrite(tmp_path / "lr.tif", lr, photometric="minisblack")
    both = ["--lr", tmp_path / "lr.tif", "--hr", tmp_path / "hr.tif"]
    return [*both, "--lr-bit-depth", 12, "--hr-bit-depth", 12]


def frames_of(name, shot, gap=GAP, **options):
    """What a method makes of what two cameras saw of a recording (12 bits)."""
    sharp = shot / np.float32(4095)
    found = xvr.reconstruct(
        xvr.load_model(name, device="cpu"), bin_down(sharp, 4), sharp[::gap], gap=gap, **options
    )
    return sharp, dict(found)


def test_what_ships_says_what_it_is():
    assert builtin_names()[0] == "base"
    for name in builtin_names():
        path = file_of(f"builtin:{name}")
        assert path.stat().st_size <= 8e6
        with safetensors.safe_open(path, "pt") as file:
            facts = file.metadata()
        assert facts["license"] == "BSD-3-Clause" and "hpc-xvr train" in facts["trained"]
        config = json.loads(facts["config"])
        assert not config["data"]["corpus"].startswith("/")
        assert not config["run"]["dir"].startswith("/")
        card = path.with_name("README.md").read_text()
        assert f"builtin:{name}" in card
    assert file_of("builtin") == file_of("builtin:base")


def test_it_is_sharper_than_every_method_without_learning(shot):
    """And beside a key frame, where that is nearly the truth, no worse than any of them."""
    sharp, ours = frames_of("builtin", shot)
    theirs = [frames_of(name, shot)[1] for name in BASELINES]
    between = [t for t in range(17) if t % GAP]

    def mean(frames):
        return np.mean([psnr(frames[t], sharp[t]) for t in between])

    assert mean(ours) > max(map(mean, theirs)) + 1.5
    for t in (1, 7, 9, 15):
        assert psnr(ours[t], sharp[t]) > max(psnr(frames[t], sharp[t]) for frames in theirs)
    for t in (0, 8, 16):
        np.testing.assert_allclose(ours[t], sharp[t], atol=2e-5)  # stored in 16 bits


def test_a_scene_that_stands_still_stays_as_sharp_as_its_key_frames():
    still = np.repeat(simulate_video("layers", (1, 64, 96), 5, lr_stream=False).frames, 13, axis=0)
    sharp, ours = frames_of("builtin", still, gap=12)
    assert min(psnr(ours[t], sharp[t]) for t in range(1, 12)) > 45


@pytest.mark.parametrize("size", [(2, 2), (9, 5), (2, 30)])
def test_frames_of_a_few_pixels(size, tmp_path, hpc_xvr):
    """Of 8x8 sharp pixels and more, also where they are compared and looked at."""
    h, w = size
    frames = np.random.default_rng(0).integers(100, 60_000, (13, 4 * h, 4 * w)).astype(np.uint16)
    lr = np.rint(bin_down(frames.astype(np.float32), 4)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "hr.tif", frames[::4], photometric="minisblack")
    tifffile.imwrite(tmp_path / "lr.tif", lr, photometric="minisblack")
    source = ["--lr", tmp_path / "lr.tif", "--hr", tmp_path / "hr.tif", "--gap", 4]
    out = tmp_path / "out.tif"
    doubts = ["--check", "--uncertainty", tmp_path / "s.h5"]
    hpc_xvr("reconstruct", "builtin", *source, "--out", out, *doubts)
    assert tifffile.imread(out).shape == frames.shape
    mine = tmp_path / "mine.safetensors"
    hpc_xvr("adapt", "builtin", *source, "--steps", 1, "--out", mine)
    assert mine.exists()


def test_by_name_in_every_command(shot, files, tmp_path, hpc_xvr):
    out = tmp_path / "movie.tif"
    hpc_xvr("reconstruct", "builtin", *files, "--gap", GAP, "--out", out)
    frames = tifffile.imread(out) / np.float32(65535)
    _, wanted = frames_of("builtin", shot)
    np.testing.assert_allclose(frames, np.stack(list(wanted.values())), atol=2e-3)
    hpc_xvr("export", "builtin", "--out", tmp_path / "copy.safetensors")
    ours, copy = (read_weights(p) for p in ("builtin", tmp_path / "copy.safetensors"))
    assert all(torch.equal(copy.weights[k], v) for k, v in ours.weights.items())
    simulate = load(
        None, ["simulate={videos: 2, size: [9, 64, 64], splits: {test: 1}, lr_stream: false}"]
    ).simulate
    simulate_corpus(simulate, tmp_path / "c", workers=1)
    where = ["--corpus", tmp_path / "c", "--gap", 4, "--out", tmp_path / "e"]
    hpc_xvr("evaluate", "builtin", "mine=builtin:base", "bicubic", *where)
    rows = (tmp_path / "e" / "evaluation.csv").read_text()
    assert {line.split(",")[5] for line in rows.splitlines()[1:]} == {"builtin", "mine", "bicubic"}


def test_training_starts_from_it():
    config = read_weights("builtin").config
    model = build_model(config)
    initial_weights(model, "builtin")
    wanted = read_weights("builtin").weights
    assert all(torch.equal(v, wanted[k]) for k, v in model.state_dict().items())


def test_starting_from_it_with_other_settings_is_told(tmp_path, caplog):
    """Settings that no shape shows, from whatever holds the weights."""
    trained = read_weights("builtin")
    model = build_model(trained.config)
    initial_weights(model, "builtin", trained.config.model)
    other = trained.config.model.model_copy(update={"drop_path": 0.0, "attention": "explicit"})
    initial_weights(model, "builtin", other)
    assert not caplog.messages
    lookup = {"linear": "both", "both": "linear"}[trained.config.model.lookup]
    other = trained.config.model.model_copy(update={"lookup": lookup})
    write_weights(tmp_path / "w.safetensors", trained, {})
    for path in ("builtin", tmp_path / "w.safetensors"):
        caplog.clear()
        initial_weights(model, path, other)
        [line] = caplog.messages
        assert line.startswith(f"train.weights {path}: ")
        assert line.endswith(f"model.lookup {trained.config.model.lookup}, this run has {lookup}")


def test_methods_without_learning_make_movies_too(shot, files, tmp_path, hpc_xvr):
    for name in ("bayes", "bicubic"):
        hpc_xvr("reconstruct", name, *files, "--gap", GAP, "--out", tmp_path / f"{name}.tif")
        frames = tifffile.imread(tmp_path / f"{name}.tif") / np.float32(65535)
        _, wanted = frames_of(name, shot)
        np.testing.assert_allclose(frames, np.stack(list(wanted.values())), atol=3e-3)
    refused = hpc_xvr("reconstruct", "bayes", *files, "--out", tmp_path / "x.tif", code=2).err
    assert "no frame rates are known" in refused and "--gap" in refused
    half = bin_down(shot / np.float32(4095), 2)  # any scale
    found = dict(xvr.reconstruct(xvr.load_model("bayes"), half, shot[::GAP] / 4095.0, gap=GAP))
    assert found[3].shape == (96, 96)


def test_gaps_beyond_what_was_learned(files, tmp_path, hpc_xvr, caplog):
    longest = open_methods(["builtin"])["builtin"].longest_gap
    still = simulate_video("crack", (longest + 2, 32, 32), 1, lr_stream=False).frames
    with pytest.raises(InputError, match=f"up to {longest + 1} fast frames apart.* {longest} at"):
        frames_of("builtin", still, gap=longest + 1)
    _, frames = frames_of("builtin", still, gap=longest + 1, force=True)
    assert len(frames) == longest + 2 and "look at the result with care" in caplog.text
    frames_of("bicubic", still, gap=longest + 1)
    tifffile.imwrite(tmp_path / "hr.tif", still[:: longest + 1], photometric="minisblack")
    lr = np.rint(bin_down(still.astype(np.float32), 4)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "lr.tif", lr, photometric="minisblack")
    out = tmp_path / "long.tif"
    call = ["reconstruct", "builtin", *files, "--gap", longest + 1, "--out", out]
    assert "try with --force" in hpc_xvr(*call, code=2).err and not out.exists()
    hpc_xvr(*call, "--force")
    assert len(tifffile.imread(out)) == longest + 2


def test_frames_that_cannot_be_right_are_refused(shot):
    sharp = shot / np.float32(4095)
    lr, model = bin_down(sharp, 4), xvr.load_model("builtin", device="cpu")

    def make(lr, keys):
        return list(xvr.reconstruct(model, lr, keys, gap=GAP))

    lost = sharp[::GAP].copy()
    lost[1] = 0.25
    with pytest.raises(InputError, match=r"key frame at frame 8: all its pixels are 0\.25"):
        make(lr, lost)
    lr[5, 2, 3] = np.nan
    frames = pipeline.reconstruct(
        model.method.method,
        lr,
        {0: sharp[0], 8: sharp[8]},
        lr_frames=model.lr_frames,
        n_out=model.frames_out,
    )
    with pytest.raises(InputError, match="frame 5 of the fast camera: 1 of its 576 pixels are not"):
        list(frames)
    with pytest.raises(InputError, match=r"builtin:huge: .* there are builtin:base"):
        xvr.load_model("builtin:huge")
    with pytest.raises(InputError, match=r"scale 4 needs 192x192"):
        make(bin_down(sharp, 2), sharp[::GAP])


def test_the_mean_of_two_weights(tmp_path, hpc_xvr):
    base = read_weights("builtin")
    moved = {key: value + 1 for key, value in base.weights.items()}
    write_weights(tmp_path / "moved.safetensors", replace(base, weights=moved), {})
    out = tmp_path / "mean.safetensors"
    hpc_xvr("export", "builtin", "--mean-with", tmp_path / "moved.safetensors", "--out", out)
    found = read_weights(out)
    for key, value in base.weights.items():
        assert torch.allclose(found.weights[key], value + 0.5, atol=1e-6)
    assert found.config == base.config
    with safetensors.safe_open(out, "pt") as file:
        assert "--mean-with" in file.metadata()["command"]
    model = base.config.model.model_copy(update={"depths": [1]})
    small = build_model(base.config.model_copy(update={"model": model}))
    other = replace(base, config=base.config.model_copy(update={"model": model}))
    other = replace(other, weights=small.state_dict())
    write_weights(tmp_path / "small.safetensors", other, {})
    call = ["export", "builtin", "--mean-with", tmp_path / "small.safetensors"]
    said = hpc_xvr(*call, "--out", tmp_path / "none.safetensors", code=2)
    assert "is another network than builtin" in said.err
    assert not (tmp_path / "none.safetensors").exists()
