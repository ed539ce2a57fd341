"""Steps recorded as CUDA graphs. What needs a GPU runs where benchmarks/gpu_visit.sh does."""

import pytest
import torch

from hpc_xvr.config import load
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import InputError
from hpc_xvr.train.learner import check_graphs
from support.paths import PULSE
from support.training import train

GAPS = [
    *("model.name=key_propagation", "model.base=none", "data.gaps=[3,5]", "train.steps=12"),
    *("train.global_batch=4", "train.micro_batch=2", "train.log_every=1"),
]


def test_graphs_are_refused_where_nothing_can_be_recorded(hpc_xvr, pulse_corpus, tmp_path):
    settings = [*GAPS, "train.graphs=true", "run.device=cpu"]
    settings += [f"data.corpus={pulse_corpus}", f"run.dir={tmp_path / 'run'}"]
    said = hpc_xvr("train", PULSE, *(a for s in settings for a in ("--set", s)), code=2)
    assert "train.graphs true: for one rank without an engine on a GPU, not for" in said.err
    assert not (tmp_path / "run").exists()
    two = Comm(device=torch.device("cuda"))
    two.size = 2
    with pytest.raises(InputError, match=r"2 rank\(s\) of serial on cuda; set it to false"):
        check_graphs(two)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_recorded_steps_on_a_gpu_train_as_others_do(pulse_corpus, tmp_path):
    losses = {}
    for graphs in (False, True):
        settings = [*GAPS, f"run.dir={tmp_path / str(graphs)}", f"data.corpus={pulse_corpus}"]
        cfg = load(PULSE, [*settings, "run.device=cuda", f"train.graphs={graphs}"])
        losses[graphs] = train(cfg, Comm(device=torch.device("cuda")))[0]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
