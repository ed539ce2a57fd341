"""Copies of recordings on a disk of the node's own, so that a shared file system is read once."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from hpc_xvr.data.corpus.layout import copy_file
from hpc_xvr.data.corpus.reader import Corpus
from hpc_xvr.errors import InputError, PassingError
from hpc_xvr.files import disk_errors, private_folder, remove
from hpc_xvr.log import logger, progress_bar

_PARTIAL = re.compile(r"\.(\d+)-[0-9a-f]{16}\.partial")  # the process that writes it, and chance


class Staging:
    """What a node has to copy: the recordings that its ranks read, less what is there already.

    The folder is one that only this user may write to, so what is in it was copied by this program
    and compared with the corpus' checksums meanwhile. A copy counts as there when all its files
    have the size and date of the corpus'. Several processes of a node copy a part each; copies
    appear whole or not at all.

    Args:
        ids: videos that any rank of this node reads.
        folder: on a disk of this node; the copies of each corpus get a folder of their own in it.

    Raises:
        InputError: the folder for the copies is somebody else's; the disk refuses, or has less
            space than what is missing takes.
    """

    def __init__(self, corpus: Corpus, ids: Sequence[str], folder: Path) -> None:
        name = hashlib.sha256(str(corpus.path.absolute()).encode()).hexdigest()[:12]
        self.folder = folder / f"hpc_xvr-{os.geteuid()}-{name}"
        self._corpus = corpus
        self._originals = {id: corpus.original(id) for id in ids}
        try:
            private_folder(self.folder)
        except InputError as error:
            raise type(error)(f"data.stage_dir {folder}: {error}") from None
        with disk_errors(folder):
            self._sweep()
            sizes = {id: _files(path) for id, path in self._originals.items()}
            self._missing = {
                id: sum(size for size, _ in files.values())
                for id, files in sizes.items()
                if _files(self.folder / self._originals[id].name) != files
            }
            free = shutil.disk_usage(self.folder).free
        need = sum(self._missing.values())
        if need > free:
            raise PassingError(
                f"data.stage_dir {folder}: {need / 1e9:.2f} GB are needed there for "
                f"{len(self._missing)} recordings, {free / 1e9:.2f} GB are free; choose a larger "
                "disk, use more nodes, or leave data.stage_dir out"
            )

    def copy(self, part: int, parts: int) -> None:
        """Copy every `parts`-th of the missing recordings, from number `part` on.

        A recording that does not match the corpus' checksums is not copied, with a warning: what
        is damaged is met, and treated as data.damaged says, when it is read from the corpus.

        Raises:
            InputError: the disk refuses; the recordings copied before stay.
        """
        mine = list(self._missing)[part::parts]
        if part == 0:
            logger.info(
                "staging %d of %d recordings (%.2f GB) to %s; the others are there",
                len(self._missing),
                len(self._originals),
                sum(self._missing.values()) / 1e9,
                self.folder,
            )
        with progress_bar("staging", len(mine), "recordings") as advance:
            for id in mine:
                self._copy(id)
                advance()

    def _copy(self, id: str) -> None:
        source, known = self._originals[id], self._corpus.checksums(id)
        final = self.folder / source.name
        partial = self.folder / f".{os.getpid()}-{secrets.token_hex(8)}.partial"
        try:
            with disk_errors(self.folder):
                found = {}
                if source.is_dir():
                    partial.mkdir()
                for name in _files(source):
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    like = (known or {}).get(name)
                    found[name] = copy_file(source / name, partial / name, like)
                remove(final)
                if known is None or found == known:
                    partial.rename(final)
                    return
        finally:
            remove(partial)
        logger.warning(
            "corpus %s, video %s: does not match the checksums in its manifest, so it is not "
            "copied; hpc-xvr inspect --verify says more",
            self._corpus.path,
            id,
        )

    def _sweep(self) -> None:
        """Remove what killed processes of this node left."""
        for left in self.folder.iterdir():
            if process := _PARTIAL.fullmatch(left.name):
                try:
                    os.kill(int(process[1]), 0)
                except (ProcessLookupError, OverflowError):
                    remove(left)
                except PermissionError:
                    continue


def _files(path: Path) -> dict[str, tuple[int, int]]:
    """Size and date of each file of a clip, by its name within it ("." is the clip itself)."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {
        file.relative_to(path).as_posix(): ((found := file.stat()).st_size, found.st_mtime_ns)
        for file in files
    }
