"""Whole experiments: chosen frames, long recordings, many of them, and runs that are killed."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hpc_xvr as xvr
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.pairing.joining import Pairing
from hpc_xvr.data.ranks import ONE_RANK
from hpc_xvr.errors import InputError
from hpc_xvr.files import remove_partials
from hpc_xvr.model.xvr import SwinXVR
from hpc_xvr.reconstruction import workflow
from hpc_xvr.reconstruction.material import CameraFiles, CorpusRecording, material_of
from hpc_xvr.reconstruction.methods import model_entry, open_method
from hpc_xvr.reconstruction.overlap import Behind, Beside, Stopped, ahead
from hpc_xvr.reconstruction.pipeline import WHOLE_GAP, Piece, pieces, reconstruct
from hpc_xvr.reconstruction.provenance import facts_of
from hpc_xvr.reconstruction.recordings import matched, read_pairs
from hpc_xvr.reconstruction.spool import Spool
from support.disk import fill

CPU = torch.device("cpu")
GAP = 4


def scene(frames, height=16, width=24, seed=0):
    """Sharp frames (T, H, W) of 12 bits in which something moves."""
    rng = np.random.default_rng(seed)
    field = rng.random((height + 8, width + frames + 8))
    for axis in (0, 1):  # a little smooth
        field = (field + np.roll(field, 1, axis) + np.roll(field, 2, axis)) / 3
    return np.stack(
        [(3900 * field[4:-4, t + 4 : t + 4 + width] + 100).astype(np.uint16) for t in range(frames)]
    )


def write_shot(folder, frames, gap=GAP, seed=0, name="", **size):
    """Files of both cameras, fast.tif and sharp.tif, and the true frames."""
    folder.mkdir(exist_ok=True, parents=True)
    sharp = scene(frames, seed=seed, **size)
    fast = bin_down(sharp.astype(np.float32), 4).round().astype(np.uint16)
    tifffile.imwrite(folder / f"{name}fast.tif", fast, photometric="minisblack")
    tifffile.imwrite(folder / f"{name}sharp.tif", sharp[::gap], photometric="minisblack")
    return sharp


def cameras(folder, gap=GAP, name=""):
    return CameraFiles(
        folder / f"{name}fast.tif", folder / f"{name}sharp.tif", pairing=Pairing(float(gap))
    )


def options(folder, gap=GAP):
    return ["--lr", folder / "fast.tif", "--hr", folder / "sharp.tif", "--gap", gap]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def results_in(folder):
    """Without what says how they were made."""
    return [name for name in names(folder) if not name.endswith(".json")]


def read(path):
    """Frames in the counts of the sharp camera."""
    with tifffile.TiffFile(path) as file:
        return file.asarray() * file.imagej_metadata["c1"], file.imagej_metadata["Info"]


# Pieces of work


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(3, 300),
    gap=st.integers(1, 150),
    first=st.integers(0, 20),
    n=st.sampled_from([(1, 1), (3, 1), (5, 5), (WHOLE_GAP, WHOLE_GAP)]),
    data=st.data(),
)
def test_pieces_share_out_the_frames_whatever_is_asked_for(length, gap, first, n, data):
    times = list(range(min(first, length - 2), length, gap))
    times = times if len(times) > 1 else [times[0], length - 1]
    start = data.draw(st.integers(0, length - 1))
    frames = range(start, data.draw(st.integers(start + 1, length)))
    every = {t: p for p in pieces(times, length, *n, range(length)) for t in p.frames}
    assert list(every) == list(range(length))
    some = list(pieces(times, length, *n, frames))
    assert [t for piece in some for t in piece.frames] == list(frames)
    for piece in some:
        whole = every[piece.frames.start]
        assert set(piece.frames) <= set(whole.frames)
        assert piece[1:] == whole[1:]
        assert set(piece.keys) <= set(times)


@pytest.mark.parametrize(("lr_frames", "n_out"), [(1, 1), (3, 1), (3, 3), (WHOLE_GAP, WHOLE_GAP)])
def test_chosen_frames_are_those_of_the_whole_and_read_only_their_gaps(lr_frames, n_out):
    lr = [np.full((2, 3), t / 100, np.float32) for t in range(41)]
    keys = {t: np.full((8, 12), t / 100, np.float32) for t in range(0, 41, 8)}
    seen = []

    class Counted(list):
        def __getitem__(self, t):
            seen.append(t)
            return super().__getitem__(t)

    def method(sample):  # depends on all that it is given
        lr, hr = sample["lr"].mean(), sample["hr"].mean()
        count = n_out or sample["lr"].shape[1] - 2
        steps = torch.arange(count).view(1, -1, 1, 1, 1) / 1000
        return (0.3 * lr + 0.3 * hr + steps).expand(1, count, 1, 8, 12)

    shape = {"lr_frames": lr_frames, "n_out": n_out}
    whole = dict(reconstruct(method, lr, keys, **shape))
    some = dict(reconstruct(method, Counted(lr), keys, **shape, frames=range(10, 15)))
    assert list(some) == list(range(10, 15))
    assert all((some[t] == whole[t]).all() for t in some)
    assert min(seen) >= 7 and max(seen) <= 17


def test_beyond_the_outermost_key_frame_time_is_mirrored():
    """A method sees frames in the order 5 4 3 | key 3 ... and the same key frame on both sides."""
    lr = [np.full((2, 3), t / 100, np.float32) for t in range(12)]
    keys = {t: np.full((8, 12), t / 100, np.float32) for t in (3, 8)}
    shown = []

    def method(sample):
        shown.append(
            [(100 * sample[name][0, :, 0, 0, 0]).round().int().tolist() for name in ("lr", "hr")]
            + [sample["hr_offset"][0].tolist()]
        )
        count = sample["lr"].shape[1] - 2
        return sample["lr"][:, 1:-1, :, :1, :1].expand(1, count, 1, 8, 12)

    made = dict(
        reconstruct(method, lr, keys, lr_frames=WHOLE_GAP, n_out=WHOLE_GAP, frames=range(12))
    )
    assert list(made) == list(range(12))
    for t, frame in made.items():
        assert frame == pytest.approx(t / 100)
    before, _, after = shown
    assert before == [[3, 2, 1, 0, 1, 2, 3], [3, 3], [-3, 3]]
    assert after == [[8, 9, 10, 11, 10, 9, 8], [8, 8], [-3, 3]]


def test_a_key_frame_of_two_gaps_is_encoded_once():
    torch.manual_seed(0)
    counted = []

    class Counting(SwinXVR):
        def hr_features(self, hr):
            counted.append(hr.shape[1])
            return super().hr_features(hr)

    model = Counting(embed_dim=8, depths=(2,), heads=1, window=4, up_features=8, drop_path=0.0)
    model.eval()
    sharp = scene(17) / np.float32(4095)
    lr, keys = bin_down(sharp, 4), {t: sharp[t] for t in range(0, 17, GAP)}
    method = model_entry("m", model)
    made = dict(reconstruct(method.method, lr, keys, lr_frames=3, n_out=1))
    assert counted == [1] * 5  # once a key frame
    for t in (6, 11):
        before = t - t % GAP
        hr = torch.from_numpy(np.stack([keys[before], keys[before + GAP]]))[None, :, None]
        window = torch.from_numpy(lr[t - 1 : t + 2])[None, :, None]
        with torch.inference_mode():
            expected = model(window, hr, hr.new_tensor([[before - t, before + GAP - t]]))
        np.testing.assert_allclose(made[t], expected[0, 0, 0].numpy().clip(0, 1), atol=1e-6)


# Frames that are asked for


def test_frames_and_beyond(tmp_path, hpc_xvr):
    sharp = write_shot(tmp_path, 11)  # key frames 0, 4, 8; 9 and 10 lie beyond
    given = [*options(tmp_path), "--hr-bit-depth", 12, "--lr-bit-depth", 12]
    run = lambda *more, **k: hpc_xvr("reconstruct", "detail", *given, *more, **k)  # noqa: E731
    said = run("--out", tmp_path / "all.tif").err
    assert "frames 9 to 10 lie beyond the outermost key frame and are left out" in said
    every, _ = read(tmp_path / "all.tif")
    assert len(every) == 9
    run("--out", tmp_path / "some.tif", "--frames", "3:7")
    some, info = read(tmp_path / "some.tif")
    assert "first frame: 3" in info and (some == every[3:7]).all()
    said = run("--out", tmp_path / "more.tif", "--frames", "5:", "--beyond").err
    more, info = read(tmp_path / "more.tif")
    assert len(more) == 6 and (more[:4] == every[5:]).all()
    assert "frames 9 to 10 are one-sided" in info and "look at them with care" in said
    errors = np.abs(more - sharp[5:]).mean((1, 2))
    assert errors[3] < 1 and errors[4:].max() < 1.5 * errors[:3].max()
    for wrong, words in (
        (
            "3:10",
            r"frames 0:9 .*can be made, as key frames are there from 0 to 8; with --beyond 0:",
        ),
        ("5:5", "5:5 are asked for"),
        ("3-5", "--frames 3-5: give A:B"),
        ("-1:3", "give A:B"),
    ):
        said = run("--out", tmp_path / "no.tif", "--frames", wrong, code=2).err
        assert re.search(words, said), said
    assert not (tmp_path / "no.tif").exists()
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_movie_of_key_frames_alone_is_told(tmp_path, hpc_xvr):
    """As of a corpus whose sharp camera was as fast: nothing would be reconstructed."""
    write_shot(tmp_path, 9, gap=1)
    said = hpc_xvr("reconstruct", "detail", *options(tmp_path, 1), "--out", tmp_path / "m.tif").err
    assert "all of these 9 frames are key frames" in said and "check --gap and --frames" in said
    write_shot(tmp_path, 9)
    said = hpc_xvr("reconstruct", "detail", *options(tmp_path), "--out", tmp_path / "m.tif").err
    assert "are key frames" not in said


def test_frames_far_beyond_a_key_frame_are_refused_by_weights_that_know_no_such_gaps():
    sharp = scene(60) / np.float32(4095)
    model = xvr.load_model("builtin", device="cpu")
    assert model.longest_gap == 33 or model.longest_gap
    reach = model.longest_gap // 2
    lr, keys = bin_down(sharp, 4), sharp[:9:8]
    with pytest.raises(InputError, match=rf"up to 51 beyond .* {reach} can be made"):
        xvr.reconstruct(model, lr, keys, gap=8, beyond=True)
    frames = dict(xvr.reconstruct(model, lr, keys, gap=8, beyond=True, frames=(7, 12)))
    assert list(frames) == [7, 8, 9, 10, 11]
    np.testing.assert_allclose(frames[8], keys[1], atol=1e-4)  # as 16 bits


# A corpus


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A recording with its own fast stream: two and a half fast frames a sharp one."""
    sharp = scene(51)
    folder = tmp_path_factory.mktemp("corpus") / "c"
    times = [(t - 3) / 10 for t in range(51)]
    info = dict(
        camera="test",
        frame_rate_hz=1000.0,
        pixel_size_um=2.0,
        exposure_s=None,
        bit_depth=12,
        scene="noise",
        split="test",
        source="made",
        lr_times=times,
        lr_bit_depth=12,
        metadata={"lr_frame_rate_hz": 10000.0},
    )
    fast = bin_down(sharp.astype(np.float32), 4).round().astype(np.uint16)
    with CorpusWriter(folder) as writer:
        writer.add("twin", sharp[3::10], (5, 16, 24), sharp.dtype, info, lr=fast)
        swapped = info | {"lr_times": [0.0, 2.0, 4.0]}
        writer.add("swapped", sharp[:5], (5, 16, 24), sharp.dtype, swapped, lr=fast[:3])
        late = info | {"lr_times": [2.6 + t / 10 for t in range(10)]}
        writer.add("late", sharp[10:15], (5, 16, 24), sharp.dtype, late, lr=fast[:10])
    return folder, sharp


