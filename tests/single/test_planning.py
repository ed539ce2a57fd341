"""The model of scaling past this machine, and the benchmarks that feed it."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import allreduce
import cluster_model as model
from support.paths import BENCHMARKS

A100, H200 = model.CLUSTERS
SHAPE = np.array([-1.2, -0.8, -0.2, 0.1, 0.4, 1.7])


def test_the_fit_finds_latency_and_bandwidth_again():
    times = {4**k: allreduce.predict(4, 4**k, 50e-6, 2e9) for k in range(1, 14)}
    latency, bandwidth = allreduce.fit(4, times)
    assert latency == pytest.approx(50e-6, rel=1e-6)
    assert bandwidth == pytest.approx(2e9, rel=1e-6)


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [
        ([0.1], 0.1),  # ready only at the end
        ([0.1, 0.1], 0.1),  # the first one travels during the backward pass
        ([0.9, 0.9], 2 / 3 + 0.9 + 0.9 - 1),  # the second one waits for the first
        ([0.0, 0.0], 0.0),
    ],
)
def test_what_the_backward_pass_does_not_hide(buckets, expected):
    assert model.exposed(1.0, buckets) == pytest.approx(expected, abs=1e-12)


def test_a_collective_of_one_gpu_costs_its_start_and_trees_beat_rings_on_many_nodes():
    assert model.collective(A100, 1, 4e7) == A100.start_s
    few, many = (model.collective(A100, n, 4e7) for n in (8, 1024))
    assert few < many < few + 2 * 8 * A100.between_s + 4e7 / A100.between
    assert model.collective(H200, 1024, 4e7) < many


def test_the_slowest_of_many_is_slower_and_without_noise_is_not():
    rng = np.random.default_rng(0)
    factors = [model.slowest(SHAPE, 0.02, n, rng) for n in (1, 8, 1024)]
    assert factors == sorted(factors)
    assert factors[0] == pytest.approx(1, abs=0.01)
    assert factors[2] > 1 + 1.7 * 0.02, "past the worst step that was measured"
    assert model.slowest(SHAPE, 0.0, 1024, rng) == 1


@pytest.mark.parametrize("cluster", model.CLUSTERS)
def test_efficiency_falls_with_ranks_and_every_choice_helps(cluster):
    choice = model.Choice(10)
    weak = [model.weak(cluster, n, choice, SHAPE) for n in model.SIZES]
    assert all(a >= b - 1e-3 for a, b in itertools.pairwise(weak))
    assert 0.8 < weak[-1] < weak[0] < 1
    packed = model.weak(cluster, 1024, replace(choice, packed=True), SHAPE)
    assert packed > weak[-1]
    parts = model.step(cluster, 1024, choice, SHAPE)
    assert parts["step"] == pytest.approx(sum(v for k, v in parts.items() if k != "step"))
    tiny = model.step(cluster, 1024, model.Choice(1), SHAPE)
    assert model.limits(tiny) == "launch"
    starved = replace(cluster, storage=1e9)
    assert model.limits(model.step(starved, 1024, choice, SHAPE)) == "data"


def test_it_predicts_a_measurement_that_it_made_itself():
    compute, latency, bandwidth = 0.5, 0.002, 1e9
    travel = latency + 40e6 / bandwidth
    scaling = {
        "step_s[independent,2,weak]": compute,
        "step_s[horovod,2,weak]": compute + travel,
        "context": {"gradient_bytes": 40e6, "steps_alone": [0.5, 0.5]},
    }
    known = {"latency_us[horovod,2]": 1e6 * latency, "bandwidth_gb_s[horovod,2]": 1e-9 * bandwidth}
    (row,) = model.check(scaling, known, *model.noise_of(scaling))
    assert row["error"] == pytest.approx(0, abs=1e-9)
    assert row["communication_s"] == pytest.approx(travel)


@pytest.mark.slow
def test_the_benchmarks_run_from_measurement_to_plan(tmp_path):
    """Real ranks of the real trainer, as little of it as there is."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    smallest = ["model.embed_dim=24", "model.depths=[2]", "data.patch=32"]
    commands = [
        ["scaling.py", "--quick", "--engines", "torch", "--rounds", "1", "--steps", "2"],
        ["allreduce.py", "--quick", "--engines", "torch"],
        [
            "scaling_model.py",
            "--scaling",
            f"{tmp_path}/0.json",
            "--allreduce",
            f"{tmp_path}/1.json",
        ],
    ]
    for text in smallest:
        commands[0] += ["--set", text]
    results = []
    for i, (script, *options) in enumerate(commands):
        out = tmp_path / f"{i}.json"
        command = [sys.executable, str(BENCHMARKS / script), *options, "--json", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        assert out.with_suffix(".png").stat().st_size > 20_000
        results.append(json.loads(out.read_text()))
    scaling, travel, plan = results
    assert scaling["weak_efficiency_torch"] > 0
    assert 0 <= scaling["exposed_communication_fraction"] < 1
    assert {"overhead_trainer", "overhead_torch"} <= scaling.keys()
    assert scaling["context"]["one_node"] is True
    rows = (tmp_path / "0.csv").read_text().splitlines()
    assert rows[0].startswith("batch_of_rank,") and len(rows) == 1 + 8
    assert travel["latency_us[torch,2]"] > 0 and travel["bandwidth_gb_s[torch,2]"] > 0
    assert plan["prediction_error_median"] >= 0
    assert 0.5 < plan["weak_efficiency[A100,40]"] < 1
