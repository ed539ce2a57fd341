"""Where ranks meet that torch.distributed connects: the store's port, over MPI or without it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpc_xvr.distributed.launch import Launch
from hpc_xvr.errors import InputError

# Where ranks meet that torch.distributed connects.

_MEETING_S = 120.0
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "COBALT_JOBID", "FLUX_JOB_ID")
_FIRST_PORT = 16_000  # below the range that systems hand out by themselves
_PORTS = 16_000


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
    host = (
        ("127.0.0.1" if alone else socket.gethostname())
        if tell
        else first_host(launch, environment)
    )
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


def _announce(host: str, job: str, size: int, store: int, environment: Mapping[str, str]) -> None:
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
