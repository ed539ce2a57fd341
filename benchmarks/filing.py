"""Where results of benchmarks go: one flat JSON a device and version of torch, beside the code."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def file_name(what: str, context: dict[str, Any]) -> str:
    """Such as model-intel-xeon-processor-2-cores-torch-2.13.0.json."""
    device = re.sub(r"\(.*?\)", "", context["device"])
    words = f"{what} {device} torch {context['packages']['torch'].split('+')[0]}"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-") + ".json"


def file_result(
    what: str, result: dict[str, float], context: dict[str, Any], out: Path | None, quick: bool
) -> Path | None:
    """Write the finite figures and their context to `out`, else (unless quick) into RESULTS."""
    if out is None:
        if quick:
            return None
        RESULTS.mkdir(exist_ok=True)
        out = RESULTS / file_name(what, context)
    known = {name: value for name, value in result.items() if math.isfinite(value)}
    if "command" in context:
        context = {**context, "command": without_folders(context["command"])}
    out.write_text(json.dumps({**known, "context": context}, indent=1) + "\n")
    print(f"written: {out}")
    return out


def without_folders(command: str) -> str:
    """A command line in which absolute paths are names: results are read elsewhere."""
    return " ".join(Path(w).name if w.startswith("/") else w for w in command.split(" "))


def usage(text: str) -> str:
    """A module's description as help of click, which keeps the lines of its examples apart."""
    return re.sub(r"\n\n(?= {4})", "\n\n\b\n", text)
