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

from hpc_xvr import checkpoint
from hpc_xvr.errors import InputError

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


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    path = checkpoint.path_of(tmp_path, 3)
    checkpoint.save({"step": 3, "model": Bomb()}, path)
    with pytest.raises(checkpoint.CorruptCheckpoint, match="not readable as tensors"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


def test_prune_keeps_the_newest_and_leftovers_go(tmp_path):
    for step in range(5):
        checkpoint.save(state(step), checkpoint.path_of(tmp_path, step))
    (tmp_path / ".step-000000009.pt.partial").write_bytes(b"half")
    checkpoint.prune(tmp_path, 2, newest=4)
    checkpoint.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000003.pt", "step-000000004.pt"]


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
from hpc_xvr import checkpoint
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
from hpc_xvr import checkpoint
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
