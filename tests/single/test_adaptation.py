"""Weights adapted to a recording: better on key frames they have not seen, or left as they were."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import safetensors.torch
import tifffile
import torch

from hpc_xvr.adaptation import MARGIN, Triples, _triples, adapt
from hpc_xvr.config import load
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.pairing.joining import Pairing
from hpc_xvr.data.simulate.experiment import simulate_video
from hpc_xvr.errors import InputError
from hpc_xvr.factory.build import build_model
from hpc_xvr.factory.weights import Trained, read_weights, write_weights
from hpc_xvr.reconstruction import workflow
from hpc_xvr.reconstruction.material import CameraFiles, Material
from hpc_xvr.reconstruction.methods import baseline_entry, model_entry, open_method
from hpc_xvr.reconstruction.provenance import weights_sha256
from hpc_xvr.reconstruction.streams import KeyFrames, Stream
from hpc_xvr.reconstruction.writers import Calibration

GAP = 4
CONFIG = load(
    None,
    [
        "model={name: key_propagation, embed_dim: 16, depths: [1], heads: 1, motion_features: 8,"
        " frame_features: 8, step_features: 4}",
        "data.hr_gap=4",
    ],
)


def network(only_bicubic=False):
    torch.manual_seed(0)
    model = build_model(CONFIG)
    if only_bicubic:
        with torch.no_grad():
            model.choose.conv.bias.view(8, 16)[6] = 50.0
            model.choose.conv.weight.zero_()
    return model


def method(model):
    return replace(model_entry("small", model.eval()), config=CONFIG)


def material(frames):
    """Two cameras that saw frames (T, H, W), a key frame every GAP."""
    lr = bin_down(frames, 4)
    times = range(0, len(frames), GAP)
    return Material(
        Stream(lr.shape, lambda t: lr[t]),
        KeyFrames(times, frames.shape[1:], lambda t: frames[t]),
        Calibration(None, None, 1.0),
    )


def spray():
    return simulate_video("spray", (41, 64, 64), 3, lr_stream=False).frames / np.float32(4095)


def test_a_recording_teaches_what_its_other_key_frames_confirm():
    before = method(network())
    old = {name: value.clone() for name, value in before.network.state_dict().items()}
    adapted = adapt(before, material(spray()), steps=60, seed=1)
    assert adapted.steps and adapted.after > adapted.before + MARGIN
    assert re.search(r"\(\+\d\.\d\d\) on the key frames held back", adapted.told())
    for name, value in before.network.state_dict().items():
        assert torch.equal(value, old[name])  # what was given is left as it is
    learned = adapted.method.network.state_dict()
    assert not all(torch.equal(learned[name], old[name]) for name in old)
    assert adapted.method.fingerprint != before.fingerprint
    again = adapt(before, material(spray()), steps=60, seed=1)
    assert again.after == adapted.after


def test_weights_stay_where_there_is_nothing_to_learn():
    """Frames of independent noise: no picture of another time tells anything."""
    noise = np.random.default_rng(0).random((33, 64, 64), np.float32)
    before = method(network(only_bicubic=True))
    adapted = adapt(before, material(noise), steps=40)
    assert adapted.steps == 0 and adapted.after == adapted.before
    assert "no gain" in adapted.told() and "unchanged" in adapted.told()
    for name, value in before.network.state_dict().items():
        assert torch.equal(adapted.state[name], value)
        assert torch.equal(adapted.method.network.state_dict()[name], value)


def test_what_is_held_back_is_never_learned_from():
    frames = np.arange(41, dtype=np.float32)[:, None, None] / 100 + np.zeros((1, 8, 8), np.float32)
    learned, held = _triples(material(frames))
    assert [round(float(t.truth[0, 0] * 100)) for t in held] == [8, 20, 32]
    assert [round(float(t.truth[0, 0] * 100)) for t in learned] == [4, 12, 16, 24, 28, 36]
    for triple in (*learned, *held):
        truth = float(triple.truth[0, 0])
        assert float(triple.lr[1:-1][triple.place, 0, 0]) == pytest.approx(truth)
        np.testing.assert_allclose(triple.keys[:, 0, 0], [truth - 0.04, truth + 0.04], atol=1e-6)


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(InputError, match="has 3 key frames; at least 4 are needed"):
        adapt(method(network()), material(spray()[:9]))
    with pytest.raises(InputError, match=r"bayes is Bayesian fusion; only .* key_propagation"):
        adapt(baseline_entry("bayes"), material(spray()))


def test_what_is_learned_from_does_not_pile_up_in_memory():
    """A long recording: frames are read when they are needed, within bounds."""
    read = []
    whole = material(np.random.default_rng(0).random((41, 8, 8), np.float32))
    counted = replace(
        whole, keys=KeyFrames(list(whole.keys), (8, 8), lambda t: read.append(t) or whole.keys[t])
    )
    times = [(a, a + GAP, a + 2 * GAP) for a in range(0, 33, GAP)]
    small = Triples(counted, times, memory=1)
    assert read == [] and small.longest_gap == 2 * GAP and len(small) == 9
    for _ in range(2):
        np.testing.assert_array_equal(small[1].truth, whole.keys[8])
    assert read == [4, 12, 8]  # the last one is kept
    _ = small[0], small[1]
    assert len(read) == 9
    large = Triples(counted, times)
    _ = list(large), list(large)
    assert len(read) == 9 + 3 * 9


def test_gaps_that_are_too_long_are_refused_or_told(tmp_path, hpc_xvr):
    """Key frames to learn from are made at twice the gap."""
    counts = simulate_video("crack", (125, 32, 32), 3, lr_stream=False).frames
    lr = np.rint(bin_down(counts.astype(np.float32), 4)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "lr.tif", lr, photometric="minisblack")
    weights, out = tmp_path / "small.safetensors", tmp_path / "mine.safetensors"
    write_weights(weights, Trained(network().state_dict(), CONFIG, 7), {})  # gaps up to 20
    for gap in (31, 12):
        tifffile.imwrite(tmp_path / f"{gap}.tif", counts[::gap], photometric="minisblack")
    call = ["adapt", weights, "--lr", tmp_path / "lr.tif", "--steps", 1, "--out", out]
    call += ["--lr-bit-depth", 12, "--hr-bit-depth", 12]
    long = [*call, "--hr", tmp_path / "31.tif", "--gap", 31]
    assert "up to 31 fast frames apart" in hpc_xvr(*long, code=2).err and not out.exists()
    hpc_xvr(*long, "--force")
    out.unlink()
    said = hpc_xvr(*call, "--hr", tmp_path / "12.tif", "--gap", 12, "--tile", 32)
    assert "24 frames apart, small was trained for 20" in said.out + said.err


def test_a_reconstruction_killed_after_adapting_goes_on_with_its_weights(tmp_path, monkeypatch):
    counts = simulate_video("bubbles", (29, 64, 64), 3, lr_stream=False).frames
    lr = np.rint(bin_down(counts.astype(np.float32), 4)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "hr.tif", counts[::GAP], photometric="minisblack")
    tifffile.imwrite(tmp_path / "lr.tif", lr, photometric="minisblack")
    weights = tmp_path / "small.safetensors"
    write_weights(weights, Trained(network().state_dict(), CONFIG, 7), {})
    source = CameraFiles(tmp_path / "lr.tif", tmp_path / "hr.tif", pairing=Pairing(GAP))
    seeds = iter(range(10))

    def refine(method, material):
        """Other weights each time."""
        return adapt(method, material, steps=20, seed=next(seeds)).method

    def run(name):
        out = tmp_path / name
        workflow.reconstruct_run(weights, torch.device("cpu"), source, out=out, refine=refine)
        return tifffile.imread(out)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workflow, "_make", killed)
        run("a.tif")
    a = run("a.tif")
    assert next(seeds) == 1, "adapted once"
    seeds = iter(range(10))
    np.testing.assert_array_equal(run("b.tif"), a)
    assert "adapted" in json.loads((tmp_path / "a.tif.json").read_text())["settings"]


def test_the_commands(tmp_path, hpc_xvr):
    """`adapt` writes weights that `reconstruct` takes, and gets what `reconstruct --adapt` does."""
    counts = simulate_video("bubbles", (29, 64, 64), 3, lr_stream=False).frames
    lr = np.rint(bin_down(counts.astype(np.float32), 4)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "hr.tif", counts[::GAP], photometric="minisblack")
    tifffile.imwrite(tmp_path / "lr.tif", lr, photometric="minisblack")
    model = network()
    about = {"license": "CC0-1.0", "weights": "raw"}
    write_weights(tmp_path / "small.safetensors", Trained(model.state_dict(), CONFIG, 7), about)
    source = ["--lr", tmp_path / "lr.tif", "--hr", tmp_path / "hr.tif", "--gap", GAP]
    source += ["--lr-bit-depth", 12, "--hr-bit-depth", 12]

    mine = tmp_path / "mine.safetensors"
    said = hpc_xvr("adapt", tmp_path / "small.safetensors", *source, "--out", mine).out
    assert "(+" in said and f"written: {mine}" in said
    assert read_weights(mine).step == 7 and open_method(mine).longest_gap == 20
    hpc_xvr("export", mine, "--out", tmp_path / "copy.safetensors")
    with safetensors.safe_open(tmp_path / "copy.safetensors", "pt") as file:
        facts = file.metadata()  # licence and origin go with the weights
    assert facts["license"] == "CC0-1.0" and facts["weights"] == "raw"
    assert "(+" in facts["adapted"] and facts["command"].startswith("hpc-xvr")
    origin = json.loads(facts["adapted_to"])
    assert [s["role"] for s in origin["sources"]] == ["lr", "hr"]
    assert origin["settings"]["steps"] == 120 and origin["settings"]["gap"] == GAP
    old = safetensors.torch.load_file(tmp_path / "small.safetensors")
    model.load_state_dict(old)
    assert origin["method"]["weights_sha256"] == weights_sha256(model)
    for what, out in (("mine", "a.tif"), ("small", "b.tif"), ("small", "c.tif")):
        extra = ["--adapt"] if out == "b.tif" else []
        weights = tmp_path / f"{what}.safetensors"
        hpc_xvr("reconstruct", weights, *source, "--out", tmp_path / out, *extra)
    a, b, c = (tifffile.imread(tmp_path / f"{name}.tif") for name in "abc")
    np.testing.assert_array_equal(a, b)
    truth = counts / 4095 * 65535

    def error(frames):
        return np.abs(frames - truth).mean()

    assert error(a) < error(c)
    refused = hpc_xvr("adapt", "bayes", *source, "--out", mine, code=2).err
    assert "only weights of key_propagation can be adapted" in refused
    early = ["reconstruct", mine, *source, "--adapt", "--out"]
    for out, words in (("x.mp4", "unknown format .mp4"), ("no/x.tif", "does not exist")):
        said = hpc_xvr(*early, tmp_path / out, code=2).err
        assert words in said and "adapt: step" not in said  # before minutes of work
    lost = counts[::GAP].copy()
    lost[3] = 7
    tifffile.imwrite(tmp_path / "hr.tif", lost, photometric="minisblack")
    refused = hpc_xvr("adapt", mine, *source, "--out", tmp_path / "y.safetensors", code=2).err
    assert "the key frame at frame 12: all its pixels are" in refused
    assert not (tmp_path / "y.safetensors").exists()
    refused = hpc_xvr("adapt", mine, *source, "--out", tmp_path / "x.pt", code=2).err
    assert "must end in .safetensors" in refused
