"""An evaluation as tables: Markdown, LaTeX, CSV, and on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hpc_xvr.evaluate.scoring import LOWER, METRICS
from hpc_xvr.evaluate.summary import Estimate, Summary

DIGITS = {"ssim": 4, "aad": 3, "flicker": 3}
PRINTED = 4  # tables on a terminal; the rest is in tables.md


_COLUMNS = {
    "method": "method",
    "psnr": METRICS["psnr"],
    "interval": "95 %",
    "difference": "",
    **{name: title for name, title in METRICS.items() if name != "psnr"},
    "ms": "ms/frame",
    "gflop": "GFLOP/frame",
}


def best_of(rows: Sequence[Summary]) -> set[tuple[str, str]]:
    """(method, metric) of the best numbers of a table; what looks the same is the same."""
    best = set()
    for name in METRICS:
        sign = -1 if name in LOWER else 1
        numbers = {s.method: round(s.values[name].mean, DIGITS.get(name, 2)) for s in rows}
        top = max(sign * value for value in numbers.values())
        best |= {(method, name) for method, value in numbers.items() if sign * value == top}
    return best


def shown(value: float, metric: str) -> str:
    """A number as the tables write it."""
    return f"{value:.{DIGITS.get(metric, 2)}f}" if math.isfinite(value) else "exact"


def interval(estimate: Estimate, metric: str) -> str:
    """Its interval; nothing where there is none."""
    if estimate.low is None:
        return ""
    return f"{shown(estimate.low, metric)} to {shown(estimate.high, metric)}"


def signed(estimate: Estimate) -> str:
    """A difference with its interval."""
    if not math.isfinite(estimate.mean):
        return ""
    text = f"{estimate.mean:+.2f}"
    if estimate.low is not None:
        text += f" [{estimate.low:+.2f}, {estimate.high:+.2f}]"
    return text.replace("-", "\u2212")


def _counted(summary: Summary, scene: str | None) -> str:
    where = f"Scene {scene}: " if scene else ""
    many = "s" if summary.recordings > 1 else ""
    return (
        f"{where}{summary.recordings} recording{many}, {summary.frames} frames; "
        f"{summary.keys} key frames not counted."
    )


def _tex(text: str) -> str:
    for mark in "&%_#$":
        text = text.replace(mark, "\\" + mark)
    return text.replace("\u2212", "$-$")
