"""Keeps napoleon from taking "1 or 3: frames that come out" for a type and a description.

It does so in the docstrings of attributes, which have their types as annotations here.
"""

from typing import Any

from sphinx.application import Sphinx

COLON, HIDDEN = ": ", "\u2236 "


def hide(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what in ("attribute", "property"):
        lines[:] = [line.replace(COLON, HIDDEN) for line in lines]


def show(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(HIDDEN, COLON) for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", hide, priority=400)  # napoleon has 500
    app.connect("autodoc-process-docstring", show, priority=600)
    return {"parallel_read_safe": True}
