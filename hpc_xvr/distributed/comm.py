"""How ranks talk. `Comm` is one rank by itself and the interface the engines implement."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hpc_xvr.config import Dist
from hpc_xvr.distributed.choice import Sees, Wish, choose
from hpc_xvr.distributed.launch import Launch, discover, gpu_index
from hpc_xvr.errors import CollectiveError, InputError
from hpc_xvr.log import logger

if TYPE_CHECKING:
    from hpc_xvr.distributed.watch import Watch

T = TypeVar("T")


class Place(NamedTuple):
    """Where a rank is: its step (counted from 1; None outside of training), what it does there,
    and since when (time.perf_counter)."""

    step: int | None
    doing: str
    since: float


class Comm:
    """One rank. Engines override every method that has to reach the other ranks."""

    name = "serial"

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.device = device or torch.device("cpu")
        self.place = Place(None, "starting", time.perf_counter())
        self.watch: Watch | None = None  # ends the job if a rank is lost; see `connect`

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    def describe(self) -> str:
        """Engine and library versions, for the start-up line."""
        return self.name

    def mark(self, step: int | None, doing: str) -> None:
        """Note where this rank is now; the other ranks are told by the watch."""
        before, self.place = self.place, Place(step, doing, time.perf_counter())
        if self.watch and step != before.step:
            self.watch.tell()

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
                problem = str(error), error.exit_code
        result, problem = self.broadcast((result, problem))
        if problem is not None:
            raise CollectiveError(*problem)
        return result  # type: ignore[return-value]

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it meets an InputError on any, all raise the first."""
        result, problem = None, None
        try:
            result = action()
        except InputError as error:
            problem = str(error), error.exit_code
        problem = next((p for p in self.gather(problem) if p is not None), None)
        if problem is not None:
            raise CollectiveError(*problem)
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

    def lost_another(self, error: BaseException) -> bool:
        """Is it a collective that failed, most likely because another rank is gone?"""
        return False

    def leave_record(self) -> None:
        """Write down what is known of collectives that hang; the job is about to be ended."""

    def abort(self, code: int) -> None:
        """End every rank of the job at once; may be called from any thread."""
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)

    def close(self) -> None:
        """Leave in good order; all ranks call it."""

    def leave(self, code: int) -> None:
        """End this process after `close`."""
        self.stop_watch()
        raise SystemExit(code)

    def stop_watch(self, failed: bool = False) -> None:
        """From here on this rank may end without being missed."""
        if self.watch:
            self.watch.stop(failed)


def connect(
    engine: Wish = "auto",
    device: str = "auto",
    dist: Dist | None = None,
    folder: Path | None = None,
) -> Comm:
    """Find the other ranks and return the engine that talks to them (the table in choice.py).

    Args:
        engine: "auto" is serial on one rank, else Horovod where it is installed, else torch.
        device: "auto", "cpu" or "cuda"; each rank takes the GPU of its local rank.
        dist: time limit, compression and sizes of what travels.
        folder: where NCCL leaves its record of the last collectives if one hangs.

    Raises:
        InputError: MPI sees another number of ranks than the launcher started, the engine is not
            installed or cannot do what `dist` asks for, or there is no GPU for this rank.
    """
    dist = dist or Dist()
    comm = _connect(engine, device, dist, folder)
    if comm.size > 1:
        from hpc_xvr.distributed.watch import start_watch

        comm.watch = start_watch(comm, dist.timeout_s)
    return comm


def _connect(wish: Wish, device: str, dist: Dist, folder: Path | None) -> Comm:
    launch = discover()
    chosen = device_of(launch, device)
    if chosen.index is not None:
        torch.cuda.set_device(chosen)  # before MPI is imported: some MPIs bind to it
    world = _look_for_mpi(launch, chosen)
    engine = choose(
        launch.launcher,
        launch.size,
        wish,
        dist.compression,
        world.sees,
        world.seen,
        world.problem,
    )
    mpi: Any = None if engine == "torch without MPI" else world.mpi
    if chosen.type == "cuda":
        if chosen.index is None and mpi and launch.size > 1:  # only MPI can tell the local rank
            local = mpi.Split_type(_shared()).Get_rank()
            chosen = device_of(replace(launch, local_rank=local), device)
        torch.cuda.set_device(chosen)
    if engine == "horovod or torch":
        # All ranks must agree: an engine that only some of them can import would hang the rest.
        all_can = all(mpi.allgather(_horovod_usable(chosen)))
        if not all_can and launch.rank == 0:
            logger.info("Horovod is not installed for this device; using torch.distributed")
        engine = "horovod" if all_can else "torch"
    if engine == "serial":
        return Comm(device=chosen)
    if engine == "horovod":
        return _horovod(chosen, mpi, dist)
    return _torch(chosen, launch, mpi, dist, folder)


def device_of(launch: Launch, wish: str) -> torch.device:
    """This rank's device, before MPI is imported; without an index where only MPI can tell it."""
    gpus = torch.cuda.device_count() if wish != "cpu" and torch.cuda.is_available() else 0
    if wish == "cuda" and not gpus:
        raise InputError(
            "run.device is cuda, but torch sees no GPU here; use run.device=cpu, or "
            "a torch built for this machine's GPUs"
        )
    if not gpus:
        return torch.device("cpu")
    index = gpu_index(launch, gpus)
    return torch.device("cuda") if index is None else torch.device("cuda", index)


class _World(NamedTuple):
    """What MPI sees, how many ranks that are, its communicator, or why it cannot be imported."""

    sees: Sees
    seen: int = 1
    mpi: Any = None
    problem: str = ""


def _look_for_mpi(launch: Launch, device: torch.device) -> _World:
    by_mpi = launch.launcher in ("Open MPI", "PALS", "PMI")
    if launch.launcher == "torchrun" or (launch.size == 1 and not by_mpi):
        return _World("not asked")
    if device.type == "cpu":  # waiting must not take the core that the other thread computes on
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return _World("missing", problem=str(error).splitlines()[0])
    seen = MPI.COMM_WORLD.Get_size()
    sees: Sees = "all" if seen == launch.size else "alone" if seen == 1 else "other"
    return _World(sees, seen, MPI.COMM_WORLD)


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


def _horovod(device: torch.device, mpi: Any, dist: Dist) -> Comm:
    if not _horovod_installed():
        raise InputError(
            "engine horovod: Horovod is not installed for this torch; run "
            "jobs/setup.sh, or use --engine torch"
        )
    from hpc_xvr.distributed.horovod_engine import HorovodComm

    return HorovodComm(device, mpi, dist)


def _torch(device: torch.device, launch: Launch, mpi: Any, dist: Dist, folder: Path | None) -> Comm:
    from hpc_xvr.distributed.torch_engine import TorchComm

    return TorchComm(device, launch, mpi, dist, folder)


def host() -> str:
    """Name of this node."""
    return socket.gethostname()
