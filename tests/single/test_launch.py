"""Finding out who we are, from each launcher's variables."""

import pytest

from hpc_xvr.dist import launch
from hpc_xvr.errors import InputError

OMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (None, 0, 1, None, None)),
        (OMPI, ("Open MPI", 3, 8, 1, 2)),
        ({**SRUN, **OMPI}, ("Open MPI", 3, 8, 1, 2)),  # mpirun inside a Slurm job
        (
            {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"},
            ("PMI", 1, 4, 1, 4),
        ),
        (
            {"PALS_RANKID": "7", "PMI_SIZE": "16", "PMI_RANK": "7", "PALS_LOCAL_RANKID": "3"},
            ("PALS", 7, 16, 3, None),
        ),
        (SRUN, ("srun", 5, 6, 2, None)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (None, 0, 1, None, None)),  # a batch script
        (
            {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "n1",
            },
            ("torchrun", 1, 2, 1, 2),
        ),
        ({"RANK": "9"}, (None, 0, 1, None, None)),
    ],
)
def test_each_launcher_is_recognised(environment, expected):
    found = launch.discover(environment)
    assert (found.launcher, found.rank, found.size, found.local_rank, found.local_size) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE"),
        ({"PMI_RANK": "4", "PMI_SIZE": "4"}, "does not fit"),
        ({"PMI_RANK": "x", "PMI_SIZE": "4"}, "no number"),
    ],
)
def test_a_partly_set_environment_is_an_error(environment, message):
    with pytest.raises(InputError, match=message):
        launch.discover(environment)


def test_each_local_rank_takes_its_own_gpu_and_never_shares_one(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.gpu_index(launch.Launch("Open MPI", 5, 8, 1, 4), 4) == 1
    with pytest.raises(InputError, match="at most 4 ranks"):
        launch.gpu_index(launch.Launch("Open MPI", 5, 8, 5, 8), 4)
    assert launch.gpu_index(launch.Launch("srun", 5, 8), 4) is None  # MPI must tell
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert launch.gpu_index(launch.Launch("Open MPI", 5, 8, 3, 4), 1) == 0  # a wrapper chose
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "4")
    assert launch.gpu_index(launch.Launch("Open MPI", 5, 8, 3, 4), 1) == 0


def test_threads_are_the_cores_a_rank_is_bound_to_or_its_share(monkeypatch):
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: range(8))
    assert launch.cpu_threads(launch.Launch("Open MPI", 0, 4, 0, 2)) == 4
    assert launch.cpu_threads(launch.Launch(None)) == 8
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: range(2))
    assert launch.cpu_threads(launch.Launch("Open MPI", 0, 4, 0, 4)) == 2
