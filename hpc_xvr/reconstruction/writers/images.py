"""A folder of numbered PNG files of 8 or 16 bit, with `about.json`, which says what they mean."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from hpc_xvr.data.cameras.results import ABOUT, PROGRAM
from hpc_xvr.reconstruction.writers.about import Result

NO_FLOATS = (
    "PNG files hold integers: choose --dtype uint16, or --dtype original where the sharp camera "
    "has counts, or another format for float32"
)
_NAME = re.compile(r"frame_\d{6,}\.png")
_QUICK = 2
"""zlib's level: noise hardly compresses at any."""


def write(path: Path, result: Result) -> None:
    """Write frame_000007.png and so on, numbered as the fast recording's frames."""
    last = result.first_frame + result.shape[0] - 1
    digits = max(6, len(str(last)))
    size, times = result.calibration.pixel_size_um, result.times_s
    density: dict[str, Any] = {"dpi": (25_400 / size, 25_400 / size)} if size else {}
    for number, frame in enumerate(result.frames):
        told = PngImagePlugin.PngInfo()
        told.add_text("Software", "hpc_xvr")
        when = "" if times is None else f", time {times[number]:.9g} s"
        told.add_text(
            "Description", f"frame {result.first_frame + number}{when}, {result.meaning()}"
        )
        Image.fromarray(frame).save(
            path / f"frame_{result.first_frame + number:0{digits}d}.png",
            pnginfo=told,
            compress_level=_QUICK,
            **density,
        )
    (path / ABOUT).write_text(f"{result.text()}\n")


def is_result(path: Path) -> bool:
    """Whether a folder holds such a result and nothing else."""
    try:
        about = json.loads((path / ABOUT).read_text())
    except (OSError, ValueError):
        return False
    ours = isinstance(about, dict) and about.get("program") == PROGRAM
    return ours and all(
        entry.is_file() and (entry.name == ABOUT or _NAME.fullmatch(entry.name) is not None)
        for entry in path.iterdir()
    )
