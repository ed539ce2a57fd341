"""How far a run has come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """What a checkpoint keeps of a run besides its weights and optimizer, and what follows from it.

    Attributes:
        steps: optimizer steps of the whole run.
        step: optimizer steps behind us.
        best: `step` and `psnr` (dB) of the best validation so far.
        unvalidated: a validation is due; if the run stops before it, it resumes with it.
        target: PSNR (dB) of a validation at which the run is done before its last step.
    """

    steps: int
    step: int = 0
    best: dict[str, Any] | None = None
    unvalidated: bool = False
    target: float | None = None

    @classmethod
    def of(cls, state: dict[str, Any] | None, steps: int, target: float | None = None) -> Progress:
        """From a checkpoint's state, or from the start where there is none."""
        if state is None:
            return cls(steps, target=target)
        best, unvalidated = state.get("best"), bool(state.get("unvalidated"))
        return cls(steps, state["step"], best, unvalidated, target)

    @property
    def reached(self) -> bool:
        """Is there a target, and was a validation as good?"""
        if self.target is None or self.best is None:
            return False
        return self.best["psnr"] >= self.target

    @property
    def finished(self) -> bool:
        """Is no step left, or none needed?"""
        return self.step >= self.steps or self.reached

    def due(self, every: int) -> bool:
        """Is it time for what happens every `every` steps, and after the last one?"""
        return self.step == self.steps or self.step % every == 0

    def improves(self, psnr: float) -> bool:
        """Note the PSNR (dB) of a validation. Is it the best so far?"""
        if psnr > (self.best["psnr"] if self.best else -math.inf):
            self.best = {"step": self.step, "psnr": psnr}
            return True
        return False
