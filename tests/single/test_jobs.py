"""Whole programs, started as users start them: mpirun, torchrun, signals, kill -9, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hpc_xvr.checkpoint import list_checkpoints, load, path_of
from hpc_xvr.data.corpus import Corpus

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PULSE = ROOT / "configs" / "pulse.yaml"
CLI = [sys.executable, "-m", "hpc_xvr"]
MPIRUN = ["mpirun", "-n", "2", "--oversubscribe"]
ENGINES = {"serial": [], "horovod": MPIRUN, "torch": MPIRUN}
TIMEOUT = 120


@pytest.fixture
def job(tmp_path, pulse_corpus):
    """job(engine, *arguments) -> a finished `hpc-xvr train` of the pulse config."""

    def run(
        engine,
        *overrides,
        options=(),
        program=(*CLI,),
        run_dir=None,
        launcher=None,
        environment=None,
    ):
        sets = [
            f"run.dir={run_dir or tmp_path / 'run'}",
            f"data.corpus={pulse_corpus}",
            "run.threads=1",
            "run.device=cpu",
            *overrides,
        ]
        command = [
            *(ENGINES[engine] if launcher is None else launcher),
            *program,
            "train",
            str(PULSE),
            "--engine",
            engine,
            *options,
        ]
        for text in sets:
            command += ["--set", text]
        return subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env={**os.environ, **(environment or {})},
            errors="replace",
        )

    return run


def patched(code):
    """`hpc-xvr` with a change made to it first."""
    return [sys.executable, "-c", f"{code}\nfrom hpc_xvr.cli import main\nmain()"]


DIE = """
import os, signal
import hpc_xvr.train.engine as engine
real = engine.Trainer.train_step
def train_step(self, step, batches):
    if step == 3:
        self.checkpoints.wait()
        self.comm.barrier()  # rank 0 has its checkpoint on disk
    if step == 3 and self.comm.rank == self.comm.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, step, batches)
engine.Trainer.train_step = train_step
"""
RAISE = DIE.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise RuntimeError('lens cap on')")


def steps_of(folder, kind="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == kind]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("engine", ["serial", "horovod", "torch"])
def test_killed_and_resumed_equals_undisturbed_bit_for_bit(engine, job, tmp_path):
    """6 steps == 3 steps + SIGKILL + resume + 3 steps, with stochastic depth on."""
    extra = ["model.drop_path=0.3", "checkpoint.every=3"]
    whole = job(engine, *extra, run_dir=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = job(engine, *extra, program=patched(DIE))
    assert killed.returncode != 0
    assert [step for step, _ in list_checkpoints(tmp_path / "run/checkpoints")] == [3]
    resumed = job(engine, *extra, options=["--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert "step-000000003.pt (step 3)" in resumed.stderr
    a, b = (load(path_of(tmp_path / name / "checkpoints", 6)) for name in ("whole", "run"))
    for part in ("model", "ema", "optimizer", "step"):
        assert same(a[part], b[part]), part
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.rglob("*.partial*"))


@pytest.mark.parametrize("engine", ["horovod", "torch"])
def test_an_exception_on_one_rank_ends_all_with_its_traceback(engine, job, tmp_path):
    start = time.monotonic()
    done = job(engine, program=patched(RAISE))
    assert done.returncode != 0
    assert "[rank 1] failed in step 3" in done.stderr, done.stderr
    assert "RuntimeError: lens cap on" in done.stderr
    assert time.monotonic() - start < 60
    assert max(steps_of(tmp_path / "run")) == 3


def test_torchrun_is_a_launcher_too(job, tmp_path):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29731",
    ]
    done = job("torch", launcher=launcher, program=["-m", "hpc_xvr"])
    assert done.returncode == 0, done.stderr
    assert "2 rank(s)" in done.stderr
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("launcher", "number", "workers"),
    [([], signal.SIGTERM, 0), ([], signal.SIGINT, 0), (MPIRUN, signal.SIGUSR1, 1)],
)
def test_a_signal_stops_the_run_in_good_order(launcher, number, workers, tmp_path, pulse_corpus):
    """mpirun hands SIGUSR1 on to every rank; a SIGTERM it answers by killing them soon."""
    command = [
        *launcher,
        *CLI,
        "train",
        str(PULSE),
        "--set",
        f"run.dir={tmp_path}/run",
        "--set",
        f"data.corpus={pulse_corpus}",
        "--set",
        "train.steps=5000",
        "--set",
        "checkpoint.every=5000",
        "--set",
        "validation.every=5000",
        "--set",
        f"data.workers={workers}",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    metrics = tmp_path / "run/metrics.jsonl"
    end = time.monotonic() + TIMEOUT
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(number)
    log = process.communicate(timeout=60)[1]
    assert process.returncode == 75, log
    assert "stopped by a signal" in log
    assert not (tmp_path / "run/done.json").exists()
    ((step, path),) = list_checkpoints(tmp_path / "run/checkpoints")
    assert load(path)["step"] == step == max(steps_of(tmp_path / "run"))


def test_ranks_that_do_not_find_each_other_are_an_error_not_many_worlds_of_one(job, tmp_path):
    """As when another MPI's launcher starts us: it says two ranks, our MPI sees one."""
    done = job("auto", launcher=[], environment={"PMI_RANK": "0", "PMI_SIZE": "2"})
    assert done.returncode == 2
    assert "started 2 ranks but MPI sees 1" in done.stderr
    assert not (tmp_path / "run").exists()


