"""How charts look: lines that differ in colour, dashes and marker, so that they can be told apart
in grey print and by colour-blind readers.

Colours are those of Okabe and Ito (2008), without the yellow, which is lost on white.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Any, NamedTuple

BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, BLACK = "#e69f00", "#56b4e9", "#000000"
GREYS = ("#a0a7ae", "#868e96", "#5c636a", "#343a40")
GRID = "#e9ecef"

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#868e96",
    "axes.labelcolor": "#343a40",
    "xtick.color": "#495057",
    "ytick.color": "#495057",
}


class Line(NamedTuple):
    """What a line of a chart looks like."""

    colour: str
    dashes: Any
    marker: str

    def keywords(self) -> dict[str, Any]:
        """For Axes.plot, without the marker."""
        return {"color": self.colour, "linestyle": self.dashes}


LINES = (
    Line(BLUE, "-", "o"),
    Line(VERMILION, (0, (5, 1.5)), "s"),
    Line(GREEN, (0, (1, 1)), "^"),
    Line(PURPLE, (0, (5, 1, 1, 1)), "D"),
    Line(ORANGE, (0, (8, 2)), "v"),
    Line(SKY, (0, (3, 1, 1, 1, 1, 1)), "P"),
    Line(BLACK, (0, (2, 2)), "X"),
)
"""Of what is looked at: trained models."""
PLAIN = {
    "bicubic": Line(GREYS[0], "-", "."),
    "nearest_hr": Line(GREYS[0], (0, (1, 1.5)), "<"),
    "linear_hr": Line(GREYS[1], (0, (1, 1.5)), ">"),
    "detail": Line(GREYS[1], "-", "x"),
    "adaptive": Line(GREYS[3], "-", "+"),
    "bayes": Line(GREYS[2], (0, (4, 2)), "1"),
}
"""Of methods without learning: they stay behind the others, in grey."""
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "", "ooo", "---")
"""Of neighbouring parts of a bar."""


def lines() -> Iterator[Line]:
    """LINES, over and over."""
    return cycle(LINES)
