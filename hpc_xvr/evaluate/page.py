"""What self-contained HTML pages share: templates, and pictures inside the page."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from hpc_xvr.evaluate import tables
from hpc_xvr.files import write_atomic
from hpc_xvr.log import logger
from hpc_xvr.version import __version__

TEMPLATES = Path(__file__).parents[1] / "templates"

PICTURE_LIMIT = 900_000  # bytes; larger pictures are stored again as WebP
PAGE_LIMIT = 5_500_000  # bytes of base64 text of all pictures
TYPES = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp"}


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


def write_page(path: Path, template: str, pictures: Pictures, **values: Any) -> Path:
    """Fill a template in and write it as `path`.

    Raises:
        InputError: the disk refuses.
    """
    page = (
        _environment()
        .get_template(template)
        .render(
            version=__version__,
            written=datetime.now().strftime("%d %B %Y, %H:%M"),
            left_out=pictures.left_out,
            **values,
        )
    )
    write_atomic(path, lambda file: file.write(page.encode(errors="replace")))
    return path


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        # Not PackageLoader: it wants the package to be importable as a plain folder of its own.
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = tables.change
    environment.filters["fixed"] = lambda value, digits=2: (
        f"{value:.{digits}f}" if math.isfinite(value) else "exact"
    )
    environment.globals.update(
        bars=tables.bars,
        best_of=tables.best_of,
        interval=tables.interval,
        shown=tables.shown,
        difference=tables.signed,
        verdicts=tables.verdicts,
    )
    return environment
