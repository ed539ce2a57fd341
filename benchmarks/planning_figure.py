"""The picture of scaling_model.py: efficiency and throughput to 1,024 GPUs, and how well it
predicts the machine it was checked on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {"A100": "#0072b2", "H200": "#d55e00"}


def draw(
    clusters: Any, choice: Any, whole: int, shape: np.ndarray, checked: list, path: Path
) -> None:
    import scaling_model as model

    figure = Figure(figsize=(12, 7), layout="constrained", dpi=140)
    FigureCanvasAgg(figure)
    (weak, strong), (throughput, check) = figure.subplots(2, 2)
    sizes = model.SIZES
    for c in clusters:
        colour = COLOURS.get(c.name, "black")
        for packed, line in ((False, "-"), (True, ":")):
            chosen = replace(choice, packed=packed)
            label = f"{c.name}, gradients in {'16' if packed else '32'} bits"
            rates = [100 * model.weak(c, n, chosen, shape) for n in sizes]
            weak.plot(sizes, rates, line, marker="o", ms=3, color=colour, label=label)
            rates = [100 * model.strong(c, n, whole, chosen, shape) for n in sizes]
            strong.plot(sizes, rates, line, marker="o", ms=3, color=colour, label=label)
        ideal = choice.batch / model.step(c, 1, choice, shape)["step"]
        rates = [n * choice.batch / model.step(c, n, choice, shape)["step"] for n in sizes]
        throughput.plot(sizes, rates, "-o", ms=3, color=colour, label=c.name)
        throughput.plot(sizes, [n * ideal for n in sizes], ":", color=colour, lw=1)
    for gpus, efficiency, who in model.ANCHORS:
        weak.plot(min(gpus, 1500), 100 * efficiency, "k*", ms=8)
        below = efficiency < 0.92
        weak.annotate(
            who,
            (min(gpus, 1500), 100 * efficiency),
            xytext=(4, -12 if below else 6),
            textcoords="offset points",
            ha="right",
            fontsize=7,
        )
    n = model.PUBLISHED_GPUS
    c = clusters[0]
    rate = n * choice.batch / model.step(c, n, choice, shape)["step"]
    throughput.plot(n, rate, "k*", ms=10)
    throughput.annotate(
        "as many GPUs as the published run, which was\nabout 10 times a beamline's own machine",
        (n, rate),
        xytext=(10, -28),
        textcoords="offset points",
        fontsize=7,
    )
    weak.axvline(n, color="grey", lw=0.8, ls="--")
    for axes, title in (
        (weak, f"weak scaling, {choice.batch} samples a GPU; stars: published by others"),
        (strong, f"strong scaling, {whole} samples in all (of ideal work)"),
    ):
        axes.axhline(90, color="grey", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes], fontsize=7, rotation=45)
        axes.set(xlabel="GPUs", ylabel="efficiency %", title=title, ylim=(0, 105))
        axes.legend(fontsize=7, frameon=False, loc="lower left")
        axes.grid(alpha=0.3)
    weak.set_ylim(70, 103)
    throughput.set_xscale("log", base=2)
    throughput.set_yscale("log")
    throughput.set_xticks(sizes, [str(n) for n in sizes], fontsize=7, rotation=45)
    throughput.set(xlabel="GPUs", ylabel="samples/s", title="throughput (dotted: one GPU x GPUs)")
    throughput.legend(fontsize=7, frameon=False)
    throughput.grid(alpha=0.3)
    most = 1.15 * max(max(row["measured_s"], row["predicted_s"]) for row in checked)
    check.plot([0, most], [0, most], ":", color="black", lw=1)
    for engine, colour in (("horovod", "#0072b2"), ("torch", "#d55e00")):
        for scaling, marker in (("weak", "o"), ("strong", "s")):
            mine = [r for r in checked if (r["engine"], r["scaling"]) == (engine, scaling)]
            check.plot(
                [row["measured_s"] for row in mine],
                [row["predicted_s"] for row in mine],
                marker,
                ms=5,
                color=colour,
                label=f"{engine}, {scaling}",
            )
            for row in mine:
                check.annotate(
                    str(row["ranks"]),
                    (row["measured_s"], row["predicted_s"]),
                    xytext=(-9, 3) if engine == "horovod" else (5, -8),
                    textcoords="offset points",
                    fontsize=7,
                    color=colour,
                )
    error = np.median([abs(row["error"]) for row in checked])
    check.set(
        xlabel="measured step, s",
        ylabel="predicted step, s (numbers: ranks)",
        title=f"checked on the measured machine: median error {100 * error:.1f} %",
        xlim=(0, most),
        ylim=(0, most),
    )
    check.legend(fontsize=7, frameon=False)
    figure.savefig(path)
