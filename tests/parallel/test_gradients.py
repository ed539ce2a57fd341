"""How gradients travel: once a step, in the chosen format, and alike with both engines."""

import json

import horovod.torch.optimizer as hvd_optimizer
import pytest
import torch
import torch.distributed as td
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from hpc_xvr.config import Dist
from hpc_xvr.train.engine import Trainer


def losses(cfg, comm):
    trainer = Trainer(cfg, comm)
    assert trainer.run()
    trainer.close()
    comm.barrier()
    lines = [json.loads(line) for line in (cfg.run.dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_twenty_steps_with_horovod_equal_twenty_with_torch(engines, settings):
    """float32: the engines add the ranks' gradients in another order, nothing else."""
    steps = ["train.steps=20", "validation.every=20", "checkpoint.every=20"]
    a, b = (losses(settings(comm.name, *steps), comm) for comm in engines)
    assert len(a) == 20 and a[0] > 0
    assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_gradients_in_16_bits_train_nearly_alike(engine, settings, monkeypatch, kind):
    """16-bit gradients round by 2^-11 or 2^-8, and Adam divides most of that away again: after ten
    steps the losses agree to 2 %, but not to float32's rounding, which shows that they are used."""
    if (engine.name, kind) == ("horovod", "bf16"):
        pytest.skip("Horovod does not know bfloat16")
    steps = ["train.steps=10", "validation.every=10", "checkpoint.every=10", "optim.lr=1e-3"]
    plain = losses(settings("plain", *steps), engine)
    monkeypatch.setattr(engine, "_dist", Dist(compression=kind))
    packed = losses(settings(kind, *steps), engine)
    assert packed[0] == pytest.approx(plain[0], rel=1e-6), "before the first gradient"
    assert packed == pytest.approx(plain, rel=0.02)
    assert packed[-1] != pytest.approx(plain[-1], rel=1e-6)


@pytest.mark.parametrize("micro", [2, 1])
def test_gradients_travel_once_a_step_however_many_micro_batches(
    engine, settings, monkeypatch, micro
):
    """Every gradient once: Horovod asked for each parameter, DDP for each byte of its buckets."""
    cfg = settings("run", f"train.micro_batch={micro}", "train.steps=3", "validation.every=3")
    trainer = Trainer(cfg, engine)
    numbers = [0]
    if engine.name == "horovod":
        real = hvd_optimizer.allreduce_async_

        def counted(tensor, **options):
            numbers[0] += tensor.numel()
            return real(tensor, **options)

        monkeypatch.setattr(hvd_optimizer, "allreduce_async_", counted)
    else:

        def hook(state, bucket):
            numbers[0] += bucket.buffer().numel()
            return default_hooks.allreduce_hook(state, bucket)

        trainer.learner.net.register_comm_hook(None, hook)
    assert trainer.run()
    trainer.close()
    assert numbers[0] == 3 * sum(p.numel() for p in trainer.learner.model.parameters())
    engine.barrier()


def test_steps_that_do_not_log_send_nothing_but_gradients_and_one_flag(
    engines, settings, monkeypatch
):
    torch_engine = engines[1]
    cfg = settings("run", "train.steps=8", "train.log_every=8", "validation.every=8")
    trainer = Trainer(cfg, torch_engine)
    real, sizes = td.all_reduce, []

    def counted(tensor, *arguments, **options):
        sizes.append(tensor.numel())
        return real(tensor, *arguments, **options)

    monkeypatch.setattr(td, "all_reduce", counted)
    assert trainer.run()
    trainer.close()
    # A flag at the start and in each step, the loss once; then the scores of the model and of the
    # baselines.
    assert sizes[:10] == [1] * 10
    assert len(sizes) == 10 + 2
    torch_engine.barrier()


def test_the_size_of_a_bucket_is_settable(engines, settings, monkeypatch):
    """65,431 parameters of 4 bytes: six buckets of 50 kB, where the default is one."""
    buckets = {}
    for size in (None, 0.05):
        monkeypatch.setattr(engines[1], "_dist", Dist(bucket_mb=size))
        trainer = Trainer(
            settings(f"run-{size}", "train.steps=3", "validation.every=3"), engines[1]
        )
        seen = []

        def hook(state, bucket, seen=seen):
            seen.append(bucket.buffer().numel())
            return default_hooks.allreduce_hook(state, bucket)

        trainer.learner.net.register_comm_hook(None, hook)
        assert trainer.run()
        trainer.close()
        buckets[size] = len(seen) / 3
        engines[1].barrier()
    assert buckets[None] == 1
    assert buckets[0.05] >= 3
    assert torch.isfinite(trainer.learner.norm)
