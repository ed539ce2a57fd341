"""The baseline that speed is measured against computes the same thing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpc_xvr.model.xvr import SwinXVR

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from plain_swin import PlainSwinXVR  # noqa: E402


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
    """Ratios of times are printed, not judged here; those of memory do not depend on the machine's
    mood."""
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "model.py"), "--quick", "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    result = json.loads(out.read_text())
    for name in (
        "forward_speedup",
        "sequence_speedup_per_frame",
        "train_speedup",
        "checkpointing_time_ratio",
        "bookkeeping_share",
    ):
        assert result[name] > 0, name
    assert result["train_memory_ratio"] < 0.5
    assert result["checkpointing_memory_ratio"] < 0.35  # 0.2 at the size of real training
    assert result["context"]["packages"]["torch"] and result["context"]["device"]


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
