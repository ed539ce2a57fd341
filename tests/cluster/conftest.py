"""Jobs on a real Slurm of two nodes; skipped, with the reason, where none answers. And on PBS."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.slurm_runs import Run, about


def pytest_collection_modifyitems(items):
    ours = [item for item in items if item.path.parent == Path(__file__).parent]
    problem = no_slurm() if any(item.path.stem == "test_slurm" for item in ours) else None
    for item in ours:
        item.add_marker(pytest.mark.cluster)
        if problem and item.path.stem == "test_slurm":
            item.add_marker(pytest.mark.skip(reason=problem))


def no_slurm():
    """Why these tests cannot run here, or None."""
    start = "; start one, as root: bash tests/cluster/slurm.sh up"
    if not shutil.which("sinfo"):
        return f"no Slurm here{start}"
    try:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%t"], capture_output=True, text=True, timeout=20
        )
    except subprocess.TimeoutExpired:
        return f"Slurm does not answer{start}"
    if done.returncode or len(done.stdout.split()) < 2:
        return f"no Slurm of two nodes answers{start}"
    return None


@pytest.fixture
def run(tmp_path, pulse_corpus):
    made = Run(tmp_path / "run", pulse_corpus)
    yield made
    made.cancel()


@pytest.fixture(scope="session")
def whole(tmp_path_factory, pulse_corpus):
    """The run that nothing has disturbed, on two nodes; the second job was not needed."""
    made = Run(tmp_path_factory.mktemp("whole") / "a run", pulse_corpus)
    made.printed = subprocess.run(
        made.command("--dry-run"), capture_output=True, text=True, cwd=made.folder.parent
    ).stdout
    made.submit("--chain", "2")
    made.waits_for = about(made.jobs[1])["Dependency"]
    made.ends(made.jobs[0], "COMPLETED")
    return made


os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
