"""Trouble of the moment in training: a corpus that changes, a run folder that goes, full disks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpc_xvr import checkpoint
from hpc_xvr.config import load
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import InputError, PassingError
from hpc_xvr.submit.job import SCRIPTS
from hpc_xvr.train.engine import Trainer
from hpc_xvr.train.run_folder import lock_run
from support.paths import PULSE, ROOT
from support.runs import a_corpus

SMALL = ("model.embed_dim=6", "model.up_features=4", "validation.every=1000", "train.steps=4")
TWO = ("data.patch=32", "train.steps=2")


def trainer(run, corpus, *overrides, **options):
    fixed = [f"run.dir={run}", f"data.corpus={corpus}", "run.threads=1", "run.device=cpu"]
    return Trainer(load(PULSE, [*fixed, *SMALL, *overrides]), Comm(), **options)


@pytest.fixture
def noise(tmp_path):
    """A corpus of four recordings, and a run of two steps on it."""
    corpus = a_corpus(tmp_path / "corpus").path
    made = trainer(tmp_path / "run", corpus, *TWO)
    assert made.run()
    made.close()
    return corpus


def drop(corpus, name):
    """Take a recording out of a corpus."""
    lines = (corpus / "manifest.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line).get("id") != name]
    assert len(kept) == len(lines) - 1
    (corpus / "manifest.jsonl").write_text("".join(kept))
    shutil.rmtree(corpus / "videos" / name)


def test_a_corpus_that_is_the_same_resumes_without_a_word(noise, tmp_path, caplog):
    trainer(tmp_path / "run", noise, *TWO, resume=True, strict=True).close()
    assert "training recordings" not in caplog.text


def test_a_corpus_that_lost_a_recording_is_told_and_refused_if_strict(noise, tmp_path, caplog):
    drop(noise, "v2")
    assert len(Corpus(noise).videos) == 3
    with pytest.raises(InputError, match=r"--strict: the corpus has other training .* \(1 fewer\)"):
        trainer(tmp_path / "run", noise, *TWO, resume=True, strict=True)
    with caplog.at_level("WARNING", logger="hpc_xvr"):
        trainer(tmp_path / "run", noise, *TWO, resume=True).close()
    assert "3 with 27 frames, it were 4 with 36 (1 fewer)" in caplog.text


def test_a_corpus_of_as_many_other_recordings_is_told(noise, tmp_path, caplog):
    made = a_corpus(tmp_path / "other", videos=5).path
    drop(made, "v0")
    with caplog.at_level("WARNING", logger="hpc_xvr"):
        trainer(tmp_path / "run", made, *TWO, resume=True).close()
    assert "(as many, but others)" in caplog.text


def test_changed_settings_are_refused_if_strict(noise, tmp_path):
    changed = (*TWO, "optim.lr=0.5")
    with pytest.raises(InputError, match=r"--strict: config changed .*: optim.lr was"):
        trainer(tmp_path / "run", noise, *changed, resume=True, strict=True)


def removed(folder):
    """Whatever threads put there meanwhile."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def test_a_run_folder_that_is_deleted_is_made_again(tmp_path, pulse_corpus, monkeypatch, caplog):
    """With a checkpoint at once, its config and environment, and its lock."""
    run, step = tmp_path / "run", Trainer.train_step

    def deleting(self, number, batches):
        if number == 1:
            self.checkpoints.finish()
            removed(run)
        if number == 3:
            with pytest.raises(PassingError, match="in use by another"):
                lock_run(run, patience=0)
        step(self, number, batches)

    monkeypatch.setattr(Trainer, "train_step", deleting)
    made = trainer(run, pulse_corpus, "checkpoint.every=1000", "run.utilisation_s=0.1")
    with caplog.at_level("WARNING", logger="hpc_xvr"):
        assert made.run()
    made.close()
    assert caplog.text.count("was deleted, or moved, while the run uses it") == 1
    assert [s for s, _ in checkpoint.list_checkpoints(run / "checkpoints")] == [4, 2]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 3, 4]
    assert load(run / "config.yaml").train.steps == 4
    assert json.loads((run / "environment.json").read_text())["ranks"]
    assert (run / "done.json").exists()


