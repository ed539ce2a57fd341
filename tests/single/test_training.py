"""The trainer on one rank: every model learns, the published schedule, averages, first weights."""

import json
import logging
import math
import time

import numpy as np
import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_xvr import checkpoint, log
from hpc_xvr.config import Optim, Train, check, load
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.samples.gaps import GapSamples
from hpc_xvr.data.samples.sample import window_sample
from hpc_xvr.data.samples.training import TrainingSamples
from hpc_xvr.data.simulate.corpus import simulate_corpus
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.workflow import evaluate
from hpc_xvr.factory.build import build_model
from hpc_xvr.factory.execution import resolve_precision
from hpc_xvr.factory.weights import read_weights
from hpc_xvr.reconstruction.material import CorpusRecording
from hpc_xvr.reconstruction.workflow import reconstruct_run
from hpc_xvr.train.engine import Trainer
from hpc_xvr.train.find_batch import find_batch
from hpc_xvr.train.nonfinite import SkippedSteps
from hpc_xvr.train.optim import MovingAverage, learning_rate
from hpc_xvr.train.progress import Progress
from hpc_xvr.train.share import Share
from hpc_xvr.train.stopping import Stopping
from hpc_xvr.train.validation import Validator
from support.disk import fill
from support.paths import PULSE

CPU = torch.device("cpu")


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


