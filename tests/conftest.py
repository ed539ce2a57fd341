"""What tests of every kind share: files they read, a simulated corpus, a disk that fills up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_xvr.factory.memory import keep_freed_memory
from support.paths import PULSE, ROOT

keep_freed_memory()  # as the commands do; before any test imports torch


def _find(variable: str, folder: str, name: str) -> Path:
    base = Path(os.environ.get(variable, ROOT.parent / "shared" / folder))
    path = base / name
    if not path.exists():
        pytest.skip(f"{name} not found in {base}: set {variable} to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def realdata():
    """realdata("pims_cine/cine_781.cine") -> path of a real camera file, or skip."""
    return lambda name: _find("HPC_XVR_REALDATA", "realdata", name)


@pytest.fixture(scope="session")
def cases():
    """cases("tiff-various/f16.tif") -> path of an odd file whose right answer is in the expect.txt
    beside it, or skip."""
    return lambda name: _find("HPC_XVR_CASES", "cases", name)


@pytest.fixture(scope="session")
def reference():
    """reference("centre.npz") -> path of vectors of the authors' program: those of tests/data, or
    larger ones kept elsewhere, or skip."""

    def find(name: str) -> Path:
        own = ROOT / "tests" / "data" / "authors" / name
        return own if own.exists() else _find("HPC_XVR_REFERENCE", "reference", name)

    return find


@pytest.fixture
def hpc_xvr(monkeypatch, capsys):
    """hpc_xvr("export", run, "--out", file, code=0) -> what it printed, after a look at its exit
    code; runs in this process."""
    from hpc_xvr.cli import main

    def run(*arguments: object, code: int = 0):
        monkeypatch.setattr(sys, "argv", ["hpc-xvr", *map(str, arguments)])
        stopped = 0
        try:
            main()
        except SystemExit as stop:
            stopped = stop.code or 0
        said = capsys.readouterr()
        assert stopped == code, said.err
        return said

    return run


@pytest.fixture(scope="session")
def pulse_corpus(tmp_path_factory):
    """The corpus of configs/pulse.yaml, simulated once."""
    from hpc_xvr.config import load
    from hpc_xvr.data.simulate.corpus import simulate_corpus

    path = tmp_path_factory.mktemp("pulse") / "corpus"
    simulate_corpus(load(PULSE).simulate, path)
    return path


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB that can really be full (tmpfs, which only root may mount)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "hpc_xvr", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no small file system: {error}")
    if done.returncode:
        pytest.skip(f"no small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
