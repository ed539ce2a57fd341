"""Reconstruct while the cameras record: sources that grow, end, shrink and vanish."""

import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import h5py
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import hpc_xvr as xvr
from hpc_xvr.data.cameras import growing as growing_module
from hpc_xvr.data.cameras.growing import growing
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.pairing.agreement import Grey
from hpc_xvr.data.pairing.joining import Pairing
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger
from hpc_xvr.model.xvr import SwinXVR
from hpc_xvr.reconstruction import watching
from hpc_xvr.reconstruction.following import Follower, follow_run
from hpc_xvr.reconstruction.material import CameraFiles
from hpc_xvr.reconstruction.methods import model_entry, open_method
from hpc_xvr.reconstruction.spool import Spool
from hpc_xvr.reconstruction.workflow import Wanted, reconstruct_run, reconstruct_with
from support.disk import fill

CPU = torch.device("cpu")
GAP, FRAMES = 4, 21


def scene(frames=FRAMES, height=16, width=24, seed=0):
    """Sharp frames (T, H, W) of 12 bits in which something moves."""
    rng = np.random.default_rng(seed)
    field = rng.random((height + 8, width + frames + 8))
    for axis in (0, 1):  # a little smooth
        field = (field + np.roll(field, 1, axis) + np.roll(field, 2, axis)) / 3
    return np.stack(
        [(3900 * field[4:-4, t + 4 : t + 4 + width] + 100).astype(np.uint16) for t in range(frames)]
    )


def cameras(frames=FRAMES, gain=1.0):
    """Frames of the fast and the sharp camera."""
    sharp = scene(frames)
    fast = bin_down(gain * sharp.astype(np.float32), 4).round().astype(np.uint16)
    return fast, sharp[::GAP]


WRITER = """
import sys, time, h5py, numpy as np
way, out, frames, pause, stop = sys.argv[1:]
frames, pause, stop = np.load(frames), float(pause), int(stop)
count, *size = frames.shape

def made(file):
    return file.create_dataset(
        "exchange/data", (0, *size), frames.dtype, maxshape=(None, *size), chunks=(1, *size)
    )

def put(data, t):
    data.resize(t + 1, 0)
    data[t] = frames[t]

if way == "swmr":
    with h5py.File(out, "w", libver="latest") as file:
        data = made(file)
        file.swmr_mode = True
        for t in range(count):
            put(data, t)
            data.flush()
            time.sleep(pause)
            if t == stop:
                time.sleep(600)
elif way == "flush":
    with h5py.File(out, "w") as file:
        data = file.create_dataset(
            "exchange/data", frames.shape, frames.dtype, chunks=(1, *size), compression="gzip"
        )
        for t in range(count):
            data[t] = frames[t]
            file.flush()
            time.sleep(pause)
elif way == "append":
    with h5py.File(out, "w") as file:
        made(file)
    for t in range(count):
        with h5py.File(out, "a") as file:
            put(file["exchange/data"], t)
        time.sleep(pause)
"""