def test_a_run_folder_that_cannot_be_made_again_ends_the_run(tmp_path, pulse_corpus, monkeypatch):
    run, step = tmp_path / "run", Trainer.train_step

    def replacing(self, number, batches):
        if number == 1:
            removed(run)
            run.write_text("a file")
        step(self, number, batches)

    monkeypatch.setattr(Trainer, "train_step", replacing)
    made = trainer(run, pulse_corpus, "run.utilisation_s=0")
    with pytest.raises(InputError, match=r"run folder .*: .*is a file; choose another folder"):
        made.run()
    made.close()


FILLING = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from hpc_xvr.train.engine import Trainer
from support.disk import fill
step = Trainer.train_step
def filling(self, number, batches):
    if number == {at}:
        self.checkpoints.wait()
        fill(Path({disk!r}))
    step(self, number, batches)
    self.checkpoints.wait()
Trainer.train_step = filling
from hpc_xvr.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("at", "code"), [(2, 75), (0, 74)])
def test_a_disk_that_is_full_has_code_75_once_there_is_a_checkpoint_and_74_before(
    at, code, small_disk, pulse_corpus
):
    text = FILLING.format(tests=str(ROOT / "tests"), at=at, disk=str(small_disk))
    command = [sys.executable, "-c", text, "train", str(PULSE), "--set", f"run.dir={small_disk}"]
    sets = [f"data.corpus={pulse_corpus}", "run.device=cpu", "checkpoint.every=1", *SMALL[:3]]
    sets += ["checkpoint.failures=2", "train.steps=9", "run.utilisation_s=0"]
    for one in sets:
        command += ["--set", one]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_too_little_memory_is_trouble_of_the_moment_and_says_what_to_do(tmp_path, pulse_corpus):
    command = [sys.executable, "-c", LIMITED, "train", str(PULSE)]
    for one in (f"run.dir={tmp_path}/run", f"data.corpus={pulse_corpus}", "run.device=cpu"):
        command += ["--set", one]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 74, done.stderr
    assert "hpc-xvr: error: out of memory: " in done.stderr
    assert "Traceback" not in done.stderr


LIMITED = """
import resource
from hpc_xvr.train.engine import Trainer
step = Trainer.train_step
def limited(self, number, batches):
    if number == 1:
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + 20_000_000, resource.RLIM_INFINITY))
        import torch
        self.held = [torch.zeros(10_000_000) for _ in range(100)]
    step(self, number, batches)
Trainer.train_step = limited
from hpc_xvr.cli import main
main()
"""


def test_a_file_named_like_a_checkpoint_that_is_a_folder_stops_no_pruning(tmp_path):
    checkpoint.path_of(tmp_path, 7).mkdir()
    writer = checkpoint.CheckpointWriter(tmp_path, keep=2)
    for step in (5, 6, 8, 9):
        writer.save({"step": step, "w": torch.zeros(3)})
        writer.wait()
        writer.check()
    assert [s for s, _ in checkpoint.list_checkpoints(tmp_path)] == [9, 8, 7]


CATCH = """
import os, signal, sys, time
from hpc_xvr.train.stopping import Stopping
stopping = Stopping()
stopping.listen()
stopping.begin()
print("listening", flush=True)
end = time.monotonic() + 20
while time.monotonic() < end and not stopping.asked(0):
    time.sleep(0.02)
print(stopping.reason, flush=True)
"""
SHIELD = str(SCRIPTS.parent / "shield.py")


def shielded(*command, **options):
    return subprocess.Popen(
        [sys.executable, "-I", "-S", SHIELD, *command], stdout=subprocess.PIPE, text=True, **options
    )


def test_what_is_shielded_does_not_hear_sigterm_and_a_rank_below_it_does():
    launcher = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]]); input()"
    )
    job = shielded(
        sys.executable, "-c", launcher, CATCH, stdin=subprocess.PIPE, start_new_session=True
    )
    assert job.stdout.readline() == "listening\n"
    os.killpg(job.pid, signal.SIGTERM)
    assert job.stdout.readline() == "by a signal\n"
    assert job.poll() is None, "the launcher lives on"
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(10) != 0


