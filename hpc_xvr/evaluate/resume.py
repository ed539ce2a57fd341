"""Finished rows of an evaluation on disk, so that one that was killed goes on where it was.

`cells/rank-0003.jsonl` gets a line for each row that rank 3 finished. A line carries a key of all
that its numbers depend on (frames, gap, noise, seed, weights): rows that no longer fit are passed
over, not deleted, and methods or recordings added later are scored alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from hpc_xvr.errors import InputError, explain_os_error, os_problem
from hpc_xvr.evaluate.rows import Row
from hpc_xvr.evaluate.scoring import Setting, Unit
from hpc_xvr.reconstruction.methods import NamedMethod
from hpc_xvr.text import parse_json

VERSION = 2  # raise it when a metric or a method without learning changes


class Cells:
    """Rows of all ranks that ever worked in this folder; this rank adds to its own file."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder / "cells"
        self._path = self.folder / f"rank-{rank:04d}.jsonl"

    def load(self) -> dict[str, Row]:
        """Key -> row. A line that a killed writer left unfinished is passed over."""
        rows: dict[str, Row] = {}
        try:
            texts = [path.read_text() for path in sorted(self.folder.glob("*.jsonl"))]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{self.folder}: finished rows cannot be read ({error}); delete the folder to "
                "evaluate from the start"
            ) from None
        for line in (line for text in texts for line in text.splitlines()):
            try:
                tree = parse_json(line)
                rows[tree["key"]] = Row.from_json(tree["row"])
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
        return rows

    def add(self, rows: Iterable[tuple[str, Row]]) -> None:
        """Append rows in one write and sync it.

        Raises:
            InputError: the disk refuses.
        """
        text = "".join(json.dumps({"key": key, "row": row.to_json()}) + "\n" for key, row in rows)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+") as file:
                size = file.tell()
                if size:
                    file.seek(size - 1)
                    if file.read(1) != b"\n":  # the last writer was killed within a line
                        text = "\n" + text
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            message = f"cannot write {self._path}: {explain_os_error(error)}"
            raise os_problem(message, error) from None


def key_of(unit: Unit, method: NamedMethod, setting: Setting) -> str:
    """Of everything the numbers of a row depend on."""
    data = setting.data
    facts = [
        VERSION,
        unit.video.info.sha256,
        unit.video.id,
        unit.condition.gap,
        unit.condition.noise.name,
        method.name,
        method.fingerprint,
        data.lr_frames if method.lr_frames is None else method.lr_frames,
        data.scale,
        data.lr_source,
        data.pattern,
        setting.seed,
        setting.hr_noise.name,
        setting.misregistration,
        *([method.tile] if method.tile else []),  # equal to rounding, but not in time
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
