"""Frames made in tiles: the same as whole frames, and in less memory."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile
import torch

import hpc_xvr as xvr
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.errors import InputError
from hpc_xvr.model import key_propagation
from hpc_xvr.model.edvr import EDVR
from hpc_xvr.model.key_propagation import KeyPropagation, MotionStep
from hpc_xvr.model.tiling import tiles
from hpc_xvr.model.xvr import SwinXVR
from hpc_xvr.reconstruction import pipeline
from hpc_xvr.reconstruction.baselines import BASELINES
from hpc_xvr.reconstruction.methods import baseline_entry, model_entry, open_method
from hpc_xvr.reconstruction.pipeline import reconstruct
from hpc_xvr.reconstruction.tiles import in_tiles

EXACT = 1e-4
"""Of full scale: what rounding in another order may make of float32."""
ROUNDED = 4e-3
"""The same of bf16, which built-in weights run in where the processor has it; its own error against
float32 is larger."""


def any_weights(model, size=0.05):
    """Random weights everywhere, those too that start at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model.eval()


def swin(output="centre", base="none", scale=4, depths=(2, 3), window=4):
    model = SwinXVR(3, output, base, scale, 16, depths, 1, window, up_features=8)
    return any_weights(model)


def propagation(scale=4, blocks=2, **options):
    sizes = {"features": 16, "heads": 1, "motion_features": 8, "frame_features": 8}
    return any_weights(KeyPropagation(scale, blocks=blocks, window=4, **sizes, **options), 0.02)


def scene_of(frames, h, w, scale, rng):
    """A smooth scene that drifts, (T, scale*h, scale*w)."""
    field = rng.random((scale * h, scale * (w + frames)), np.float32)
    for axis in (0, 1):
        field = sum(np.roll(field, i, axis) for i in range(5)) / 5
    field = (field - field.mean()) / field.std() * 0.12 + 0.5
    return np.stack([field[:, scale * t : scale * (t + w)] for t in range(frames)]).clip(0, 1)


def two_cameras(frames, h, w, scale, seed=0):
    """(T, h, w) of such a scene, and its first and last sharp frame."""
    rng = np.random.default_rng(seed)
    sharp = scene_of(frames, h, w, scale, rng)
    lr = bin_down(sharp, scale) + 0.01 * rng.standard_normal((frames, h, w), np.float32)
    return lr.clip(0, 1), {0: sharp[0], frames - 1: sharp[-1]}


def frames_of(entry, lr, keys):
    shape = {"lr_frames": 1 if entry.lr_frames is None else entry.lr_frames, "n_out": entry.n_out}
    return np.stack([frame for _, frame in reconstruct(entry.method, lr, keys, **shape)])


def assert_the_same(entry, side, frames=6, h=37, w=70, scale=4):
    """Also where the frame is no multiple of windows and tiles."""
    lr, keys = two_cameras(frames, h, w, scale)
    whole = frames_of(entry, lr, keys)
    assert whole[1:-1].std() > 0.02
    in_parts = frames_of(in_tiles(entry, side), lr, keys)
    assert np.abs(in_parts - whole).max() < EXACT
    return whole


# What a network says of itself


@pytest.mark.parametrize(
    ("shape", "side", "halo", "align"),
    [((37, 70), 16, 5, 4), ((8, 8), 64, 3, 8), ((5, 1), 1, 0, 1), ((33, 16), 7, 9, 8)],
)
def test_tiles_cover_a_frame_once_and_lie_on_windows(shape, side, halo, align):
    covered = np.zeros(shape, int)
    for tile in tiles(shape, side, halo, align):
        covered[tile.core] += 1
        for core, around, size in zip(tile.core, tile.around, shape, strict=True):
            assert core.start % align == around.start % align == 0
            assert around.stop % align == 0 or around.stop == size
            assert core.start - around.start >= min(halo, core.start)
            assert around.stop - core.stop >= min(halo, size - core.stop)
        x = torch.arange(covered.size).view(shape)
        assert (tile.cut(x[tile.around]) == x[tile.core]).all()
    assert (covered == 1).all()


