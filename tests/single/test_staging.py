"""Copies on a node's own disk: the ones needed, once, read from there, whole or not there."""

import errno
import os
import shutil
import subprocess

import pytest

from hpc_xvr.config import Data
from hpc_xvr.data.corpus import Corpus, staging
from hpc_xvr.data.corpus.staging import Staging
from hpc_xvr.data.samples.loader import training_batches
from hpc_xvr.data.samples.training import TrainingSamples
from hpc_xvr.errors import InputError
from support.runs import a_corpus

stores = pytest.mark.parametrize("store", ["zarr", "hdf5"])


def stage(corpus, ids, folder, parts=1):
    todo = [Staging(corpus, ids, folder) for _ in range(parts)]
    for part, one in enumerate(todo):
        one.copy(part, parts)
    return todo[0].folder


@stores
def test_copies_are_read_instead_of_the_corpus(tmp_path, store):
    corpus = a_corpus(tmp_path / "c", store)
    expected = {video.id: video.read(3) for video in corpus.videos}
    corpus.read_copies(stage(corpus, ["v0", "v2"], tmp_path / "disk", parts=2))
    for name in ("v0", "v2"):
        assert corpus[name].path.is_relative_to(tmp_path / "disk")
        assert not corpus.original(name).is_relative_to(tmp_path / "disk")
    assert corpus["v1"].path.is_relative_to(tmp_path / "c")  # not staged: from the corpus
    moved = tmp_path / "gone"
    moved.mkdir()
    for name in ("v0", "v2"):
        shutil.move(corpus.original(name), moved)
    fresh = Corpus(tmp_path / "c")
    assert [video.id for video in fresh.videos] == ["v1", "v3"]
    for name in ("v0", "v2"):
        assert (corpus[name].read(3) == expected[name]).all()
    # Workers get the handles by pickling and read the copies too.
    data = TrainingSamples(corpus, Data(corpus=tmp_path / "c", patch=16, workers=1), "centre", 2, 1)
    data.videos = [video for video in data.videos if video.id in ("v0", "v2")]
    data.slots = type(data.slots)([9, 9], 3, 2, 1)
    assert len(list(training_batches(data, 0, 1, 0, 3))) == 3


@stores
def test_what_is_there_is_not_copied_again(tmp_path, store, monkeypatch):
    corpus = a_corpus(tmp_path / "c", store)
    folder = stage(corpus, ["v0", "v1", "v2"], tmp_path / "disk")
    copied, real = [], staging.copy_file
    monkeypatch.setattr(
        staging,
        "copy_file",
        lambda a, *more: (
            copied.append(a.relative_to(tmp_path / "c/videos").parts[0].split(".")[0])
            or real(a, *more)
        ),
    )
    stage(corpus, ["v0", "v1", "v2"], tmp_path / "disk")
    assert copied == []
    (folder / f".999999999-{'5a' * 8}.partial").mkdir()  # of a process that was killed
    torn = next(p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size > 1000)
    os.truncate(torn, 100)
    stage(corpus, ["v0", "v1", "v2", "v3"], tmp_path / "disk")
    assert set(copied) == {"v0", "v3"}
    assert sorted(p.stem for p in folder.iterdir()) == ["v0", "v1", "v2", "v3"]
    shutil.rmtree(tmp_path / "c")
    again = a_corpus(tmp_path / "c", store)  # another corpus at the same place
    assert len(Staging(again, ["v0"], tmp_path / "disk")._missing) == 1


def test_space_is_checked_before_anything_is_copied(tmp_path, monkeypatch):
    corpus = a_corpus(tmp_path / "c")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"data\.stage_dir .* needed .* 2 recordings.* are free"):
        Staging(corpus, ["v0", "v1"], tmp_path / "disk")
    assert [p for p in (tmp_path / "disk").rglob("*") if p.is_file()] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_disk_that_fills_up_leaves_whole_copies(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "none", disk], check=False)
    if mounted.returncode:
        pytest.skip("this container may not mount a file system")
    try:
        corpus = a_corpus(tmp_path / "c")
        todo = Staging(corpus, ["v0", "v1", "v2"], disk)
        (disk / "other").write_bytes(bytes(80_000))  # somebody else was quicker
        with pytest.raises(InputError, match=os.strerror(errno.ENOSPC)):
            todo.copy(0, 1)
        left = [p.name for p in todo.folder.iterdir()]
        assert left and all(not name.startswith(".") for name in left)
        corpus.read_copies(todo.folder)
        assert all(corpus[name].read(2).any() for name in ("v0", "v1", "v2"))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_folder_that_cannot_be_made(tmp_path):
    corpus = a_corpus(tmp_path / "c", videos=1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        Staging(corpus, ["v0"], tmp_path / "file/disk")
