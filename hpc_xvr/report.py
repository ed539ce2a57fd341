"""One self-contained HTML page about a run: what came out, against what, and how; or about a
reconstruction."""

from __future__ import annotations

import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from hpc_xvr import config
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.comparison import pictures_of, write_comparison
from hpc_xvr.evaluate.page import Pictures, data_uri, movies, natural, write_page
from hpc_xvr.evaluate.result import is_result
from hpc_xvr.evaluate.result_page import write_result_page
from hpc_xvr.evaluate.results import FILE, Evaluation
from hpc_xvr.log import logger
from hpc_xvr.plotting import GRID, LINES, PLAIN, STYLE, VERMILION
from hpc_xvr.reconstruction.baselines import BASELINES
from hpc_xvr.text import first_line, parse_json, parse_yaml

CURVE_POINTS = 800
MODEL = LINES[0]


def write_report(run_dir: Path | str) -> Path:
    """Write report.html into a run folder from whatever parts of the run are there; of a
    reconstruction's file, the page beside it (see `write_result_page`).

    Raises:
        InputError: the folder is missing or holds no run, or one of its files cannot be read.
    """
    run = Path(run_dir)
    if is_result(run):
        return write_result_page(run)
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder; `hpc-xvr train` makes one (run.dir)")
    if (run / FILE).exists():  # an evaluation's own folder
        return write_comparison(run)
    settings = _settings(run / "config.yaml")
    lines, unreadable = _metrics(run / "metrics.jsonl")
    evaluation = Evaluation.load(run / "evaluation")
    if not settings and not lines and not evaluation:
        raise InputError(
            f"{run}: holds no run (no config.yaml, metrics.jsonl or evaluation/{FILE}); give the "
            "folder named in run.dir"
        )
    train, validation, events = (_of_kind(lines, kind) for kind in ("train", "validation", "event"))
    pictures = Pictures(run)
    samples = natural(run.glob("samples/*.png"))
    charts, sides = pictures_of(run / "evaluation")
    return write_page(
        run / "report.html",
        "report.html",
        pictures,
        name=run.resolve().name,
        folder=str(run),
        headline=_headline(evaluation, validation),
        evaluation=evaluation,
        charts=pictures.take(charts, 4),
        progress=_progress(train, validation, settings),
        events=events,
        unreadable=unreadable,
        curves=_curves(train, validation, events, settings),
        movies=pictures.take(movies(run / "reconstruction") or movies(run / "evaluation"), 2),
        comparisons=pictures.take(sides, 4),
        samples=pictures.take(dict.fromkeys([*samples[:1], *samples[-1:]]), 2),
        utilisation=pictures.take(run.glob("utilisation.png"), 1),
        settings={
            section: _shown(config.flat(values))
            for section, values in settings.items()
            if isinstance(values, dict) and section != "fetch"  # no part of the run
        },
        environment=_environment(_json(run / "environment.json") or {}),
    )


def _settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: {first_line(error)}; take it from the run's checkpoint or remove "
            "it to report without settings"
        ) from None
    if not isinstance(tree, dict):
        return {}
    return {str(name): values for name, values in tree.items() if isinstance(values, dict)}


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        tree = parse_json(path.read_text())
    except (OSError, ValueError):
        raise InputError(f"{path}: is not valid JSON; make it again or remove it") from None
    return tree if isinstance(tree, dict) else None


def _environment(tree: dict[str, Any]) -> dict[str, str]:
    """One line a fact; of a list of ranks, the hosts and how many ranks have which device."""
    facts: dict[str, Any] = {}
    for key, value in config.flat(tree).items():
        if key == "earlier":
            key, value = "earlier starts", len(value) if isinstance(value, list) else 0
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            kinds = Counter(
                tuple(f"{k} {v}" for k, v in entry.items() if k != "host") for entry in value
            )
            hosts = list(dict.fromkeys(str(e["host"]) for e in value if "host" in e))
            facts["hosts"] = f"{len(hosts)}: {', '.join(hosts[:8])}{' ...' * (len(hosts) > 8)}"
            value = [f"{count} with {', '.join(kind)}" for kind, count in kinds.items()]
        facts[key] = value
    return _shown(facts)


def _shown(facts: dict[str, Any]) -> dict[str, str]:
    return {
        key: "\u2013"
        if value is None
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
        for key, value in facts.items()
    }


