"""What came out of an evaluation: rows, their summaries, and the file evaluation.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.rows import Condition, Row, check_types, without_infinities
from hpc_xvr.evaluate.summary import Summary, conditions, summarise
from hpc_xvr.files import write_atomic
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.methods import NamedMethod
from hpc_xvr.text import parse_json

FILE = "evaluation.json"


@dataclass(frozen=True)
class Facts:
    """What the tables say of a method."""

    name: str
    title: str
    learned: bool = False
    parameters: int = 0
    longest_gap: int | None = None
    """Of those it was trained for, as far as it is known and matters."""
    fingerprint: str = ""
    """Changes when the method may give other pictures."""

    @classmethod
    def of(cls, method: NamedMethod) -> Facts:
        """Those of a method."""
        return cls(
            method.name,
            method.title,
            method.learned,
            method.parameters,
            method.longest_gap,
            method.fingerprint,
        )


@dataclass(frozen=True)
class Evaluation:
    """Scores of all methods on all recordings, and how they were obtained."""

    rows: Sequence[Row]
    methods: Sequence[Facts]
    settings: dict[str, Any]
    reference: str = "detail"
    """The method that all others are compared with, recording by recording."""

    @cached_property
    def summaries(self) -> list[Summary]:
        """Of each condition, scene and method, in the order of the tables."""
        return summarise(self.rows, [facts.name for facts in self.methods], self.reference)

    @property
    def conditions(self) -> list[Condition]:
        """In the order of the tables."""
        return conditions(self.rows)

    @property
    def has_reference(self) -> bool:
        """Whether the reference is among the methods."""
        return self.reference in [facts.name for facts in self.methods]

    def title(self, method: str) -> str:
        """What a method is called."""
        return next((facts.title for facts in self.methods if facts.name == method), method)

    def learned(self, method: str) -> bool:
        """Was it trained?"""
        return next(facts.learned for facts in self.methods if facts.name == method)

    def table(self, condition: Condition, scene: str | None = None) -> list[Summary]:
        """The rows of one table, worst PSNR first."""
        part = [s for s in self.summaries if s.condition == condition and s.scene == scene]
        return sorted(part, key=lambda summary: summary.values["psnr"].mean)

    def scenes(self, condition: Condition) -> list[str]:
        """Those that have a table of their own: none where there is one scene only."""
        return sorted({s.scene for s in self.summaries if s.condition == condition and s.scene})

    def by_recording(self, condition: Condition) -> dict[str, dict[str, Row]]:
        """Recording -> method -> row."""
        found: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            if row.condition == condition:
                found.setdefault(row.recording, {})[row.method] = row
        return found

    def beside(self, earlier: Evaluation) -> Evaluation:
        """This one and what an earlier one found under other conditions.

        An earlier method of the same name whose weights were others is left out, with a warning.
        """
        here = {condition.place for condition in self.conditions}
        others = [row for row in earlier.rows if row.condition.place not in here]
        now = {facts.name: facts for facts in self.methods}
        known = {facts.name: facts for facts in earlier.methods}
        changed = {n for n in now if n in known and now[n].fingerprint != known[n].fingerprint}
        kept = [row for row in others if row.method not in changed]
        for name in sorted(changed & {row.method for row in others}):
            logger.warning(
                "%s: had other weights when it was evaluated under other conditions; these results "
                "are left out, evaluate it there again",
                name,
            )
        used = {row.method for row in kept}
        titles = [facts.title for facts in self.methods]
        more = [
            replace(facts, title=f"{facts.title} ({facts.name})")
            if facts.title in titles
            else facts
            for facts in earlier.methods
            if facts.name in used and facts.name not in now
        ]
        return replace(self, rows=[*self.rows, *kept], methods=[*self.methods, *more])

    def save(self, folder: Path | str) -> None:
        """Write evaluation.json; the folder is made if it is missing.

        Raises:
            InputError: the disk refuses.
        """
        tree = {
            "settings": self.settings,
            "reference": self.reference,
            "methods": [asdict(facts) for facts in self.methods],
            "summaries": [
                without_infinities(asdict(s) | {"condition": s.condition.to_json()})
                for s in self.summaries
            ],
            "rows": [row.to_json() for row in self.rows],
        }
        text = json.dumps(tree, indent=1, allow_nan=False) + "\n"
        write_atomic(Path(folder) / FILE, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, folder: Path | str) -> Evaluation | None:
        """What `save` wrote; None where there is nothing.

        Raises:
            InputError: not readable, or of another version of this program.
        """
        path = Path(folder) / FILE
        try:
            tree = parse_json(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise InputError(f"{path}: is not valid JSON; make it again or remove it") from None
        try:
            rows = [Row.from_json(row) for row in tree["rows"]]
            methods = [Facts(**facts) for facts in tree["methods"]]
            found = cls(rows, methods, dict(tree["settings"]), tree["reference"])
            for facts in (found, *methods):
                check_types(facts)
            if unknown := {row.method for row in rows} - {facts.name for facts in methods}:
                raise KeyError(*unknown)
            return found if rows else None
        except (KeyError, TypeError, ValueError, AttributeError, InputError):
            raise InputError(
                f"{path}: was written by another version; evaluate again or remove it"
            ) from None
