"""`hpc-xvr evaluate`: methods x corpora x gaps x noise, shared among the ranks, resumable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc_xvr.config import Config
from hpc_xvr.data.corpus import Corpus, Video
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate import tables
from hpc_xvr.evaluate.comparison import write_comparison
from hpc_xvr.evaluate.noise import NoiseLevel
from hpc_xvr.evaluate.pictures import write_pictures
from hpc_xvr.evaluate.results import Evaluation, Facts
from hpc_xvr.evaluate.resume import Cells, key_of
from hpc_xvr.evaluate.rows import Condition, Row
from hpc_xvr.evaluate.scoring import Setting, Unit, check_methods, score
from hpc_xvr.factory.execution import use_threads
from hpc_xvr.factory.weights import Which
from hpc_xvr.log import logger, progress_bar
from hpc_xvr.reconstruction.methods import NamedMethod, open_methods
from hpc_xvr.reconstruction.tiles import in_tiles


def evaluate(
    config: Config,
    what: Sequence[str],
    comm: Comm,
    out: Path,
    restart: bool = False,
    which: Which = "newest",
) -> Evaluation:
    """Compare, print tables, write numbers, tables, pictures and a page; all ranks call it.

    `what`: runs, files of weights and names of methods, after those of `evaluate.methods`. The
    sections `evaluate`, `data` (scale, lr_source) and `run` (seed) of `config` say the rest. What
    an earlier call finished in `out` is kept, unless `restart`. `which`: of run folders, the newest
    checkpoint or that of the best validation.

    Raises:
        InputError: no such method, run, corpus or split; nothing to compare.
    """
    comm.together(lambda: use_threads(config.run.threads))
    wanted = config.evaluate
    setting = Setting(
        config.data,
        config.run.seed,
        comm.device,
        comm.together(lambda: NoiseLevel.parse(wanted.hr_noise)),
        wanted.misregistration,
    )
    cells = Cells(out, comm.rank)

    def load() -> tuple[dict[str, NamedMethod], list[Unit], dict[str, Row]]:
        units = _units(config)
        _check_settings(earlier, settings, out)
        methods = open_methods([*wanted.methods, *what], comm.device, which)
        check_methods(methods, config.data)
        methods = {name: in_tiles(method, wanted.tile) for name, method in methods.items()}
        return methods, units, {} if restart else cells.load()

    settings = _settings(config, comm)
    earlier = None if restart else comm.on_root(lambda: _earlier(out))

    methods, units, done = comm.together(load)
    done = comm.broadcast(done)  # one rank's view: no unit is done twice or left out
    todo, kept = _split(units, methods, done, setting)
    comm.on_root(lambda: _announce(units, methods, todo))
    own = _share(todo, comm.rank, comm.size)
    made = comm.gather(comm.together(lambda: _score_all(own, methods, setting, cells)))
    whole = Evaluation(
        _in_order([*kept, *(row for part in made for row in part)], units, methods),
        [Facts.of(method) for method in methods.values()],
        settings,
        wanted.reference if wanted.reference in methods else next(iter(methods)),
    )

    asked = whole.conditions
    if earlier is not None:
        whole = comm.on_root(lambda: whole.beside(earlier))

    def write() -> None:
        whole.save(out)
        tables.write_tables(whole, out)
        write_pictures(out, whole, units, methods, setting, wanted.pictures)
        write_comparison(out)

    comm.on_root(write)
    tables.show(whole, asked)
    if comm.is_root:
        logger.info("written: %s", out / "comparison.html")
    return whole


def _units(config: Config) -> list[Unit]:
    """Every recording under every condition."""
    wanted = config.evaluate
    levels = dict.fromkeys(map(NoiseLevel.parse, wanted.noise))
    units = []
    for corpus in dict.fromkeys(wanted.corpora or [config.data.corpus]):
        videos = Corpus(corpus).split(wanted.split)
        if not videos:
            raise InputError(
                f"{corpus}: has no recordings in the split {wanted.split}; choose another with "
                f"--split, or ingest recordings with --split {wanted.split}"
            )
        for gap in dict.fromkeys(wanted.gap or [config.data.hr_gap]):
            long = _long_enough(corpus, videos, gap)
            for level in levels:
                condition = Condition(str(corpus), gap, level)
                units += [Unit(condition, video) for video in long]
    return units


def _long_enough(corpus: Path, videos: Sequence[Video], gap: int) -> Sequence[Video]:
    """The recordings that hold a whole gap."""
    long = [video for video in videos if video.shape[0] > gap]
    if not long:
        most = max(video.shape[0] for video in videos)
        raise InputError(
            f"{corpus}: a gap of {gap} frames is longer than its recordings, which have up to "
            f"{most} frames; --gap may be 2 to {most - 1}"
        )
    if len(long) < len(videos):
        short = [video.id for video in videos if video.shape[0] <= gap]
        logger.warning(
            "%s: shorter than a gap of %d frames, left out there: %s%s",
            *(corpus, gap, ", ".join(short[:5]), ", ..." if len(short) > 5 else ""),
        )
    return long


def _earlier(out: Path) -> Evaluation | None:
    try:
        return Evaluation.load(out)
    except InputError as problem:
        logger.warning("%s; it is replaced", problem)
        return None


def _check_settings(earlier: Evaluation | None, settings: dict[str, Any], out: Path) -> None:
    """Refuse to put on one page what was not found in the same way."""
    then = earlier.settings if earlier else settings
    differing = [name for name in COMMON if then.get(name) != settings[name]]
    if differing:
        was = ", ".join(f"{name} {then.get(name)}" for name in differing)
        now = ", ".join(f"{name} {settings[name]}" for name in differing)
        raise InputError(
            f"{out}: holds an evaluation with {was}, this one has {now}: choose another --out, or "
            "replace it with --restart"
        )


COMMON = ("split", "scale", "lr_source", "hr_noise", "misregistration", "seed")
"""Settings that all results in a folder share."""
Work = list[tuple[Unit, list[str]]]
"""Units with the names of the methods they still lack."""


def _split(
    units: Sequence[Unit],
    methods: Mapping[str, NamedMethod],
    done: Mapping[str, Row],
    setting: Setting,
) -> tuple[Work, list[Row]]:
    """What is to be done, and the rows there are already (whose corpus may have moved since)."""
    todo, kept = [], []
    for unit in units:
        missing = []
        for name, method in methods.items():
            row = done.get(key_of(unit, method, setting))
            if row is None:
                missing.append(name)
            else:
                kept.append(replace(row, condition=unit.condition))
        if missing:
            todo.append((unit, missing))
    return todo, kept


def _share(todo: Work, rank: int, ranks: int) -> Work:
    """A rank's part, the largest first so that all end together."""

    def size(video: Video) -> int:
        frames, height, width = video.shape
        return frames * height * width

    return sorted(todo, key=lambda item: -size(item[0].video) * len(item[1]))[rank::ranks]


