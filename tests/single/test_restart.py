"""Is a run done, does its job start again, which jobs of its chain are cancelled?"""

import json
import subprocess
import sys

import pytest

from hpc_xvr.submit.restart import Chain, begin, end, is_done, newest_step, warned
from support.paths import ROOT


@pytest.fixture
def chain(tmp_path):
    """A chain in a run folder with checkpoints of the steps given: chain(3, 5)."""

    def make(*steps, jobs=(), starts=()):
        checkpoints = tmp_path / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        for step in steps:
            (checkpoints / f"step-{step:09d}.pt").touch()
        made = Chain(tmp_path, "train-1", tmp_path, "7")
        made.jobs.write_text("".join(f"{job}\n" for job in jobs))
        made.starts.write_text("".join(f"{line}\n" for line in starts))
        return made

    return make


def started(*steps):
    return [f"start {n} job 5 2026-01-01 00:00:00 at step {s}" for n, s in enumerate(steps, 1)]


def test_the_newest_checkpoint_is_read_from_the_names_that_are_whole(chain, tmp_path):
    assert newest_step(tmp_path / "nowhere") == 0
    made = chain(3, 12, 5)
    for name in ("step-best.pt", "step-99.pt.partial", ".step-99.ab.partial.pt", "step-.pt"):
        (tmp_path / "checkpoints" / name).touch()
    assert newest_step(made.run) == 12


@pytest.mark.parametrize(
    ("marker", "done"),
    [
        ('{"step": 9, "time": 1.0}', True),
        ('{\n "step": 10}', True),
        ('{"step": 8}', False),
        ('{"step": null}', False),
        ("{}", False),
        ("[9]", False),
        ("9", False),
        ('{"step": 9', False),
        ("", False),
        (None, False),
    ],
)
def test_a_run_is_done_if_its_marker_names_the_last_step(marker, done, tmp_path):
    if marker is not None:
        (tmp_path / "done.json").write_text(marker)
    assert is_done(tmp_path, 9) is done


def test_the_first_start_resumes_nothing_and_later_ones_do(chain):
    first = chain()
    assert begin(first, 2, 100) == ["before 0", "say job 7, start 1, 2 node(s), from step 0"]
    line = first.starts.read_text()
    assert line.startswith("start 1 job 7 20") and line.endswith(" at step 0\n")
    (first.run / "checkpoints/step-000000004.pt").touch()
    assert begin(first, 2, 100, clock=3725) == [
        "before 4",
        "add --resume",
        "add --max-time",
        "add 1:02:05",
        "say job 7, start 2, 2 node(s), from step 4",
    ]
    assert [line.split()[1] for line in first.starts.read_text().splitlines()] == ["1", "2"]


@pytest.mark.parametrize(
    ("starts", "more", "reason"),
    [
        (
            [*started(0), "stopped: not done, exit code 1"],
            {},
            "not started: an earlier job of this chain was stopped: not done, exit code 1",
        ),
        (started(5, 5, 5), {}, "not started: 3 starts in a row came no further than step 5"),
        (
            started(0, 3),
            {"limit": 2},
            "not started: this would be start 3; XVR_MAX_STARTS is 2",
        ),
        ([], {"clock": 0}, "no time is left in this job; ask for more"),
    ],
)
def test_a_start_that_would_be_in_vain_is_refused_and_ends_the_chain(starts, more, reason, chain):
    made = chain(5, jobs=[6, 7, 8, 9], starts=starts)
    assert begin(made, 1, **{"limit": 100, **more}) == [f"say {reason}", "cancel 8 9", "exit 1"]
    assert made.starts.read_text().splitlines() == [*starts, f"stopped: {reason}"]


@pytest.mark.parametrize("starts", [started(5, 5), started(5, 5, 3, 5), started(15, 15, 15)])
def test_three_starts_in_a_row_from_this_very_step_are_too_many_and_no_others(starts, chain):
    assert "before 5" in begin(chain(5, starts=starts), 1, 100)


def test_a_record_that_cannot_be_written_is_reported_and_the_run_starts(chain, tmp_path):
    made = chain()
    made.starts.unlink()
    made.starts.mkdir()
    assert begin(made, 1, 100)[1:] == [
        f"say cannot write {made.starts}: Is a directory",
        "say job 7, start 1, 1 node(s), from step 0",
    ]


def test_a_warning_before_the_ranks_were_started_ends_the_chain(chain):
    made = chain(jobs=[7, 8])
    reason = "warned before the run could start; ask for more time"
    assert warned(made) == [f"say {reason}", "cancel 8", "exit 1"]
    assert made.starts.read_text() == f"stopped: {reason}\n"


FAILED = "not done, exit code 1, and no checkpoint since step 4: not started again"
FULL = FAILED.replace("code 1", "code 74")  # a full disk, say
BAD = "bad input, see above; the same job would only fail again"


@pytest.mark.parametrize(
    ("step", "asked_for", "expected", "noted"),
    [
        (9, {"code": 137, "done": 9}, ["say done at step 9", "cancel 8", "exit 0"], ""),
        (9, {"code": 2, "done": 9}, ["say done at step 9", "cancel 8", "exit 0"], ""),
        (8, {"code": 2, "done": 8}, [f"say {BAD}", "cancel 8", "exit 2"], f"stopped: {BAD}\n"),
        (4, {"code": 1}, [f"say {FAILED}", "cancel 8", "exit 1"], f"stopped: {FAILED}\n"),
        (4, {"code": 74}, [f"say {FULL}", "cancel 8", "exit 1"], f"stopped: {FULL}\n"),
        (5, {"until_done": True}, ["again"], ""),
        (
            5,
            {"until_done": True, "asked": "TERM"},
            ["say ended by SIGTERM: whoever sent it decides whether this job starts again"],
            "",
        ),
        (5, {"until_done": True, "asked": "USR1"}, ["again"], ""),
        (5, {}, ["say the next job of the chain goes on"], ""),
        (5, {"jobs": []}, ["say submit it with --resume to go on"], ""),
        (5, {"jobs": [6, 7]}, ["say submit it with --resume to go on"], ""),
        (5, {"jobs": [5, 6]}, ["say submit it with --resume to go on"], ""),  # not of this chain
    ],
)
def test_what_follows_when_the_ranks_have_ended(step, asked_for, expected, noted, chain):
    asked_for = dict(asked_for)
    made = chain(step, jobs=asked_for.pop("jobs", [7, 8]))
    if marker := asked_for.pop("done", None):
        (made.run / "done.json").write_text(json.dumps({"step": marker}))
    if len(expected) == 1:
        expected = ["say not done, exit code 0, checkpoint of step 5", *expected, "exit 75"]
    assert end(made, steps=9, before=4, **{"code": 0, **asked_for}) == expected
    assert made.starts.read_text() == noted


@pytest.mark.parametrize("module", ["restart", "ranks"])
def test_the_job_script_gets_its_answers_by_the_standard_library_alone(module):
    """Without site-packages: hundreds of jobs may ask a slow file system at once."""
    code = f"import sys; sys.path.append({str(ROOT)!r}); import hpc_xvr.submit.{module}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
