"""Start an MPI launcher, or its daemon on another node, so that SIGTERM does not end it.

    python shield.py mpirun -n 8 ...
    python shield.py --agent ssh node2 "... prted ..."

A scheduler that ends a job sends SIGTERM to all of its processes: PBS to those of the job's
sessions, Slurm to all there are on its nodes. The ranks answer it with a checkpoint; mpirun and its
daemons would end them before they can. SIGTERM is blocked here, which outlives exec (the ranks
unblock it; see train/stopping.py). The launcher still hands on SIGUSR1, and SIGINT ends it; the
kernel sends it that one if the job script is killed, so that no rank outlives its job.

An agent such as ssh starts a shell there, which hears SIGTERM as well; shells clear the mask, so
this one is told to ignore it.

A file by itself, of the standard library alone: it also runs on nodes of which nothing is known.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the command that follows."""
    parent, command = os.getppid(), sys.argv[1:]
    if command[0] == "--agent":
        command = command[1:]
        for i, word in enumerate(command):
            if word.endswith(("prted", "orted")):  # with what is to be set before it
                command[i] = f"trap '' TERM; {word}"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
    if os.getppid() != parent:  # it was killed just now
        sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"shield: cannot start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
