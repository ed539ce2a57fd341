"""How busy the ranks are: one thread a node looks at all its ranks now and then.

Each look is a line of `utilisation/rank-N.jsonl` (N: the node's first rank) for each rank of the
node: processor and memory of its process, and of its GPU what NVML tells. `step` and `doing` are
those of the node's first rank; ranks keep step with each other. What NVML calls utilisation is
the share of time in which any kernel ran, waiting for others included: compare it with the MFU.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from hpc_xvr.distributed.comm import Comm
from hpc_xvr.files import write_atomic
from hpc_xvr.log import logger
from hpc_xvr.text import parse_json
from hpc_xvr.train.energy import NodeEnergy, of_run

SLOWER = 1.15  # a rank whose own work takes this times the median's is named
HUNGRY = 0.2  # as is one that waits for data for more than this share of its time
IDLE = 0.7  # or is less busy than this times the median
Row = dict[str, Any]


class Sampler:
    """Every rank makes one; the first of each node looks for all of them.

    Args:
        every_s: seconds between two looks; 0: none.
    """

    def __init__(self, comm: Comm, folder: Path, every_s: float) -> None:
        self._comm, self._every = comm, every_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.cost = 0.0  # share of a core that looking takes
        self.energy: NodeEnergy | None = None  # of the node; its first rank counts
        if not every_s:
            return
        here = socket.gethostname()
        ranks = comm.gather((here, os.getpid(), _uuid(comm.device)))
        local = [rank for rank, (host, *_) in enumerate(ranks) if host == here]
        if comm.rank != local[0]:
            return
        self._sources = [_Rank(rank, *ranks[rank][1:]) for rank in local]
        self.energy = NodeEnergy()
        for uuid, source in {
            ranks[rank][2]: s for rank, s in zip(local, self._sources, strict=True)
        }.items():
            if uuid and source.gpu:
                self.energy.add_gpu(*source.gpu.place)
        path = folder / "utilisation" / f"rank-{comm.rank}.jsonl"
        path.parent.mkdir(exist_ok=True)
        self._file = path.open("a", buffering=1)
        self._thread = threading.Thread(target=self._run, name="utilisation", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        begin = time.perf_counter()
        assert self.energy is not None
        while not self._stop.wait(self._every):
            place = self._comm.place
            now = round(time.time(), 3)
            for source in self._sources:
                with contextlib.suppress(psutil.Error):  # it is about to end
                    row: Row = {"time": now, "rank": source.rank, "step": place.step}
                    row |= {"doing": place.doing, **source.look()}
                    self._file.write(json.dumps(row) + "\n")
            self.energy.look()
            self.cost = time.thread_time() / (time.perf_counter() - begin)

    def stop(self) -> None:
        """No more looks; safe to call twice."""
        self._stop.set()
        if self._thread:
            self._thread.join(5)
            self._file.close()
            if self.energy:
                self.energy.look()
            self._thread = None


class _Rank:
    """A rank's process and its GPU."""

    def __init__(self, rank: int, pid: int, uuid: str | None) -> None:
        self.rank = rank
        self._process = psutil.Process(pid)
        self._process.cpu_percent()  # the first call only starts the clock
        self.gpu = _Gpu(uuid) if uuid else None

    def look(self) -> Row:
        row: Row = {
            "cpu": round(self._process.cpu_percent() / 100, 3),  # cores
            "rss_gb": round(self._process.memory_info().rss / 1e9, 3),
        }
        return row | self.gpu.look() if self.gpu else row


