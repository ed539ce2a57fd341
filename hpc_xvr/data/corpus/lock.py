"""One writer of a corpus, or of another result, at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from hpc_xvr.errors import PassingError


class WriterLock:
    """A file with the writer's host and process; the kernel's lock on it ends with the process."""

    def __init__(self, path: Path, what: str | None = None) -> None:
        """`what`: is being written, for messages; None: the corpus that the file is in.

        Raises:
            PassingError: another process writes it.
        """
        self._path = path
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
            alone: bool | None = True
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                alone = False
            except OSError:  # a file system without locks: the names in the file decide
                alone = None
            # Its last owner may have removed the file between our open and our lock.
            if not path.exists() or os.fstat(self._file).st_ino != path.stat().st_ino:
                os.close(self._file)
                continue
            break
        holder = os.read(self._file, 200).decode().split()
        if alone is False or (len(holder) == 2 and self._lives(holder[0], holder[1], alone)):
            os.close(self._file)
            name = " on ".join(reversed(holder[:2])) or "unknown"
            raise PassingError(
                f"{what or f'corpus {path.parent}'}: is being written by process {name}; wait for "
                f"it, or delete {path} if it no longer runs"
            )
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        except OSError:  # the disk is full
            os.close(self._file)
            raise

    @staticmethod
    def _lives(host: str, process: str, alone: bool | None) -> bool:
        if host != socket.gethostname():
            return True
        if alone:
            return False
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def release(self) -> None:
        """Let the next writer in."""
        self._path.unlink(missing_ok=True)
        os.close(self._file)
