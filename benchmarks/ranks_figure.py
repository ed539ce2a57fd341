"""The picture of a scaling measurement: throughput, efficiency, and where a step's time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {"horovod": "#0072b2", "torch": "#d55e00", "independent": "#777777"}
NAMES = {"horovod": "Horovod", "torch": "torch", "independent": "no engine"}
PARTS = {
    "compute": ("compute", "#56b4e9"),
    "exposed": ("exposed communication", "#d55e00"),
    "straggling": ("waiting for slower ranks", "#e69f00"),
    "data": ("waiting for data", "#009e73"),
}
Row = dict[str, Any]


def draw(rows: list[Row], context: dict[str, Any], path: Path) -> None:
    """Three panels, readable at the width of a page."""
    figure = Figure(figsize=(12, 3.9), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    throughput, efficiency, parts = figure.subplots(1, 3)
    _throughput(throughput, rows)
    _efficiency(efficiency, rows)
    _parts(parts, rows)
    width = next((s for s in context["settings"] if "embed_dim" in s), "")
    figure.suptitle(
        f"{context['device']}, torch {context['packages']['torch']}, "
        f"{context['flops_per_sample'] / 1e9:.0f} GFLOP a sample {width}, "
        f"batch of a rank {context['batch_of_rank']} (weak), commit {context['git']}",
        fontsize=8,
    )
    figure.savefig(path)


def _throughput(axes: Any, rows: list[Row]) -> None:
    alone = next(r for r in rows if (r["engine"], r["ranks"]) == ("independent", 1))
    ranks = sorted({r["ranks"] for r in rows})
    ideal = [alone["samples_per_s"] * n for n in ranks]
    axes.plot(ranks, ideal, color="black", lw=1, ls=":", label="one rank x ranks")
    for engine in COLOURS:
        for scaling, line in (("weak", "-"), ("strong", "--")):
            mine = [r for r in rows if r["engine"] == engine and r["scaling"] == scaling]
            if len({r["ranks"] for r in mine}) < 2:
                continue
            axes.plot(
                [r["ranks"] for r in mine],
                [r["samples_per_s"] for r in mine],
                line,
                marker="o",
                ms=4,
                color=COLOURS[engine],
                label=f"{NAMES[engine]}, {scaling}",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ranks, [str(n) for n in ranks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set(xlabel="ranks", ylabel="samples/s", title="throughput")
    axes.legend(fontsize=7, frameon=False, handlelength=3.5, loc="upper left")
    axes.grid(alpha=0.3)


def _efficiency(axes: Any, rows: list[Row]) -> None:
    several = sorted({r["ranks"] for r in rows if r["ranks"] > 1})
    kinds = [
        (engine, scaling)
        for scaling in ("weak", "strong")
        for engine in ("independent", "horovod", "torch")
        if any(r["engine"] == engine and r["scaling"] == scaling and r["ranks"] > 1 for r in rows)
    ]
    width = 0.8 / max(1, len(kinds))
    for i, (engine, scaling) in enumerate(kinds):
        for row in rows:
            if (row["engine"], row["scaling"]) != (engine, scaling) or row["ranks"] == 1:
                continue
            x = several.index(row["ranks"]) + (i - (len(kinds) - 1) / 2) * width
            first = row["ranks"] == several[0]
            axes.bar(
                x,
                100 * row["efficiency"],
                width * 0.9,
                color=COLOURS[engine],
                alpha=1.0 if scaling == "weak" else 0.5,
                label=f"{NAMES[engine]}, {scaling}" if first else None,
            )
            of = row["of_ceiling"]
            text = f"{100 * row['efficiency']:.0f}" + (f"  ({100 * of:.0f})" if of else "")
            axes.text(x, 3, text, ha="center", va="bottom", fontsize=7, rotation=90, color="white")
    axes.axhline(100, color="black", lw=1, ls=":")
    axes.set_xticks(range(len(several)), [str(n) for n in several])
    axes.set_ylim(0, 150)
    axes.set(xlabel="ranks", ylabel="%", title="efficiency (of the ceiling)")
    axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper center")


def _parts(axes: Any, rows: list[Row]) -> None:
    shown = [r for r in rows if r["engine"] in ("horovod", "torch") and r["scaling"] == "weak"]
    shown.sort(key=lambda r: (r["engine"], r["ranks"]))
    left = [0.0] * len(shown)
    for part, (name, colour) in PARTS.items():
        shares = [100 * r[part] for r in shown]
        axes.barh(range(len(shown)), shares, left=left, color=colour, label=name)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    labels = [f"{NAMES[r['engine']]} x{r['ranks']}" for r in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.invert_yaxis()
    axes.set_ylim(len(shown) - 0.4, -0.6 - 0.25 * len(shown))
    axes.set(xlabel="% of a step", title="where the time goes (weak)", xlim=(0, 100))
    axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper center")
