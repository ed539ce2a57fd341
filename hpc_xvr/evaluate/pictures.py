"""What an evaluation shows: charts, the best methods side by side, a movie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from hpc_xvr.data.samples.sample import key_frames
from hpc_xvr.evaluate import figures
from hpc_xvr.evaluate.noise import NO_NOISE
from hpc_xvr.evaluate.results import Evaluation
from hpc_xvr.evaluate.rows import Condition
from hpc_xvr.evaluate.scoring import Setting, Unit, frame_at, streams_of
from hpc_xvr.reconstruction.methods import NamedMethod
from hpc_xvr.reconstruction.writers import write_movie

MOVIE_FPS = 8
PANELS = 6  # methods side by side


def write_pictures(
    folder: Path,
    evaluation: Evaluation,
    units: Sequence[Unit],
    methods: Mapping[str, NamedMethod],
    setting: Setting,
    count: int,
) -> None:
    """Charts; the best methods on `count` recordings of each corpus; a movie of the first one.

    Raises:
        InputError: the disk refuses.
    """
    for name, figure in figures.charts(evaluation).items():
        figures.save(figure, folder / name)
    shown = _chosen(units, count)
    for unit in shown:
        best = best_methods(evaluation, unit.condition)
        _side_by_side(folder, unit, [methods[name] for name in best], setting)
    if shown:
        method = methods[best_methods(evaluation, shown[0].condition)[-1]]
        path = folder / f"{_name(shown[0])}-{method.name}.webp"
        labels = ["fast camera", "reconstruction", "truth"]
        write_movie(path, _movie(shown[0], method, setting), MOVIE_FPS, labels)


def best_methods(evaluation: Evaluation, condition: Condition) -> list[str]:
    """The methods that pictures show, at most PANELS, worst first: bicubic, the reference, the
    best models, the best without learning, Bayesian fusion."""
    table = [summary.method for summary in evaluation.table(condition)]
    models = [name for name in reversed(table) if evaluation.learned(name)]
    plain = [name for name in table if not evaluation.learned(name)]
    wanted = ["bicubic", evaluation.reference, *models[: PANELS - 3], *plain[-1:], "bayes"]
    chosen = [name for name in dict.fromkeys(wanted) if name in table][:PANELS]
    return [name for name in table if name in chosen]


def _chosen(units: Sequence[Unit], count: int) -> list[Unit]:
    """`count` recordings of each corpus under its first condition: the first one of each scene,
    then others."""
    chosen = []
    for corpus in dict.fromkeys(unit.condition.corpus for unit in units):
        own = [unit for unit in units if unit.condition.corpus == corpus]
        own = [unit for unit in own if unit.condition == own[0].condition]
        firsts = {unit.video.info.scene: unit for unit in reversed(own)}
        rest = [unit for unit in own if unit not in firsts.values()]
        chosen += [*reversed(firsts.values()), *rest][:count]
    return chosen


def _side_by_side(
    folder: Path, unit: Unit, methods: Sequence[NamedMethod], setting: Setting
) -> None:
    """A frame in the middle of the first gap."""
    gap, noise, frames = unit.condition.gap, unit.condition.noise, unit.video.shape[0]
    t = min(gap // 2, frames - 2)
    panels = {method.title: frame_at(method, unit, t, setting) for method in methods}
    before, after = key_frames(t, gap, frames)
    title = f"{unit.video.id}, frame {t}: key frames {before} and {after}"
    title += "" if noise == NO_NOISE else f", {noise.label}"
    figure = figures.side_by_side(panels, unit.video.intensity(t), title)
    figures.save(figure, folder / f"{_name(unit)}.png")


def _movie(
    unit: Unit, method: NamedMethod, setting: Setting
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Fast camera, a method, the truth: two gaps of the recording."""
    lr, keys = streams_of(unit, setting)
    for t in range(min(unit.video.shape[0], 2 * unit.condition.gap + 1)):
        frame = keys[t] if t in keys else frame_at(method, unit, t, setting)
        yield lr[t], frame, unit.video.intensity(t)


def _name(unit: Unit) -> str:
    """Of a picture's file: those of other conditions stay beside it."""
    gap, noise = unit.condition.gap, unit.condition.noise
    level = "" if noise == NO_NOISE else f"-{noise.name.replace(':', '-')}"
    return f"{Path(unit.condition.corpus).name}-{unit.video.id}-gap{gap}{level}"
