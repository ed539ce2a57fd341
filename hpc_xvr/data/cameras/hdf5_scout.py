"""A process that opens HDF5 files before we do.

A file that crashes the library, or makes it loop or take all memory, ends that and not the program.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from hpc_xvr.errors import InputError

_MEMORY = 2**30
"""Bytes that looking at all objects of a file may take."""
_SECONDS = 4
"""The same in time of the processor, for a small file."""
_BYTES_A_SECOND = 2**22
"""And for a large one; its objects are what takes time, a hundred bytes each at the least."""

_SCRIPT = f"""
import os, resource, sys, h5py
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
own = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for line in sys.stdin.buffer:
    seconds, path = line.split()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds),) * 2)
            most = own + {_MEMORY}
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            if hard == resource.RLIM_INFINITY or hard > most:
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
            with h5py.File(bytes.fromhex(path.decode()), "r", locking=False) as file:
                file.visititems(lambda name, item: None)
            os._exit(0)
        except MemoryError:
            os._exit(2)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class _Scout:
    """The process, which forks for each file: a file costs a millisecond, the process a fifth of a
    second once."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the program; the end of its input ends it
        )
        atexit.register(self.end)

    def look(self, path: Path, seconds: int) -> int | None:
        """The exit status of a process that opened all that is in a file, below 0 the signal that
        killed it; None: this process itself is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(b"%d %s\n" % (seconds, os.fsencode(path).hex().encode()))
            self._process.stdin.flush()
            return int(self._process.stdout.readline())
        self.end()
        return None

    def end(self) -> None:
        if self.parent == os.getpid():
            self._process.kill()
            self._process.wait()


_scout: _Scout | None = None
_lock = threading.Lock()


def check_survivable(path: Path, size: int) -> None:
    """Refuse a file of `size` bytes that the HDF5 library does not survive.

    Raises:
        InputError: opening what is in it crashed another process, or never ended.
    """
    global _scout
    seconds = _SECONDS + size // _BYTES_A_SECOND
    path = path.absolute()
    with _lock:
        for _ in range(2):  # it may have been killed since the last file
            if _scout is None or _scout.parent != os.getpid():
                _scout = _Scout()
            status = _scout.look(path, seconds)
            if status is not None:
                break
            _scout = None
    if status in (0, 1):
        return
    if status is None:
        raise InputError(
            f"{path}: is not read, as no process can be started to look whether the HDF5 library "
            "survives it: see the memory and the processes that are left"
        )
    how = "crashes"
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        how = f"has not ended after {seconds} s"
    elif status == 2:
        how = "runs out of memory"
    raise InputError(
        f"{path}: the HDF5 library {how} when it opens what is in this file: it is damaged, copy "
        "or export it again"
    )
