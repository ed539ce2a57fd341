"""Cameras that send their frames over EPICS: PvaPy's own servers, on this machine."""

import json
import re
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import torch

from hpc_xvr.data.cameras.pva import Channel, channel_of, published
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.pairing.joining import Pairing
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.channels import follow_channels
from hpc_xvr.reconstruction.material import CameraFiles
from hpc_xvr.reconstruction.workflow import Wanted, reconstruct_run

pva = pytest.importorskip("pvaccess", reason="pvapy is not installed: pip install 'hpc_xvr[pva]'")
CPU = torch.device("cpu")
GAP, FRAMES = 4, 21
LOOPBACK = {
    "EPICS_PVA_ADDR_LIST": "127.0.0.1",
    "EPICS_PVA_AUTO_ADDR_LIST": "NO",
    "EPICS_PVA_INTF_ADDR_LIST": "127.0.0.1",
    "EPICS_PVAS_INTF_ADDR_LIST": "127.0.0.1",
}


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    for name, value in LOOPBACK.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def log(caplog, monkeypatch):
    """All that the program says, as one text."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", "hpc_xvr")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def names():
    """Names of channels that nobody else has."""
    mark = uuid.uuid4().hex[:8]
    return {role: f"xvr-{mark}:{role}" for role in ("lr", "hr", "out")}


def cameras(frames=FRAMES, height=16, width=24):
    """Frames of the fast and the sharp camera, 12 bits in which something moves."""
    rng = np.random.default_rng(0)
    field = rng.random((height + 8, width + frames + 8))
    for axis in (0, 1):
        field = (field + np.roll(field, 1, axis) + np.roll(field, 2, axis)) / 3
    sharp = np.stack(
        [(3900 * field[4:-4, t + 4 : t + 4 + width] + 100).astype(np.uint16) for t in range(frames)]
    )
    fast = bin_down(sharp.astype(np.float32), 4).round().astype(np.uint16)
    return fast, sharp[::GAP]


@contextmanager
def simulated(folder, names, delay=6.0, rate=10.0):
    """PvaPy's simulated cameras, which begin to send after `delay` seconds."""
    processes = []
    for role, stack, fps in zip(("lr", "hr"), cameras(), (rate, rate / GAP), strict=True):
        file = folder / f"{role}.npy"
        np.save(file, stack)
        command = [
            *(sys.executable, "-m", "pvapy.cli.adSimServer", "-if", file, "-cn", names[role]),
            *("-fps", fps, "-nf", len(stack), "-cs", 2, "-std", delay, "-shd", 20, "-rt", 60),
            *("-dc", "-rp", 0),
        ]
        with (folder / f"{role}.log").open("w") as out:
            processes.append(subprocess.Popen(list(map(str, command)), stdout=out, stderr=out))
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def source(names, **more):
    lr, hr = (f"pva://{names[role]}" for role in ("lr", "hr"))
    return CameraFiles(lr, hr, pairing=Pairing(float(GAP)), **more)


def follow(folder, names, **more):
    return follow_channels(
        "bayes",
        CPU,
        source(names, **more.pop("source", {})),
        out=folder / "movie.tif",
        wanted=Wanted(),
        **{"silence": 4.0, "wait": 60.0, **more},
    )


def test_two_simulated_cameras_are_recorded_reconstructed_and_sent_on(tmp_path, names, log):
    received = []
    with simulated(tmp_path, names):
        listener = pva.Channel(names["out"])
        listener.monitor(
            lambda frame: received.append((frame["uniqueId"], frame["value"])),
            "record[queueSize=100]field()",
        )
        made = follow(tmp_path, names, serve=names["out"])
    told = log()
    fast, sharp = cameras()
    for role, stack in (("lr", fast), ("hr", sharp)):
        with h5py.File(tmp_path / f"movie-{role}.h5") as file:
            assert (file["exchange/data"][()] == stack).all()
    assert len(re.findall(r"frames \d+ to \d+: made", told)) == 5
    files = CameraFiles(
        tmp_path / "movie-lr.h5", tmp_path / "movie-hr.h5", pairing=Pairing(float(GAP))
    )
    (tmp_path / "offline").mkdir()
    offline = reconstruct_run(
        "bayes", CPU, files, out=tmp_path / "offline" / "movie.tif", wanted=Wanted()
    )
    assert made.read_bytes() == offline.read_bytes()
    frames = {}
    for number, value in received:
        if value and "ushortValue" in value[0]:
            frames[number] = value[0]["ushortValue"].reshape(16, 24)
    assert sorted(frames) == list(range(FRAMES))
    result = tifffile.imread(made)
    assert all((frames[t] == result[t]).all() for t in frames)


