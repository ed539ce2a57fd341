"""Faster and smaller ways to run the model compute the same; what cannot work is refused."""

import subprocess
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from hpc_xvr.config import load
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import InputError
from hpc_xvr.factory import execution
from hpc_xvr.factory.build import build_model
from hpc_xvr.factory.execution import prepare
from hpc_xvr.log import logger
from hpc_xvr.model.attention import window_attention
from hpc_xvr.model.edvr import EDVR
from hpc_xvr.model.swin import add_norm
from hpc_xvr.model.xvr import SwinXVR
from hpc_xvr.reconstruction.pipeline import as_method
from hpc_xvr.train.find_batch import Trial, _expected, _fitting, _levelled, find_batch
from support.paths import PULSE

CPU = torch.device("cpu")
SMALL = dict(embed_dim=24, depths=(2, 2), heads=3, window=4, up_features=8)


def has_compiler():
    try:
        execution._check_compiler("", "", CPU)
    except InputError:
        return False
    return True


needs_compiler = pytest.mark.skipif(
    not has_compiler(), reason="needs a C++ compiler, and PyTorch in a folder without a space"
)


def pair(h, w, batch=1, frames=3):
    g = torch.Generator().manual_seed(h)
    lr = torch.rand(batch, frames, 1, h, w, generator=g)
    return lr, torch.rand(batch, 2, 1, 4 * h, 4 * w, generator=g)


def gradients(model, lr, hr):
    """Output and gradients with the same random numbers in stochastic depth each time."""
    torch.manual_seed(3)
    out = model(lr, hr)
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def saved_bytes(model, lr, hr):
    """Bytes that autograd keeps for the backward pass, weights aside."""
    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(lr, hr)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["mlp", "blocks"])