def test_a_recording_is_made_from_its_own_fast_stream(twin, tmp_path, hpc_xvr):
    folder, sharp = twin
    run = lambda *more, **k: hpc_xvr(  # noqa: E731
        *("reconstruct", "detail", "--corpus", folder, "--video", "twin", *more), **k
    )
    run("--out", tmp_path / "o.tif")
    found, info = read(tmp_path / "o.tif")
    assert "first frame: 3" in info
    assert len(found) == 41  # all fast frames from key frame to key frame
    with tifffile.TiffFile(tmp_path / "o.tif") as file:
        assert file.imagej_metadata["finterval"] == pytest.approx(1e-4)
    errors = np.abs(found - sharp[3:44]).mean((1, 2))
    assert errors[::10].max() < 1 and errors.max() < 400
    np.testing.assert_array_equal(
        np.argmin(np.abs(found[:, None] - sharp[None].astype(float)).mean((2, 3)), 1)[::10],
        range(3, 44, 10),
    )
    run("--out", tmp_path / "b.tif", "--beyond")
    assert len(read(tmp_path / "b.tif")[0]) == 51
    # With a gap it is taken for sharp frames all of which are known, as before.
    run("--out", tmp_path / "g.tif", "--gap", 4)
    assert len(read(tmp_path / "g.tif")[0]) == 5


