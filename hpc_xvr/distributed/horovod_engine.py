"""Horovod: gradients averaged by its background thread while the backward pass goes on."""

from __future__ import annotations

import os
from typing import Any

import horovod
import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor, nn

from hpc_xvr.config import Dist
from hpc_xvr.distributed.mpi import MpiComm, mpi_version
from hpc_xvr.errors import InputError

_NET_S = 30  # the watch ends a hanging job first, as it can name the rank


class HorovodComm(MpiComm):
    """Horovod for tensors, MPI for objects."""

    name = "horovod"

    def __init__(self, device: torch.device, mpi: Any, dist: Dist) -> None:
        if mpi is None:
            from mpi4py import MPI

            mpi = MPI.COMM_WORLD
        super().__init__(device, mpi)
        if device.type == "cuda" and not (hvd.nccl_built() or hvd.cuda_built()):
            raise InputError(
                "this Horovod was built without GPU support; run jobs/setup.sh --gpu, "
                "or use --engine torch"
            )
        self._dist = dist
        limit = int(dist.timeout_s) + _NET_S
        os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, limit // 4)))
        os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(limit))
        if dist.bucket_mb:
            os.environ["HOROVOD_FUSION_THRESHOLD"] = str(int(dist.bucket_mb * 2**20))
        if dist.cycle_ms:
            os.environ["HOROVOD_CYCLE_TIME"] = str(dist.cycle_ms)

    def _begin(self) -> None:
        """Start Horovod where tensors are to travel, on all ranks alike. Its thread wakes up a
        thousand times a second, which costs ranks that send none several percent of a core."""
        if hvd.is_initialized():
            return
        hvd.init()
        if hvd.size() != self.size:
            raise InputError(
                f"MPI has {self.size} ranks but Horovod sees {hvd.size()}: it was "
                "built against another MPI; run jobs/setup.sh again"
            )

    def describe(self) -> str:
        nccl = ""
        code = int(hvd.nccl_built()) if self.device.type == "cuda" else 0
        if code:  # such as 22703
            nccl = f", NCCL {code // 10000}.{code // 100 % 100}.{code % 100}"
        return f"Horovod {horovod.__version__} ({mpi_version()}{nccl})"

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self._begin()
        return hvd.allreduce(tensor, op=hvd.Sum)

    def wrap(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        self._begin()
        wrapped = hvd.DistributedOptimizer(
            optimizer,
            named_parameters=model.named_parameters(),
            compression=getattr(hvd.Compression, self._dist.compression),
            backward_passes_per_step=micro_batches,
            op=hvd.Average,
        )
        return model, wrapped

    def finish_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.synchronize()  # type: ignore[attr-defined]

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        with optimizer.skip_synchronize():  # type: ignore[attr-defined]
            optimizer.step()

    def lost_another(self, error: BaseException) -> bool:
        return isinstance(error, HorovodInternalError) or super().lost_another(error)

    def close(self) -> None:
        super().close()
        hvd.shutdown()
