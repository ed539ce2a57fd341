"""The job script: what a job does when a run ends, which ranks it starts and on which GPUs."""

import os
import shutil
import subprocess
import sys

import pytest

from hpc_xvr.submit.job import SCRIPTS
from support.paths import ROOT

# A stand-in for training that takes no time: STEPS checkpoints and EXIT for each start, in turn.
PLAY = """#!/usr/bin/env bash
run=""
for a in "$@"; do case $a in run.dir=*) run=${a#run.dir=};; esac; done
[ -n "$run" ] || exit 0
mkdir -p "$run/checkpoints"
echo "$*" >>"$run/calls"
read -r step code marker < <(sed -n "$(wc -l <"$run/calls")p" "$run/play")
[ "$step" = 0 ] || touch "$run/checkpoints/step-$(printf %09d "$step").pt"
[ -z "$marker" ] || echo "{\\"step\\": $marker, \\"time\\": 1.0}" >"$run/done.json"
exit "$code"
"""
SCRIPT = """
export SCRIPT=$$
xvr_job=7 xvr_nodes=2 xvr_default_site={site}
xvr_again() {{ echo AGAIN; exit 75; }}
xvr_cancel() {{ echo "CANCEL $*"; }}
xvr_hosts=""
xvr_answering() {{ [ ! -e {run}/answering ] || cat {run}/answering; }}
xvr_only() {{ hosts="ONLY=$*"; hosts=${{hosts// /,}}; }}
xvr_left() {{ [ ! -e {run}/left ] || cat {run}/left; }}
set -uo pipefail
source "{scripts}/job.sh"
xvr_main --run {run} --name t --venv {venv} --steps 9 "$@"
"""


@pytest.fixture
def job(tmp_path):
    """job(plays, *options) -> (exit code, log) of the job script's next start."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    programs = {"hpc-xvr": PLAY, "python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'}
    for name, text in programs.items():
        (tmp_path / "venv/bin" / name).write_text(text)
        (tmp_path / "venv/bin" / name).chmod(0o755)
    site = tmp_path / "here.env"
    site.write_text(
        "XVR_RANKS_PER_NODE=1\nXVR_LAUNCH='{binding}'\nXVR_BIND=core\nAN='a value'\nXVR_PAUSE=0\n"
    )
    site.write_text(site.read_text().replace("{binding}", ""))
    run = tmp_path / "run"
    run.mkdir()

    def start(*plays, options=(), command=("train", "c.yaml")):
        if plays:
            (run / "play").write_text("".join(f"{p}\n" for p in plays))
        text = SCRIPT.format(scripts=SCRIPTS, site=site, run=run, venv=tmp_path / "venv")
        done = subprocess.run(
            ["bash", "-c", text, "job", *options, *command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        return done.returncode, done.stdout + done.stderr

    start.run, start.site = run, site
    return start


def test_the_done_marker_decides_and_not_the_exit_code(job):
    code, log = job("9 137 9")
    assert code == 0 and "done at step 9" in log


def test_exit_code_0_without_the_marker_is_not_done(job):
    """mpirun may return 0 although its ranks were killed."""
    (job.run / "left").write_text("100\n")
    _code, log = job("4 0", options=["--until-done"])
    assert "AGAIN" in log and "not done, exit code 0, checkpoint of step 4" in log


def test_a_marker_of_fewer_steps_than_asked_for_is_an_old_one(job):
    (job.run / "left").write_text("100\n")
    code, log = job("8 1 8")
    assert code == 75 and "done at" not in log


def test_bad_input_is_not_started_again(job):
    code, log = job("0 2", options=["--until-done"])
    assert code == 2 and "AGAIN" not in log and "bad input" in log


def calls(job):
    return (job.run / "calls").read_text().splitlines()


def test_a_failure_is_started_again_only_after_a_new_checkpoint(job):
    code, log = job("3 1", "5 75", "5 1", options=["--until-done"])
    assert "AGAIN" in log and code == 75
    assert "starting again on the same nodes in 0 s" in log
    assert "launch 2 of start 1, 2 node(s), from step 3" in log
    assert ["--resume" in call for call in calls(job)] == [False, True]
    code, log = job(options=["--until-done"])
    assert code == 1 and "AGAIN" not in log
    assert "start 2, 2 node(s), from step 5" in log
    assert "exit code 1, and no checkpoint since step 5: not started again" in log
    code, log = job(options=["--until-done"])  # what is left of a chain
    assert code == 1 and "an earlier job of this chain was stopped: not done" in log
    assert len(calls(job)) == 3


@pytest.mark.parametrize("code", [137, 74, 0])
def test_what_may_pass_is_tried_again_in_the_same_job_and_not_for_ever(code, job):
    """A rank that was killed, a full disk, and mpirun's 0 where its ranks were killed."""
    ended, log = job(f"0 {code}", f"4 {code}", *[f"0 {code}"] * 9, options=["--until-done"])
    assert ended == 1 and "AGAIN" not in log
    assert "no checkpoint yet" in log
    assert "5 launches in a row came no further than 4" in log
    assert len(calls(job)) == 7
    lines = (job.run / "jobs/t.starts").read_text().splitlines()
    assert [line.split(" job ")[0] for line in lines[:2]] == ["start 1", "launch 2 of start 1"]


