"""Which engine connects the ranks: a table of situations, of which the first that fits decides."""

from __future__ import annotations

from typing import Literal

from hpc_xvr.errors import InputError

Wish = Literal["auto", "serial", "horovod", "torch"]
# What MPI sees:
#   not asked  nobody started us with MPI: it is not imported
#   missing    mpi4py cannot be imported
#   all        as many ranks as the launcher says
#   alone      this rank alone, although the launcher started more
#   other      another number of ranks than the launcher says
Sees = Literal["not asked", "missing", "all", "alone", "other"]
Engine = Literal["serial", "horovod", "torch", "torch without MPI", "horovod or torch"]

# fmt: off
_TABLE: list[tuple[str, str, str, str, str, str]] = [
    # launcher   ranks   wish           gradients  MPI sees       engine, or why there is none
    ("*",        "*",    "horovod",     "bf16",    "*",           "no bf16"),
    ("torchrun", "*",    "horovod",     "*",       "*",           "no MPI launcher"),
    ("*",        "*",    "torch",       "*",       "missing",     "torch without MPI"),
    ("*",        "one",  "auto|serial", "*",       "missing",     "serial"),
    ("*",        "*",    "*",           "*",       "missing",     "no mpi4py"),
    ("*",        "many", "torch",       "*",       "alone",       "torch without MPI"),
    ("*",        "*",    "*",           "*",       "alone|other", "another MPI"),
    ("*",        "many", "serial",      "*",       "*",           "not one rank"),
    ("*",        "one",  "auto|serial", "*",       "*",           "serial"),
    ("*",        "*",    "horovod",     "*",       "*",           "horovod"),
    ("*",        "*",    "torch",       "*",       "*",           "torch"),
    ("*",        "many", "auto",        "bf16",    "*",           "torch"),
    ("*",        "many", "auto",        "*",       "not asked",   "torch"),
    ("*",        "many", "auto",        "*",       "all",         "horovod or torch"),
]
# fmt: on

_WHY_NOT = {
    "no bf16": "dist.compression bf16: Horovod cannot sum bfloat16; use fp16, or --engine torch",
    "no MPI launcher": "engine horovod needs mpirun; torchrun works with --engine torch",
    "no mpi4py": (
        "{launcher} started {ranks} ranks, but mpi4py cannot be imported ({problem}); install "
        "it (jobs/setup.sh does), or use --engine torch"
    ),
    "another MPI": (
        "{launcher} started {ranks} ranks but MPI sees {seen}: this environment's MPI was not "
        "started by its own launcher; use the mpirun that belongs to it (`which mpirun`), "
        "srun --mpi=pmix, or --engine torch, which needs no MPI"
    ),
    "not one rank": (
        "engine serial is one rank, but {launcher} started {ranks}; use --engine horovod or "
        "torch, or start without mpirun"
    ),
}


def choose(
    launcher: str | None,
    ranks: int,
    wish: Wish,
    gradients: str,
    sees: Sees,
    seen: int = 1,
    problem: str = "",
) -> Engine:
    """The engine for these ranks; "horovod or torch" is for the ranks to agree on.

    Args:
        launcher, ranks: who started them, and how many (see `launch.discover`).
        wish: `dist.engine` or --engine.
        gradients: `dist.compression`.
        sees, seen: what MPI sees, and how many ranks that are.
        problem: why mpi4py cannot be imported.

    Raises:
        InputError: no engine can do that here.
    """
    situation = (launcher or "", "one" if ranks == 1 else "many", wish, gradients, sees)
    taken = next(taken for *row, taken in _TABLE if all(map(_fits, row, situation)))
    if taken in _WHY_NOT:
        facts = {"launcher": launcher, "ranks": ranks, "seen": seen, "problem": problem}
        raise InputError(_WHY_NOT[taken].format(**facts))
    return taken  # type: ignore[return-value]


def _fits(pattern: str, value: str) -> bool:
    return pattern == "*" or value in pattern.split("|")
