"""The page of an evaluation: comparison.html, from what is in its folder."""

from __future__ import annotations

from pathlib import Path

from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.page import Pictures, movies, natural, write_page
from hpc_xvr.evaluate.results import FILE, Evaluation

CHARTS = ("psnr-noise", "psnr-gap", "psnr-flops")


def write_comparison(folder: Path | str) -> Path:
    """Write comparison.html beside evaluation.json.

    Raises:
        InputError: there is no evaluation, or it cannot be read.
    """
    folder = Path(folder)
    evaluation = Evaluation.load(folder)
    if evaluation is None:
        raise InputError(f"{folder}: holds no {FILE}; `hpc-xvr evaluate` makes one")
    pictures = Pictures(folder)
    charts, sides = pictures_of(folder)
    return write_page(
        folder / "comparison.html",
        "comparison.html",
        pictures,
        name=folder.resolve().name,
        evaluation=evaluation,
        charts=pictures.take(charts, 12),
        movies=pictures.take(movies(folder), 1),
        sides=pictures.take(sides, 8),
    )


def pictures_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """Charts and side-by-side pictures of an evaluation's folder."""
    found = natural(folder.glob("*.png"))
    charts = [path for path in found if path.name.startswith(CHARTS)]
    return charts, [path for path in found if path not in charts]
