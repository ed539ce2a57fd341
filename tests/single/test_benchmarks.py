"""The baseline that speed is measured against computes the same thing."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ablation
import compare
import noise_study
from bounding import Noise, least_deviation
from hpc_xvr import checkpoint
from hpc_xvr.config import load
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.model.xvr import SwinXVR
from plain_swin import PlainSwinXVR
from support.paths import BENCHMARKS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("output", ["centre", "sequence"])
@pytest.mark.parametrize("size", [(16, 24), (13, 21), (8, 20)])
def test_plain_and_fast_model_agree_in_outputs_and_gradients(output, size):
    options = dict(embed_dim=12, depths=(2, 2), drop_path=0.0, output=output, up_features=8)
    torch.manual_seed(0)
    fast, plain = SwinXVR(**options).double(), PlainSwinXVR(**options).double()
    plain.load_state_dict(fast.state_dict())
    h, w = size
    lr, hr = torch.rand(2, 3, 1, h, w).double(), torch.rand(2, 2, 1, 4 * h, 4 * w).double()
    a, b = fast(lr, hr), plain(lr, hr)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(a)
    for ours, theirs in zip(
        torch.autograd.grad((a * probe).sum(), list(fast.parameters())),
        torch.autograd.grad((b * probe).sum(), list(plain.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_the_quick_benchmark_measures_everything_it_promises(tmp_path):
    """Ratios of times are those of the seconds it files, not judged here; those of memory do not
    depend on the machine's mood."""
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "model.py"), "--quick", "--json", str(out)]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    elapsed = time.perf_counter() - start
    result = json.loads(out.read_text())
    fast = result["context"]["precision"]
    forward, train = (
        {name[len(kind) + 1 : -1]: s for name, s in result.items() if name.startswith(f"{kind}[")}
        for kind in ("forward_s", "train_s")
    )
    assert 0 < sum(forward.values()) + sum(train.values()) < elapsed
    plain = forward["plain, float32"]
    ours = min(forward["ours, float32"], forward[f"ours, {fast}"])
    assert result["forward_speedup"] == pytest.approx(plain / ours)
    sequence = forward[f"ours, {fast}, sequence"]
    assert result["sequence_speedup_per_frame"] == pytest.approx(3 * plain / sequence)
    ours = min(train["ours, float32"], train[f"ours, {fast}"])
    assert result["train_speedup"] == pytest.approx(train["plain, float32"] / ours)
    again = train[f"ours, {fast}, recompute blocks"]
    assert result["checkpointing_time_ratio"] == pytest.approx(again / train[f"ours, {fast}"])
    context = result["context"]
    flops = 3 * context["train_batch"] * SwinXVR().flops(*context["train_size"])
    assert result["train_tflops"] == pytest.approx(flops / ours / 1e12)
    # A part of the step, and more than nothing: three passes over ten million weights.
    assert 1e-4 < result["bookkeeping_share"] < 1
    small = fast == "bf16"
    assert result["train_memory_ratio"] < (0.5 if small else 0.75)
    # 0.2 at the size of real training in bf16
    assert result["checkpointing_memory_ratio"] < (0.35 if small else 0.5)
    assert result["context"]["packages"]["torch"] and result["context"]["device"]


def test_models_are_compared_on_one_budget(monkeypatch):
    """Steps times what a step costs is the budget, at every width."""
    for kind in (["--quick"], [], ["--published", "--corpus", "corpus"]):
        monkeypatch.setattr(sys, "argv", ["compare.py", *kind])
        args = compare.parse()
        seen = set()
        for name in compare.MODELS:
            config, overrides = compare.settings(name, args, Path("corpus"))
            spent = compare.step_flops(config) * config.train.steps / 1e12
            assert spent == pytest.approx(args.budget, rel=0.15 if kind == ["--quick"] else 0.01)
            assert f"train.steps={config.train.steps}" in overrides
            if name == "key_propagation":  # takes whole gaps
                continue
            data = config.data.model_dump()
            seen.add(str({**data, "seed": config.run.seed, "batch": config.train.global_batch}))
        assert len(seen) == 1  # the same samples for all that take windows


