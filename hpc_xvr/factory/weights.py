"""From a config or a run folder to a model with its trained weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import nn

from hpc_xvr import checkpoint
from hpc_xvr.config import Config, check, load
from hpc_xvr.config import Model as ModelSettings
from hpc_xvr.errors import InputError
from hpc_xvr.factory.build import Network, build_model
from hpc_xvr.factory.builtin import file_of, is_builtin
from hpc_xvr.files import check_regular, write_atomic
from hpc_xvr.log import logger
from hpc_xvr.model.key_propagation import KeyPropagation
from hpc_xvr.model.xfusion import load_xfusion
from hpc_xvr.version import __version__

Which = Literal["newest", "best"]
SUFFIX = ".safetensors"
FORMAT = "hpc_xvr weights 1"
ORIGIN = ("license", "trained", "weights", "adapted", "adapted_to")
"""What a file of weights says of where they come from: files made of it say it, too."""


def model_of_run(run: Path, which: Which = "newest") -> tuple[Network, Config, int]:
    """Model (averaged weights, eval mode), config and step of what hpc-xvr has trained.

    Args:
        run: run folder, a file of `export_weights`, a single checkpoint, or the name of built-in
            weights (`builtin`, `builtin:NAME`).
        which: of a run folder, the newest valid checkpoint or that of the best validation.

    Raises:
        InputError: nothing of the kind, no valid checkpoint, or weights that do not fit the config
            beside them.
    """
    trained = read_weights(run, which)
    model = build_model(trained.config)
    model.load_state_dict(trained.weights)
    return model.eval(), trained.config, trained.step


def open_model(path: Path, which: Which = "newest") -> tuple[Network, Config, int]:
    """As `model_of_run`; also of a file of weights of the authors' program, with the default
    config as far as the model does not say otherwise, and step 0.

    Raises:
        InputError: neither.
    """
    try:
        return model_of_run(path, which)
    except InputError:
        if is_builtin(path) or not path.is_file() or _is_exported(path):
            raise
    model = _authors_model(path)
    facts = {"lr_frames": model.lr_frames, "scale": getattr(model, "scale", 4)}
    return model.eval(), check({"data": facts}, str(path)), 0


def _authors_model(path: Path) -> Network:
    """The model of a file of weights of the authors' program.

    Raises:
        InputError: it cannot be read, or is of no model that is known.
    """
    state = checkpoint.read_tensors(path)
    try:
        return load_xfusion(state)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Trained:
    """Weights that fit their config."""

    weights: dict[str, torch.Tensor]
    config: Config
    step: int
    facts: dict[str, str] = field(default_factory=dict)
    """What a file of weights says of itself besides, such as its licence."""


def read_weights(run: Path, which: Which = "newest", raw: bool = False) -> Trained:
    """What `model_of_run` puts into a model; `raw`: not the averaged weights of a checkpoint."""
    run = file_of(run)
    if not run.is_dir():
        check_regular(run)
    if run.is_file():
        path, state = run, _read_file(run)
        config = check(state["config"], f"the config in {run}")
    elif (run / "config.yaml").exists():
        config = load(run / "config.yaml")
        path, state = _newest(run)
        if which == "best":
            path, state = _best(run, state)
    else:
        raise InputError(
            f"{run}: is not a run folder (it has no config.yaml); make one with hpc-xvr train"
        )
    weights = state["model"] if raw or not state.get("ema") else state["ema"]
    _check_fit(config, weights, path)
    return Trained(weights, config, state["step"], state.get("facts", {}))


def _read_file(path: Path) -> dict[str, Any]:
    """The state in a single file, from whomever it may be."""
    if _is_exported(path):
        return _read_exported(path)
    try:
        state = checkpoint.load(path)
    except checkpoint.CorruptCheckpoint as problem:
        raise InputError(
            f"{problem}; give a run folder, one of its checkpoints, or a file of hpc-xvr export"
        ) from None
    for name, kind in (("model", dict), ("config", dict), ("step", int)):
        if not isinstance(state.get(name), kind):
            raise InputError(
                f"checkpoint {path}: has no {name}; it was not written by hpc-xvr train"
            )
    return state


def _newest(run: Path) -> tuple[Path, dict[str, Any]]:
    for path, state in checkpoint.newest_valid(run / "checkpoints", ("model",)):
        if not isinstance(state, checkpoint.CorruptCheckpoint):
            return path, state
        logger.warning("skipped: %s", state)
    raise InputError(
        f"{run}: has no valid checkpoint yet; let hpc-xvr train write one (checkpoint.every)"
    )


def _best(run: Path, newest: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    best = newest.get("best")
    if not best:
        raise InputError(
            f"{run}: no validation has been saved yet, so none is best; use the newest checkpoint"
        )
    path = checkpoint.path_of(run / "checkpoints", best["step"])
    return path, newest if best["step"] == newest["step"] else checkpoint.load(path)


def _check_fit(config: Config, weights: dict[str, Any], path: Path) -> None:
    with torch.device("meta"):  # shapes only: a config of others may ask for any size
        shapes = build_model(config).state_dict()
    _refuse_mismatch(shapes, weights, path)


def export_weights(
    run: Path,
    out: Path,
    which: Which = "newest",
    raw: bool = False,
    command: str = "",
    mean_with: Path | None = None,
) -> Trained:
    """Write the weights and the config of a run to a safetensors file, whole or not at all.

    Args:
        run, which, raw: see `read_weights`.
        command: the command line, stored with them.
        mean_with: other weights of the same network; the mean of both is written.

    Raises:
        InputError: as `model_of_run`; `out` has another suffix or cannot be written; the other
            weights are of another network.
    """
    check_weights_name(out)
    trained = read_weights(run, which, raw)
    if mean_with is not None:
        trained = _mean(run, trained, mean_with, read_weights(mean_with, which, raw))
    kind = trained.facts.get("weights") or ("raw" if raw else "averaged")
    write_weights(out, trained, {"weights": kind, "command": command})
    return trained


def _mean(name: Path, one: Trained, other_name: Path, other: Trained) -> Trained:
    """Halfway between weights of which one was trained on from the other: what the second has
    learned, and most of what it has forgotten (Wortsman et al., arXiv:2109.01903)."""
    if one.config.model != other.config.model or one.config.data.scale != other.config.data.scale:
        raise InputError(
            f"{other_name}: is another network than {name}, so there is no mean of the two; give "
            "weights whose training went on from the same ones (train.weights)"
        )
    weights = {
        key: (value + other.weights[key]) / 2 if value.is_floating_point() else value
        for key, value in one.weights.items()
    }
    return replace(one, weights=weights)


def check_weights_name(out: Path) -> None:
    """Refuse a file name that `write_weights` would refuse."""
    if out.suffix != SUFFIX:
        raise InputError(f"{out}: must end in {SUFFIX}")


def write_weights(out: Path, trained: Trained, facts: dict[str, str]) -> None:
    """Write a file that can take the place of a run folder, whole or not at all.

    Args:
        facts: what else it says of itself, besides what the file says that they come from.

    Raises:
        InputError: `out` has another suffix or cannot be written.
    """
    check_weights_name(out)
    about = {
        **trained.facts,
        "format": FORMAT,
        "step": str(trained.step),
        "config": json.dumps(trained.config.model_dump(mode="json")),
        "version": __version__,
        **{name: text for name, text in facts.items() if text},
    }
    data = safetensors.torch.save({k: v.contiguous() for k, v in trained.weights.items()}, about)
    write_atomic(out, lambda file: file.write(data))


def _is_exported(path: Path) -> bool:
    return path.suffix == SUFFIX


def _read_exported(path: Path) -> dict[str, Any]:
    """A file of `export_weights` as a checkpoint's state; numbers only, no code can be in it."""
    check_regular(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORMAT:
                raise InputError(f"{path}: not written by hpc-xvr export (no config in it)")
            state = {"step": int(facts["step"]), "config": json.loads(facts["config"])}
            config = check(state["config"], f"the config in {path}")
            names = file.keys()
            shapes = {n: torch.empty(file.get_slice(n).get_shape(), device="meta") for n in names}
            _check_fit(config, shapes, path)  # before anything is read into memory
            state["facts"] = {name: facts[name] for name in ORIGIN if name in facts}
            return state | {"model": {name: file.get_tensor(name) for name in names}}
    except InputError:
        raise
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: truncated, or not written by hpc-xvr export ({line})") from None


def load_weights(model: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights, averaged ones where there are any, into `model`.

    Raises:
        InputError: the checkpoint is of another architecture; says which parameters differ.
    """
    weights = state.get("ema") or state["model"]
    _refuse_mismatch(model.state_dict(), weights, path)
    model.load_state_dict(weights)


def _refuse_mismatch(ours: dict[str, torch.Tensor], theirs: Any, path: Path) -> None:
    problem = mismatch(ours, theirs)
    if problem:
        raise InputError(
            f"checkpoint {path} is of another architecture: {problem}; use the "
            "model section of the config it was trained with"
        )


def mismatch(ours: dict[str, torch.Tensor], theirs: Any) -> str | None:
    """How two state dicts differ in names or shapes, key by key; None if they do not."""

    if not isinstance(theirs, dict):
        return "it holds no named tensors"

    def shape(value: Any) -> tuple[int, ...] | str:
        return tuple(value.shape) if isinstance(value, torch.Tensor) else "not a tensor"

    both = [name for name in ours if name in theirs]
    kinds = {
        "it lacks": [f"{n} {shape(v)}" for n, v in ours.items() if n not in theirs],
        "it has, unknown to this model,": [
            f"{n} {shape(v)}" for n, v in theirs.items() if n not in ours
        ],
        "of other shapes:": [
            f"{n} is {shape(theirs[n])} there, {shape(ours[n])} in this model"
            for n in both
            if shape(theirs[n]) != shape(ours[n])
        ],
    }
    return "; ".join(f"{kind} {_listed(names)}" for kind, names in kinds.items() if names) or None


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def initial_weights(model: nn.Module, path: Path, settings: ModelSettings | None = None) -> None:
    """Start from a run folder, a checkpoint of ours, a file of `export_weights`, built-in weights,
    or a checkpoint of the authors' program (config key train.weights). Key propagation with both
    lookups also starts from weights with linear ones.

    Args:
        settings: of `model`; a warning says which of them the weights were not trained with.

    Raises:
        InputError: unreadable, or of another architecture.
    """
    name, path = path, file_of(path)
    try:
        state = _first_state(path)
    except InputError as error:
        raise InputError(f"train.weights: {error}") from None
    if isinstance(model, KeyPropagation):
        for kind in ("model", "ema"):
            if isinstance(state.get(kind), dict):
                state[kind] = model.widened(state[kind])
    load_weights(model, state, path)
    if settings is not None and state.get("config"):
        theirs = check(state["config"], f"the config in {path}").model.model_dump()
        for key, ours in settings.model_dump(exclude={"drop_path", "attention"}).items():
            if theirs[key] != ours:
                told = "train.weights %s: were trained with model.%s %s, this run has %s"
                logger.warning(told, name, key, theirs[key], ours)


def _first_state(path: Path) -> dict[str, Any]:
    if path.is_dir():
        trained = read_weights(path)
        return {"model": trained.weights, "config": trained.config.model_dump(mode="json")}
    if _is_exported(path):
        return _read_exported(path)
    try:
        return checkpoint.load(path)
    except checkpoint.CorruptCheckpoint:
        return {"model": _authors_model(path).state_dict()}
