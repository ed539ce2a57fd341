"""`hpc-xvr evaluate`: methods x corpora x gaps x noise, shared among the ranks, resumable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_xvr.config import Config, Data
from hpc_xvr.data.corpus import Corpus, Video
from hpc_xvr.data.samples.sample import key_frames
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate import figures
from hpc_xvr.evaluate.methods import NamedMethod, open_methods
from hpc_xvr.evaluate.noise import NoiseLevel
from hpc_xvr.evaluate.page import write_page
from hpc_xvr.evaluate.results import Evaluation, Facts, joined
from hpc_xvr.evaluate.resume import Cells, key_of
from hpc_xvr.evaluate.scoring import (
    Condition,
    Row,
    Unit,
    check_methods,
    in_order,
    reconstruct_one,
    recording_seen,
    renamed,
    score,
)
from hpc_xvr.factory.execution import use_threads
from hpc_xvr.factory.weights import Which
from hpc_xvr.log import logger, progress_bar
from hpc_xvr.reconstruction.writers import write_movie

MOVIE_FPS = 8
PANELS = 6  # methods side by side


def evaluate(
    config: Config,
    what: Sequence[str],
    comm: Comm,
    out: Path,
    restart: bool = False,
    which: Which = "newest",
) -> Evaluation:
    """Compare, print tables, write numbers, tables, pictures and a page; all ranks call it.

    `what`: runs, files of weights and names of methods, before those of `evaluate.methods`. The
    sections `evaluate`, `data` (scale, lr_source) and `run` (seed) of `config` say the rest. What
    an earlier call finished in `out` is kept, unless `restart`. `which`: of run folders, the newest
    checkpoint or that of the best validation.

    Raises:
        InputError: no such method, run, corpus or split; nothing to compare.
    """
    comm.together(lambda: use_threads(config.run.threads))
    wanted, data = config.evaluate, config.data

    def load() -> tuple[dict[str, NamedMethod], list[Unit], dict[str, Row]]:
        entries, _ = open_methods([*wanted.methods, *what], comm.device, which)
        check_methods(entries, data)
        units = _units(config)
        cells = Cells(out, comm.rank)
        return entries, units, {} if restart else cells.load()

    entries, units, done = comm.together(load)
    done = comm.broadcast(done)  # one rank's view: no unit is done twice or left out
    open_units, kept = _open_units(units, entries, done, data, config.run.seed)
    comm.on_root(
        lambda: logger.info(
            "%d methods, %d recordings under %d conditions: %d of %d rows to be made",
            len(entries),
            len({unit.video.path for unit in units}),
            len({unit.condition for unit in units}),
            sum(len(missing) for _, missing in open_units),
            len(units) * len(entries),
        )
    )

    def work() -> list[Row]:
        return _score_own(open_units, entries, config, comm, out)

    rows = joined([kept, *comm.gather(comm.together(work))])
    order = {condition: i for i, condition in enumerate(dict.fromkeys(u.condition for u in units))}
    rows = sorted(in_order(rows, list(entries)), key=lambda row: order[row.condition])
    reference = wanted.reference if wanted.reference in entries else next(iter(entries))
    whole = Evaluation(
        rows, [Facts.of(entry) for entry in entries.values()], _settings(config, comm), reference
    )

    def write() -> None:
        whole.save(out)
        _pictures(out, whole, units, entries, config, comm)
        write_page(out)

    comm.on_root(write)
    whole.show()
    if comm.is_root:
        logger.info("written: %s", out / "comparison.html")
    return whole


def _units(config: Config) -> list[Unit]:
    """Every recording under every condition."""
    wanted = config.evaluate
    levels = list(dict.fromkeys(NoiseLevel.parse(text).name for text in wanted.noise))
    units = []
    for corpus in dict.fromkeys(wanted.corpora or [config.data.corpus]):
        videos = Corpus(corpus).split(wanted.split)
        if not videos:
            raise InputError(
                f"{corpus}: has no recordings in the split {wanted.split}; choose another with "
                f"--split, or ingest recordings with --split {wanted.split}"
            )
        for gap in dict.fromkeys(wanted.gap or [config.data.hr_gap]):
            for level in levels:
                condition = Condition(str(corpus), gap, level)
                units += [Unit(condition, video) for video in videos]
    return units


def _open_units(
    units: Sequence[Unit],
    entries: Mapping[str, NamedMethod],
    done: Mapping[str, Row],
    data: Data,
    seed: int,
) -> tuple[list[tuple[Unit, list[str]]], list[Row]]:
    """Units with the methods they still lack, and the rows there are already."""
    todo, kept = [], []
    for unit in units:
        missing = []
        for name, entry in entries.items():
            row = done.get(key_of(unit, entry, data, seed))
            if row is None:
                missing.append(name)
            else:
                kept.append(renamed(row, unit.condition.corpus))
        if missing:
            todo.append((unit, missing))
    return todo, kept


def _score_own(
    todo: Sequence[tuple[Unit, list[str]]],
    entries: Mapping[str, NamedMethod],
    config: Config,
    comm: Comm,
    out: Path,
) -> list[Row]:
    """This rank's share, the largest first so that all end together; each is kept at once."""
    cells = Cells(out, comm.rank)
    ranked = sorted(todo, key=lambda item: -_size(item[0].video) * len(item[1]))
    own = ranked[comm.rank :: comm.size]
    rows = []
    frames = sum(unit.video.shape[0] for unit, _ in own)
    with progress_bar("evaluate", frames, "frames") as advance:
        for unit, missing in own:
            found = score(
                {name: entries[name] for name in missing},
                unit,
                data=config.data,
                seed=config.run.seed,
                device=comm.device,
                advance=advance,
            )
            cells.add(
                (key_of(unit, entries[row.method], config.data, config.run.seed), row)
                for row in found
            )
            rows += found
    return rows


