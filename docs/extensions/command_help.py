"""Makes the command reference look like `hpc-xvr COMMAND --help`, which is plain text.

sphinx-click reads help texts as reStructuredText, and does not know of the examples that end them.
"""

import re
from typing import Any

import click
from sphinx.application import Sphinx


def plain_text(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    """Blocks of the description that keep their line breaks become literal; `x` becomes code."""
    out: list[str] = []
    block = False
    for line in lines:
        if line.startswith("| "):
            out += [] if block else ["::", ""]
            out.append("    " + line[2:])
        else:
            out += [""] if block else []
            out.append(re.sub(r"`([^`]+)`", r"``\1``", line).replace("*", r"\*"))
        block = line.startswith("| ")
    lines[:] = out


def add_examples(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    """Append the command's examples to its epilog as a code block."""
    examples = getattr(context.command, "examples", "").strip().splitlines()
    if examples:
        lines += [".. rubric:: Examples", "", ".. code-block:: bash", ""]
        lines += ["   " + line.removeprefix("    ") for line in examples] + [""]


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("sphinx-click-process-description", plain_text)
    app.connect("sphinx-click-process-epilog", add_examples)
    return {"parallel_read_safe": True}
