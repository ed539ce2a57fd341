"""What to expect from N GPUs: step time from compute, all-reduce, data and the slowest of N.

    python benchmarks/scaling_model.py                       A100 and H200 clusters, 4 to 1,024 GPUs
    python benchmarks/scaling_model.py --scaling S.json --allreduce A.json      measured elsewhere
    python benchmarks/scaling_model.py --noise 0.01 --mfu 0.4 --batch 8

The model is in cluster_model.py. First it has to predict the measured steps of this machine; its
error is in the JSON. What is assumed of clusters is in CLUSTERS there; put your own in, or measure
them with allreduce.py and scaling.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

import cluster_model as model
from filing import RESULTS, file_result, usage
from hpc_xvr import log
from planning_figure import draw


def newest(kind: str) -> Path:
    found = sorted(RESULTS.glob(f"{kind}-*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise click.ClickException(
            f"no result of {kind}.py in {RESULTS}; run it first, or name one with --{kind}"
        )
    return found[-1]


def show_check(checked: list[dict[str, Any]], spread: float) -> None:
    """Print measured and predicted steps of this machine."""
    log.print_table(
        f"measured and predicted steps here (noise {100 * spread:.1f} %)",
        ["engine", "ranks", "scaling", "measured s", "predicted s", "error %"],
        [
            (
                row["engine"],
                str(row["ranks"]),
                row["scaling"],
                f"{row['measured_s']:.3f}",
                f"{row['predicted_s']:.3f}",
                f"{100 * row['error']:.1f}",
            )
            for row in checked
        ],
    )


def check_published(c: model.Cluster, choice: model.Choice, shape: np.ndarray) -> dict[str, float]:
    """Print the published run (40 A100) as the model sees it.

    Published is one figure, its speed against a machine that is not named: so the check is for how
    many GPUs in that machine the two agree.
    """
    n = model.PUBLISHED_GPUS
    minutes = model.PUBLISHED_STEPS * model.step(c, n, choice, shape)["step"] / 60
    worth = n * model.weak(c, n, choice, shape) / model.PUBLISHED_SPEEDUP
    figures = {
        f"published_minutes[{c.name},{n}]": minutes,
        f"published_local_worth[{c.name}]": worth,
    }
    rows = []
    for local in (1, 2, 4, 8):
        faster = model.speedup(c, n, local, choice, shape)
        figures[f"published_speedup[{c.name},{local}]"] = faster
        off = faster / model.PUBLISHED_SPEEDUP - 1
        rows.append((str(local), f"{faster:.1f}", f"{100 * off:+.0f}"))
    log.print_table(
        f"{n} {c.name}: about {model.PUBLISHED_SPEEDUP:g} times a beamline's machine (published)",
        ["GPUs in that machine", "predicted speed-up", "off by %"],
        rows,
    )
    print(
        f"They agree on a machine worth {worth:.1f} {c.name}. {model.PUBLISHED_STEPS:,} steps of "
        f"{choice.batch} samples a GPU would take {minutes:.0f} min."
    )
    return figures


def figures_of_check(checked: list[dict[str, Any]]) -> dict[str, float]:
    errors = [abs(row["error"]) for row in checked]
    figures = {
        "prediction_error_median": float(np.median(errors)),
        "prediction_error_largest": max(errors),
    }
    for row in checked:
        name = f"{row['engine']},{row['ranks']},{row['scaling']}"
        figures[f"prediction_error[{name}]"] = row["error"]
    return figures


def plan(
    c: model.Cluster, choice: model.Choice, whole: int, shape: np.ndarray
) -> tuple[dict[str, float], dict[str, str]]:
    """Print what to expect of a cluster; its figures, and what limits it at each size."""
    figures: dict[str, float] = {}
    limited: dict[str, str] = {}
    rows = []
    for n in model.SIZES:
        name = f"{c.name},{n}"
        parts = model.step(c, n, choice, shape)
        split = replace(choice, batch=max(1, whole // n))  # of the global batch
        each = [
            model.smallest_batch(c, n, model.Choice(1, packed=packed), shape)
            for packed in (False, True)
        ]
        weak = model.weak(c, n, choice, shape)
        strong = model.strong(c, n, whole, choice, shape)
        rate = n * choice.batch / parts["step"]
        figures |= {
            f"weak_efficiency[{name}]": weak,
            f"strong_efficiency[{name}]": strong,
            f"samples_per_s[{name}]": rate,
            **{f"batch_for_90[{name},{b}]": s for b, s in zip((32, 16), each, strict=True) if s},
        }
        limited[name] = model.limits(parts)
        rows.append(
            (
                str(n),
                f"{1e3 * parts['step']:.1f}",
                f"{rate:,.0f}",
                f"{100 * weak:.0f}",
                limited[name],
                f"{100 * strong:.0f}",
                model.limits(model.step(c, n, split, shape)),
                " / ".join(str(b or "none") for b in each),
                f"{model.best_bucket(c, n, choice, shape):g}",
            )
        )
    log.print_table(
        # Loss: the largest; launch: too little work for its kernels; late: the slowest rank.
        # For 90 %: samples a GPU, gradients in 32 / 16 bits; bucket: the best, MB.
        f"{c.name}: {choice.batch} samples a GPU (weak), {whole} in all (strong)",
        ["GPUs", "ms", "samples/s", "weak %", "loss", "strong %", "loss", "for 90 %", "bucket"],
        rows,
    )
    return figures, limited


@click.command(help=usage(__doc__))
@click.option("--scaling", type=click.Path(path_type=Path, exists=True))
@click.option("--allreduce", type=click.Path(path_type=Path, exists=True))
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="The same: it only calculates; files nothing.")
@click.option("--batch", default=10, help="Samples of a GPU (weak).")
@click.option("--global-batch", "whole", default=1024, help="Of all GPUs (strong).")
@click.option("--noise", type=float, help="Instead of the assumed spread of steps.")
@click.option("--mfu", type=float, help="Instead of the assumed one.")
def main(
    scaling: Path | None,
    allreduce: Path | None,
    out: Path | None,
    quick: bool,
    batch: int,
    whole: int,
    noise: float | None,
    mfu: float | None,
) -> None:
    log.setup()
    scaling, allreduce = scaling or newest("scaling"), allreduce or newest("allreduce")
    measured, travel = (json.loads(path.read_text()) for path in (scaling, allreduce))
    shape, spread = model.noise_of(measured)
    checked = model.check(measured, travel, shape, spread)
    show_check(checked, spread)
    result = figures_of_check(checked)
    choice = model.Choice(batch)
    clusters = [
        replace(c, noise=c.noise if noise is None else noise, mfu=mfu or c.mfu)
        for c in model.CLUSTERS
    ]
    result |= check_published(clusters[0], choice, shape)
    limited: dict[str, str] = {}
    for c in clusters:
        figures, limits = plan(c, choice, whole, shape)
        result |= figures
        limited |= limits
    context = {
        "scaling": scaling.name,
        "allreduce": allreduce.name,
        "measured_on": measured["context"]["device"],
        "weak_limited_by": limited,
        "assumed": {c.name: vars(c) for c in clusters},
        "batch": batch,
        "global_batch": whole,
    }
    if out is None and not quick:
        out = RESULTS / scaling.name.replace("scaling-", "planning-", 1)
    path = file_result("planning", result, context, out, quick)
    if path:
        draw(clusters, choice, whole, shape, checked, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
