"""The last lines of jobs/test.sh: what was skipped in all runs together, and why."""

import subprocess
import sys

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.slow

TESTS = """
import pytest
@pytest.mark.parametrize("n", range(3))
def test_a(n): pytest.skip("no < camera here")
@pytest.mark.skipif(True, reason="no GPU")
def test_b(): pass
@pytest.mark.xfail
def test_c(): assert 0
def test_d(): pass
"""


def test_skipped_tests_are_counted_by_run_and_reason(tmp_path):
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "reports").mkdir()
    for run, chosen in (("single", "a or b or c or d"), ("parallel", "b"), ("cluster", "none")):
        report = f"--junitxml={tmp_path}/reports/{run}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "-k", chosen, report]
        subprocess.run([*command, "test_a.py"], cwd=tmp_path, capture_output=True)
    command = [sys.executable, str(ROOT / "tests/skipped.py"), str(tmp_path / "reports")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *lines, kernels = done.stdout.splitlines()
    assert lines == [
        "5 of 7 tests were skipped:",
        "    3  single: no < camera here",
        "    1  parallel: no GPU",
        "    1  single: no GPU",
    ], done.stderr
    assert kernels.startswith("CPU kernels: ")
