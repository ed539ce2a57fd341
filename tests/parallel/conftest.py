"""Fixtures of tests that run on every rank of `mpirun -n 2 python -m pytest tests/parallel`.

A rank whose test fails ends the whole job: the other one would wait for it in a collective.
"""

import functools
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from mpi4py import MPI

from hpc_xvr import log
from hpc_xvr.config import Dist, load
from hpc_xvr.data.simulate.corpus import simulate_corpus
from hpc_xvr.distributed.comm import connect

WORLD = MPI.COMM_WORLD
PULSE = Path(__file__).resolve().parents[2] / "configs" / "pulse.yaml"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session):
    if WORLD.Get_rank():  # rank 0 reports; the others only when they fail
        plugins = session.config.pluginmanager
        plugins.unregister(plugins.get_plugin("terminalreporter"))


def pytest_configure(config):
    log.setup(WORLD.Get_rank())
    if WORLD.Get_rank():
        config.option.xmlpath = None  # --junitxml: both would write one file
    if WORLD.Get_size() != 2:
        pytest.exit("run these tests with: mpirun -n 2 python -m pytest tests/parallel", 2)


def pytest_internalerror(excrepr):
    print(excrepr, file=sys.__stderr__, flush=True)
    WORLD.Abort(1)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    if report.failed:
        print(
            f"[rank {WORLD.Get_rank()}] {item.nodeid}\n{report.longreprtext}",
            file=sys.__stderr__,
            flush=True,
        )
        WORLD.Abort(1)


@functools.cache
def connected(name):
    return connect(name, "cpu", Dist(timeout_s=60))


@pytest.fixture(scope="session", params=["horovod", "torch"])
def engine(request):
    """Both engines, each connected once."""
    return connected(request.param)


@pytest.fixture(scope="session")
def engines():
    """Both at the same time."""
    return [connected(name) for name in ("horovod", "torch")]


@pytest.fixture(scope="session")
def shared_folder():
    """A folder both ranks see."""
    path = WORLD.bcast(tempfile.mkdtemp(prefix="hpc_xvr-") if WORLD.Get_rank() == 0 else None)
    yield Path(path)
    WORLD.Barrier()
    if WORLD.Get_rank() == 0:
        shutil.rmtree(path)


@pytest.fixture(scope="session")
def corpus(shared_folder):
    path = shared_folder / "corpus"
    if WORLD.Get_rank() == 0:
        simulate_corpus(load(PULSE).simulate, path, workers=1)
    WORLD.Barrier()
    return path


@pytest.fixture
def settings(corpus, shared_folder, request):
    """settings(name, *overrides) -> the pulse config in a folder of this test's own."""
    base = shared_folder / request.node.name.replace("/", "-")

    def make(name, *overrides):
        return load(
            PULSE,
            [
                f"run.dir={base / name}",
                f"data.corpus={corpus}",
                "run.device=cpu",
                "run.threads=1",
                *overrides,
            ],
        )

    return make
