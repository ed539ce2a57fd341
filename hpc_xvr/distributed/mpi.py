"""The part of the interface that MPI does for every engine that has it: objects and flags."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import numpy as np
import torch

from hpc_xvr.distributed.comm import Comm

T = TypeVar("T")


def mpi_version() -> str:
    """Name and version of the MPI library, such as "Open MPI v5.0.11" or "MPICH 5.0.2"."""
    from mpi4py import MPI

    said = MPI.Get_library_version().splitlines()[0].split(",")[0]
    return " ".join(said.replace("Version:", "").split())


class MpiComm(Comm):
    """Objects and flags over an mpi4py communicator of our own."""

    def __init__(self, device: torch.device, world: Any) -> None:
        super().__init__(world.Get_rank(), world.Get_size(), device)
        self._mpi = world.Dup()
        self._mine, self._all = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self._request: Any = None

    def broadcast(self, value: T | None) -> T:
        return self._mpi.bcast(value)

    def gather(self, value: T) -> list[T]:
        return self._mpi.allgather(value)

    def barrier(self) -> None:
        self._mpi.Barrier()

    def any_lagged(self, flag: bool) -> bool:
        answer = False
        if self._request is not None:
            self._request.Wait()
            answer = bool(self._all[0])
        self._mine[0] = flag
        self._request = self._mpi.Iallreduce(self._mine, self._all)
        return answer

    def abort(self, code: int) -> None:
        self.stop_watch(failed=True)
        sys.stderr.flush()
        sys.stdout.flush()
        self._mpi.Abort(code)

    def lost_another(self, error: BaseException) -> bool:
        return type(error).__module__.startswith("mpi4py")

    def close(self) -> None:
        if self._request is not None:
            self._request.Wait()
            self._request = None
        self._mpi.Barrier()
        self.stop_watch()
