"""The package as others install it: a wheel in an environment of its own, no checkout anywhere."""

import os
import subprocess
import sys
import venv
import zipfile

import numpy as np
import pytest
import tifffile

from support.paths import ROOT
from support.pbs_grammar import problems

BUILT_ONLY = "hpc_xvr/model/cpu/"  # sources of what is compiled
OPTIONAL = ("mpi4py", "horovod", "pynvml", "skimage", "zarr")  # setup.py has them as extras

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def tracked(*where):
    """Files of the checkout that git knows, or would take up."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: what earlier builds left in the checkout would get into it."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked():
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-index", "-w", str(out), str(source)], check=True)
    (path,) = out.glob("hpc_xvr-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """installed(command, ...) -> stdout. The environment sees the libraries of this one, without
    what is optional and without the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
    subprocess.run([*command, "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith("-packages")]
    block = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))"
    (packages / "libraries.pth").write_text("\n".join([*libraries, block, ""]))

    work = tmp_path_factory.mktemp("elsewhere")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HPC_XVR_VENV")}

    def run(program, *arguments, **more):
        done = subprocess.run(
            [folder / "bin" / program if program in ("hpc-xvr", "python") else program, *arguments],
            cwd=work,
            capture_output=True,
            text=True,
            env={**environment, **more},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not any(
            f"{ROOT}/{part}" in done.stdout + done.stderr for part in ("hpc_xvr", "jobs")
        )
        return done.stdout

    run.work, run.packages = work, packages
    where = run("python", "-c", "import hpc_xvr; print(hpc_xvr.__file__)")
    assert where == f"{packages}/hpc_xvr/__init__.py\n"
    return run


def test_the_wheel_holds_all_files_of_the_package_and_no_others(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kernels = {name for name in inside if name.startswith("hpc_xvr/model/_kernels.")}
    expected = {name for name in tracked("hpc_xvr") if not name.startswith(BUILT_ONLY)}
    assert inside - kernels == expected


@pytest.mark.parametrize("site", ["polaris", "perlmutter"])
def test_submit_writes_a_job_that_names_nothing_but_the_environment(site, installed):
    (installed.work / "my.yaml").write_text((ROOT / "configs/pulse.yaml").read_text())
    command = ["submit", "--site", site, "--account", "A", "--queue", "debug", "--time", "30"]
    script = installed("hpc-xvr", *command, "--dry-run", "train", "my.yaml")
    scripts = installed.packages / "hpc_xvr/submit/scripts"
    assert f"source {scripts}/{'pbs' if site == 'polaris' else 'slurm'}.sh" in script
    assert f"--site {installed.packages}/hpc_xvr/submit/sites/{site}.env " in script
    if site == "polaris":
        assert problems(script) == []


@pytest.fixture(scope="module")
def trained(installed):
    """A run that a submitted job has trained, on one rank without MPI."""
    (installed.work / "my.yaml").write_text((ROOT / "configs/pulse.yaml").read_text())
    site = (installed.packages / "hpc_xvr/submit/sites/slurm.env").read_text()
    (installed.work / "mine.env").write_text(site + "XVR_LAUNCH=nice\n")
    command = ["submit", "--site", "mine.env", "--time", "30", "--dry-run", "train", "my.yaml"]
    script = installed("hpc-xvr", *command, "--set", "run.dir=run")
    (installed.work / "job").write_text(script)
    numbers = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1"}
    return installed("bash", "job", **numbers)


def test_a_job_trains(installed, trained):
    assert "from step 0" in trained and "done at step 6" in trained
    assert (installed.work / "run/done.json").exists()


def test_two_camera_files_become_a_movie(installed, trained):
    sharp = np.random.default_rng(1).integers(0, 60_000, (9, 64, 64), np.uint16)
    fast = sharp.reshape(9, 16, 4, 16, 4).mean((2, 4)).astype(np.uint16)
    tifffile.imwrite(installed.work / "fast.tif", fast, photometric="minisblack")
    tifffile.imwrite(installed.work / "sharp.tif", sharp[::4], photometric="minisblack")
    files = ["--lr", "fast.tif", "--hr", "sharp.tif", "--gap", "4"]
    installed("hpc-xvr", "reconstruct", "run", *files, "--out", "movie.tif")
    movie = tifffile.imread(installed.work / "movie.tif")
    assert movie.shape == (9, 64, 64) and movie.dtype == np.uint16


def test_camera_files_become_a_corpus_and_a_run_is_evaluated(installed, trained):
    frames = np.random.default_rng(2).integers(0, 60_000, (9, 64, 64), np.uint16)
    tifffile.imwrite(installed.work / "shot.tif", frames, photometric="minisblack")
    said = installed("hpc-xvr", "ingest", "shot.tif", "--corpus", "corpus", "--split", "test")
    assert "1 added" in said
    options = ["--corpus", "corpus", "--gap", "4", "--method", "bicubic", "--out", "scores"]
    installed("hpc-xvr", "evaluate", "run", *options)
    assert (installed.work / "scores/comparison.html").exists()
    installed("hpc-xvr", "report", "run")
    assert (installed.work / "run/report.html").exists()