@pytest.mark.parametrize("output", ["centre", "sequence"])
@pytest.mark.parametrize("base", ["none", "adaptive"])
@pytest.mark.parametrize("depths", [(1,), (2,), (2, 3)])
@pytest.mark.parametrize("window", [4, 5])
@pytest.mark.parametrize("scale", [2, 4])
def test_a_pixel_outside_the_halo_changes_nothing_one_inside_does(
    scale, window, depths, base, output
):
    model = any_weights(swin(output, base, scale, depths, window).double(), 0.3)
    halo, size = model.halo, 2 * 12 * window
    first = size // 2 // window * window  # of a tile as large as a window, in the middle
    tile = slice(first * scale, (first + window) * scale)
    lr = torch.rand(1, 3, 1, window, size, dtype=torch.float64).requires_grad_()
    hr = torch.rand(1, 2, 1, window * scale, size * scale, dtype=torch.float64).requires_grad_()
    model(lr, hr)[..., tile].square().sum().backward()
    seen = torch.stack(
        [
            lr.grad.abs().amax((0, 1, 2, 3)),
            hr.grad.abs().amax((0, 1, 2, 3)).unflatten(0, (-1, scale)).amax(1),
        ]
    ).amax(0)
    columns = seen.nonzero().flatten()
    assert columns.min() >= first - halo and columns.max() < first + window + halo
    reached = max(first - int(columns.min()), int(columns.max()) - first - window + 1)
    assert reached >= halo - 1, "the halo is larger than need be"


def test_the_published_network_looks_a_hundred_pixels_far():
    with torch.device("meta"):
        assert SwinXVR().halo == 106 and SwinXVR().key_halo == 2
        assert KeyPropagation().halo == 28


# Tiles and whole frames


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("base", ["none", "bicubic", "detail", "adaptive", "bayes"])
@pytest.mark.parametrize("output", ["centre", "sequence"])
def test_swin_xvr_in_tiles_is_as_in_whole_frames(output, base, scale):
    assert_the_same(model_entry("m", swin(output, base, scale)), 16 * scale, scale=scale)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("motions", [1, 2])
def test_key_propagation_in_tiles_is_as_in_whole_frames(motions, scale):
    model = propagation(scale, motions=motions)
    assert_the_same(model_entry("m", model), 16 * scale, scale=scale)


def test_things_may_move_farther_than_a_halo():
    """Motion of forty coarse pixels, in tiles of eight."""
    model = propagation()
    with torch.no_grad():
        model.motion.last.weight.zero_()
        model.motion.last.bias.copy_(torch.tensor([10.0, 1.0, -12.0, -2.0]))
    whole = assert_the_same(model_entry("m", model), 32)
    with torch.no_grad():
        model.motion.last.bias.zero_()
    assert (
        np.abs(frames_of(model_entry("m", model), *two_cameras(6, 37, 70, 4)) - whole).max() > 0.1
    )


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [(KeyPropagation, "halo", 4), (MotionStep, "halo", 0), (key_propagation, "FRAME_HALO", 0)],
)
def test_a_halo_that_is_too_small_would_show(place, name, value, monkeypatch):
    monkeypatch.setattr(place, name, value)
    if place is key_propagation:
        monkeypatch.setattr(MotionStep, "halo", 3)
    entry = model_entry("m", any_weights(propagation(), 0.2))
    with pytest.raises(AssertionError):
        assert_the_same(entry, 16, frames=4, h=16)


def test_builtin_weights_in_tiles():
    assert_the_same(open_method("builtin"), 64, frames=4, h=40, w=110)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", BASELINES)
def test_methods_without_learning_in_tiles(name, scale):
    entry = baseline_entry(name)
    assert_the_same(entry, 8 * scale, scale=scale)
    assert_the_same(entry, 1, scale=scale, h=9, w=12)  # less than a coarse pixel: one of them


def test_bayes_has_tiles_of_its_own():
    entry = baseline_entry("bayes")
    assert in_tiles(entry, 64) is entry


def test_what_cannot_be_made_in_tiles_is_refused():
    edvr = EDVR(3, features=8, groups=2, extract_blocks=1, reconstruct_blocks=1, up_features=8)
    with pytest.raises(InputError, match=r"--tile 64: e \(EDVR\) can look up features at any dis"):
        in_tiles(model_entry("e", edvr.eval()), 64)
    with pytest.raises(InputError, match="--tile 15: m looks at windows of 16 sharp pixels; give"):
        in_tiles(model_entry("m", swin()), 15)


PEAK = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, "tests/single")
import test_tiles as t
torch.set_num_threads(1)
model = t.swin(depths=(1,)) if sys.argv[1] == "swin" else t.propagation(blocks=1)
lr, keys = t.two_cameras(4, 160, 160, 4)

