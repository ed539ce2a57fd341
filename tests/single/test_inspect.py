"""`hpc-xvr inspect`: the table, the contact sheet, and whatever byte of a recording has changed."""

from __future__ import annotations

import random
import shutil
import sys

import matplotlib.image
import pytest

from hpc_xvr.cli import main
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.corpus.contact_sheet import contact_sheet
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.errors import InputError
from support.camera_files import counts

INFO = {"camera": "SA-Z", "bit_depth": 12, "split": "train", "source": "x", "frame_rate_hz": 5e4}


def make(path, videos, store="zarr", shape=(3, 24, 32)):
    with CorpusWriter(path, store) as writer:
        for k in range(videos):
            frames = counts(shape)
            lr = {"lr_times": [0.0, 1.0, 2.0]} if k % 2 == 0 else {}
            info = {**INFO, "scene": "crack" if k % 3 else "spray", **lr}
            second = frames[:, ::4, ::4] if lr else None
            writer.add(f"v{k:02d}", frames, shape, frames.dtype, info, lr=second)
    return path


@pytest.fixture
def inspect(monkeypatch, capfd):
    """inspect(arguments) -> exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hpc-xvr", "inspect", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return code or 0, *capfd.readouterr()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("store", ["zarr", "hdf5"])
def test_any_changed_byte_is_found_and_the_recording_named(tmp_path, store):
    path, chance = make(tmp_path / "c", 3, store), random.Random(store)
    clip = path / "videos" / ("v00" if store == "zarr" else "v00.h5")
    files = sorted(p for p in clip.rglob("*") if p.is_file()) or [clip]
    assert len(files) == (5 if store == "zarr" else 1)
    for file in files:
        intact = file.read_bytes()
        for _ in range(8 if store == "zarr" else 40):
            at, bit = chance.randrange(len(intact)), 1 << chance.randrange(8)
            file.write_bytes(intact[:at] + bytes([intact[at] ^ bit]) + intact[at + 1 :])
            problems = dict(Corpus(path).verify())
            assert problems.pop("v00"), f"{file.name}, byte {at}, bit {bit}"
            assert problems == {"v01": None, "v02": None}
        file.write_bytes(intact)
    assert all(problem is None for _, problem in Corpus(path).verify())
    if store == "zarr":
        (clip / "more").write_text("x")
        assert "more" in dict(Corpus(path).verify())["v00"]


def test_the_command_names_the_damaged_recording(tmp_path, inspect):
    path = make(tmp_path / "c", 3)
    code, out, _ = inspect(path, "--verify")
    assert code == 0 and "3 recordings verified: all intact" in out
    shard = path / "videos/v01/frames/c/0/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    code, _, errors = inspect(path, "--verify")
    (line,) = [line for line in errors.splitlines() if "error:" in line]
    assert code == 2 and "1 of 3 recordings" in line and "v01" in line


@pytest.mark.slow
def test_many_recordings_are_summed_up(tmp_path, inspect):
    path = make(tmp_path / "c", 52)
    _, few, _ = inspect(path)
    assert "52 recordings, 156 frames" in few.replace("\n", " ") and "v09" in few
    assert "v10" not in few and "--all" in few
    rows = [line.split("│")[1:-1] for line in few.splitlines() if line.startswith("│ ")]
    assert [cell.strip() for cell in rows[0]] == ["crack", "SA-Z", "34", "34", "0", "0"]
    _, everything, _ = inspect(path, "--all")
    assert "v51" in everything


def test_contact_sheet(tmp_path, inspect, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "c", 3)
    code, out, _ = inspect(path, "--sheet")
    assert code == 0 and "c-sheet.png" in out
    picture = matplotlib.image.imread(tmp_path / "c-sheet.png")
    assert picture.shape[1] > 1500
    ink = (picture[..., :3].mean(-1) < 0.9).mean()
    assert 0.1 < ink < 0.9  # frames, not a white page
    (path / "videos/v01/frames/c/0/0/0").unlink()
    assert inspect(path, "--sheet", "x.png")[0] == 0  # crossed out
    code, _, errors = inspect(path, "--sheet", "x.jpg")
    assert code == 2 and ".png" in errors
    assert not list(tmp_path.glob(".*partial*"))


def test_contact_sheet_of_many(tmp_path, monkeypatch):
    monkeypatch.setattr("hpc_xvr.data.corpus.contact_sheet.PER_PAGE", 4)
    path = make(tmp_path / "c", 6)
    corpus = Corpus(path)
    assert contact_sheet(corpus, tmp_path / "a.png") == [tmp_path / "a.png"]
    pages = contact_sheet(corpus, tmp_path / "b.png", everything=True)
    assert [page.name for page in pages] == ["b-1.png", "b-2.png"]
    assert all(page.stat().st_size > 10_000 for page in pages)
    shutil.rmtree(path / "videos")
    with pytest.raises(InputError, match="no recordings to show"):
        contact_sheet(Corpus(path), tmp_path / "d.png")
