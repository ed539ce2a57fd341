"""The movie that jobs/quickstart.sh ends with is a reconstruction."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_xvr.config import load
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.simulate.corpus import simulate_corpus

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = (ROOT / "jobs" / "quickstart.sh").read_text()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """That of the quickstart, smaller."""
    path = tmp_path_factory.mktemp("quickstart") / "corpus"
    smaller = ["simulate.videos=8", "simulate.size=[24,64,64]"]
    simulate_corpus(load(ROOT / "configs" / "quickstart.yaml", smaller).simulate, path)
    return path


def reconstruct(folder, corpus, part):
    """Run that part of the script, with a method that needs no training."""
    begin = f'set -euo pipefail; run=bayes; corpus={corpus}; since() {{ echo "== $1"; }}\n'
    part = part.replace("--video", f"--corpus {corpus} --video")
    return subprocess.run(
        ["bash", "-c", begin + part], cwd=folder, capture_output=True, text=True, timeout=120
    )


PART = SCRIPT[SCRIPT.index("video=$(python") : SCRIPT.index('since "reconstruct"')]


def test_its_movie_holds_more_than_key_frames(corpus, tmp_path):
    done = reconstruct(tmp_path, corpus, PART)
    assert done.returncode == 0, done.stderr
    assert "21 of 24 frames are reconstructed, 3 are key frames" in done.stdout
    (movie,) = (tmp_path / "bayes" / "reconstruction").glob("*.tif")
    assert json.loads(movie.with_name(f"{movie.name}.json").read_text())["settings"]["gap"] == 20
    frames = tifffile.imread(movie).astype(float) / 65535
    recorded = Corpus(corpus)[movie.stem]
    differs = [not np.allclose(f, recorded.intensity(t), atol=1e-4) for t, f in enumerate(frames)]
    assert [t for t, d in enumerate(differs) if not d] == [0, 20, 23]


def test_it_stops_where_all_frames_are_key_frames(corpus, tmp_path):
    """Without a gap, this corpus has a sharp frame for each fast one."""
    assert "--gap 20" in PART
    done = reconstruct(tmp_path, corpus, PART.replace("--gap 20", ""))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "24 of 24 frames are key frames, as recorded: no movie was made"
    )
