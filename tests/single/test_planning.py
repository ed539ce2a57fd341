"""The model of scaling past this machine, and the benchmarks that feed it."""

import csv
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
    with (tmp_path / "0.csv").open(newline="") as file:
        rows = {(r["engine"], int(r["ranks"]), r["scaling"]): r for r in csv.DictReader(file)}
    assert len(rows) == 8
    rate = {key: float(row["samples_per_s"]) for key, row in rows.items()}
    alone, beside, both = (
        rate["independent", 1, "weak"],
        rate["independent", 2, "weak"],
        rate["torch", 2, "weak"],
    )
    assert scaling["weak_efficiency_torch"] == pytest.approx(both / beside)  # of a single round
    assert scaling["weak_efficiency_absolute_torch"] == pytest.approx(both / (2 * alone))
    pair = rows["torch", 2, "weak"]  # one sample a rank and step
    assert both == pytest.approx(1 / float(pair["step_min_s"]) + 1 / float(pair["step_max_s"]))
    exposed = float(pair["exposed"])
    assert scaling["exposed_communication_fraction"] == pytest.approx(exposed)
    assert 0 < exposed < 1
    assert {"overhead_trainer", "overhead_torch"} <= scaling.keys()
    assert scaling["context"]["one_node"] is True

    sizes = [int(name.split(",")[2][:-1]) for name in travel if name.startswith("seconds[")]
    seconds = np.array([travel[f"seconds[torch,2,{size}]"] for size in sizes])
    assert (np.diff(seconds[np.array(sizes) > 1e6]) > 0).all(), "more bytes take longer"

    def misses(latency, bandwidth):
        """Logarithms of predicted over measured seconds; two ranks' ring moves each byte once."""
        times = 1e-6 * latency + np.array(sizes) / (1e9 * bandwidth)
        return np.log(times / seconds)

    found = travel["latency_us[torch,2]"], travel["bandwidth_gb_s[torch,2]"]
    best = np.square(misses(*found)).sum()
    for latency, bandwidth in ((0.9, 1), (1.1, 1), (1, 0.9), (1, 1.1)):
        assert np.square(misses(latency * found[0], bandwidth * found[1])).sum() > best
    error = np.median(np.abs(np.exp(misses(*found)) - 1))
    assert travel["fit_error[torch,2]"] == pytest.approx(error)

    errors = [abs(v) for name, v in plan.items() if name.startswith("prediction_error[")]
    assert len(errors) == 4  # torch on one and two ranks, weak and strong
    assert plan["prediction_error_median"] == pytest.approx(np.median(errors))
    assert plan["prediction_error_largest"] == pytest.approx(max(errors))
    weak = [plan[f"weak_efficiency[A100,{n}]"] for n in (4, 40)]
    each = [plan[f"samples_per_s[A100,{n}]"] / n for n in (4, 40)]
    assert weak[1] / weak[0] == pytest.approx(each[1] / each[0])
    assert 0.5 < weak[1] < weak[0] < 1


def test_the_published_run_is_as_fast_as_published_beside_a_machine_of_four():
    """Over one GPU the speed-up is efficiency times GPUs; over more, their share of it."""
    choice = model.Choice(10)
    n = model.PUBLISHED_GPUS
    alone = model.speedup(A100, n, 1, choice, SHAPE)
    assert alone == pytest.approx(n * model.weak(A100, n, choice, SHAPE))
    four = model.speedup(A100, n, 4, choice, SHAPE)
    assert four == pytest.approx(alone / 4 / model.weak(A100, 4, choice, SHAPE))
    assert four == pytest.approx(model.PUBLISHED_SPEEDUP, rel=0.1)
