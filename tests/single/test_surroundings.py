"""What surrounds the pictures never surprises: configs, paths, text that leaves, corpora, pages."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_xvr import log
from hpc_xvr.cli import cli
from hpc_xvr.config import load
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate import tables
from hpc_xvr.evaluate.results import Evaluation, Facts
from hpc_xvr.plotting import LINES, PLAIN
from hpc_xvr.text import parse_json, parse_yaml, printable
from support.paths import ROOT
from support.scores import row

ESC = "\x1b[31m"


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 300, text
    return text


# Configs.


def test_a_section_that_occurs_twice_is_refused(cases):
    case = cases("yaml-duplicate-section")
    with pytest.raises(InputError) as error:
        load(case / "dup.yaml")
    assert (case / "expect.txt").read_text().split(".")[0].removeprefix("One line: ") in one_line(
        error
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 3}\ntrain: {steps: 4}", "section `train` occurs twice (line 2)"),
        ("model:\n  depths: [2]\n  heads: 3\n  depths: [3]", "key `depths` occurs twice (line 4)"),
        ("evaluate: {gap: [{a: 1, a: 2}]}", "key `a` occurs twice (line 1)"),
        ("train: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("train: " + "{a: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
        ("train: {steps: " + "9" * 6000 + "}", "a number is too large (line 1)"),
        ("run:\n  seed: 0x" + "f" * 8000, "a number is too large (line 2)"),
        ("run: {dir: 2023-99-99}", "month must be in 1..12"),
        ("optim: {lr: 1.0e+9999}", "optim.lr: Input should be a finite number"),
        ("model: {depths: &a [*a]}", "refers to itself"),
        ("run: {dir: !!python/object:os.system x}", "is not valid YAML"),
    ],
)
def test_yaml_from_outside_is_refused_in_one_line(text, words, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load(path)
    assert words in one_line(error) and str(path) in str(error.value)


def test_a_list_that_repeats_itself_a_million_times_is_quoted_briefly(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 8)]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "run: {seed: *a7}"]))
    with pytest.raises(InputError) as error:
        load(tmp_path / "c.yaml")
    one_line(error)


def test_a_merged_key_may_be_given_again():
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b, y: 3}\nd: {<<: *b}"
    assert parse_yaml(text)["c"] == {"x": 1, "y": 3}
    assert parse_yaml(text)["d"] == {"x": 1, "y": 2}


def test_deep_json_is_no_json():
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000 + "]" * 100_000)


def test_paths_of_a_config_expand(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    (tmp_path / "c.yaml").write_text("run: {dir: ~/runs/a}\nevaluate: {methods: [b=~/runs/b]}\n")
    config = load(tmp_path / "c.yaml", ["data.corpus=$DATA/corpus", "data.stage_dir=${DATA}2"])
    assert config.run.dir == tmp_path / "runs" / "a"
    assert config.data.corpus == Path("/data/corpus")
    assert config.data.stage_dir == Path("/data2")
    assert config.evaluate.methods == [f"b={tmp_path}/runs/b"]
    with pytest.raises(InputError, match="the variable NOWHERE is not set"):
        load(None, ["run.dir=$NOWHERE/run"])
    with pytest.raises(InputError, match="there is no user nobody-at-all"):
        load(None, ["run.dir=~nobody-at-all/run"])


def test_a_name_with_a_dollar_that_exists_is_meant(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("a$b").mkdir()
    assert load(None, ["data.corpus=a$b"]).data.corpus == Path("a$b")


# The command line.


def frames(seed=0, count=9):
    noise = np.random.default_rng(seed).integers(0, 4000, (count, 16, 16))
    return noise.astype(np.uint16)


def stack(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, frames(seed), photometric="minisblack")
    return path


def run_hpc_xvr(*arguments, code=0, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, "-m", "hpc_xvr", *map(str, arguments)],
        capture_output=True,
        env=environment,
    )
    assert done.returncode == code, done.stderr.decode(errors="replace")
    return done


def test_paths_of_the_command_line_expand(hpc_xvr, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    stack(tmp_path / "shot.tif")
    hpc_xvr("ingest", "~/shot.tif", "--bit-depth", 12, "--corpus", "$HOME/corpus")
    assert Corpus(tmp_path / "corpus").videos[0].id == "shot"
    said = hpc_xvr("inspect", "$NOWHERE/corpus", code=2)
    assert "the variable NOWHERE is not set" in said.err
    assert not (tmp_path / "~").exists() and not (tmp_path / "$HOME").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_that_cannot_show_a_name_shows_question_marks(encoding, tmp_path):
    file = stack(tmp_path / "Größe µm" / "水滴.tif")
    options = ("--bit-depth", 12, "--camera", "Größe 水滴", "--corpus", tmp_path / encoding)
    done = run_hpc_xvr("ingest", file, *options, PYTHONIOENCODING=encoding)
    assert b"Traceback" not in done.stderr
    assert "水滴".encode() not in done.stdout and b"??" in done.stdout
    run_hpc_xvr("inspect", tmp_path / encoding, PYTHONIOENCODING=encoding)


def test_control_characters_of_names_do_not_leave(hpc_xvr, tmp_path):
    file = stack(tmp_path / f"a{ESC}b\nc.tif")
    camera = f"evil{ESC}\ncamera"
    options = ("--bit-depth", 12, "--camera", camera, "--corpus", tmp_path / "corpus")
    shown = [hpc_xvr("ingest", file, *options)]
    shown.append(hpc_xvr("inspect", tmp_path / "corpus"))
    shown.append(hpc_xvr("inspect", tmp_path / f"no{ESC}\nhpc-xvr: all is well", code=2))
    for said in shown:
        assert "\x1b" not in said.out + said.err
    assert "evil?[31m camera" in " ".join(shown[1].out.split()).replace("│ ", "").replace(" │", "")
    assert shown[2].err.count("\n") == 1


def test_printable():
    assert printable("a\tb\r\nc\x00\u202e\udcff é水") == "a b  c??? é水"


@pytest.mark.parametrize("option", ["--account", "--queue", "--directive"])
def test_a_line_break_begins_no_line_of_a_job_script(hpc_xvr, option):
    pulse = ROOT / "configs" / "pulse.yaml"
    command = ("submit", "--site", "slurm", "--time", 5, "--dry-run", option, "a\nrm -rf x")
    said = hpc_xvr(*command, "train", pulse, code=2)
    assert "one line without control characters" in said.err and said.out == ""


# Tables and progress.


def test_names_stay_whole_in_narrow_tables(monkeypatch, capsys):
    monkeypatch.setattr(log, "WIDTH", 80)
    names = ["recording-" + "x" * 70 + str(i) for i in range(2)]
    rows = [[names[0], "a long text that has to be broken " * 4, 1.5], [names[1], "水" * 30, 2]]
    log.print_table(f"a corpus called {'y' * 90}", ["recording", "what", "number"], rows)
    out = capsys.readouterr().out
    for name in (*names, "y" * 90, "水" * 30):
        assert name in out
    assert "…" not in out
    log.print_table("t", ["recording", "what"], [["short", "a text that has to be broken " * 6]])
    assert max(map(len, capsys.readouterr().out.splitlines())) == 80


def test_a_log_tells_progress_each_minute_or_each_twentieth(monkeypatch, caplog):
    caplog.set_level("INFO", logger="hpc_xvr")
    monkeypatch.setattr(log.logger, "handlers", [])
    monkeypatch.setattr(log.logger, "propagate", True)
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    with log.progress_bar("making", 1000, "things", done=200) as advance:
        for _ in range(800):
            now[0] += 0.5  # 400 s in all
            advance()
    lines = [record.getMessage() for record in caplog.records]
    assert 14 <= len(lines) <= 16  # 5 % take 25 s
    assert lines[0] == "making: 250 of 1000 things (25 %), about 6:15 left at 2 things/s"
    caplog.clear()
    with log.progress_bar("slow", 10, "things") as advance:
        for _ in range(3):
            now[0] += 3000
            advance()
    assert caplog.records[-1].getMessage() == "slow: 3 of 10 things (30 %), about 5:50:00 left"
    caplog.clear()
    list(log.track(range(100), "quick"))
    assert not caplog.records


# Recordings of a corpus.


@pytest.fixture(params=["zarr", "hdf5"])
def corpus(request, tmp_path):
    path = tmp_path / "corpus"
    with CorpusWriter(path, store=request.param) as writer:
        for seed, name in enumerate(("a", "b", "c")):
            info = {"camera": "x", "bit_depth": 12, "scene": "s", "source": name, "split": "train"}
            writer.add(name, frames(seed), (9, 16, 16), np.uint16, info)
    return path


def intact(path):
    assert [problem for _, problem in Corpus(path).verify() if problem] == []
    lines = (path / "manifest.jsonl").read_text().splitlines()
    assert sorted(json.loads(text)["id"] for text in lines) == [v.id for v in Corpus(path).videos]
    assert not (path / ".incoming").exists() and not (path / ".lock").exists()


def test_recordings_are_moved_renamed_and_removed(hpc_xvr, corpus):
    hpc_xvr("edit", corpus, "a", "c", "--split", "test")
    intact(corpus)
    assert [video.split for video in Corpus(corpus).videos] == ["test", "train", "test"]
    assert [video.info.split for video in Corpus(corpus).videos] == ["test", "train", "test"]
    hpc_xvr("edit", corpus, "b", "--rename", "z.1")
    intact(corpus)
    assert [video.id for video in Corpus(corpus).videos] == ["a", "c", "z.1"]
    assert (Corpus(corpus)["z.1"].frames[:] == frames(1)).all()
    hpc_xvr("edit", corpus, "a", "--remove")
    intact(corpus)
    assert [video.id for video in Corpus(corpus).videos] == ["c", "z.1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nobody", "--remove"], "no video nobody"),
        (["a", "nobody", "--split", "test"], "no video nobody"),
        (["a", "--rename", "b"], "video b: is there already"),
        (["a", "--rename", "../x"], "an id is made of letters"),
        (["a", "b", "--rename", "x"], "name just one"),
        (["a", "--split", "test", "--remove"], "give one of --split, --rename and --remove"),
        (["a"], "give one of"),
    ],
)
def test_edits_that_cannot_be_change_nothing(hpc_xvr, corpus, arguments, words):
    before = (corpus / "manifest.jsonl").read_bytes()
    assert words in hpc_xvr("edit", corpus, *arguments, code=2).err
    assert (corpus / "manifest.jsonl").read_bytes() == before
    intact(corpus)


def test_an_edit_that_is_killed_leaves_a_whole_corpus(corpus, monkeypatch):
    """The line of a recording is gone while its clip changes: it then speaks for itself."""

    def killed(self, entry):
        raise KeyboardInterrupt

    monkeypatch.setattr(CorpusWriter, "_append", killed)
    for change in (lambda w: w.move(["a"], "test"), lambda w: w.rename("b", "y")):
        with pytest.raises(KeyboardInterrupt), CorpusWriter(corpus, store=None) as writer:
            change(writer)
    monkeypatch.undo()
    assert [(v.id, v.split) for v in Corpus(corpus).videos] == [
        ("a", "test"),
        ("c", "train"),
        ("y", "train"),
    ]
    CorpusWriter(corpus, store=None).close()
    intact(corpus)


def test_a_damaged_recording_is_not_made_good_by_moving_it(hpc_xvr, corpus):
    kinds = (corpus / "videos" / "a" / "zarr.json", corpus / "videos" / "a.h5")
    damaged = next(path for path in kinds if path.exists())
    damaged.write_bytes(damaged.read_bytes() + b" ")
    said = hpc_xvr("edit", corpus, "a", "--split", "test", code=2)
    assert "is not the file that was written" in said.err
    assert next(problem for _, problem in Corpus(corpus).verify())
    hpc_xvr("edit", corpus, "a", "--remove")
    intact(corpus)


def test_ingest_into_another_split_than_before_is_refused(hpc_xvr, tmp_path):
    path, options = tmp_path / "corpus", ("--bit-depth", 12, "--corpus", tmp_path / "corpus")
    first, second = stack(tmp_path / "one.tif"), stack(tmp_path / "two.tif", 1)
    hpc_xvr("ingest", first, *options, "--split", "train")
    said = hpc_xvr("ingest", first, second, *options, "--split", "test", code=2)
    assert "one (train): there already, in another split" in said.err
    assert len(Corpus(path)) == 1
    hpc_xvr("edit", path, "one", "--split", "test")
    hpc_xvr("ingest", first, second, *options, "--split", "test")
    assert {video.split for video in Corpus(path).videos} == {"test"}
    intact(path)


# Evaluations.


def test_other_conditions_are_added_to_the_page(hpc_xvr, pulse_corpus, tmp_path):
    out, corpus = tmp_path / "out", ("--corpus", pulse_corpus)
    methods = ("bicubic", "detail")
    hpc_xvr("evaluate", *methods, *corpus, "--out", out, "--gap", 4)
    said = hpc_xvr("evaluate", *methods, *corpus, "--out", out, "--gap", 8, "--noise", "1e2")
    assert "every 8 frames" in said.out and "every 4 frames" not in said.out
    found = Evaluation.load(out)
    assert [(c.gap, c.noise.name) for c in found.conditions] == [(4, "none"), (8, "100")]
    page = (out / "comparison.html").read_text()
    assert "every 4 frames" in page and "every 8 frames" in page
    with (out / "evaluation.csv").open() as file:
        assert {line["gap"] for line in csv.DictReader(file)} == {"4", "8"}
    other = (*methods, *corpus, "--out", out, "--split", "validation", "--gap", 4)
    said = hpc_xvr("evaluate", *other, code=2)
    assert "holds an evaluation with split test" in said.err
    hpc_xvr("evaluate", *other, "--restart")
    assert [c.gap for c in Evaluation.load(out).conditions] == [4]


def test_results_of_other_weights_do_not_stay_beside_new_ones(caplog, monkeypatch):
    monkeypatch.setattr(log.logger, "propagate", True)
    old = Evaluation(
        [row("m", "r", 30.0, gap=4)], [Facts("m", "M", True, fingerprint="1")], {}, "m"
    )
    new = Evaluation(
        [row("m", "r", 31.0, gap=8)], [Facts("m", "M", True, fingerprint="2")], {}, "m"
    )
    assert [r.condition.gap for r in new.beside(old).rows] == [8]
    assert "m: had other weights" in caplog.text
    same = Evaluation(old.rows, new.methods, {}, "m")
    assert [r.condition.gap for r in new.beside(same).rows] == [8, 4]
    other = Evaluation([row("n", "r", 30.0, gap=4)], [Facts("n", "M", True)], {}, "n")
    assert [facts.title for facts in new.beside(other).methods] == ["M", "M (n)"]


def test_a_gap_longer_than_the_recordings_is_refused(hpc_xvr, pulse_corpus, tmp_path):
    out = tmp_path / "out"
    options = ("--corpus", pulse_corpus, "--out", out, "--gap", 16)
    said = hpc_xvr("evaluate", "bicubic", *options, code=2)
    assert "a gap of 16 frames is longer than its recordings" in said.err
    assert "2 to 15" in said.err and not out.exists()


def test_a_gap_beyond_those_of_the_training_is_told():
    rows = [row(name, "r", 30.0, gap=24) for name in ("m", "detail")]
    facts = [Facts("m", "M", True, longest_gap=20), Facts("detail", "detail transfer")]
    evaluation = Evaluation(rows, facts, {}, "detail")
    said = tables.verdicts(evaluation, evaluation.conditions[0])
    assert said[-1] == "M was trained for gaps of up to 20 frames: this one of 24 lies beyond them"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("evaluate", "nowhere", "--out"), "out"),
        (("export", "nowhere", "--out"), "out.safetensors"),
        (("adapt", "nowhere", "--video", "v", "--out"), "out.safetensors"),
        (("reconstruct", "nowhere", "--video", "v", "--out"), "out.tif"),
    ],
)
def test_a_bad_out_is_refused_before_anything_is_loaded(hpc_xvr, tmp_path, command, name):
    """`nowhere` is no model: that is never found out."""
    (tmp_path / "file").write_text("")
    said = hpc_xvr(*command, tmp_path / "file" / name, code=2)
    assert "file" in said.err and "nowhere" not in said.err
    bad = tmp_path / name
    bad.write_text("") if command[0] == "evaluate" else bad.mkdir()
    said = hpc_xvr(*command, bad, code=2)
    assert "is a fi" in said.err or "is a folder" in said.err
    assert "nowhere" not in said.err


def test_cells_are_no_formulas_and_names_no_html():
    rows = [row(name, "r", 30.0) for name in ("=1+1", "-x", "<b>|`", "plain")]
    facts = [Facts(r.method, r.method, True) for r in rows]
    evaluation = Evaluation(rows, facts, {}, "plain")
    cells = {line["method"] for line in csv.DictReader(tables.as_csv(evaluation).splitlines())}
    assert cells == {"'=1+1", "'-x", "<b>|`", "plain"}
    text = tables.as_markdown(evaluation)
    assert "<b>" not in text and r"&lt;b&gt;\|`" in text
    assert tables._tex("a_b\\c") == r"a\_b\textbackslash{}c"


# Charts, pages and endings.


def test_lines_differ_in_more_than_colour():
    looks = [(str(line.dashes), line.marker) for line in (*LINES, *PLAIN.values())]
    assert len({marker for _, marker in looks}) == len(looks)
    assert len({line.colour for line in LINES}) == len({str(line.dashes) for line in LINES}) == 7


def test_every_command_names_the_next():
    """Each calls `then`, by itself or by what ends it."""
    for name, command in cli.commands.items():
        names = command.callback.__code__.co_names
        assert "then" in names or "_after_inspection" in names, name


def test_the_next_command_is_as_one_would_type_it(hpc_xvr, tmp_path):
    stack(tmp_path / "my shot.tif")
    path = tmp_path / "a corpus"
    said = hpc_xvr("ingest", tmp_path / "my shot.tif", "--bit-depth", 12, "--corpus", path)
    assert f"next: hpc-xvr inspect '{path}' --verify --sheet" in said.err.splitlines()[-1]