def test_recomputing_activations_changes_no_gradient(kind):
    torch.manual_seed(0)
    model = SwinXVR(drop_path=0.4, **SMALL).double()
    lr, hr = (t.double() for t in pair(9, 13, batch=2))
    plain = gradients(model, lr, hr)
    execution.recompute_activations(model, kind)
    for ours, exact in zip(gradients(model, lr, hr), plain, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_recomputing_activations_keeps_fewer_of_them():
    torch.manual_seed(0)
    model = SwinXVR(embed_dim=24, depths=(6,), heads=3, window=4, up_features=8)
    lr, hr = pair(16, 16)
    kept = {}
    for kind in ("none", "mlp", "blocks"):
        execution.recompute_activations(model, kind)
        kept[kind] = saved_bytes(model, lr, hr)
    features = kept["blocks"]  # those of the key frames' convolutions stay
    assert kept["mlp"] < 0.9 * kept["none"]
    assert features < 0.7 * kept["mlp"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", ["parts", "blocks"])
def test_a_compiled_model_computes_the_same(kind):
    options = dict(embed_dim=16, depths=(2,), heads=1, window=4, up_features=4, drop_path=0.0)
    torch.manual_seed(0)
    model, other = SwinXVR(**options), SwinXVR(**options)
    other.load_state_dict(model.state_dict())
    execution.compile_model(other, kind, CPU)
    block = other.stages[0].blocks[0]
    assert block.add_norm is not add_norm if kind == "parts" else block._compiled_call_impl
    lr, hr = pair(4, 8, batch=2)
    for ours, exact in zip(gradients(other, lr, hr), gradients(model, lr, hr), strict=True):
        scale = float(exact.abs().max()) + 1e-3
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4 * scale)
    if kind == "parts":  # what inference uses: one shape after the other
        for size in ((4, 8), (5, 7), (8, 8)):
            lr, hr = pair(*size)
            with torch.inference_mode():
                torch.testing.assert_close(other(lr, hr), model(lr, hr), rtol=1e-4, atol=1e-5)
                with torch.autocast("cpu", torch.bfloat16):
                    torch.testing.assert_close(other(lr, hr), model(lr, hr), rtol=0, atol=5e-3)


@needs_compiler
def test_flex_attention_computes_the_same_in_inference():
    torch.manual_seed(0)
    qkv = torch.randn(3 * 32, 3 * 2 * 16)
    bias = torch.randn(1, 2, 32, 32)
    with torch.inference_mode():
        explicit = window_attention(qkv, [bias], [3], kind="explicit")
        flex = window_attention(qkv, [bias], [3], kind="flex")
    torch.testing.assert_close(flex, explicit, rtol=1e-4, atol=1e-5)


def test_features_of_a_key_frame_are_made_once_for_both_its_gaps(monkeypatch):
    torch.manual_seed(0)
    model = SwinXVR(**SMALL).eval()
    made = []
    features = model.hr_features
    monkeypatch.setattr(model, "hr_features", lambda hr: made.append(1) or features(hr))
    method, _ = as_method(model)
    lr, hr = pair(8, 8)
    offset = torch.tensor([[-1.0, 1.0]])
    with torch.inference_mode():
        first = method({"lr": lr, "hr": hr, "hr_offset": offset})
        method({"lr": lr.flip(1), "hr": hr, "hr_offset": offset})
        assert len(made) == 2
        following = torch.cat((hr[:, 1:], torch.rand_like(hr[:, 1:])), dim=1)
        second = method({"lr": lr, "hr": following, "hr_offset": offset})
        assert len(made) == 3
        torch.testing.assert_close(first, model(lr, hr, offset), rtol=0, atol=1e-6)
        torch.testing.assert_close(second, model(lr, following, offset), rtol=0, atol=1e-6)


def test_precision_auto_takes_what_the_device_has(monkeypatch):
    monkeypatch.setattr(execution, "cpu_has_bf16", lambda: True)
    assert execution.resolve_precision("auto", CPU) == "bf16"
    assert execution.resolve_precision("float64", CPU) == "float64"
    monkeypatch.setattr(execution, "cpu_has_bf16", lambda: False)
    assert execution.resolve_precision("auto", CPU) == "float32"
    with pytest.raises(InputError, match=r"train\.precision bf16: .* set it to float32"):
        execution.resolve_precision("bf16", CPU)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.attention=flex"], r"model\.attention flex: .*backward.* set it to auto"),
        (["model.attention=flash"], r"model\.attention.*'auto', 'fused', 'flex' or 'explicit'"),
        (["train.compile=all"], r"train\.compile.*'none', 'parts' or 'blocks'"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides, words):
    with pytest.raises(InputError, match=words):
        cfg = load(PULSE, overrides)
        prepare(build_model(cfg), cfg, CPU, training=True)


def test_a_run_from_another_machine_is_used_without_what_this_one_lacks(monkeypatch, caplog):
    """Training refuses such settings; inference warns and goes on."""
    monkeypatch.setattr(execution, "cpu_has_bf16", lambda: False)

    def no_compiler(setting, otherwise, device):
        raise InputError(f"{setting}: found no C++ compiler; {otherwise}")

    monkeypatch.setattr(execution, "_check_compiler", no_compiler)
    monkeypatch.setattr(logger, "propagate", True)
    settings = ["train.precision=bf16", "train.compile=parts", "model.attention=flex"]
    cfg = load(PULSE, settings)
    with pytest.raises(InputError, match=r"train\.precision"):
        prepare(build_model(cfg), cfg, CPU, training=True)
    model = build_model(cfg)
    assert prepare(model, cfg, CPU) == "float32"
    assert {block.attn.kind for block in model.stages[0].blocks} == {"auto"}
    assert model.stages[0].blocks[0].add_norm is add_norm
    for word in ("train.precision", "train.compile", "model.attention"):
        assert word in caplog.text


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_a_model_is_used_in_the_type_it_was_trained_in(name):
    cfg = load(PULSE, [f"train.precision={name}"])
    model = build_model(cfg)
    assert prepare(model, cfg, CPU) == name
    assert {p.dtype for p in model.parameters()} == {getattr(torch, name)}


def test_edvr_has_no_blocks_to_compile_or_recompute():
    model = EDVR(features=8, groups=2, extract_blocks=1, reconstruct_blocks=1)
    with pytest.raises(InputError, match=r"train\.compile blocks: only swin_xvr"):
        execution.compile_model(model, "blocks", CPU)
    with pytest.raises(InputError, match=r"train\.recompute mlp: only swin_xvr"):
        execution.recompute_activations(model, "mlp")
    execution.recompute_activations(model, "none")


def test_compile_where_pytorch_cannot_is_refused(monkeypatch):
    """Its command lines are not quoted."""
    monkeypatch.setattr(torch, "__file__", "/a folder/torch/__init__.py")
    with pytest.raises(InputError, match=r"a space in its name, as /a folder/torch has; .* none"):
        execution.compile_model(SwinXVR(**SMALL), "parts", CPU)


@needs_compiler
@pytest.mark.slow
def test_compile_without_a_compiler_is_refused_before_anything_starts(tmp_path, pulse_corpus):
    settings = [f"run.dir={tmp_path}/run", f"data.corpus={pulse_corpus}", "train.compile=parts"]
    out = subprocess.run(
        [sys.executable, "-m", "hpc_xvr", "train", PULSE]
        + [word for s in settings for word in ("--set", s)],
        env={"PATH": "/nowhere", "CXX": "/nowhere/g++", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 2, out.stderr
    assert "train.compile parts: found no C++ compiler" in out.stderr
    assert not (tmp_path / "run").exists()


def test_find_batch_shows_what_each_size_costs_and_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hpc_xvr.train.find_batch._PATIENCE", 2.0)
    cfg = load(PULSE, [f"run.dir={tmp_path}/run", "data.corpus=nowhere", "run.threads=1"])
    chosen = find_batch(cfg, Comm())
    table = capsys.readouterr().out
    assert "samples/s" in table and "<- take this" in table
    assert chosen.memory > 0 and chosen.speed > 0
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="without mpirun"):
        find_batch(cfg, Comm(0, 2))


def test_find_batch_foresees_memory_and_sees_when_speed_no_longer_grows():
    trials = [Trial(1, 300, 10.0), Trial(2, 400, 18.0), Trial(4, 600, 30.0)]
    assert _expected(trials, 8) == 1000
    assert _fitting(trials, 1050) == 8
    assert not _levelled(trials)
    assert _levelled([*trials, Trial(8, 1000, 30.2), Trial(16, 1800, 29.0)])