def test_launches_of_a_job_are_limited_and_the_rest_is_for_the_queue(job):
    plays = [f"{n} 137" for n in range(1, 9)]
    _code, log = job(*plays, options=["--until-done", "--env", "XVR_MAX_LAUNCHES=2"])
    assert "AGAIN" in log and len(calls(job)) == 3


def test_the_last_minutes_of_a_job_are_for_the_next_one(job):
    (job.run / "left").write_text("100\n")
    code, _log = job("1 137", "9 0 9")
    assert code == 75 and len(calls(job)) == 1
    (job.run / "left").write_text("1000\n")
    code, _log = job("1 137", "9 0 9")
    assert code == 0


def test_trouble_without_a_checkpoint_has_a_code_of_its_own(job):
    (job.run / "left").write_text("100\n")
    code, _log = job("0 74")
    assert code == 74 and "stopped" not in (job.run / "jobs/t.starts").read_text()


def test_a_lost_node_leaves_the_ranks_that_can_share_the_global_batch(job):
    """Three nodes of two ranks for a batch of 8: two of them answer, and take two ranks each."""
    (job.run / "config.yaml").write_text("train:\n  global_batch: 8\n  micro_batch: 2\n")
    (job.run / "answering").write_text("a\nc\n")
    launch = "env RANKS={ranks} EACH={per_node} {hosts}"
    options = ["--nodes", "3", "--ranks-per-node", "2", "--env", f"XVR_LAUNCH={launch}"]
    code, log = job("3 1", "9 0 9", options=options)
    assert code == 0
    assert "1 of 3 node(s) do not answer; these do: a c" in log
    assert "RANKS=6 EACH=2 " in log and r"RANKS=4 EACH=2 ONLY=a\,c " in log
    assert "launch 2 of start 1, 2 node(s), from step 3" in log


def test_a_second_node_is_missed_only_if_it_was_used(job):
    (job.run / "config.yaml").write_text("train:\n  global_batch: 4\n")
    (job.run / "answering").write_text("a\nb\nc\n")  # of which 2 can share 4 samples
    options = ["--nodes", "4", "--env", "XVR_LAUNCH=env RANKS={ranks} {hosts}"]
    code, log = job("3 1", "4 1", "9 0 9", options=options)
    assert code == 0 and log.count("do not answer") == 1 and log.count(r"ONLY=a\,b ") == 2


def test_a_site_that_cannot_keep_ranks_to_nodes_leaves_it_to_the_queue(job):
    (job.run / "answering").write_text("a\n")
    _code, log = job("3 1", "9 0 9", options=["--until-done"])
    assert "has no {hosts}, which would keep the ranks to them" in log
    assert "AGAIN" in log and len(calls(job)) == 1


TERM = """#!/usr/bin/env bash
# A launcher that TERM would end, but USR1 makes its rank save: as mpirun does.
run=""
for a in "$@"; do case $a in run.dir=*) run=${a#run.dir=};; esac; done
saved=$run/checkpoints/step-000000005.pt
trap 'sleep 1; mkdir -p "${saved%/*}"; touch "$saved"; exit 75' USR1
kill -TERM 0 # all processes of this session, as PBS does
for _ in $(seq 100); do sleep 0.1; done
"""