def status(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

for side in (64, 64, None):  # the first time libraries settle in
    entry = t.in_tiles(t.model_entry("m", model), side)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
    t.frames_of(entry, lr, keys)
    print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("network", ["swin", "propagation"])
def test_tiles_take_less_memory(network):
    command = [sys.executable, "-c", PEAK, network]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, parts, whole = map(int, done.stdout.split())  # KiB
    assert parts < whole / 2.5, (parts, whole)


# The command and the API


def write_cameras(folder, frames=9, gap=4):
    lr, _ = two_cameras(frames, 24, 40, 4)
    sharp = np.stack([two_cameras(frames, 24, 40, 4)[1][t] for t in (0, frames - 1)])
    middle = (sharp[0] + sharp[1]) / 2
    for name, stack in (("fast", lr), ("sharp", np.stack([sharp[0], middle, sharp[1]]))):
        counts = np.rint(4095 * stack).astype(np.uint16)
        tifffile.imwrite(folder / f"{name}.tif", counts, photometric="minisblack")
    cameras = ["--lr", folder / "fast.tif", "--hr", folder / "sharp.tif", "--gap", gap]
    return [*cameras, "--lr-bit-depth", 12, "--hr-bit-depth", 12]


def test_the_command_works_in_tiles_and_says_so(tmp_path, hpc_xvr):
    given = write_cameras(tmp_path)
    hpc_xvr("reconstruct", "builtin", *given, "--out", tmp_path / "whole.tif")
    given += ["--tile", 50]
    said = hpc_xvr("reconstruct", "builtin", *given, "--out", tmp_path / "parts.tif").err
    assert "tiles of 32x32 sharp pixels, made with 128 around them: up to 81 times the work" in said
    whole, parts = (tifffile.imread(tmp_path / f"{n}.tif").astype(int) for n in ("whole", "parts"))
    assert np.abs(whole - parts).max() <= ROUNDED * 65535
    about = json.loads((tmp_path / "parts.tif.json").read_text())
    assert about["settings"]["tile"] == 50
    some = hpc_xvr("reconstruct", "builtin", *given, "--frames", "5:7", "--out", tmp_path / "s.tif")
    assert some.err and (tifffile.imread(tmp_path / "s.tif") == parts[5:7]).all()
    said = hpc_xvr(
        "reconstruct", "builtin", *given[:-1], 0, "--out", tmp_path / "n.tif", code=2
    ).err
    assert re.search(r"--tile.*0 is not in the range", said)


def test_key_frames_are_checked_in_tiles_too(tmp_path, hpc_xvr):
    given = write_cameras(tmp_path)
    whole = ["reconstruct", "detail", *given, "--check", "--out", tmp_path / "whole.tif"]
    hpc_xvr(*whole)
    hpc_xvr(*whole[:-1], tmp_path / "parts.tif", "--tile", 32)
    psnr = [
        json.loads((tmp_path / f"{name}-trust.json").read_text())["held_out"]["mean_psnr_db"]
        for name in ("whole", "parts")
    ]
    assert psnr[0] == pytest.approx(psnr[1], abs=0.01)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A recording of 9 frames of 96 x 160 pixels."""
    scene = np.rint(4095 * scene_of(9, 24, 40, 4, np.random.default_rng(0))).astype(np.uint16)
    path = tmp_path_factory.mktemp("corpus") / "corpus"
    info = {"camera": "test", "bit_depth": 12, "scene": "made", "split": "test"}
    with CorpusWriter(path) as writer:
        writer.add("one", scene, scene.shape, scene.dtype, {**info, "source": "simulated"})
    return path


def rows_of(folder):
    rows = json.loads((folder / "evaluation.json").read_text())["rows"]
    return {row["method"]: row for row in rows}


def test_methods_are_compared_in_tiles_too(corpus, tmp_path, hpc_xvr):
    call = ["evaluate", "builtin", "detail", "--corpus", corpus, "--gap", 8, "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    hpc_xvr(*call, whole)
    said = hpc_xvr(*call, parts, "--tile", 32).err
    assert "builtin: tiles of 32x32 sharp pixels, made with 128 around them" in said
    a, b = rows_of(whole), rows_of(parts)
    assert set(a) == set(b) == {"builtin", "detail"}
    for name, row in a.items():
        for metric in ("psnr", "ssim", "aad", "flicker"):
            assert b[name][metric] == pytest.approx(row[metric], rel=5e-3), (name, metric)
    assert json.loads((parts / "evaluation.json").read_text())["settings"]["tile"] == 32
    assert "in tiles of 32 sharp pixels" in (parts / "comparison.html").read_text()
    assert "2 rows to be made" in hpc_xvr(*call, parts).err, "times would be those of tiles"
    said = hpc_xvr(*call, tmp_path / "none", "--tile", 8, code=2).err
    assert "--tile 8: builtin looks at windows of 32 sharp pixels; give at least so many" in said


def test_weights_are_adapted_with_tiles_too(tmp_path, hpc_xvr, monkeypatch):
    rng = np.random.default_rng(0)
    sharp = scene_of(17, 24, 40, 4, rng)
    for name, stack in (("fast", bin_down(sharp, 4)), ("sharp", sharp[::4])):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.rint(65535 * stack).astype(np.uint16))
    cameras = ["--lr", tmp_path / "fast.tif", "--hr", tmp_path / "sharp.tif", "--gap", 4]
    sides = []
    monkeypatch.setattr(KeyPropagation, "_in_tiles", recorded(KeyPropagation._in_tiles, sides))
    call = ["adapt", "builtin", *cameras, "--steps", 1, "--out"]
    whole = hpc_xvr(*call, tmp_path / "whole.safetensors").out
    assert not sides
    parts = hpc_xvr(*call, tmp_path / "parts.safetensors", "--tile", 32).out
    assert len(sides) >= 2 and set(sides) == {32 // 4}
    a, b = (float(re.search(r"(\d+\.\d+) (?:->|dB)", said)[1]) for said in (whole, parts))
    assert a == pytest.approx(b, abs=0.05)


def recorded(method, sides):
    def seen(self, gap, side, only):
        sides.append(side)
        return method(self, gap, side, only)

    return seen


SLOWLY = """
import sys, time
from hpc_xvr.reconstruction import pipeline
run = pipeline._run
def slowly(*args):
    time.sleep(0.5)
    return run(*args)
pipeline._run = slowly
from hpc_xvr.cli import main
sys.argv = ["hpc-xvr", *sys.argv[1:]]
main()
"""


def test_a_killed_run_in_tiles_goes_on_bit_for_bit_and_whole_frames_are_not_mixed_in(
    tmp_path, hpc_xvr
):
    given = ["reconstruct", "detail", *write_cameras(tmp_path, 21, 10), "--out"]
    out, spool = tmp_path / "o.tif", tmp_path / ".o.tif.unfinished"
    tiled = [*map(str, given), str(out), "--tile", "32"]
    hpc_xvr(*tiled)
    whole = out.rename(tmp_path / "once.tif").read_bytes()

    def kill():
        job = subprocess.Popen([sys.executable, "-c", SLOWLY, *tiled], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 100
        while not list(spool.glob("0*-*")):
            assert time.monotonic() < end
            time.sleep(0.02)
        job.send_signal(signal.SIGKILL)
        job.wait()

    kill()
    assert "frames were finished before" in hpc_xvr(*tiled).err
    assert out.read_bytes() == whole
    kill()
    assert "had other tile" in hpc_xvr(*tiled[:-2]).err


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_where_memory_runs_out_tiles_are_named(error, tmp_path, hpc_xvr, monkeypatch):
    def full(*_):
        raise error("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(pipeline, "_run", full)
    call = ["reconstruct", "detail", *write_cameras(tmp_path), "--out", tmp_path / "m.tif"]
    said = hpc_xvr(*call, code=74).err
    assert "error: out of memory: " in said and "with --tile 1024 or less" in said
    assert "Traceback" not in said and not (tmp_path / "m.tif").exists()


def test_the_api_works_in_tiles():
    lr, keys = two_cameras(5, 24, 40, 4)
    model = xvr.load_model("builtin", device="cpu")
    fast, sharp = lr, np.stack(list(keys.values()))
    whole = dict(xvr.reconstruct(model, fast, sharp, gap=4))
    parts = dict(xvr.reconstruct(model, fast, sharp, gap=4, tile=32))
    assert list(parts) == list(whole)
    assert max(np.abs(parts[t] - whole[t]).max() for t in whole) < ROUNDED


def test_the_api_checks_in_tiles():
    rng = np.random.default_rng(0)
    sharp = scene_of(17, 24, 40, 4, rng)
    fast = bin_down(sharp, 4) + 0.01 * rng.standard_normal((17, 24, 40), np.float32)
    cameras = fast.clip(0, 1), sharp[::4]
    model = xvr.load_model("builtin", device="cpu")
    whole = xvr.check_keys(model, *cameras, gap=4)
    parts = xvr.check_keys(model, *cameras, gap=4, tile=32)
    assert not np.array_equal(whole.error, parts.error), "tiles were not used"
    assert np.abs(whole.error - parts.error).max() < ROUNDED
    assert whole.mean_psnr == pytest.approx(parts.mean_psnr, abs=0.05)
    a = list(xvr.reconstruct_checked(model, *cameras, gap=4, check=whole))
    b = list(xvr.reconstruct_checked(model, *cameras, gap=4, check=whole, tile=32))
    assert [one.t for one in a] == [one.t for one in b] == list(range(17))
    assert 0 < max(np.abs(x.frame - y.frame).max() for x, y in zip(a, b, strict=True)) < ROUNDED
    for x, y in zip(a, b, strict=True):
        assert x.chi_square == pytest.approx(y.chi_square, abs=0.05)
