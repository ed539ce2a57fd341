"""One registry of everything that makes frames: methods without learning by name, trained models
by path, built-in ones as `builtin`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from hpc_xvr.config import Config
from hpc_xvr.errors import InputError
from hpc_xvr.factory.build import Network
from hpc_xvr.factory.builtin import PREFIX, is_builtin
from hpc_xvr.factory.execution import prepare
from hpc_xvr.factory.weights import Which, open_model
from hpc_xvr.model.edvr import EDVR
from hpc_xvr.model.key_propagation import KeyPropagation
from hpc_xvr.model.xvr import SwinXVR
from hpc_xvr.reconstruction.baselines import BASELINES, find_baseline
from hpc_xvr.reconstruction.pipeline import WHOLE_GAP, Method, as_method
from hpc_xvr.version import __version__


@dataclass(frozen=True)
class NamedMethod:
    """A method as an evaluation sees it: frames in, frames out, and what it costs."""

    name: str
    """Unique in an evaluation."""
    title: str
    """As tables and pictures call it."""
    method: Method
    """Batched sample -> (B, n_out, 1, H, W)."""
    n_out: int = 1
    lr_frames: int | None = None
    """Low-resolution frames it takes; None: any number; WHOLE_GAP: all of a gap."""
    scale: int | None = None
    """Ratio of the two grids it works with; None: any."""
    parameters: int = 0
    flops: Callable[[int, int, int], float] = lambda h, w, scale: 0.0
    """(h, w, scale) -> floating-point operations for a frame that comes out."""
    precision: str = "float32"
    learned: bool = False
    fingerprint: str = ""
    """Changes when the method may give other pictures."""
    network: Network | None = field(default=None, repr=False)
    """The model behind it."""
    config: Config | None = field(default=None, repr=False)
    """What it was trained with, as far as that is known."""
    step: int = 0
    """Optimizer steps that it was trained for; 0 if unknown."""
    tile: int | None = None
    """Side in sharp pixels of the tiles that it works in, see `in_tiles`; None: whole frames."""

    @property
    def longest_gap(self) -> int | None:
        """Frames from key frame to key frame up to which it was trained; None: unknown, or it
        does not matter."""
        whole = self.lr_frames == WHOLE_GAP
        return self.config.data.gaps[1] if whole and self.config else None


def open_methods(
    what: Iterable[str | Path],
    device: torch.device | str = "cpu",
    which: Which = "newest",
) -> dict[str, NamedMethod]:
    """The methods named, see `open_method`; all of different names and titles.

    Raises:
        InputError: neither, without valid weights, or two of one name.
    """
    entries: dict[str, NamedMethod] = {}
    for text in dict.fromkeys(map(str, what)):
        entry = open_method(text, device, which)
        if entry.name in entries or (entry.learned and entry.name in BASELINES):
            raise InputError(
                f"{text}: there is a method called {entry.name} already; give this one another "
                f"name, as in NAME={text.partition('=')[2] or text}"
            )
        entries[entry.name] = entry
    return _distinct(entries)


def open_method(
    text: str | Path, device: torch.device | str = "cpu", which: Which = "newest"
) -> NamedMethod:
    """A method without learning by its name, or a trained model.

    That is a run folder (`which` tells the checkpoint), `builtin` or `builtin:NAME`, or a file of
    weights (of hpc-xvr export, a checkpoint of ours, or of the authors' program). NAME=PATH calls
    it NAME, else it is called as its folder or file.

    Raises:
        InputError: none of these, or without valid weights.
    """
    text = str(text)
    if text in BASELINES:
        return baseline_entry(text)
    name, sign, where = text.partition("=")
    path = Path(where if sign else text)
    if not (path.exists() or is_builtin(path)):
        raise InputError(
            f"{text}: neither a run folder or file of weights, nor {PREFIX} (built-in weights), "
            f"nor a method without learning: {', '.join(BASELINES)}"
        )
    if not sign:
        name = path.resolve().name if path.is_dir() else path.stem
    model, config, step = open_model(path, which)
    precision = prepare(model, config, torch.device(device))
    return replace(model_entry(name, model, precision), config=config, step=step)


def baseline_entry(name: str) -> NamedMethod:
    """A method without learning.

    Raises:
        InputError: there is none of that name.
    """
    baseline = find_baseline(name)
    return NamedMethod(
        name,
        baseline.title,
        baseline,
        flops=lambda h, w, scale: float(baseline.flops_per_pixel * h * w * scale**2),
        fingerprint=f"{name} {__version__}",
    )


def model_entry(name: str, model: Network, precision: str = "float32") -> NamedMethod:
    """A network in eval mode, on its device."""
    method, n_out = as_method(model)
    block = 4 if isinstance(model, EDVR) else 1  # EDVR's frames are continued to multiples
    return NamedMethod(
        name,
        _title(model),
        method,
        n_out,
        WHOLE_GAP if isinstance(model, KeyPropagation) else model.lr_frames,
        getattr(model, "scale", 4),
        sum(p.numel() for p in model.parameters()),
        lambda h, w, scale: model.flops(*(-(-n // block) * block for n in (h, w))) / max(n_out, 1),
        precision,
        True,
        _fingerprint(model, precision),
        model,
    )


def _title(model: nn.Module) -> str:
    if not isinstance(model, SwinXVR):
        titles = {"EDVRSTF": "EDVR-STF", "KeyPropagation": "key propagation"}
        return titles.get(type(model).__name__, type(model).__name__)
    base = "" if model.base == "none" else f", base {model.base}"
    return f"SWIN-XVR {model.output}{base}"


def _distinct(entries: dict[str, NamedMethod]) -> dict[str, NamedMethod]:
    """Titles that two methods share get the methods' names."""
    titles = [entry.title for entry in entries.values()]
    return {
        name: entry
        if titles.count(entry.title) == 1
        else replace(entry, title=f"{entry.title} ({name})")
        for name, entry in entries.items()
    }


def _fingerprint(model: nn.Module, precision: str) -> str:
    digest = hashlib.sha256(f"{_title(model)} {precision}".encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
