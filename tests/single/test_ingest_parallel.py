"""Ingest on many processes and ranks, and killed: the same corpus as from one, undisturbed."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from hpc_xvr.data.cameras.source import Source
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.ingest.run import find_recordings, ingest
from hpc_xvr.data.ingest.schedule import Orders, Schedule
from hpc_xvr.data.ingest.treatment import Treatment
from hpc_xvr.data.ingest.workers import ClipWriter, Job, start_workers
from hpc_xvr.errors import InputError
from support.camera_files import counts, write_photron

ROOT = Path(__file__).resolve().parents[2]


def content(path: Path) -> dict[str, tuple]:
    """What a corpus says of its videos, after its checksums were recomputed."""
    corpus = Corpus(path)
    assert [problem for _, problem in corpus.verify() if problem] == []
    assert not (path / ".incoming").exists() and not (path / ".lock").exists()
    return {video.id: (video.shape, video.info) for video in corpus.videos}


def _files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Recordings where much depends on the order: equal names, equal frames, large ones first."""
    folder = tmp_path_factory.mktemp("films")
    chance = np.random.default_rng(5)
    same = [chance.integers(0, 4096, (4, 16, 16)).astype(np.uint16) for _ in range(3)]
    paths = []
    for k in range(18):
        place = folder / f"day{k % 3}"
        place.mkdir(exist_ok=True)
        if k in (1, 4, 5, 9, 16):
            frames = same[k % 3]
        else:
            shape = (60, 128, 128) if k in (0, 7, 8) else (4, 16, 16)
            frames = chance.integers(0, 4096, shape).astype(np.uint16)
        paths.append(write_photron(place, frames, 16, f"shot{k // 3 % 4}-{k // 12}"))
    return paths


