"""Rank-aware logging, progress and tables. Rank 0 logs everything, the others warnings.

Names of files and what cameras say of themselves go into what is shown: it leaves this program by
`logger`, `say`, `complain` and `print_table` alone, which let no control character through.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.cells import cell_len
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

from hpc_xvr.text import printable, printable_lines

logger = logging.getLogger("hpc_xvr")
T = TypeVar("T")
WIDTH = 100
"""Columns of a table in a file or a pipe, unless its names need more."""
QUIET_S, SHARE, SHARE_S = 60.0, 0.05, 10.0
"""In a log, progress is told after so many seconds, or after this share of the work if that took
so many seconds at least."""
_rank = 0
_launched = False


class _Plain(logging.Formatter):
    """A message is one line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


def setup(rank: int = 0, verbose: bool = False, launched: bool = False) -> None:
    """Send the log to stderr: everything on rank 0, warnings marked with the rank elsewhere.

    What the terminal or file cannot show becomes "?" on both streams.

    Args:
        launched: an MPI launcher started this process. What looks like a terminal is then the
            launcher's and usually ends up in a log file, so bars and colours are left out.
    """
    global _rank, _launched
    _rank, _launched = rank, launched
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(_Plain(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    level = logging.DEBUG if verbose else logging.INFO
    logger.setLevel(level if rank == 0 else logging.WARNING)


def say(text: str) -> None:
    """Lines on standard output of rank 0."""
    if _rank == 0:
        print(printable_lines(text), flush=True)


def complain(text: str) -> None:
    """Lines on standard error of any rank."""
    print(printable_lines(text), file=sys.stderr, flush=True)


def _console(width: int | None = None) -> Console:
    """Standard output for tables, as wide as its terminal; without colours elsewhere."""
    plain = _launched or not sys.stdout.isatty()
    return Console(
        width=width or (WIDTH if plain else None),
        force_terminal=not plain,
        no_color=plain,
        quiet=_rank != 0,
        markup=False,  # names may have brackets
        highlight=not plain,
    )


class Pace:
    """Tells the log how far something is: after each minute, or 5 % of the work if slow.

    Args:
        total: units of the whole work; None: not known.
        done: units behind us at the start.
        by_share: also after each 5 %; else after a silent minute alone.
    """

    def __init__(
        self,
        description: str,
        total: float | None,
        unit: str = "",
        done: float = 0,
        by_share: bool = True,
    ) -> None:
        self._what, self._total, self._unit = description, total, unit
        self._begun, self._by_share = done, by_share
        self._start = self._last = time.monotonic()
        self._told = done

    def at(self, done: float) -> None:
        """So many units are behind us."""
        now = time.monotonic()
        share = (done - self._told) / self._total if self._total and self._by_share else 0.0
        due = now - self._last >= (SHARE_S if share >= SHARE else QUIET_S)
        if not due or (self._total is not None and done >= self._total):
            return
        self._told = done
        self.spoken()
        left = ""
        unit = f" {self._unit}" if self._unit else ""
        if self._total and done > self._begun:
            rate = (done - self._begun) / (now - self._start)
            seconds = (self._total - done) / rate
            left = f" ({100 * done / self._total:.0f} %), about {duration(seconds)} left"
            left += f" at {rate:.3g}{unit}/s" if unit and rate >= 0.1 else ""
        total = "" if self._total is None else f" of {self._total:.0f}"
        logger.info("%s: %.0f%s%s%s", self._what, done, total, unit, left)

    def spoken(self) -> None:
        """Something else has just told the log where we are."""
        self._last = time.monotonic()


def duration(seconds: float) -> str:
    """H:MM:SS, or M:SS below an hour."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


@contextmanager
def progress_bar(
    description: str, total: float | None, unit: str = "", done: float = 0
) -> Iterator[Any]:
    """How far something is, on stderr of rank 0: a bar with ETA on a terminal, else lines of the
    log (see Pace). Yields advance(n=1). `done`: units behind us at the start."""
    show = _rank == 0 and sys.stderr.isatty() and not _launched
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        *([TextColumn("{task.fields[rate]}", markup=False)] if unit else []),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    pace = Pace(description, total, unit, done)
    so_far, begun = done, time.monotonic()
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(printable(description), total=total, completed=int(done), rate="")

        def advance(n: float = 1) -> None:
            nonlocal so_far
            so_far += n
            bar.advance(task, n)
            rate = (so_far - done) / max(time.monotonic() - begun, 1e-6)
            bar.update(task, rate=f"{rate:.3g} {unit}/s")
            if not show:
                pace.at(so_far)

        yield advance


def track(
    items: Iterable[T], description: str, total: int | None = None, unit: str = ""
) -> Iterator[T]:
    """Iterate with a progress bar (see progress_bar)."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    with progress_bar(description, total, unit) as advance:
        for item in items:
            yield item
            advance()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table on standard output of rank 0; columns of numbers are aligned right.

    Where it is too wide, cells are broken at spaces: a name of a recording or a file stays whole,
    as the next command needs it, even if the table becomes wider than the terminal.
    """
    cells = [[printable(f"{v:.2f}" if isinstance(v, float) else v) for v in row] for row in rows]
    table = Table()
    console = _console()
    widths = _widths(list(columns), cells, console.width)
    for i, name in enumerate(columns):
        numeric = all(
            row[i].replace(".", "").replace("-", "").isdigit() or row[i] in ("", "-")
            for row in cells
        )
        justify: Any = "right" if numeric and cells else "left"
        table.add_column(name, justify=justify, width=widths[i], overflow="fold")
    for row in cells:
        table.add_row(*row)
    console.print(printable_lines(title), style="italic", soft_wrap=True, highlight=False)
    _console(max(console.width, _framed(widths))).print(table, crop=False)


def _framed(widths: Sequence[int]) -> int:
    """Width of a table with these columns: a rule and two blanks around each."""
    return sum(widths) + 3 * len(widths) + 1


def _widths(columns: list[str], rows: list[list[str]], most: int) -> list[int]:
    """Width of each column: that of its longest cell, less where the table is too wide, but never
    less than its longest word."""
    by_column = [[name, *(row[i] for row in rows)] for i, name in enumerate(columns)]
    widths = [max(map(cell_len, cells)) for cells in by_column]
    least = [
        max(cell_len(w) for cell in cells for w in cell.split() or [""]) for cells in by_column
    ]
    while _framed(widths) > most and widths != least:
        slack = [wide - narrow for wide, narrow in zip(widths, least, strict=True)]
        widths[slack.index(max(slack))] -= 1
    return widths
