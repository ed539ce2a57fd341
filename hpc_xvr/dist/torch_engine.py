"""torch.distributed: DDP over NCCL on GPUs, Gloo on CPUs; started by MPI or torchrun."""

from __future__ import annotations

import atexit
import datetime
import os
import socket
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpc_xvr.dist.comm import Comm
from hpc_xvr.dist.launch import Launch

T = TypeVar("T")


class TorchComm(Comm):
    """torch.distributed for tensors; objects go over MPI where it started us (no time limit)."""

    name = "torch"

    def __init__(
        self, device: torch.device, launch: Launch, mpi: Any, timeout_s: float
    ) -> None:
        super().__init__(launch.rank, launch.size, device)
        self._mpi = mpi
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        td.init_process_group(
            backend,
            init_method=self._meeting_point(launch),
            rank=launch.rank,
            world_size=launch.size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        self._flag_tensor = torch.zeros(1)
        self._work: Any = None

    def _meeting_point(self, launch: Launch) -> str:
        """Where the ranks meet: torchrun's address, or a free port of rank 0 told over MPI."""
        if launch.launcher == "torchrun":
            return "env://"
        address = None
        if self.rank == 0:
            with socket.socket() as probe:
                probe.bind(("", 0))
                port = probe.getsockname()[1]
            name = "127.0.0.1" if launch.size in (1, launch.local_size) else socket.gethostname()
            address = f"tcp://{name}:{port}"
        return self._mpi.bcast(address) if self._mpi else address

    def describe(self) -> str:
        backend = "NCCL " + ".".join(map(str, torch.cuda.nccl.version())) \
            if self.device.type == "cuda" else "Gloo"
        return f"torch.distributed {torch.__version__} ({backend})"

    def broadcast(self, value: T | None) -> T:
        if self._mpi:
            return self._mpi.bcast(value)
        box = [value]
        td.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        if self._mpi:
            return self._mpi.allgather(value)
        out: list[Any] = [None] * self.size
        td.all_gather_object(out, value)
        return out

    def barrier(self) -> None:
        if self._mpi:
            self._mpi.Barrier()
        else:
            td.all_reduce(torch.zeros(1))

    def any_lagged(self, flag: bool) -> bool:
        answer = False
        if self._work is not None:
            self._work.wait()
            answer = bool(self._flag_tensor[0])
        self._flag_tensor = torch.tensor([float(flag)])
        self._work = td.all_reduce(self._flag_tensor, async_op=True)
        return answer

    def all_reduce(self, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        td.all_reduce(tensor)
        return tensor

    def wrap(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True), \
            optimizer

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else model.no_sync()  # type: ignore[operator]

    def abort(self, code: int) -> None:
        if self._mpi:
            self._mpi.Abort(code)
        os._exit(code)

    def close(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None
        self.barrier()
        td.destroy_process_group()

    def leave(self, code: int) -> None:
        # Gloo's threads may still let go of tensors while Python shuts down, which aborts the
        # process; so everything else is wound up here and Python's own shutdown left out.
        atexit._run_exitfuncs()
        if self._mpi:
            from mpi4py import MPI

            MPI.Finalize()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
