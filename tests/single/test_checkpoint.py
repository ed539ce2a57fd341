"""Checkpoints: whole or not there, checked before they are believed."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hpc_xvr import checkpoint, files
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger
from support.disk import fill

ROOT = Path(__file__).resolve().parents[2]


def state(step):
    g = torch.Generator().manual_seed(step)
    return {"step": step, "model": {"w": torch.randn(50, 40, generator=g)}, "note": "x"}


def test_round_trip_and_readable_by_plain_torch(tmp_path):
    path = checkpoint.path_of(tmp_path, 7)
    checkpoint.save(state(7), path)
    for loaded in (checkpoint.load(path), torch.load(path, weights_only=True)):
        assert loaded["step"] == 7
        assert torch.equal(loaded["model"]["w"], state(7)["model"]["w"])
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000007.pt"]


def test_every_kind_of_damage_is_noticed(tmp_path):
    path = checkpoint.path_of(tmp_path, 1)
    checkpoint.save(state(1), path)
    good = path.read_bytes()
    rng = random.Random(0)
    damaged = [b"", good[: len(good) // 2], good[:-1], b"PK" + bytes(len(good) - 2), b"no file"]
    for _ in range(100):
        at = rng.randrange(len(good) - 90)
        damaged.append(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(checkpoint.CorruptCheckpoint) as problem:
            checkpoint.load(path)
        assert str(path) in str(problem.value)
        assert "\n" not in str(problem.value)


def test_the_newest_valid_one_is_taken_and_the_others_are_reported(tmp_path):
    for step in (2, 4, 6):
        checkpoint.save(state(step), checkpoint.path_of(tmp_path, step))
    checkpoint.path_of(tmp_path, 6).write_bytes(b"torn")
    found = list(checkpoint.newest_valid(tmp_path))
    assert isinstance(found[0][1], checkpoint.CorruptCheckpoint)
    assert found[1][1]["step"] == 4
    assert len(found) == 2


@pytest.mark.parametrize("how", ["checksummed", "zip", "old format"])
def test_a_pickle_that_would_run_code_does_not(how, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    path = checkpoint.path_of(tmp_path, 3)
    if how == "checksummed":
        checkpoint.save({"step": 3, "model": Bomb()}, path)
    else:
        torch.save({"model": Bomb()}, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(checkpoint.CorruptCheckpoint):
        checkpoint.load(path)
    with pytest.raises(checkpoint.CorruptCheckpoint, match="state_dict"):
        checkpoint.read_tensors(path)  # weights of the authors' program: plain torch files
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the test's pickle would have run"


def test_a_file_of_another_step_or_without_what_is_needed_is_passed_over(tmp_path):
    checkpoint.save(state(4), checkpoint.path_of(tmp_path, 4))
    checkpoint.save({"step": 5}, checkpoint.path_of(tmp_path, 5))
    checkpoint.save(state(4), checkpoint.path_of(tmp_path, 6))
    checkpoint.path_of(tmp_path, 7).mkdir()
    checkpoint.path_of(tmp_path, 8).symlink_to(tmp_path / "nowhere")
    found = [(path.name, result) for path, result in checkpoint.newest_valid(tmp_path, ("model",))]
    reasons = ["cannot be read", "is a folder, not a file", "is of step 4", "lacks model"]
    for (name, problem), step, reason in zip(found, (8, 7, 6, 5), reasons, strict=False):
        assert name == f"step-{step:09d}.pt"
        assert reason in str(problem)
    assert found[4][1]["step"] == 4


def test_prune_keeps_the_newest_and_leftovers_go(tmp_path):
    for step in range(5):
        checkpoint.save(state(step), checkpoint.path_of(tmp_path, step))
    (tmp_path / ".step-000000009.pt.partial").write_bytes(b"half")
    checkpoint.prune(tmp_path, 2, newest=4)
    files.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000003.pt", "step-000000004.pt"]


def test_prune_keeps_one_of_every_n_and_the_best(tmp_path):
    for step in range(2, 22, 2):
        checkpoint.save(state(step), checkpoint.path_of(tmp_path, step))
    checkpoint.prune(tmp_path, 2, newest=20, keep_every=8, spared=[6])
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [20, 18, 16, 8, 6]


def test_prune_never_takes_the_checkpoint_just_written(tmp_path):
    """A damaged checkpoint of a later step was passed over at resume; it must not count."""
    for step in (3, 6, 7):
        checkpoint.save(state(step), checkpoint.path_of(tmp_path, step))
    checkpoint.path_of(tmp_path, 9).write_bytes(b"torn")
    checkpoint.prune(tmp_path, 1, newest=7)
    assert checkpoint.list_checkpoints(tmp_path) == [(7, checkpoint.path_of(tmp_path, 7))]


def test_a_full_disk_is_one_line_and_older_checkpoints_stay(tmp_path):
    """RLIMIT_FSIZE makes the write fail half-way, as a quota does."""
    checkpoint.save(state(1), checkpoint.path_of(tmp_path, 1))
    code = f"""