NO_MPI = "import sys\nsys.modules.update(dict.fromkeys(('mpi4py', 'horovod')))"


def test_several_ranks_without_mpi4py_are_refused_in_one_line(job, tmp_path):
    environment = {"PMI_RANK": "0", "PMI_SIZE": "2"}
    done = job("auto", launcher=[], program=patched(NO_MPI), environment=environment)
    assert done.returncode == 2
    assert "PMI started 2 ranks, but mpi4py cannot be imported" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_one_rank_needs_no_mpi4py_even_if_a_launcher_starts_it(job, tmp_path):
    """As a job does that `hpc-xvr submit` sends."""
    environment = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    done = job("auto", launcher=[], program=patched(NO_MPI), environment=environment)
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


ENGINES["auto"] = []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.global_batch=5", "train.steps=2"], "global_batch 5"),
        (["data.corpus=/nowhere/corpus", "simulate=null"], "/nowhere/corpus"),
        (["train.weights=/nowhere/net.pth"], "no such file"),
        (["data.patch=128"], "patch"),
        (["run.dir=/proc/run"], "/proc/run"),
    ],
)
def test_bad_input_is_one_line_from_one_rank_and_exit_code_2(overrides, message, job, tmp_path):
    done = job("torch", *overrides)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "hpc-xvr: error:" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_corpus_is_simulated_by_the_command_once_nothing_else_is_wrong(job, tmp_path):
    """Not before ranks that cannot share the global batch have been refused."""
    corpus = tmp_path / "corpus"
    small = [f"data.corpus={corpus}", "simulate.videos=4", "simulate.size=[12, 32, 32]"]
    refused = job("torch", *small, "train.global_batch=5")
    assert refused.returncode == 2
    assert "train.global_batch 5 cannot be shared by 2 ranks" in refused.stderr
    assert list(tmp_path.iterdir()) == []
    done = job("torch", *small, "train.steps=1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"simulating 4 recordings into {corpus}") == 1
    assert len(Corpus(corpus)) == 4
    made = (corpus / "corpus.json").stat().st_mtime_ns
    again = job("serial", *small, "train.steps=2", options=["--resume"])
    assert again.returncode == 0, again.stderr
    assert "simulating" not in again.stderr
    assert (corpus / "corpus.json").stat().st_mtime_ns == made


def test_what_omp_num_threads_must_not_be_is_said_once_by_all_ranks(job, tmp_path):
    small = [f"data.corpus={tmp_path / 'corpus'}", "simulate.videos=4"]
    done = job("torch", "run.threads=null", *small, environment={"OMP_NUM_THREADS": "all"})
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if "hpc-xvr: error:" in line]
    assert "OMP_NUM_THREADS='all' is not a number of threads" in error
    assert list(tmp_path.iterdir()) == []


def test_a_used_run_folder_is_not_overwritten_and_another_architecture_not_resumed(job, tmp_path):
    assert job("serial", "train.steps=2").returncode == 0
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    again = job("serial", "train.steps=2")
    assert again.returncode == 2
    assert json.loads((tmp_path / "run/done.json").read_text())["step"] == 2
    assert "already used (checkpoint of step 2); add --resume" in again.stderr
    other = job("serial", "model.embed_dim=12", options=["--resume"])
    assert other.returncode == 2
    assert "model.embed_dim was 24, is 12" in other.stderr
    done = job("serial", "train.steps=2", options=["--resume"])
    assert done.returncode == 0
    assert "is done (step 2); nothing to do" in done.stderr
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_help_and_config_errors_need_neither_torch_nor_mpi(tmp_path):
    """As on a login node: torch, MPI and the file libraries are not there at all."""
    block = (
        "import sys\nfor name in ('torch', 'mpi4py', 'horovod', 'zarr', 'tensorstore', 'h5py',"
        " 'scipy', 'skimage', 'matplotlib', 'tifffile', 'pims'):\n    sys.modules[name] = None"
    )
    helps = (["--help"], ["train", "--help"], ["ingest", "--help"], ["submit", "--help"])
    for arguments in (*helps, ["--version"]):
        done = subprocess.run(
            [*patched(block), *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout
    done = subprocess.run(
        [*patched(block), "train", str(PULSE), "--set", "train.stepz=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "simulate",
        "ingest",
        "fetch",
        "inspect",
        "train",
        "evaluate",
        "reconstruct",
        "export",
        "report",
        "submit",
    ],
)
def test_every_command_teaches_with_examples(command):
    done = subprocess.run([*CLI, command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"hpc-xvr {command}" in done.stdout.split("Examples:")[1]


def test_the_rules_of_who_imports_whom_hold():
    done = subprocess.run(["lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
