"""Which micro-batch fits, and which is fastest: `hpc-xvr train --find-batch`."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import nn

from hpc_xvr.config import Config
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import CollectiveError, InputError
from hpc_xvr.factory.execution import use_threads
from hpc_xvr.log import logger, print_table, track
from hpc_xvr.train.learner import new_model
from hpc_xvr.train.meters import peak_memory, reset_peak_memory, synchronise
from hpc_xvr.train.optim import adam
from hpc_xvr.train.task import task_of

_LARGEST = 256
_MARGIN = 0.9  # of the memory that is there
_STEPS = 3  # timed, after one to warm up; the fastest counts
_PATIENCE = 60.0  # seconds after which no larger size is tried


@dataclass(frozen=True)
class Trial:
    """One size: samples of a micro-batch, peak bytes of a step, samples/s."""

    size: int
    memory: int
    speed: float


def find_batch(cfg: Config, comm: Comm) -> Trial:
    """Train on random numbers with micro-batches of 1, 2, 4, ... samples; show what each costs.

    Ends where the next one would not fit, where two doublings have gained nothing, or after a
    minute. Returns the smallest micro-batch within 3 % of the best speed.

    Raises:
        InputError: more than one rank, or not even one sample fits.
    """
    if comm.size > 1:
        raise CollectiveError("train --find-batch is one process; start it without mpirun")
    use_threads(cfg.run.threads)
    model, precision = new_model(cfg, comm.device)
    optimizer = adam(model.parameters(), cfg.optim)
    room = int(_MARGIN * _free_memory(comm.device))
    trials: list[Trial] = []
    size, start = 1, time.perf_counter()
    for _ in track(range(_LARGEST.bit_length()), "micro-batches", unit="sizes"):
        if trials and (_expected(trials, size) > room or _levelled(trials)):
            break
        if time.perf_counter() - start > _PATIENCE:
            break
        try:
            memory, seconds = _try(model, optimizer, cfg, comm.device, precision, size)
        except torch.OutOfMemoryError:
            break
        trials.append(Trial(size, memory, size / seconds))
        size *= 2
    if not trials:
        raise InputError(
            f"not even one sample of data.patch {cfg.data.patch} fits into the "
            f"{room / 1e9:.1f} GB that are free; set train.recompute to blocks, or lower data.patch"
        )
    best = max(trial.speed for trial in trials)
    chosen = next(trial for trial in trials if trial.speed > 0.97 * best)
    _show(cfg, trials, chosen, room, precision)
    return chosen


def _try(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    cfg: Config,
    device: torch.device,
    precision: str,
    size: int,
) -> tuple[int, float]:
    """Peak bytes and seconds of a training step of `size` samples."""
    task, patch = task_of(cfg), cfg.data.patch
    low = patch // cfg.data.scale
    rand = partial(torch.rand, device=device, dtype=next(model.parameters()).dtype)
    lr_frames, n_out = task.longest(model)
    lr = rand(size, lr_frames, 1, low, low)
    batch = {
        "lr": lr,
        "hr": rand(size, 2, 1, patch, patch),
        "target": rand(size, n_out, 1, patch, patch),
        "hr_offset": lr.new_tensor([[-1.0, 1.0]]).expand(size, 2),
    }

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = model(*(batch[name] for name in task.inputs))
        task.loss(output, batch).backward()
        optimizer.step()

    reset_peak_memory(device)
    step()
    seconds = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        step()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return peak_memory(device), min(seconds)


def _expected(trials: list[Trial], size: int) -> float:
    """Memory of a micro-batch, from the growth between the last two."""
    last = trials[-1]
    before = trials[-2] if len(trials) > 1 else Trial(0, 0, 0.0)
    growth = (last.memory - before.memory) / (last.size - before.size)
    return last.memory + growth * (size - last.size)


def _levelled(trials: list[Trial]) -> bool:
    if len(trials) < 3:
        return False
    before, *last = (trial.speed for trial in trials[-3:])
    return max(last) < 1.02 * before


def _show(cfg: Config, trials: list[Trial], chosen: Trial, room: int, precision: str) -> None:
    print_table(
        f"training step, {cfg.data.patch}x{cfg.data.patch} pixels, {precision}, "
        f"recompute {cfg.train.recompute}, {room / 1e9:.1f} GB free",
        ["micro-batch", "peak GB", "of free %", "samples/s", ""],
        [
            (
                str(t.size),
                f"{t.memory / 1e9:.2f}",
                f"{100 * t.memory / room:.0f}",
                f"{t.speed:.2f}",
                "<- take this" if t is chosen else "",
            )
            for t in trials
        ],
    )
    logger.info(
        "use --set train.micro_batch=%d (a rank's share of train.global_batch must be a multiple "
        "of it); about %d samples would fit",
        chosen.size,
        _fitting(trials, room),
    )


def _fitting(trials: list[Trial], room: int) -> int:
    size = trials[-1].size
    while size < 1024 and _expected(trials, size + 1) <= room:
        size += 1
    return size


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = psutil.virtual_memory().available
    # The limit of a container or of a scheduler's job, which psutil does not know.
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # "max": none
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free
