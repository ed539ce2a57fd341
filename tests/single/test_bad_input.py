"""What users get wrong, as they meet it: one line, exit code 2, nothing half-written."""

import json
import sys

import h5py
import numpy as np
import pytest
import tifffile

from hpc_xvr.cli import main
from hpc_xvr.data.corpus import Corpus
from support.camera_files import counts, shimadzu_parts, write_cine, write_dxchange, write_photron
from support.paths import PULSE


@pytest.fixture
def refuse(monkeypatch, capfd):
    """refuse(arguments, *words): the command ends with code 2 and one line that holds the words."""

    def run(arguments, *words):
        monkeypatch.setattr(sys, "argv", ["hpc-xvr", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
        assert stop.value.code == 2
        assert len(lines) == 1, lines
        for word in words:
            assert word in lines[0], lines[0]
        assert "Traceback" not in lines[0]

    return run


def cut(path, keep=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def truncated_dat(folder):
    path = folder / "shot.dat"
    path.write_bytes(b"".join(shimadzu_parts(counts((4, 250, 400), 10))))
    return cut(path)


def truncated_mraw(folder):
    path = write_photron(folder, counts((4, 16, 16)), 12)
    cut(path.with_suffix(".mraw"))
    return path


def missing_mraw(folder):
    path = write_photron(folder, counts((4, 16, 16)), 12)
    path.with_suffix(".mraw").unlink()
    return path.with_suffix(".cih")


def truncated_tiff(folder):
    tifffile.imwrite(folder / "a.tif", counts((6, 32, 32)), photometric="minisblack")
    return cut(folder / "a.tif")


def nan_tiff(folder):
    frames = np.full((4, 16, 16), 0.5, np.float32)
    frames[2, 3, 3] = np.nan
    tifffile.imwrite(folder / "nan.tif", frames, photometric="minisblack")
    return folder / "nan.tif"


FILES = {
    "missing mraw": (missing_mraw, ["mraw"]),
    "truncated mraw": (truncated_mraw, ["mraw"]),
    "truncated dat": (truncated_dat, ["shot.dat"]),
    "truncated cine": (lambda f: cut(write_cine(f / "a.cine", counts((5, 16, 16)))), ["a.cine"]),
    "truncated tiff": (truncated_tiff, ["a.tif"]),
    "truncated hdf5": (lambda f: cut(write_dxchange(f / "a.h5", counts((5, 64, 64)))), ["a.h5"]),
    "zero frames": (lambda f: write_dxchange(f / "a.h5", counts((0, 16, 16))), ["a.h5"]),
    "nan frames": (nan_tiff, ["nan.tif", "frame 2"]),
    "not divisible": (lambda f: write_photron(f, counts((4, 18, 16)), 12), ["18", "--crop"]),
    "unknown format": (lambda f: (f / "a.xyz").write_text("?") and f / "a.xyz", ["a.xyz"]),
    "no such file": (lambda f: f / "none.mraw", ["none"]),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_camera_file_is_refused_and_leaves_no_corpus(case, refuse, tmp_path):
    make, words = FILES[case]
    (tmp_path / "in").mkdir()
    refuse(["ingest", make(tmp_path / "in"), "--corpus", tmp_path / "corpus"], *words)
    assert not (tmp_path / "corpus").exists()


def test_recordings_before_a_bad_one_are_kept(refuse, tmp_path):
    good = tmp_path / "good.tif"
    tifffile.imwrite(good, counts((4, 16, 16)), photometric="minisblack")
    (tmp_path / "bad").mkdir()
    refuse(["ingest", good, nan_tiff(tmp_path / "bad"), "--corpus", tmp_path / "corpus"], "frame 2")
    corpus = Corpus(tmp_path / "corpus")
    assert [v.id for v in corpus.videos] == ["good"]
    assert all(problem is None for _, problem in corpus.verify())


def test_two_files_that_do_not_belong_together(refuse, tmp_path, trained_run):
    tifffile.imwrite(tmp_path / "lr.tif", counts((9, 16, 16)), photometric="minisblack")
    tifffile.imwrite(tmp_path / "hr.tif", counts((3, 64, 60)), photometric="minisblack")
    refuse(
        [
            "reconstruct",
            trained_run,
            "--lr",
            tmp_path / "lr.tif",
            "--hr",
            tmp_path / "hr.tif",
            "--gap",
            4,
            "--out",
            tmp_path / "out.tif",
        ],
        "64x60",
        "16x16",
        "scale",
    )
    assert not (tmp_path / "out.tif").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "out.xyz"], [".tif"]),
        (["--out", "out.tif", "--movie", "out.avi"], [".gif"]),
        (["--out", "no/such/folder/out.tif"], ["no/such/folder"]),
    ],
)
def test_a_result_that_cannot_be_written_is_refused_before_the_work(
    arguments, words, refuse, trained_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    video = Corpus(trained_run.parent / "corpus").videos[0].id
    refuse(
        [
            "reconstruct",
            trained_run,
            "--video",
            video,
            "--corpus",
            trained_run.parent / "corpus",
            *arguments,
        ],
        *words,
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """Two steps of the pulse config, with a corpus of its own beside the run."""
    from hpc_xvr.config import load
    from hpc_xvr.data.simulate.corpus import simulate_if_missing
    from hpc_xvr.distributed.comm import Comm
    from hpc_xvr.train.engine import Trainer

    base = tmp_path_factory.mktemp("bad-input")
    cfg = load(
        PULSE,
        [
            f"run.dir={base}/run",
            f"data.corpus={base}/corpus",
            "train.steps=2",
            "simulate.videos=4",
            "simulate.size=[12, 32, 32]",
            "run.threads=1",
        ],
    )
    simulate_if_missing(cfg.simulate, cfg.data.corpus)
    trainer = Trainer(cfg, Comm())
    assert trainer.run()
    trainer.close()
    return base / "run"


def test_a_corpus_of_another_schema_version(refuse, trained_run, tmp_path):
    import shutil

    shutil.copytree(trained_run.parent / "corpus", tmp_path / "corpus")
    header = json.loads((tmp_path / "corpus/corpus.json").read_text())
    (tmp_path / "corpus/corpus.json").write_text(json.dumps({**header, "schema": 99}))
    refuse(["inspect", tmp_path / "corpus"], "99", "schema")


@pytest.mark.parametrize("command", ["inspect", "train"])
def test_a_damaged_shard_is_named(command, refuse, trained_run, tmp_path):
    import shutil

    shutil.copytree(trained_run.parent / "corpus", tmp_path / "corpus")
    for video in Corpus(tmp_path / "corpus").split("train"):
        shard = max(
            (p for p in (tmp_path / "corpus/videos" / video.id).rglob("*") if p.is_file()),
            key=lambda p: p.stat().st_size,
        )
        data = bytearray(shard.read_bytes())
        data[100 : len(data) - 500 : 97] = bytes(255 - b for b in data[100 : len(data) - 500 : 97])
        shard.write_bytes(data)
    arguments = {
        "inspect": ["inspect", tmp_path / "corpus", "--verify"],
        "train": [
            "train",
            PULSE,
            "--set",
            f"run.dir={tmp_path}/run",
            "--set",
            f"data.corpus={tmp_path}/corpus",
        ],
    }[command]
    refuse(arguments, "sim-", "checksum")


def test_a_run_without_checkpoints_and_a_folder_that_is_no_run(refuse, tmp_path, trained_run):
    refuse(["evaluate", tmp_path], "config.yaml")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text((trained_run / "config.yaml").read_text())
    refuse(["evaluate", tmp_path / "run"], "no valid checkpoint")
    refuse(["report", tmp_path / "nothing"], "nothing")


def test_an_hdf5_file_without_frames_lists_what_it_has(refuse, tmp_path):
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["a"] = counts((3, 16, 16))
        file["b"] = counts((3, 16, 16))
    refuse(["ingest", tmp_path / "two.h5", "--corpus", tmp_path / "c"], "a", "b", "--dataset")


def test_mistyped_commands_and_options(refuse):
    refuse(["trian"], "No such command")
    refuse(["train", PULSE, "--engine", "mpi"], "--engine", "horovod")