def test_the_comparison_runs_from_corpus_to_tables(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "compare.py"), "--quick", "--threads", "1"]
    models = {"edvr_stf", "swin_sequence", "key_propagation"}
    command += ["--models", *sorted(models), "--budget", "0.001"]
    command += ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    out = tmp_path / "results" / "compare-quick"
    written = json.loads((out / "how.json").read_text())
    assert set(written["models"]) == models
    for name, facts in written["models"].items():
        run = tmp_path / "work" / name
        steps = json.loads((run / "done.json").read_text())["step"]
        assert (facts["steps"], facts["samples"]) == (steps, 4 * steps)
        state = checkpoint.load(checkpoint.path_of(run / "checkpoints", steps))
        assert facts["parameters"] == sum(weights.numel() for weights in state["ema"].values())
        assert facts["tflop"] == pytest.approx(0.001, rel=0.4)
        spent = facts["gflop_a_sample"] * facts["samples"] / 1000
        assert facts["tflop"] == pytest.approx(spent, rel=0.01)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        seconds = sum(line["step_s"] for line in lines if line["kind"] == "train")
        assert facts["seconds"] == pytest.approx(seconds, abs=0.06)
    assert len(written["commands"]) == 4
    whole = tmp_path / "work" / "evaluation"
    tree = json.loads((whole / "evaluation.json").read_text())
    learned = {facts["name"]: facts["title"] for facts in tree["methods"] if facts["learned"]}
    titles = "EDVR-STF", "key propagation", "SWIN-XVR sequence"
    assert learned == dict(zip(sorted(models), titles, strict=True))
    assert len(tree["methods"]) == 9
    assert "EDVR-STF loses to detail transfer" in (out / "tables.md").read_text()
    assert (whole / "comparison.html").exists() and (out / "psnr-flops.png").exists()
    assert len(list(out.iterdir())) == 5  # tables, rows, how and a chart


def test_the_ablation_runs_from_corpus_to_table(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "ablation.py"), "--quick", "--threads", "1"]
    command += ["--only", "l1", "no-layers", "--ranks", "1"]
    command += ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    table = (tmp_path / "results" / "ablation.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| variant", "| reference", "| l1", "| no-layers"]
    numbers = json.loads((tmp_path / "results" / "ablation.json").read_text())["psnr_db"]
    assert len(numbers) == 12 and all(10 < value < 60 for value in numbers.values())
    gain = numbers["l1 1 8:none"] - numbers["reference 1 8:none"]
    assert rows[2][2] == f"{gain:+.2f}"
    for name, layers in (("l1", True), ("no-layers", False)):
        config = load(tmp_path / "work" / f"{name}-1" / "config.yaml")
        assert ("layers" in config.simulate.scenes) == layers
        scenes = {video.info.scene for video in Corpus(config.data.corpus).split("train")}
        assert ("layers" in scenes) == layers
    assert load(tmp_path / "work" / "l1-1" / "config.yaml").train.loss == "l1"


def test_intervals_are_those_of_students_distribution():
    """Three differences of mean 1 and deviation 1: t(0.975, 2) / sqrt(3) = 2.48 to either side."""
    assert ablation._interval(np.array([0.0, 1.0, 2.0])) == " [-1.48, +3.48]"
    assert ablation._interval(np.array([1.0])) == ""


def test_the_benchmark_of_gaps(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "gaps.py"), "--quick", "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    result = json.loads(out.read_text())
    for name in ("base", "small"):
        ratio = result[f"frames_s[{name}]"] / result["frames_s[swin_xvr]"]
        assert result[f"speedup_to_swin_xvr[{name}]"] == pytest.approx(ratio)
        assert result[f"gflop_a_frame[{name}]"] < 0.1 * result["gflop_a_frame[swin_xvr]"]
    assert 0 < result["train_share_of_products"] < 1 and result["train_tflop_s"] > 0


def test_recordings_that_were_never_trained_on(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "held_out.py"), "--quick"]
    command += ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    for name, settings in (("held-out", None), ("held-out-misfit", "evaluate.misregistration=0.5")):
        rows = (tmp_path / "results" / name / "evaluation.csv").read_text().splitlines()[1:]
        assert len(rows) == 5 * 2 * 7  # recordings, gaps, methods
        how = json.loads((tmp_path / "results" / name / "how.json").read_text())
        assert (settings in how["commands"][-1]) if settings else "misreg" not in str(how)
        assert str(tmp_path) not in str(how)


def test_the_benchmark_of_registering(tmp_path):
    out = tmp_path / "result.json"
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, str(BENCHMARKS / "registering.py"), "--quick", "--json", str(out)]
    command += ["--rows", str(rows)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["matching"] for row in kept] == [True, True, False]
    result = json.loads(out.read_text())
    assert result["pairs"] == 2 and result["within_0.1_pixels"] == 1
    assert result["not_matching"] == 1 and result["not_matching_accepted"] == 0
    whole = result["bayes_psnr_db[scale 3]"] + result["bayes_psnr_db[scale 4]"]
    cost = whole / 2 - result["bayes_psnr_db[scale 3.5]"]
    assert result["resampling_cost_db[scale 3.5]"] == pytest.approx(cost)