def test_sigterm_to_all_processes_of_the_job_loses_nothing(job, tmp_path):
    (tmp_path / "venv/bin/launcher").write_text(TERM)
    (tmp_path / "venv/bin/launcher").chmod(0o755)
    (job.site).write_text(job.site.read_text().replace("XVR_LAUNCH=''", "XVR_LAUNCH=launcher"))
    text = SCRIPT.format(scripts=SCRIPTS, site=job.site, run=job.run, venv=tmp_path / "venv")
    done = subprocess.run(  # in a session of its own: what is signalled must not be the tests
        ["setsid", "-w", "bash", "-c", text, "job", "--until-done", "train", "c.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 75, log
    assert "TERM: asking the ranks for a checkpoint" in log and "checkpoint of step 5" in log
    assert "whoever sent it decides" in log and "AGAIN" not in log


def test_jobs_that_vanish_are_started_five_times_at_one_step(job):
    (job.run / "jobs").mkdir()
    starts = job.run / "jobs/t.starts"
    starts.write_text("start 1 job 5 2026-01-01 00:00:00 at step 0\n" * 4)
    code, log = job("9 0 9")
    assert code == 0
    starts.write_text("start 1 job 5 2026-01-01 00:00:00 at step 9\n" * 5)
    code, log = job()
    assert code == 1 and "5 launches in a row came no further than step 9" in log


def test_starts_are_limited(job):
    plays = [f"{n} 75" for n in range(1, 5)]
    options = ["--until-done", "--env", "XVR_MAX_STARTS=2"]
    job(*plays, options=options)
    job(options=options)
    code, log = job(options=options)
    assert code == 1 and "this would be start 3; XVR_MAX_STARTS is 2" in log


@pytest.mark.parametrize("before", ["", "6\n"])
def test_what_is_left_of_a_chain_is_cancelled_once_the_run_is_done(before, job):
    (job.run / "jobs").mkdir()
    (job.run / "jobs/t.jobs").write_text(f"{before}7\n8\n9\n")
    code, log = job("4 75", "9 0 9")
    assert code == 75 and "the next job of the chain goes on" in log
    code, log = job()
    assert code == 0 and "CANCEL 8 9" in log


def test_the_clock_becomes_max_time_and_the_sites_lines_reach_the_ranks(job):
    code, log = job("1 75", options=["--clock", "3600", "--env", "NCCL_DEBUG=INFO"])
    assert code == 75
    call = (job.run / "calls").read_text()
    assert "--max-time 1:00:00" in call or "--max-time 0:59:5" in call
    assert f"--set run.dir={job.run}" in call
    assert r"AN=a\ value NCCL_DEBUG=INFO" in log
    assert "XVR_LAUNCH" not in log


def test_a_launcher_that_is_not_there_is_named(job):
    code, log = job("1 75", options=["--env", "XVR_LAUNCH=aprun -n {ranks}"])
    assert code == 2 and "no aprun on PATH" in log


def test_modules_that_do_not_load_are_named(job):
    code, log = job("1 75", options=["--env", "XVR_MODULES=rocm nccl"])
    assert code == 2 and "module load rocm nccl failed" in log


def test_a_warning_before_the_run_has_started_is_an_answer(job, tmp_path):
    """The site's file is read before the ranks start; here it is where the warning comes."""
    with (tmp_path / "here.env").open("a") as file:
        file.write("WARNED=$(kill -USR1 $$)\n")
    code, log = job("1 75", options=["--until-done"])
    assert code == 1 and "warned before the run could start; ask for more time" in log
    assert not (job.run / "calls").exists()


def test_without_an_environment_it_says_how_to_make_one(job, tmp_path):
    shutil.rmtree(tmp_path / "venv")
    code, log = job("1 75")
    assert code == 2 and "make it on a login node: bash" in log


@pytest.mark.parametrize(
    ("command", "ranks"),
    [
        (("train", "c.yaml"), "6 3"),
        (("evaluate", "runs/a"), "6 3"),
        (("simulate", "c.yaml"), "6 3"),
        (("ingest", "a.cine", "--corpus", "c"), "6 3"),
        (("train", "c.yaml", "--find-batch"), "1 1"),
        (("reconstruct", "runs/a"), "1 1"),
        (("report", "runs/a"), "1 1"),
    ],
)
def test_commands_that_take_several_ranks_get_them(command, ranks, job):
    options = ["--ranks-per-node", "3", "--env", "XVR_LAUNCH=env RANKS={ranks} EACH={per_node}"]
    _code, log = job("9 0 9", options=options, command=command)
    assert "RANKS={} EACH={} ".format(*ranks.split()) in log


def test_a_script_is_told_how_to_start_its_ranks(job, tmp_path):
    (tmp_path / "a.py").write_text("import os; print('by', os.environ['XVR_MPIRUN'])")
    options = ["--env", "XVR_LAUNCH=env -n {ranks} EACH={per_node}"]
    code, log = job(options=options, command=("a.py",))
    assert code == 0 and "by env  EACH=1" in log


WITHOUT = """#!/bin/sh
case "$*" in *"{what}"*) {instead};; esac
exec "{python}" "$@"
"""


@pytest.mark.parametrize(
    ("what", "started"),
    [("submit.ranks", False), ("submit.restart begin", False), ("submit.restart end", True)],
)
def test_without_a_decision_the_job_ends_and_is_not_started_again(what, started, job, tmp_path):
    text = WITHOUT.format(what=what, instead="echo no disk >&2; exit 1", python=sys.executable)
    (tmp_path / "venv/bin/python").write_text(text)
    code, log = job("4 75", options=["--until-done"])
    assert code == 74 and "AGAIN" not in log
    assert "no disk" in log and f"python -m hpc_xvr.{what.split()[0]} failed, see above" in log
    assert (job.run / "calls").exists() is started


def test_a_warning_while_the_end_is_decided_changes_nothing(job, tmp_path):
    instead = "kill -USR1 $SCRIPT; sleep 0.2"
    text = WITHOUT.format(what="restart end", instead=instead, python=sys.executable)
    (tmp_path / "venv/bin/python").write_text(text)
    code, log = job("4 75", options=["--until-done"])
    assert "AGAIN" in log and code == 75


def test_a_job_that_is_cancelled_while_the_end_is_decided_does_not_start_again(job, tmp_path):
    instead = "kill -TERM $SCRIPT; sleep 0.2"
    text = WITHOUT.format(what="restart end", instead=instead, python=sys.executable)
    (tmp_path / "venv/bin/python").write_text(text)
    code, log = job("4 75", options=["--until-done"])
    assert "AGAIN" not in log and code == -15


PBS = """
xvr_script=/none
set -uo pipefail
source "{scripts}/pbs.sh"
xvr_cancel() {{ echo "CANCEL $*"; }}
xvr_main --site {site} --run {run} --name t --venv {venv} --steps 9 "$@"
"""


HOSTS = """#!/bin/sh
[ "$1" = --hostfile ] && echo "hosts: $(sort -u "$2" "$PBS_NODEFILE" | tr '\\n' ' ')"
shift 2
exec "$@"
"""


def test_pbs_leaves_out_nodes_on_which_nothing_can_be_started(job, tmp_path):
    """By pbs_tmrsh; what is left is the launcher's host file, and PBS_NODEFILE."""
    (tmp_path / "nodes").write_text("n1\nn1\nn3\nn3\nn2\nn2\n")
    (tmp_path / "venv/bin/pbs_tmrsh").write_text('#!/bin/sh\n[ "$1" = n2 ]\n')
    (tmp_path / "venv/bin/pbs_tmrsh").chmod(0o755)
    (job.run / "play").write_text("3 1\n9 0 9\n")
    text = PBS.format(scripts=SCRIPTS, site=job.site, run=job.run, venv=tmp_path / "venv")
    (tmp_path / "venv/bin/launcher").write_text(HOSTS)
    (tmp_path / "venv/bin/launcher").chmod(0o755)
    options = ["--env", "XVR_LAUNCH=launcher {hosts}", "train", "c.yaml"]
    done = subprocess.run(
        ["bash", "-c", text, "job", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PBS_JOBID": "7", "PBS_NODEFILE": str(tmp_path / "nodes")},
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    assert "1 of 3 node(s) do not answer; these do: n1 n2" in log
    assert [line for line in log.splitlines() if line.startswith("hosts")] == [
        "hosts: n1 n2 n3 ",
        "hosts: n1 n2 ",
    ]
    left = job.run / "jobs/t.nodes"
    assert left.read_text() == "n1\nn1\nn2\nn2\n"
    assert "launch 2 of start 1, 2 node(s), from step 3" in log


@pytest.fixture
def checkout(tmp_path, job):
    """A checkout with an environment in .venv, and the stand-in for training."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "jobs", root / "jobs")
    (root / "hpc_xvr").symlink_to(ROOT / "hpc_xvr")
    (root / ".venv").symlink_to(tmp_path / "venv")
    return root


HAND = {
    "slurm/train.sbatch": {
        "SLURM_SUBMIT_DIR": "{}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
    },
    "pbs/train.pbs": {"PBS_O_WORKDIR": "{}", "PBS_JOBID": "7"},
}


@pytest.mark.parametrize("script", HAND)
def test_a_script_by_hand_finds_the_package_and_the_environment_of_its_checkout(
    script, checkout, job, tmp_path
):
    (job.run / "play").write_text("9 0 9\n")
    arguments = ["--site", str(tmp_path / "here.env"), "--run", str(job.run), "train", "c.yaml"]
    path = checkout / "jobs" / script
    if script.startswith("pbs"):  # its users write them into the last line
        text = path.read_text().splitlines()
        text[-1] = "xvr_main " + " ".join(arguments)
        path.write_text("\n".join(text))
        arguments = []

    environment = {k: v for k, v in os.environ.items() if k != "HPC_XVR_VENV"}

    def start(place):
        return subprocess.run(
            ["bash", str(path), *arguments],
            cwd=place,
            capture_output=True,
            text=True,
            env={**environment, **{k: v.format(place) for k, v in HAND[script].items()}},
        )

    outside = start(tmp_path)
    assert outside.returncode == 2 and f"no checkout in {tmp_path}; call" in outside.stderr
    done = start(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done at step 9" in done.stdout
    scripts = checkout / "hpc_xvr/submit/scripts"
    assert f"bash {scripts}/affinity.sh hpc-xvr train" in done.stdout


@pytest.mark.parametrize(
    ("environment", "seen"),
    [
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "0", "XVR_GPUS": "3 2 1 0"}, "3"),
        ({"PMI_LOCAL_RANK": "3", "XVR_GPUS": "3 2 1 0"}, "0"),
        ({"PALS_LOCAL_RANKID": "1", "XVR_GPUS": "3 2 1 0"}, "2"),
        ({"SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, "GPU-b"),
        ({"FLUX_TASK_LOCAL_ID": "1", "XVR_GPUS": "3 2 1 0"}, "2"),
        ({"SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "4,5"}, "4,5"),
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, "4,5"),
    ],
)
def test_a_rank_is_given_its_gpu_before_it_starts(environment, seen):
    done = subprocess.run(
        ["bash", str(SCRIPTS / "affinity.sh"), "printenv", "CUDA_VISIBLE_DEVICES"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], **environment},
    )
    assert done.stdout.strip() == seen, done.stderr


def test_more_ranks_than_the_site_has_gpus_is_an_error_and_another_variable_is_possible():
    def run(**environment):
        return subprocess.run(
            ["bash", str(SCRIPTS / "affinity.sh"), "printenv", "ROCR_VISIBLE_DEVICES"],
            capture_output=True,
            text=True,
            env={"PATH": os.environ["PATH"], "XVR_GPUS": "4 5", **environment},
        )

    assert run(SLURM_LOCALID="1", XVR_GPU_VARIABLE="ROCR_VISIBLE_DEVICES").stdout == "5\n"
    done = run(SLURM_LOCALID="2")
    assert done.returncode == 2
    assert "local rank 2, but the site has 2 GPUs a node" in done.stderr
