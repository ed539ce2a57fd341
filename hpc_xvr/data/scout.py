"""A process that opens HDF5 files before we do.

A file that crashes the library, or makes it loop or take all memory, ends that and not the program.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

from hpc_xvr.errors import InputError

_MEMORY = 2**30
"""Bytes that looking at all objects of a file may take."""
_SECONDS, _MOST_SECONDS = 2, 60
"""The same in seconds of the processor, for small files and large ones; milliseconds are usual."""
_BYTES_A_SECOND = 2**20
"""Between them; objects are what takes time, 100,000 of them ten seconds and tens of megabytes."""
_ENDS = 2**26
"""Bytes at the beginning and the end of a file in which its global heap is looked for."""

_SCRIPT = f"""
import os, resource, sys, h5py

def look(name, item):
    for key in item.attrs:
        item.attrs[key]
    if isinstance(item, h5py.Dataset) and item.size == 1 and item.dtype.kind in "OSV":
        if not (item.is_virtual or item.external):
            item[()]

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
                look("/", file)
                file.visititems(look)
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


def check_survivable(path: Path) -> None:
    """Refuse an HDF5 file that the library does not survive.

    What it does not survive are damaged virtual datasets and texts. They lie in a global heap, and
    files without one are not looked at. A file is looked at once, until it changes.

    Raises:
        InputError: opening what is in it crashed another process, or never ended.
    """
    found = path.stat()
    _check(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1024)
def _check(path: Path, size: int, changed: int) -> None:
    global _scout
    if not _has_global_heap(path, size):
        return
    seconds = min(_SECONDS + size // _BYTES_A_SECOND, _MOST_SECONDS)
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


def _has_global_heap(path: Path, size: int) -> bool:
    """Whether the mark of one stands in the first or last bytes of a file."""
    if size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(b"GCOL", 0, _ENDS) >= 0 or data.find(b"GCOL", max(0, size - _ENDS)) >= 0
