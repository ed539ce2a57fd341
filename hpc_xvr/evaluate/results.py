"""What came out of an evaluation: JSON, CSV, Markdown and LaTeX tables, a table to look at."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.methods import NamedMethod
from hpc_xvr.evaluate.scoring import METRICS, Condition, Row
from hpc_xvr.evaluate.summary import Summary, conditions, summarise, verdict
from hpc_xvr.evaluate.tables import (
    _COLUMNS,
    PRINTED,
    _counted,
    _tex,
    best_of,
    interval,
    shown,
    signed,
)
from hpc_xvr.files import write_atomic
from hpc_xvr.log import console, print_table


@dataclass(frozen=True)
class Facts:
    """What the tables say of a method."""

    name: str
    title: str
    learned: bool = False
    parameters: int = 0

    @classmethod
    def of(cls, entry: NamedMethod) -> Facts:
        """Those of a method."""
        return cls(entry.name, entry.title, entry.learned, entry.parameters)


@dataclass(frozen=True)
class Evaluation:
    """Scores of all methods on all recordings, and how they were obtained."""

    rows: list[Row]
    methods: list[Facts]
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

    def title(self, method: str) -> str:
        """What a method is called."""
        return next(facts.title for facts in self.methods if facts.name == method)

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

    def verdicts(self, condition: Condition) -> list[str]:
        """A sentence for each method that was trained; without one, for each of the others."""
        if self.reference not in [facts.name for facts in self.methods]:
            return []
        learned = {facts.name for facts in self.methods if facts.learned}
        chosen = [s for s in self.table(condition) if s.method in learned or not learned]
        against = self.title(self.reference)
        sentences = (verdict(s, self.title(s.method), against) for s in reversed(chosen))
        return [sentence for sentence in sentences if sentence]

    @classmethod
    def load(cls, folder: Path | str) -> Evaluation | None:
        """What `save` wrote; None where there is nothing.

        Raises:
            InputError: not readable, or of another version of this program.
        """
        path = Path(folder) / "evaluation.json"
        try:
            tree = json.loads(path.read_text())
            rows = [
                Row(
                    condition=Condition(**row.pop("condition")),
                    **{key: math.inf if value is None else value for key, value in row.items()},
                )
                for row in tree["rows"]
            ]
            methods = [Facts(**facts) for facts in tree["methods"]]
            return cls(rows, methods, tree["settings"], tree["reference"]) if rows else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise InputError(f"{path}: is not valid JSON; make it again or remove it") from None
        except (KeyError, TypeError, AttributeError):
            raise InputError(
                f"{path}: was written by another version; evaluate again or remove it"
            ) from None

    def show(self) -> None:
        """Print the tables of the first conditions, and what they say."""
        for condition in self.conditions[:PRINTED]:
            rows = self.table(condition)
            some = rows[0]
            print_table(
                f"{condition}\n{some.recordings} recordings, {some.frames} frames; "
                f"{some.keys} key frames not counted",
                ["method", "PSNR dB", "95 %", "SSIM", "AAD", "flicker", "ms", "GFLOP"],
                [
                    (
                        self.title(s.method),
                        *(shown(s.values["psnr"].mean, "psnr"), interval(s.values["psnr"], "psnr")),
                        *(shown(s.values[key].mean, key) for key in ("ssim", "aad", "flicker")),
                        f"{1000 * s.seconds_per_frame:.1f}",
                        f"{s.flops_per_frame / 1e9:.3g}",
                    )
                    for s in rows
                ],
            )
            for sentence in self.verdicts(condition):
                console().print(sentence, highlight=False)
        if len(self.conditions) > PRINTED:
            console().print(f"and {len(self.conditions) - PRINTED} more tables in tables.md")

    def save(self, folder: Path | str) -> None:
        """Write evaluation.json, evaluation.csv, tables.md and tables.tex (folder made if missing).

        An infinite PSNR (a method met the truth exactly) is null in the JSON, inf in the CSV.

        Raises:
            InputError: the disk refuses.
        """
        tree = {
            "settings": self.settings,
            "reference": self.reference,
            "methods": [asdict(facts) for facts in self.methods],
            "summaries": [_plain(asdict(summary)) for summary in self.summaries],
            "rows": [_plain(asdict(row)) for row in self.rows],
        }
        texts = {
            "evaluation.json": json.dumps(tree, indent=1, allow_nan=False) + "\n",
            "evaluation.csv": self.csv(),
            "tables.md": self.markdown(),
            "tables.tex": self.latex(),
        }
        for name, text in texts.items():
            write_atomic(Path(folder) / name, lambda file, text=text: file.write(text.encode()))

    def csv(self) -> str:
        """One line a row."""
        text = io.StringIO(newline="")
        names = [field.name for field in fields(Row) if field.name != "condition"]
        table = csv.DictWriter(text, ["corpus", "gap", "noise", *names])
        table.writeheader()
        for row in self.rows:
            values = asdict(row)
            table.writerow({**values.pop("condition"), **values})
        return text.getvalue()

    def markdown(self) -> str:
        """All tables, best numbers in bold."""
        lines = []
        for condition in self.conditions:
            lines += [f"## {condition}", ""]
            for scene in (None, *self.scenes(condition)):
                rows = self.table(condition, scene)
                lines += [_counted(rows[0], scene), "", *self._markdown_table(rows), ""]
            lines += [f"- {sentence}" for sentence in self.verdicts(condition)] + [""]
        return "\n".join(lines).rstrip() + "\n"

    def _markdown_table(self, rows: Sequence[Summary]) -> list[str]:
        head, cells = self._cells(rows)
        best = best_of(rows)
        lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
        for summary, row in zip(rows, cells, strict=True):
            marked = [
                f"**{text}**" if name in METRICS and (summary.method, name) in best else text
                for text, name in zip(row, _COLUMNS, strict=True)
            ]
            lines.append(f"| {' | '.join(marked)} |")
        return lines

    def latex(self) -> str:
        """A booktabs table for each condition, all scenes together."""
        out = []
        for condition in self.conditions:
            rows = self.table(condition)
            head, cells = self._cells(rows)
            best = best_of(rows)
            body = [
                " & ".join(
                    rf"\textbf{{{_tex(text)}}}"
                    if name in METRICS and (summary.method, name) in best
                    else _tex(text)
                    for text, name in zip(row, _COLUMNS, strict=True)
                )
                + r" \\"
                for summary, row in zip(rows, cells, strict=True)
            ]
            out.append(
                "\n".join(
                    [
                        r"\begin{table}",
                        rf"\caption{{{_tex(str(condition))}. {_tex(_counted(rows[0], None))}}}",
                        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
                        r"\toprule",
                        " & ".join(map(_tex, head)) + r" \\",
                        r"\midrule",
                        *body,
                        r"\bottomrule",
                        r"\end{tabular}",
                        r"\end{table}",
                    ]
                )
            )
        return "% needs \\usepackage{booktabs}\n" + "\n\n".join(out) + "\n"

    def _cells(self, rows: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
        known = self.reference in [facts.name for facts in self.methods]
        against = f"to {self.title(self.reference)}" if known else "difference"
        head = [*_COLUMNS.values()]
        head[list(_COLUMNS).index("difference")] = f"{against}, dB"
        cells = []
        for s in rows:
            change = s.differences["psnr"] if s.differences else None
            cells.append(
                [
                    self.title(s.method),
                    shown(s.values["psnr"].mean, "psnr"),
                    interval(s.values["psnr"], "psnr"),
                    "" if change is None else signed(change),
                    *(shown(s.values[name].mean, name) for name in list(METRICS)[1:]),
                    f"{1000 * s.seconds_per_frame:.1f}",
                    f"{s.flops_per_frame / 1e9:.3g}",
                ]
            )
        return head, cells


def _plain(tree: Any) -> Any:
    """JSON has no infinities."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree


def joined(parts: Iterable[Sequence[Row]]) -> list[Row]:
    """Rows of all ranks; none may have been scored twice."""
    rows = [row for part in parts for row in part]
    keys = {(row.condition, row.recording, row.method) for row in rows}
    assert len(keys) == len(rows), "scored twice"
    return rows
