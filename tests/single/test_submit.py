"""Jobs for schedulers: what is refused, the scripts, and what they do when a run ends."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc_xvr.cli import cli
from hpc_xvr.errors import InputError
from hpc_xvr.submit import jobs as submit
from support.pbs_grammar import problems

ROOT = Path(__file__).resolve().parents[2]
PULSE = str(ROOT / "configs" / "pulse.yaml")
TRAIN = ("train", PULSE)
SITES = {  # site: what its queue needs
    "polaris": ["--account", "XVR", "--queue", "debug"],
    "perlmutter": ["--account", "m1234"],
    "frontier": ["--account", "abc123"],
    "slurm": [],
    "pbs": [],
}


@pytest.fixture
def dry(tmp_path, monkeypatch):
    """dry(options..., command...) -> the script, or the refusal."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, nodes="1", time="30"):
        command = ["submit", "--nodes", nodes, "--time", time, "--dry-run", *arguments]
        done = CliRunner().invoke(cli, command, catch_exceptions=True)
        if isinstance(done.exception, InputError):
            return f"refused: {done.exception}"
        assert done.exit_code == 0, done.output
        return done.output

    return call


@pytest.mark.parametrize("site", SITES)
def test_every_site_makes_a_script_that_bash_and_its_scheduler_read(site, dry, tmp_path):
    sets = ("--set", "train.global_batch=16", "--set", "run.dir=runs/a")
    script = dry("--site", site, *SITES[site], *TRAIN, *sets, nodes="2")
    path = tmp_path / "script"
    path.write_text(script)
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    if submit.read_site(site).scheduler == "pbs":
        assert problems(script) == []
    else:
        directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
        assert all(line.split()[1].startswith("--") for line in directives)
        assert "#SBATCH --signal=B:USR1@180" in directives
    assert not {"{nodes}", "{per_node}", "{queue}"} & set(script.split())
    assert not (tmp_path / "runs").exists()  # a dry run writes nothing


def test_every_site_has_a_file_and_bash_reads_it_as_submit_does():
    assert submit.sites() == sorted(SITES)
    for name in SITES:
        site = submit.read_site(name)
        done = subprocess.run(
            ["bash", "-c", f"set -eu -a; source {site.path}; env -0"],
            capture_output=True,
            text=True,
            env={"PATH": os.environ["PATH"], "USER": "$USER"},
        )
        assert done.returncode == 0, done.stderr
        seen = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
        assert {key: seen[key] for key in site.values} == site.values
        assert site.values["XVR_LAUNCH"].split()[0] in ("mpirun", "mpiexec")


@pytest.mark.parametrize(
    ("nodes", "time", "queue", "words"),
    [
        ("2", "1:00:00", "debug", None),
        ("3", "1:00:00", "debug", "debug (1-2 nodes"),
        ("2", "1:00:01", "debug", "at most 01:00:00"),
        ("10", "1:00:00", "debug-scaling", None),
        ("11", "0:30:00", "debug-scaling", "prod (10-24 nodes, 03:00:00) would take it"),
        ("1", "72:00:00", "preemptable", None),
        ("1", "72:00:01", "preemptable", "at most 72:00:00"),
        ("9", "1:00:00", "prod", "preemptable (1-10 nodes, 72:00:00) would take it"),
        ("24", "3:00:00", "prod", None),
        ("24", "3:00:01", "prod", "at most 03:00:00; ask for less and add --chain until-done"),
        ("25", "6:00:00", "prod", None),
        ("99", "6:00:01", "prod", "at most 06:00:00"),
        ("100", "24:00:00", "prod", None),
        ("496", "24:00:01", "prod", "at most 24:00:00"),
        ("497", "1:00:00", "prod", "--nodes 497"),
        ("2", "0:04:59", "debug", "05:00 or more"),
        ("2", "1:00:00", "small", "--queue small: polaris has debug (1-2 nodes"),
    ],
)
def test_what_polaris_would_reject_is_refused_with_the_reason(nodes, time, queue, words, dry):
    ranks = 4 * int(nodes)
    got = dry(
        *("--site", "polaris", "--account", "XVR", "--queue", queue, *TRAIN),
        *("--set", f"train.global_batch={ranks}"),
        nodes=nodes,
        time=time,
    )
    if words is None:
        assert f"select={nodes}:system=polaris" in got
        assert problems(got) == []
    else:
        assert got.startswith("refused: ")
        assert words in got


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--site", "summit", *TRAIN], "there are frontier, pbs, perlmutter, polaris, slurm"),
        (["--site", "polaris", "--queue", "debug", *TRAIN], "takes no job without --account"),
        (["--site", "polaris", "--account", "A", *TRAIN], "without --queue; polaris has debug"),
        (["--site", "slurm", "train", PULSE, "--set", "train.stepz=1"], "unknown key train.stepz"),
        (["--site", "slurm", "train", "none.yaml"], "none.yaml: no such file"),
        (["--site", "slurm", "--ranks-per-node", "3", *TRAIN], "cannot be shared by 3 ranks"),
        (["--site", "frontier", "--account", "A", "--ranks-per-node", "9", *TRAIN], "has 8 GPUs"),
        (["--site", "slurm", "dance"], "neither a script (NAME.py) nor a command; there are eval"),
        (["--site", "slurm", "nowhere.py"], "nowhere.py: no such file"),
        (["--site", "pbs", *TRAIN, "--set", "run.dir=my runs/a"], "PBS takes no path with ' '"),
        (["--site", "slurm", "--margin", "1800", *TRAIN], "leaves nothing"),
        (["--site", "slurm", "--chain", "2", "evaluate", "runs/a"], "--chain is for train"),
        (["--site", "slurm", *TRAIN, "--set", "simulate=null"], "data.corpus runs/pulse-corpus"),
    ],
)
def test_what_would_fail_after_the_wait_in_the_queue_is_refused_now(arguments, words, dry):
    assert words in dry(*arguments)


