"""The trainer on one rank: every model learns, the published schedule, averages, first weights."""

import json
import math
import time

import numpy as np
import psutil
import pytest
import torch

from hpc_xvr import checkpoint, log
from hpc_xvr.config import Optim, load
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import InputError
from hpc_xvr.factory.weights import read_weights
from hpc_xvr.train.engine import Trainer
from hpc_xvr.train.optim import MovingAverage, learning_rate
from hpc_xvr.train.stopping import Stopping
from hpc_xvr.train.validation import Validator
from support.disk import fill
from support.paths import PULSE


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


@pytest.mark.slow
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
    data = np.load(reference("centre.npz"))
    state = {k[6:]: torch.as_tensor(data[k]) for k in data if k.startswith("param/")}
    torch.save({"params": state}, tmp_path / "net_g.pth")
    _, ours = train(
        "train.steps=1",
        "optim.lr=1e-12",
        "optim.lr_min=0",
        "model.base=none",
        "model.embed_dim=12",
        "model.heads=3",
        "model.depths=[2]",
        "model.up_features=8",
        f"train.weights={tmp_path}/net_g.pth",
    )
    torch.testing.assert_close(
        ours["model"]["lr_conv.weight"], state["conv_first.weight"], atol=1e-9, rtol=0
    )


def resumed(run, corpus, *overrides, stopping=None, resume=True):
    """A trainer of the pulse run in `run`, not started yet."""
    fixed = [f"run.dir={run}", f"data.corpus={corpus}", "run.threads=1", "run.device=cpu"]
    return Trainer(load(PULSE, [*fixed, *overrides]), Comm(), resume, stopping)


def steps_on_disk(run):
    return [step for step, _ in checkpoint.list_checkpoints(run / "checkpoints")]


def test_the_best_checkpoint_stays_and_can_be_asked_for(train, tmp_path, monkeypatch):
    scores = iter([20.0, 30.0, 25.0, 29.0, 30.0])
    keys = ("psnr_bicubic", "psnr_detail", "ssim")
    monkeypatch.setattr(
        Validator, "run", lambda *_: {"psnr": next(scores), **dict.fromkeys(keys, 0.0)}
    )
    train("train.steps=5", "validation.every=1", "checkpoint.every=3", "checkpoint.keep=1")
    assert steps_on_disk(tmp_path / "run") == [5, 2], "saved for its score, and kept for it"
    best = read_weights(tmp_path / "run", "best")
    assert best.step == 2
    assert read_weights(tmp_path / "run").step == 5
    state = checkpoint.load(checkpoint.path_of(tmp_path / "run/checkpoints", 2))
    assert all(torch.equal(state["ema"][name], v) for name, v in best.weights.items())
    assert state["best"] == {"step": 2, "psnr": 30.0}


def test_a_run_asked_to_stop_saves_first_and_validates_when_it_goes_on(tmp_path, pulse_corpus):
    run = tmp_path / "run"
    trainer = resumed(run, pulse_corpus, "validation.every=2", resume=False)
    trainer.stopping.reason = "by a test"
    assert trainer.run() is False
    trainer.close()
    assert steps_on_disk(run) == [2]

    def lines(kind):
        text = (run / "metrics.jsonl").read_text().splitlines()
        return [line["step"] for line in map(json.loads, text) if line["kind"] == kind]

    assert lines("validation") == []
    assert not (run / "done.json").exists()
    trainer = resumed(run, pulse_corpus, "validation.every=2")
    assert trainer.run() is True
    trainer.close()
    assert lines("validation") == [2, 4, 6]
    assert lines("train") == [1, 2, 3, 4, 5, 6]
    done = json.loads((run / "done.json").read_text())
    assert done["step"] == 6
    assert abs(done["time"] - time.time()) < 60
    more = resumed(run, pulse_corpus, "train.steps=7")
    assert not (run / "done.json").exists(), "more steps are asked for"
    more.close()


def test_a_run_stops_before_its_time_is_over(tmp_path, pulse_corpus):
    age = time.time() - psutil.Process().create_time()
    stopping = Stopping(max_time=age + 15)
    endless = ["train.steps=100000", "validation.every=100000", "checkpoint.every=100000"]
    trainer = resumed(tmp_path / "run", pulse_corpus, *endless, stopping=stopping)
    assert trainer.run() is False
    trainer.close()
    assert time.time() - psutil.Process().create_time() < age + 10
    assert steps_on_disk(tmp_path / "run") == [trainer.done]
    assert "max-time" in stopping.reason


def test_a_full_disk_stops_a_run_only_after_several_failures(
    small_disk, pulse_corpus, monkeypatch, capfd
):
    """Metrics and pictures cannot be written either; all of it is there again afterwards."""
    keep = ["checkpoint.every=1", "checkpoint.keep=1", "validation.every=4", "train.steps=8"]
    keep += ["model.embed_dim=6", "model.up_features=4"]  # a checkpoint of 100 kB
    log.setup()
    step = Trainer.train_step

    def filling(self, number, batches):
        if number == 3:
            self.writer.finish()
            fill(small_disk)
        step(self, number, batches)
        self.writer.wait()

    monkeypatch.setattr(Trainer, "train_step", filling)
    trainer = resumed(small_disk, pulse_corpus, *keep)
    with pytest.raises(InputError, match="3 checkpoints in a row"):
        trainer.run()
    trainer.close()
    error = capfd.readouterr().err
    assert error.count("training goes on, the checkpoint of step 3 is intact") == 2
    assert "Traceback" not in error
    assert steps_on_disk(small_disk) == [3]
    assert not list(small_disk.rglob("*.partial*"))
    (small_disk / "filler").unlink()
    monkeypatch.setattr(Trainer, "train_step", step)
    trainer = resumed(small_disk, pulse_corpus, *keep)
    assert trainer.done == 3
    assert trainer.run()
    trainer.close()
    text = (small_disk / "metrics.jsonl").read_text().splitlines()
    assert [x["step"] for x in map(json.loads, text) if x["kind"] == "train"] == [*range(1, 9)]


def test_weights_that_do_not_fit_are_explained_key_by_key(train, tmp_path, pulse_corpus):
    train("train.steps=2")
    path = checkpoint.path_of(tmp_path / "run/checkpoints", 2)
    state = checkpoint.load(path)
    weights = state["model"]
    weights["another.weight"] = weights.pop("last_conv.bias")
    weights["last_conv.weight"] = weights["last_conv.weight"][:, :3]
    checkpoint.save(state, path)
    with pytest.raises(InputError) as problem:
        resumed(tmp_path / "run", pulse_corpus, "train.steps=3")
    for part in (
        "it lacks last_conv.bias (1,)",
        "unknown to this model, another.weight (1,)",
        "last_conv.weight is (1, 3, 3, 3) there, (1, 16, 3, 3) in this model",
        "run.dir",
    ):
        assert part in str(problem.value)
    assert "\n" not in str(problem.value)