SERVER = """
import json, os, sys, time
import numpy as np, pvaccess
from pvapy.utility.adImageUtility import AdImageUtility
fast, sharp, names, sent, delay = json.loads(sys.argv[1])
stacks = {"lr": np.load(fast), "hr": np.load(sharp)}
server = pvaccess.PvaServer()
def frame(role, number):
    stack = stacks[role]
    return AdImageUtility.generateNtNdArray2D(100 + number, stack[number % len(stack)])
for role in ("lr", "hr"):
    server.addRecord(names[role], pvaccess.NtNdArray(), None)
server.start()
while isinstance(delay, str) and not os.path.exists(delay):
    time.sleep(0.1)
time.sleep(0 if isinstance(delay, str) else delay)
for roles in sent:
    for role, number in roles:
        if number is None:
            server.removeRecord(names[role])
        else:
            server.update(names[role], frame(role, number))
    time.sleep(0.1)
time.sleep(20)
"""


@contextmanager
def sending(folder, names, sent, delay=4):
    """A server of both channels that sends these frames, and closes a channel instead of None;
    begins after `delay` seconds, or when there is a file of that name."""
    files = []
    for role, stack in zip(("lr", "hr"), cameras(), strict=True):
        files.append(str(folder / f"{role}.npy"))
        np.save(files[-1], stack)
    text = json.dumps([*files, names, sent, delay])
    process = subprocess.Popen([sys.executable, "-c", SERVER, text])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def together(*numbers):
    """These fast frames, each with its sharp one."""
    return [
        [("lr", t), *([("hr", t // GAP)] if t is not None and t % GAP == 0 else [])]
        for t in numbers
    ]


BOTH_GO = [("lr", None), ("hr", None)]


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (together(*range(14), None), r"pva://xvr-.*:lr: has gone away after 14 frames; finished"),
        ([*together(*range(14)), BOTH_GO], r"pva://xvr-.*:.r: has gone away after \d+ frames"),
        (together(*range(14), 16), "lr: frame 14 to 15 was lost on the way: give --lr-missing or"),
        (together(*range(14), 3), "lr: has begun to count anew: uniqueId 103 after 113"),
    ],
)
def test_a_channel_that_goes_away_or_loses_frames_ends_it_and_all_is_kept(
    tmp_path, names, sent, words
):
    with sending(tmp_path, names, sent), pytest.raises(InputError, match=words) as error:
        follow(tmp_path, names, silence=20)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert f"frames 0 to 11 are kept in {tmp_path}/movie.tif.gaps" in str(error.value)
    assert f"kept in {tmp_path}/movie-lr.h5 and {tmp_path}/movie-hr.h5" in str(error.value)
    gaps = sorted(path.name for path in (tmp_path / "movie.tif.gaps").iterdir())
    assert gaps == ["000000-000003.tif", "000004-000007.tif", "000008-000011.tif"]
    with h5py.File(tmp_path / "movie-lr.h5") as file:
        assert (file["exchange/data"][()] == cameras()[0][:14]).all()
    with pytest.raises(InputError, match=r"movie-lr.h5: is there from an earlier run: move it"):
        follow(tmp_path, names)


def test_lost_frames_are_left_out_where_that_is_asked_for(tmp_path, names, log):
    sent = together(*range(10), *range(11, FRAMES))
    skip = {"lr_camera": CameraReading(missing="skip")}
    with sending(tmp_path, names, sent):
        made = follow(tmp_path, names, source=skip)
    assert "movie-lr.h5: frames 10 are missing and left out" in log()
    assert len(re.findall(r"frames \d+ to \d+: made", log())) == 5
    assert f"{FRAMES - 2} of {FRAMES - 1} frames were finished before" in log()
    files = CameraFiles(
        tmp_path / "movie-lr.h5", tmp_path / "movie-hr.h5", pairing=Pairing(float(GAP)), **skip
    )
    (tmp_path / "offline").mkdir()
    offline = reconstruct_run(
        "bayes", CPU, files, out=tmp_path / "offline" / "movie.tif", wanted=Wanted()
    )
    assert made.read_bytes() == offline.read_bytes()
    assert len(tifffile.imread(made)) == FRAMES - 1


def test_two_ranks_share_the_gaps_of_channels_and_know_of_frames_that_are_lost(tmp_path, names):
    lr, hr = (f"pva://{names[role]}" for role in ("lr", "hr"))
    options = ["--gap", GAP, "--lr-missing", "skip", "--silence", 5, "--wait", 60]
    command = ["mpirun", "-n", 2, "--oversubscribe", sys.executable, "-m", "hpc_xvr", "reconstruct"]
    command += ["bayes", "--lr", lr, "--hr", hr, *options, "--out", tmp_path / "movie.tif"]
    begin = tmp_path / "begin"
    sent = together(*range(10), *range(11, FRAMES))
    with sending(tmp_path, names, sent, delay=str(begin)), (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 60
            while "is there, and has sent no frame" not in (tmp_path / "log").read_text():
                assert time.monotonic() < end and job.poll() is None
                time.sleep(0.1)
            time.sleep(4)  # the other channel was asked for at the same time
            begin.touch()
            code = job.wait(120)
        finally:
            job.kill()
            job.wait()
    told = (tmp_path / "log").read_text()
    assert code == 0, told
    assert re.findall(r"frames (\d+) to \d+: made", told) == ["0", "4", "8", "11", "15"]
    assert f"{FRAMES - 2} of {FRAMES - 1} frames were finished before" in told
    skip = {"lr_camera": CameraReading(missing="skip")}
    files = CameraFiles(
        tmp_path / "movie-lr.h5", tmp_path / "movie-hr.h5", pairing=Pairing(float(GAP)), **skip
    )
    (tmp_path / "offline").mkdir()
    offline = reconstruct_run(
        "bayes", CPU, files, out=tmp_path / "offline" / "movie.tif", wanted=Wanted()
    )
    assert (tifffile.imread(tmp_path / "movie.tif") == tifffile.imread(offline)).all()


def test_a_camera_that_was_recording_before_us_is_refused(tmp_path, names):
    with sending(tmp_path, names, together(*range(200)), delay=0):
        time.sleep(3)
        recorded = Channel(names["lr"], tmp_path / "lr.h5", False)
        try:
            for _ in range(200):
                time.sleep(0.1)
                recorded.look()
        except InputError as error:
            assert "was recording already" in str(error)
        else:
            pytest.fail("it was taken for the first frame")
        finally:
            recorded.finish()


def test_names_of_channels():
    assert channel_of("pva://13SIM1:Pva1:Image") == "13SIM1:Pva1:Image"
    assert channel_of(Path("pva://a")) == "a"
    assert channel_of("pva/a") is None


def test_floats_are_sent_as_they_are_stored(names):
    received = []
    with published(names["out"]) as send:
        listener = pva.Channel(names["out"])
        listener.monitor(received.append, "field()")
        frame = np.linspace(0, 2, 12, dtype=np.float32).reshape(3, 4)
        for _ in range(100):
            time.sleep(0.1)
            if received:
                break
        send([(7, frame)])
        for _ in range(100):
            time.sleep(0.1)
            if received[-1]["uniqueId"] == 7:
                break
        listener.stopMonitor()
    assert (received[-1]["value"][0]["floatValue"].reshape(3, 4) == frame).all()


def test_the_command_takes_channels_and_refuses_one_that_is_not_there(
    tmp_path, names, hpc_xvr, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    options = "--lr", f"pva://{names['lr']}", "--hr", f"pva://{names['hr']}", "--gap", GAP
    out = "--out", f"pva://{names['out']}", "--silence", 1, "--wait", 3
    said = hpc_xvr("reconstruct", "bayes", *options, *out, code=2)
    kept = names["out"].replace(":", "-")
    assert f"frames are sent to {names['out']} and kept in {kept}.h5" in said.out
    assert f"is recorded in {kept}-lr.h5" in said.err
    assert said.err.splitlines()[-1] == (
        f"hpc-xvr: error: pva://{names['lr']}: no such channel so far (check that it is served, "
        "its name, and EPICS_PVA_ADDR_LIST); no complete frame has come for 3 s; --wait gives it "
        "longer to begin"
    )
    assert not list(tmp_path.iterdir())


def test_a_channel_that_is_missing_ends_it_by_default_within_seconds(tmp_path, names):
    """The other camera's is there, and is recorded meanwhile."""
    missing = {**names, "hr": names["hr"] + "-typing-error"}
    fast = [[("lr", t)] for t in range(6)]
    with sending(tmp_path, names, fast), pytest.raises(InputError) as error:
        begun = time.monotonic()
        follow(tmp_path, missing, wait=None)
    assert f"pva://{missing['hr']}: no such channel so far (" in str(error.value)
    assert "it was looked for 10 s long; --wait gives it longer" in str(error.value)
    assert f"what was recorded is kept in {tmp_path}/movie-lr.h5: rec" in str(error.value)
    assert error.value.exit_code == 2
    assert time.monotonic() - begun < 120  # ten seconds, on a machine that has time


def test_a_channel_that_is_there_may_send_its_first_frame_later(tmp_path, names):
    with sending(tmp_path, names, together(*range(FRAMES)), delay=10):
        asked = pva.Channel(names["lr"])
        asked.setTimeout(60)
        asked.get("field()")
        served = Channel(names["lr"], tmp_path / "lr.h5", False, wait=2.0)
        try:
            end = time.monotonic() + 60
            while not served.look():
                assert time.monotonic() < end
                time.sleep(0.1)
        finally:
            served.finish()
