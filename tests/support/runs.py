"""Run folders of small models that were never trained, and corpora of noise."""

from pathlib import Path

import numpy as np
import torch

from hpc_xvr import checkpoint
from hpc_xvr.config import dump, load
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.corpus.writer import CorpusWriter
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


def a_corpus(path: Path, store: str = "zarr", videos: int = 4) -> Corpus:
    """Recordings v0, v1, ... of 9 frames of noise, 12 bit, in the training split."""
    info = {"camera": "c", "bit_depth": 12, "scene": "s", "split": "train", "source": "x"}
    rng = np.random.default_rng(0)
    with CorpusWriter(path, store) as writer:
        for i in range(videos):
            frames = rng.integers(0, 4096, (9, 32, 40)).astype(np.uint16)
            writer.add(f"v{i}", frames, frames.shape, frames.dtype, info)
    return Corpus(path)
