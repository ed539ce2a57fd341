"""Typed configuration: what is written is what runs, and every mistake is one clear line."""

import re
from pathlib import Path

import pytest

from hpc_xvr import config
from hpc_xvr.data.samples.slots import slots_of_rank
from hpc_xvr.errors import InputError

CONFIGS = sorted(Path(__file__).resolve().parents[2].glob("configs/**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_is_valid_and_survives_a_round_trip(path, tmp_path):
    loaded = config.load(path)
    (tmp_path / "again.yaml").write_text(config.dump(loaded))
    assert config.load(tmp_path / "again.yaml") == loaded


def test_later_overrides_win_and_values_are_typed(tmp_path):
    cfg = config.load(
        None,
        [
            "train.steps=5",
            "train.steps=7",
            "model.depths=[2, 4]",
            "simulate.size=[8, 16, 16]",
            "optim.clip_norm=0.5",
        ],
    )
    assert cfg.train.steps == 7
    assert cfg.model.depths == [2, 4]
    assert cfg.simulate.size == (8, 16, 16)
    assert cfg.optim.clip_norm == 0.5


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepz=5", ["train.stepz", "did you mean steps", "global_batch"]),
        ("trian.steps=5", ["trian", "train", "Keys of the config"]),
        ("train.steps=many", ["train.steps", "integer", "'many'"]),
        ("train.steps=0", ["train.steps", "greater than 0"]),
        ("train.precision=fp8", ["train.precision", "'float32'", "'bf16'"]),
        ("data.lr_frames=4", ["lr_frames must be odd"]),
        ("data.patch=30", ["patch 30", "multiple of scale 4"]),
        ("model.embed_dim=100", ["embed_dim 100", "heads 3"]),
        ("train.micro_batch=3", ["global_batch 10", "micro_batch 3"]),
        ("data.photons_log10=[5,2]", ["low <= high"]),
        ("simulate={light: [10, 1]}", ["light", "low <= high", "[10.0, 1.0]"]),
        ("train=3", ["train"]),
        ("train.steps", ["section.key=value"]),
        ("train.steps.more=3", ["train.steps"]),
    ],
)
def test_mistakes_say_where_what_and_what_is_allowed(override, parts):
    with pytest.raises(InputError) as problem:
        config.load(None, [override])
    text = str(problem.value)
    assert "\n" not in text
    assert f"--set {override}" in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: [", r"is not valid YAML \(line 1\)"),
        ("- a\n- b", "sections with keys"),
        ("train: {stepz: 1}", "unknown key train.stepz"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as problem:
        config.load(path)
    assert str(path) in str(problem.value)


def test_every_documented_mpirun_line_shares_its_batch():
    """`mpirun -n N hpc-xvr train configs/X.yaml` in README, help and configs must be accepted."""
    root = Path(__file__).parents[2]
    texts = [
        root / "README.md",
        *sorted((root / "hpc_xvr/cli").glob("*.py")),
        root / "jobs/quickstart.sh",
        *CONFIGS,
    ]
    lines = [
        m
        for path in texts
        for m in re.findall(r"mpirun -n (\d+)[^\n]* train (configs/\w+\.yaml)", path.read_text())
    ]
    assert len(lines) >= 4
    for ranks, name in lines:
        slots_of_rank(0, int(ranks), config.load(root / name).train.global_batch)


def test_edvr_is_refused_what_it_cannot_do():
    edvr = ["model.name=edvr", "model.depths=[1,1]", "model.embed_dim=8", "model.heads=2"]
    config.load(None, edvr)
    for override in ("data.scale=2", "data.patch=40", "model.base=detail", "validation.patch=20"):
        with pytest.raises(InputError, match=override.split("=")[0]):
            config.load(None, [*edvr, override])


def test_key_propagation_takes_either_scale_and_any_patch():
    for override in ("data.scale=2", "data.patch=40", "validation.patch=20"):
        config.load(None, ["model={name: key_propagation, depths: [2]}", override])
    with pytest.raises(InputError, match=r"model\.base"):
        config.load(None, ["model={name: key_propagation, depths: [2], base: bayes}"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        config.load(tmp_path / "none.yaml")
