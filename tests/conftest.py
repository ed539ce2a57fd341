"""Where tests find real camera files and reference vectors; both are optional."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
def reference():
    """reference("centre_small.npz") -> path of vectors of the authors' model, or skip."""
    return lambda name: _find("HPC_XVR_REFERENCE", "reference", name)
