"""`hpc-xvr evaluate` as a person calls it: many methods, killed and called again, on two ranks."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_xvr.cli.results import _evaluation_config
from hpc_xvr.config import load, with_evaluate
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.pictures import best_methods
from hpc_xvr.evaluate.results import Evaluation, Facts
from hpc_xvr.evaluate.workflow import evaluate
from support.paths import ROOT
from support.runs import SMALL, a_run
from support.scores import row

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def command(*arguments, ranks=1):
    launcher = ["mpirun", "-n", str(ranks), "--oversubscribe"] if ranks > 1 else []
    return [*launcher, sys.executable, "-m", "hpc_xvr", *map(str, arguments)]


def hpc_xvr(*arguments, ranks=1, code=0):
    done = subprocess.run(
        command(*arguments, ranks=ranks), capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [a_run(folder / name, SMALL[name]) for name in ("edvr_stf", "swin_sequence")]


def numbers(folder):
    """All rows without what time and machine do to them."""
    tree = json.loads((folder / "evaluation.json").read_text())
    left_out = ("seconds_per_frame",)
    return [{k: v for k, v in row.items() if k not in left_out} for row in tree["rows"]]


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on_and_two_ranks_find_the_same(runs, pulse_corpus, tmp_path):
    options = ["--corpus", pulse_corpus, "--split", "train", "--set", "run.threads=1"]
    options += ["--gap", 4, "--gap", 8, "--noise", "none", "--noise", "1e2"]
    options += ["--method", "bicubic", "--method", "detail", "--set", "evaluate.pictures=1"]
    begun, whole = tmp_path / "begun", tmp_path / "whole"
    process = subprocess.Popen(
        command("evaluate", *runs, *options, "--out", begun),
        env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    cells = begun / "cells" / "rank-0000.jsonl"
    deadline = time.monotonic() + 200
    while not (cells.exists() and cells.read_text().count("\n") >= 4):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = cells.read_text().count("\n")
    assert not (begun / "evaluation.json").exists()

    after = hpc_xvr("evaluate", *runs, *options, "--out", begun, ranks=2)
    total = len(Corpus(pulse_corpus).split("train")) * 2 * 2 * 4
    assert f"{total - kept} of {total} rows to be made" in after.stderr
    assert sum(file.read_text().count("\n") for file in cells.parent.iterdir()) == total
    for words in ("EDVR-STF loses to detail transfer", "key frames not counted", "GFLOP"):
        assert words in after.stdout, words
    assert after.stdout.count("key frames not counted") == 4

    config = settings(
        pulse_corpus,
        split="train",
        gap=[4, 8],
        noise=["none", "1e2"],
        methods=["bicubic", "detail"],
    )
    evaluate(config, runs, Comm(), whole)
    assert numbers(whole) == numbers(begun) and len(numbers(whole)) == total
    names = {path.name for path in whole.iterdir()}
    assert {
        "comparison.html", "evaluation.csv", "evaluation.json", "tables.md", "tables.tex",
        "psnr-noise.png", "psnr-gap.png", "psnr-flops.png", "cells",
    } < names  # fmt: skip
    assert sum(name.endswith(".webp") for name in names) == 1
    page = (whole / "comparison.html").read_text()
    assert "SWIN-XVR sequence" in page and "image/webp" in page


def settings(corpus, **values):
    tree = {"pictures": 1, "corpora": [str(corpus)], "gap": [8], **values}
    return with_evaluate(load(None, ["run.threads=1"]), **tree)


@pytest.mark.slow
def test_rows_are_kept_and_methods_can_join_later(runs, pulse_corpus, tmp_path, caplog):
    caplog.set_level("INFO", logger="hpc_xvr")
    logger = logging.getLogger("hpc_xvr")
    logger.propagate = True
    evaluate(settings(pulse_corpus, methods=["bicubic"], gap=[8]), [], Comm(), tmp_path)
    first = numbers(tmp_path)
    config = settings(pulse_corpus, methods=["bayes", "bicubic"], gap=[8])
    whole = evaluate(config, runs[:1], Comm(), tmp_path)
    videos = len(Corpus(pulse_corpus).split("test"))
    assert f"{2 * videos} of {3 * videos} rows to be made" in caplog.text
    assert [row for row in numbers(tmp_path) if row["method"] == "bicubic"] == first
    assert whole.reference == "bayes"  # detail, the default, is not among them
    evaluate(config, runs[:1], Comm(), tmp_path)
    assert f"0 of {3 * videos} rows to be made" in caplog.text
    evaluate(config, runs[:1], Comm(), tmp_path, restart=True)
    assert f"{3 * videos} of {3 * videos} rows to be made" in caplog.text


@pytest.mark.parametrize(
    ("values", "what", "words"),
    [
        ({"noise": ["lots"]}, [], "noise 'lots': give none, a number of photons"),
        ({"corpora": ["nowhere"]}, [], "nowhere: no corpus there"),
        ({"split": "validation", "methods": ["lanczos"]}, [], "lanczos: neither a run folder"),
        ({}, ["nowhere/run"], "nowhere/run: neither a run folder"),
    ],
)
def test_what_cannot_be_evaluated(values, what, words, pulse_corpus, tmp_path):
    with pytest.raises(InputError, match=words):
        evaluate(settings(pulse_corpus, **values), what, Comm(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_of_the_command(pulse_corpus, tmp_path, runs):
    config = _evaluation_config(
        runs[0] / "config.yaml",
        ("evaluate.gap=12",),
        {"corpora": (Path("a"), Path("b")), "gap": (), "noise": ("1e2",), "split": None},
    )
    assert config.evaluate.corpora == [Path("a"), Path("b")] and config.evaluate.gap == [12]
    assert config.evaluate.noise == ["1e2"] and config.evaluate.split == "test"
    assert config.model.name == "edvr_stf"
    with pytest.raises(InputError, match=r"evaluate: gap\.0: .*greater than or equal to 2"):
        with_evaluate(config, gap=[1])
    old = load(None, ["evaluate.photons=1000", "evaluate.gap=8"])  # as runs were written before
    assert old.evaluate.noise == ["1000"] and old.evaluate.gap == [8]
    refused = hpc_xvr("evaluate", "bayes", "--corpus", pulse_corpus, code=2)
    assert "--out FOLDER" in refused.stderr and refused.stderr.count("\n") == 1


def test_pictures_show_a_handful_with_the_best_models():
    names = ["bicubic", "nearest_hr", "detail", "adaptive", "bayes", *(f"m{i}" for i in range(5))]
    rows = [row(name, f"r{k}", 30.0 + i) for i, name in enumerate(names) for k in range(2)]
    facts = [Facts(name, name, name.startswith("m")) for name in names]
    whole = Evaluation(rows, facts, {}, "detail")
    assert best_methods(whole, whole.conditions[0]) == [
        "bicubic",
        "detail",
        "bayes",
        "m2",
        "m3",
        "m4",
    ]
