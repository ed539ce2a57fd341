"""How ranks talk. `Comm` is one rank by itself and the interface the engines implement."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from hpc_xvr.dist.launch import Launch, discover, gpu_index
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

T = TypeVar("T")
Engine = Literal["auto", "serial", "horovod", "torch"]


class Comm:
    """One rank. Engines override every method that has to reach the other ranks."""

    name = "serial"

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.device = device or torch.device("cpu")

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    def describe(self) -> str:
        """Engine and library versions, for the start-up line."""
        return self.name

    # Objects and flags: small, on the CPU.

    def broadcast(self, value: T | None) -> T:
        """Rank 0's object on every rank."""
        return value  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's object, in rank order, on every rank."""
        return [value]

    def barrier(self) -> None:
        """Wait for all ranks."""

    def any_lagged(self, flag: bool) -> bool:
        """Did any rank raise its flag in the previous call? Same answer everywhere, no waiting.

        The flags travel while the step computes and are read one call later.
        """
        answer, self._flag = getattr(self, "_flag", False), flag
        return answer

    def on_root(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result everywhere; an InputError ends all alike."""
        result, problem = None, None
        if self.is_root:
            try:
                result = action()
            except InputError as error:
                problem = str(error)
        result, problem = self.broadcast((result, problem))
        if problem is not None:
            raise CollectiveError(problem)
        return result  # type: ignore[return-value]

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it meets an InputError on any, all raise the first."""
        result, problem = None, None
        try:
            result = action()
        except InputError as error:
            problem = str(error)
        problem = next((p for p in self.gather(problem) if p is not None), None)
        if problem is not None:
            raise CollectiveError(problem)
        return result  # type: ignore[return-value]

    # Tensors.

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, same result everywhere."""
        return tensor

    # Training.

    def wrap(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Model and optimizer whose gradients are averaged over ranks after `micro_batches`."""
        return model, optimizer

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch's forward and backward pass; gradients travel with the last one."""
        return nullcontext()

    def finish_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Wait until the averaged gradients are in place."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Optimizer step on gradients that `finish_gradients` completed."""
        optimizer.step()

    # The end.

    def abort(self, code: int) -> None:
        """End every rank of the job at once."""
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)

    def close(self) -> None:
        """Leave in good order; all ranks call it."""

    def leave(self, code: int) -> None:
        """End this process after `close`."""
        raise SystemExit(code)


class CollectiveError(InputError):
    """An InputError that every rank raises together: rank 0 prints it, nobody has to be killed."""


def connect(engine: Engine = "auto", device: str = "auto", timeout_s: float = 600.0) -> Comm:
    """Find the other ranks and return the engine that talks to them.

    Args:
        engine: "auto" is serial on one rank, else Horovod where it is installed, else torch.
        device: "auto", "cpu" or "cuda"; each rank takes the GPU of its local rank.
        timeout_s: seconds after which a collective without answer is an error.

    Raises:
        InputError: MPI sees another number of ranks than the launcher started, the engine is not
            installed, or there is no GPU for this rank.
    """
    launch = discover()
    chosen = _device(launch, device)  # before MPI is imported
    if launch.launcher == "torchrun":
        if engine == "horovod":
            raise InputError("engine horovod needs mpirun; torchrun works with --engine torch")
        mpi = None
    else:
        mpi = _mpi(launch, chosen)
        size = mpi.Get_size() if mpi else 1
        if size != launch.size:
            raise InputError(
                f"{launch.launcher or 'MPI'} started {launch.size} ranks but MPI sees {size}: this "
                "environment's MPI was not started by its own launcher; use the mpirun that "
                "belongs to it (`which mpirun`), or srun --mpi=pmix")
        if size > 1 and chosen.type == "cuda" and chosen.index is None:
            local = mpi.Split_type(_shared()).Get_rank()
            chosen = _device(Launch(launch.launcher, launch.rank, size, local), device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if launch.size == 1:
        if engine == "horovod":
            return _horovod(chosen, mpi, timeout_s)
        if engine == "torch":
            return _torch(chosen, launch, mpi, timeout_s)
        return Comm(device=chosen)
    if engine == "serial":
        raise InputError(f"engine serial is one rank, but {launch.launcher} started {launch.size}; "
                         "use --engine horovod or torch, or start without mpirun")
    if engine == "horovod":
        return _horovod(chosen, mpi, timeout_s)
    if engine == "auto" and mpi is not None:
        # All ranks must agree: an engine that only some of them can import would hang the rest.
        if all(mpi.allgather(_horovod_usable(chosen))):
            return _horovod(chosen, mpi, timeout_s)
        if launch.rank == 0:
            logger.info("Horovod is not installed for this device; using torch.distributed")
    return _torch(chosen, launch, mpi, timeout_s)


def _device(launch: Launch, wish: str) -> torch.device:
    gpus = torch.cuda.device_count() if wish != "cpu" and torch.cuda.is_available() else 0
    if wish == "cuda" and not gpus:
        raise InputError("run.device is cuda, but torch sees no GPU here; use run.device=cpu, or "
                         "a torch built for this machine's GPUs")
    if not gpus:
        return torch.device("cpu")
    return torch.device("cuda", gpu_index(launch, gpus))


def _mpi(launch: Launch, device: torch.device) -> Any:
    """COMM_WORLD, or None on one rank that no MPI launcher started."""
    if launch.size == 1 and launch.launcher not in ("Open MPI", "PALS", "PMI"):
        return None
    if device.type == "cpu":  # waiting must not take the core that the other thread computes on
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"{launch.launcher} started {launch.size} ranks, but mpi4py cannot be "
                         f"imported ({line}); run jobs/setup.sh") from None
    return MPI.COMM_WORLD


def _shared() -> int:
    from mpi4py import MPI

    return MPI.COMM_TYPE_SHARED


def _horovod_installed() -> bool:
    try:
        import horovod.torch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def _horovod_usable(device: torch.device) -> bool:
    if not _horovod_installed():
        return False
    import horovod.torch as hvd

    return device.type == "cpu" or bool(hvd.nccl_built() or hvd.cuda_built())


def _horovod(device: torch.device, mpi: Any, timeout_s: float) -> Comm:
    if not _horovod_installed():
        raise InputError("engine horovod: Horovod is not installed for this torch; run "
                         "jobs/setup.sh, or use --engine torch")
    from hpc_xvr.dist.horovod_engine import HorovodComm

    return HorovodComm(device, mpi, timeout_s)


def _torch(device: torch.device, launch: Launch, mpi: Any, timeout_s: float) -> Comm:
    from hpc_xvr.dist.torch_engine import TorchComm

    return TorchComm(device, launch, mpi, timeout_s)


def host() -> str:
    """Name of this node."""
    return socket.gethostname()
