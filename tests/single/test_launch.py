"""Finding out who we are, from each launcher's variables, and how the ranks are connected."""

import itertools
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpc_xvr.distributed import launch, rendezvous
from hpc_xvr.distributed.choice import choose
from hpc_xvr.errors import InputError

OMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SECRET = {"HPC_XVR_SECRET": "open sesame"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}
FLUX = {
    "FLUX_JOB_ID": "f2B8x",
    "FLUX_JOB_NNODES": "2",
    "FLUX_JOB_SIZE": "6",
    "FLUX_TASK_RANK": "5",
    "FLUX_TASK_LOCAL_ID": "2",
}
PMI = {"PMI_RANK": "5", "PMI_SIZE": "6"}


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
        (
            {**PMI, "PALS_RANKID": "5", "PALS_LOCAL_RANKID": "2", "PMI_LOCAL_SIZE": "3"},
            ("PALS", 5, 6, 2, 3),
        ),
        (SRUN, ("srun", 5, 6, 2, None)),
        ({**SRUN, "PMIX_RANK": "5", "PMIX_NAMESPACE": "x"}, ("srun", 5, 6, 2, None)),  # --mpi=pmix
        ({**SRUN, **PMI}, ("PMI", 5, 6, 2, None)),  # --mpi=pmi2
        (  # MPICH's and Intel MPI's own mpiexec inside a Slurm job
            {**SRUN, "PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"},
            ("PMI", 1, 4, 1, None),
        ),
        (FLUX, ("flux", 5, 6, 2, None)),
        ({**FLUX, **PMI}, ("PMI", 5, 6, 2, None)),  # its PMI, which MPICH uses
        ({**FLUX, **OMPI}, ("Open MPI", 3, 8, 1, 2)),  # mpirun inside a Flux job
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
        ({"PALS_RANKID": "1", "PALS_LOCAL_RANKID": "1"}, "PALS set its rank but not PMI_SIZE"),
        ({"FLUX_TASK_RANK": "1", "FLUX_TASK_LOCAL_ID": "1"}, "flux set its rank but not FLUX_JOB"),
        ({"PMI_RANK": "x", "PMI_SIZE": "4"}, "not a number"),
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


def test_run_threads_comes_before_omp_num_threads_and_that_before_the_cores(monkeypatch):
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: range(8))
    assert launch.rank_threads(3, {**OMPI, "OMP_NUM_THREADS": "5"}) == 3
    assert launch.rank_threads(None, {**OMPI, "OMP_NUM_THREADS": "5"}) == 5
    assert launch.rank_threads(None, {**OMPI, "OMP_NUM_THREADS": "6, 2"}) == 6  # nested: the outer
    assert launch.rank_threads(None, {**OMPI, "OMP_NUM_THREADS": ""}) == 4
    assert launch.rank_threads(None, OMPI) == 4, "two ranks on the node"
    for text in ("0", "-2", "many", "2.5"):
        with pytest.raises(InputError, match=f"OMP_NUM_THREADS='{text}' is not a number of thr"):
            launch.rank_threads(None, {"OMP_NUM_THREADS": text})
        assert launch.rank_threads(2, {"OMP_NUM_THREADS": text}) == 2