def test_what_can_be_known_of_a_clock_is_what_motion_and_noise_allow():
    """Bands that run up and down by turns, 0.2 pixels a frame: no place explains that."""
    rows, columns = np.indices((32, 48), float)
    way = np.where(columns // 6 % 2, 0.2, -0.2)

    def light(t):
        return 0.5 + 0.3 * np.sin(2 * np.pi * (rows - way * t) / 8) * (1 + 0.2 * np.cos(columns))

    instants = 2.5 + 4 * np.arange(5.0)
    inside = np.ones((32, 48), bool)
    fast, seen = np.stack([*map(light, range(24))]), np.stack([*map(light, instants)])
    found = {}
    for deviation in (0.01, 0.02):
        noise = Noise((0.0, deviation**2), (0.0, 0.0), (0.0, 0.0), 0.7)
        found[deviation] = least_deviation(fast, seen, inside, instants, noise, True)
    slopes = [light(t + 0.5) - light(t - 0.5) for t in instants]
    movie = (
        88.375 / 224
    )  # noise, to the square, of the cubic half-way between the six nearest frames
    start = 0.01 * np.sqrt(movie / (np.stack(slopes) ** 2).sum())
    expected = np.hypot(start, 8 * 1e-4)  # and of the gap, 8 frames from the middle
    assert found[0.01] == pytest.approx(expected, rel=0.05)
    assert found[0.02] == pytest.approx(2 * found[0.01], rel=0.1)
    still = np.repeat(fast[:1], 24, 0), np.repeat(seen[:1], 5, 0)
    assert least_deviation(*still, inside, instants, noise, True) > 100
    jump = fast.copy()
    jump[11:] = fast[14:].tolist() + fast[:3].tolist()  # between frames, at a sharp one's instant
    assert least_deviation(jump, seen, inside, instants, noise, True) > found[0.02]


def test_the_noise_study_says_what_its_numbers_say(tmp_path):
    def summary(method, noise, psnr):
        return {
            "method": method,
            "scene": None,
            "condition": {"noise": noise},
            "recordings": 5,
            "values": {"psnr": {"mean": psnr}},
        }

    scores = {
        "train_none": (35.0, 24.0),
        "train_poisson": (34.0, 30.0),
        "bicubic": (27.0, 22.0),
        "detail": (33.0, 24.5),
        "bayes": (33.5, 30.5),
    }
    tree = {
        "summaries": [
            summary(method, noise, value)
            for method, values in scores.items()
            for noise, value in zip(("none", "100"), values, strict=True)
        ]
    }
    result = noise_study.study(tree, ("none", "poisson"))
    assert result["psnr_db"] == {
        "none": {"none": 35.0, "100": 24.0},
        "poisson": {"none": 34.0, "100": 30.0},
    }
    assert "ested with none, training with none is best (35.00 dB, 1.00 dB above" in result["says"]
    assert "tested with 100, training with poisson is best (30.00 dB, 6.00 dB" in result["says"]
    assert (
        "least over all tests is poisson: at most 1.00 dB, against 6.00 dB for none"
        in (result["says"])
    )
    assert "above all of them at 100 (bayes, 30.50 dB)." in result["says"]
    noise_study.draw(result, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").stat().st_size > 10_000


@pytest.mark.timeout(600)  # four starts of two ranks: half a minute, more where cores are busy
def test_a_run_killed_and_started_again_ends_as_the_undisturbed_one(tmp_path, pulse_corpus):
    """The short form of chaos.py: which kills it gets depends on the seed, which it prints."""
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "chaos.py"), "--quick", "--json", str(out)]
    command += ["--kills", "2", "--corpus", str(pulse_corpus)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["kills"] >= 1
    assert result["corrupted"] == 200
    for name in ("weights_bitwise_equal", "losses_equal", "done_marker"):
        assert result[name] == 1, (name, done.stdout)
    for name in (
        "steps_lost_max",
        "overran_grace",
        "died_of_clock_or_slow_disk",
        "simulated_runs_ended_wrongly",
        "orphans",
        "leftovers",
        "damaged_loaded",
        "corrupted_loaded",
        "corrupted_tracebacks",
        "bombs_gone_off",
        "tracebacks_at_start",
    ):
        assert result[name] == 0, (name, done.stdout)
    # While a checkpoint is being written the run is a step or two ahead of it.
    assert result["max_steps_repeated"] <= result["checkpoint_every"] + 2, done.stdout


def test_the_benchmark_of_reconstruction_measures_what_it_promises(tmp_path):
    """Ratios are those of the speeds it files; how large they are depends on the machine's mood."""
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "reconstruct.py"), "--quick", "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    result = json.loads(out.read_text())
    for name in ("centre", "sequence", "builtin"):
        ours, plain = (result[f"frames_per_s[{kind}]"] for kind in (name, "frame by frame"))
        assert result[f"{name}_speedup"] == pytest.approx(ours / plain)
    assert result["realtime_psnr_db[builtin]"] > result["realtime_psnr_db[bicubic]"]
    for name in ("swin_centre", "swin_sequence", "edvr", "edvr_stf"):
        assert result[f"realtime_frames_per_s[{name}]"] > 0
    assert 0 < result["first_frame_s"] < result["whole_s"]
    plain = sum(result[f"{part}_s"] for part in ("reading", "computing", "writing"))
    assert result["overlapped_to_plain"] == pytest.approx(result["overlapped_s"] / plain)
    assert all(np.isfinite(result[f"hidden_share{kind}"]) for kind in ("", "_one_thread"))
    assert result["hidden_computing_s"] > 28 * 0.02, "the simulated device waits for each frame"
