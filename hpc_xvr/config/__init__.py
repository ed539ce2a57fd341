"""The typed config tree: YAML file + `--set a.b=value`, checked whole before anything starts.

An unknown key is an error that lists the known ones. The resolved tree is written into the run
folder and can be read back from there.
"""

from hpc_xvr.config.loading import check, dump, flat, load, with_evaluate
from hpc_xvr.config.sections import (
    Config,
    Data,
    Dist,
    Fetch,
    Model,
    NoiseKind,
    Optim,
    Simulate,
    Train,
)

__all__ = [
    "Config",
    "Data",
    "Dist",
    "Fetch",
    "Model",
    "NoiseKind",
    "Optim",
    "Simulate",
    "Train",
    "check",
    "dump",
    "flat",
    "load",
    "with_evaluate",
]
