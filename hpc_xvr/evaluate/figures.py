"""Pictures of an evaluation: frames with errors and profiles, PSNR against noise, gap and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hpc_xvr import metrics
from hpc_xvr.evaluate.noise import KINDS, NO_NOISE, Kind, NoiseLevel
from hpc_xvr.evaluate.results import Evaluation
from hpc_xvr.evaluate.rows import METRICS, Condition
from hpc_xvr.evaluate.summary import Summary
from hpc_xvr.files import replacing
from hpc_xvr.plotting import GRID, PLAIN, STYLE, VERMILION, Line, lines

MARK = VERMILION


def save(figure: Figure, path: Path) -> Path:
    """Write a picture whole; the suffix says the format."""
    with replacing(path) as beside:
        figure.savefig(beside, format=path.suffix[1:] or "png", dpi=110)
    return path


def side_by_side(panels: Mapping[str, np.ndarray], truth: np.ndarray, title: str) -> Figure:
    """Whole frames with PSNR, the region methods find hardest, absolute errors, a profile.

    `panels`: title -> (H, W) in [0, 1], a handful. All panels of a row share one scale; the profile
    runs through the middle of the region.
    """
    errors = {name: 255 * np.abs(frame - truth) for name, frame in panels.items()}
    # Each method's error weighs the same, or the blur of the coarsest would decide alone.
    region = worst_region(sum(error / max(float(error.mean()), 1e-6) for error in errors.values()))
    low, high = np.percentile(truth, (0.2, 99.8))
    grey: dict[str, Any] = {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6)}
    top = max(float(np.percentile(np.stack(list(errors.values())), 99.5)), 1.0)
    columns = len(panels) + 1
    cell = 12.8 / columns
    tall = cell * truth.shape[0] / truth.shape[1]
    rows = (tall, cell, tall, 1.8)
    with matplotlib.rc_context(STYLE | {"axes.spines.top": True, "axes.spines.right": True}):
        figure = Figure(figsize=(12.8, sum(rows) + 1.6), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=11)
        grid = figure.add_gridspec(4, columns, height_ratios=rows)
        axes = [[figure.add_subplot(grid[r, c]) for r in range(3)] for c in range(columns)]
        for (frame, zoom, error), name in zip(axes, panels, strict=False):
            score = metrics.psnr(panels[name], truth)
            _frame_and_zoom(frame, zoom, panels[name], region, grey)
            frame.set_title(f"{_broken(name)}\n{score:.2f} dB", fontsize=8.5)
            shown = error.imshow(errors[name], "magma", vmin=0, vmax=top, interpolation="nearest")
            error.set(xticks=[], yticks=[])
        frame, zoom, free = axes[-1]
        _frame_and_zoom(frame, zoom, truth, region, grey)
        frame.set_title("truth", fontsize=8.5)
        free.axis("off")
        inset = free.inset_axes((0.02, 0.06, 0.06, 0.88))
        figure.colorbar(shown, cax=inset, label="grey levels of 255")
        for axis, label in zip(axes[0], ("frame", "zoom", "absolute error"), strict=True):
            axis.set_ylabel(label)
        y, x, side = region
        _profile(figure.add_subplot(grid[3, :]), panels, truth, y + side // 2, x, side)
    return figure


def _frame_and_zoom(
    whole: Axes, zoom: Axes, frame: np.ndarray, region: tuple[int, int, int], grey: dict[str, Any]
) -> None:
    """A frame with the region marked, and the region with the row of the profile marked."""
    y, x, side = region
    whole.imshow(frame, interpolation="nearest", **grey)
    whole.add_patch(
        Rectangle((x - 0.5, y - 0.5), side, side, fill=False, edgecolor=MARK, linewidth=1.2)
    )
    zoom.imshow(frame[y : y + side, x : x + side], interpolation="nearest", **grey)
    zoom.axhline(side // 2, color=MARK, linewidth=0.8, linestyle=":")
    for spine in zoom.spines.values():
        spine.set_edgecolor(MARK)
    for axis in (whole, zoom):
        axis.set(xticks=[], yticks=[])


def _profile(
    axes: Axes, panels: Mapping[str, np.ndarray], truth: np.ndarray, row: int, x: int, side: int
) -> None:
    at = np.arange(x, x + side)
    axes.plot(at, truth[row, x : x + side], color="black", linewidth=2.2, label="truth")
    for i, ((name, frame), line) in enumerate(zip(panels.items(), lines(), strict=False)):
        axes.plot(
            at,
            frame[row, x : x + side],
            **line.keywords(),
            marker=line.marker,
            markevery=(i * side // 40, max(side // 8, 1)),
            markersize=4,
            linewidth=1.1,
            label=name,
        )
    axes.set_xlim(at[0], at[-1])
    axes.set_xlabel(f"pixel along the dotted line (row {row})")
    axes.set_ylabel("intensity")
    axes.legend(
        frameon=False,
        fontsize=8,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(panels) + 1,
    )
    axes.spines[["top", "right"]].set_visible(False)


def worst_region(error: np.ndarray) -> tuple[int, int, int]:
    """(y, x, side) of the square with the largest summed error."""
    side = max(min(error.shape) * 3 // 10, min(16, *error.shape))
    total = np.pad(error.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    strips = total[side:] - total[:-side]
    squares = strips[:, side:] - strips[:, :-side]
    y, x = np.unravel_index(squares.argmax(), squares.shape)
    return int(y), int(x), side


def charts(evaluation: Evaluation) -> dict[str, Figure]:
    """File name -> figure, of those that the conditions allow: noise, gap, FLOPs."""
    found = {}
    corpora = list(dict.fromkeys(c.corpus for c in evaluation.conditions))
    for corpus in corpora:
        own = [c for c in evaluation.conditions if c.corpus == corpus]
        name = Path(corpus).name
        suffix = f"-{name}" if len(corpora) > 1 else ""
        if of_noise := _noisy(own):
            found[f"psnr-noise{suffix}.png"] = _against_noise(evaluation, of_noise, name)
        if of_gap := _gapped(own):
            found[f"psnr-gap{suffix}.png"] = _against_gap(evaluation, of_gap, name)
        if any(s.flops_per_frame for s in evaluation.table(own[0])):
            found[f"psnr-flops{suffix}.png"] = _against_flops(evaluation, own[0])
    return found


def _noisy(own: Sequence[Condition]) -> dict[tuple[Kind, int], list[Condition]]:
    """(kind of noise, gap) -> conditions, where there are several levels of it."""
    found = {}
    for kind in KINDS:
        for gap in sorted({c.gap for c in own if c.noise.kind == kind}):
            part = [c for c in own if c.gap == gap and c.noise.kind in (kind, NO_NOISE.kind)]
            if len(part) > 1:
                found[kind, gap] = part
    return found


def _gapped(own: Sequence[Condition]) -> dict[NoiseLevel, list[Condition]]:
    """Noise -> conditions, where there are several gaps with it; the first four."""
    found = {
        noise: [c for c in own if c.noise == noise] for noise in dict.fromkeys(c.noise for c in own)
    }
    several = {noise: part for noise, part in found.items() if len(part) > 1}
    return dict(list(several.items())[:4])


def _against_noise(
    evaluation: Evaluation, parts: Mapping[tuple[Kind, int], Sequence[Condition]], corpus: str
) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(parts), f"{corpus}: PSNR against noise")
        for axis, ((kind, gap), part) in zip(axes, parts.items(), strict=True):
            noisy = sorted({c.noise.photons for c in part if c.noise.photons is not None})
            clean = 10 * noisy[-1]  # its own place behind the brightest
            places = {c: clean if c.noise.photons is None else c.noise.photons for c in part}
            _lines(evaluation, axis, places)
            axis.set_xscale("log")
            ticks = sorted(set(places.values()))
            axis.set_xticks(ticks, ["none" if v == clean else _power(v) for v in ticks])
            axis.minorticks_off()
            axis.set_xlabel(f"{KINDS[kind]}: photons a pixel")
            axis.set_title(f"a key frame every {gap} frames", fontsize=9)
        _legend(figure, axes)
    return figure


def _against_gap(
    evaluation: Evaluation, parts: Mapping[NoiseLevel, Sequence[Condition]], corpus: str
) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(parts), f"{corpus}: PSNR against the distance of key frames")
        for axis, (noise, part) in zip(axes, parts.items(), strict=True):
            gaps = sorted(c.gap for c in part)
            _lines(evaluation, axis, {c: c.gap for c in part})
            axis.set_xscale("log")
            axis.set_xticks(gaps, _with_recordings(evaluation, part))
            axis.minorticks_off()
            axis.set_xlabel("frames from key frame to key frame")
            axis.set_title(noise.label, fontsize=9)
        _legend(figure, axes)
    return figure


def _with_recordings(evaluation: Evaluation, part: Sequence[Condition]) -> list[str]:
    """The gaps in order; with how many recordings have so many frames, where that differs."""
    having = {
        s.condition.gap: s.recordings
        for s in evaluation.summaries
        if s.scene is None and s.condition in part
    }
    if len(set(having.values())) < 2:
        return [str(gap) for gap in sorted(having)]
    return [f"{gap}\n({having[gap]} rec.)" for gap in sorted(having)]


def _against_flops(evaluation: Evaluation, condition: Condition) -> Figure:
    rows = [s for s in evaluation.table(condition) if s.flops_per_frame]
    rows = [s for s in rows if math.isfinite(s.values["psnr"].mean)]
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _panels(1, str(condition))
        style = _styles(evaluation)
        for summary in rows:
            colour, marker = style[summary.method].colour, style[summary.method].marker
            value, cost = summary.values["psnr"], summary.flops_per_frame / 1e9
            if value.interval:
                axis.plot([cost, cost], value.interval, color=colour, linewidth=1)
            axis.plot(
                cost,
                value.mean,
                marker,
                color=colour,
                label=evaluation.title(summary.method),
            )
        axis.set_xscale("log")
        axis.set_xlabel("GFLOP a frame")
        axis.set_ylabel(METRICS["psnr"])
        _legend(figure, [axis])
    return figure


def _lines(evaluation: Evaluation, axis: Axes, places: Mapping[Condition, float]) -> None:
    """A line for each method through its conditions, its interval as a band."""
    style = _styles(evaluation)
    for facts in evaluation.methods:
        found: list[tuple[float, Summary]] = sorted(
            (
                (places[s.condition], s)
                for s in evaluation.summaries
                if s.method == facts.name and s.scene is None and s.condition in places
            ),
            key=lambda pair: pair[0],
        )
        found = [pair for pair in found if math.isfinite(pair[1].values["psnr"].mean)]
        if not found:
            continue
        x = [place for place, _ in found]
        values = [s.values["psnr"] for _, s in found]
        line = style[facts.name]
        axis.plot(
            x,
            [v.mean for v in values],
            **line.keywords(),
            marker=line.marker,
            markersize=4 if facts.learned else 5,
            linewidth=1.8 if facts.learned else 1.2,
            label=facts.title,
        )
        intervals = [v.interval for v in values if v.interval]
        if facts.learned and len(intervals) == len(values):
            low, high = zip(*intervals, strict=True)
            axis.fill_between(x, low, high, color=line.colour, alpha=0.1, linewidth=0)
    axis.set_ylabel(METRICS["psnr"])


def _styles(evaluation: Evaluation) -> dict[str, Line]:
    of_models = lines()
    return {facts.name: PLAIN.get(facts.name) or next(of_models) for facts in evaluation.methods}


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(
        figsize=(max(3.1 * columns, 4.2) + 1.9, 3.0 * rows + 0.4),
        layout="constrained",
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axis in axes:
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    for axis in axes[count:]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure, list(axes[:count])


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:  # a method may be in some of them only
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        frameon=False,
        fontsize=8,
        handlelength=3.5,
        loc="outside right center",
    )


def _power(value: float) -> str:
    """A power of ten as one writes it, other numbers plainly."""
    exponent = math.log10(value)
    return f"$10^{{{exponent:.0f}}}$" if abs(exponent - round(exponent)) < 1e-9 else f"{value:g}"


def _broken(name: str, width: int = 20) -> str:
    """Long titles on two lines."""
    if len(name) <= width:
        return name
    cut = name.rfind(" ", 0, width + 4)
    return name if cut < 0 else f"{name[:cut]}\n{name[cut + 1 :]}"
