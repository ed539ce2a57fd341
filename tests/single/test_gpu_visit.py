"""What is prepared for a GPU that is lent for minutes: nothing that fails there stops the rest."""

import json
import os
import re
import subprocess
import sys
import time
from importlib import metadata

import pytest
import torch

import gpu_measure
import one_by_one
import roofline
from hpc_xvr.model.key_propagation import KeyPropagation
from hpc_xvr.model.xvr import SwinXVR
from support.paths import BENCHMARKS, ROOT

VISIT = BENCHMARKS / "gpu_visit.sh"
WORKER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from one_by_one import Job, work

def wrong():
    raise ValueError("no such thing\\nsecond line")

def spoilt():
    raise RuntimeError("CUDA error: an illegal memory access")

jobs = {{
    "first": lambda: {{"s": 1.0}},
    "wrong": wrong,
    "slow": lambda: time.sleep(60),
    "dies": lambda: os._exit(7),
    "spoilt": spoilt,
    "slow again": lambda: time.sleep(60),
    "last": lambda: {{"s": 2.0, "pid": os.getpid()}},
}}
names = sys.argv[1:]
sys.exit(work([Job(n, 1.0, jobs[n]) for n in names], Path({out!r}), lambda e: "CUDA" in str(e)))
"""
NAMES = ["first", "wrong", "slow", "dies", "spoilt", "last"]


def supervised(tmp_path, seconds, names=NAMES):
    script, out = tmp_path / "worker.py", tmp_path / "results.jsonl"
    script.write_text(WORKER.format(benchmarks=str(BENCHMARKS), out=str(out)))
    limits = dict.fromkeys(names, 1.5)
    rows = one_by_one.supervise([sys.executable, str(script)], limits, out, seconds)
    return {row["name"]: row for row in rows}, out


def test_a_measurement_that_fails_hangs_or_kills_its_process_costs_itself_alone(tmp_path):
    rows, out = supervised(tmp_path, 60)
    assert list(rows) == NAMES
    assert rows["first"]["s"] == 1.0 and rows["last"]["s"] == 2.0
    assert rows["wrong"]["error"] == "ValueError: no such thing"
    assert rows["slow"]["error"].startswith("stopped after ")
    assert rows["dies"]["error"] == "the process ended with code 7"
    assert "CUDA error" in rows["spoilt"]["error"]
    assert {row["name"]: row for row in one_by_one.read(out)} == rows


def test_what_is_known_when_time_is_up_is_kept(tmp_path):
    start = time.monotonic()
    rows, out = supervised(tmp_path, 2.5, ["first", "slow", "slow again", "last"])
    assert time.monotonic() - start < 9
    assert rows["first"]["s"] == 1.0
    assert {row["name"] for row in one_by_one.read(out)} == set(rows)


def test_the_fastest_right_setting_is_chosen_and_the_table_says_what_is_missing():
    def row(case, s, **more):
        return {"name": case.name, "s": s, "tflops": 1.0, **more}

    cases = {case.name: case for case in gpu_measure.CASES}
    plain, eager, blocks, flex, graphs, explicit = (
        cases[f"train published, batch 10, {way}"]
        for way in (
            *("plain float32", "bf16", "bf16 blocks", "bf16 flex"),
            *("bf16 graphs", "bf16 explicit"),
        )
    )
    rows = [
        row(plain, 0.4),
        row(eager, 0.04),
        row(blocks, 0.02),
        {"name": flex.name, "error": "RuntimeError: no"},
        row(graphs, 0.01),
        row(explicit, 0.001),  # for comparison
        {"name": "trainer", "s": 0.05},
        {"name": "trainer, samples made on the device", "s": 0.03},
    ]
    chosen = gpu_measure.choose(rows)["published"]
    assert chosen["s"] == 0.01 and chosen["settings"] == [
        "train.compile=none",
        "model.attention=auto",
        "train.graphs=true",
        "data.on_device=true",
    ]
    text = gpu_measure.table(rows)
    assert re.search(r"bf16 blocks \| 20\.00 \|.*\| 20\.0 \|", text)
    assert f"- {flex.name}: RuntimeError: no" in text
    assert gpu_measure.choose([]) == {}
    assert "unknown device" in gpu_measure.table([])


def test_a_rehearsed_step_has_the_gradient_of_the_plain_network(monkeypatch):
    monkeypatch.setattr(gpu_measure, "DEVICE", "cpu")
    gpu_measure._plain_gradient.cache_clear()
    for config in ("published", "key_propagation"):
        case = next(c for c in gpu_measure.CASES if c.config == config and c.way == "float32")
        row = gpu_measure.train_step(case)
        assert row["gradient_error"] < 1e-5 and row["s"] > 0
    monkeypatch.setattr(SwinXVR, "forward", lambda self, lr, hr: 1.01 * WHOLE(self, lr, hr))
    case = next(c for c in gpu_measure.CASES if c.way == "float32")
    with pytest.raises(AssertionError, match="its gradient is off by"):
        gpu_measure.train_step(case)


WHOLE = SwinXVR.forward


def test_wheels_that_travel_are_unzipped_where_the_package_is_missing(tmp_path):
    import zipfile

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, version in (("strange_thing", "1.0"), ("numpy", "0.1")):
        with zipfile.ZipFile(wheels / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "here = True\n")
            wheel.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: 1\n")
    (wheels / "torn-1.0-py3-none-any.whl").write_bytes(b"PK")
    part = re.search(r"<<'PYTHON'\n(.*?)\nPYTHON", VISIT.read_text(), re.S)[1]
    command = [sys.executable, "-c", part, str(wheels), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "installed strange_thing 1.0" in done.stdout
    assert "not installed: torn-1.0" in done.stdout
    assert metadata.version("numpy") and not (tmp_path / "site" / "numpy").exists()


def test_the_script_is_sound_and_its_guide_names_what_it_can_do():
    subprocess.run(["bash", "-n", str(VISIT)], check=True)
    said = subprocess.run(["bash", str(VISIT)], capture_output=True, text=True)
    assert said.returncode == 2
    for word in ("prepare", "rehearse", "run 1 270", "carry:", "timeout_s:", "give_back"):
        assert word in said.stdout
    environment = {**os.environ, "OUT": "/nonexistent"}
    wrong = subprocess.run(
        ["bash", str(VISIT), "run", "7"], capture_output=True, text=True, env=environment
    )
    assert wrong.returncode == 2 and "PART is 1, 2 or 3" in wrong.stderr
    assert "/.visit/" in (ROOT / ".gitignore").read_text().split()


def test_the_roofline_counts_the_operations_that_the_networks_say_they_do():
    """Of a forward pass without attention's backward pass and the like."""
    case = roofline.Case("small", "key_propagation", 2, (16, 16), True)
    costs = roofline.count(case)
    counted = sum(cost.flops for cost in costs.values())
    stated = 3 * 2 * (roofline.GAP - 1) * KeyPropagation().flops(16, 16)
    assert counted == pytest.approx(stated, rel=0.03)
    floor = roofline.floors(costs, "H100")
    assert floor["arithmetic"] < floor["fused"] < floor["eager"] < floor["launches"]
    faster = roofline.floors(costs, "H200")
    assert floor["eager"] * 3.35 / 4.3 <= faster["eager"] * 1.001 < floor["eager"]


def test_the_networks_forward_passes_and_losses_read_nothing_back():
    """Tensors on the device "meta" have no values: a copy to the host is an error."""
    for case in (roofline.CASES[0], roofline.CASES[2], roofline.CASES[6]):
        small = case._replace(size=(16, 16), batch=1)
        assert roofline.count(small)
    assert torch.zeros(1, device="meta").is_meta
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros(1, device="meta").item()


def test_results_that_are_filed_can_be_read():
    filed = json.loads((BENCHMARKS / "results" / "roofline.json").read_text())
    assert filed["launches_ms[key_propagation, step of 4,H100]"] > 1
