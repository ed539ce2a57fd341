"""Rank-aware logging, progress bars and tables. Rank 0 logs everything, the others warnings."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

logger = logging.getLogger("hpc_xvr")
T = TypeVar("T")
_rank = 0
_launched = False


def setup(rank: int = 0, verbose: bool = False, launched: bool = False) -> None:
    """Send the log to stderr: everything on rank 0, warnings marked with the rank elsewhere.

    Args:
        launched: an MPI launcher started this process. What looks like a terminal is then the
            launcher's and usually ends up in a log file, so bars and colours are left out.
    """
    global _rank, _launched
    _rank, _launched = rank, launched
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    level = logging.DEBUG if verbose else logging.INFO
    logger.setLevel(level if rank == 0 else logging.WARNING)


def console() -> Console:
    """Standard output for tables; 100 columns wide if it is not a terminal (log files)."""
    plain = _launched or not sys.stdout.isatty()
    return Console(
        width=100 if plain else None,
        force_terminal=not plain,
        no_color=plain,
        quiet=_rank != 0,
        markup=False,  # names may have brackets
    )


@contextmanager
def progress_bar(description: str, total: float | None, unit: str = "") -> Iterator[Any]:
    """A bar with ETA on stderr, shown only on rank 0 of a terminal. Yields advance(n=1)."""
    show = _rank == 0 and sys.stderr.isatty() and not _launched
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n=1: bar.advance(task, n)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar (see progress_bar)."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    with progress_bar(description, total) as advance:
        for item in items:
            yield item
            advance()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table on standard output of rank 0; columns of numbers are aligned right."""
    rows = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        numeric = all(
            row[i].replace(".", "").replace("-", "").isdigit() or row[i] in ("", "-")
            for row in rows
        )
        table.add_column(name, justify="right" if numeric and rows else "left")
    for row in rows:
        table.add_row(*row)
    console().print(table)
