"""Adam, the learning rate as a function of the step, and the running mean of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hpc_xvr.config import Optim

PUBLISHED_BATCH = 10


def adam(parameters: Iterable[nn.Parameter], optim: Optim) -> torch.optim.Optimizer:
    """Fused Adam, or AdamW where there is weight decay."""
    kind = torch.optim.AdamW if optim.weight_decay else torch.optim.Adam
    return kind(
        parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )


def learning_rate(optim: Optim, step: int, steps: int, global_batch: int) -> float:
    """Linear warm-up, then one half cosine from lr to lr_min over all steps."""
    exponent = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[optim.lr_scaling]
    peak = optim.lr * (global_batch / PUBLISHED_BATCH) ** exponent
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
    rate = optim.lr_min + (peak - optim.lr_min) * cosine
    return rate * min(1.0, (step + 1) / (optim.warmup + 1))


class MovingAverage:
    """Exponential moving average of a model's parameters."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = dict(model.named_parameters())
        self.mean = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """mean <- decay * mean + (1 - decay) * weights, in one pass over all of them."""
        live: list[Tensor] = [p.detach() for p in self._live.values()]
        torch._foreach_lerp_(list(self.mean.values()), live, 1 - self.decay)

    def load(self, mean: dict[str, Tensor]) -> None:
        """Continue from a saved mean."""
        for name, value in self.mean.items():
            value.copy_(mean[name])
