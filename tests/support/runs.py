"""Run folders of small models that were never trained."""

from pathlib import Path

import torch

from hpc_xvr import checkpoint
from hpc_xvr.config import dump, load
from hpc_xvr.factory.build import build_model

SMALL = {
    "edvr": {"name": "edvr", "embed_dim": 8, "heads": 2, "depths": [1, 1]},
    "edvr_stf": {"name": "edvr_stf", "embed_dim": 8, "heads": 2, "depths": [1, 1]},
    "swin_centre": {"embed_dim": 6, "depths": [2], "window": 4},
    "swin_sequence": {"embed_dim": 6, "depths": [2], "window": 4, "output": "sequence"},
    "swin_adaptive": {"embed_dim": 6, "depths": [2], "window": 4, "base": "adaptive"},
}


def a_run(folder: Path, model: dict, seed: int = 0) -> Path:
    """A run folder with one checkpoint of random weights."""
    config = load(None, [f"model.{key}={value}" for key, value in model.items()])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config))
    torch.manual_seed(seed)
    weights = build_model(config).state_dict()
    state = {"model": weights, "ema": None, "step": 3, "config": config.model_dump(mode="json")}
    checkpoint.save(state, checkpoint.path_of(folder / "checkpoints", 3))
    return folder
