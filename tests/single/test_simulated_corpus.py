"""Whole corpora of simulated experiments: planned, shared out, interrupted, gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hpc_xvr import config
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.simulate import corpus as simulation
from hpc_xvr.data.simulate.beamline import SENSORS
from hpc_xvr.data.simulate.corpus import simulate_corpus
from hpc_xvr.errors import InputError

ROOT = Path(__file__).resolve().parents[2]

EXPERIMENTS = config.Simulate().scenes


def plan(**changes):
    return config.Simulate(**{"videos": 6, "size": (3, 32, 32), **changes})


def test_corpus_holds_what_was_planned_on_any_number_of_workers(tmp_path):
    simulate = plan()
    simulate_corpus(simulate, tmp_path / "one", workers=1)
    simulate_corpus(simulate, tmp_path / "two", workers=2)
    one, two = Corpus(tmp_path / "one"), Corpus(tmp_path / "two")
    assert [v.id for v in one.videos] == [
        f"sim-{i:04d}-{s}" for i, s in enumerate((*EXPERIMENTS, "keyhole"))
    ]
    assert [v.info for v in one.videos] == [v.info for v in two.videos]  # sha256 among them
    assert all(problem is None for _, problem in two.verify())
    video = one["sim-0002-bubbles"]
    assert video.shape == (3, 32, 32) and video.lr_shape == (3, 8, 8)
    assert video.info.camera == "Photron FASTCAM SA-Z (simulated)"
    assert video.info.metadata["lr_camera"] == "Shimadzu HPV-X2 (simulated)"
    assert video.info.source == "simulated" and video.info.lr_times == [0, 1, 2]
    np.testing.assert_allclose(video.lr_intensity(1).mean(), video.intensity(1).mean(), rtol=0.03)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_hdf5_corpus_without_second_camera(tmp_path):
    simulate_corpus(plan(videos=3, store="hdf5", lr_stream=False), tmp_path / "c", workers=1)
    corpus = Corpus(tmp_path / "c")
    assert all(problem is None for _, problem in corpus.verify())
    assert all(v.lr_shape is None and v.info.lr_times is None for v in corpus.videos)


@pytest.mark.parametrize(
    ("videos", "counts"),
    [(24, (18, 3, 3)), (3, (1, 1, 1)), (8, (6, 1, 1)), (100, (75, 13, 12)), (1, (1, 0, 0))],
)
def test_every_split_gets_its_share_and_a_mix_of_scenes(videos, counts):
    items = simulation.plan_corpus(config.Simulate(videos=videos))
    by_split = {
        name: [item.scene for item in items if item.split == name]
        for name in ("train", "validation", "test")
    }
    found = tuple(len(scenes) for scenes in by_split.values())
    assert sum(found) == videos
    assert np.abs(np.subtract(found, counts)).max() <= (1 if videos == 100 else 0)
    for scenes in by_split.values():
        most = max((scenes.count(s) for s in EXPERIMENTS), default=0)
        least = min((scenes.count(s) for s in EXPERIMENTS), default=0)
        assert most - least <= 1
    if videos == 24:
        held = by_split["validation"] + by_split["test"]
        assert set(held) == set(EXPERIMENTS)


def test_cameras_get_their_shares_of_every_scene():
    simulate = plan(videos=60, cameras={"sa-z": {"share": 0.75}, "hpv-x2": {"share": 0.25}}, seed=4)
    items = simulation.plan_corpus(simulate)
    for scene in EXPERIMENTS:
        cameras = [item.camera for item in items if item.scene == scene]
        assert (cameras.count("sa-z"), cameras.count("hpv-x2")) == (9, 3)
    for split in ("train", "validation", "test"):
        assert {item.camera for item in items if item.split == split} == set(SENSORS)
    assert len({item.seed for item in items}) == 60


def test_mistakes_about_cameras():
    for override, match in (
        ({"cameras": {"sa-z": {"share": 0.5}}}, "shares of cameras must add up to 1.*0.5"),
        ({"cameras": {}}, "cameras"),
        ({"cameras": {"phantom": {}}}, "'sa-z' or 'hpv-x2'"),
        ({"size": None}, "size is null: give size or cameras.sa-z.size"),
        (
            {"size": None, "cameras": {"hpv-x2": {"size": (256, 250, 400)}}},
            r"\(256, 250, 400\) must be multiples of scale 4",
        ),
    ):
        with pytest.raises(InputError, match=match):
            config.load(None, [f"simulate={json.dumps(override)}"])


@pytest.mark.slow
def test_mpirun_shares_the_recordings_and_bad_input_ends_all_ranks(tmp_path):
    pulse = ROOT / "configs" / "pulse.yaml"
    small = ["simulate.size=[3,32,32]", "data.patch=32", f"data.corpus={tmp_path / 'two'}"]
    shared = ["mpirun", "-n", "2", "--oversubscribe", sys.executable, "-m", "hpc_xvr", "simulate"]
    shared += [str(pulse), *(part for value in small for part in ("--set", value))]
    simulate_corpus(config.load(pulse, small).simulate, tmp_path / "one", workers=1)
    done = subprocess.run(shared, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 recordings") == 1  # one rank speaks
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    again = subprocess.run(shared, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert again.returncode == 2
    assert again.stderr.count("error: corpus") == 1 and "exists" in again.stderr


def test_a_corpus_in_the_way_is_not_touched(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine").write_text("x")
    with pytest.raises(InputError, match="exists"):
        simulate_corpus(plan(), tmp_path / "c", workers=1)
    assert (tmp_path / "c" / "mine").read_text() == "x"


def test_a_failure_half_way_keeps_what_is_finished(tmp_path, monkeypatch):
    make, made = simulation._make, []

    def fail(simulate, corpus, item):
        made.append(item.id)
        if len(made) == 3:
            raise RuntimeError("third recording")
        return make(simulate, corpus, item)

    monkeypatch.setattr(simulation, "_make", fail)
    with pytest.raises(RuntimeError, match="third"):
        simulate_corpus(plan(), tmp_path / "c", workers=1)
    assert [p.name for p in tmp_path.iterdir()] == [".c.building"]
    assert [v.id for v in Corpus(tmp_path / ".c.building").videos] == sorted(made[:2])

    with pytest.raises(InputError, match=r"other settings, see .*simulate\.json; finish it with"):
        simulate_corpus(plan(seed=2), tmp_path / "c", workers=1)
    simulate_corpus(plan(), tmp_path / "c", workers=1)
    assert sorted(made[3:]) == sorted({v.id for v in Corpus(tmp_path / "c").videos} - set(made[:2]))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.slow
def test_killed_half_way_it_goes_on_and_ends_with_the_same_corpus(tmp_path):
    """No worker outlives the killed one; nothing is simulated twice."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom hpc_xvr import config\n"
        "from hpc_xvr.data.simulate.corpus import simulate_corpus\n"
        "if __name__ == '__main__':\n"
        "    simulate_corpus(config.Simulate(videos=24, size=(3, 32, 32)), sys.argv[1], 2)\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, str(script), str(out / "c")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 240
    while len(list(out.glob(".c.building/videos/sim-*"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "c").exists() and len(workers) >= 2
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the killed parent"
        time.sleep(0.05)
    kept = {
        path.name: path.stat().st_mtime_ns
        for path in (out / ".c.building" / "videos").iterdir()
        if path.is_dir()
    }
    assert 3 <= len(kept) < 24
    subprocess.run(command, env=environment, check=True, timeout=300)
    assert [p.name for p in out.iterdir()] == ["c"]
    assert {name: (out / "c/videos" / name).stat().st_mtime_ns for name in kept} == kept

    simulate_corpus(config.Simulate(videos=24, size=(3, 32, 32)), tmp_path / "at_once", workers=1)
    assert _files(out / "c") == _files(tmp_path / "at_once")


def _files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
