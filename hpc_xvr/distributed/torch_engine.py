"""torch.distributed: DDP over NCCL on GPUs, Gloo on CPUs; started by MPI, torchrun or srun."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from hpc_xvr.config import Dist
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.distributed.launch import Launch
from hpc_xvr.distributed.mpi import mpi_version
from hpc_xvr.distributed.rendezvous import meet
from hpc_xvr.errors import PassingError, explain

T = TypeVar("T")
_NET_S = 30  # the watch ends a hanging job first, as it can name the rank
# NCCL's flight recorder: the last collectives of each rank, written out when one hangs.
_RECORDER = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    "TORCH_FR_BUFFER_SIZE": "2000",  # its name since torch 2.9
}


# Without annotations: DDP checks them, and takes no strings. Functions of our own: DDP refuses
# torch's bf16 hook on CPUs by its name, from the time when Gloo could not sum bfloat16.
def _fp16(group, bucket):  # type: ignore[no-untyped-def]
    return default_hooks.fp16_compress_hook(group, bucket)


def _bf16(group, bucket):  # type: ignore[no-untyped-def]
    return default_hooks.bf16_compress_hook(group, bucket)


_HOOKS = {"fp16": _fp16, "bf16": _bf16}


def record_flight(folder: Path | None) -> None:
    """Switch NCCL's flight recorder on, unless the environment already says how."""
    for name, value in _RECORDER.items():
        os.environ.setdefault(name, value)
    if folder:
        for name in ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"):
            os.environ.setdefault(name, str(folder.absolute() / "nccl-trace-rank-"))


class TorchComm(Comm):
    """torch.distributed for tensors; objects go over MPI where it started us."""

    name = "torch"

    def __init__(
        self,
        device: torch.device,
        launch: Launch,
        mpi: Any,
        dist: Dist,
        folder: Path | None = None,
    ) -> None:
        super().__init__(launch.rank, launch.size, device)
        self._mpi, self._dist = mpi, dist
        on_gpu = device.type == "cuda"
        if on_gpu:
            record_flight(folder)
        self._folder = folder
        try:
            td.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                **meet(launch, mpi.bcast if mpi else None, _serve, _join),
                timeout=datetime.timedelta(seconds=dist.timeout_s + _NET_S),
            )
        except td.DistError as error:  # of the network, or of the store there
            raise PassingError(f"the ranks cannot reach each other: {explain(error)}") from None
        self._flag_tensor = torch.zeros(1)
        self._work: Any = None

    def describe(self) -> str:
        backend = "Gloo"
        if self.device.type == "cuda":
            backend = "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
        mpi = f", {mpi_version()}" if self._mpi else ""
        return f"torch.distributed {torch.__version__} ({backend}{mpi})"

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
        wrapped = DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            bucket_cap_mb=self._dist.bucket_mb,
            gradient_as_bucket_view=True,
        )
        if self._dist.compression != "none":
            wrapped.register_comm_hook(None, _HOOKS[self._dist.compression])
        return wrapped, optimizer

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else model.no_sync()  # type: ignore[operator]

    def lost_another(self, error: BaseException) -> bool:
        # Gloo's errors are plain RuntimeErrors that name their source file or the connection.
        words = ("gloo", "connection closed", "connection reset", "nccl")
        text = str(error).lower()
        return isinstance(error, td.DistError) or (
            isinstance(error, RuntimeError) and any(word in text for word in words)
        )

    def leave_record(self) -> None:
        """NCCL's flight record as torch writes it, for `torchfrtrace`."""
        if self.device.type != "cuda" or self._folder is None:
            return
        names = ("_dump_fr_trace", "_dump_nccl_trace")  # since torch 2.9; before
        module = torch._C._distributed_c10d
        dump = next((getattr(module, name) for name in names if hasattr(module, name)), None)
        with contextlib.suppress(Exception):  # torch's own matters, and the job ends anyway
            if dump:
                (self._folder / f"nccl-trace-rank-{self.rank}").write_bytes(dump())

    def abort(self, code: int) -> None:
        self.stop_watch(failed=True)
        if self._mpi:
            self._mpi.Abort(code)
        os._exit(code)

    def close(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None
        self.barrier()
        self.stop_watch()
        td.destroy_process_group()

    def leave(self, code: int) -> None:
        # Gloo's threads may still let go of tensors while Python shuts down, which aborts the
        # process; so everything else is wound up here and Python's own shutdown left out.
        self.stop_watch()
        atexit._run_exitfuncs()
        if self._mpi:
            from mpi4py import MPI

            MPI.Finalize()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(host: str, port: int, size: int) -> Any:
    """The store at which ranks meet, on rank 0."""
    return td.TCPStore(host, port, size, True, wait_for_workers=False)


def _join(host: str, port: int, size: int, wait_s: float) -> Any:
    """The same on the other ranks."""
    return td.TCPStore(host, port, size, False, timeout=datetime.timedelta(seconds=wait_s))
