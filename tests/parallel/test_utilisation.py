"""One thread a node looks at all its ranks; a rank that is slower than the others is named."""

import json
import time

from hpc_xvr.train.engine import Trainer
from hpc_xvr.train.utilisation import read


def test_both_ranks_are_looked_at_and_the_slow_one_is_named(engine, settings, monkeypatch):
    trainer = Trainer(settings("run", "run.utilisation_s=0.05"), engine)
    real = trainer.batches

    def slow():
        for batch in real():
            if engine.rank == 1:
                time.sleep(0.4)
            yield batch

    monkeypatch.setattr(trainer, "batches", slow)
    assert trainer.run()
    trainer.close()
    engine.barrier()
    folder = trainer.cfg.run.dir
    assert [path.name for path in (folder / "utilisation").iterdir()] == ["rank-0.jsonl"]
    assert {row["rank"] for row in read(folder)} == {0, 1}
    findings = json.loads((folder / "utilisation.json").read_text())["findings"]
    assert any(line.startswith("rank 1 ") and "straggler" in line for line in findings), findings
    assert not any(line.startswith("rank 0 ") and "straggler" in line for line in findings)
