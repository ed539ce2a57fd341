"""Whole trainings, on the ranks of an engine and on one rank for comparison."""

import json

from hpc_xvr.checkpoint import load, path_of
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.train.engine import Trainer


def train(cfg, comm, resume=False):
    """Run a training; return its losses and the final weights (rank 0's checkpoint)."""
    trainer = Trainer(cfg, comm, resume)
    assert trainer.run()
    trainer.close()
    comm.barrier()
    lines = [json.loads(line) for line in (cfg.run.dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    return losses, load(path_of(cfg.run.dir / "checkpoints", cfg.train.steps))


def one_rank(cfg):
    """The same training alone, on each rank for itself."""
    from mpi4py import MPI

    alone = cfg.run.dir.with_name(f"{cfg.run.dir.name}-alone-{MPI.COMM_WORLD.Get_rank()}")
    run = cfg.run.model_copy(update={"dir": alone})
    return train(cfg.model_copy(update={"run": run}), Comm())
