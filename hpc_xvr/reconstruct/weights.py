"""From a config or a run folder to a model with its trained weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_xvr import checkpoint
from hpc_xvr.config import Config, load
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger
from hpc_xvr.model.edvr import EDVR, EDVRSTF
from hpc_xvr.model.xfusion import load_xfusion
from hpc_xvr.model.xvr import SwinXVR
from hpc_xvr.reconstruct import speed
from hpc_xvr.reconstruct.pipeline import Method


def build_model(config: Config) -> nn.Module:
    """The model that the sections `model` and `data` describe, with fresh weights."""
    m, data = config.model, config.data
    if m.name == "swin_xvr":
        return SwinXVR(
            lr_frames=data.lr_frames,
            output=m.output,
            base=m.base,
            scale=data.scale,
            embed_dim=m.embed_dim,
            depths=tuple(m.depths),
            heads=m.heads,
            window=m.window,
            mlp_ratio=m.mlp_ratio,
            drop_path=m.drop_path,
            up_features=m.up_features,
            attention=m.attention,
        )
    kind = EDVR if m.name == "edvr" else EDVRSTF
    return kind(
        lr_frames=data.lr_frames,
        features=m.embed_dim,
        groups=m.heads,
        extract_blocks=m.depths[0],
        reconstruct_blocks=m.depths[1],
        up_features=m.up_features,
    )


def prepare(model: nn.Module, config: Config, device: torch.device, training: bool = False) -> str:
    """Move a model to `device`, set up as the config says; returns the precision to run it in.

    A run may be used on another machine than it was trained on: where that one cannot do what the
    config says, inference goes on without it, with a warning.

    Raises:
        InputError: in training, settings that this device, model or machine cannot do.
    """
    train = config.train

    def attempt(action: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        try:
            return action()
        except InputError as problem:
            if training:
                raise
            logger.warning("%s (going on without it)", str(problem).split(";")[0])
            return otherwise()

    precision = attempt(lambda: speed.resolve_precision(train.precision, device), lambda: "float32")
    attempt(
        lambda: speed.check_attention(config.model.attention, device, training),
        lambda: speed.set_attention(model, "auto"),
    )
    torch.set_float32_matmul_precision("high" if train.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = train.tf32
    if training:
        speed.recompute_activations(model, train.recompute)
    attempt(lambda: speed.compile_model(model, train.compile, device), lambda: None)
    model.to(device, torch.float64 if precision == "float64" else torch.float32)
    return precision


def model_of_run(run: Path) -> tuple[nn.Module, Config, int]:
    """Model (averaged weights, eval mode), config and step of a run's newest valid checkpoint.

    Raises:
        InputError: no run folder, or none of its checkpoints is valid.
    """
    if not (run / "config.yaml").exists():
        raise InputError(
            f"{run}: no run folder (it has no config.yaml); make one with hpc-xvr train"
        )
    config = load(run / "config.yaml")
    for path, state in checkpoint.newest_valid(run / "checkpoints"):
        if isinstance(state, checkpoint.CorruptCheckpoint):
            logger.warning("skipped: %s", state)
            continue
        model = build_model(config)
        load_weights(model, state, path)
        return model.eval(), config, state["step"]
    raise InputError(
        f"{run}: has no valid checkpoint yet; let hpc-xvr train write one (checkpoint.every)"
    )


def load_weights(model: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights, averaged ones where there are any, into `model`.

    Raises:
        InputError: the checkpoint is of another architecture; says which parameters differ.
    """
    weights = state.get("ema") or state["model"]
    problem = mismatch(model.state_dict(), weights)
    if problem:
        raise InputError(
            f"checkpoint {path} is of another architecture: {problem}; use the "
            "model section of the config it was trained with"
        )
    model.load_state_dict(weights)


def mismatch(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str | None:
    """How two state dicts differ in names or shapes, in a few words; None if they do not."""
    for name, value in ours.items():
        if name not in theirs:
            return f"it lacks {name} {tuple(value.shape)}"
        if theirs[name].shape != value.shape:
            return (
                f"{name} is {tuple(theirs[name].shape)} there, {tuple(value.shape)} in this model"
            )
    extra = next((name for name in theirs if name not in ours), None)
    return f"it has {extra}, which this model lacks" if extra else None


def initial_weights(model: nn.Module, path: Path) -> None:
    """Start from a checkpoint of ours or of the authors' program (config key train.weights).

    Raises:
        InputError: unreadable, or of another architecture.
    """
    try:
        state = checkpoint.load(path)
    except checkpoint.CorruptCheckpoint:
        try:
            theirs = load_xfusion(path)
        except ValueError as error:
            raise InputError(f"train.weights: {error}") from None
        state = {"model": theirs.state_dict()}
    load_weights(model, state, path)


def _on_whole_blocks(model: EDVR, lr: Tensor, hr: Tensor, hr_offset: Tensor) -> Tensor:
    """EDVR halves its grid twice: frames are continued to multiples of 4 and cut off again."""
    scale = hr.shape[-1] // lr.shape[-1]
    bottom, right = (-n % 4 for n in lr.shape[-2:])

    def continued(x: Tensor, factor: int) -> Tensor:
        pad = (0, factor * right, 0, factor * bottom)
        return F.pad(x.flatten(0, 1), pad, mode="replicate").unflatten(0, x.shape[:2])

    out = model(continued(lr, 1), continued(hr, scale), hr_offset)
    return out[..., : hr.shape[-2], : hr.shape[-1]]


def as_method(model: nn.Module) -> tuple[Method, int]:
    """A model as what `pipeline.reconstruct` calls, and the number of frames it gives."""

    known: dict[str, torch.Tensor] = {}  # features of the last pair of key frames

    def method(sample: dict[str, torch.Tensor]) -> torch.Tensor:
        hr = sample["hr"]
        try:
            if not isinstance(model, SwinXVR):
                return _on_whole_blocks(model, sample["lr"], hr, sample["hr_offset"])
            if known.get("hr") is not hr:
                known.update(hr=hr, features=model.hr_features(hr))
            return model(sample["lr"], hr, sample["hr_offset"], known["features"])
        except ValueError as error:  # frames of a size the model cannot take
            raise InputError(f"{type(model).__name__}: {error}") from None

    return method, getattr(model, "n_out", 1)