def test_options_of_the_command_are_read_now_too(dry):
    command = ["submit", "--site", "slurm", "--time", "5", *TRAIN, "--resumme"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 2
    assert "No such option" in done.output and "--resume" in done.output


def test_one_process_takes_one_node(dry):
    got = dry("--site", "slurm", "report", "runs/a", nodes="2")
    assert "report is one process; ask for --nodes 1" in got


def test_a_used_run_folder_is_refused_without_resume(dry, tmp_path):
    used = tmp_path / "run"
    used.mkdir()
    (used / "metrics.jsonl").write_text("{}\n")
    arguments = ("--site", "slurm", *TRAIN, "--set", f"run.dir={used}")
    assert "already used; add --resume" in dry(*arguments)
    assert "--resume" in dry(*arguments, "--resume")


def test_lines_of_the_sites_file_can_be_changed(dry):
    resources = "-l select={nodes}:ncpus=8:ngpus=4:mpiprocs=4; -l place=scatter:excl"
    got = dry("--site", "pbs", "--env", f"XVR_RESOURCES={resources}", *TRAIN, nodes="2")
    assert "#PBS -l select=2:ncpus=8:ngpus=4:mpiprocs=4\n" in got
    assert problems(got) == []


def test_the_sites_scratch_disk_and_the_nodes_are_filled_in(dry, monkeypatch):
    monkeypatch.setenv("USER", "me")
    arguments = [*TRAIN, "--set", "data.stage_dir={scratch}/x{nodes}"]
    got = dry("--site", "frontier", "--account", "A", *arguments, "--set", "train.global_batch=16")
    assert "data.stage_dir=/mnt/bb/me/x1" in got
    refused = dry("--site", "slurm", "--env", "XVR_SCRATCH=", *arguments)
    assert "names no XVR_SCRATCH" in refused


def test_a_site_file_of_ones_own_is_checked(tmp_path):
    path = tmp_path / "mine.env"
    path.write_text("XVR_SCHEDULER=slurm\nmodule load python\n")
    with pytest.raises(InputError, match=r"mine.env, line 2: write KEY=VALUE"):
        submit.read_site(str(path))
    path.write_text("XVR_SCHEDULER=lsf\n")
    with pytest.raises(InputError, match="XVR_SCHEDULER must be slurm or pbs"):
        submit.read_site(str(path))


def test_without_a_scheduler_here_it_says_where_to_submit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = ["submit", "--site", "pbs", "--time", "5", *TRAIN, "--set", "run.dir=run"]
    done = CliRunner().invoke(cli, command)
    assert "no qsub here: submit on a login node" in str(done.exception)


GOOD = "#!/bin/bash\n#PBS -N a\n#PBS -l select=2:system=polaris\n#PBS -l walltime=01:00:00\ntrue\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("#PBS -N a", "#PBS -N a b"),
        ("#PBS -N a", "#PBS -N 1a"),
        ("#PBS -N a", "#PBS -N a\n# a comment"),
        ("#PBS -N a", "true\n#PBS -N a"),
        ("#PBS -N a", "#PBS -Z a"),
        ("#PBS -N a", "#PBS -j both"),
        ("#PBS -N a", "#PBS -r yes"),
        ("#PBS -N a", "#PBS -l place=scattered"),
        ("#PBS -N a", "#PBS -l nodes=2:ppn=4"),
        ("#PBS -N a", "#PBS -l filesystems=home, eagle"),
        ("select=2:system", "select=0:system"),
        ("select=2:system=polaris", "select=2:ncpus=x"),
        ("select=2:system=polaris", "select=2: system=polaris"),
        ("select=2:system=polaris", "select=2:walltime=3"),
        ("walltime=01:00:00", "walltime=1h"),
        ("walltime=01:00:00", "walltime=01:75:00"),
        ("#!/bin/bash\n", ""),
    ],
)
def test_the_checker_of_pbs_directives_is_strict(old, new):
    assert problems(GOOD) == []
    assert problems(GOOD.replace(old, new))
    assert problems((ROOT / "jobs/pbs/train.pbs").read_text()) == []


