"""Damaged and foreign files in place of a run's newest checkpoint; used by chaos.py."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hpc_xvr import checkpoint, log
from hpc_xvr.errors import InputError
from hpc_xvr.train.run_folder import newest_state

PULSE = Path(__file__).resolve().parents[1] / "configs" / "pulse.yaml"


class Bomb:
    """A pickle that would make a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def damaged_files(
    folder: Path, count: int, rng: random.Random, bomb: Path
) -> Iterator[tuple[str, bytes]]:
    """(what was done, contents) in place of the newest checkpoint of `folder`."""
    (_, path), (_, older) = checkpoint.list_checkpoints(folder)[:2]
    good = path.read_bytes()
    scratch = folder.parent / "scratch.pt"

    def written(how: Any) -> bytes:
        how(scratch)
        data = scratch.read_bytes()
        scratch.unlink()
        return data

    state = checkpoint.load(path)
    foreign = [
        b"",
        b"no checkpoint at all\n",
        PULSE.read_bytes(),
        older.read_bytes(),  # valid, of another step
        written(lambda p: torch.save(state, p)),  # without a checksum
        written(lambda p: torch.save({"step": 1, "w": Bomb(bomb)}, p)),
        written(lambda p: torch.save(Bomb(bomb), p, _use_new_zipfile_serialization=False)),
        written(lambda p: checkpoint.save({**state, "model": Bomb(bomb)}, p)),
        written(lambda p: checkpoint.save({"step": state["step"]}, p)),  # of another program
    ]
    for i in range(count):
        kind = ("cut", "flipped", "zeros", "foreign")[i % 4]
        if kind == "cut":
            yield kind, good[: rng.randrange(len(good))]
        elif kind == "flipped":
            data = bytearray(good)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            yield kind, bytes(data)
        elif kind == "zeros":
            start = rng.randrange(len(good))
            stop = min(len(good), start + rng.choice([512, 4096, len(good)]))
            data = good[:start] + bytes(stop - start) + good[stop:]
            yield kind, data if data != good else bytes(len(good))
        else:
            yield kind, foreign[i // 4 % len(foreign)]


def corrupt(run: Path, count: int, rng: random.Random) -> dict[str, float]:
    """Put damaged files where the newest checkpoint is; none may be loaded, none may crash."""
    folder, bomb = run / "checkpoints", run / "bomb"
    (step, path), (older, _) = checkpoint.list_checkpoints(folder)[:2]
    good = path.read_bytes()
    level = log.logger.level
    log.logger.setLevel(logging.ERROR)  # two lines for each file
    tally = {"corrupted": 0, "corrupted_loaded": 0, "corrupted_tracebacks": 0}
    for kind, data in list(damaged_files(folder, count, rng, bomb)):
        path.write_bytes(data)
        tally["corrupted"] += 1
        try:
            state = newest_state(run)
            tally["corrupted_loaded"] += state is None or state["step"] != older
        except InputError:
            tally["corrupted_loaded"] += 1  # the older one is valid
        except Exception as error:
            print(f"{kind}: {type(error).__name__}: {error}")
            tally["corrupted_tracebacks"] += 1
    path.write_bytes(good)
    log.logger.setLevel(level)
    tally["bombs_gone_off"] = int(bomb.exists())
    assert newest_state(run)["step"] == step
    return tally
