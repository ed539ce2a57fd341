"""An evaluation as tables: Markdown, LaTeX, CSV, and on the terminal."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from hpc_xvr.evaluate.results import Evaluation
from hpc_xvr.evaluate.rows import LOWER, METRICS, Condition, Row
from hpc_xvr.evaluate.summary import Estimate, Summary
from hpc_xvr.files import write_atomic
from hpc_xvr.log import print_table, say
from hpc_xvr.text import printable

DIGITS = {"ssim": 4, "aad": 3, "flicker": 3}
"""Behind the point; 2 of all others."""
PRINTED = 4  # tables on a terminal; the rest is in tables.md


def write_tables(evaluation: Evaluation, folder: Path) -> None:
    """Write evaluation.csv, tables.md and tables.tex.

    Raises:
        InputError: the disk refuses.
    """
    for name, make in (
        ("evaluation.csv", as_csv),
        ("tables.md", as_markdown),
        ("tables.tex", as_latex),
    ):
        _write(folder / name, make(evaluation))


def _write(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode(errors="replace")))


def show(evaluation: Evaluation, chosen: Sequence[Condition] | None = None) -> None:
    """Print the tables of the first conditions, of all or of those `chosen`, and what they say."""
    chosen = evaluation.conditions if chosen is None else chosen
    for condition in chosen[:PRINTED]:
        rows = evaluation.table(condition)
        some = rows[0]
        print_table(
            f"{condition}\n{some.recordings} recordings, {some.frames} frames; "
            f"{some.keys} key frames not counted",
            ["method", "PSNR dB", "95 %", "SSIM", "AAD", "flicker", "ms", "GFLOP"],
            [
                (
                    evaluation.title(s.method),
                    shown(s.values["psnr"].mean, "psnr"),
                    interval(s.values["psnr"], "psnr"),
                    *(shown(s.values[key].mean, key) for key in ("ssim", "aad", "flicker")),
                    *_cost(s),
                )
                for s in rows
            ],
        )
        for sentence in verdicts(evaluation, condition):
            say(sentence)
    more = len(evaluation.conditions) - len(chosen[:PRINTED])
    if more:
        say(f"and {more} more table{'s' if more > 1 else ''} in tables.md")


def as_csv(evaluation: Evaluation) -> str:
    """One line a row; an infinite PSNR (a method met the truth exactly) is inf."""
    text = io.StringIO(newline="")
    names = [field.name for field in fields(Row) if field.name != "condition"]
    table = csv.DictWriter(text, ["corpus", "gap", "noise", *names])
    table.writeheader()
    for row in evaluation.rows:
        values = {name: getattr(row, name) for name in names}
        cells = row.condition.to_json() | values
        table.writerow({name: _inert(value) for name, value in cells.items()})
    return text.getvalue()


def _inert(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def as_markdown(evaluation: Evaluation) -> str:
    """All tables, best numbers in bold, and what they say."""
    lines = []
    for condition in evaluation.conditions:
        lines += [f"## {_md(str(condition))}", ""]
        for scene in (None, *evaluation.scenes(condition)):
            rows = evaluation.table(condition, scene)
            head, body = _cells(evaluation, rows)
            lines += [_md(_counted(rows[0], scene)), ""]
            lines += [f"| {' | '.join(map(_md, head))} |", f"|---{'|---:' * (len(head) - 1)}|"]
            for cells in body:
                texts = [_md(cell.text) for cell in cells]
                marked = (f"**{t}**" if c.best else t for t, c in zip(texts, cells, strict=True))
                lines.append(f"| {' | '.join(marked)} |")
            lines.append("")
        lines += [f"- {_md(sentence)}" for sentence in verdicts(evaluation, condition)] + [""]
    return "\n".join(lines).rstrip() + "\n"


def as_latex(evaluation: Evaluation) -> str:
    """A booktabs table for each condition, all scenes together."""
    tables = [_latex_table(evaluation, condition) for condition in evaluation.conditions]
    return "% needs \\usepackage{booktabs}\n" + "\n\n".join(tables) + "\n"


def _latex_table(evaluation: Evaluation, condition: Condition) -> str:
    rows = evaluation.table(condition)
    head, body = _cells(evaluation, rows)
    lines = [
        r"\begin{table}",
        rf"\caption{{{_tex(str(condition))}. {_tex(_counted(rows[0], None))}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(map(_tex, head)) + r" \\",
        r"\midrule",
    ]
    for cells in body:
        marked = (rf"\textbf{{{_tex(c.text)}}}" if c.best else _tex(c.text) for c in cells)
        lines.append(" & ".join(marked) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


class _Cell(NamedTuple):
    text: str
    best: bool = False
    """Of its column."""


def _cells(evaluation: Evaluation, rows: Sequence[Summary]) -> tuple[list[str], list[list[_Cell]]]:
    """Head and body of a table, for files."""
    against = f"to {evaluation.title(evaluation.reference)}" if evaluation.has_reference else ""
    psnr, *others = METRICS
    head = ["method", METRICS[psnr], "95 %", f"{against or 'difference'}, dB"]
    head += [*(METRICS[name] for name in others), "ms/frame", "GFLOP/frame"]
    best = best_of(rows)

    def scored(summary: Summary, metric: str) -> _Cell:
        text = shown(summary.values[metric].mean, metric)
        return _Cell(text, (summary.method, metric) in best)

    body = [
        [
            _Cell(evaluation.title(s.method)),
            scored(s, psnr),
            _Cell(interval(s.values[psnr], psnr)),
            _Cell(signed(s.differences[psnr]) if s.differences else ""),
            *(scored(s, name) for name in others),
            *map(_Cell, _cost(s)),
        ]
        for s in rows
    ]
    return head, body


def _cost(summary: Summary) -> tuple[str, str]:
    """ms and GFLOP a frame."""
    return f"{1000 * summary.seconds_per_frame:.1f}", f"{summary.flops_per_frame / 1e9:.3g}"


def best_of(rows: Sequence[Summary]) -> set[tuple[str, str]]:
    """(method, metric) of the best numbers of a table; what looks the same is the same."""
    best = set()
    for name in METRICS:
        sign = -1 if name in LOWER else 1
        numbers = {s.method: round(s.values[name].mean, DIGITS.get(name, 2)) for s in rows}
        top = max(sign * value for value in numbers.values())
        best |= {(method, name) for method, value in numbers.items() if sign * value == top}
    return best


def bars(rows: Iterable[Summary]) -> dict[str, float]:
    """Method -> length of its bar in percent: PSNR above the lowest."""
    psnr = {summary.method: summary.values["psnr"].mean for summary in rows}
    finite = [value for value in psnr.values() if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    return {
        method: 100 * min((value - low + 0.5) / (high - low + 0.5), 1.0)
        for method, value in psnr.items()
    }


def shown(value: float, metric: str) -> str:
    """A number as the tables write it."""
    return f"{value:.{DIGITS.get(metric, 2)}f}" if math.isfinite(value) else "exact"


def interval(estimate: Estimate, metric: str) -> str:
    """Its interval; nothing where there is none."""
    if estimate.interval is None:
        return ""
    return " to ".join(shown(value, metric) for value in estimate.interval)


def change(value: float, digits: int = 2) -> str:
    """A difference with its sign: +0.12, −0.12; what is shown as zero is +0.00."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "\u2212")