@pytest.mark.parametrize(
    ("launcher", "ranks", "wish", "gradients", "sees", "expected"),
    [
        # one process
        (None, 1, "auto", "none", "not asked", "serial"),
        (None, 1, "serial", "bf16", "not asked", "serial"),
        (None, 1, "torch", "none", "not asked", "torch"),
        (None, 1, "horovod", "none", "not asked", "horovod"),
        ("Open MPI", 1, "auto", "none", "all", "serial"),
        ("Open MPI", 1, "auto", "none", "missing", "serial"),
        ("Open MPI", 1, "horovod", "none", "missing", "mpi4py cannot be imported (no lib)"),
        ("Open MPI", 1, "torch", "none", "missing", "torch without MPI"),
        ("Open MPI", 1, "auto", "none", "other", "started 1 ranks but MPI sees 3"),
        # many ranks that MPI has started
        ("Open MPI", 4, "auto", "none", "all", "horovod or torch"),
        ("PALS", 4, "auto", "fp16", "all", "horovod or torch"),
        ("PMI", 4, "auto", "bf16", "all", "torch"),
        ("Open MPI", 4, "horovod", "fp16", "all", "horovod"),
        ("Open MPI", 4, "horovod", "bf16", "all", "Horovod cannot sum bfloat16; use fp16"),
        ("Open MPI", 4, "torch", "bf16", "all", "torch"),
        ("Open MPI", 4, "serial", "none", "all", "engine serial is one rank, but Open MPI star"),
        # many ranks of which MPI knows nothing, or something else
        ("srun", 4, "torch", "none", "alone", "torch without MPI"),
        ("srun", 4, "auto", "none", "alone", "srun started 4 ranks but MPI sees 3"),
        ("srun", 4, "horovod", "none", "alone", "--engine torch, which needs no MPI"),
        ("srun", 4, "serial", "none", "alone", "but MPI sees"),
        ("srun", 4, "torch", "none", "missing", "torch without MPI"),
        ("srun", 4, "auto", "none", "missing", "srun started 4 ranks, but mpi4py cannot"),
        ("PMI", 4, "torch", "none", "other", "PMI started 4 ranks but MPI sees 3"),
        # torchrun
        ("torchrun", 4, "auto", "none", "not asked", "torch"),
        ("torchrun", 4, "torch", "bf16", "not asked", "torch"),
        ("torchrun", 4, "horovod", "none", "not asked", "torchrun works with --engine torch"),
        ("torchrun", 1, "horovod", "none", "not asked", "torchrun works with --engine torch"),
        ("torchrun", 4, "serial", "none", "not asked", "engine serial is one rank, but torchrun"),
        ("torchrun", 1, "auto", "none", "not asked", "serial"),
    ],
)
def test_which_engine_is_taken(launcher, ranks, wish, gradients, sees, expected):
    try:
        taken = choose(launcher, ranks, wish, gradients, sees, seen=3, problem="no lib")
    except InputError as error:
        assert expected in str(error)
    else:
        assert taken == expected


def test_every_situation_has_an_engine_or_an_error():
    """MPI is not asked where torchrun or nobody has started us; one rank alone is all of one."""
    by_mpi = itertools.product(("Open MPI", "PALS", "PMI"), (1, 4), ("missing", "all", "other"))
    situations = [*by_mpi, *itertools.product(("Open MPI", "PALS", "PMI"), (4,), ("alone",))]
    situations += itertools.product(("srun", "flux"), (4,), ("missing", "all", "alone", "other"))
    situations += [(who, 1, "not asked") for who in (None, "srun", "flux", "torchrun")]
    situations += [("torchrun", 4, "not asked")]
    for (launcher, ranks, sees), wish, gradients in itertools.product(
        situations, ("auto", "serial", "horovod", "torch"), ("none", "fp16", "bf16")
    ):
        try:
            taken = choose(launcher, ranks, wish, gradients, sees)
        except InputError:
            continue
        assert (taken == "serial") == (ranks == 1 and wish in ("auto", "serial"))
        assert not (taken.startswith("horovod") and gradients == "bf16")
        assert wish not in ("horovod", "torch") or taken.startswith(wish)
        assert taken in ("serial", "torch without MPI") or sees in ("all", "not asked")


@pytest.mark.parametrize(
    ("environment", "host"),
    [
        ({"SLURM_JOB_NODELIST": "nid[001003-001004,001009]"}, "nid001003"),
        ({"SLURM_JOB_NODELIST": "a1,b2", "SLURM_STEP_NODELIST": "b2"}, "b2"),
        ({"SLURM_JOB_NODELIST": "login-1"}, "login-1"),
        ({"MASTER_ADDR": "n7", "SLURM_JOB_NODELIST": "n1"}, "n7"),
    ],
)
def test_rank_0_is_on_the_first_node_of_the_job(environment, host):
    assert rendezvous.first_host(launch.Launch("srun", 5, 8, 1), environment) == host


def test_without_a_list_of_nodes_the_user_is_asked_for_the_host(tmp_path):
    nodes = tmp_path / "nodes"
    nodes.write_text("x3001\nx3002\n")
    far = launch.Launch("PALS", 1, 8, 1)
    assert rendezvous.first_host(far, {"PBS_NODEFILE": str(nodes)}) == "x3001"
    assert rendezvous.first_host(launch.Launch("PMI", 1, 2, 1, 2), {}) == "127.0.0.1"
    assert rendezvous.first_host(launch.Launch("flux", 1, 2, 1), {"FLUX_JOB_NNODES": "1"}) == (
        "127.0.0.1"
    )
    with pytest.raises(InputError, match=r"flux started 6 ranks.*MASTER_ADDR"):
        rendezvous.first_host(launch.Launch("flux", 5, 6, 2), FLUX)
    with pytest.raises(InputError, match="MASTER_ADDR"):
        rendezvous.first_host(far, {})


