"""Run measurements one after another, each with a time limit, so that none can spoil the rest.

A worker process runs them in order and writes a line of JSON for each as soon as it is known. One
that takes too long is killed with its worker; so is, by itself, a worker whose process a
measurement has spoilt (an error leaves a GPU's context unusable). The next worker goes on with the
measurement after it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SPOILT = 3  # exit code of a worker that can do no more
START_S = 60.0  # a worker's imports and first touch of the device


@dataclass(frozen=True)
class Job:
    """A measurement: what it gives goes into its row of the results."""

    name: str
    limit_s: float
    run: Callable[[], Row]


def work(jobs: Iterable[Job], results: Path, spoils: Callable[[Exception], bool]) -> int:
    """Run in a worker: every job in order, a line as each begins and a line as it ends.

    Args:
        spoils: whether this process can measure nothing more after an error.

    Returns:
        The exit code of the worker.
    """
    with results.open("a", buffering=1) as file:

        def write(row: Row) -> None:
            file.write(json.dumps(row) + "\n")

        for job in jobs:
            write({"begins": job.name})
            start = time.perf_counter()
            try:
                row = job.run()
            except Exception as error:
                traceback.print_exc()
                first = next(iter(str(error).strip().splitlines()), "")
                write({"name": job.name, "error": f"{type(error).__name__}: {first}"[:300]})
                if spoils(error):
                    return SPOILT
            else:
                write({"name": job.name, "took_s": round(time.perf_counter() - start, 2), **row})
    return 0


def supervise(
    command: list[str], limits: dict[str, float], results: Path, seconds: float
) -> list[Row]:
    """Start `command` + names as often as it takes until every job has a row, or time is up.

    Args:
        command: a worker's command line; the names of the jobs that are left are put behind it.
        limits: seconds of each job, in the order in which they run.
        results: lines of JSON; those of earlier calls stay.
        seconds: of all jobs together.

    Returns:
        A row of each job in order; one that gave no figures says why in `error`.
    """
    end = time.monotonic() + seconds
    results.parent.mkdir(parents=True, exist_ok=True)
    results.touch()
    left = list(limits)
    done: dict[str, Row] = {}
    while left and time.monotonic() < end:
        offset = results.stat().st_size
        worker = subprocess.Popen([*command, *left], start_new_session=True)
        doing, why = _watch(worker, results, offset, limits, end, done)
        left = [name for name in left if name not in done]
        if doing is None and left and why:  # it did not even get to the first one
            doing = left[0]
        if doing in left:
            done[doing] = {"name": doing, "error": why}
            with results.open("a") as file:
                file.write(json.dumps(done[doing]) + "\n")
            left.remove(doing)
    with results.open("a") as file:
        for name in left:
            done[name] = {"name": name, "error": "not reached: time was up"}
            file.write(json.dumps(done[name]) + "\n")
    return [done[name] for name in limits]


def _watch(
    worker: subprocess.Popen[bytes],
    results: Path,
    offset: int,
    limits: dict[str, float],
    end: float,
    done: dict[str, Row],
) -> tuple[str | None, str]:
    """Collect rows until the worker ends or must be ended: what it was doing, and why it ended."""
    begun = time.monotonic()
    doing, deadline = None, min(end, begun + START_S)
    text = b""
    with results.open("rb") as file:
        file.seek(offset)
        while True:
            code = worker.poll()
            text += file.read()
            *lines, text = text.split(b"\n")
            for line in lines:
                row = json.loads(line)
                begun = time.monotonic()
                doing = row.get("begins")
                deadline = min(end, begun + (limits[doing] if doing else START_S))
                if not doing:
                    done[row["name"]] = row
            if code is not None:
                return doing, "" if code in (0, SPOILT) else f"the process ended with code {code}"
            if time.monotonic() > deadline:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
                took = f"stopped after {time.monotonic() - begun:.0f} s"
                if time.monotonic() >= end:
                    return doing, f"{took}: time was up"
                return doing, took + ("" if doing else ", without a beginning")
            time.sleep(0.05)


def read(results: Path) -> list[Row]:
    """The rows of a file of results; of a job that ran more than once the last good one."""
    rows: dict[str, Row] = {}
    for line in results.read_text().splitlines() if results.exists() else ():
        row = json.loads(line)
        if "begins" not in row and not ("error" in row and row["name"] in rows):
            rows[row["name"]] = row
    return list(rows.values())


if __name__ == "__main__":
    sys.exit(__doc__)
