"""What a run measures of itself and its machine: time, losses, memory, versions."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_xvr.distributed.comm import Comm
from hpc_xvr.version import __version__

# Dense bf16 matrix peak in TFLOP/s by (part of) the device's name; vendor data sheets.
PEAK_BF16 = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "MI250X": 191.5, "GH200": 989.0}


class Stopwatch:
    """Time spent in the parts of a step, summed between two reports and over the whole run.

    On a GPU these are the times of the host, which runs ahead of it; only whole steps and the
    wait for data mean something there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.all: dict[str, float] = {}  # seconds of each part since the run began
        self.since: dict[str, float] = {}  # when each part was last begun
        self.mfu: float | None = None  # of the last report, where the peak is known
        self._doing = "starting"
        self._since = time.perf_counter()
        self.parts: dict[str, float] = {}  # seconds of each part since the last report
        self.reset()

    def enter(self, doing: str) -> None:
        """From now on time belongs to this part."""
        now = time.perf_counter()
        self.parts[self._doing] = self.parts.get(self._doing, 0.0) + now - self._since
        self._doing, self._since = doing, now
        self.since[doing] = now

    def reset(self) -> None:
        """Start a new report."""
        synchronise(self._device)
        self.enter(self._doing)
        for part, seconds in self.parts.items():
            self.all[part] = self.all.get(part, 0.0) + seconds
        self._start, self.steps = time.perf_counter(), 0
        self.parts = {}

    def report(self, global_batch: int, flops_per_sample: int, ranks: int) -> dict[str, float]:
        """Throughput of the `steps` counted since the last reset; resets.

        `global_batch` counts all ranks' samples of a step; `flops_per_sample` is forward plus
        backward.
        """
        synchronise(self._device)
        self.enter(self._doing)
        seconds = max(time.perf_counter() - self._start, 1e-9)
        samples = self.steps * global_batch
        out = {
            "step_s": seconds / max(self.steps, 1),
            "samples_per_s": samples / seconds,
            "data_wait": self.parts.get("data", 0.0) / seconds,
            "gradient_wait": self.parts.get("gradients", 0.0) / seconds,
            "tflops_per_rank": samples * flops_per_sample / seconds / ranks / 1e12,
        }
        peak = peak_tflops(self._device)
        if peak:
            self.mfu = out["mfu"] = out["tflops_per_rank"] / peak
        if self._device.type == "cuda":
            out["gpu_memory_gb"] = peak_memory(self._device) / 1e9
        self.reset()
        return out


class MeanLoss:
    """Mean over ranks and steps of the loss; summed on the device, which nobody waits for."""

    def __init__(self, dtype: torch.dtype, comm: Comm) -> None:
        self._comm = comm
        self._sum = torch.zeros((), dtype=dtype, device=comm.device)
        self._steps = 0

    def add(self, loss: Tensor) -> None:
        """A micro-batch's part of this rank's mean loss of a step."""
        self._sum += loss

    def end_step(self) -> None:
        """The parts of one step are complete."""
        self._steps += 1

    def take(self) -> Tensor:
        """The mean since the last call, on the device; all ranks call it."""
        mean = self._comm.all_reduce(self._sum.double()) / self._comm.size / self._steps
        self._sum.zero_()
        self._steps = 0
        return mean


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` start from what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5); psutil has no such reset


def peak_memory(device: torch.device) -> int:
    """Most bytes in use since the last reset: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # psutil does not tell the peak, and getrusage's cannot be reset.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def peak_tflops(device: torch.device) -> float | None:
    """bf16 matrix peak of a known GPU; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions, revision, device and date, for run folders and benchmark results."""
    packages = ("torch", "numpy", "mpi4py", "horovod", "zarr", "tensorstore", "h5py")
    return {
        "hpc_xvr": __version__,
        "git": _git_revision(),
        "python": sys.version.split()[0],
        "packages": {name: v for name in packages if (v := _version(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join(sys.argv),
    }


def environment(comm: Comm, threads: int) -> dict[str, Any]:
    """The machine, and host and device of every rank; every rank calls it."""
    machine = describe_machine(comm.device)
    mine = {"host": socket.gethostname(), "device": machine["device"], "threads": threads}
    return {**machine, "engine": comm.describe(), "ranks": comm.gather(mine)}


def _cpu_name() -> str:
    try:  # neither psutil nor platform tells a CPU's name on Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        out = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()