def _metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Lines of the log and how many could not be read (a killed run may end within a line)."""
    lines, unreadable = [], 0
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in filter(str.strip, text.splitlines()):
        try:
            entry = parse_json(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and _is_number(entry.get("step")):
            lines.append({"text": "", **{k: v for k, v in entry.items() if _can_be_shown(k, v)}})
        else:
            unreadable += 1
    if unreadable:
        logger.warning("%s: %d lines could not be read", path, unreadable)
    return lines, unreadable


def _can_be_shown(key: str, value: Any) -> bool:
    """Whether it is text where that is expected, and a number elsewhere."""
    return isinstance(value, str) if key in ("kind", "text") else _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and -1e300 < value < 1e300


def _of_kind(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """In order of step. Steps done again after a resume count as they were done last."""
    chosen = [line for line in lines if line.get("kind") == kind]
    if kind == "event":
        return chosen
    return [line for _, line in sorted({line["step"]: line for line in chosen}.items())]


def _headline(
    evaluation: Evaluation | None, validation: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """The number people ask for first, and what it is better or worse than."""
    learned = [f.name for f in evaluation.methods if f.learned] if evaluation else []
    if evaluation and learned:
        first = next(row.condition for row in evaluation.rows if row.method == learned[0])
        table = {summary.method: summary for summary in evaluation.table(first)}
        own = table[learned[0]]
        return {
            "psnr": own.values["psnr"].mean,
            "gains": [
                (own.values["psnr"].mean - table[name].values["psnr"].mean, BASELINES[name].title)
                for name in ("bicubic", "detail")
                if name in table
            ],
            "ssim": own.values["ssim"].mean,
            "ms": 1000 * own.seconds_per_frame,
            "source": "evaluation",
            "recordings": own.recordings,
        }
    scored = [line for line in validation if isinstance(line.get("psnr"), (int, float))]
    if not scored:
        return None
    last = scored[-1]
    return {
        "psnr": last["psnr"],
        "ssim": last.get("ssim"),
        "ms": None,
        "source": "validation",
        "recordings": None,
        "gains": [
            (last["psnr"] - last[f"psnr_{name}"], BASELINES[name].title)
            for name in ("bicubic", "detail")
            if f"psnr_{name}" in last
        ],
    }


def _progress(
    train: list[dict[str, Any]], validation: list[dict[str, Any]], settings: dict[str, Any]
) -> dict[str, Any]:
    rates = [line["samples_per_s"] for line in train if line.get("samples_per_s")]
    steps = settings.get("train", {}).get("steps")
    waits = [line["data_wait"] for line in train if line.get("data_wait") is not None]
    return {
        "step": max((line["step"] for line in [*train, *validation]), default=None),
        "steps": steps if _is_number(steps) else None,
        "samples_per_s": float(np.median(rates)) if rates else None,
        "data_wait": float(np.median(waits)) if waits else None,
    }


def _curves(
    train: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    events: list[dict[str, Any]],
    settings: dict[str, Any],
) -> list[tuple[str, str]]:
    """(what it shows, data URI) of each curve there are numbers for."""
    resumes = [line["step"] for line in events if "resume" in str(line.get("text", ""))]
    curves = []
    loss = _series(train, "loss")
    if len(loss[0]) > 1:
        curves.append(
            ("Training loss", _chart("L1 loss", [(*loss, MODEL, "loss")], resumes, log=True))
        )
    psnr = _series(validation, "psnr")
    if len(psnr[0]):
        lines = [(*psnr, MODEL, "model")]
        own = (settings.get("model") or {}).get("base")
        for name in BASELINES:
            base = _series(validation, f"psnr_{name}")
            if len(base[0]):
                title = BASELINES[name].title + (", its base" if name == own else "")
                lines.append((*base, PLAIN[name], title))
        curves.append(("Validation", _chart("PSNR (dB)", lines, resumes, marks=True)))
    rate = _series(train, "samples_per_s")
    if len(rate[0]) > 1:
        curves.append(
            (
                "Throughput",
                _chart("samples / s", [(*rate, MODEL, "throughput")], resumes, zero=True),
            )
        )
    return curves


def _series(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values; long series are averaged in bins of equally many points."""
    pairs = [
        (line["step"], line[key])
        for line in lines
        if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
    ]
    if not pairs:
        return np.empty(0), np.empty(0)
    values = np.asarray(pairs, float)
    bins = np.array_split(values, min(len(values), CURVE_POINTS))
    return tuple(np.array([part.mean(0) for part in bins]).T)


def _chart(
    label: str,
    lines: list[tuple[Any, ...]],
    resumes: list[int],
    *,
    log: bool = False,
    zero: bool = False,
    marks: bool = False,
) -> str:
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "hpc_xvr"}):
        figure = Figure(figsize=(4.0, 2.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for steps, values, line, name in lines:
            axes.plot(
                steps,
                values,
                **line.keywords(),
                linewidth=1.4,
                label=name,
                marker=line.marker if marks else None,
                markevery=max(len(steps) // 30, 1),
                markersize=3,
            )
        for i, step in enumerate(resumes):
            axes.axvline(
                step,
                color=VERMILION,
                linewidth=0.9,
                linestyle=(0, (3, 2)),
                label=None if i else "resumed",
            )
        if log:
            axes.set_yscale("log")
        if zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(axis="y", color=GRID, linewidth=0.8, which="both")
        axes.set_axisbelow(True)
        if len(lines) > 1 or resumes:
            axes.legend(frameon=False, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return data_uri("image/svg+xml", buffer.getvalue())
