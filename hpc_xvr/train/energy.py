"""The energy a run takes, as far as counters tell: processors by Linux' powercap (RAPL), GPUs by
NVML. Memory, disks, network and the power supply's losses are in neither."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
J_PER_KWH = 3.6e6


@dataclass
class Counter:
    """An energy counter that starts anew at `range` joules."""

    read: Callable[[], float]
    range: float = float("inf")
    joules: float = 0.0
    """Since this object was made, at the last look."""
    _last: float = field(init=False)

    def __post_init__(self) -> None:
        self._last = self.read()

    def look(self) -> None:
        """Add what was used since the last look; to be called before the counter is round twice
        (minutes at the least)."""
        now = self.read()
        used = now - self._last
        self.joules += used if used >= 0 else used + self.range
        self._last = now


class NodeEnergy:
    """The counters of a node: its processors', and those of GPUs that are added."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self.processors: list[Counter] = []
        self.gpus: list[Counter] = []
        self.missing: list[str] = []
        """What is not counted, and why."""
        self._find_processors(powercap)

    def _find_processors(self, powercap: Path) -> None:
        zones = sorted(powercap.glob("intel-rapl:[0-9]*"))
        packages = [zone for zone in zones if zone.name.count(":") == 1]  # others are parts of them
        if not packages:
            self.missing.append(f"processors: this machine has no energy counters ({powercap})")
        for zone in packages:
            try:
                size = float((zone / "max_energy_range_uj").read_text()) / 1e6
                self.processors.append(Counter(_microjoules(zone / "energy_uj"), size))
            except (OSError, ValueError) as error:
                self.missing.append(f"processors: {error}")
                self.processors = []
                return

    def add_gpu(self, nvml: Any, handle: Any) -> None:
        """Count a GPU's energy, too, where NVML knows it."""

        def read() -> float:
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

        try:
            self.gpus.append(Counter(read))
        except nvml.NVMLError as error:
            self.missing.append(f"GPU: NVML says {error}")

    def look(self) -> None:
        """Read all counters; one that cannot be read any more keeps what it had."""
        for counter in (*self.processors, *self.gpus):
            with contextlib.suppress(Exception):  # OSError, or NVML's own, while all ends
                counter.look()

    def report(self) -> dict[str, Any]:
        """Joules of the node's processors and GPUs so far, None where nothing counts them."""
        return {
            "processors_j": _total(self.processors),
            "gpus_j": _total(self.gpus),
            "missing": self.missing,
        }


def of_run(nodes: list[dict[str, Any]], samples: int) -> dict[str, Any]:
    """All nodes' reports together: kWh of the run, J a training sample, what is not counted."""
    parts: dict[str, float | None] = {}
    for name in ("processors_j", "gpus_j"):
        known = [node[name] for node in nodes if node[name] is not None]
        parts[name] = sum(known) if known else None
    counted = [joules for joules in parts.values() if joules is not None]
    total = sum(counted) if counted else None
    return {
        **parts,
        "kwh": None if total is None else total / J_PER_KWH,
        "joule_per_sample": None if total is None or not samples else total / samples,
        "samples": samples,
        "missing": sorted({why for node in nodes for why in node["missing"]}),
    }


def _total(counters: list[Counter]) -> float | None:
    return round(sum(counter.joules for counter in counters), 3) if counters else None


def _microjoules(file: Path) -> Callable[[], float]:
    return lambda: float(file.read_text()) / 1e6
