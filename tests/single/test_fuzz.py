"""Everything that parses, under damaged inputs: each is read or refused in one line, and nothing
else happens: no crash, no other exception, no hang, no memory for what is not there.

HPC_XVR_FUZZ=100000 reads that many in all; HPC_XVR_FUZZ_FIRST is the number of the first one of
each parser, so that other inputs can be had. The cameras' own files are in test_camera_fuzz.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from support.parsers import TARGETS

ALL = int(os.environ.get("HPC_XVR_FUZZ", "600"))
FIRST = int(os.environ.get("HPC_XVR_FUZZ_FIRST", "0"))
_SHARES = {name: min(1.0, 10 / target.cost) for name, target in TARGETS.items()}


def shares(total: int) -> dict[str, int]:
    """How many inputs each parser gets; slow ones get fewer."""
    whole = sum(_SHARES.values())
    return {name: max(3, round(total * share / whole)) for name, share in _SHARES.items()}


class Child:
    """The process that reads; started again after it died."""

    def __init__(self, folder) -> None:
        self._folder = folder
        self._process = None

    def ask(self, name: str, first: int, count: int) -> tuple[dict[str, int], list[str]]:
        """What became of these inputs, and what is wrong."""
        seen, problems, end = {}, [], first + count
        while first < end:
            if self._process is None:
                self._start()
            self._process.stdin.write(f"{name} {first} {end - first}\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                said = json.loads(line)
                if "seen" in said:
                    seen = {key: seen.get(key, 0) + n for key, n in said["seen"].items()}
                    return seen, problems
                problems.append(f"{name} {said['number']}: {said['problem']} ({said['where']})")
            code = self._process.wait()
            number = int((self._folder / "now").read_text())
            last = (self._folder / "stderr").read_text()[-1500:]
            problems.append(f"{name} {number}: ended the process with {code}: {last}")
            self._process, first = None, number + 1
        return seen, problems

    def _start(self) -> None:
        self._folder.mkdir(exist_ok=True)
        with (self._folder / "stderr").open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.parsers", str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "OMP_NUM_THREADS": "1",
                    "MALLOC_ARENA_MAX": "2",
                },
            )

    def end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    child = Child(tmp_path_factory.mktemp("fuzz") / "child")
    yield child
    child.end()


@pytest.mark.timeout(3 * 3600 if ALL > 10_000 else 300)
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs_are_read_or_refused(name, child):
    begin = time.monotonic()
    seen, problems = child.ask(name, FIRST, shares(ALL)[name])
    print(name, seen, f"{time.monotonic() - begin:.1f} s")
    assert not problems, "\n".join(problems[:20])
