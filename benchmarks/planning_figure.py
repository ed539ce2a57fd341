"""The picture of scaling_model.py: efficiency and throughput to 1,024 GPUs, and how well the model
predicts the machine it was checked on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import cluster_model as model

COLOURS = {"A100": "#0072b2", "H200": "#d55e00"}
ENGINES = {"horovod": "#0072b2", "torch": "#d55e00"}


def draw(
    clusters: Sequence[model.Cluster],
    choice: model.Choice,
    whole: int,
    shape: np.ndarray,
    checked: list[dict[str, Any]],
    path: Path,
) -> None:
    """Four panels; `whole` is the global batch of strong scaling."""
    figure = Figure(figsize=(12, 7), layout="constrained", dpi=140)
    FigureCanvasAgg(figure)
    (weak, strong), (throughput, check) = figure.subplots(2, 2)

    def of_weak(c: model.Cluster, n: int, chosen: model.Choice) -> float:
        return model.weak(c, n, chosen, shape)

    def of_strong(c: model.Cluster, n: int, chosen: model.Choice) -> float:
        return model.strong(c, n, whole, chosen, shape)

    title = f"weak scaling, {choice.batch} samples a GPU; stars: published by others"
    _efficiency(weak, clusters, choice, of_weak, title)
    _anchors(weak)
    title = f"strong scaling, {whole} samples in all (of ideal work)"
    _efficiency(strong, clusters, choice, of_strong, title)
    _throughput(throughput, clusters, choice, shape)
    _checked(check, checked)
    figure.savefig(path)


def _efficiency(
    axes: Axes,
    clusters: Sequence[model.Cluster],
    choice: model.Choice,
    efficiency: Any,
    title: str,
) -> None:
    for c in clusters:
        for packed, line in ((False, "-"), (True, ":")):
            rates = [100 * efficiency(c, n, replace(choice, packed=packed)) for n in model.SIZES]
            label = f"{c.name}, gradients in {'16' if packed else '32'} bits"
            colour = COLOURS.get(c.name, "black")
            axes.plot(model.SIZES, rates, line, marker="o", ms=3, color=colour, label=label)
    axes.axhline(90, color="grey", lw=0.8)
    _sizes_below(axes)
    axes.set(ylabel="efficiency %", title=title, ylim=(0, 105))
    axes.legend(fontsize=7, frameon=False, loc="lower left")


def _anchors(axes: Axes) -> None:
    """What others have published, and the GPUs of the published run."""
    for gpus, efficiency, who in model.ANCHORS:
        place = (min(gpus, 1500), 100 * efficiency)
        axes.plot(*place, "k*", ms=8)
        _note(axes, who, place, (4, -12 if efficiency < 0.92 else 6), ha="right")
    axes.axvline(model.PUBLISHED_GPUS, color="grey", lw=0.8, ls="--")
    axes.set_ylim(70, 103)


def _throughput(
    axes: Axes, clusters: Sequence[model.Cluster], choice: model.Choice, shape: np.ndarray
) -> None:
    def rate(c: model.Cluster, n: int) -> float:
        return n * choice.batch / model.step(c, n, choice, shape)["step"]

    for c in clusters:
        colour = COLOURS.get(c.name, "black")
        rates = [rate(c, n) for n in model.SIZES]
        axes.plot(model.SIZES, rates, "-o", ms=3, color=colour, label=c.name)
        ideal = [n * rate(c, 1) for n in model.SIZES]
        axes.plot(model.SIZES, ideal, ":", color=colour, lw=1)
    place = (model.PUBLISHED_GPUS, rate(clusters[0], model.PUBLISHED_GPUS))
    axes.plot(*place, "k*", ms=10)
    words = "as many GPUs as the published run, which was\nabout 10 times a beamline's own machine"
    _note(axes, words, place, (10, -28))
    _sizes_below(axes)
    axes.set_yscale("log")
    axes.set(ylabel="samples/s", title="throughput (dotted: one GPU x GPUs)")
    axes.legend(fontsize=7, frameon=False)


def _checked(axes: Axes, checked: list[dict[str, Any]]) -> None:
    most = 1.15 * max(max(row["measured_s"], row["predicted_s"]) for row in checked)
    axes.plot([0, most], [0, most], ":", color="black", lw=1)
    for engine, colour in ENGINES.items():
        for scaling, marker in (("weak", "o"), ("strong", "s")):
            mine = [r for r in checked if (r["engine"], r["scaling"]) == (engine, scaling)]
            places = [(row["measured_s"], row["predicted_s"]) for row in mine]
            x, y = zip(*places, strict=True) if places else ((), ())
            axes.plot(x, y, marker, ms=5, color=colour, label=f"{engine}, {scaling}")
            for row, place in zip(mine, places, strict=True):
                shift = (-9, 3) if engine == "horovod" else (5, -8)
                _note(axes, str(row["ranks"]), place, shift, color=colour)
    error = np.median([abs(row["error"]) for row in checked])
    axes.set(
        xlabel="measured step, s",
        ylabel="predicted step, s (numbers: ranks)",
        title=f"checked on the measured machine: median error {100 * error:.1f} %",
        xlim=(0, most),
        ylim=(0, most),
    )
    axes.legend(fontsize=7, frameon=False)


def _sizes_below(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(model.SIZES, [str(n) for n in model.SIZES], fontsize=7, rotation=45)
    axes.set_xlabel("GPUs")
    axes.grid(alpha=0.3)


def _note(
    axes: Axes, text: str, place: tuple[float, float], shift: tuple[int, int], **style: str
) -> None:
    axes.annotate(text, place, xytext=shift, textcoords="offset points", fontsize=7, **style)
