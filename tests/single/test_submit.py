"""Jobs for schedulers: what is refused, the scripts, and what they do when a run ends."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from hpc_xvr.cli import cli
from hpc_xvr.errors import InputError
from hpc_xvr.submit import ranks
from hpc_xvr.submit.site import read_site, sites
from support.paths import PULSE, ROOT
from support.pbs_grammar import problems

TRAIN = ("train", str(PULSE))
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
    if read_site(site).scheduler == "pbs":
        assert problems(script) == []
    else:
        directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
        assert all(line.split()[1].startswith("--") for line in directives)
        assert "#SBATCH --signal=B:USR1@180" in directives
    assert not {"{nodes}", "{per_node}", "{queue}"} & set(script.split())
    assert not (tmp_path / "runs").exists()  # a dry run writes nothing


def test_every_site_has_a_file_and_bash_reads_it_as_submit_does():
    assert sites() == sorted(SITES)
    for name in SITES:
        site = read_site(name)
        done = subprocess.run(
            ["bash", "-c", f"set -eu -a; source '{site.path}'; env -0"],
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
        (
            ["--site", "slurm", "train", str(PULSE), "--set", "train.stepz=1"],
            "unknown key train.stepz",
        ),
        (["--site", "slurm", "train", "none.yaml"], "none.yaml: no such file"),
        (["--site", "slurm", "--ranks-per-node", "3", *TRAIN], "cannot be shared by 3 ranks"),
        (["--site", "frontier", "--account", "A", "--ranks-per-node", "9", *TRAIN], "has 8 GPUs"),
        (["--site", "slurm", "dance"], "neither a script (NAME.py) nor a command; there are adapt"),
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


@pytest.mark.parametrize(
    "command",
    [("report", "runs/a"), ("reconstruct", "runs/a", "--out", "a.tif"), (*TRAIN, "--find-batch")],
)
def test_one_process_takes_one_node(command, dry):
    assert f"{command[0]} is one process; ask for --nodes 1" in dry(
        "--site", "slurm", *command, nodes="2"
    )
    assert "#SBATCH --nodes=1\n" in dry("--site", "slurm", *command)


@pytest.mark.parametrize(
    "command",
    [
        ("simulate", str(PULSE)),
        ("ingest", "beamtime", "--corpus", "corpus"),
        ("evaluate", "runs/a"),
        TRAIN,
        (__file__,),
    ],
)
def test_what_several_ranks_can_share_takes_several_nodes(command, dry):
    script = dry("--site", "slurm", *command, nodes="2")
    assert "#SBATCH --nodes=2\n" in script
    assert shlex.join(command) in script


def test_the_commands_that_take_several_ranks_are_those_that_look_for_them():
    """Each finds its ranks by `connect`; all others know of one process only."""
    connecting = {
        name
        for name, command in cli.commands.items()
        if "connect" in command.callback.__code__.co_names
    }
    one = {"reconstruct", "adapt"}  # which connect to their device only
    assert {*ranks.COMMANDS} == connecting - one


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
        read_site(str(path))
    path.write_text("XVR_SCHEDULER=lsf\n")
    with pytest.raises(InputError, match="XVR_SCHEDULER must be slurm or pbs"):
        read_site(str(path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("XVR_RANKS_PER_NODE=four", "XVR_RANKS_PER_NODE=four: write a number from 1"),
        ("XVR_RANKS_PER_NODE=0", "XVR_RANKS_PER_NODE=0: write a number from 1"),
        ("XVR_QUEUES=debug 1-2", "XVR_QUEUES=debug 1-2: write 'NAME NODES HH:MM:SS'"),
        ("XVR_QUEUES=debug 1-2 an hour", "XVR_QUEUES=debug 1-2 an hour: write 'NAME NODES"),
        ("XVR_MIN_TIME=5 min", "XVR_MIN_TIME=5 min: write HH:MM:SS"),
        ("XVR_REQUIRED=account project", "XVR_REQUIRED=account project: write account queue"),
    ],
)
def test_a_line_of_a_site_that_cannot_be_read_is_named(line, words, dry):
    got = dry("--site", "slurm", "--env", line, *TRAIN)
    assert got.startswith("refused: ") and "slurm.env" in got and words in got


def test_a_site_without_a_way_to_ask_for_a_queue_takes_none(dry):
    got = dry("--site", "slurm", "--env", "XVR_QUEUE_DIRECTIVE=", "--queue", "long", *TRAIN)
    assert "--queue long" in got and "has no XVR_QUEUE_DIRECTIVE" in got


def test_an_environment_that_the_job_would_not_find_is_refused(dry, monkeypatch, tmp_path):
    """As after `pip install --user`: the programs are elsewhere."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    got = dry("--site", "slurm", *TRAIN)
    assert f"no hpc-xvr in {tmp_path}/bin, where the job looks for it" in got


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


@pytest.mark.parametrize("mpi", ["wheel", "system"])
def test_horovod_finds_its_libraries_beside_itself_with_the_mpi_from_pypi(mpi, tmp_path):
    """So that a wheel built in one environment works in another one, elsewhere."""
    if not shutil.which("readelf"):
        pytest.skip("no readelf here: install binutils")
    function = "/^xvr_compiler() {/,/^}/p"
    make = f"source <(sed -n '{function}' '{ROOT}/jobs/setup.sh'); xvr_compiler '{tmp_path}/c++20'"
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
