"""Reads camera files as ingest does, one a line of standard input, and says how each one ended.

A process of its own, so that a crash of a file library is seen and its memory can be limited.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np

from hpc_xvr.data.ingest.sources import find_recordings
from hpc_xvr.data.ingest.treatment import Treatment
from hpc_xvr.errors import InputError

ROOM = 2**28
"""Bytes that reading may take on top of what the libraries take by themselves."""

SECONDS = 5
"""Of the processor, for a small file."""


def read(path: Path) -> str:
    """readable with a digest of each recording, refused, or what must not happen."""
    digests = []
    begin = time.process_time()
    try:
        for source in find_recordings([path]):
            recording, _, _ = Treatment(crop=True).open(source)
            total = 0
            for frame in recording.frames():
                total = zlib.crc32(np.ascontiguousarray(frame), total)
                if frame.shape != recording.shape[1:] or frame.dtype != recording.dtype:
                    return f"frames of {frame.shape} {frame.dtype}"
            digests.append(f"{total:08x} {recording.shape}")
    except InputError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, (MemoryError, RecursionError)):
                return f"{type(cause).__name__}: {cause}"
            cause = cause.__cause__ or cause.__context__
        if (seconds := time.process_time() - begin) > SECONDS:
            return f"took {seconds:.1f} s"
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    if (seconds := time.process_time() - begin) > SECONDS:
        return f"took {seconds:.1f} s"
    return " ".join(["readable", *digests])


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("hpc_xvr").addHandler(logging.NullHandler())
    for path in sys.argv[1:]:  # undamaged ones: imports what the libraries import late
        assert read(Path(path)).startswith("readable"), path
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", flush=True)
    for line in sys.stdin:
        print(read(Path(line.strip())), flush=True)


if __name__ == "__main__":
    main()
