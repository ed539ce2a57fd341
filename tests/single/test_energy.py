"""What a run says of the energy it took, from counters like those of Linux."""

import json

import pytest

from hpc_xvr.config import load
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.train import energy
from hpc_xvr.train.energy import NodeEnergy, of_run
from hpc_xvr.train.engine import Trainer
from support.paths import PULSE


def zone(folder, name, joules, largest=1000.0):
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    (path / "max_energy_range_uj").write_text(f"{round(largest * 1e6)}\n")


def test_packages_are_added_up_their_parts_are_not_and_counters_may_start_anew(tmp_path):
    zone(tmp_path, "intel-rapl:0", 100)
    zone(tmp_path, "intel-rapl:1", 990)
    zone(tmp_path, "intel-rapl:0:0", 5)
    node = NodeEnergy(tmp_path)
    zone(tmp_path, "intel-rapl:0", 130)
    zone(tmp_path, "intel-rapl:1", 15)  # round once: 990 -> 1000 = 0 -> 15
    zone(tmp_path, "intel-rapl:0:0", 900)
    node.look()
    assert node.report() == {"processors_j": 55.0, "gpus_j": None, "missing": []}


def test_a_machine_without_readable_counters_says_so(tmp_path):
    none = NodeEnergy(tmp_path / "nothing").report()
    assert none["processors_j"] is None and "no energy counters" in none["missing"][0]
    zone(tmp_path, "intel-rapl:0", 100)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()  # root may read any file, but no folder
    hidden = NodeEnergy(tmp_path).report()
    assert hidden["processors_j"] is None and "energy_uj" in hidden["missing"][0]


def test_nodes_together_give_kwh_and_joules_a_sample():
    nodes = [
        {"processors_j": 1.8e6, "gpus_j": 3.6e6, "missing": []},
        {"processors_j": None, "gpus_j": 1.8e6, "missing": ["processors: none"]},
    ]
    used = of_run(nodes, 1000)
    assert used["kwh"] == pytest.approx(2.0) and used["joule_per_sample"] == pytest.approx(7200)
    assert used["missing"] == ["processors: none"] and used["gpus_j"] == 5.4e6
    unknown = of_run([{"processors_j": None, "gpus_j": None, "missing": ["x"]}], 10)
    assert unknown["kwh"] is None and unknown["joule_per_sample"] is None


def test_a_run_s_summary_holds_its_energy(pulse_corpus, tmp_path, monkeypatch):
    zone(tmp_path / "powercap", "intel-rapl:0", 0)
    find = NodeEnergy._find_processors
    monkeypatch.setattr(
        NodeEnergy, "_find_processors", lambda self, _: find(self, tmp_path / "powercap")
    )
    settings = [f"run.dir={tmp_path}/run", f"data.corpus={pulse_corpus}", "run.threads=1"]
    cfg = load(PULSE, [*settings, "run.utilisation_s=0.05"])
    trainer = Trainer(cfg, Comm())
    train = trainer._train

    def with_work():
        done = train()
        zone(tmp_path / "powercap", "intel-rapl:0", 720)
        return done

    trainer._train = with_work
    assert trainer.run()
    trainer.close()
    used = json.loads((tmp_path / "run/utilisation.json").read_text())["energy"]
    assert used["samples"] == cfg.train.steps * cfg.train.global_batch
    assert used["kwh"] == pytest.approx(720 / energy.J_PER_KWH)
    assert used["joule_per_sample"] == pytest.approx(720 / used["samples"])
