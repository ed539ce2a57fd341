"""What a run tells of how busy its ranks were."""

import json
import time
from pathlib import Path

import psutil
import pytest
import torch

from hpc_xvr.config import load
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.train.engine import Trainer
from hpc_xvr.train.utilisation import Sampler, judge, read

PULSE = Path(__file__).resolve().parents[2] / "configs" / "pulse.yaml"


def rank(number, data=1.0, forward=10.0, backward=20.0, busy=0.95):
    seconds = {"data": data, "forward": forward, "backward": backward}
    return {"rank": number, "host": "n1", "busy_mean": busy, "seconds": seconds}


def test_ranks_that_are_slow_hungry_or_idle_are_named_and_no_others():
    even = [rank(0), rank(1, forward=10.5), rank(2, busy=0.9)]
    assert judge(even) == []
    (slow,) = judge([*even, rank(3, forward=15.0)])
    assert "rank 3 on n1 is a straggler" in slow and "1.4 times" in slow
    hungry = judge([rank(0), rank(1), rank(2, data=9.0, forward=10.0, backward=11.0)])
    assert any("rank 2 on n1 waited for data for 30 % of the time" in line for line in hungry)
    (idle,) = judge([*even, rank(3, busy=0.4)])
    assert "rank 3 on n1 was busy only 40 %" in idle


def test_a_look_tells_step_phase_processor_and_memory(tmp_path):
    comm = Comm()
    sampler = Sampler(comm, tmp_path, 0.02)
    for step, doing in ((1, "forward"), (1, "backward"), (2, "data")):
        comm.mark(step, doing)
        end = time.perf_counter() + 0.2
        while time.perf_counter() < end:
            sum(range(1000))
    sampler.stop()
    rows = read(tmp_path)
    assert {(row["step"], row["doing"]) for row in rows} >= {(1, "backward"), (2, "data")}
    here = psutil.Process().memory_info().rss / 1e9
    assert all(0.5 * here < row["rss_gb"] < 1.5 * here for row in rows)
    assert max(row["cpu"] for row in rows) > 0
    assert 0 < sampler.cost < 0.2, "at fifty looks a second"
    seen = len(rows)
    time.sleep(0.1)
    assert len(read(tmp_path)) == seen, "no look after the last"


def test_a_run_leaves_a_summary_and_a_picture(pulse_corpus, tmp_path):
    settings = [f"run.dir={tmp_path}/run", f"data.corpus={pulse_corpus}", "run.threads=1"]
    trainer = Trainer(load(PULSE, [*settings, "run.utilisation_s=0.05"]), Comm())
    assert trainer.run()
    trainer.close()
    summary = json.loads((tmp_path / "run/utilisation.json").read_text())
    (only,) = summary["ranks"]
    assert summary["busy"] == "cpu" and 0 <= only["busy_p5"] <= only["busy_mean"] < 1.5
    assert only["seconds"]["forward"] > 0 and only["seconds"]["saving"] > 0
    assert (tmp_path / "run/utilisation.png").stat().st_size > 10_000
    lines = [json.loads(s) for s in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(0 <= s["gradient_wait"] < 1 for s in lines if s["kind"] == "train")


def test_nothing_is_written_where_it_is_switched_off(tmp_path):
    sampler = Sampler(Comm(), tmp_path, 0)
    sampler.stop()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_gpu_figures_come_from_nvml(tmp_path):
    device = torch.device("cuda", 0)
    sampler = Sampler(Comm(device=device), tmp_path, 0.1)
    a = torch.randn(4096, 4096, device=device)
    end = time.perf_counter() + 1.5
    while time.perf_counter() < end:
        a = (a @ a).clamp(-1, 1)
        torch.cuda.synchronize()
    sampler.stop()
    rows = read(tmp_path)
    assert max(row["gpu"] for row in rows) > 0.5
    assert all(row["gpu_memory_gb"] > 0.1 and row["power_w"] > 10 for row in rows)
