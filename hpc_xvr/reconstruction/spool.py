"""Finished pieces of a result on disk, so that a run that was killed goes on where it was, and
ranks can hand their shares to the one that writes the file.

Beside OUT there is a folder `.OUT.unfinished` while it is made:

    about.json               what the frames depend on: method, weights, sources, settings
    writer.lock              one run at a time writes OUT
    000000040-000000060      frames 40 to 59: a checksum, then their pixels; behind the checksum,
                             one of what they are made of if the cameras were still recording
    taken-000000040          some rank makes the piece from frame 40 on
    failed-0001              rank 1 has given up
    news.json                while several ranks follow cameras: lost frames; gone when it is over

It can only be read and written by its owner. A piece has its name when it is complete; its checksum
says whether it still is after a crash of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from hpc_xvr.data.corpus.lock import WriterLock
from hpc_xvr.data.ranks import Ranks
from hpc_xvr.errors import InputError, PassingError, explain_os_error, os_problem
from hpc_xvr.files import private_folder, remove
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.overlap import Stopped
from hpc_xvr.reconstruction.pipeline import Piece
from hpc_xvr.text import parse_json

FULL = 65535
MADE_BY = ("method", "adaptation", "numbers", "tile", "device", "version")
"""Facts that, with the frames it is made of, decide a piece."""
_POLL = 0.005, 0.05
"""Seconds between two looks for a piece: at first, and at most."""
_LOCK = "writer.lock"
ABOUT = "about.json"
_HEAD = 64
"""Bytes of a piece's first line, at most."""


