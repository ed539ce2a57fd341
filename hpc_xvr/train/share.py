"""What part of the global batch a rank works on, and in how many pieces."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_xvr.config import Train
from hpc_xvr.data.samples.slots import slots_of_rank
from hpc_xvr.errors import InputError


@dataclass(frozen=True)
class Share:
    """A rank's samples of one step: `samples` in all, `micro` in one forward pass."""

    samples: int
    micro: int

    @classmethod
    def of(cls, train: Train, rank: int, ranks: int) -> Share:
        """The share of `rank` among `ranks`.

        Raises:
            InputError: the ranks cannot share the global batch evenly, or the micro-batch does not
                divide the share.
        """
        samples = len(slots_of_rank(rank, ranks, train.global_batch))
        micro = train.micro_batch or samples
        if samples % micro:
            raise InputError(
                f"train.micro_batch {micro} does not divide the {samples} samples of a "
                f"rank (global_batch {train.global_batch} on {ranks} ranks)"
            )
        return cls(samples, micro)

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of a step."""
        return self.samples // self.micro
