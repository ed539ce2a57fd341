"""Many shots in one call: which files belong together, and what became of each."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hpc_xvr.data.cameras.source import Source as Files
from hpc_xvr.data.corpus.layout import ID
from hpc_xvr.data.ingest.sources import find_recordings
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.data.ranks import ONE_RANK, Ranks
from hpc_xvr.data.registration import read_registration
from hpc_xvr.errors import InputError
from hpc_xvr.files import check_regular, private_folder, remove, write_atomic
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.material import CameraFiles
from hpc_xvr.text import parse_json, parse_yaml

COLUMNS = ("lr", "hr", "name", "gap", "start", "registration")
"""Of a table of pairs; the first two are needed."""
NAME = "{name}"
"""Stands for a shot's name in the names of results."""


@dataclass(frozen=True)
class Shot:
    """One recording of each camera, and the name of what is made of them."""

    name: str
    source: CameraFiles


@dataclass(frozen=True)
class Outcome:
    """What became of a shot."""

    name: str
    status: Literal["made", "there", "bad"]
    out: Path
    problem: str = ""


def holds_several(source: CameraFiles) -> bool:
    """Are both cameras' paths folders, and does one hold more than one recording?"""
    cameras = (source.lr, source.lr_camera), (source.hr, source.hr_camera)
    if not all(folder.is_dir() for folder, _ in cameras):
        return False
    return any(
        len(find_recordings([folder], missing=bool(camera.missing))) > 1
        for folder, camera in cameras
    )


def matched(source: CameraFiles, skip_bad: bool = False) -> list[Shot]:
    """The shots whose recordings lie in two folders: those of one name (without suffix) in the same
    subfolder belong together, and where each subfolder holds one recording, those of one subfolder.

    Raises:
        InputError: recordings without a partner (with `skip_bad` a warning), or two of one name.
    """
    fast, sharp = (
        _by_name(folder, camera)
        for folder, camera in ((source.lr, source.lr_camera), (source.hr, source.hr_camera))
    )
    if all(_one_a_folder(found) for found in (fast, sharp)):
        fast, sharp = ({Path(k).parent.as_posix(): v for k, v in x.items()} for x in (fast, sharp))
    alone = [
        f"{folder}: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        for folder, a, b in ((source.lr, fast, sharp), (source.hr, sharp, fast))
        if (missing := sorted(set(a) - set(b)))
    ]
    both = [name for name in sharp if name in fast]
    if alone:
        problem = f"recordings without one of the same name of the other camera: {'; '.join(alone)}"
        if not (skip_bad and both):
            raise InputError(f"{problem}; name which belong together in a table (--pairs)")
        logger.warning("%s: left out", problem)
    return _distinct(
        Shot(
            re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._"),
            replace(source, lr=_path(fast[name]), hr=_path(sharp[name])),
        )
        for name in sorted(both)
    )


def _by_name(folder: Path, camera: CameraReading) -> dict[str, Files]:
    found: dict[str, Files] = {}
    for files in find_recordings([folder], camera.dataset, bool(camera.missing)):
        name = (files.files[0].parent.relative_to(folder) / files.stem).as_posix()
        if name in found:
            raise InputError(
                f"{folder}: {found[name].path} and {files.path} have one name but for the suffix; "
                "name which belong together in a table (--pairs)"
            )
        found[name] = files
    return found


def _one_a_folder(found: Mapping[str, Files]) -> bool:
    folders = Counter(Path(name).parent.as_posix() for name in found)
    return "." not in folders and max(folders.values(), default=0) == 1


def _path(files: Files) -> Path:
    return files.path if len(files.files) > 1 else files.files[0]


def read_pairs(table: Path, like: CameraFiles) -> list[Shot]:
    """The shots that a table names: CSV with a header, or YAML, a list of mappings. Columns are
    those of `COLUMNS`; paths are relative to the table's folder.

    Args:
        like: how their files are read and joined, where the table does not say.

    Raises:
        InputError: the table cannot be read, or a row does not fit; says which.
    """
    check_regular(table)
    try:
        text = table.read_text(encoding="utf-8-sig")
        if table.suffix.lower() in (".yaml", ".yml"):
            rows = parse_yaml(text)
        elif table.suffix.lower() == ".csv":
            rows = list(csv.DictReader(text.splitlines(), strict=True))
        else:
            raise ValueError("unknown kind of table; give .csv or .yaml")
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read ({error})") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f"{table}: holds no pairs; it is a list with lr and hr (paths) for each shot, and "
            f"where needed {', '.join(COLUMNS[2:])}"
        )
    return _distinct(
        _shot(f"{table}, pair {number}", row, table.parent, like)
        for number, row in enumerate(rows, 1)
    )


