"""The command that trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_xvr.cli.common import Examples, a_config, connect, settings
from hpc_xvr.cli.common import engine as engine_option
from hpc_xvr.cli.ending import then, typed
from hpc_xvr.errors import PassingError
from hpc_xvr.log import logger

if TYPE_CHECKING:
    from hpc_xvr.config import Config
    from hpc_xvr.distributed.comm import Comm
    from hpc_xvr.train.stopping import Stopping


class Duration(click.ParamType):
    """HH:MM:SS, MM:SS, or minutes; in seconds."""

    name = "HH:MM:SS"

    def convert(
        self, value: str | float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        parts = value.split(":")
        try:
            numbers = [float(part) for part in parts] if len(parts) == 1 else [*map(int, parts)]
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= 3 or any(not 0 <= n < float("inf") for n in numbers):
            self.fail(f"{value!r} is not a time; write 02:30:00, 30:00 or minutes, such as 150")
        if len(numbers) == 1:
            return 60.0 * numbers[0]
        return float(sum(n * 60**i for i, n in enumerate(reversed(numbers))))


UNFINISHED = 75  # "not done yet, start me again": what job scripts requeue on


@click.command(
    cls=Examples,
    examples="""
    mpirun -n 2 hpc-xvr train configs/pulse.yaml
    mpirun -n 5 hpc-xvr train configs/published.yaml --set data.corpus=corpus
    hpc-xvr train configs/quickstart.yaml --set run.dir=runs/mine \\
        --set train.steps=100
    mpirun -n 5 hpc-xvr train configs/published.yaml --resume --max-time 02:55:00
    hpc-xvr train configs/published.yaml --find-batch
""",
)
@a_config
@settings
@engine_option
@click.option(
    "--resume",
    is_flag=True,
    help="Continue from the run folder's newest valid checkpoint; start if there is none.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="With --resume: refuse what is only warned of otherwise, such as a corpus that lost or "
    "gained training recordings.",
)
@click.option(
    "--max-time",
    type=Duration(),
    help="Stop with a checkpoint before this process has run this long; a plain number is minutes.",
)
@click.option(
    "--find-batch",
    is_flag=True,
    help="Measure speed and memory of micro-batches in one process, instead of training.",
)
def train(
    config: Path,
    overrides: tuple[str, ...],
    engine: str | None,
    resume: bool,
    strict: bool,
    max_time: float | None,
    find_batch: bool,
) -> None:
    """Train the model of CONFIG; start it with mpirun for more than one rank.

    The global batch is fixed by the config and shared by the ranks, so the same run gives the
    same losses on any number of them. Everything goes to the run folder (run.dir): config,
    metrics.jsonl, TensorBoard events, checkpoints, sample pictures. Where data.corpus is missing
    and CONFIG has a section simulate, that corpus is simulated first.

    A rank computes with run.threads CPU threads; if that is not set, with OMP_NUM_THREADS, else
    with its share of the cores.

    Exit codes: 0 done, 2 bad input, 74 trouble of the moment (a full disk, a lost rank), 75 stopped
    with a checkpoint, by SIGUSR1, SIGTERM or SIGINT, as --max-time is nearly over, or by a disk
    that is full by now (start again with --resume). Under mpirun send SIGUSR1: it reaches every
    rank, whereas SIGTERM ends mpirun, and the ranks with it; a job of `hpc-xvr submit` shields it.
    A run that is done has done.json in its folder.
    """
    from hpc_xvr.config import load
    from hpc_xvr.train.stopping import Stopping

    cfg = load(config, overrides)
    stopping = Stopping(max_time)
    if not find_batch:
        stopping.listen()  # a signal during the long start is answered after the first steps
    comm = connect(engine or cfg.dist.engine, cfg.run.device, cfg.dist, cfg.run.dir)
    if find_batch:
        from hpc_xvr.train.find_batch import find_batch as measure

        measure(cfg, comm)
        then("train", config, *typed(["find_batch"]), "--set", "train.micro_batch=N")
        return
    done = _train(cfg, comm, resume, stopping, strict)
    if comm.is_root and done:
        then("evaluate", cfg.run.dir)
    elif comm.is_root:
        then("train", config, *typed(["resume"]), "--resume")
    comm.close()
    comm.leave(0 if done else UNFINISHED)


def _train(cfg: Config, comm: Comm, resume: bool, stopping: Stopping, strict: bool) -> bool:
    """Is the run done now?"""
    from hpc_xvr.data.simulate.corpus import simulate_if_missing
    from hpc_xvr.distributed.launch import rank_threads
    from hpc_xvr.train.engine import Trainer
    from hpc_xvr.train.run_folder import finished
    from hpc_xvr.train.share import Share

    step = comm.on_root(lambda: finished(cfg)) if resume else None
    if step is not None:
        if comm.is_root:
            logger.info("%s is done (step %d); nothing to do", cfg.run.dir, step)
        return True
    # What the ranks cannot share or use is refused before minutes of simulation.
    comm.together(lambda: Share.of(cfg.train, comm.rank, comm.size))
    comm.together(lambda: rank_threads(cfg.run.threads))
    comm.on_root(lambda: simulate_if_missing(cfg.simulate, cfg.data.corpus))
    trainer = Trainer(cfg, comm, resume, stopping, strict)
    try:
        done = trainer.run()
    except PassingError as error:
        if trainer.checkpoints.written:  # it has come further: start it again
            error.exit_code = UNFINISHED
        raise
    trainer.close()
    return done