def test_what_is_shielded_ends_with_the_script_that_started_it(tmp_path):
    """Its parent is killed: the kernel tells it."""
    text = f"'{sys.executable}' -I -S '{SHIELD}' sleep 50 & echo $!; wait"
    script = subprocess.Popen(["bash", "-c", text], stdout=subprocess.PIPE, text=True)
    child = int(script.stdout.readline())
    line = Path(f"/proc/{child}/cmdline")
    while line.read_bytes() != b"sleep\0" + b"50\0":
        pass
    script.kill()
    script.wait()
    assert script.stdout.read() == "", "the pipe is closed: nobody is left that holds it"


def test_the_shell_that_an_agent_starts_ignores_sigterm(tmp_path):
    (tmp_path / "prted").write_text("#!/bin/sh\necho ready; sleep 1; echo $1\n")
    (tmp_path / "prted").chmod(0o755)
    (tmp_path / "agent").write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
    (tmp_path / "agent").chmod(0o755)
    words = ["host", f"A=1;export A;{tmp_path}/prted", "done"]
    agent = shielded("--agent", f"{tmp_path}/agent", *words, start_new_session=True)
    assert agent.stdout.readline() == "ready\n"
    os.killpg(agent.pid, signal.SIGTERM)
    assert agent.stdout.read() == "done\n"


def test_an_environment_whose_python_is_unreachable_is_not_a_missing_one(tmp_path):
    """setup.sh: it would be built anew, over the one that only cannot be seen from here."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to("/nowhere/python3.11")
    (tmp_path / ".hpc_xvr").write_text("old")
    done = subprocess.run(
        ["bash", str(ROOT / "jobs/setup.sh")],
        capture_output=True,
        text=True,
        env={**os.environ, "HPC_XVR_VENV": str(tmp_path)},
    )
    assert done.returncode == 74, done.stdout
    assert "/nowhere/python3.11 cannot be reached from" in done.stderr
    assert not (tmp_path / "bin/pip").exists()


def test_an_environment_of_another_python_is_left_as_it_is(tmp_path):
    """setup.sh: venv would change what it is made for, and keep its links to the other one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text("#!/bin/sh\necho /other/python3.11\n")
    (tmp_path / "bin/python3").chmod(0o755)
    (tmp_path / "pyvenv.cfg").write_text("home = /other\n")
    done = subprocess.run(
        ["bash", str(ROOT / "jobs/setup.sh")],
        capture_output=True,
        text=True,
        env={**os.environ, "HPC_XVR_VENV": str(tmp_path)},
    )
    assert done.returncode == 2, done.stdout
    assert f"{tmp_path} was made with another python" in done.stderr
    assert (tmp_path / "pyvenv.cfg").read_text() == "home = /other\n"
    assert not (tmp_path / "bin/pip").exists()


def test_a_python_that_cannot_run_is_not_called_too_old(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "jobs/setup.sh")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": str(tmp_path / "python"), "HPC_XVR_VENV": str(tmp_path / "v")},
    )
    assert done.returncode == 2
    assert f"{tmp_path}/python cannot be run" in done.stderr and "too old" not in done.stderr


def test_a_job_tells_an_unreachable_python_from_a_missing_environment(tmp_path):
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to("/nowhere/python3.11")
    (tmp_path / "venv/bin/hpc-xvr").write_text("#!/nowhere/python3.11\n")
    (tmp_path / "venv/bin/hpc-xvr").chmod(0o755)
    text = f"xvr_job=7 xvr_nodes=1 xvr_default_site=slurm xvr_hosts=; source '{SCRIPTS}/job.sh'; "
    text += f"xvr_main --folder {tmp_path} --venv {tmp_path}/venv report x"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 74, done.stderr
    assert "is there, but its python, /nowhere/python3.11, cannot be run on" in done.stdout
