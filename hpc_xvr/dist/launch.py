"""Who am I, and where do we meet: rank, size, device and the ranks' meeting point.

The one file that reads launcher and scheduler variables. It runs before MPI is imported, because
some MPIs bind to the GPU that is current when they start.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_xvr.errors import InputError


@dataclass(frozen=True)
class Launch:
    """What the launcher says of this process; `local_*` is None where it does not say."""

    launcher: str | None
    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    local_size: int | None = None


# launcher: rank, size, local rank, local size. First match counts, so the MPI that started the
# ranks comes before the scheduler that holds the job.
_LAUNCHERS: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    "PALS": ("PALS_RANKID", "PMI_SIZE", ("PALS_LOCAL_RANKID",), ("PALS_LOCAL_SIZE",)),
    "PMI": (
        "PMI_RANK",
        "PMI_SIZE",
        ("PMI_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
        ("PMI_LOCAL_SIZE", "MPI_LOCALNRANKS"),
    ),
    "torchrun": ("RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",)),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",), ()),
}


def discover(environment: Mapping[str, str] = os.environ) -> Launch:
    """Find the launcher of this process; none means one rank.

    Raises:
        InputError: the environment names a rank but no size, or they contradict each other.
    """
    for launcher, (rank_name, size_name, local_rank, local_size) in _LAUNCHERS.items():
        if rank_name not in environment:
            continue
        if launcher == "srun" and "SLURM_STEP_NUM_TASKS" not in environment:
            continue  # a batch script, not a task of a job step
        if launcher == "torchrun" and "MASTER_ADDR" not in environment:
            continue  # RANK alone is too common a name to mean anything
        rank = _integer(environment, rank_name, launcher)
        size = _integer(environment, size_name, launcher)
        if not 0 <= rank < size:
            raise InputError(f"{launcher}: {rank_name}={rank} does not fit {size_name}={size}; "
                             "start all ranks with one launcher")
        return Launch(
            launcher,
            rank,
            size,
            _optional(environment, local_rank, launcher),
            _optional(environment, local_size, launcher),
        )
    return Launch(None)


def _integer(environment: Mapping[str, str], name: str, launcher: str) -> int:
    try:
        return int(environment[name])
    except KeyError:
        raise InputError(f"{launcher} set its rank but not {name}: the environment is only partly "
                         "that of a launcher; start with mpirun, or unset it") from None
    except ValueError:
        raise InputError(f"{launcher}: {name}={environment[name]!r} is no number") from None


def _optional(environment: Mapping[str, str], names: tuple[str, ...], launcher: str) -> int | None:
    return next((_integer(environment, n, launcher) for n in names if n in environment), None)


def abort_world(code: int) -> None:
    """End all ranks, if MPI has started and there are others; for failures before `connect` ends.

    Without it this rank's exit would wait in MPI_Finalize for ranks that wait for it elsewhere.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi and mpi.Is_initialized() and mpi.COMM_WORLD.Get_size() > 1:
        mpi.COMM_WORLD.Abort(code)


def cpu_threads(launch: Launch) -> int:
    """Cores for this rank: those it is bound to, or its share of the node's."""
    bound = len(os.sched_getaffinity(0))
    if bound < (os.cpu_count() or 1):
        return bound
    return max(1, bound // (launch.local_size or launch.size))


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, in huge pages: for models that run on CPUs.

    glibc hands large blocks back to the system when they are freed, and a step then spends a
    fifth of its time on page faults. To be called before torch is imported; without glibc it does
    nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for huge pages
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX: no block by mmap


def gpu_index(launch: Launch, gpus: int) -> int | None:
    """Index of this rank's GPU among the visible ones; None if only MPI can tell the local rank.

    Raises:
        InputError: more ranks on the node than GPUs.
    """
    if gpus == 1 and any(f"{name}_VISIBLE_DEVICES" in os.environ for name in ("CUDA", "ROCR")):
        return 0  # jobs/affinity.sh or the scheduler gave this rank one GPU
    if launch.local_rank is None:
        return 0 if launch.size == 1 else None
    if launch.local_rank >= gpus:
        raise InputError(f"rank {launch.rank} is number {launch.local_rank} on its node, which "
                         f"shows {gpus} GPUs; start at most {gpus} ranks a node, or use "
                         "--set run.device=cpu")
    return launch.local_rank


# Where ranks meet that torch.distributed connects.

_MEETING_S = 120.0
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "COBALT_JOBID", "FLUX_JOB_ID")
_FIRST_PORT, _PORTS = 16_000, 16_000  # below the range that systems hand out by themselves