def _size(video: Video) -> int:
    frames, height, width = video.shape
    return frames * height * width


def _settings(config: Config, comm: Comm) -> dict[str, Any]:
    return {
        "split": config.evaluate.split,
        "scale": config.data.scale,
        "lr_source": config.data.lr_source,
        "seed": config.run.seed,
        "device": str(comm.device),
        "ranks": comm.size,
    }


def _pictures(
    out: Path,
    evaluation: Evaluation,
    units: Sequence[Unit],
    entries: Mapping[str, NamedMethod],
    config: Config,
    comm: Comm,
) -> None:
    """Charts; side by side the best methods on some recordings; a movie of the first one."""
    for name, figure in figures.charts(evaluation).items():
        figures.save(figure, out / name)
    shown: list[Unit] = []
    for corpus in dict.fromkeys(unit.condition.corpus for unit in units):
        first = next(unit.condition for unit in units if unit.condition.corpus == corpus)
        own = [unit for unit in units if unit.condition == first]
        shown += _spread(own, config.evaluate.pictures)
    for i, unit in enumerate(shown):
        best = _best(evaluation, unit.condition)
        frames = unit.video.shape[0]
        t = min(unit.condition.gap // 2, frames - 2)
        panels = {
            entries[name].title: _frame(entries[name], unit, t, config, comm) for name in best
        }
        around = key_frames(t, unit.condition.gap, frames)
        title = f"{unit.video.id}, frame {t}: key frames {around[0]} and {around[1]}"
        if unit.condition.noise != "none":
            title += f", {NoiseLevel.parse(unit.condition.noise).label}"
        name = f"{Path(unit.condition.corpus).name}-{unit.video.id}"
        truth = unit.video.intensity(t)
        figures.save(figures.side_by_side(panels, truth, title), out / f"{name}.png")
        if i == 0:
            _movie(out / f"{name}-{best[-1]}.webp", best, unit, entries, config, comm)


def _spread(units: list[Unit], count: int) -> list[Unit]:
    """The first recording of each scene, then others."""
    firsts = {unit.video.info.scene: unit for unit in reversed(units)}
    rest = [unit for unit in units if unit not in firsts.values()]
    return [*reversed(firsts.values()), *rest][:count]


def _best(evaluation: Evaluation, condition: Condition) -> list[str]:
    """The methods that pictures show, at most PANELS, worst first: bicubic, the reference, the
    best models, the best without learning, Bayesian fusion."""
    table = [summary.method for summary in evaluation.table(condition)]
    models = [name for name in reversed(table) if evaluation.learned(name)]
    plain = [name for name in table if not evaluation.learned(name)]
    wanted = ["bicubic", evaluation.reference, *models[: PANELS - 3], *plain[-1:], "bayes"]
    chosen = [name for name in dict.fromkeys(wanted) if name in table][:PANELS]
    return [name for name in table if name in chosen]


def _frame(entry: NamedMethod, unit: Unit, t: int, config: Config, comm: Comm):
    gap, video = unit.condition.gap, unit.video
    noise = NoiseLevel.parse(unit.condition.noise)
    streams = recording_seen(video, gap, noise, config.data, config.run.seed)
    around = key_frames(t, gap, video.shape[0])
    return reconstruct_one(entry, video, t, streams, around, config.data, comm.device)


def _movie(
    path: Path,
    best: Sequence[str],
    unit: Unit,
    entries: Mapping[str, NamedMethod],
    config: Config,
    comm: Comm,
) -> None:
    """Fast camera, the best method, the truth: two gaps of the recording."""
    video, name = unit.video, best[-1]
    noise = NoiseLevel.parse(unit.condition.noise)
    lr, keys = recording_seen(video, unit.condition.gap, noise, config.data, config.run.seed)

    def frames():
        for t in range(min(video.shape[0], 2 * unit.condition.gap + 1)):
            frame = keys[t] if t in keys else _frame(entries[name], unit, t, config, comm)
            yield lr[t], frame, video.intensity(t)

    write_movie(path, frames(), MOVIE_FPS, ["fast camera", "reconstruction", "truth"])