import signal, torch
from pathlib import Path
from hpc_xvr import checkpoint, files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path({str(tmp_path)!r})
checkpoint.save({{"step": 2, "w": torch.zeros(100_000)}}, folder / "step-000000002.pt")
"""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode != 0
    assert "InputError: cannot write" in done.stderr
    assert "File too large" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001.pt"]
    assert checkpoint.load(checkpoint.path_of(tmp_path, 1))["step"] == 1


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="choose another folder"):
        checkpoint.save(state(1), tmp_path / "file" / "step-000000001.pt")


def test_killed_while_writing_leaves_only_whole_checkpoints(tmp_path):
    code = """
import sys, torch
from pathlib import Path
from hpc_xvr import checkpoint, files
folder = Path(sys.argv[1])
for step in range(10_000):
    checkpoint.save({"step": step, "w": torch.full((300_000,), float(step))},
                    checkpoint.path_of(folder, step))
    checkpoint.prune(folder, 3, step)
"""
    for i in range(3):
        folder = tmp_path / str(i)
        writer = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT)
        while not checkpoint.list_checkpoints(folder):
            time.sleep(0.02)
        time.sleep(0.1 + 0.07 * i)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        saved = checkpoint.list_checkpoints(folder)
        assert saved
        for step, path in saved:
            loaded = checkpoint.load(path)
            assert loaded["step"] == step
            assert bool((loaded["w"] == step).all())


@pytest.fixture
def slow_rename(monkeypatch):
    """Renaming takes half a second, as on a network file system in a bad hour."""
    rename = Path.replace

    def slowly(self, target):
        time.sleep(0.5)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", slowly)


def test_training_goes_on_while_a_checkpoint_of_this_very_step_is_written(tmp_path, slow_rename):
    writer = checkpoint.CheckpointWriter(tmp_path)
    live = state(1) | {"optimizer": {"state": [torch.ones(3)], "groups": ({"lr": 1.0},)}}
    start = time.monotonic()
    writer.save(live)
    assert time.monotonic() - start < 0.4, "the disk is not waited for"
    live["model"]["w"].zero_()  # the next step
    live["optimizer"]["state"][0] += 1
    assert not checkpoint.list_checkpoints(tmp_path)
    writer.save({**live, "step": 2})  # one at a time: waits for the first
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [1]
    writer.finish()
    first, second = (checkpoint.load(checkpoint.path_of(tmp_path, step)) for step in (1, 2))
    assert torch.equal(first["model"]["w"], state(1)["model"]["w"])
    assert torch.equal(first["optimizer"]["state"][0], torch.ones(3))
    assert first["optimizer"]["groups"] == ({"lr": 1.0},)
    assert not second["model"]["w"].any()
    assert torch.equal(second["optimizer"]["state"][0], torch.full((3,), 2.0))
    assert 0.5 < writer.slowest < 5


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_but_not_the_run(
    small_disk, caplog, monkeypatch
):
    """Real ones: a tmpfs of 1 MB, filled and emptied, then made read-only."""
    monkeypatch.setattr(logger, "propagate", True)
    writer = checkpoint.CheckpointWriter(small_disk, keep=2, failures=2)
    big = {"w": torch.zeros(50_000)}
    names = lambda: sorted(p.name for p in small_disk.iterdir() if p.name != "filler")  # noqa: E731
    writer.save({**big, "step": 1})
    writer.finish()

    fill(small_disk)
    writer.save({**big, "step": 2})
    writer.wait()
    writer.check()  # one failure is none
    assert "No space left on device" in caplog.text
    assert "training goes on, the checkpoint of step 1 is intact (failure 1" in caplog.text
    assert names() == ["step-000000001.pt"], "nothing half-written is left"
    assert checkpoint.load(checkpoint.path_of(small_disk, 1))["step"] == 1

    (small_disk / "filler").unlink()
    writer.save({**big, "step": 3})
    writer.finish()
    assert names() == ["step-000000001.pt", "step-000000003.pt"]

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    writer.save({**big, "step": 4})
    writer.wait()
    writer.check()  # the good one in between counts
    writer.save({**big, "step": 5})
    writer.wait()
    with pytest.raises(InputError, match=r"read-only; .*2 checkpoints in a row"):
        writer.check()
    with pytest.raises(InputError, match="step-000000005"):
        writer.finish()
    assert names() == ["step-000000001.pt", "step-000000003.pt"]


def test_the_last_checkpoint_must_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    writer = checkpoint.CheckpointWriter(tmp_path / "file")
    writer.save(state(1))
    with pytest.raises(InputError, match="choose another folder"):
        writer.finish()


def test_what_is_no_trouble_of_the_disk_is_an_error_at_once(tmp_path):
    writer = checkpoint.CheckpointWriter(tmp_path)
    writer.save({"step": 1, "w": lambda: None})  # cannot be pickled
    writer.wait()
    with pytest.raises(Exception, match="local object"):  # 3.13 does not say "pickle"
        writer.check()
    assert not list(tmp_path.iterdir())
