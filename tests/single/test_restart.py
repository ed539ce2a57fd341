"""Is a run done, does its job start again, which jobs of its chain are cancelled?"""

import json
import subprocess
import sys

import pytest

from hpc_xvr.submit.ranks import fewer
from hpc_xvr.submit.restart import Chain, Launch, begin, end, is_done, newest_step, warned
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
        ('{"step": 8, "target_psnr": 31.5}', True),  # no more steps are needed
        ('{"step": 8, "target_psnr": null}', False),
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
        (started(*[5] * 5), {}, "not started: 5 launches in a row came no further than step 5"),
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


@pytest.mark.parametrize("starts", [started(*[5] * 4), started(5, 5, 3, 5), started(*[15] * 5)])
def test_five_launches_in_a_row_from_this_very_step_are_too_many_and_no_others(starts, chain):
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


def test_sigterm_before_the_ranks_were_started_ends_this_job_only(chain):
    """A scheduler that preempts sends it, and starts the job again."""
    assert warned(chain(jobs=[7, 8]), "TERM") == [LEFT, "exit 74"]
    assert warned(chain(3, jobs=[7, 8]), "TERM") == [LEFT, "exit 75"]


def test_another_launch_in_a_job_is_no_start_of_its_own(chain):
    made = chain(5, starts=started(0, 3))
    assert begin(made, 1, 2, launches=1) == [
        "before 5",
        "add --resume",
        "say job 7, launch 2 of start 2, 1 node(s), from step 5",
    ]
    assert made.starts.read_text().splitlines()[-1].startswith("launch 2 of start 2 job 7 20")


LEFT = "say ended by SIGTERM: whoever sent it decides whether this job starts again"
FAILURE = "not done, exit code 1, and no checkpoint since step 4: not started again"
WARNED = FAILURE.replace("code 1,", "code 75,")
BAD = "bad input, see above; the same job would only fail again"
NEXT = "say the next job of the chain goes on"
SUBMIT = "say submit it with --resume to go on"


@pytest.mark.parametrize(
    ("step", "launch", "more", "expected", "noted"),
    [
        (9, {"code": 137}, {"done": 9}, ["say done at step 9", "cancel 8", "exit 0"], ""),
        (9, {"code": 2}, {"done": 9}, ["say done at step 9", "cancel 8", "exit 0"], ""),
        (8, {"code": 2}, {"done": 8}, [f"say {BAD}", "cancel 8", "exit 2"], BAD),
        (4, {"code": 1}, {}, [f"say {FAILURE}", "cancel 8", "exit 1"], FAILURE),
        (4, {"code": 75, "asked": "USR1"}, {}, [f"say {WARNED}", "cancel 8", "exit 1"], WARNED),
        (4, {"code": 143, "asked": "TERM"}, {}, [LEFT, "exit 75"], ""),
        (0, {"code": 143, "asked": "TERM"}, {}, [LEFT, "exit 74"], ""),
        (5, {"code": 75}, {"until_done": True}, ["again", "exit 75"], ""),
        (5, {"code": 75, "asked": "TERM"}, {"until_done": True}, [LEFT, "exit 75"], ""),
        (5, {"code": 75, "asked": "USR1"}, {"until_done": True}, ["again", "exit 75"], ""),
        (5, {"code": 75}, {}, [NEXT, "exit 75"], ""),
        (5, {"code": 75}, {"jobs": []}, [SUBMIT, "exit 75"], ""),
        (5, {"code": 75}, {"jobs": [6, 7]}, [SUBMIT, "exit 75"], ""),
        (5, {"code": 75}, {"jobs": [5, 6]}, [SUBMIT, "exit 75"], ""),  # not of this chain
        # In the same job, while it has time:
        (5, {"code": 1}, {}, ["relaunch 5"], ""),
        (5, {"code": 1, "left": 125}, {}, ["relaunch 5"], ""),
        (5, {"code": 1, "left": 124}, {}, [NEXT, "exit 75"], ""),
        (5, {"code": 137, "launches": 9}, {}, ["relaunch 5"], ""),
        (5, {"code": 137, "launches": 10}, {}, [NEXT, "exit 75"], ""),
        (5, {"code": 137, "most": 0}, {"until_done": True}, ["again", "exit 75"], ""),
        (5, {"code": 137, "asked": "USR1"}, {}, [NEXT, "exit 75"], ""),
        # What may pass, though it came no further; the pause doubles.
        (4, {"code": 74}, {}, ["relaunch 60"], ""),
        (4, {"code": 0}, {}, ["relaunch 60"], ""),
        (4, {"code": 14}, {}, ["relaunch 60"], ""),  # an MPI error
        (4, {"code": 1, "lost": 1}, {}, ["relaunch 60"], ""),
        (4, {"code": 74, "unit": 10}, {"starts": started(4, 4, 4)}, ["relaunch 40"], ""),
        (4, {"code": 74}, {"starts": started(4, 4, 3, 4)}, ["relaunch 60"], ""),
        (4, {"code": 74, "left": 99}, {"until_done": True}, ["pause 60", "again", "exit 75"], ""),
        (0, {"code": 74, "left": 99, "before": 0}, {}, ["pause 60", NEXT, "exit 74"], ""),
    ],
)
def test_what_follows_when_the_ranks_have_ended(step, launch, more, expected, noted, chain):
    starts = more.get("starts", started(4 if step else 0))
    made = chain(*[step] if step else [], jobs=more.get("jobs", [7, 8]), starts=starts)
    if marker := more.get("done"):
        (made.run / "done.json").write_text(json.dumps({"step": marker}))
    said = end(made, 9, Launch(**{"before": 4, **launch}), more.get("until_done", False))
    told = ("say not done", "say starting again on", "say waiting")
    assert [line for line in said if noted or not line.startswith(told)] == expected
    written = [f"stopped: {noted}"] if noted else []
    assert made.starts.read_text().splitlines() == [*starts, *written]


def test_five_launches_that_came_no_further_are_the_end_of_the_chain(chain):
    made = chain(4, jobs=[7, 8], starts=started(*[4] * 5))
    reason = "not done, exit code 74: 5 launches in a row came no further than 4"
    assert end(made, 9, Launch(4, 74)) == [f"say {reason}", "cancel 8", "exit 1"]
    assert made.starts.read_text().splitlines()[-1] == f"stopped: {reason}"


@pytest.mark.parametrize(
    ("nodes", "per_node", "batch", "micro", "expected"),
    [
        (1, 1, 8, None, (1, 1)),
        (9, 4, 40, None, (5, 4)),  # of 36 ranks 20 can share 40 samples
        (3, 4, 40, 2, (1, 4)),
        (3, 2, 6, None, (3, 2)),
        (3, 2, 7, None, (1, 1)),
        (1, 3, 4, None, (1, 2)),
        (2, 2, 4, 4, (1, 1)),
    ],
)
def test_ranks_that_are_left_share_the_global_batch(nodes, per_node, batch, micro, expected):
    assert fewer(nodes, per_node, batch, micro) == expected


@pytest.mark.parametrize("module", ["restart", "ranks"])
def test_the_job_script_gets_its_answers_by_the_standard_library_alone(module):
    """Without site-packages: hundreds of jobs may ask a slow file system at once."""
    code = f"import sys; sys.path.append({str(ROOT)!r}); import hpc_xvr.submit.{module}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
