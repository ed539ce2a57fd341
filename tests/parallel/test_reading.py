"""What ranks read together: damaged recordings and copies on the node's disk."""

import shutil

import pytest

from hpc_xvr.data.corpus import Corpus
from hpc_xvr.errors import CollectiveError, InputError
from hpc_xvr.train.engine import Trainer
from support.training import one_rank, train


@pytest.fixture(scope="module")
def damaged(engine, corpus, shared_folder):
    """The corpus without the frames of one training and one validation recording."""
    path = shared_folder / f"damaged-{engine.name}"
    if engine.is_root:
        shutil.copytree(corpus, path)
        for split in ("train", "validation"):
            (Corpus(path).split(split)[0].path / "frames/c/0/0/0").unlink()
    engine.barrier()
    return path


def test_dropping_is_the_same_on_any_number_of_ranks(engine, settings, damaged):
    overrides = ["train.precision=float64", f"data.corpus={damaged}", "data.damaged=drop"]
    cfg = settings("run", "train.steps=5", "checkpoint.every=5", *overrides)
    losses, _ = train(cfg, engine)
    assert losses == pytest.approx(one_rank(cfg)[0], rel=1e-11)
    whole, _ = train(settings("whole", "train.steps=5", "train.precision=float64"), engine)
    assert losses != pytest.approx(whole, rel=1e-3)


def test_damage_that_stops_ends_all_ranks(engine, settings, damaged):
    names = [Corpus(damaged).split(split)[0].id for split in ("train", "validation")]
    with pytest.raises(CollectiveError, match=f"video {names[1]}: .*checksum"):
        Trainer(settings("validation", f"data.corpus={damaged}"), engine)
    engine.barrier()


def test_each_node_gets_one_copy_and_reads_it(engine, settings, shared_folder, monkeypatch):
    disk = shared_folder / f"disk-{engine.name}"
    cfg = settings("run", "train.steps=4", "train.precision=float64", f"data.stage_dir={disk}")
    losses, _ = train(cfg, engine)
    assert losses == pytest.approx(one_rank(cfg)[0], rel=1e-11)
    copies = {path.name: path.stat().st_ino for path in disk.glob("*/*")}
    assert copies and copies.keys() <= {v.id for v in Corpus(cfg.data.corpus).split("train")}
    trainer = Trainer(settings("again", "train.steps=4", f"data.stage_dir={disk}"), engine)
    trainer.stage()
    assert {path.name: path.stat().st_ino for path in disk.glob("*/*")} == copies  # used again
    assert {v.path.parents[1] for v in trainer.samples.videos} == {disk}
    trainer.close()
    engine.barrier()


def test_a_node_without_space_ends_all_ranks(engine, settings, shared_folder, monkeypatch):
    import hpc_xvr.data.corpus.staging as staging

    if engine.rank == 1:  # as on the second of two nodes
        usage = shutil.disk_usage(shared_folder)._replace(free=10)
        monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    trainer = Trainer(settings("full", f"data.stage_dir={shared_folder / 'small'}"), engine)
    with pytest.raises(InputError, match=r"data\.stage_dir .* are needed"):
        trainer.run()
    trainer.close()
    engine.barrier()
