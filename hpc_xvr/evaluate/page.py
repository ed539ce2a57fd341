"""A self-contained HTML page about an evaluation, and what a run's page shares with it."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import jinja2
from PIL import Image

from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.results import Evaluation
from hpc_xvr.evaluate.scoring import Condition
from hpc_xvr.evaluate.summary import Summary
from hpc_xvr.evaluate.tables import best_of, interval, shown, signed
from hpc_xvr.files import write_atomic
from hpc_xvr.log import logger
from hpc_xvr.version import __version__

PICTURE_LIMIT = 900_000  # bytes; larger pictures are stored again as WebP
PAGE_LIMIT = 5_500_000  # bytes of base64 text of all pictures
TYPES = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp"}
CHARTS = ("psnr-noise", "psnr-gap", "psnr-flops")


def write_page(folder: Path | str) -> Path:
    """Write comparison.html beside evaluation.json from what is in the folder.

    Raises:
        InputError: there is no evaluation, or it cannot be read.
    """
    folder = Path(folder)
    evaluation = Evaluation.load(folder)
    if evaluation is None:
        raise InputError(f"{folder}: holds no evaluation.json; `hpc-xvr evaluate` makes one")
    pictures = Pictures(folder)
    charts, sides = pictures_of(folder)
    page = template("comparison.html").render(
        name=folder.resolve().name,
        version=__version__,
        written=datetime.now().strftime("%d %B %Y, %H:%M"),
        evaluation=evaluation,
        charts=pictures.take(charts, 12),
        movies=pictures.take(movies(folder), 1),
        sides=pictures.take(sides, 8),
        left_out=pictures.left_out,
    )
    path = folder / "comparison.html"
    write_atomic(path, lambda file: file.write(page.encode()))
    return path


def pictures_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """Charts and side-by-side pictures of an evaluation's folder."""
    found = natural(folder.glob("*.png"))
    charts = [path for path in found if path.name.startswith(CHARTS)]
    return charts, [path for path in found if path not in charts]


def bars(rows: Iterable[Summary]) -> dict[str, float]:
    """Method -> length of its bar in percent: PSNR above the lowest."""
    psnr = {summary.method: summary.values["psnr"].mean for summary in rows}
    finite = [value for value in psnr.values() if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    return {
        method: 100 * min((value - low + 0.5) / (high - low + 0.5), 1.0)
        for method, value in psnr.items()
    }


def by_recording(evaluation: Evaluation, condition: Condition) -> dict[str, dict[str, float]]:
    """Recording -> method -> PSNR as it is shown."""
    found: dict[str, dict[str, float]] = {}
    for row in evaluation.rows:
        if row.condition == condition:
            found.setdefault(row.recording, {})[row.method] = round(row.psnr, 2)
    return found


def data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def natural(paths: Iterable[Path]) -> list[Path]:
    return sorted(
        paths,
        key=lambda path: [
            (int(part), "") if part.isdigit() else (-1, part)
            for part in re.split(r"(\d+)", path.name)
        ],
    )


def movies(folder: Path) -> list[Path]:
    """One file a movie: WebP, which is smaller, where there is a GIF of the same name too."""
    chosen = {path.stem: path for kind in ("gif", "webp") for path in folder.glob(f"*.{kind}")}
    return natural(chosen.values())


class Pictures:
    """Embeds pictures until the page is full; keeps the names of those that found no room."""

    def __init__(self, run: Path):
        self.run = run
        self.room = PAGE_LIMIT
        self.left_out: list[str] = []

    def take(self, paths: Iterable[Path], most: int) -> list[tuple[str, str]]:
        """(file name, data URI) of the first `most` of `paths` that there is room for."""
        taken: list[tuple[str, str]] = []
        for path in paths:
            uri = self._embedded(path) if len(taken) < most else None
            if uri is None:
                self.left_out.append(str(path.relative_to(self.run)))
            else:
                taken.append((path.stem, uri))
        return taken

    def _embedded(self, path: Path) -> str | None:
        try:
            data, kind = path.read_bytes(), TYPES[path.suffix]
            if len(data) > PICTURE_LIMIT:
                data, kind = _smaller(data), TYPES[".webp"]
        except (OSError, ValueError) as error:
            logger.warning("%s: left out of the report (%s)", path, error)
            return None
        uri = data_uri(kind, data)
        if len(uri) > self.room:
            return None
        self.room -= len(uri)
        return uri


def _smaller(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        if getattr(image, "n_frames", 1) > 1:
            image.save(buffer, "WEBP", save_all=True, quality=60, method=4)
        else:
            picture = image.convert("RGB")
            picture.thumbnail((1800, 4000))
            picture.save(buffer, "WEBP", quality=85, method=4)
    return buffer.getvalue()


def template(name: str) -> jinja2.Template:
    """A page of this folder, with the filters that the pages share."""
    environment = jinja2.Environment(
        # Not PackageLoader: it wants the package to be importable as a plain folder of its own.
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = lambda value, digits=2: f"{value:+.{digits}f}".replace(
        "-", "\u2212"
    )
    environment.filters["fixed"] = lambda value, digits=2: (
        f"{value:.{digits}f}" if math.isfinite(value) else "exact"
    )
    environment.globals.update(
        bars=bars,
        best_of=best_of,
        by_recording=by_recording,
        interval=interval,
        shown=shown,
        difference=signed,
    )
    return environment.get_template(name)