def test_jobs_have_ports_of_their_own():
    keys = [rendezvous.job_key({**SECRET, "SLURM_JOB_ID": str(n)}) for n in range(1000, 1050)]
    jobs = [rendezvous.ports(key, {}) for key in keys]
    assert len({ports[0] for ports in jobs}) > 45
    assert all(15_000 < port < 32_768 for ports in jobs for port in ports)
    assert rendezvous.ports(keys[0], {}) == jobs[0]
    assert rendezvous.ports(keys[0], {"MASTER_PORT": "999"}) == [999]
    other = rendezvous.job_key({"HPC_XVR_SECRET": "of another user", "SLURM_JOB_ID": "1000"})
    assert rendezvous.ports(other, {}) != jobs[0], "nobody else can foretell them"


def test_ranks_meet_past_ports_that_others_use():
    """A program that never answers holds the first port, another job the second one."""
    from hpc_xvr.distributed.torch_engine import _join, _serve

    me = {**SECRET, "MASTER_ADDR": "127.0.0.1", "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"}
    ports = rendezvous.ports(rendezvous.job_key(me), me)
    theirs = {**me, "SLURM_JOB_ID": "4712", "MASTER_PORT": str(ports[1])}
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", ports[0]))
        stranger.listen()
        rendezvous._announce("127.0.0.1", rendezvous.job_key(theirs), 2, 1, theirs)

        def rank(number):
            return rendezvous.meet(
                launch.Launch("srun", number, 2, number), None, _serve, _join, me
            )

        with ThreadPoolExecutor(2) as pool:
            second = pool.submit(rank, 1)  # comes first, finds nobody, and tries again
            first = pool.submit(rank, 0)
            first, second = first.result(40)["store"], second.result(40)["store"]
        first.set("word", "sesame")
        assert second.get("word") == b"sesame"


PAIR = """
import torch
from hpc_xvr.distributed.comm import connect
comm = connect("torch", "cpu")
print(comm.all_reduce(torch.tensor([1.0 + comm.rank])).item(), comm.describe())
comm.close()
comm.leave(0)
"""


OF_SLURM = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "4711", "MASTER_ADDR": "127.0.0.1"}
OF_FLUX = {"FLUX_JOB_SIZE": "2", "FLUX_JOB_ID": "f2B8x", "FLUX_JOB_NNODES": "1"}


@pytest.mark.parametrize(
    ("job", "rank_is", "local_is"),
    [
        (OF_SLURM, "SLURM_PROCID", "SLURM_LOCALID"),
        (OF_FLUX, "FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID"),
    ],
)
def test_torch_needs_no_mpi_where_the_launcher_tells_rank_and_size(job, rank_is, local_is):
    """As `srun -n 2` without PMIx, or `flux run -n 2`, where MPI would be two worlds of one."""
    job = {**job, "HPC_XVR_SECRET": f"open sesame {os.getpid()}"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR],
            env={**os.environ, **job, rank_is: str(rank), local_is: str(rank)},
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, errors = rank.communicate(timeout=120)
        assert out.startswith("3.0 torch.distributed"), errors
        assert "MPI" not in out


def test_what_horovod_cannot_sum_is_refused_at_start():
    from hpc_xvr.config import Dist
    from hpc_xvr.distributed.comm import connect

    with pytest.raises(InputError, match="Horovod cannot sum bfloat16; use fp16"):
        connect("horovod", "cpu", Dist(compression="bf16"))


HOROVOD = """
import torch, horovod.torch as hvd
from hpc_xvr.distributed.comm import connect
comm = connect("horovod", "cpu")
before = comm.gather(hvd.is_initialized())
total = comm.all_reduce(torch.ones(3)).tolist()
after = comm.gather(hvd.is_initialized())
if comm.is_root:
    print(before, total, after)
comm.close()
"""


@pytest.mark.slow
def test_horovod_starts_when_tensors_travel():
    """Its thread wakes up a thousand times a second: not for ranks that share a recording."""
    pytest.importorskip("horovod.torch")
    command = ["mpirun", "-n", "2", "--oversubscribe", sys.executable, "-c", HOROVOD]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert said.strip() == "[False, False] [2.0, 2.0, 2.0] [True, True]"
