"""Both engines for real: the interface, and training that equals training on one rank."""

import pytest
import torch

import hpc_xvr.train.task as task
from hpc_xvr.checkpoint import load, path_of
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import CollectiveError, InputError
from hpc_xvr.train.engine import Trainer
from support.training import one_rank, train


def test_ranks_talk(engine):
    assert engine.size == 2
    assert engine.broadcast("from 0" if engine.is_root else None) == "from 0"
    assert engine.gather(engine.rank * 10) == [0, 10]
    total = engine.all_reduce(torch.tensor([1.0 + engine.rank, 5.0], dtype=torch.float64))
    assert total.tolist() == [3.0, 10.0]
    engine.barrier()


def test_a_flag_raised_on_one_rank_is_seen_by_all_one_call_later(engine):
    engine.any_lagged(False)
    assert engine.any_lagged(engine.rank == 1) is False
    assert engine.any_lagged(False) is True
    assert engine.any_lagged(False) is False


def test_an_input_error_of_rank_0_ends_all_ranks_alike(engine):
    def refuse():
        raise InputError("no such corpus")

    with pytest.raises(CollectiveError, match="no such corpus"):
        engine.on_root(refuse)
    assert engine.on_root(lambda: engine.rank) == 0


@pytest.mark.parametrize("micro", [2, 1])
@pytest.mark.parametrize(("precision", "rtol"), [("float64", 1e-11), ("float32", 2e-5)])
def test_same_losses_and_weights_as_one_rank(engine, settings, precision, rtol, micro):
    """Two ranks, with and without accumulation, against one rank.

    In float64 only the order of additions differs. In float32 each gradient carries rounding of
    about 1e-7; Adam's first steps divide it by its own size, so that weights whose gradient is
    nearly zero may move by a different fraction of the learning rate (2e-4): hence the absolute
    tolerance of 5 % of one step's length on weights, while losses agree to 2e-5.
    """
    cfg = settings(
        "run",
        f"train.precision={precision}",
        f"train.micro_batch={micro}",
        "train.steps=5",
        "checkpoint.every=5",
        "validation.every=5",
    )
    losses, state = train(cfg, engine)
    expected_losses, expected = one_rank(cfg)
    assert losses == pytest.approx(expected_losses, rel=rtol)
    atol = 1e-12 if precision == "float64" else 1e-5
    for part in ("model", "ema"):
        for name, value in expected[part].items():
            torch.testing.assert_close(state[part][name], value, rtol=rtol, atol=atol, msg=name)
    moved = [
        float((expected["model"][n] - expected["ema"][n]).abs().max()) for n in expected["model"]
    ]
    assert max(moved) > 1e-4  # the runs did train


def test_whole_gaps_on_two_ranks_as_on_one(engine, settings):
    """Both ranks draw the same gap in each step; only the order of additions differs."""
    cfg = settings(
        "run",
        "model={name: key_propagation, embed_dim: 16, depths: [1], heads: 1, motion_features: 8,"
        " frame_features: 8, step_features: 4}",
        "data.gaps=[2, 7]",
        "data.misregistration=0.5",
        "data.grey_mismatch=0.05",
        "data.hr_noise=poisson",
        "train.loss=charbonnier",
        "train.precision=float64",
        "optim.clip_norm=0.05",
        "optim.skip_norm=1.0",
        "train.steps=5",
        "checkpoint.every=5",
    )
    losses, state = train(cfg, engine)
    expected_losses, expected = one_rank(cfg)
    assert losses == pytest.approx(expected_losses, rel=1e-11)
    for part in ("model", "ema"):
        for name, value in expected[part].items():
            torch.testing.assert_close(state[part][name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_a_run_of_two_ranks_goes_on_with_one(engine, settings):
    """Four steps on two ranks and two on one see the samples of six on one."""
    cfg = settings("run", "train.precision=float64", "train.steps=6", "checkpoint.every=2")
    expected_losses, expected = one_rank(cfg)
    trainer = Trainer(cfg, engine)
    real_step = trainer.train_step

    def stop_in_time(step, batches):
        real_step(step, batches)
        if step == 2:  # as a signal would; agreed one step later
            trainer.stopping.reason = "by a test"

    trainer.train_step = stop_in_time
    assert trainer.run() is False
    trainer.close()
    assert trainer.progress.step == 4
    engine.barrier()
    if engine.is_root:
        losses, state = train(cfg, Comm(), resume=True)
        assert losses == pytest.approx(expected_losses, rel=1e-11)
        for name, value in expected["model"].items():
            torch.testing.assert_close(state["model"][name], value, rtol=1e-11, atol=1e-12)
    engine.barrier()


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(engine, settings, monkeypatch):
    cfg = settings("run", "train.steps=4", "optim.ema=0", "checkpoint.every=1")
    real, calls = task._LOSSES["l1"], [0]

    def poisoned(output, target):
        calls[0] += 1
        factor = float("nan") if engine.rank == 1 and calls[0] == 2 else 1.0
        return real(output, target) * factor

    monkeypatch.setitem(task._LOSSES, "l1", poisoned)
    train(cfg, engine)
    state = load(path_of(cfg.run.dir / "checkpoints", 4))
    assert all(torch.isfinite(v).all() for v in state["model"].values())
    steps = {float(s["step"]) for s in state["optimizer"]["state"].values()}
    assert steps == {3.0}, "four steps, one of them skipped"


def test_too_many_such_steps_in_a_row_end_the_run_on_all_ranks(engine, settings, monkeypatch):
    cfg = settings("run", "train.steps=6", "train.nonfinite_limit=3")
    diverged = {"l1": lambda output, target: (output * float("nan")).mean()}
    monkeypatch.setattr(task, "_LOSSES", diverged)
    trainer = Trainer(cfg, engine)
    with pytest.raises(InputError, match="step 3: 3 steps in a row"):
        trainer.run()
    trainer.close()
    engine.barrier()


def test_a_batch_that_ranks_cannot_share_is_refused(engine, settings):
    with pytest.raises(InputError, match=r"global_batch 5.*2 ranks"):
        Trainer(settings("run", "train.global_batch=5"), engine)