def _shot(where: str, row: Mapping[Any, Any], folder: Path, like: CameraFiles) -> Shot:
    given = {key: value for key, value in row.items() if value not in (None, "", [])}
    unknown = [str(key) for key in given if key not in COLUMNS]
    if unknown or "lr" not in given or "hr" not in given:
        what = f"unknown {', '.join(unknown)}" if unknown else "lr or hr is missing"
        raise InputError(f"{where}: {what}; columns are {', '.join(COLUMNS)}")
    pairing = like.pairing
    try:
        if "gap" in given:
            pairing = replace(pairing, gap=float(given["gap"]))
        if "start" in given:
            pairing = replace(pairing, start=float(given["start"]))
    except (TypeError, ValueError):
        raise InputError(f"{where}: gap and start must be numbers") from None
    if "registration" in given:
        value = given["registration"]
        inline = isinstance(value, dict) or str(value).lstrip().startswith("{")
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        pairing = replace(
            pairing, registration=read_registration(text if inline else str(folder / text))
        )
    lr, hr = (folder / str(given[name]) for name in ("lr", "hr"))
    name = str(given.get("name", Path(str(given["hr"]).partition("::")[0]).stem))
    if not ID.fullmatch(name):
        raise InputError(
            f"{where}: name {name!r}: letters, digits, '.', '-' and '_' are allowed, as files are "
            "named after it; give another one in the column name"
        )
    return Shot(name, replace(like, lr=lr, hr=hr, pairing=pairing))


def _distinct(shots: Iterable[Shot]) -> list[Shot]:
    shots = list(shots)
    for name, count in Counter(shot.name for shot in shots).items():
        if count > 1:
            raise InputError(
                f"{count} shots are called {name}, which would write one file; name them apart in "
                "a table (--pairs, column name)"
            )
    return shots


def place_of(pattern: Path, name: str, suffix: str = ".tif") -> Path:
    """The result of a shot: {name} in the pattern replaced, or a file in that folder."""
    text = str(pattern)
    return Path(text.replace(NAME, name)) if NAME in text else pattern / f"{name}{suffix}"


class Ledger:
    """Which shots of a call are finished, so that the same call goes on after it was killed. It
    lies in a hidden folder among the results, and goes when all is done."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder = folder / ".recordings.unfinished"

        def prepare() -> bool:
            try:
                private_folder(self._folder)
                remove(self._folder / "stop")
            except InputError as error:
                logger.warning("%s; if this call is killed, it will begin anew", error)
                return False
            return True

        self._there = ranks.on_root(prepare)

    def finished(self, out: Path, facts: Mapping[str, str]) -> bool:
        """Was `out` made from the same, and is it still as it was?"""
        with suppress(OSError, ValueError):
            return self._there and parse_json(self._path(out).read_text()) == _entry(out, facts)
        return False

    def note(self, out: Path, facts: Mapping[str, str]) -> None:
        """`out` is finished."""
        if self._there:
            text = json.dumps(_entry(out, facts)).encode()
            write_atomic(self._path(out), lambda file: file.write(text))

    def stop(self) -> None:
        """The other ranks shall not begin another shot."""
        if self._there:
            with suppress(OSError):
                (self._folder / "stop").touch()

    @property
    def stopped(self) -> bool:
        return self._there and (self._folder / "stop").exists()

    def close(self) -> None:
        """All is done."""
        if self._there:
            remove(self._folder)

    def _path(self, out: Path) -> Path:
        return self._folder / f"{out.name}.json"


def _entry(out: Path, facts: Mapping[str, str]) -> dict[str, Any]:
    found = out.stat()
    return {**facts, "file": [found.st_size, found.st_mtime_ns]}


def reconstruct_all(
    shots: Sequence[Shot],
    make: Callable[[Shot, Path, Ranks, Ledger], bool],
    out: Path,
    skip_bad: bool = False,
    ranks: Ranks = ONE_RANK,
) -> list[Outcome]:
    """Make the results of many shots. With as many shots as ranks or more, each rank makes whole
    ones, else all share the gaps of each.

    Args:
        make: makes the result of a shot at a path, with these ranks; False: it was there.
        out: folder or pattern of the results, see `place_of`.
        skip_bad: go on after a shot that cannot be used, with a warning.

    Raises:
        InputError: the first bad shot; with `skip_bad`, if all are bad.
    """
    folder = place_of(out, "x").parent

    def prepare() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made ({error.strerror})") from None

    ranks.on_root(prepare)
    ledger = Ledger(folder, ranks)
    apart = len(shots) >= ranks.size
    mine = shots[ranks.rank :: ranks.size] if apart else shots
    among = ONE_RANK if apart else ranks
    outcomes: list[Outcome] = []

    def work() -> None:
        for shot in mine:
            if apart and ledger.stopped:
                return
            place = place_of(out, shot.name)
            try:
                new = make(shot, place, among, ledger)
                outcomes.append(Outcome(shot.name, "made" if new else "there", place))
            except InputError as error:
                if not skip_bad or error.exit_code != InputError.exit_code:
                    ledger.stop()
                    raise
                logger.warning("%s: skipped: %s", shot.name, error)
                outcomes.append(Outcome(shot.name, "bad", place, str(error)))

    if apart:
        ranks.together(work)
        outcomes = [outcome for share in ranks.gather(outcomes) for outcome in share]
    else:
        work()
    ranks.on_root(ledger.close)
    order = {shot.name: number for number, shot in enumerate(shots)}
    outcomes.sort(key=lambda outcome: order[outcome.name])
    if all(outcome.status == "bad" for outcome in outcomes):
        raise InputError(
            f"none of the {len(outcomes)} recordings could be used; {outcomes[0].name}: "
            f"{outcomes[0].problem}"
        )
    return outcomes
