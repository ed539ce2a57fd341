"""How the C library keeps memory that models free on CPUs."""

from __future__ import annotations

import contextlib
import ctypes
import os


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
