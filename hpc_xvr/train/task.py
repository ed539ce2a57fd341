"""What differs between networks that take windows of frames and those that take whole gaps."""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import Tensor, nn

from hpc_xvr.config import Config
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.samples.gaps import GapSamples
from hpc_xvr.data.samples.training import TrainingSamples
from hpc_xvr.train.objective import carried, charbonnier, l1

Batch = dict[str, Tensor]
_LOSSES = {"l1": l1, "charbonnier": charbonnier}


class Task(Protocol):
    """What a network of some kind is trained to do."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of a sample's tensors that the network takes, in its order."""

    def samples(self, corpus: Corpus) -> TrainingSamples:
        """The training samples."""

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """What is minimised, of the network's output for a batch."""

    def frames(self, output: Any) -> Tensor:
        """The pictures in the network's output, (B, N_out, 1, H, W)."""

    def flops(self, model: nn.Module) -> int:
        """Floating-point operations of a sample's forward and backward pass, on average."""

    def longest(self, model: nn.Module) -> tuple[int, int]:
        """Low-resolution frames of the largest sample, and frames that come out of it."""


def task_of(cfg: Config) -> Task:
    """The task of the network that a config names."""
    return GapTask(cfg) if cfg.model.name == "key_propagation" else WindowTask(cfg)


class WindowTask:
    """One frame, or a few, from the low-resolution frames around it and two key frames."""

    inputs: tuple[str, ...] = ("lr", "hr", "hr_offset")

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg

    def samples(self, corpus: Corpus) -> TrainingSamples:
        """Crops around a frame of a recording."""
        cfg = self._cfg
        return TrainingSamples(
            corpus, cfg.data, cfg.model.output, cfg.train.global_batch, cfg.run.seed
        )

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Of the frames that come out."""
        return _LOSSES[self._cfg.train.loss](output, batch["target"])

    def frames(self, output: Tensor) -> Tensor:
        """All of them."""
        return output

    def flops(self, model: nn.Module) -> int:
        """2 per multiply-add; the backward pass costs twice the forward pass."""
        side = self._cfg.data.patch // self._cfg.data.scale
        total: int = 3 * model.flops(side, side)  # type: ignore[operator]
        return total

    def longest(self, model: nn.Module) -> tuple[int, int]:
        """All samples are of one size."""
        return self._cfg.data.lr_frames, getattr(model, "n_out", 1)


class GapTask:
    """All frames between two key frames."""

    inputs: tuple[str, ...] = ("lr", "hr")

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg

    def samples(self, corpus: Corpus) -> TrainingSamples:
        """Crops of whole gaps."""
        cfg = self._cfg
        return GapSamples(corpus, cfg.data, cfg.train.global_batch, cfg.run.seed)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Of the frames, and of the key frames as they were carried to them."""
        train = self._cfg.train
        loss = _LOSSES[train.loss](output.frames, batch["target"])
        if train.carried_weight:
            loss = loss + train.carried_weight * carried(output, batch["target"])
        return loss

    def frames(self, output: Any) -> Tensor:
        """The reconstructed ones."""
        pictures: Tensor = output.frames
        return pictures

    def flops(self, model: nn.Module) -> int:
        """Of a gap of mean length (drawn evenly in its logarithm, see GapSamples)."""
        low, high = self._cfg.data.gaps
        mean = (high + 1 - low) / math.log((high + 1) / low)
        side = self._cfg.data.patch // self._cfg.data.scale
        return round(3 * (mean - 1.5) * model.flops(side, side))  # type: ignore[operator]

    def longest(self, model: nn.Module) -> tuple[int, int]:
        """That of the longest gap."""
        gap = self._cfg.data.gaps[1]
        return gap + 1, gap - 1