@pytest.fixture(scope="module")
def undisturbed(films, tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "c"
    outcomes = ingest(films, path, workers=1)
    assert [o.status for o in outcomes].count("duplicate") == 2
    return outcomes, content(path), path


@pytest.mark.slow
def test_processes_do_not_change_the_result(films, undisturbed, tmp_path):
    outcomes = ingest(films, tmp_path / "c", workers=3)
    assert (outcomes, content(tmp_path / "c")) == undisturbed[:2]
    assert _files(tmp_path / "c") == _files(undisturbed[2])
    again = ingest(films, tmp_path / "c", workers=1)
    assert {o.status for o in again} == {"already there", "duplicate"}


@pytest.mark.parametrize("store, seed", [("zarr", 1), ("zarr", 2), ("hdf5", 3)])
def test_each_file_is_read_once_in_whatever_order_they_come_back(
    films, undisturbed, tmp_path, store, seed
):
    """All are under way at once: no clip's split can be known when it is written."""
    with CorpusWriter(tmp_path / "c", store) as writer:
        sources = find_recordings(films)
        schedule = Schedule(writer, sources, Treatment(), split="auto", skip_bad=False)
        own = ClipWriter(writer.path, store, Treatment(), lambda nbytes: None)
        jobs = schedule.orders([len(films) + 1], window=100).jobs[0]
        assert [job.source for job in jobs] == sources
        results = [own.write(job) for job in jobs]
        random.Random(seed).shuffle(results)
        for result in results:
            assert not schedule.orders([9], window=100).jobs[0]  # nothing to be read again
            schedule.take([result])
        assert schedule.orders([9], window=100) == Orders([[]], done=True, failed=False)
        assert schedule.outcomes() == undisturbed[0]
    assert content(tmp_path / "c") == undisturbed[1]
    if store == "zarr":
        assert _files(tmp_path / "c") == _files(undisturbed[2])


def test_an_error_keeps_its_class_and_words_on_the_way_out_of_a_worker(tmp_path):
    """Handed on as the object that was raised, not as text."""
    with CorpusWriter(tmp_path / "c") as writer:
        treatment = Treatment()
        gone = Source((tmp_path / "gone.mraw",))
        with start_workers(1, writer.path, "zarr", treatment) as own:
            own.submit(Job(0, gone, "fingerprint", 1))
            results = wait_for(lambda: own.finished(0.2))
    (result,) = results
    assert type(result.error) is InputError and not result.entry and not result.fatal
    with pytest.raises(InputError) as here:
        treatment.open(gone)
    assert str(result.error) == str(here.value) and "gone" in str(here.value)


def start(films, corpus: Path, *more, ranks: int = 0) -> subprocess.Popen:
    mpirun = [shutil.which("mpirun"), "--oversubscribe", "-n", str(ranks)] if ranks else []
    return subprocess.Popen(
        [*mpirun, sys.executable, "-m", "hpc_xvr", "ingest", *films, "--corpus", corpus, *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def family(job: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(job.pid).children(recursive=True)


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def has_some(corpus: Path) -> bool:
    manifest = corpus / "manifest.jsonl"
    return manifest.exists() and manifest.stat().st_size > 0


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, 20)
    return not alive


def sound_so_far(path: Path, expected: dict) -> None:
    """Whatever is in the corpus is intact and just as in the undisturbed one."""
    corpus = Corpus(path)
    assert [problem for _, problem in corpus.verify() if problem] == []
    for video in corpus.videos:
        assert (video.shape, video.info) == expected[video.id]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_and_repeated(films, undisturbed, tmp_path, seed):
    """SIGKILL of the command at any moment: its workers end too, the corpus is sound."""
    corpus, chance = tmp_path / "c", random.Random(seed)
    job = start(films, corpus, "--workers", "2")
    wait_for(lambda: corpus.exists() if seed == 1 else has_some(corpus))
    time.sleep(chance.uniform(0, 0.3))
    workers = family(job)
    job.kill()
    job.communicate()
    assert gone(workers)
    if has_some(corpus):
        sound_so_far(corpus, undisturbed[1])
    ingest(films, corpus, workers=1)
    assert content(corpus) == undisturbed[1]


@pytest.mark.slow
def test_a_killed_worker_is_told_in_one_line(films, undisturbed, tmp_path):
    corpus = tmp_path / "c"
    job = start(films, corpus, "--workers", "2")
    wait_for(lambda: has_some(corpus))
    victim = next(p for p in family(job) if "spawn_main" in " ".join(p.cmdline()))
    victim.kill()
    _, errors = job.communicate(timeout=60)
    if job.returncode:  # it may have been done by then
        assert job.returncode == 2
        (line,) = [line for line in errors.splitlines() if "error:" in line]
        assert "was killed" in line and ".mraw" in line and "Traceback" not in errors
    sound_so_far(corpus, undisturbed[1])
    ingest(films, corpus, workers=1)
    assert content(corpus) == undisturbed[1]


def test_ctrl_c_ends_all_at_once(films, undisturbed, tmp_path):
    corpus = tmp_path / "c"
    job = start(films, corpus, "--workers", "2")
    wait_for(lambda: has_some(corpus))
    workers = family(job)
    os.killpg(job.pid, signal.SIGINT)
    _, errors = job.communicate(timeout=30)
    assert gone(workers) and "Traceback" not in errors
    assert job.returncode in (130, 0)
    content_so_far = Corpus(corpus)
    assert len(content_so_far) and not (corpus / ".incoming").exists()
    sound_so_far(corpus, undisturbed[1])


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line(films, undisturbed, tmp_path, monkeypatch):
    """Not file after file: the others would meet it too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # the large films have 2 MB
    try:
        job = start([*films, "--skip-bad"], tmp_path / "c", "--workers", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _, errors = job.communicate(timeout=60)
    (line,) = [line for line in errors.splitlines() if "error:" in line]
    assert job.returncode == 2 and "File too large" in line and "Traceback" not in errors
    ingest(films, tmp_path / "c", workers=1)
    assert content(tmp_path / "c") == undisturbed[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun on PATH")
def test_a_killed_rank_and_the_same_command_again(films, undisturbed, tmp_path):
    corpus = tmp_path / "c"
    job = start(films, corpus, "--workers", "1", ranks=2)
    wait_for(lambda: has_some(corpus))
    processes = family(job)
    ranks = [p for p in processes if "hpc_xvr" in p.cmdline() and "ingest" in p.cmdline()]
    ranks[-1].kill()
    job.communicate(timeout=60)
    assert gone(processes)
    sound_so_far(corpus, undisturbed[1])
    broken = counts((3, 8, 8))
    broken[2, 0, 0] = 60_000
    bad = write_photron(tmp_path, broken, 16, "bad")
    again = start([*films, bad], corpus, "--workers", "1", ranks=2)
    _out, errors = again.communicate(timeout=120)
    assert again.returncode == 2, errors  # told once, by one rank
    (line,) = [line for line in errors.splitlines() if "error:" in line]
    assert "frame 2 holds the value 60000" in line and "18 of 19" in line
    assert "Traceback" not in errors
    assert content(corpus) == undisturbed[1]