def test_a_recording_whose_streams_do_not_fit_is_refused(twin, tmp_path, hpc_xvr):
    folder, _ = twin
    for video, what, words in (
        ("swapped", "detail", "more sharp frames than fast ones; are the two files swapped"),
        ("late", "detail", r"at the instant of 1 sharp frame, at least 2 key frames are needed"),
    ):
        said = hpc_xvr(
            *("reconstruct", what, "--corpus", folder, "--video", video),
            *("--out", tmp_path / "o.tif"),
            code=2,
        ).err
        assert re.search(words, said), said
    method = open_method("builtin")
    config = method.config.model_copy(
        update={"data": method.config.data.model_copy(update={"scale": 2})}
    )
    with pytest.raises(InputError, match=r"with data.scale 2 they must be 8x12"):
        material_of(replace(method, config=config), CorpusRecording(folder, "twin"))
    assert not names(tmp_path)


# Threads


def test_reading_ahead_gives_all_and_passes_on_what_goes_wrong():
    taken = []

    def items():
        for i in range(5):
            taken.append(i)
            yield i
        raise OSError("unplugged")

    with pytest.raises(OSError, match="unplugged"), ahead(items(), 2) as got:
        assert [next(got) for _ in range(5)] == list(range(5))
        next(got)
    taken.clear()
    with ahead(items(), 1) as got:
        next(got)
    assert len(taken) <= 3  # who stops early leaves no thread that goes on
    assert not [t for t in threading.enumerate() if t.name == "reading"]


