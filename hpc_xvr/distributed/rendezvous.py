"""Where ranks meet that torch.distributed connects: the store's port, over MPI or without it."""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import re
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpc_xvr.distributed.entrance import LOOPBACK, Entrance, enter, listen
from hpc_xvr.distributed.launch import Launch
from hpc_xvr.errors import InputError, PassingError
from hpc_xvr.files import private_folder, private_text

_MEETING_S = 120.0
SECRET = "HPC_XVR_SECRET"
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
    rank 0), or where there is none by asking at ports that follow from the job's number and the
    user's secret; rank 0 answers at the first of them that is free, and only ranks that know the
    secret. torchrun has a store of its own.

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
        return {**me, "store": serve(LOOPBACK, 0, 1)}
    alone = launch.size == launch.local_size  # on its node
    host = (
        (LOOPBACK if alone else socket.gethostname()) if tell else first_host(launch, environment)
    )
    port = 0
    key = b"" if tell else job_key(environment)
    store = serve(host, 0, launch.size) if launch.rank == 0 else None
    if tell:
        host, port = tell((host, store.port) if store else None)
    elif store:
        _announce(host, key, launch.size, store.port, environment)
    else:
        port = _ask(host, key, launch.rank, environment)
    return {**me, "store": store or join(host, port, launch.size, _MEETING_S)}


def job_id(environment: Mapping[str, str] = os.environ) -> str:
    """The scheduler's number of this job and step; outside of a job that of the launcher."""
    job = next((environment[name] for name in _JOBS if name in environment), None)
    return f"{job}.{environment.get('SLURM_STEP_ID', '')}" if job else f"process {os.getppid()}"


def first_host(launch: Launch, environment: Mapping[str, str] = os.environ) -> str:
    """Host of rank 0: the first of the job's nodes."""
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"]
    if launch.size == launch.local_size or environment.get("FLUX_JOB_NNODES") == "1":
        return LOOPBACK
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


def job_key(environment: Mapping[str, str] = os.environ) -> bytes:
    """What the ranks of this job know and no other user does: the user's secret, and the job's
    number, which makes it another one for each job.

    Raises:
        InputError: there is no secret, and none can be kept.
    """
    return hmac.digest(_secret(environment), job_id(environment).encode(), "sha256")


def _secret(environment: Mapping[str, str]) -> bytes:
    """HPC_XVR_SECRET, or a file that only the user can read, made when it is first needed."""
    if environment.get(SECRET):
        return environment[SECRET].encode()
    config = environment.get("XDG_CONFIG_HOME")
    folder = (Path(config) if config else Path.home() / ".config") / "hpc_xvr"
    try:
        private_folder(folder)
        return private_text(folder / "secret", secrets.token_hex(32)).encode()
    except InputError as error:
        raise InputError(
            f"{error}. It would hold the secret by which ranks know each other; set {SECRET} to "
            "the same random text for all ranks instead, or start with mpirun"
        ) from None


def ports(key: bytes, environment: Mapping[str, str] = os.environ) -> list[int]:
    """Ports to try, in this order: jobs rarely collide, and nobody else can foretell them."""
    if "MASTER_PORT" in environment:
        return [int(environment["MASTER_PORT"])]
    first = int.from_bytes(hmac.digest(key, b"port", "sha256"), "big")
    return [_FIRST_PORT + (first + 331 * i) % _PORTS for i in range(16)]


def _announce(host: str, key: bytes, size: int, store: int, environment: Mapping[str, str]) -> None:
    """Tell the other ranks the store's port, at the first free one of the job's ports."""
    tried = ports(key, environment)
    server = None
    for port in tried:
        try:
            server = listen(host, port)
            break
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    if server is None:
        raise PassingError(
            f"ports {tried[0]}, {tried[-1]} and those between of {host} are all in use; set "
            "MASTER_PORT to a free one, or start with mpirun"
        )
    events = selectors.DefaultSelector()
    entrance = Entrance(server, key, size, events, str(store))

    def answer() -> None:
        end, met = time.monotonic() + _MEETING_S, set[int]()
        while len(met) < size - 1 and time.monotonic() < end:
            for event, _ in events.select(0.2):
                if guest := entrance.handle(event):
                    met.add(guest.rank)
                    guest.link.close()
            entrance.tidy()
        entrance.close()
        events.close()

    threading.Thread(target=answer, daemon=True).start()


def _ask(host: str, key: bytes, rank: int, environment: Mapping[str, str]) -> int:
    """The port of the store, from whoever at one of the ports knows the secret."""
    end = time.monotonic() + _MEETING_S
    while time.monotonic() < end:
        for port in ports(key, environment):
            with (
                contextlib.suppress(OSError),
                socket.create_connection((host, port), timeout=2) as link,
            ):
                return int(enter(link, key, rank, 2))
        time.sleep(0.2)
    raise PassingError(
        f"rank 0 was not found on {host} within {_MEETING_S:g} s; if it lives, set MASTER_ADDR to "
        f"its host, and {SECRET} to the same random text for all ranks if they have no home folder "
        "in common, or start with mpirun"
    )