# A stand-in for training that takes no time: STEPS checkpoints and EXIT for each start, in turn.
PLAY = """#!/usr/bin/env bash
run=""
for a in "$@"; do case $a in run.dir=*) run=${a#run.dir=};; esac; done
mkdir -p "$run/checkpoints"
echo "$*" >>"$run/calls"
read -r step code marker < <(sed -n "$(wc -l <"$run/calls")p" "$run/play")
[ "$step" = 0 ] || touch "$run/checkpoints/step-$(printf %09d "$step").pt"
[ -z "$marker" ] || echo "{\\"step\\": $marker, \\"time\\": 1.0}" >"$run/done.json"
exit "$code"
"""
SCRIPT = """
xvr_root={root} xvr_job=7 xvr_nodes=2 xvr_default_site={site}
xvr_again() {{ echo AGAIN; exit 75; }}
xvr_cancel() {{ echo "CANCEL $*"; }}
set -uo pipefail
source "$xvr_root/jobs/job.sh"
xvr_main --run {run} --name t --venv {venv} --steps 9 "$@"
"""


@pytest.fixture
def job(tmp_path):
    """job(plays, *options) -> (exit code, log) of the job script's next start."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    program = tmp_path / "venv/bin/hpc-xvr"
    program.write_text(PLAY)
    program.chmod(0o755)
    site = tmp_path / "here.env"
    site.write_text("XVR_RANKS_PER_NODE=1\nXVR_LAUNCH='{binding}'\nXVR_BIND=core\nAN='a value'\n")
    site.write_text(site.read_text().replace("{binding}", ""))
    run = tmp_path / "run"
    run.mkdir()

    def start(*plays, options=(), command=("train", "c.yaml")):
        if plays:
            (run / "play").write_text("".join(f"{p}\n" for p in plays))
        text = SCRIPT.format(root=ROOT, site=site, run=run, venv=tmp_path / "venv")
        done = subprocess.run(
            ["bash", "-c", text, "job", *options, *command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        return done.returncode, done.stdout + done.stderr

    start.run = run
    return start


def test_the_done_marker_decides_and_not_the_exit_code(job):
    code, log = job("9 137 9")
    assert code == 0 and "done at step 9" in log


def test_exit_code_0_without_the_marker_is_not_done(job):
    """mpirun may return 0 although its ranks were killed."""
    _code, log = job("4 0", options=["--until-done"])
    assert "AGAIN" in log and "not done, exit code 0, checkpoint of step 4" in log


def test_a_marker_of_fewer_steps_than_asked_for_is_an_old_one(job):
    code, log = job("8 1 8")
    assert code == 75 and "done at" not in log


def test_bad_input_is_not_started_again(job):
    code, log = job("0 2", options=["--until-done"])
    assert code == 2 and "AGAIN" not in log and "bad input" in log


def test_a_failure_is_started_again_only_after_a_new_checkpoint(job):
    plays = ["3 1", "5 75", "5 1"]
    code, log = job(*plays, options=["--until-done"])
    assert "AGAIN" in log
    assert "--resume" not in (job.run / "calls").read_text()
    code, log = job(options=["--until-done"])
    assert "AGAIN" in log and "start 2" in log and "from step 3" in log
    assert "--resume" in (job.run / "calls").read_text().splitlines()[1]
    code, log = job(options=["--until-done"])
    assert code == 1 and "AGAIN" not in log
    assert "exit code 1, and no checkpoint since step 5: not started again" in log
    code, log = job(options=["--until-done"])  # what is left of a chain
    assert code == 1 and "an earlier job of this chain was stopped: not done" in log
    assert len((job.run / "calls").read_text().splitlines()) == 3


def test_jobs_that_vanish_are_started_three_times_at_one_step(job):
    (job.run / "jobs").mkdir()
    starts = job.run / "jobs/t.starts"
    starts.write_text("start 1 job 5 2026-01-01 00:00:00 at step 0\n" * 2)
    code, log = job("9 0 9")
    assert code == 0
    starts.write_text("start 1 job 5 2026-01-01 00:00:00 at step 9\n" * 3)
    code, log = job()
    assert code == 1 and "3 starts in a row came no further than step 9" in log


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
    ("environment", "seen"),
    [
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "0", "XVR_GPUS": "3 2 1 0"}, "3"),
        ({"PMI_LOCAL_RANK": "3", "XVR_GPUS": "3 2 1 0"}, "0"),
        ({"PALS_LOCAL_RANKID": "1", "XVR_GPUS": "3 2 1 0"}, "2"),
        ({"SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, "GPU-b"),
        ({"SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "4,5"}, "4,5"),
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, "4,5"),
    ],
)
def test_a_rank_is_given_its_gpu_before_it_starts(environment, seen):
    done = subprocess.run(
        ["bash", str(ROOT / "jobs/affinity.sh"), "printenv", "CUDA_VISIBLE_DEVICES"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], **environment},
    )
    assert done.stdout.strip() == seen, done.stderr


def test_more_ranks_than_the_site_has_gpus_is_an_error_and_another_variable_is_possible():
    def run(**environment):
        return subprocess.run(
            ["bash", str(ROOT / "jobs/affinity.sh"), "printenv", "ROCR_VISIBLE_DEVICES"],
            capture_output=True,
            text=True,
            env={"PATH": os.environ["PATH"], "XVR_GPUS": "4 5", **environment},
        )

    assert run(SLURM_LOCALID="1", XVR_GPU_VARIABLE="ROCR_VISIBLE_DEVICES").stdout == "5\n"
    done = run(SLURM_LOCALID="2")
    assert done.returncode == 2
    assert "local rank 2, but the site has 2 GPUs a node" in done.stderr


@pytest.mark.parametrize("mpi", ["wheel", "system"])
def test_horovod_finds_its_libraries_beside_itself_with_the_mpi_from_pypi(mpi, tmp_path):
    """So that a wheel built in one environment works in another one, elsewhere."""
    if not shutil.which("readelf"):
        pytest.skip("no readelf here: install binutils")
    function = "/^xvr_compiler() {/,/^}/p"
    make = f"source <(sed -n '{function}' {ROOT}/jobs/setup.sh); xvr_compiler {tmp_path}/c++20"
    subprocess.run(["bash", "-c", make], check=True)
    (tmp_path / "a.cpp").write_text("int a() { return 1; }\n")
    given = ["-Wl,-rpath", "-Wl,/old/lib", "-Wl,-rpath,/old/torch/lib:", "-Wl,--enable-new-dtags"]
    subprocess.run(
        [f"{tmp_path}/c++20", "-shared", "-fPIC", "a.cpp", "-o", "a.so", *given],
        cwd=tmp_path,
        check=True,
        env={**os.environ, "HPC_XVR_MPI": mpi},
    )
    said = subprocess.run(["readelf", "-d", "a.so"], cwd=tmp_path, capture_output=True, text=True)
    paths = [line.partition("[")[2] for line in said.stdout.splitlines() if "RUNPATH" in line]
    expected = "$ORIGIN/../../../..:$ORIGIN/../../torch/lib]"
    assert paths == [expected if mpi == "wheel" else "/old/lib:/old/torch/lib:]"]


def test_submit_needs_neither_torch_nor_mpi(tmp_path):
    code = (
        "import sys\nfor name in ('torch', 'mpi4py', 'horovod', 'zarr', 'tensorstore', 'h5py'):\n"
        "    sys.modules[name] = None\nfrom hpc_xvr.cli import main\nmain()"
    )
    command = [sys.executable, "-c", code, "submit", "--site", "slurm", "--time", "5", "--dry-run"]
    done = subprocess.run([*command, *TRAIN], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=1" in done.stdout
