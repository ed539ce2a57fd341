"""Take a corpus out of this node's page cache, so that a run reads it from the disk.

    python benchmarks/fresh.py CORPUS [FOLDER ...]     folders (copies on the node) are deleted

time_to_quality.py starts it on every rank. Only files of the corpus are affected, and no rights
are needed beyond writing them. Prints the share of their bytes that is in memory all the same:
nearly 1 where the file system does not care.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path


def evict(files: Iterable[Path]) -> float:
    """Share of these files' pages that stays in memory."""
    pages = left = 0
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not on disk yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        here, there = in_memory(path)
        left, pages = left + here, pages + there
    return left / max(pages, 1)


def in_memory(path: Path) -> tuple[int, int]:
    """Pages of a file in the page cache, and all of them."""
    size = path.stat().st_size
    if not size:
        return 0, 0
    count = -(-size // mmap.PAGESIZE)
    known = (ctypes.c_ubyte * count)()
    # Nothing is written, but ctypes takes addresses of writable memory only.
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as view:
        first = ctypes.c_char.from_buffer(view)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), known):
            raise OSError(ctypes.get_errno(), "mincore", str(path))
        del first  # or the view cannot be closed
    return sum(byte & 1 for byte in known), count


if __name__ == "__main__":
    corpus, *folders = map(Path, sys.argv[1:])
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"in memory: {evict(path for path in corpus.rglob('*') if path.is_file()):.6f}")
