"""Who am I: rank, size, GPU and CPU threads of this process, from its environment.

The one file that reads the launchers' variables. It runs before MPI is imported, because some MPIs
bind to the GPU that is current when they start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

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
    "PALS": (
        "PALS_RANKID",
        "PMI_SIZE",
        ("PALS_LOCAL_RANKID",),
        ("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
    ),
    "PMI": (  # MPICH, Cray MPICH and Intel MPI, by their own mpiexec or a scheduler's PMI
        "PMI_RANK",
        "PMI_SIZE",
        ("PMI_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "FLUX_TASK_LOCAL_ID"),
        ("PMI_LOCAL_SIZE", "MPI_LOCALNRANKS"),
    ),
    "torchrun": ("RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",)),
    "flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", ("FLUX_TASK_LOCAL_ID",), ()),
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
            raise InputError(
                f"{launcher}: {rank_name}={rank} does not fit {size_name}={size}; "
                "start all ranks with one launcher"
            )
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
        raise InputError(
            f"{launcher} set its rank but not {name}: the environment is only partly "
            "that of a launcher; start with mpirun, or unset it"
        ) from None
    except ValueError:
        raise InputError(f"{launcher}: {name}={environment[name]!r} is not a number") from None


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


def rank_threads(wish: int | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """CPU threads for what this rank computes: `wish` (config key run.threads), else
    OMP_NUM_THREADS, else its cores.

    Raises:
        InputError: OMP_NUM_THREADS is not a positive number.
    """
    if wish:
        return wish
    text = environment.get("OMP_NUM_THREADS", "")
    if not text:
        return cpu_threads(discover(environment))
    first = text.split(",")[0].strip()  # the other numbers of a list are for threads of threads
    if not first.isdecimal() or int(first) == 0:
        raise InputError(
            f"OMP_NUM_THREADS={text!r} is not a number of threads; set it to 1 or more, unset it, "
            "or set run.threads"
        )
    return int(first)


def gpu_index(launch: Launch, gpus: int) -> int | None:
    """Index of this rank's GPU among the visible ones; None if only MPI can tell the local rank.

    Raises:
        InputError: more ranks on the node than GPUs.
    """
    if gpus == 1 and any(f"{name}_VISIBLE_DEVICES" in os.environ for name in ("CUDA", "ROCR")):
        return 0  # the job script (affinity.sh) or the scheduler gave this rank one GPU
    if launch.local_rank is None:
        return 0 if launch.size == 1 else None
    if launch.local_rank >= gpus:
        raise InputError(
            f"rank {launch.rank} is number {launch.local_rank} on its node, which "
            f"shows {gpus} GPUs; start at most {gpus} ranks a node, or use "
            "--set run.device=cpu"
        )
    return launch.local_rank
