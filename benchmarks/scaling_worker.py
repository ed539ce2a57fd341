"""One rank of a group that scaling.py measures: the trainer's own step, timed when it is told to.

Not started by hand. Rank 0 reads commands from standard input and prints one line of JSON for
each: `weak 5` or `strong 5` are five steps of the trainer; `beside 5`, on one rank, are five more,
each beside one of a loop written by hand around the same model, without trainer and engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_xvr.distributed.launch import discover
from hpc_xvr.factory.memory import keep_freed_memory

keep_freed_memory()  # before torch is imported, as the trainer does

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from hpc_xvr import log  # noqa: E402
from hpc_xvr.config import Config, Dist, load  # noqa: E402
from hpc_xvr.distributed.comm import Comm, connect, device_of  # noqa: E402
from hpc_xvr.factory.execution import use_threads  # noqa: E402
from hpc_xvr.train.engine import Trainer  # noqa: E402
from hpc_xvr.train.learner import new_model  # noqa: E402
from hpc_xvr.train.meters import peak_memory, reset_peak_memory, synchronise  # noqa: E402
from hpc_xvr.train.objective import l1  # noqa: E402
from hpc_xvr.train.optim import MovingAverage, learning_rate  # noqa: E402


class Timed:
    """A trainer's step with the moment at which its last gradient was computed.

    What lies between that moment and the averaged gradients is communication that the backward
    pass did not hide, and waiting for slower ranks.
    """

    def __init__(self, cfg: Config, comm: Comm) -> None:
        self.trainer = Trainer(cfg, comm)
        self.trainer.stage()
        self.batch = self.trainer.share.samples
        self._step = 0
        self._computed = 0.0
        for p in self.trainer.learner.model.parameters():
            p.register_post_accumulate_grad_hook(self._note)
        self._batches = self.trainer.batches()

    def _note(self, _: Tensor) -> None:
        self._computed = time.perf_counter()

    def __call__(self) -> tuple[float, float]:
        """Seconds of waiting: for data, and for gradients."""
        clock = self.trainer.clock
        clock.reset()
        self.trainer.train_step(self._step, self._batches)
        clock.enter("")
        self._step += 1
        ready = clock.since["update"]  # averaged gradients are in place
        return clock.parts.get("data", 0.0), max(0.0, ready - self._computed)


class Plain:
    """The loop one would write by hand for one device."""

    def __init__(self, trainer: Trainer) -> None:
        cfg, self.device = trainer.cfg, trainer.comm.device
        self.cfg, self.batch = cfg, trainer.share.samples
        self.model, self.precision = new_model(cfg, self.device)
        self.model.train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), cfg.optim.lr, fused=True)
        self.average = MovingAverage(self.model, cfg.optim.ema)
        self._batches = trainer.batches()
        self._step = 0

    def __call__(self) -> tuple[float, float]:
        start = time.perf_counter()
        batch = {k: v.to(self.device, non_blocking=True) for k, v in next(self._batches).items()}
        waited = time.perf_counter() - start
        rate = learning_rate(self.cfg.optim, self._step, self.cfg.train.steps, self.batch)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        kind = self.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.model(batch["lr"], batch["hr"], batch["hr_offset"])
        l1(output, batch["target"]).backward()
        self.optimizer.step()
        self.average.update()
        self._step += 1
        return waited, 0.0


def measure(step: Callable[[], tuple[float, float]], count: int, comm: Comm, control: Comm) -> dict:
    """This rank's seconds of each step, after one more to warm up."""
    device = comm.device
    step()
    synchronise(device)
    reset_peak_memory(device)
    control.barrier()
    times, data, gradients = [], [], []
    begin = last = time.perf_counter()
    for _ in range(count):
        waits = step()
        now = time.perf_counter()
        times.append(now - last)
        data.append(waits[0])
        gradients.append(waits[1])
        last = now
    synchronise(device)
    total = time.perf_counter() - begin
    if device.type == "cuda":  # the host runs ahead: only the whole means something
        times, gradients = [total / count] * count, [0.0] * count
    memory = peak_memory(device)
    return {"steps": times, "data": data, "wait": gradients, "total": total, "memory": memory}


def beside(step: Timed, plain: Plain, count: int) -> dict:
    """Seconds of each step and of the loop by hand, done in turns: they share every slow spell."""
    device = step.trainer.comm.device
    seconds: dict[str, list[float]] = {"steps": [], "plain": []}
    turns = [("steps", step), ("plain", plain)]
    for i in range(-1, count):  # one to warm up
        for name, one in turns[:: -1 if i % 2 else 1]:
            synchronise(device)
            start = time.perf_counter()
            one()
            synchronise(device)
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {**seconds, "memory": peak_memory(device)}


def give_memory_back() -> None:
    """What was freed, to the system: other groups have their turn, and all of them are alive."""
    with contextlib.suppress(AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def meet(kind: str, wish: str, settings: Dist) -> tuple[Comm, Comm]:
    """The ranks' engine, and what the group is steered with."""
    if kind != "independent":
        comm = connect(kind, wish, settings)  # type: ignore[arg-type]
        return comm, comm
    device = device_of(discover(), wish)
    if discover().launcher is None:
        return (alone := Comm(device=device)), alone
    from mpi4py import MPI

    from hpc_xvr.distributed.mpi import MpiComm

    return Comm(device=device), MpiComm(device, MPI.COMM_WORLD)


def main() -> None:
    kind, config, per_rank, whole, *overrides = sys.argv[1:]
    log.setup(1)  # warnings only
    cfg = load(config, overrides)
    comm, control = meet(kind, cfg.run.device, cfg.dist)
    use_threads(cfg.run.threads)
    steps: dict[str, Any] = {}
    for what, batch in (("weak", int(per_rank)), ("strong", int(whole) // control.size)):
        if what == "strong" and batch in (0, int(per_rank)):
            continue
        folder = Path(cfg.run.dir) / f"{kind}-{control.size}-{what}"
        folder = folder / str(control.rank) if comm is not control else folder
        run = cfg.run.model_copy(update={"dir": folder})
        train = cfg.train.model_copy(update={"global_batch": batch * comm.size})
        steps[what] = Timed(cfg.model_copy(update={"run": run, "train": train}), comm)
    weak = steps["weak"].trainer
    plain = Plain(weak) if control.size == 1 else None
    about = control.gather({"pid": os.getpid(), "host": os.uname().nodename})
    hello = {
        "ranks": about,
        "engine": comm.describe(),
        "runs": {what: step.batch for what, step in steps.items()},
        "gradient_bytes": 4 * sum(p.numel() for p in weak.learner.model.parameters()),
        "flops_per_sample": weak.flops_per_sample,
    }
    while True:
        if control.is_root:
            print(json.dumps(hello), flush=True)
            order = sys.stdin.readline().split()
        order = control.broadcast(order if control.is_root else None)
        if not order or order == ["end"]:
            break
        if order[0] == "beside":
            mine = beside(steps["weak"], plain, int(order[1]))
        else:
            mine = measure(steps[order[0]], int(order[1]), comm, control)
        give_memory_back()
        hello = {"ranks": control.gather(mine)}
    control.close()
    control.leave(0)


if __name__ == "__main__":
    main()
