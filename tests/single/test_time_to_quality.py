"""Time to quality: what is counted, what caches hold, and MLPerf's checker of the logs."""

import json
import math
import subprocess
import sys

import pytest

import fresh
import time_to_quality
from hpc_xvr.config import load
from support.paths import BENCHMARKS


def result(opened, seconds):
    """A run that reached its target after so many seconds, or never did."""
    finished = opened + (seconds if math.isfinite(seconds) else 100)
    return time_to_quality.Result(opened - 5, opened, finished, 5, 0.5, seconds, 90, 34.0, None)


def test_the_best_and_the_worst_run_do_not_count():
    assert time_to_quality.olympic([9, 1, 2, 3, 100]) == pytest.approx(14 / 3)
    assert time_to_quality.olympic([2, 4]) == 3
    assert time_to_quality.olympic([5, math.inf, 7, 6, 1]) == 6, "one that missed is the worst"
    assert math.isinf(time_to_quality.olympic([5, math.inf, 7, 6, math.inf]))


def test_models_trained_at_once_count_from_the_first_start_to_the_last_target():
    results = [result(100, 20), result(104, 26), result(101, math.inf)]
    assert time_to_quality.models_a_minute(results) == pytest.approx(60 * 2 / 30)
    assert time_to_quality.models_a_minute([result(1, math.inf)]) == 0


def test_figures_of_runs_and_groups():
    found = {
        ("auto", 1): [(None, result(0, seconds)) for seconds in (60, 30, 40, 50, 90)],
        ("auto", 2): [(None, result(0, seconds)) for seconds in (30, 31, 29, 20, 90)],
    }
    groups = [[(None, result(0, 60)), (None, result(10, 60))]]
    figures, by_run = time_to_quality.summarise(found, groups, 1)
    assert figures["minutes_to_target[strong,auto,1]"] == pytest.approx(50 / 60)
    assert figures["minutes_to_target[strong,auto,2]"] == pytest.approx(0.5)
    assert figures["strong_efficiency[auto,2]"] == pytest.approx(50 / 60)
    assert figures["models_a_minute[weak,2x1]"] == pytest.approx(120 / 70)
    assert figures["weak_efficiency[weak,2x1]"] == pytest.approx(120 / 70 * 50 / 60 / 2)
    assert figures["missed[strong,auto,2]"] == 0
    assert by_run["models_a_minute[weak,2x1]"] == [pytest.approx(120 / 70, abs=1e-4)]


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (2, [["a", "b"], ["c", "d", "e"]]),
        (5, [["a"], ["b"], ["c"], ["d"], ["e"]]),
        (7, [["a"], ["a"], ["b"], ["c"], ["c"], ["d"], ["e"]]),
    ],
)
def test_models_share_the_nodes_of_a_job(models, expected):
    assert [time_to_quality.part(list("abcde"), i, models) for i in range(models)] == expected


def test_the_launcher_is_told_the_nodes_of_a_model():
    assert time_to_quality.placed("--host {name}:4 --bind-to none", ["a", "b"]) == (
        ["--host", "a:4,b:4", "--bind-to", "none"]
    )
    assert time_to_quality.placed("--exact -w {name}", ["a"]) == ["--exact", "-w", "a"]
    assert time_to_quality.placed("-w {name}", []) == []


def test_the_nodes_are_those_of_the_job(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    (tmp_path / "nodes").write_text("n1\nn1\nn7\nn7\n")
    monkeypatch.setenv("PBS_NODEFILE", str(tmp_path / "nodes"))
    assert time_to_quality.nodes_of_job() == ["n1", "n7"]


def test_a_file_that_was_read_leaves_the_page_cache(tmp_path):
    path = tmp_path / "clip"
    path.write_bytes(bytes(2**20))
    path.read_bytes()
    pages, whole = fresh.in_memory(path)
    assert whole == 256
    if pages < whole:
        pytest.skip("this file system does not keep files in the page cache")
    assert fresh.evict([path]) < 0.1
    assert fresh.in_memory(path)[0] < 26


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The short form, once: its folder of runs and its result."""
    folder = tmp_path_factory.mktemp("quality")
    command = [sys.executable, str(BENCHMARKS / "time_to_quality.py"), "--quick"]
    command += ["--work", str(folder / "runs"), "--json", str(folder / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs", json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quick_benchmark_trains_to_the_target(quick):
    runs, figures = quick
    target = figures["context"]["target_psnr"]
    for kind in ("strong,auto,1", "strong,auto,2", "weak,2x1"):
        assert figures[f"missed[{kind}]"] == 0
        assert figures[f"staging_s[{kind}]"] > 0
        assert figures[f"start_s[{kind}]"] > 0
    lines = [json.loads(x) for x in (runs / "strong-auto-2/result_0/metrics.jsonl").open()]
    looks = [line["psnr"] for line in lines if line["kind"] == "validation"]
    assert max(looks[:-1], default=0) < target <= looks[-1], "it ended at the first that was enough"
    start = next(line for line in lines if line["kind"] == "start")
    took = lines[-1]["time"] - start["time"] + start["opening_s"]
    assert figures["minutes_to_target[strong,auto,2]"] == pytest.approx(took / 60, abs=1e-4)
    seeds = {load(path).run.seed for path in runs.rglob("config.yaml")}
    assert seeds == {1, 2, 3}, "each model of a group has a seed of its own"
    assert 0 <= figures["corpus_in_memory"] <= 1
    assert figures["context"]["corpus_sha256"] == time_to_quality.digest(runs / "corpus")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mlperf_s_checker_accepts_the_logs_and_refuses_damaged_ones(quick):
    pytest.importorskip("mlperf_logging", reason="mlperf-logging is not installed")
    import mllog_lines

    runs, figures = quick
    logs = sorted((runs / "mllog").rglob("*.txt"))
    assert len(logs) == figures["logs"] == figures["logs_accepted"] == 4
    text = logs[0].read_text()
    assert all(line.startswith(":::MLLOG {") for line in text.splitlines())
    assert mllog_lines.problems(logs[0]) == []
    lines = text.splitlines(keepends=True)
    for key, what in (
        ("run_stop", "run_stop"),
        ("init_stop", "s['init_stopped']"),
        ("submission_org", "submission_org"),
        ("seed", "seed"),
        ("eval_accuracy", "eval_accuracy"),
    ):
        without = [line for line in lines if f'"key": "{key}"' not in line]
        assert len(without) < len(lines)
        logs[0].write_text("".join(without))
        assert any(what in problem for problem in mllog_lines.problems(logs[0])), key
    target = figures["context"]["target_psnr"]
    stated = f'"quality_target", "value": {target}'
    logs[0].write_text(text.replace(stated, '"quality_target", "value": 60'))
    assert any("eval_accuracy" in problem for problem in mllog_lines.problems(logs[0]))
