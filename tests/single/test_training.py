"""The trainer on one rank: every model learns, the published schedule, averages, first weights."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import PULSE

from hpc_xvr import checkpoint
from hpc_xvr.config import Optim, load
from hpc_xvr.dist.comm import Comm
from hpc_xvr.errors import InputError
from hpc_xvr.train.engine import Trainer
from hpc_xvr.train.optim import MovingAverage, learning_rate


@pytest.fixture
def train(tmp_path, pulse_corpus):
    """train(*overrides, name="run") -> (metrics lines, last checkpoint) of a pulse run."""

    def run(*overrides, name="run"):
        folder = tmp_path / name
        cfg = load(
            PULSE,
            [
                f"run.dir={folder}",
                f"data.corpus={pulse_corpus}",
                "run.threads=1",
                "run.device=cpu",
                *overrides,
            ],
        )
        trainer = Trainer(cfg, Comm())
        assert trainer.run()
        trainer.close()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        path = checkpoint.path_of(folder / "checkpoints", cfg.train.steps)
        return lines, checkpoint.load(path)

    return run


MODELS = {
    "published": ["model.base=none"],
    "sequence": ["model.output=sequence", "data.lr_frames=5"],
    "adaptive": ["model.base=adaptive"],
    "bf16": ["train.precision=auto", "train.recompute=mlp"],
    "recomputed": ["train.recompute=blocks", "model.attention=explicit"],
    "recorded": ["data.lr_source=recorded"],
    "edvr": [
        "model.name=edvr",
        "model.embed_dim=8",
        "model.heads=2",
        "model.depths=[1,1]",
        "data.lr_frames=3",
        "model.base=none",
    ],
    "edvr_stf": [
        "model.name=edvr_stf",
        "model.embed_dim=8",
        "model.heads=2",
        "model.depths=[1,1]",
        "model.base=none",
    ],
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_trains_and_is_validated(name, train):
    lines, state = train("train.steps=3", "validation.every=3", "checkpoint.every=3", *MODELS[name])
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    (validation,) = [line for line in lines if line["kind"] == "validation"]
    assert validation["psnr"] > 3
    assert validation["frames"] == 4
    moments = [s["exp_avg"].abs().max() for s in state["optimizer"]["state"].values()]
    still = sum(float(m) == 0 for m in moments)
    assert still < len(moments) / 2, "most parameters received a gradient"


def test_training_reduces_the_loss(train):
    """Without any base the network must first find the picture's mean and then its structure."""
    lines, _ = train(
        "model.base=none",
        "train.steps=60",
        "optim.lr=0.002",
        "checkpoint.every=60",
        "validation.every=60",
        "data.noise=none",
    )
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert np.mean(losses[-10:]) < 0.4 * losses[0]


def test_the_logged_loss_is_the_mean_of_its_steps_whatever_lies_between(train):
    def losses(*overrides, name):
        lines, _ = train("train.steps=8", *overrides, name=name)
        return [line["loss"] for line in lines if line["kind"] == "train"]

    each = losses(name="each")
    fours = losses("train.log_every=4", "validation.every=3", name="fours")
    assert fours == pytest.approx([np.mean(each[:4]), np.mean(each[4:])], rel=1e-5)


def test_a_resumed_run_uses_the_optimizer_settings_of_its_config(train, tmp_path, pulse_corpus):
    train("train.steps=2")
    cfg = load(
        PULSE,
        [
            f"run.dir={tmp_path}/run",
            f"data.corpus={pulse_corpus}",
            "run.threads=1",
            "train.steps=3",
            "optim.betas=[0.8, 0.95]",
        ],
    )
    trainer = Trainer(cfg, Comm(), resume=True)
    trainer.close()
    assert trainer.done == 2
    assert trainer.optimizer.param_groups[0]["betas"] == (0.8, 0.95)


def test_the_learning_rate_is_one_cosine_from_the_published_values():
    optim = Optim()
    assert learning_rate(optim, 0, 30_000, 10) == 2e-4
    assert learning_rate(optim, 15_000, 30_000, 10) == pytest.approx((2e-4 + 1e-7) / 2)
    assert learning_rate(optim, 30_000, 30_000, 10) == pytest.approx(1e-7)
    warm = Optim(warmup=9, lr_scaling="sqrt")
    assert learning_rate(warm, 0, 10**9, 40) == pytest.approx(4e-4 / 10)
    assert learning_rate(warm, 9, 10**9, 40) == pytest.approx(4e-4)
    assert learning_rate(Optim(lr_scaling="linear"), 0, 100, 40) == pytest.approx(8e-4)


def test_the_moving_average_follows_its_formula():
    model = torch.nn.Linear(3, 2)
    average = MovingAverage(model, 0.9)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    average.update()
    average.update()
    torch.testing.assert_close(average.mean["weight"], first + (1 - 0.9**2))


def test_lines_of_the_log_say_what_the_run_does(train):
    lines, state = train("train.steps=6", "train.micro_batch=2")
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    expected = [0.5 * 2e-4 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert rates == pytest.approx(expected, abs=1e-7)
    assert state["config"]["train"]["micro_batch"] == 2
    for key in ("samples_per_s", "data_wait", "step_s", "grad_norm", "tflops_per_rank"):
        assert all(line[key] >= 0 for line in lines if line["kind"] == "train"), key


def test_a_run_may_start_from_the_weights_of_another(train, tmp_path):
    _, first = train("train.steps=2")
    path = checkpoint.path_of(tmp_path / "run/checkpoints", 2)
    _, second = train(
        "train.steps=1", "optim.lr=1e-12", "optim.lr_min=0", f"train.weights={path}", name="second"
    )
    for name, value in first["ema"].items():
        torch.testing.assert_close(second["model"][name], value, atol=1e-9, rtol=0)
    with pytest.raises(InputError, match="another architecture"):
        train("model.embed_dim=12", f"train.weights={path}", name="third")


def test_a_run_may_start_from_the_authors_weights(train, tmp_path, reference):
    data = np.load(reference("centre_small.npz"))
    state = {k[6:]: torch.as_tensor(data[k]) for k in data if k.startswith("param/")}
    torch.save({"params": state}, tmp_path / "net_g.pth")
    _, ours = train(
        "train.steps=1",
        "optim.lr=1e-12",
        "optim.lr_min=0",
        "model.base=none",
        "model.depths=[2,2]",
        "model.up_features=64",
        f"train.weights={tmp_path}/net_g.pth",
    )
    torch.testing.assert_close(
        ours["model"]["lr_conv.weight"], state["conv_first.weight"], atol=1e-9, rtol=0
    )
