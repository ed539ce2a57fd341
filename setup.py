"""Packaging of hpc_xvr. `bash jobs/setup.sh` makes the whole environment, MPI and Horovod too."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "hpc_xvr/__init__.py").read_text())[1]

setup(
    name="hpc_xvr",
    version=version,
    description="SWIN-XVR: high-speed, high-resolution x-ray movies from two cameras, at HPC scale",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.10",
    packages=find_packages(include=["hpc_xvr", "hpc_xvr.*"]),
    package_data={"hpc_xvr.evaluate": ["*.html"]},
    entry_points={"console_scripts": ["hpc-xvr = hpc_xvr.cli:main"]},
    install_requires=[
        "click>=8.1",
        "google-crc32c>=1.5",
        "h5py>=3.10",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "mpi4py>=4.0",
        "numpy>=1.26",
        "nvidia-ml-py>=12",
        "pillow>=10",
        "pims>=0.7",
        "psutil>=5.9",
        "pydantic>=2.7",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4",
        "scikit-image>=0.22",
        "scipy>=1.11",
        "tensorboard>=2.16",
        "tensorstore>=0.1.64",
        "tifffile>=2024.1",
        "torch>=2.6",
        "zarr>=3.0",
    ],
    extras_require={
        "horovod": ["horovod>=0.28.1"],
        "test": [
            "hypothesis",
            "import-linter>=2",
            "pyMRAW>=0.32",
            "pytest>=8",
            "pytest-timeout",
            "ruff>=0.6",
        ],
    },
)
