"""Packaging of hpc_xvr. `bash jobs/setup.sh` makes the whole environment, MPI and Horovod too."""

import platform
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

here = Path(__file__).parent


def kernels() -> list[Extension]:
    """hpc_xvr/model/cpu, where torch is there to be built against (pip's
    --no-build-isolation) and the machine is an x86-64. Without it all works, slower on CPUs."""
    try:
        from torch.utils import cpp_extension
    except ImportError:
        return []
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    # No -march=native: login and compute nodes differ, and what is not there is not called.
    able = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "bf16")]
    return [
        Extension(
            "hpc_xvr.model._kernels",
            ["hpc_xvr/model/cpu/block.cpp"],
            depends=["hpc_xvr/model/cpu/attention.h", "hpc_xvr/model/cpu/vectors.h"],
            include_dirs=cpp_extension.include_paths(),
            library_dirs=cpp_extension.library_paths(),
            libraries=["torch_cpu", "c10"],
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-w", "-fopenmp", "-mfma", *able],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,  # an old compiler, or none
        )
    ]


version = re.search(r'__version__ = "(.+)"', (here / "hpc_xvr/version.py").read_text())[1]

setup(
    name="hpc_xvr",
    version=version,
    description="SWIN-XVR: high-speed, high-resolution x-ray movies from two cameras, at HPC scale",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.10",
    packages=find_packages(include=["hpc_xvr", "hpc_xvr.*"]),
    package_data={
        "": ["py.typed", "*.html", "templates/*.html"],
        "hpc_xvr.data.cameras": ["phantom_p10.txt"],
        "hpc_xvr.factory": ["builtin_weights/*"],
        "hpc_xvr.submit": ["scripts/*.sh", "sites/*.env"],
    },
    ext_modules=kernels(),
    entry_points={"console_scripts": ["hpc-xvr = hpc_xvr.cli:main"]},
    install_requires=[
        "click>=8.1",
        "google-crc32c>=1.5",
        "h5py>=3.10",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10",
        "psutil>=5.9",
        "pydantic>=2.7",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4",
        "scipy>=1.11",
        "tensorboard>=2.16",
        "tensorstore>=0.1.64",
        "tifffile>=2024.1",
        "torch>=2.6",
    ],
    extras_require={
        "mpi": ["mpi4py>=4.0"],  # several ranks; it is built against the MPI that is there
        "horovod": ["horovod>=0.28.1", "mpi4py>=4.0"],  # another way for gradients to travel
        "hdf5": ["hdf5plugin>=4.1"],  # HDF5 compressed with bitshuffle, blosc, zfp, lz4, zstd
        "gpu": ["nvidia-ml-py>=12"],  # how busy NVIDIA GPUs are
        "view": ["napari[pyqt6]>=0.5"],  # hpc-xvr view: a window to look at results
        "codecs": ["imagecodecs>=2024.1"],  # TIFF of LZW, JPEG 2000, packed 12 bit, ...
        "movie": ["av>=12"],  # MP4
        "pva": ["pvapy>=5.4"],  # cameras that send their frames over EPICS
        "mlperf": ["mlperf-logging>=4"],  # logs of benchmarks/time_to_quality.py, and their check
        "docs": [  # the documents and their notebooks; they are built in the tests
            "ipykernel>=6",
            "myst-nb>=1.1",
            "nbclient>=0.10",
            "pydata-sphinx-theme>=0.15",
            "sphinx>=7",
            "sphinx-click>=5",
            "sphinx-copybutton>=0.5",
            "sphinx-design>=0.5",
        ],
        "test": [
            "av>=12",
            "hdf5plugin>=4.1",  # HDF5 with bitshuffle is read in a test
            "hypothesis",
            "import-linter>=2",
            'mlperf-logging>=4; python_version >= "3.11"',  # accepts the logs of a benchmark
            "mypy>=1.11",
            'napari>=0.5; python_version >= "3.11"',  # hpc-xvr view, without a window
            'nxtomo>=3; python_version >= "3.11"',  # with silx, reads NeXus of ours
            'ome-zarr-models>=1; python_version >= "3.11"',  # checks OME-Zarr of ours
            "pims>=0.7",  # its reading of .cine files is what ours is compared with
            'pvapy>=5.4; platform_machine == "x86_64"',  # simulated cameras that send frames
            "playwright>=1.45",  # pages are looked at in a Chromium that is there
            "pyMRAW>=0.32",
            "pytest>=8",
            "pytest-timeout",
            "ruff>=0.6",
            "scikit-image>=0.22",  # its PSNR and SSIM are what ours are compared with
            "types-PyYAML",
            "types-psutil",
            'zarr>=3.0; python_version >= "3.11"',  # reads what we have written
        ],
    },
)
