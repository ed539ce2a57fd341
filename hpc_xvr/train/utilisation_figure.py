"""The picture of a run's utilisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hpc_xvr.plotting import (
    BLUE,
    GREEN,
    GREYS,
    HATCHES,
    LINES,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    lines,
)

PARTS = {
    "forward": SKY,
    "backward": BLUE,
    "update": GREYS[1],
    "gradients": VERMILION,
    "data": GREEN,
    "logging": "#cccccc",
    "saving": PURPLE,
    "validation": ORANGE,
}
MOST = 32  # ranks drawn; of more, evenly chosen ones


def draw(rows: list[dict[str, Any]], summary: dict[str, Any], path: Path) -> None:
    """Over time how busy the ranks were and how much memory they held; shares of a run's parts."""
    ranks = summary["ranks"][:: max(1, len(summary["ranks"]) // MOST)]
    busy = summary["busy"]
    memory = "gpu_memory_gb" if busy == "gpu" else "rss_gb"
    figure = Figure(figsize=(11, 3.4), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    begin = rows[0]["time"]
    few = len(ranks) <= len(LINES)
    for rank, line in zip(ranks, lines(), strict=False):
        mine = [row for row in rows if row["rank"] == rank["rank"] and busy in row]
        minutes = [(row["time"] - begin) / 60 for row in mine]
        label = f"rank {rank['rank']}" if few else None
        looks = line.keywords() if few else {"color": BLUE, "alpha": 0.4}  # many: a bundle
        left.plot(minutes, [100 * row[busy] for row in mine], lw=1, label=label, **looks)
        middle.plot(minutes, [row.get(memory, 0.0) for row in mine], lw=1, label=label, **looks)
    if summary["mfu"]:
        left.axhline(100 * summary["mfu"], color="black", ls=":", label="MFU")
    what = "a kernel ran, % of time (NVML)" if busy == "gpu" else "busy, % of a core"
    left.set(xlabel="minutes", ylabel=what, title="how busy")
    left.set_ylim(0)
    middle.set(
        xlabel="minutes", ylabel="GB", title="memory of the GPU" if busy == "gpu" else "memory"
    )
    middle.set_ylim(0)
    if few:
        left.legend(fontsize=7, frameon=False)
    edges = [0.0] * len(ranks)
    totals = [sum(rank["seconds"].values()) or 1.0 for rank in ranks]
    for (part, colour), hatch in zip(PARTS.items(), HATCHES, strict=True):
        shares = [
            100 * rank["seconds"].get(part, 0.0) / total
            for rank, total in zip(ranks, totals, strict=True)
        ]
        right.barh(
            range(len(ranks)),
            shares,
            left=edges,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
            label=part,
        )
        edges = [a + b for a, b in zip(edges, shares, strict=True)]
    right.set_yticks(range(len(ranks)), [f"rank {rank['rank']}" for rank in ranks], fontsize=7)
    right.set_ylim(len(ranks) - 0.4, -0.6 - 0.35 * len(ranks))
    right.set(xlabel="% of the time", title="where the time went (host)", xlim=(0, 100))
    right.legend(fontsize=7, frameon=False, ncols=3, loc="upper center")
    figure.savefig(path)
