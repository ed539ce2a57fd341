"""The model in training: its weights, the optimizer that moves them, their running mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hpc_xvr.config import Config
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import InputError
from hpc_xvr.factory.build import build_model
from hpc_xvr.factory.execution import prepare
from hpc_xvr.factory.weights import initial_weights
from hpc_xvr.train.graphs import RecordedPasses
from hpc_xvr.train.nonfinite import SkippedSteps
from hpc_xvr.train.optim import MovingAverage, adam
from hpc_xvr.train.task import Batch, Task

LARGEST = torch.finfo(torch.float64).max
"""No norm exceeds it unless it is infinite."""


def new_model(cfg: Config, device: torch.device) -> tuple[nn.Module, str]:
    """The model of a config with fresh weights, on `device`, and the precision to train it in.

    Raises:
        InputError: settings that this device or model cannot do.
    """
    torch.manual_seed(cfg.run.seed)
    model = build_model(cfg)
    return model, prepare(model, cfg, device, training=True)


def first_weights(cfg: Config, model: nn.Module) -> dict[str, Tensor]:
    """What a run begins with: those of `train.weights`, put into `model`, or the model's own.

    Raises:
        InputError: `train.weights` is unreadable or of another architecture.
    """
    if cfg.train.weights:
        initial_weights(model, cfg.train.weights, cfg.model)
    return model.state_dict()


def check_graphs(comm: Comm) -> None:
    """Refuse `train.graphs` where nothing can be recorded.

    Raises:
        InputError: no GPU, or several ranks.
    """
    if comm.device.type != "cuda" or comm.size > 1 or comm.name != "serial":
        where = f"{comm.size} rank(s) of {comm.name} on {comm.device.type}"
        raise InputError(
            f"train.graphs true: for one rank without an engine on a GPU, not for {where}; set it "
            "to false"
        )


class Learner:
    """A model, its optimizer and the running mean of its weights, the same on all ranks.

    Args:
        model, precision: of `new_model`.
        task: what the model takes and gives.
        micro_batches: forward and backward passes of a step.
        state: the checkpoint to continue from; None: begin with rank 0's `first_weights`.

    Attributes:
        net: the model as ranks call it in training, such as DDP's wrapper.
        average: None where `optim.ema` is 0.
        norm: of the last step's gradients, on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: str,
        cfg: Config,
        comm: Comm,
        task: Task,
        micro_batches: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._cfg, self._comm, self._task = cfg, comm, task
        self.model, self.precision = model, precision
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        if state is None:
            state = {"model": comm.on_root(lambda: first_weights(cfg, model))}
        model.train()
        model.load_state_dict(state["model"])
        self.average = MovingAverage(model, cfg.optim.ema) if cfg.optim.ema else None
        if self.average and state.get("ema"):
            self.average.load(state["ema"])
        optimizer = adam(model.parameters(), cfg.optim)
        self.net, self.optimizer = comm.wrap(model, optimizer, micro_batches)
        if "optimizer" in state:  # after wrapping: Horovod makes an optimizer of its own
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:  # what the config says now
                group.update(betas=cfg.optim.betas, weight_decay=cfg.optim.weight_decay)
        self._micro_batches = micro_batches
        self._recorded = None
        if cfg.train.graphs:
            self._recorded = RecordedPasses(self._passes, model.parameters())
        self.skipped = SkippedSteps(cfg.train, comm)
        self.norm = torch.zeros((), device=comm.device)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "model": self.model.state_dict(),
            "ema": dict(self.average.mean) if self.average else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def begin_step(self, rate: float) -> None:
        """Set the learning rate; gradients start from zero."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self._recorded:
            self.optimizer.zero_grad(set_to_none=False)
        else:  # Horovod's takes nothing else
            self.optimizer.zero_grad()

    def to_device(self, batch: Batch) -> Batch:
        """A micro-batch where the model is, in its type."""
        device = self._comm.device
        return {k: v.to(device, self.dtype, non_blocking=True) for k, v in batch.items()}

    def forward(self, batch: Batch) -> Any:
        """The network's output for a micro-batch."""
        with self._autocast():
            return self.net(*(batch[name] for name in self._task.inputs))

    def backward(self, batch: Batch, enter: Callable[[str], None] = lambda _: None) -> Tensor:
        """Add a micro-batch's gradients; returns its share of the step's loss, without history."""
        return self._recorded(batch) if self._recorded else self._passes(batch, enter)

    def _passes(self, batch: Batch, enter: Callable[[str], None] = lambda _: None) -> Tensor:
        loss = self._task.loss(self.forward(batch), batch) / self._micro_batches
        enter("backward")
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Move the weights, unless a gradient is not finite: averaged gradients are the same on
        all ranks, so all of them skip, without asking each other."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(gradients)
        if self._cfg.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self._cfg.optim.clip_norm, self.norm
            )
        skip = (~(self.norm <= (self._cfg.optim.skip_norm or LARGEST))).float()
        # Fused Adam leaves everything as it is where this is 1.
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self._comm.step(self.optimizer)
        self.skipped.count(skip)
        if self.average:
            self.average.update()

    @contextmanager
    def predicting(self) -> Iterator[Callable[[Batch], Tensor]]:
        """Yields a function from a sample to the output with the averaged weights."""
        average = self.average
        weights = average.mean if average else dict[str, Tensor](self.model.named_parameters())

        def predict(sample: Batch) -> Tensor:
            inputs = self.to_device({name: sample[name] for name in self._task.inputs})
            with self._autocast():
                output = functional_call(self.model, weights, tuple(inputs.values()))
            return self._task.frames(output)

        self.model.eval()
        try:
            yield predict
        finally:
            self.model.train()

    def _autocast(self) -> torch.autocast:
        kind = self._comm.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16")
