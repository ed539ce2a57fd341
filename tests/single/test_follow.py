"""Reconstruct while the cameras record: sources that grow, end, shrink and vanish."""

import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import h5py
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from hpc_xvr.data.cameras import growing as growing_module
from hpc_xvr.data.cameras.growing import growing
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.pairing.joining import Pairing
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.following import follow_run
from hpc_xvr.reconstruction.material import CameraFiles
from hpc_xvr.reconstruction.workflow import Wanted, reconstruct_run

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
        *(folder / f"fast{ends}", folder / f"sharp{ends}"), pairing=Pairing(float(GAP)), **more
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".npy")


LATENCY = r"frames (\d+) to (\d+): made (\d+\.\d\d) s after the last frame they need"


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
    assert [found[:2] for found in re.findall(LATENCY, told)] == [
        (str(t), str(t + GAP - 1)) for t in range(0, FRAMES - 1, GAP)
    ]
    assert re.search(r"median 0\.\d\d s, worst \d\.\d\d s \(5 gaps\)", capsys.readouterr().out)
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
    assert len(re.findall(LATENCY, told)) == 5
    assert "20 of 21 frames were finished before" in told
    assert "made anew" not in told
    assert "no complete frame has come for 2 s (--silence)" in told
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