def meet(
    launch: Launch,
    tell: Callable[[Any], Any] | None,
    serve: Callable[[str, int, int], Any],
    join: Callable[[str, int, int, float], Any],
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Arguments of init_process_group: rank, size and the store at which all ranks have met.

    Rank 0 opens the store on any free port. The others learn which over MPI (`tell` broadcasts from
    rank 0), or where there is none by asking at ports that follow from the job's number; rank 0
    answers at the first of them that is free. torchrun has a store of its own.

    Args:
        serve: (host, port, size) -> store, with the port it got as `port`.
        join: (host, port, size, seconds) -> store.

    Raises:
        InputError: the ranks did not find each other.
    """
    me = {"rank": launch.rank, "world_size": launch.size}
    if launch.launcher == "torchrun":
        return {**me, "init_method": "env://"}
    if launch.size == 1:
        return {**me, "store": serve("127.0.0.1", 0, 1)}
    alone = launch.size == launch.local_size  # on its node
    host = ("127.0.0.1" if alone else socket.gethostname()) if tell else first_host(launch, environment)
    job, port = job_id(environment), 0
    store = serve(host, 0, launch.size) if launch.rank == 0 else None
    if tell:
        host, port = tell((host, store.port) if store else None)
    elif store:
        _announce(host, job, launch.size, store.port, environment)
    else:
        port = _ask(host, job, environment)
    return {**me, "store": store or join(host, port, launch.size, _MEETING_S)}


def job_id(environment: Mapping[str, str] = os.environ) -> str:
    """The scheduler's number of this job and step; outside of a job that of the launcher."""
    job = next((environment[name] for name in _JOBS if name in environment), None)
    return f"{job}.{environment.get('SLURM_STEP_ID', '')}" if job else f"process {os.getppid()}"


def first_host(launch: Launch, environment: Mapping[str, str] = os.environ) -> str:
    """Host of rank 0: the first of the job's nodes."""
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"]
    if launch.size == launch.local_size:
        return "127.0.0.1"
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        found = re.match(r"([^\[,]+)(?:\[(\d+))?", environment.get(name, ""))
        if found:
            return found[1] + (found[2] or "")
    for name in ("PBS_NODEFILE", "COBALT_NODEFILE"):
        if name in environment:
            return Path(environment[name]).read_text().split()[0]
    raise InputError(
        f"{launch.launcher} started {launch.size} ranks, but nothing tells where rank 0 is; set "
        "MASTER_ADDR to its host, or start with mpirun"
    )


def ports(job: str, environment: Mapping[str, str] = os.environ) -> list[int]:
    """Ports to try, in this order: spread by the job's number, so that jobs rarely collide."""
    if "MASTER_PORT" in environment:
        return [int(environment["MASTER_PORT"])]
    first = zlib.crc32(job.encode())
    return [_FIRST_PORT + (first + 331 * i) % _PORTS for i in range(16)]


def _announce(
    host: str, job: str, size: int, store: int, environment: Mapping[str, str]
) -> None:
    """Tell the other ranks the store's port, at the first free one of the job's ports."""
    tried = ports(job, environment)
    for port in tried:
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("" if host != "127.0.0.1" else host, port))
            break
        except OSError:
            server.close()
    else:
        raise InputError(
            f"ports {tried[0]}, {tried[-1]} and those between of {host} are all in use; set "
            "MASTER_PORT to a free one, or start with mpirun"
        )
    server.listen(size)
    server.settimeout(_MEETING_S)

    def answer() -> None:
        left = size - 1
        with server, contextlib.suppress(TimeoutError):
            while left:
                link, _ = server.accept()
                with link, contextlib.suppress(OSError):
                    link.settimeout(2)
                    if link.recv(1000).decode() == f"hpc_xvr {job}":
                        link.sendall(f"hpc_xvr {job} {store}".encode())
                        left -= 1

    threading.Thread(target=answer, daemon=True).start()


def _ask(host: str, job: str, environment: Mapping[str, str]) -> int:
    """The port of the store: whoever else listens at one of the ports gives another answer."""
    end = time.monotonic() + _MEETING_S
    while time.monotonic() < end:
        for port in ports(job, environment):
            with (
                contextlib.suppress(OSError),
                socket.create_connection((host, port), timeout=2) as link,
            ):
                link.sendall(f"hpc_xvr {job}".encode())
                *name, found = link.recv(1000).decode(errors="replace").rsplit(" ", 1)
                if name == [f"hpc_xvr {job}"]:
                    return int(found)
        time.sleep(0.2)
    raise InputError(
        f"rank 0 was not found on {host} within {_MEETING_S:g} s; set MASTER_ADDR to its host, or "
        "start with mpirun"
    )
