"""Weights in one file: what comes out of a run, and what is refused of files from others."""

import json
import os

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from hpc_xvr import checkpoint
from hpc_xvr.cli import cli
from hpc_xvr.config import load
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import InputError
from hpc_xvr.factory.build import build_model
from hpc_xvr.factory.weights import export_weights, initial_weights, model_of_run
from hpc_xvr.reconstruction.material import CorpusRecording
from hpc_xvr.reconstruction.workflow import reconstruct_run
from hpc_xvr.train.engine import Trainer
from support.disk import fill
from support.paths import PULSE


@pytest.fixture(scope="module")
def run(tmp_path_factory, pulse_corpus):
    folder = tmp_path_factory.mktemp("export") / "run"
    fixed = [f"run.dir={folder}", f"data.corpus={pulse_corpus}", "run.threads=1", "run.device=cpu"]
    trainer = Trainer(load(PULSE, [*fixed, "train.steps=3", "optim.lr=0.01"]), Comm())
    assert trainer.run()
    trainer.close()
    return folder


def newest(run):
    return checkpoint.load(checkpoint.path_of(run / "checkpoints", 3))


@pytest.mark.parametrize("raw", [False, True])
def test_the_file_holds_the_weights_and_the_config(raw, run, tmp_path):
    out = tmp_path / "m.safetensors"
    options = ["--raw"] if raw else []
    done = CliRunner().invoke(cli, ["export", str(run), "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    assert "step 3, 65,431 numbers" in done.output
    expected = newest(run)["model" if raw else "ema"]
    weights = safetensors.torch.load_file(out)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    model, config, step = model_of_run(out)
    assert step == 3
    assert config == load(run / "config.yaml")
    assert not model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
    other = build_model(config)
    initial_weights(other, out)  # config key train.weights
    assert torch.equal(other.state_dict()["last_conv.weight"], expected["last_conv.weight"])
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_it_takes_the_place_of_the_run_folder(run, tmp_path, pulse_corpus):
    out = tmp_path / "m.safetensors"
    export_weights(run, out)
    single = checkpoint.path_of(run / "checkpoints", 3)
    models = [model_of_run(source)[0].state_dict() for source in (run, out, single)]
    for other in models[1:]:
        assert all(torch.equal(other[name], value) for name, value in models[0].items())
    video = next((pulse_corpus / "videos").iterdir()).name
    source = CorpusRecording(None, video)
    movie = reconstruct_run(out, torch.device("cpu"), source, out=tmp_path / "movie.h5")
    assert movie.stat().st_size > 16 * 64 * 64


def written(path, weights, facts):
    safetensors.torch.save_file(weights, path, facts)


def test_what_is_wrong_with_a_file_is_one_line(run, tmp_path):
    good = tmp_path / "good.safetensors"
    export_weights(run, good)
    weights = safetensors.torch.load_file(good)
    with safetensors.safe_open(good, "pt") as file:
        facts = file.metadata()
    bad = tmp_path / "bad.safetensors"
    config = json.loads(facts["config"])

    def changed(section, **values):
        return facts | {"config": json.dumps(config | {section: config[section] | values})}

    cases = [
        (lambda: bad.write_bytes(good.read_bytes()[:-100]), "truncated"),
        (lambda: bad.write_bytes(b"\xff" * 400), "truncated"),
        (lambda: bad.write_bytes(b""), "truncated"),
        (lambda: written(bad, weights, None), "not written by hpc-xvr export"),
        (lambda: written(bad, {"w": weights["last_conv.bias"]}, facts), "it lacks"),
        (lambda: written(bad, weights, changed("model", embed_dim=12)), "of other shapes"),
        (lambda: written(bad, weights, changed("model", embed_dim=6000)), "of other shapes"),
        (
            lambda: written(bad, weights, changed("model", embed_dim=2_400_000)),
            "embed_dim: .* 8192",
        ),
        (
            lambda: written(bad, weights, changed("model", depths=[10**9])),
            "depths are 1,000,000,000",
        ),
        (lambda: written(bad, weights, changed("model", heads="many")), "model.heads"),
        (lambda: written(bad, weights, changed("model", secret=1)), "unknown key model.secret"),
        (
            lambda: written(bad, weights, facts | {"config": "{" * 9}),
            "not written by hpc-xvr export",
        ),
        (lambda: written(bad, weights, facts | {"config": "[" * 99_999}), "not written by hpc-xvr"),
        (lambda: written(bad, weights, facts | {"step": "three"}), "not written by hpc-xvr export"),
        (lambda: written(bad, weights, facts | {"config": "7"}), "bad.safetensors"),
    ]
    for make, message in cases:
        make()
        for use in (model_of_run, lambda path: initial_weights(build_model(load(PULSE)), path)):
            with pytest.raises(InputError, match=message) as problem:
                use(bad)
            assert "\n" not in str(problem.value)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "step-000000003.pt"])
@pytest.mark.parametrize("checksummed", [True, False])
def test_a_pickle_from_others_does_not_run(name, checksummed, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    path = tmp_path / name
    if checksummed:
        checkpoint.save({"step": 3, "model": {"w": Bomb()}, "config": {}}, path)
    else:
        torch.save(Bomb(), path)
    for use in (model_of_run, lambda path: initial_weights(build_model(load(PULSE)), path)):
        with pytest.raises(InputError):
            use(path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_is_valid_but_not_of_training_says_what_it_lacks(tmp_path):
    path = tmp_path / "m.pt"
    checkpoint.save({"step": 3, "model": {}}, path)
    with pytest.raises(InputError, match="has no config"):
        model_of_run(path)
    checkpoint.save({"step": 3, "model": {"lr_conv.bias": "text"}, "config": {}}, path)
    with pytest.raises(InputError, match="bias is not a tensor there"):
        model_of_run(path)


def test_nothing_half_written_and_no_other_kind_of_file(run, tmp_path, small_disk):
    with pytest.raises(InputError, match=r"must end in .safetensors"):
        export_weights(run, tmp_path / "m.pt")
    fill(small_disk)
    with pytest.raises(InputError, match="No space left"):
        export_weights(run, small_disk / "m.safetensors")
    assert [p.name for p in small_disk.iterdir()] == ["filler"]
