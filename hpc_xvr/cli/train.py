"""The command that trains."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_xvr.cli.common import Examples, a_config, connect, settings
from hpc_xvr.cli.common import engine as engine_option

UNFINISHED = 75  # "not done yet, start me again": what job scripts requeue on


@click.command(
    cls=Examples,
    examples="""
    mpirun -n 2 hpc-xvr train configs/pulse.yaml
    mpirun -n 5 hpc-xvr train configs/published.yaml --set data.corpus=corpus --resume
    hpc-xvr train configs/quickstart.yaml --set run.dir=runs/mine --set train.steps=100
    hpc-xvr train configs/published.yaml --find-batch
""",
)
@a_config
@settings
@engine_option
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the run folder's newest valid checkpoint, or start if none.",
)
@click.option(
    "--find-batch",
    is_flag=True,
    help="Train nothing: measure speed and memory of micro-batches, one process.",
)
def train(
    config: Path, overrides: tuple[str, ...], engine: str | None, resume: bool, find_batch: bool
) -> None:
    """Train the model of CONFIG; start it with mpirun for more than one rank.

    The global batch is fixed by the config and shared by the ranks, so the same run gives the
    same losses on any number of them. Everything goes to the run folder (run.dir): config,
    metrics.jsonl, TensorBoard events, checkpoints, sample pictures.

    Exit codes: 0 done, 2 bad input, 75 stopped by SIGUSR1, SIGTERM or SIGINT with a checkpoint
    (start again with --resume). Under mpirun send SIGUSR1: it reaches every rank.
    """
    from hpc_xvr.config import load

    cfg = load(config, overrides)
    comm = connect(engine or cfg.dist.engine, cfg.run.device, cfg.dist, cfg.run.dir)
    if find_batch:
        from hpc_xvr.train.find_batch import find_batch as measure

        measure(cfg, comm)
        return
    from hpc_xvr.train.engine import Trainer

    trainer = Trainer(cfg, comm, resume)
    finished = trainer.run()
    trainer.close()
    comm.close()
    comm.leave(0 if finished else UNFINISHED)