def validation_psnr(state):
    """What a validation of the pulse run must find, from the checkpoint and the definition of PSNR.

    Its 26 candidates are the frames 1 to 7 and 9 to 14 of two recordings; 4 of them, evenly.
    """
    cfg = check(state["config"], "checkpoint")
    model = build_model(cfg)
    model.load_state_dict(state["ema"])
    model.eval()
    videos = Corpus(cfg.data.corpus).split("validation")
    decibels = []
    for video, t in ((videos[0], 1), (videos[0], 10), (videos[1], 4), (videos[1], 14)):
        keys = (0, 8) if t < 8 else (8, 15)
        sample = window_sample(video, t, keys, cfg.data, "centre")
        inputs = [torch.as_tensor(sample[key])[None] for key in ("lr", "hr", "hr_offset")]
        bf16 = cfg.train.precision == "auto" and resolve_precision("auto", CPU) == "bf16"
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            frames = model(*inputs)
        ours = frames[0, frames.shape[1] // 2, 0].double().numpy()
        ours, truth = (np.round(255 * frame.clip(0, 1)) for frame in (ours, video.intensity(t)))
        decibels.append(10 * math.log10(255**2 / np.square(ours - truth).mean()))
    return np.mean(decibels)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_trains_and_is_validated(name, train):
    lines, state = train("train.steps=3", "validation.every=3", "checkpoint.every=3", *MODELS[name])
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    (validation,) = [line for line in lines if line["kind"] == "validation"]
    assert validation["psnr"] == pytest.approx(validation_psnr(state), abs=1e-3)
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
    assert trainer.progress.step == 2
    assert trainer.learner.optimizer.param_groups[0]["betas"] == (0.8, 0.95)


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


def test_lines_of_the_log_say_what_the_run_does(train, monkeypatch):
    """Steps of two micro-batches, each of which comes 0.05 s late."""
    real = Trainer.batches

    def late(self):
        for batch in real(self):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(Trainer, "batches", late)
    start = time.perf_counter()
    lines, state = train("train.steps=6", "train.micro_batch=2")
    elapsed = time.perf_counter() - start
    assert state["config"]["train"]["micro_batch"] == 2
    steps = [line for line in lines if line["kind"] == "train"]
    expected = [0.5 * 2e-4 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert [line["lr"] for line in steps] == pytest.approx(expected, abs=1e-7)
    assert sum(line["step_s"] for line in steps) < elapsed
    side = 32 // 4
    flops = 3 * build_model(check(state["config"], "checkpoint")).flops(side, side)
    for line in steps:
        assert 0.1 <= line["data_wait"] * line["step_s"] < line["step_s"]
        assert line["samples_per_s"] == pytest.approx(4 / line["step_s"])
        assert line["tflops_per_rank"] == pytest.approx(4e-12 * flops / line["step_s"])
        assert line["epoch"] == pytest.approx(line["step"] / 11)


def test_loss_and_gradient_norm_of_the_first_step_are_those_of_its_samples(train):
    """Of the fresh model, on slots 0 to 3 of step 0, without trainer or optimizer."""
    lines, state = train("train.steps=1")
    cfg = check(state["config"], "checkpoint")
    samples = TrainingSamples(cfg.data.corpus, cfg.data, "centre", 4, cfg.run.seed)
    four = [samples[0, slot] for slot in range(4)]
    batch = {name: torch.stack([torch.as_tensor(s[name]) for s in four]) for name in four[0]}
    torch.manual_seed(cfg.run.seed)
    model = build_model(cfg).train()
    output = model(batch["lr"], batch["hr"], batch["hr_offset"])
    loss = (output - batch["target"]).abs().sum() / (4 * 32 * 32)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    first = next(line for line in lines if line["kind"] == "train")
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)


class HostReads(TorchDispatchMode):
    """Notes each operation that hands a tensor's value to Python, for which a GPU must finish."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["windows", "gaps"])
def test_a_step_reads_nothing_back_from_the_device(tmp_path, pulse_corpus, kind):
    options = ["optim.clip_norm=1.0"] if kind == "windows" else [*GAPS, "optim.skip_norm=1.0"]
    trainer = resumed(tmp_path / "run", pulse_corpus, *options, resume=False)
    batches = trainer.batches()
    with HostReads() as reads:
        for step in range(2):
            trainer.train_step(step, batches)
    assert reads.seen == []
    with reads:
        assert float(trainer.learner.norm) > 0
    assert len(reads.seen) == 1, "it would have been seen"
    trainer.close()


GAPS = [
    "model={name: key_propagation, embed_dim: 16, depths: [1], heads: 1, motion_features: 8,"
    " frame_features: 8, step_features: 4}",
    "data.gaps=[2, 7]",
    "train.loss=charbonnier",
    "optim.clip_norm=0.05",
    "optim.ema=0.9",
]


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("precision", ["float32", "auto", "float64"])
def test_key_propagation_trained_validated_and_resumed(train, tmp_path, scale, precision):
    """Killed after four steps and resumed, it ends with the same weights, bit for bit."""
    options = [*GAPS, f"data.scale={scale}", f"train.precision={precision}", "data.patch=24"]
    options += ["simulate.lr_stream=false"]
    lines, whole = train(*options)
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [3, 6]
    for step in (5, 6):  # as if it had been killed between them and step 4
        checkpoint.path_of(tmp_path / "run/checkpoints", step).unlink(missing_ok=True)
    run = load(tmp_path / "run/config.yaml")
    trainer = Trainer(run, Comm(), resume=True)
    assert trainer.progress.step == 4
    assert trainer.run()
    trainer.close()
    again = checkpoint.load(checkpoint.path_of(tmp_path / "run/checkpoints", 6))
    for part in ("model", "ema"):
        for name, value in whole[part].items():
            assert torch.equal(again[part][name], value), name


def test_a_gap_s_loss_is_that_of_its_frames_and_of_the_carried_keys(train):
    lines, state = train(*GAPS, "train.steps=1", "train.carried_weight=0.3")
    cfg = check(state["config"], "checkpoint")
    samples = GapSamples(cfg.data.corpus, cfg.data, 4, cfg.run.seed)
    four = [samples[0, slot] for slot in range(4)]
    batch = {name: torch.stack([s[name] for s in four]) for name in four[0]}
    torch.manual_seed(cfg.run.seed)
    out = build_model(cfg).train()(batch["lr"], batch["hr"])

    def off(frames):
        return ((frames - batch["target"]) ** 2 + 1e-6).sqrt()

    loss = off(out.frames).mean()
    for carried in (out.forward, out.backward):
        loss = loss + 0.3 / 2 * off(carried).amin(2).mean()
    first = next(line for line in lines if line["kind"] == "train")
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_steps_with_a_gradient_above_skip_norm_change_nothing(train):
    _, one = train(*GAPS, "train.steps=1", "optim.skip_norm=1e-9", name="skipped")
    cfg = check(one["config"], "checkpoint")
    torch.manual_seed(cfg.run.seed)
    for name, value in build_model(cfg).state_dict().items():
        assert torch.equal(one["model"][name], value) and torch.equal(one["ema"][name], value)
    with pytest.raises(InputError, match="3 steps in a row without usable gradients"):
        train(*GAPS, "optim.skip_norm=1e-9", "train.nonfinite_limit=3", name="ended")
    _, taken = train(*GAPS, "train.steps=1", "optim.skip_norm=1e9", name="taken")
    assert not all(torch.equal(taken["model"][n], v) for n, v in one["model"].items())


def test_skipped_steps_are_counted_reported_and_end_the_run_after_too_many(monkeypatch):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(log.logger, "handlers", [handler])
    monkeypatch.setattr(log.logger, "propagate", False)
    skipped = SkippedSteps(Train(nonfinite_limit=3), Comm())
    for step, skip in enumerate((1, 1, 0, 1, 1), 1):
        skipped.count(torch.tensor(float(skip)))
        skipped.check(step)
    # Each time they are twice as many.
    assert [line.split(":")[0] for line in said] == ["step 1", "step 2", "step 5"]
    assert said[-1].endswith("4 steps so far")
    skipped.count(torch.tensor(1.0))
    with pytest.raises(InputError, match="step 6: 3 steps in a row"):
        skipped.check(6)


def test_skipped_steps_are_read_from_a_gpu_only_now_and_then():
    """Tensors on the device "meta" have no values: reading one is an error."""
    skipped = SkippedSteps(
        Train(nonfinite_limit=3, log_every=100), Comm(device=torch.device("meta"))
    )
    for step in (1, 2, 4, 5):
        skipped.check(step)
    with pytest.raises(RuntimeError, match="meta"):
        skipped.check(3)


def test_a_rank_s_share_is_its_part_of_the_global_batch_in_micro_batches():
    share = Share.of(Train(global_batch=12, micro_batch=2), rank=1, ranks=2)
    assert (share.samples, share.micro, share.micro_batches) == (6, 2, 3)
    assert Share.of(Train(global_batch=12), 0, 3) == Share(4, 4)
    with pytest.raises(InputError, match="global_batch 10 cannot be shared by 4 ranks"):
        Share.of(Train(global_batch=10), 0, 4)
    with pytest.raises(InputError, match="micro_batch 4 does not divide the 6 samples"):
        Share.of(Train(global_batch=12, micro_batch=4), 0, 2)


def test_what_is_due_when_and_what_a_checkpoint_says_of_it():
    progress = Progress(steps=7)
    due = []
    while not progress.finished:
        progress.step += 1
        due += [progress.step] if progress.due(3) else []
    assert due == [3, 6, 7]
    assert [progress.improves(psnr) for psnr in (20.0, 20.0, 21.0)] == [True, False, True]
    assert progress.best == {"step": 7, "psnr": 21.0}
    assert Progress.of(None, 5) == Progress(5)
    assert Progress.of({"step": 2}, 5) == Progress(5, 2), "one of an earlier version"
    state = {"step": 4, "best": {"step": 3, "psnr": 1.0}, "unvalidated": True}
    assert Progress.of(state, 5) == Progress(5, 4, {"step": 3, "psnr": 1.0}, True)


def test_making_a_trainer_writes_nothing_but_its_run_folder(tmp_path, pulse_corpus):
    """A missing corpus is the command's to simulate, a copy on the node's disk comes with `run`."""
    where = [f"run.dir={tmp_path}/run", "run.threads=1", f"data.stage_dir={tmp_path}/disk"]
    cfg = load(PULSE, [*where, f"data.corpus={tmp_path}/corpus"])
    assert cfg.simulate
    with pytest.raises(InputError, match=f"{tmp_path}/corpus"):
        Trainer(cfg, Comm())
    assert list(tmp_path.iterdir()) == []
    trainer = Trainer(load(PULSE, [*where, f"data.corpus={pulse_corpus}"]), Comm())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    trainer.close()


@pytest.mark.slow
def test_a_run_may_start_from_the_weights_of_another(train, tmp_path):
    _, first = train("train.steps=2")
    path = checkpoint.path_of(tmp_path / "run/checkpoints", 2)
    _, second = train(
        "train.steps=1", "optim.lr=1e-12", "optim.lr_min=0", f"train.weights={path}", name="second"
    )
    still = ["train.steps=1", "optim.lr=1e-12", "optim.lr_min=0"]
    _, folder = train(*still, f"train.weights={tmp_path / 'run'}", name="from-a-folder")
    for name, value in first["ema"].items():
        torch.testing.assert_close(second["model"][name], value, atol=1e-9, rtol=0)
        assert torch.equal(folder["model"][name], second["model"][name])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"train\.weights: .*empty: is not a run folder"):
        train(f"train.weights={tmp_path / 'empty'}", name="from-an-empty-one")
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


def test_a_run_is_done_at_its_target_and_goes_on_for_a_higher_one(tmp_path, pulse_corpus, hpc_xvr):
    run, often = tmp_path / "run", ["validation.every=1", "checkpoint.every=100"]
    trainer = resumed(run, pulse_corpus, *often, "train.target_psnr=1", resume=False)
    assert trainer.run() is True
    trainer.close()
    assert steps_on_disk(run) == [1], "saved, although neither its last step nor one of `every`"
    done = json.loads((run / "done.json").read_text())
    assert (done["step"], done["target_psnr"]) == (1, 1.0)
    start = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert start["kind"] == "start"
    assert 0 < start["staging_s"] < start["opening_s"] < 60
    common = [f"data.corpus={pulse_corpus}", f"run.dir={run}", "run.threads=1", *often]
    settings = [word for text in common for word in ("--set", text)]
    again = hpc_xvr("train", PULSE, "--resume", *settings, "--set", "train.target_psnr=1")
    assert "is done (step 1); nothing to do" in again.err
    higher = hpc_xvr("train", PULSE, "--resume", *settings, "--set", "train.target_psnr=90")
    assert "the target of 90 dB was not reached; best validation PSNR" in higher.err
    assert json.loads((run / "done.json").read_text())["step"] == 6
    assert "target_psnr" not in json.loads((run / "done.json").read_text())


def test_a_target_that_a_stopped_run_reached_is_seen_when_it_goes_on(tmp_path, pulse_corpus):
    run, often = tmp_path / "run", ["validation.every=2", "train.target_psnr=1"]
    trainer = resumed(run, pulse_corpus, *often, resume=False)
    trainer.stopping.reason = "by a test"
    assert trainer.run() is False
    trainer.close()
    trainer = resumed(run, pulse_corpus, *often)
    assert trainer.run() is True
    trainer.close()
    assert trainer.progress.step == 2
    assert read_weights(run, "best").step == 2


def test_a_target_without_recordings_to_measure_it_on_is_refused(tmp_path, pulse_corpus):
    folder = tmp_path / "corpus"
    about = load(PULSE).simulate.model_copy(update={"videos": 1, "splits": {"train": 1.0}})
    simulate_corpus(about, folder)
    with pytest.raises(InputError, match=r"target_psnr 30: .* has no validation recordings"):
        resumed(tmp_path / "run", folder, "train.target_psnr=30", resume=False)


def test_a_run_stops_before_its_time_is_over(tmp_path, pulse_corpus):
    age = time.time() - psutil.Process().create_time()
    stopping = Stopping(max_time=age + 15)
    endless = ["train.steps=100000", "validation.every=100000", "checkpoint.every=100000"]
    trainer = resumed(tmp_path / "run", pulse_corpus, *endless, stopping=stopping)
    assert trainer.run() is False
    trainer.close()
    assert time.time() - psutil.Process().create_time() < age + 10
    assert steps_on_disk(tmp_path / "run") == [trainer.progress.step]
    assert "max-time" in stopping.reason


def test_a_full_disk_stops_a_run_only_after_several_failures(
    small_disk, pulse_corpus, monkeypatch, capfd
):
    """Metrics and pictures cannot be written either; all of it is there again afterwards."""
    keep = ["checkpoint.every=1", "checkpoint.keep=1", "validation.every=4", "train.steps=8"]
    # A checkpoint of 100 kB, small pictures: all of it has to find room twice.
    keep += ["model.embed_dim=6", "model.up_features=4", "validation.patch=32"]
    log.setup()
    step = Trainer.train_step

    def filling(self, number, batches):
        if number == 3:
            self.checkpoints.finish()
            fill(small_disk)
        step(self, number, batches)
        self.checkpoints.wait()

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
    assert trainer.progress.step == 3
    assert trainer.run()
    trainer.close()
    text = (small_disk / "metrics.jsonl").read_text().splitlines()
    assert [x["step"] for x in map(json.loads, text) if x["kind"] == "train"] == [*range(1, 9)]


@pytest.mark.parametrize(("settings", "expected"), [([], 3), (["run.threads=2"], 2)])
def test_every_command_computes_with_the_threads_it_was_given(
    settings, expected, tmp_path, pulse_corpus, monkeypatch
):
    """OMP_NUM_THREADS holds where run.threads is not set, in training and with what it made."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr("hpc_xvr.train.find_batch._PATIENCE", 0.01)
    run = tmp_path / "run"
    fixed = [f"run.dir={run}", f"data.corpus={pulse_corpus}", "run.device=cpu", "train.steps=1"]
    cfg = load(PULSE, [*fixed, "evaluate.methods=[bicubic]", *settings])
    video = Corpus(pulse_corpus).split("test")[0].id

    def training():
        trainer = Trainer(cfg, Comm())
        assert trainer.run()
        trainer.close()

    commands = {
        "train": training,
        "find_batch": lambda: find_batch(cfg, Comm()),
        "evaluate": lambda: evaluate(cfg, [str(run)], Comm(), tmp_path / "evaluation"),
        "reconstruct": lambda: reconstruct_run(
            run, CPU, CorpusRecording(None, video), out=tmp_path / "out.tif"
        ),
    }
    before, used = torch.get_num_threads(), {}
    try:
        for name, command in commands.items():
            torch.set_num_threads(1)
            command()
            used[name] = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert used == dict.fromkeys(commands, expected)
    (rank,) = json.loads((run / "environment.json").read_text())["ranks"]
    assert rank["threads"] == expected


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