class _Gpu:
    """What NVML tells of a GPU; a figure it does not know is left out."""

    def __init__(self, uuid: str) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        self._links = [(time.perf_counter(), self._link_bytes())]

    @property
    def place(self) -> tuple[Any, Any]:
        """NVML, and its handle of this GPU."""
        return self._nvml, self._handle

    def look(self) -> Row:
        nvml, handle = self._nvml, self._handle
        row: Row = {}
        with contextlib.suppress(nvml.NVMLError):
            rates = nvml.nvmlDeviceGetUtilizationRates(handle)
            row |= {"gpu": rates.gpu / 100, "gpu_memory_busy": rates.memory / 100}
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_memory_gb"] = round(nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9, 3)
        with contextlib.suppress(nvml.NVMLError):
            row["power_w"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        with contextlib.suppress(nvml.NVMLError):
            row["celsius"] = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        for name, counter in (
            ("pcie_out_gb_s", nvml.NVML_PCIE_UTIL_TX_BYTES),
            ("pcie_in_gb_s", nvml.NVML_PCIE_UTIL_RX_BYTES),
        ):
            with contextlib.suppress(nvml.NVMLError):  # kB/s over the last 20 ms
                row[name] = round(nvml.nvmlDeviceGetPcieThroughput(handle, counter) / 1e6, 3)
        return row | self._link_rates()

    def _link_bytes(self) -> tuple[int, int] | None:
        """Bytes sent and received over NVLink so far, where the driver counts them."""
        nvml = self._nvml
        names = (
            "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX",
            "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX",
        )
        try:  # all links: UINT_MAX as the scope
            fields = [(getattr(nvml, name), 2**32 - 1) for name in names]
            values = nvml.nvmlDeviceGetFieldValues(self._handle, fields)
        except (nvml.NVMLError, AttributeError):
            return None
        if any(v.nvmlReturn != nvml.NVML_SUCCESS for v in values):
            return None
        out, into = (1024 * v.value.ullVal for v in values)
        return out, into

    def _link_rates(self) -> Row:
        before, now = self._links[-1], (time.perf_counter(), self._link_bytes())
        self._links = [now]
        if before[1] is None or now[1] is None:
            return {}
        seconds = now[0] - before[0]
        rates = [(b - a) / seconds / 1e9 for a, b in zip(before[1], now[1], strict=True)]
        return {"nvlink_out_gb_s": round(rates[0], 3), "nvlink_in_gb_s": round(rates[1], 3)}


def _uuid(device: torch.device) -> str | None:
    """NVML's name of a GPU; None for a CPU, or where NVML cannot be asked."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception as error:  # no driver library, another vendor, a slice of a GPU
        logger.warning("utilisation of %s is not known: NVML says %s", device, error)
        return None
    return uuid


def sum_up(
    comm: Comm,
    folder: Path,
    parts: dict[str, float],
    mfu: float | None,
    cost: float,
    energy: NodeEnergy | None = None,
    samples: int = 0,
) -> None:
    """Write utilisation.json and .png of the run and name ranks that were idle or slow; all ranks
    call it, after `Sampler.stop`.

    Args:
        parts: seconds that this rank spent in each part of the steps.
        mfu: model FLOP/s over the device's peak, where that is known.
        cost: share of a core that the sampler took.
        energy: this node's counters, on the rank that has them.
        samples: of all ranks, while they counted.
    """
    counted = comm.gather(energy.report() if energy else None)
    parts = {part: s for part, s in parts.items() if part != "starting"}
    everyone = comm.gather((socket.gethostname(), parts, torch.get_num_threads(), cost))
    if not comm.is_root:
        return
    rows = read(folder)
    busy = "gpu" if any("gpu" in row for row in rows) else "cpu"
    ranks: list[Row] = []
    for rank, (host, parts, threads, cost) in enumerate(everyone):
        mine = [row for row in rows if row["rank"] == rank]
        level = [row[busy] / (threads if busy == "cpu" else 1) for row in mine if busy in row]
        memory = "gpu_memory_gb" if busy == "gpu" else "rss_gb"
        ranks.append(
            {
                "rank": rank,
                "host": host,
                "busy_mean": float(np.mean(level)) if level else None,
                "busy_p5": float(np.percentile(level, 5)) if level else None,
                "memory_gb": max((row.get(memory, 0.0) for row in mine), default=None),
                "power_w": _mean(row["power_w"] for row in mine if "power_w" in row),
                "seconds": {part: round(s, 3) for part, s in parts.items()},
                "sampler": round(cost, 6),
            }
        )
    findings = judge(ranks)
    nodes = [node for node in counted if node is not None]
    used = of_run(nodes, samples) if nodes else None
    summary = {"busy": busy, "mfu": mfu, "energy": used, "ranks": ranks, "findings": findings}
    text = json.dumps(summary, indent=1).encode()
    write_atomic(folder / "utilisation.json", lambda file: file.write(text))
    means = [rank["busy_mean"] for rank in ranks if rank["busy_mean"] is not None]
    if means:
        lows = [rank["busy_p5"] for rank in ranks if rank["busy_mean"] is not None]
        logger.info(
            "%s busy %.0f %% (5 %% of the time below %.0f %%)%s; looking took %.2f %% of a core",
            "GPUs" if busy == "gpu" else "threads",
            100 * float(np.mean(means)),
            100 * min(lows),
            f", MFU {100 * mfu:.0f} %" if mfu else "",
            100 * max(rank["sampler"] for rank in ranks),
        )
        from hpc_xvr.train.utilisation_figure import draw

        draw(rows, summary, folder / "utilisation.png")
    if used and used["kwh"] is not None:
        lacking = f" (without {'; '.join(used['missing'])})" if used["missing"] else ""
        each = used["joule_per_sample"]
        logger.info("energy: %.4g kWh, %.4g J a sample%s", used["kwh"], each or 0.0, lacking)
    elif used:
        logger.info("energy is not known: %s", "; ".join(used["missing"]))
    for finding in findings:
        logger.warning("%s", finding)


def judge(ranks: list[Row]) -> list[str]:
    """Ranks that keep the others waiting, wait for data, or have little to do: one line each.

    Only the work before the backward pass is compared: DDP waits for the others within that.
    """
    own = [r["seconds"].get("data", 0.0) + r["seconds"].get("forward", 0.0) for r in ranks]
    usual = float(np.median(own))
    level = [r["busy_mean"] for r in ranks if r["busy_mean"] is not None]
    findings = []
    for rank, seconds in zip(ranks, own, strict=True):
        name = f"rank {rank['rank']} on {rank['host']}"
        total = sum(rank["seconds"].values()) or 1.0
        waits = rank["seconds"].get("data", 0.0) / total
        if len(ranks) > 1 and seconds > SLOWER * usual and seconds - usual > 0.02 * total:
            findings.append(
                f"{name} is a straggler: the work before its backward pass takes "
                f"{seconds / usual:.1f} times the median rank's, and the others wait for it"
            )
        if waits > HUNGRY:
            findings.append(
                f"{name} waited for data for {100 * waits:.0f} % of the time; raise data.workers"
            )
        if rank["busy_mean"] is not None and rank["busy_mean"] < IDLE * float(np.median(level)):
            findings.append(
                f"{name} was busy only {100 * rank['busy_mean']:.0f} % of the time, the median "
                f"rank {100 * float(np.median(level)):.0f} %"
            )
    return findings


def read(folder: Path) -> list[Row]:
    """All nodes' looks, in order of time; a line that was torn by a crash is left out."""
    rows = []
    for path in folder.glob("utilisation/rank-*.jsonl"):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                row = parse_json(line)
                if isinstance(row, dict) and all(_is_number(row.get(k)) for k in ("time", "rank")):
                    rows.append(row)
    return sorted(rows, key=lambda row: (row["time"], row["rank"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _mean(values: Any) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None