def signed(estimate: Estimate) -> str:
    """A difference of PSNR with its interval."""
    if not math.isfinite(estimate.mean):
        return ""
    if estimate.interval is None:
        return change(estimate.mean)
    return f"{change(estimate.mean)} [{', '.join(map(change, estimate.interval))}]"


def verdicts(evaluation: Evaluation, condition: Condition) -> list[str]:
    """A sentence for each method that was trained; without one, for each of the others. And one for
    each that was not trained for such gaps."""
    there = {summary.method for summary in evaluation.table(condition)}
    beyond = [
        f"{facts.title} was trained for gaps of up to {facts.longest_gap} frames: this one of "
        f"{condition.gap} lies beyond them"
        for facts in evaluation.methods
        if facts.name in there and facts.longest_gap and condition.gap > facts.longest_gap
    ]
    if not evaluation.has_reference:
        return beyond
    learned = {facts.name for facts in evaluation.methods if facts.learned}
    chosen = [s for s in evaluation.table(condition) if s.method in learned or not learned]
    against = evaluation.title(evaluation.reference)
    sentences = (verdict(s, evaluation.title(s.method), against) for s in reversed(chosen))
    return [*(sentence for sentence in sentences if sentence), *beyond]


def verdict(summary: Summary, title: str, against: str, metric: str = "psnr") -> str | None:
    """A sentence that says whether a method is better than the reference, worse, or equal to the
    digits shown; None for the reference itself."""
    if summary.differences is None:
        return None
    found, digits = summary.differences[metric], DIGITS.get(metric, 2)
    if not math.isfinite(found.mean):
        return f"{title} and {against}: one of them is exact in some recordings, no difference"
    ends = found.interval or ()
    if all(round(value, digits) == 0 for value in (found.mean, *ends)) or (
        round(found.mean, digits) == 0 and found.sure
    ):
        word = "equals"
    elif ends and not found.sure:
        word = "cannot be told from"
    else:
        better = (found.mean < 0) == (metric in LOWER)
        sure, unsure = ("beats", "is better than") if better else ("loses to", "is worse than")
        word = sure if ends else unsure
    span = f" [{' to '.join(change(value, digits) for value in ends)}]" if ends else ""
    alone = "" if ends else " (one recording: no interval)"
    return f"{title} {word} {against}: {change(found.mean, digits)}{span} {METRICS[metric]}{alone}"


def _counted(summary: Summary, scene: str | None) -> str:
    where = f"Scene {scene}: " if scene else ""
    many = "s" if summary.recordings > 1 else ""
    return (
        f"{where}{summary.recordings} recording{many}, {summary.frames} frames; "
        f"{summary.keys} key frames not counted."
    )


def _md(text: str) -> str:
    """Text in Markdown: no HTML, no cell border."""
    return html.escape(printable(text), quote=False).replace("|", r"\|")


_TEX = {mark: "\\" + mark for mark in "&%_#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\u2212": "$-$",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in printable(text))