def _score_all(
    own: Work, methods: Mapping[str, NamedMethod], setting: Setting, cells: Cells
) -> list[Row]:
    """Rows of this rank; those of a unit are kept on disk as soon as it is done."""
    rows = []
    frames = sum(unit.video.shape[0] for unit, _ in own)
    with progress_bar("evaluate", frames, "frames") as advance:
        for unit, missing in own:
            found = score({name: methods[name] for name in missing}, unit, setting, advance)
            cells.add((key_of(unit, methods[row.method], setting), row) for row in found)
            rows += found
    return rows


def _announce(units: Sequence[Unit], methods: Mapping[str, NamedMethod], todo: Work) -> None:
    widest = max(unit.condition.gap for unit in units)
    for name, method in methods.items():
        if method.longest_gap is not None and widest > method.longest_gap:
            logger.warning(
                "%s: was trained for gaps of up to %d frames; a gap of %d lies beyond them",
                *(name, method.longest_gap, widest),
            )
    logger.info(
        "%d methods, %d recordings under %d conditions: %d of %d rows to be made",
        len(methods),
        len({unit.video.path for unit in units}),
        len({unit.condition for unit in units}),
        sum(len(missing) for _, missing in todo),
        len(units) * len(methods),
    )


def _settings(config: Config, comm: Comm) -> dict[str, Any]:
    """What the results say of how they were obtained."""
    return {
        "split": config.evaluate.split,
        "scale": config.data.scale,
        "lr_source": config.data.lr_source,
        "hr_noise": config.evaluate.hr_noise,
        "misregistration": config.evaluate.misregistration,
        "seed": config.run.seed,
        "device": str(comm.device),
        "ranks": comm.size,
        "tile": config.evaluate.tile,
    }


def _in_order(
    rows: Sequence[Row], units: Sequence[Unit], methods: Mapping[str, object]
) -> list[Row]:
    """By condition as asked for, recording and method, whoever made them."""
    conditions = list(dict.fromkeys(unit.condition for unit in units))
    names = list(methods)
    unique = {(row.condition, row.recording, row.method): row for row in rows}
    assert len(unique) == len(rows), "scored twice"
    return sorted(
        rows, key=lambda r: (conditions.index(r.condition), r.recording, names.index(r.method))
    )
