"""What a run writes down: metrics.jsonl, TensorBoard events, the state of the machine."""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import explain_os_error
from hpc_xvr.files import write_atomic
from hpc_xvr.log import logger
from hpc_xvr.version import __version__

# Dense bf16 matrix peak in TFLOP/s by (part of) the device's name; vendor data sheets.
PEAK_BF16 = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "MI250X": 191.5, "GH200": 989.0}


class Metrics:
    """Lines of numbers, appended to metrics.jsonl and shown in TensorBoard; rank 0 only.

    On resume, lines beyond the checkpoint's step are dropped, so that a curve never runs twice
    over the same steps.
    """

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / "metrics.jsonl"
        if resumed_step is not None and self._path.exists():
            kept = [
                line
                for line in self._path.read_text().splitlines(keepends=True)
                if _step_of(line) <= resumed_step
            ]
            write_atomic(self._path, lambda file: file.write("".join(kept).encode()))
        self._warned = False
        self._file = self._path.open("a", buffering=1)
        self._board = SummaryWriter(
            str(folder / "tensorboard"),
            purge_step=None if resumed_step is None else resumed_step + 1,
        )

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line, on disk at once."""
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        record = {name: None if _not_finite(v) else v for name, v in record.items()}
        with self._going_on():
            self._file.write(json.dumps(record) + "\n")
        with self._going_on():
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush everything."""
        with self._going_on():
            self._file.close()
        with self._going_on():
            self._board.close()

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """A full disk ends no training: lines wait for room, curves may have gaps."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                logger.warning("metrics cannot be written: %s", explain_os_error(error))
            self._warned = True


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)  # JSON knows no NaN


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line torn by a crash


class Stopwatch:
    """Time spent in the parts of a step, summed between two reports and over the whole run.

    On a GPU these are the times of the host, which runs ahead of it; only whole steps and the
    wait for data mean something there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.all: dict[str, float] = {}  # seconds of each part since the run began
        self.since: dict[str, float] = {}  # when each part was last begun
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

    def report(self, samples: int, flops_per_sample: int, ranks: int) -> dict[str, float]:
        """Throughput since the last reset; resets.

        `samples` counts all ranks'; `flops_per_sample` is forward plus backward.
        """
        synchronise(self._device)
        self.enter(self._doing)
        seconds = max(time.perf_counter() - self._start, 1e-9)
        out = {
            "step_s": seconds / max(self.steps, 1),
            "samples_per_s": samples / seconds,
            "data_wait": self.parts.get("data", 0.0) / seconds,
            "gradient_wait": self.parts.get("gradients", 0.0) / seconds,
            "tflops_per_rank": samples * flops_per_sample / seconds / ranks / 1e12,
        }
        peak = peak_tflops(self._device)
        if peak:
            out["mfu"] = out["tflops_per_rank"] / peak
        if self._device.type == "cuda":
            out["gpu_memory_gb"] = peak_memory(self._device) / 1e9
        self.reset()
        return out


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` start from what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Most bytes in use since the last reset: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
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
    try:
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