class Spool:
    """The finished pieces of the result `out`; all ranks open it together.

    Args:
        out: the file that is made.
        facts: name -> value of everything that the frames depend on. Pieces of a run with other
            ones are deleted, and the log says which fact has changed.
        shape: of a frame.
        kind: of its numbers: uint16 for shares of 65535, as a result of that type holds them, or
            float32.
        ranks: who work on it.

    Raises:
        InputError: another run writes this result, or the folder cannot be made.
    """

    def __init__(
        self,
        out: Path,
        facts: Mapping[str, str],
        shape: tuple[int, int],
        kind: str,
        ranks: Ranks,
    ) -> None:
        self.out, self.shape, self.kind = out, shape, np.dtype(kind)
        self._rank, self._lock = ranks.rank, None

        def prepare() -> str:
            folder = self._private()
            with self._os_errors():
                self._lock = WriterLock(folder / _LOCK, str(out))
            try:
                self._begin(folder, dict(facts))
            except BaseException:
                self._lock.release()
                raise
            return str(folder)

        self.folder = Path(ranks.on_root(prepare))

    def _private(self) -> Path:
        folder = self.out.with_name(f".{self.out.name}.unfinished")
        try:
            private_folder(folder)
        except InputError as error:
            if not os.access(self.out.parent, os.W_OK | os.X_OK):
                raise
            logger.warning("%s; what is finished is lost if this run is killed", error)
            folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=self.out.parent))
        return folder

    def _begin(self, folder: Path, facts: dict[str, str]) -> None:
        """Keep the pieces of the same command, delete all else."""
        about = folder / ABOUT
        found: dict[str, str] | None = None
        with contextlib.suppress(OSError, ValueError):
            found = parse_json(about.read_text())
        for pattern in ("failed-*", "taken-*"):
            for path in folder.glob(pattern):
                remove(path)
        left = [path for path in folder.iterdir() if path.name not in (_LOCK, about.name)]
        known = found if isinstance(found, dict) else {}
        if all(known.get(name) == facts.get(name) for name in MADE_BY):
            left = [path for path in left if found != facts and not _says_of_what(path)]
        if left and found != facts:
            changed = [name for name in facts if known.get(name) != facts[name]]
            logger.info(
                "%s: begun anew, an unfinished run had other %s", self.out, ", ".join(changed)
            )
            for path in left:
                remove(path)
        with self._os_errors():
            about.write_text(json.dumps(facts, indent=1))

    def finished(
        self, pieces: Sequence[Piece], ranks: Ranks, made_of: Callable[[Piece], str]
    ) -> set[Piece]:
        """Those that an earlier run has finished; each rank checks a share of them, and deletes
        what is not intact, or says that it is made of other frames (see `save`).

        Args:
            made_of: a checksum of the frames that a piece is to be made of.
        """
        mine, other = set(), 0
        for piece in pieces[ranks.rank :: ranks.size]:
            if not self._path(piece).exists():
                continue
            if self.has(piece, made_of):
                mine.add(piece)
            else:
                remove(self._path(piece))
                other += len(piece.frames)
        if other:
            logger.warning(
                "%s: %d finished frames are damaged, or are not what the finished recordings give "
                "(another grey scale, or frames that changed after they were used): made anew",
                *(self.out, other),
            )
        return set().union(*ranks.gather(mine))

    def deal(self, pieces: Sequence[Piece], ranks: Ranks) -> Iterator[Piece]:
        """The share of these pieces that this rank makes: each time the next one that no other has
        taken, so that a rank that is slower, or writes the file as well, makes fewer.

        Raises:
            InputError: the disk refuses.
        """
        return (piece for piece in pieces if ranks.size == 1 or self._take(piece))

    def _take(self, piece: Piece) -> bool:
        with self._os_errors(), contextlib.suppress(FileExistsError):
            (self.folder / f"taken-{piece.frames.start:09d}").touch(exist_ok=False)
            return True
        return False

    def has(self, piece: Piece, made_of: Callable[[Piece], str]) -> bool:
        """Is a piece there, intact, and made of these frames, if it says of which?"""
        said = _says_of_what(self._path(piece))
        return self._load(piece) is not None and (not said or said == made_of(piece))

    def save(self, piece: Piece, frames: Sequence[np.ndarray], made_of: str = "") -> None:
        """Keep the frames of a piece, (H, W) in [0, 1], and a checksum of what they are made of if
        that may still change.

        Raises:
            InputError: the disk refuses.
        """
        path = self._path(piece)
        stored = np.ascontiguousarray([_stored(frame, self.kind) for frame in frames])
        data = stored.data.cast("B")
        beside = path.with_name(f".{path.name}")
        with self._os_errors():
            try:
                with beside.open("wb", buffering=0) as file:
                    head = f"{zlib.crc32(data):08x} {made_of}".strip()
                    for part in (f"{head}\n".encode(), data):
                        rest = memoryview(part)
                        while rest:  # without a buffer, a full disk takes a part
                            rest = rest[file.write(rest) :]
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)

    def frames(
        self, pieces: Sequence[Piece], over: threading.Event | None = None
    ) -> Iterator[np.ndarray]:
        """The frames of these pieces in order, (H, W) float32 in [0, 1], waiting for each piece.

        Raises:
            Stopped: `over` is set, or a rank has given up.
            InputError: a piece does not match its checksum any more.
        """
        for piece in pieces:
            path, pause = self._path(piece), _POLL[0]
            while not path.exists():
                if over is None or over.wait(pause) or self.failed():
                    raise Stopped
                pause = min(2 * pause, _POLL[1])
            stored = self._load(piece)
            if stored is None:
                raise PassingError(
                    f"{path}: has changed since it was written; is the disk in order? repeat the "
                    "command, which makes it again"
                )
            for frame in stored:
                yield frame / np.float32(FULL) if self.kind.kind == "u" else frame

    def _load(self, piece: Piece) -> np.ndarray | None:
        """Its frames; None if they are not there or not intact."""
        shape = (len(piece.frames), *self.shape)
        try:
            with self._path(piece).open("rb") as file:
                checksum = file.readline(_HEAD)[:8]
                stored = np.fromfile(file, self.kind)
        except OSError:
            return None
        if stored.size != np.prod(shape):
            return None
        if checksum != b"%08x" % zlib.crc32(stored.data):
            return None
        return stored.reshape(shape)

    def _path(self, piece: Piece) -> Path:
        return self.folder / f"{piece.frames.start:09d}-{piece.frames.stop:09d}"

    def bytes_of(self, frames: int) -> int:
        """What so many frames take here."""
        return int(frames * self.shape[0] * self.shape[1] * self.kind.itemsize)

    def fail(self) -> None:
        """Tell the other ranks that this one has given up."""
        with contextlib.suppress(OSError):
            (self.folder / f"failed-{self._rank:04d}").touch()

    def failed(self) -> bool:
        """Has any rank given up?"""
        return any(self.folder.glob("failed-*"))

    def is_empty(self) -> bool:
        """Does it hold no piece?"""
        return not any(self.folder.glob("[0-9]*-[0-9]*"))

    def close(self, keep: bool) -> None:
        """Leave; without `keep` the pieces are deleted. The rank that opened it for all does."""
        if self._lock is None:
            return
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        self._lock = None

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise os_problem(f"cannot write {self.out}: {explain_os_error(error)}", error) from None


def _says_of_what(path: Path) -> str:
    """The checksum of what a piece is made of, if its first line has one."""
    try:
        with path.open("rb") as file:
            return b" ".join(file.readline(_HEAD).split()[1:]).decode(errors="replace")
    except OSError:
        return ""


def _stored(frame: np.ndarray, kind: np.dtype) -> np.ndarray:
    """As `write_sequence` rounds it, so that it makes no difference to come by here."""
    if kind.kind == "f":
        return frame.astype(kind)
    return np.rint(np.clip(frame, 0, 1) * FULL).astype(kind)