@contextmanager
def writing(folder, way="swmr", pause=0.01, frames=FRAMES, stop=-1, gain=1.0):
    """A process for each camera that writes fast.h5 and sharp.h5."""
    processes = []
    for name, stack, wait in zip(
        ("fast", "sharp"), cameras(frames, gain), (pause, pause * GAP), strict=True
    ):
        np.save(folder / f"{name}.npy", stack)
        last = stop if name == "fast" else stop // GAP if stop > 0 else stop
        command = [sys.executable, "-c", WRITER, way, folder / f"{name}.h5", folder / f"{name}.npy"]
        processes.append(subprocess.Popen([*map(str, command), str(wait), str(last)]))
    try:
        yield processes
        if stop < 0:
            assert [process.wait(60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def follow(folder, out="movie.tif", ends=".h5", silence=2.0, method="bayes", **more):
    """Follow the cameras' recordings in this process."""
    return follow_run(
        *(method, CPU, source(folder, ends, **more.pop("source", {}))),
        out=folder / out,
        wanted=Wanted(command="as it was", **more),
        silence=silence,
    )


def offline(folder, out="movie.tif", ends=".h5", method="bayes", **more):
    """The same of the finished recordings, in a folder of its own."""
    (folder / "offline").mkdir()
    return reconstruct_run(
        *(method, CPU, source(folder, ends, **more.pop("source", {}))),
        out=folder / "offline" / out,
        wanted=Wanted(command="as it was", **more),
    )


def source(folder, ends=".h5", **more):
    return CameraFiles(
        *(folder / f"fast{ends}", folder / f"sharp{ends}"),
        **{"pairing": Pairing(float(GAP)), **more},
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".npy")


MADE = r"frames (\d+) to (\d+): made(?: \d+\.\d\d s after the last frame|, recorded before)"
"""A gap that was made while the cameras recorded; on a busy machine the first ones may have been
there before the first look."""


@pytest.fixture
def log(caplog, monkeypatch):
    """All that the program says, as one text."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", "hpc_xvr")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("way", ["swmr", "flush", "append"])
def test_growing_hdf5_gives_the_same_file_as_the_finished_one(tmp_path, log, capsys, way):
    with writing(tmp_path, way, pause=0.1):
        made = follow(tmp_path)
    told = log()
    assert re.findall(MADE, told) == [(str(t), str(t + GAP - 1)) for t in range(0, FRAMES - 1, GAP)]
    assert re.search(r"median \d+\.\d\d s, worst \d+\.\d\d s \(\d gaps\)", capsys.readouterr().out)
    assert "20 of 21 frames were finished before" in told
    assert ("the writers have closed both" in told) == (way == "swmr")
    assert {"movie.tif.gaps", ".movie.tif.unfinished"}.isdisjoint(names(tmp_path))
    assert made.read_bytes() == offline(tmp_path).read_bytes()


def put(path, frame, way="rename"):
    """Write an image as cameras do: whole and renamed, or half of it first; `whole`: at once."""
    beside = path.with_name(f".{path.name}")
    if path.suffix == ".png":
        Image.fromarray(frame).save(beside, format="PNG")
    else:
        tifffile.imwrite(beside, frame, photometric="minisblack")
    if way == "rename":
        beside.rename(path)
        return
    data = beside.read_bytes()
    beside.unlink()
    # its size as it will be, as copying programs do, and of the pixels only the first half
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    time.sleep(0.1)
    with path.open("r+b") as file:
        file.write(data)


@contextmanager
def filling(folder, suffix=".tif", way="rename", pause=0.03, stacks=None, order=None):
    """A thread that writes numbered images of both cameras into the folders fast and sharp."""
    fast, sharp = stacks or cameras()
    problem = []

    def run():
        try:
            for name in ("fast", "sharp"):
                (folder / name).mkdir(exist_ok=True)
            for t in order or range(len(fast)):
                put(folder / "fast" / f"frame_{t}{suffix}", fast[t], way)
                if t % GAP == 0:
                    put(folder / "sharp" / f"shot-{t // GAP:04d}{suffix}", sharp[t // GAP], way)
                time.sleep(pause)
        except BaseException as error:
            problem.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        assert not problem, problem


@pytest.mark.parametrize(
    ("suffix", "way"), [(".tif", "rename"), (".tif", "half"), (".png", "half")]
)
def test_growing_folders_give_the_same_file_as_finished_ones(tmp_path, log, suffix, way):
    with filling(tmp_path, suffix, way):
        made = follow(tmp_path, out="movie.h5", ends="")
    told = log()
    assert len(re.findall(MADE, told)) == 5
    assert "20 of 21 frames were finished before" in told
    assert "made anew" not in told
    assert "no complete frame has come for 2 s" in told
    with h5py.File(made) as one, h5py.File(offline(tmp_path, out="movie.h5", ends="")) as two:
        assert (one["exchange/data"][()] == two["exchange/data"][()]).all()


def test_a_half_written_file_is_no_frame_and_files_behind_it_wait(tmp_path):
    fast, _ = cameras()
    for t in (0, 1, 3, 4):
        put(tmp_path / f"frame_{t}.tif", fast[t])
    recording = growing(tmp_path)
    recording.look()
    time.sleep(growing_module.SETTLED_S + 0.05)
    assert recording.look()
    assert recording.frames == 2
    assert "number 2 is not there yet" in recording.waiting
    put(tmp_path / "frame_2.tif", fast[2])
    whole = (tmp_path / "frame_2.tif").read_bytes()
    (tmp_path / "frame_2.tif").write_bytes(whole[:-20])
    for _ in range(3):
        time.sleep(growing_module.SETTLED_S + 0.05)
        assert not recording.look()
    assert "frame_2.tif: is not complete yet" in recording.waiting
    (tmp_path / "frame_2.tif").write_bytes(whole)
    recording.look()
    time.sleep(growing_module.SETTLED_S + 0.05)
    assert recording.look()
    assert recording.frames == 5
    assert [path.name for path in recording.files()] == [f"frame_{t}.tif" for t in range(5)]


def write(folder, fast, sharp, **how):
    """Complete HDF5 files of both cameras, put in place at once."""
    for name, stack in (("fast", fast), ("sharp", sharp)):
        beside = folder / f".{name}.h5"
        with h5py.File(beside, "w") as file:
            chunks = how.get("chunks", (1, *stack.shape[1:]))
            file.create_dataset("exchange/data", data=stack, chunks=chunks)
        beside.replace(folder / f"{name}.h5")


@contextmanager
def once_there(path, action):
    """Do something in a thread as soon as a file is there."""

    def run():
        for _ in range(1000):
            if path.exists():
                action()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()


FIRST = "movie.tif.gaps/000000-000003.tif"


def shrink_hdf5(folder):
    fast, sharp = cameras()
    write(folder, fast[:6], sharp)


def replace_hdf5(folder):
    fast, sharp = cameras()
    write(folder, np.concatenate([fast[::-1], fast]), sharp)


def empty_hdf5(folder):
    with h5py.File(folder / ".fast.h5", "w") as file:
        file.create_dataset("exchange/data", (0, 4, 6), "u2", maxshape=(None, 4, 6))
    (folder / ".fast.h5").replace(folder / "fast.h5")


def shrink_folder(folder):
    (folder / "fast" / "frame_3.tif").unlink()


def replace_folder(folder):
    fast, _ = cameras()
    for t in range(9):
        put(folder / "fast" / f"frame_{t}.tif", fast[-t - 1])


def vanish_folder(folder):
    (folder / "sharp").rename(folder / "moved")


@pytest.mark.parametrize(
    ("ends", "harm", "words"),
    [
        (".h5", shrink_hdf5, "fast.h5: has shrunk: it had 9 complete frames and now has 6"),
        (".h5", replace_hdf5, "fast.h5: was replaced: its first frame is another one"),
        (".h5", empty_hdf5, "fast.h5: has shrunk: it had 9 complete frames and now has 0"),
        (".h5", lambda folder: (folder / "sharp.h5").unlink(), "sharp.h5: has vanished"),
        ("", shrink_folder, "fast: has shrunk: 1 of its 9 complete frames have vanished"),
        ("", replace_folder, "fast: was replaced: its first frame is another one"),
        ("", vanish_folder, "sharp: has vanished"),
    ],
)
def test_a_recording_that_becomes_another_one_ends_it_and_gaps_are_kept(
    tmp_path, ends, harm, words
):
    fast, sharp = cameras()
    if ends:
        write(tmp_path, fast[:9], sharp[:3])
    else:
        with filling(tmp_path, stacks=(fast[:9], sharp), pause=0):
            pass
    second = tmp_path / "movie.tif.gaps/000004-000007.tif"
    second.parent.mkdir()
    (second.parent / "000400-000403.tif").touch()  # of another recording
    with once_there(second, lambda: harm(tmp_path)), pytest.raises(InputError) as error:
        follow(tmp_path, ends=ends, silence=20)
    assert words in str(error.value)
    assert f"frames 0 to 7 are kept in {tmp_path}/movie.tif.gaps" in str(error.value)
    assert error.value.exit_code == 2
    assert not (tmp_path / "movie.tif").exists()
    assert names(second.parent) == ["000000-000003.tif", "000004-000007.tif"]
    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole, fast, sharp)
    expected = tifffile.imread(offline(whole))
    assert (tifffile.imread(tmp_path / FIRST) == expected[:4]).all()
    assert (tifffile.imread(second) == expected[4:8]).all()


def test_after_kill_the_same_command_goes_on(tmp_path, log, monkeypatch):
    fast, sharp = cameras()
    write(tmp_path, fast[:13], sharp[:4])
    command = [sys.executable, "-m", "hpc_xvr", "reconstruct", "bayes", "--gap", GAP, "--follow"]
    command += ["--lr", tmp_path / "fast.h5", "--hr", tmp_path / "sharp.h5"]
    process = subprocess.Popen(
        [*map(str, command), "--out", str(tmp_path / "movie.tif"), "--silence", "100"],
        stderr=subprocess.PIPE,
    )
    for _ in range(3000):
        if (tmp_path / "movie.tif.gaps/000008-000011.tif").exists():
            break
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    write(tmp_path, fast, sharp)
    saved = []
    save = Spool.save

    def counted(self, piece, *more):
        saved.append(piece)
        save(self, piece, *more)

    monkeypatch.setattr(Spool, "save", counted)
    made = follow(tmp_path)
    assert [piece.frames.start for piece in saved] == [12, 16, 20]
    assert made.read_bytes() == offline(tmp_path).read_bytes()


def test_a_frame_that_is_written_again_is_noticed_at_the_end(tmp_path, log):
    fast, sharp = cameras()
    write(tmp_path, fast[:13], sharp[:4])
    other = fast.copy()
    other[5] = other[6]
    with once_there(
        tmp_path / "movie.tif.gaps/000008-000011.tif", lambda: write(tmp_path, other, sharp)
    ):
        made = follow(tmp_path)
    assert re.search(r"\d+ finished frames are damaged, or are not what the finished", log())
    assert "4 of 21 frames were finished before" not in log()
    assert made.read_bytes() == offline(tmp_path).read_bytes()


def test_grey_scales_are_held_while_recording_and_those_of_all_key_frames_at_the_end(tmp_path, log):
    fast, sharp = cameras(gain=1.5)
    write(tmp_path, fast, sharp)
    made = follow(tmp_path)
    assert "at the end all gaps are made once more with that of all key frames" in log()
    assert "made anew" in log()
    assert made.read_bytes() == offline(tmp_path).read_bytes()


def test_a_stated_grey_scale_spares_making_gaps_anew(tmp_path, log):
    fast, sharp = cameras(gain=1.5)
    write(tmp_path, fast, sharp)
    stated = {"pairing": Pairing(float(GAP), match_grey=Grey(1.5, 0.001))}
    made = follow(tmp_path, source=stated)
    assert "20 of 21 frames were finished before" in log()
    assert "made anew" not in log()
    assert made.read_bytes() == offline(tmp_path, source=stated).read_bytes()


def test_a_change_of_the_grey_scale_is_told_when_it_comes(tmp_path, log):
    fast, sharp = cameras()
    fast[10:] = fast[10:] // 2
    write(tmp_path, fast, sharp)
    follow(tmp_path)
    assert re.search(r"at frame 12 the fast frames are 0\.\d+ times what the first key", log())


def test_a_writer_that_is_killed_leaves_what_can_be_finished(tmp_path, log):
    with (
        writing(tmp_path, stop=12, pause=0.05) as writers,
        once_there(
            tmp_path / "movie.tif.gaps/000008-000011.tif", lambda: [w.kill() for w in writers]
        ),
    ):
        made = follow(tmp_path)
    assert "is still being written" in log()
    assert "no complete frame has come for 2 s" in log()
    assert len(tifffile.imread(made)) == 13
    assert made.read_bytes() == offline(tmp_path).read_bytes()


def test_a_chunk_of_several_frames_counts_when_it_is_full(tmp_path):
    fast, _ = cameras()
    path = tmp_path / "fast.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("data", fast.shape, fast.dtype, chunks=(4, *fast.shape[1:]))
        data[:6] = fast[:6]
    recording = growing(path)
    assert recording.look()
    assert recording.frames == 4
    with h5py.File(path, "a") as file:
        file["data"][6:9] = fast[6:9]
    assert recording.look()
    assert recording.frames == 8


def refused(folder, match, **more):
    """Where nothing comes, or something that cannot be followed."""
    with pytest.raises(InputError, match=match) as error:
        follow(folder, silence=0.3, **more)
    assert error.value.exit_code == 2
    assert not [name for name in names(folder) if name.startswith((".movie", "movie"))]


def test_what_cannot_be_followed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "START_S", 0.3)
    fast, sharp = cameras()
    refused(tmp_path, "fast.h5: is not there yet; no complete frame has come for 0.3 s")
    refused(tmp_path, "fast.tif: cannot be followed, as it is not known which", ends=".tif")
    refused(tmp_path, "fast.cine: cannot be followed", ends=".cine")
    with h5py.File(tmp_path / "fast.h5", "w") as file:
        file["data"] = fast
    refused(tmp_path, "fast.h5, dataset /data: does not say which of its frames were written")
    write(tmp_path, fast.astype(np.float32), sharp.astype(np.float32))
    refused(tmp_path, "sharp.h5: holds floating-point .* state it with --hr-full-scale")
    (tmp_path / "fast").mkdir()
    (tmp_path / "sharp").mkdir()
    tifffile.imwrite(tmp_path / "fast" / "a_0.tif", fast, photometric="minisblack")
    tifffile.imwrite(tmp_path / "fast" / "a_1.tif", fast, photometric="minisblack")
    with pytest.raises(InputError, match=r"a_0.tif: holds 21 frames: folders of files of"):
        follow(tmp_path, ends="", silence=2)


def test_a_recording_that_ends_between_key_frames_is_finished_with_crop(tmp_path, log):
    """As without --follow, sharp frames that the fast camera did not see are refused at the end;
    the gaps need not be made again."""
    fast, sharp = cameras()
    write(tmp_path, fast[:14], sharp)
    with pytest.raises(InputError, match=r"pass --crop .* frames 0 to 11 are kept in"):
        follow(tmp_path)
    made = reconstruct_run(
        "bayes", CPU, source(tmp_path, crop=True), out=tmp_path / "movie.tif", wanted=Wanted()
    )
    assert "12 of 13 frames were finished before" in log()
    assert len(tifffile.imread(made)) == 13


def test_the_command_follows_and_refuses_what_does_not_go_with_it(tmp_path, hpc_xvr):
    fast, sharp = cameras(9)
    write(tmp_path, fast, sharp)
    files = "--lr", tmp_path / "fast.h5", "--hr", tmp_path / "sharp.h5", "--gap", GAP
    rest = "--out", tmp_path / "movie.h5", "--follow", "--silence", 0.5
    said = hpc_xvr("reconstruct", "builtin", *files, *rest)
    assert "latency" not in said.out  # all was there before
    with h5py.File(tmp_path / "movie.h5") as file:
        followed = file["exchange/data"][()]
    hpc_xvr("reconstruct", "builtin", *files, "--out", tmp_path / "offline.h5")
    with h5py.File(tmp_path / "offline.h5") as file:
        assert (followed == file["exchange/data"][()]).all()
    said = hpc_xvr("reconstruct", "bayes", *files, *rest[:2], "--silence", 3, code=2)
    assert "--silence ends what --follow begins" in said.err
    for words in (("--video", "a"), (*files, "--adapt"), ("--pairs", tmp_path / "p.csv")):
        (tmp_path / "p.csv").touch()
        said = hpc_xvr("reconstruct", "bayes", *words, *rest, code=2)
        assert "--follow" in said.err
        assert said.err.count("\n") == 1


def test_time_stamps_that_grow_beside_the_frames_count_as_far_as_both_are_there(tmp_path):
    fast, _ = cameras()
    path = tmp_path / "fast.h5"

    def write_both(frames, times):
        with h5py.File(path, "w") as file:
            group = file.create_group("exchange")
            group.create_dataset(
                "data", data=fast[:frames], chunks=(1, *fast.shape[1:]), maxshape=(None, 4, 6)
            )
            stamps = 0.1 * np.arange(times) + 0.1 * (np.arange(times) > 5)
            stamps = group.create_dataset("time", data=stamps, maxshape=(None,), chunks=(8,))
            stamps.attrs["units"] = "s"

    recording = growing(path)
    for frames, times, complete in ((3, 2, 2), (8, 9, 8)):
        write_both(frames, times)
        assert recording.look()
        assert recording.frames == complete
        opened = CameraReading().open_files([path], None, complete)
        assert len(opened) == complete
        assert opened.frame_rate_hz == pytest.approx(10)
        assert len(opened.times_s) == complete
    assert opened.taken()[-1] == 8  # one was lost


def test_chosen_frames_are_followed(tmp_path, log):
    fast, sharp = cameras()
    write(tmp_path, fast, sharp)
    made = follow(tmp_path, frames=(6, 14))
    assert re.findall(r"frames (\d+) to (\d+): made", log()) == [
        ("6", "7"),
        ("8", "11"),
        ("12", "13"),
    ]
    assert "8 of 8 frames were finished before" in log()
    assert made.read_bytes() == offline(tmp_path, frames=(6, 14)).read_bytes()


def test_windows_that_reach_beyond_a_gap_wait_for_their_frames(tmp_path, log):
    torch.manual_seed(0)
    network = SwinXVR(5, embed_dim=8, depths=(1,), heads=1, window=2, up_features=4).eval()
    method = model_entry("tiny", network)
    fast, sharp = cameras()
    write(tmp_path, fast[:14], sharp[:4])
    out = tmp_path / "movie.tif"
    Follower(method, CPU, source(tmp_path), out, Wanted(), 1.0).follow()
    # frames 9 to 11 lie in windows up to 13
    assert (tmp_path / "movie.tif.gaps/000008-000011.tif").exists()
    write(tmp_path, fast[:13], sharp[:4])
    shutil.rmtree(tmp_path / "movie.tif.gaps")
    shutil.rmtree(tmp_path / ".movie.tif.unfinished")
    Follower(method, CPU, source(tmp_path), out, Wanted(), 1.0).follow()
    assert names(tmp_path / "movie.tif.gaps") == ["000000-000003.tif", "000004-000007.tif"]
    write(tmp_path, fast, sharp)
    reconstruct_with(method, CPU, source(tmp_path), out=out, wanted=Wanted())
    assert "8 of 21 frames were finished before" in log()
    (tmp_path / "offline").mkdir()
    anew = tmp_path / "offline" / "movie.tif"
    reconstruct_with(method, CPU, source(tmp_path), out=anew, wanted=Wanted())
    assert out.read_bytes() == anew.read_bytes()


def test_it_is_told_that_the_cameras_are_faster(tmp_path, log):
    plain = open_method("bayes", CPU)

    def slow(sample):
        time.sleep(0.5)
        return plain.method(sample)

    method = replace(plain, method=slow)
    with writing(tmp_path, pause=0.05, frames=41):
        Follower(method, CPU, source(tmp_path), tmp_path / "movie.tif", Wanted(), 2.0).follow()
    assert re.search(r"a gap takes \S+ s to make and \S+ s to record: the result falls", log())


@pytest.mark.parametrize("way", ["swmr", "flush"])
def test_no_frame_is_read_that_is_not_complete(tmp_path, way):
    """A writer as fast as it can be, and a reader that looks all the time."""
    truth = np.random.default_rng(0).integers(1, 60000, (400, 24, 32)).astype(np.uint16)
    np.save(tmp_path / "fast.npy", truth)
    path = tmp_path / "fast.h5"
    command = [sys.executable, "-c", WRITER, way, path, tmp_path / "fast.npy", 0, -1]
    writer = subprocess.Popen(list(map(str, command)))
    recording, read, until = growing(path), 0, time.monotonic() + 60
    try:
        while recording.frames < len(truth):
            assert time.monotonic() < until, recording.waiting
            if not recording.look():
                continue
            start, stop = max(0, recording.frames - 3), recording.frames
            try:
                opened = CameraReading().open_files([path], None, stop)
                for frame in opened.frames(start):
                    assert (frame == truth[start]).all(), start
                    start, read = start + 1, read + 1
            except InputError:  # between two states; the program reads it again
                assert way == "flush"
    finally:
        writer.kill()
        writer.wait()
    assert read >= 6


def test_a_camera_that_is_turned_over_while_it_records_ends_it(tmp_path):
    fast, sharp = cameras()
    fast[10:] = fast[10:, ::-1]
    write(tmp_path, fast, sharp)
    with pytest.raises(InputError, match=r"fit the sharp ones only upside down.* 0 to 11 are kept"):
        follow(tmp_path)


def test_cameras_that_do_not_agree_end_it_at_their_second_key_frame(tmp_path, log):
    fast, sharp = cameras()
    write(tmp_path, np.roll(fast, 2, 2), sharp)
    with pytest.raises(InputError, match=r"hardly resemble the sharp ones.*or try with --force"):
        follow(tmp_path)
    assert not (tmp_path / "movie.tif").exists() and not list(tmp_path.glob("movie.tif.gaps/*"))
    follow(tmp_path, force=True)
    assert "flat fields: look at the result with care" in log()
    assert (tmp_path / "movie.tif").exists()


def test_one_key_frame_that_does_not_agree_is_told_while_they_record(tmp_path, log):
    fast, sharp = cameras()
    sharp = sharp.copy()
    sharp[3] = np.roll(sharp[3], 8, 1)
    write(tmp_path, fast, sharp)
    follow(tmp_path)
    assert "the fast frames hardly resemble the sharp ones" in log()


def test_a_full_disk_ends_it_at_once_and_the_command_can_be_repeated(tmp_path, small_disk, log):
    fast, sharp = cameras()
    write(tmp_path, fast, sharp)
    out = small_disk / "movie.tif"
    fill(small_disk)
    with pytest.raises(InputError) as error:
        follow_run(
            *("bayes", CPU, source(tmp_path)),
            out=out,
            wanted=Wanted(command="as it was"),
            silence=1.0,
        )
    assert error.value.exit_code == 74
    assert "free some space" in str(error.value)
    (small_disk / "filler").unlink()
    made = follow_run(
        *("bayes", CPU, source(tmp_path)), out=out, wanted=Wanted(command="as it was"), silence=1.0
    )
    assert made.read_bytes() == offline(tmp_path).read_bytes()


# From Python


def test_python_gets_the_frames_as_they_come(tmp_path):
    model = xvr.load_model("bayes", device="cpu")
    frames, there = {}, 0
    with writing(tmp_path, pause=0.1):
        files = tmp_path / "fast.h5", tmp_path / "sharp.h5"
        for t, frame in xvr.follow(model, *files, gap=GAP, silence=3.0, wait=60):
            if not frames:
                with h5py.File(files[0], "r", swmr=True, locking=False) as file:
                    there = len(file["exchange/data"])
            assert t not in frames
            frames[t] = frame
    assert 0 < there < FRAMES, "the first frames came when all was recorded"
    assert list(frames) == list(range(FRAMES))
    for t, frame in xvr.reconstruct(model, *map(xvr.open_recording, files), gap=GAP):
        assert (frame == frames[t]).all(), t


def test_python_gets_folders_in_part_and_what_hangs_on_the_end(tmp_path):
    torch.manual_seed(0)
    network = SwinXVR(5, embed_dim=8, depths=(1,), heads=1, window=2, up_features=4).eval()
    method = model_entry("tiny", network)
    model = replace(xvr.load_model("bayes", device="cpu"), method=method)
    fast, sharp = cameras()
    write(tmp_path, fast, sharp)
    files = tmp_path / "fast.h5", tmp_path / "sharp.h5"
    followed = dict(xvr.follow(model, *files, gap=GAP, silence=0.5, frames=(6, FRAMES)))
    assert list(followed) == list(range(6, FRAMES))
    for t, frame in xvr.reconstruct(model, *map(xvr.open_recording, files), gap=GAP):
        assert t < 6 or (frame == followed[t]).all(), t


def test_python_is_refused_what_cannot_be_followed(tmp_path):
    model = xvr.load_model("bayes", device="cpu")
    with pytest.raises(InputError, match=r"fast.h5: is not there yet; no complete .* 0.3 s"):
        list(xvr.follow(model, tmp_path / "fast.h5", tmp_path / "sharp.h5", gap=GAP, wait=0.3))
    with pytest.raises(InputError, match="pva://a: a channel is followed by the command"):
        xvr.follow(model, "pva://a", "pva://b", gap=GAP)


def test_several_shots_are_refused_while_they_are_recorded(tmp_path, hpc_xvr):
    for name in ("fast", "sharp"):
        (tmp_path / name).mkdir()
        for shot in ("one", "two"):
            stack = np.zeros((3, 8, 8), np.uint16)
            tifffile.imwrite(tmp_path / name / f"{shot}.tif", stack, photometric="minisblack")
    call = ["reconstruct", "bayes", "--lr", tmp_path / "fast", "--hr", tmp_path / "sharp"]
    said = hpc_xvr(*call, "--gap", GAP, "--out", tmp_path / "out.h5", "--follow", code=2).err
    assert "--follow is for one shot" in said and "start a command for each" in said