def test_what_fails_behind_or_beside_is_raised_in_front():
    done = []

    def act(item):
        if item == 3:
            raise InputError("disk")
        done.append(item)

    with pytest.raises(InputError, match="disk"), Behind(act) as behind:
        for i in range(50):
            behind.give(i)
    assert done == [0, 1, 2]
    with Behind(done.append) as behind:
        behind.give(7)
    assert done[-1] == 7

    def wait(over):
        over.wait()
        raise Stopped

    with pytest.raises(RuntimeError, match="front"), Beside(wait):
        raise RuntimeError("front")

    def fail(over):
        raise InputError("beside")

    with pytest.raises(InputError, match="beside"), Beside(fail):
        pass
    assert not [t for t in threading.enumerate() if t.name in ("writing", "assembling")]


# Runs that are killed

SLOWLY = """
import sys, time
from hpc_xvr.reconstruction import pipeline
run = pipeline._run
def slowly(*args):
    time.sleep(0.15)
    return run(*args)
pipeline._run = slowly
from hpc_xvr.cli import main
sys.argv = ["hpc-xvr", *sys.argv[1:]]
main()
"""


def started(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def pieces_in(folder):
    return sorted(p.name for p in folder.glob("0*-*")) if folder.exists() else []


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("suffix", ["tif", "h5"])
def test_a_killed_run_goes_on_and_the_file_is_the_same_bit_for_bit(tmp_path, suffix, hpc_xvr):
    write_shot(tmp_path, 61)
    out = tmp_path / "parts" / f"o.{suffix}"
    out.parent.mkdir()
    call = ["reconstruct", "bayes", *options(tmp_path), "--out"]
    hpc_xvr(*call, out)
    whole = out.rename(tmp_path / f"whole.{suffix}")
    spool = out.parent / f".o.{suffix}.unfinished"
    for least in (2, 6):
        job = started(*call, out)
        wait_for(lambda least=least: len(pieces_in(spool)) >= least)
        job.send_signal(signal.SIGKILL)
        job.wait()
        assert not out.exists()
    assert spool.stat().st_mode & 0o777 == 0o700
    finished = pieces_in(spool)
    damaged = spool / finished[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    times = {name: (spool / name).stat().st_mtime_ns for name in finished}
    said = hpc_xvr(*call, out).err
    told = re.search(r"(\d+) of 61 frames were finished before", said)
    assert told and int(told[1]) >= 4 * (len(times) - 2), said
    assert digest(out) == digest(whole)
    assert results_in(out.parent) == [f"o.{suffix}"]


def test_frames_of_another_call_are_not_mixed_in(tmp_path, hpc_xvr):
    write_shot(tmp_path, 41)
    out = tmp_path / "o.tif"
    spool = tmp_path / ".o.tif.unfinished"
    job = started("reconstruct", "detail", *options(tmp_path), "--out", out)
    wait_for(lambda: len(pieces_in(spool)) >= 3)
    said = hpc_xvr("reconstruct", "bayes", *options(tmp_path), "--out", out, code=74).err
    assert f"is being written by process {job.pid}" in said
    job.kill()
    job.wait()
    hpc_xvr("reconstruct", "bayes", *options(tmp_path), "--out", tmp_path / "b.tif")
    said = hpc_xvr("reconstruct", "bayes", *options(tmp_path), "--out", out).err
    assert "begun anew, an unfinished run had other method" in said
    assert (tifffile.imread(out) == tifffile.imread(tmp_path / "b.tif")).all()


def test_sources_that_have_changed_begin_anew(tmp_path):
    write_shot(tmp_path, 9)
    facts = facts_of(cameras(tmp_path))
    assert facts == facts_of(cameras(tmp_path))
    assert facts != facts_of(cameras(tmp_path, gap=5))
    os.utime(tmp_path / "fast.tif")
    assert facts != facts_of(cameras(tmp_path))


def test_frames_in_any_order_of_memory_are_kept(tmp_path):
    frames = np.random.default_rng(0).random((3, 4, 6), np.float32)
    spool = Spool(tmp_path / "o.tif", {}, (4, 6), "float32", ONE_RANK)
    piece = Piece(range(3), (0, 2), (0, 2))
    spool.save(piece, [np.asfortranarray(frame) for frame in frames])
    assert np.array_equal(list(spool.frames([piece])), frames)
    spool.close(keep=False)


def test_ranks_take_pieces_as_they_come_for_them_each_once(tmp_path):
    ends = [(4 * i, 4 * i + 4) for i in range(6)]
    gaps = [Piece(range(*between), between, between) for between in ends]
    two = SimpleNamespace(size=2)
    spool = Spool(tmp_path / "o.tif", {}, (4, 6), "float32", ONE_RANK)
    slow, fast = spool.deal(gaps, two), spool.deal(gaps, two)
    assert [next(slow), *(next(fast) for _ in range(4)), next(slow)] == gaps
    assert not [*slow, *fast]
    assert [*spool.deal(gaps, ONE_RANK)] == gaps
    spool.close(keep=True)  # as a run that was killed leaves it
    spool = Spool(tmp_path / "o.tif", {}, (4, 6), "float32", ONE_RANK)
    assert [*spool.deal(gaps, two)] == gaps
    spool.close(keep=False)


def test_a_place_prepared_by_others_is_not_used(tmp_path, hpc_xvr, caplog):
    write_shot(tmp_path, 9)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("stays")
    (tmp_path / ".o.tif.unfinished").symlink_to(elsewhere)
    said = hpc_xvr("reconstruct", "detail", *options(tmp_path), "--out", tmp_path / "o.tif").err
    assert "is a link" in said and "is lost if this run is killed" in said
    assert names(elsewhere) == ["mine"] and (tmp_path / "o.tif").exists()
    assert ".o.tif.unfinished" in names(tmp_path)  # not ours to remove
    (tmp_path / ".o.tif.unfinished").unlink()
    spool = tmp_path / ".p.tif.unfinished"
    spool.mkdir(0o700)
    (spool / "writer.lock").symlink_to(elsewhere / "new")
    with pytest.raises(InputError, match=r"symbolic links|Too many"):
        Spool(tmp_path / "p.tif", {}, (1, 1), "uint16", ONE_RANK)
    assert names(elsewhere) == ["mine"]


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path, hpc_xvr):
    mark = "0123456789abcdef.partial"
    ours = [f".o.{mark}.tif", f".o.tif.{mark}.json", f".o-trust.{mark}.json", f".u.{mark}.h5"]
    others = [".o.0123.partial.tif", f".p.{mark}.tif", "o.partial.tif", ".o.tif"]
    for name in (*ours, *others):
        (tmp_path / name).touch()
    write_shot(tmp_path, 9)
    call = ["reconstruct", "bicubic", *options(tmp_path), "--uncertainty", tmp_path / "u.h5"]
    hpc_xvr(*call, "--out", tmp_path / "o.tif")
    assert set(others) <= set(names(tmp_path)) and not set(ours) & set(names(tmp_path))


def test_half_a_folder_is_swept_and_an_older_one_kept_until_there_is_another(
    tmp_path,
):
    half, older = (tmp_path / f".o.zarr.0123456789abcdef.partial{end}" for end in ("", "-older"))
    for folder in (half, older):
        folder.mkdir()
        (folder / "zarr.json").touch()
    remove_partials(tmp_path / "o.zarr")
    assert names(tmp_path) == [older.name]
    (tmp_path / "o.zarr").mkdir()
    remove_partials(tmp_path / "o.zarr")
    assert names(tmp_path) == ["o.zarr"]


def test_bad_input_leaves_nothing_behind(tmp_path, hpc_xvr):
    write_shot(tmp_path, 9)
    with tifffile.TiffFile(tmp_path / "sharp.tif") as file:
        frames = file.asarray().astype(np.float32)
    frames[2, 3, 3] = np.nan
    tifffile.imwrite(tmp_path / "sharp.tif", frames, photometric="minisblack")
    more = ["--hr-full-scale", 4095, "--lr-bit-depth", 12, "--match-grey", "off"]
    out = tmp_path / "o.tif"
    said = hpc_xvr("reconstruct", "detail", *options(tmp_path), *more, "--out", out, code=2).err
    assert "frame 2 holds 1 values that are NaN or infinite" in said
    assert names(tmp_path) == ["fast.tif", "sharp.tif"]


def test_swapped_cameras_are_refused(tmp_path, hpc_xvr):
    write_shot(tmp_path, 9)
    given = ["--lr", tmp_path / "sharp.tif", "--hr", tmp_path / "fast.tif", "--gap", GAP]
    for what in ("builtin", "detail"):
        said = hpc_xvr("reconstruct", what, *given, "--out", tmp_path / "o.tif", code=2).err
        assert "swapped" in said or "scale" in said, said
    assert names(tmp_path) == ["fast.tif", "sharp.tif"]


def test_a_full_disk_ends_in_one_line_and_keeps_what_is_finished(small_disk, tmp_path, hpc_xvr):
    write_shot(tmp_path, 41, height=64, width=64)
    out = small_disk / "o.tif"
    call = ["reconstruct", "detail", *options(tmp_path), "--out", out]
    (small_disk / "filler").write_bytes(bytes(500_000))
    said = hpc_xvr(*call, code=74).err
    assert "needs 0.00 GB while it is made" in said and "--frames" in said
    assert names(small_disk) == [".o.tif.unfinished", "filler"]
    fill(small_disk)  # and while frames are written: the check saw some room
    method = open_method("detail")
    material = material_of(method, cameras(tmp_path))
    spool = Spool(tmp_path / "p.tif", {"a": "b"}, material.keys.shape, "uint16", ONE_RANK)
    folder, spool.folder = spool.folder, small_disk
    work = workflow.work_of(method, material, CPU)
    with pytest.raises(InputError, match="free some space") as refused:
        spool.save(work.pieces()[0], [material.keys[0]] * 4)
    assert refused.value.exit_code == 74
    spool.folder = folder
    spool.close(keep=False)
    (small_disk / "filler").unlink()
    hpc_xvr(*call)
    assert results_in(small_disk) == ["o.tif"]


def test_memory_does_not_grow_with_the_recording(tmp_path):
    program = """
import sys
from pathlib import Path
import torch
from hpc_xvr.data.pairing.joining import Pairing
from hpc_xvr.reconstruction.material import CameraFiles
from hpc_xvr.reconstruction.workflow import reconstruct_run
folder = Path(sys.argv[1])
source = CameraFiles(folder / "fast.tif", folder / "sharp.tif", pairing=Pairing(8.0))
reconstruct_run("detail", torch.device("cpu"), source, out=folder / "o.tif")
[peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
print(int(peak.split()[1]) / 1024)
"""
    used = []
    for name, frames in (("short", 33), ("long", 33 * 8)):
        write_shot(tmp_path / name, frames, gap=8, height=128, width=256)
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / name)],
            check=True,
            capture_output=True,
            text=True,
        )
        used.append(float(done.stdout.split()[-1]))
        assert tifffile.imread(tmp_path / name / "o.tif").shape[0] == (frames - 1) // 8 * 8 + 1
    frames_mb = (33 * 7) * 128 * 256 * 4 / 2**20  # as float32: 29 MB more if they were all held
    assert used[1] - used[0] < frames_mb / 3, used


