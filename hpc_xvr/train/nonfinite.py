"""Steps whose gradients are not finite: each is skipped, too many in a row end the run."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_xvr.config import Train
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import CollectiveError
from hpc_xvr.log import logger


class SkippedSteps:
    """Counts skipped steps on the device, so that a GPU is read from only now and then.

    Averaged gradients are the same on all ranks, and so are the counts: nobody has to be asked.
    """

    def __init__(self, train: Train, comm: Comm) -> None:
        self._comm, self._limit = comm, train.nonfinite_limit
        on_cpu = comm.device.type == "cpu"
        self._every = 1 if on_cpu else min(train.log_every, train.nonfinite_limit)
        self._in_a_row, self._longest, self._total = torch.zeros(3, device=comm.device)
        self._reported = 0

    def count(self, skipped: Tensor) -> None:
        """One step more; `skipped` is 1 if it was skipped, else 0."""
        self._in_a_row = (self._in_a_row + 1) * skipped
        self._longest = torch.maximum(self._longest, self._in_a_row)
        self._total = self._total + skipped

    def check(self, step: int) -> None:
        """Warn of skipped steps, again when they are twice as many; to be called after each step. A
        GPU is asked now and then.

        Raises:
            CollectiveError: `train.nonfinite_limit` steps in a row were skipped.
        """
        if step % self._every:
            return
        total, longest = int(self._total), int(self._longest)
        if total and total >= 2 * self._reported:
            self._reported = total
            if self._comm.is_root:
                logger.warning(
                    "step %d: gradients were not finite or above optim.skip_norm; skipped on all "
                    "ranks, %d steps so far",
                    step,
                    total,
                )
        if longest >= self._limit:
            raise CollectiveError(
                f"step {step}: {longest} steps in a row without usable gradients; "
                "lower optim.lr, set optim.clip_norm, or check the corpus with "
                "hpc-xvr inspect --verify"
            )