# Many shots


@pytest.fixture
def folders(tmp_path):
    """Three shots in two folders, one of them bad."""
    for folder in ("fast", "sharp"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        write_shot(tmp_path / "shot", 9, seed=number)
        for folder in ("fast", "sharp"):
            (tmp_path / "shot" / f"{folder}.tif").rename(tmp_path / folder / f"run{number}.tif")
    bad = tmp_path / "sharp" / "run1.tif"
    bad.write_bytes(bad.read_bytes()[:900])
    return tmp_path


def many(folder, *more):
    return [
        "reconstruct",
        "detail",
        "--lr",
        folder / "fast",
        "--hr",
        folder / "sharp",
        "--gap",
        GAP,
    ]


def test_many_shots_are_matched_by_name_and_bad_ones_skipped(folders, hpc_xvr):
    out = folders / "results"
    said = hpc_xvr(*many(folders), "--out", out, "--skip-bad")
    assert results_in(out) == ["run0.tif", "run2.tif"]
    assert "run1: skipped: " in said.err and "Reconstructed: 3 recordings" in said.out
    assert said.out.count("made") == 2 and "bad: " in said.out
    for number in (0, 2):
        one = folders / "one.tif"
        files = [folders / kind / f"run{number}.tif" for kind in ("fast", "sharp")]
        given = ["--lr", files[0], "--hr", files[1], "--gap", GAP, "--out", one]
        hpc_xvr("reconstruct", "detail", *given)
        assert (tifffile.imread(one) == tifffile.imread(out / f"run{number}.tif")).all()


def test_without_skip_bad_the_first_bad_shot_ends_it_and_the_next_call_goes_on(folders, hpc_xvr):
    out = folders / "results"
    said = hpc_xvr(*many(folders), "--out", out / "{name}.h5", code=2).err
    assert "run1.tif" in said
    assert results_in(out) == [".recordings.unfinished", "run0.h5"]
    before = (out / "run0.h5").stat().st_mtime_ns
    write_shot(folders / "shot", 9, seed=1)
    (folders / "shot" / "sharp.tif").rename(folders / "sharp" / "run1.tif")
    said = hpc_xvr(*many(folders), "--out", out / "{name}.h5").out
    assert results_in(out) == ["run0.h5", "run1.h5", "run2.h5"]
    assert (out / "run0.h5").stat().st_mtime_ns == before and "there" in said


def test_if_all_are_bad_or_none_match_it_is_refused(folders, hpc_xvr):
    for number in (0, 2):
        file = folders / "fast" / f"run{number}.tif"
        file.write_bytes(file.read_bytes()[:300])
    said = hpc_xvr(*many(folders), "--out", folders / "r", "--skip-bad", code=2).err
    assert "none of the 3 recordings could be used" in said
    (folders / "fast" / "run2.tif").rename(folders / "fast" / "other.tif")
    said = hpc_xvr(*many(folders), "--out", folders / "r", code=2).err
    assert "fast: other" in said and "sharp: run2" in said and "--pairs" in said
    said = hpc_xvr(*many(folders), "--out", folders / "r.tif", code=2).err
    assert "hold several recordings; give a folder, or a pattern" in said


def test_sequences_of_images_are_matched_by_their_subfolder(tmp_path):
    for shot in ("a", "b"):
        for camera, frames in (("fast", 5), ("sharp", 2)):
            folder = tmp_path / camera / shot
            folder.mkdir(parents=True)
            for t in range(frames):
                image = np.zeros((8, 8), np.uint16)
                tifffile.imwrite(folder / f"{camera}_{t:04d}.tif", image)
    source = CameraFiles(tmp_path / "fast", tmp_path / "sharp")
    shots = matched(source)
    assert [shot.name for shot in shots] == ["a", "b"]
    assert shots[1].source.lr == tmp_path / "fast" / "b" / "fast_*.tif"


@pytest.mark.parametrize("kind", ["csv", "yaml"])
def test_a_table_names_pairs_and_what_differs(tmp_path, kind, hpc_xvr):
    for number, gap in ((0, 4), (1, 2)):
        write_shot(tmp_path / f"s{number}", 9, gap=gap, seed=number)
    rows = [
        {"lr": "s0/fast.tif", "hr": "s0/sharp.tif", "name": "first"},
        {"lr": "s1/fast.tif", "hr": "s1/sharp.tif", "name": "second", "gap": 2},
    ]
    table = tmp_path / f"pairs.{kind}"
    if kind == "csv":
        lines = ["lr,hr,name,gap", *(",".join(str(r.get(c, "")) for c in rows[1]) for r in rows)]
        table.write_text("\n".join(lines))
    else:
        table.write_text(json.dumps(rows))
    call = ["reconstruct", "detail", "--pairs", table, "--gap", 4, "--out", tmp_path / "out"]
    hpc_xvr(*call)
    assert results_in(tmp_path / "out") == ["first.tif", "second.tif"]
    hpc_xvr("reconstruct", "detail", *options(tmp_path / "s1", 2), "--out", tmp_path / "o.tif")
    second = tifffile.imread(tmp_path / "out" / "second.tif")
    assert (tifffile.imread(tmp_path / "o.tif") == second).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr,hr\na.tif,b.tif\nc.tif,b.tif", "2 shots are called b"),
        ("lr,hr,name\na.tif,b.tif,../x", "pair 1: name '../x'"),
        ("lr,sharp\na.tif,b.tif", "pair 1: unknown sharp; columns are lr, hr"),
        ("lr,hr,gap\na.tif,b.tif,often", "gap and start must be numbers"),
        ("lr,hr\n", "holds no pairs"),
    ],
)
def test_a_bad_table_is_refused_by_its_row(tmp_path, text, words):
    table = tmp_path / "pairs.csv"
    table.write_text(text)
    with pytest.raises(InputError, match=re.escape(words)):
        read_pairs(table, CameraFiles(table, table))
