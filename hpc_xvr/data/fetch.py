"""Published test sets: resumable download, checksum, unpacking, and the way into a corpus."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from hpc_xvr import config
from hpc_xvr.data.cameras import Recording, open_files
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.ingest.sources import find_recordings
from hpc_xvr.errors import InputError
from hpc_xvr.files import disk_errors, open_own, write_atomic
from hpc_xvr.log import logger, progress_bar
from hpc_xvr.text import first_line, parse_json

PIECE = 1 << 20  # bytes
ATTEMPTS = 6
PAUSE_S = 2.0  # before the second attempt; doubles
# LZMA takes as much memory as a file says, up to 4 GB.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
_DEEPEST = 100


def fetch(
    name: str,
    corpus: Path | str,
    settings: config.Fetch,
    *,
    split: str = "test",
    scale: int = 4,
    store: Literal["zarr", "hdf5"] = "zarr",
) -> str:
    """Add a published data set to a corpus as one recording, and return its id.

    The sharp frames become its frames; low-resolution frames of the same instants, if the set has
    them, become its `lr` stream. An interrupted call can be repeated and goes on where it was.

    Raises:
        InputError: an unknown name, an error of the server or the disk, a wrong checksum, or an
            archive with other contents than expected.
    """
    if name not in settings.address:
        raise InputError(
            f"{name}: unknown data set; known are {', '.join(settings.address)}; give its address "
            f"with --set fetch.address.{name}=URL"
        )
    folder = settings.folder / name
    address = settings.address[name]
    archive = folder / (PurePosixPath(urllib.parse.urlparse(address).path).name or f"{name}.zip")
    download(address, archive, settings.sha256.get(name), settings.timeout_s)
    unpacked = unpack(archive, folder / "files")
    sharp, coarse = _two_streams(unpacked, scale)
    with CorpusWriter(corpus, store=store) as writer:
        _add(writer, name, sharp, coarse, split, address)
    return name


def download(address: str, path: Path, sha256: str | None = None, timeout_s: float = 60.0) -> Path:
    """Download a file to `path`, which appears complete and checked or not at all.

    Bytes go to `path`.part; a later call, or the next attempt after a broken connection, asks only
    for the rest, unless the file on the server has changed since.

    Raises:
        InputError: the server refuses or cannot be reached, the disk is full, or the checksum is
            wrong.
    """
    if urllib.parse.urlparse(address).scheme not in ("http", "https"):
        raise InputError(f"{address}: give an address that begins with https:// or http://")
    part = path.with_name(path.name + ".part")
    with disk_errors(path.parent):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            for attempt in range(ATTEMPTS):
                if attempt:
                    time.sleep(PAUSE_S * 2 ** (attempt - 1))
                problem = _continue(address, part, timeout_s)
                if problem is None:
                    break
                logger.warning("%s: %s", address, problem)
            else:
                raise InputError(
                    f"{address}: {problem}; {part} keeps what has arrived, call again to continue"
                )
            _check(part, sha256, address)
            part.replace(path)
            _facts(part).unlink(missing_ok=True)
        else:
            _check(path, sha256, address)
    return path


def _continue(address: str, part: Path, timeout_s: float) -> str | None:
    """Ask for what is missing and append it; return what went wrong if another attempt may help."""
    have, mark = _have(part)
    request = urllib.request.Request(address)
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", mark)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            whole = answer.status != 206
            total = _length(answer, 0 if whole else have)
            mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            if whole:
                have = 0
                # Without a mark of its version, the server's file may be another one next time.
                part.unlink(missing_ok=True)
                facts = json.dumps({"mark": mark}).encode()
                write_atomic(_facts(part), lambda file: file.write(facts))
            with (
                open_own(part, "wb" if whole else "ab") as file,
                progress_bar(part.stem, total and total // PIECE, "MiB") as advance,
            ):
                advance(have // PIECE)
                while piece := answer.read(PIECE):
                    file.write(piece)
                    have += len(piece)
                    advance(1)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what we have is longer than the file: it has changed
            part.unlink(missing_ok=True)
            return "the file on the server has changed: starting again"
        if 400 <= error.code < 500 and error.code not in (408, 429):
            raise InputError(
                f"{address}: the server answers {error.code} {error.reason}; check the "
                "address (fetch.address)"
            ) from None
        return f"the server answers {error.code} {error.reason}"
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
        return f"no connection ({getattr(e, 'reason', None) or e})"
    if total is not None and have < total:
        return f"the connection broke off at {have} of {total} bytes"
    return None


def _length(answer: http.client.HTTPResponse, before: int) -> int | None:
    length = answer.headers.get("Content-Length")
    return before + int(length) if length and length.isdigit() else None


def _have(part: Path) -> tuple[int, str]:
    """Bytes that have arrived, and the version of the file that they belong to."""
    try:
        mark = parse_json(_facts(part).read_text())["mark"]
        size = part.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return 0, ""
    sound = isinstance(mark, str) and mark.isascii() and mark.isprintable()  # as a header is
    return (size, mark) if mark and sound else (0, "")


def _facts(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _check(path: Path, sha256: str | None, address: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    found = digest.hexdigest()
    if sha256 is None:
        logger.info("%s: sha256 %s (fetch.sha256 would check it)", path.name, found)
    elif found != sha256.lower():
        path.unlink()
        raise InputError(
            f"{address}: the download has the sha256 {found} instead of {sha256} and was deleted: "
            "call again, or correct fetch.sha256"
        )


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a ZIP archive into `folder`: all files, their checksums verified, or none.

    Raises:
        InputError: not a ZIP archive, a damaged one, one with paths outside the folder, or a full
            disk.
    """
    if folder.is_dir():
        return folder
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with disk_errors(folder.parent), zipfile.ZipFile(archive) as file:
            members = file.infolist()
            for member in members:
                parts = PurePosixPath(member.filename.replace("\\", "/"))
                if parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[:1]:
                    raise InputError(
                        f"{archive}: holds {member.filename}, which lies outside; not unpacked"
                    )
                if len(parts.parts) > _DEEPEST:  # neither zipfile nor rmtree could walk there
                    raise InputError(
                        f"{archive}: holds a file {len(parts.parts)} folders deep, at most "
                        f"{_DEEPEST} are taken; not unpacked"
                    )
                if member.compress_type not in _METHODS:
                    raise InputError(
                        f"{archive}: holds {member.filename}, packed by method "
                        f"{member.compress_type}; read are files that are stored, deflated or in "
                        "bzip2: pack it again"
                    )
            needed = sum(member.file_size for member in members)
            free = shutil.disk_usage(archive.parent).free
            if needed > free:
                raise InputError(
                    f"{archive}: its files need {needed / 1e9:.2f} GB, {archive.parent} has "
                    f"{free / 1e9:.2f} GB left; set fetch.folder to another disk"
                )
            for member in members:
                file.extract(member, beside)
            beside.mkdir(exist_ok=True)
            beside.replace(folder)
    except InputError:
        raise
    except Exception as error:  # whatever zipfile and what it unpacks with raise
        raise InputError(
            f"{archive}: is not a complete ZIP archive ({first_line(error)}); delete it and call "
            "again"
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _two_streams(folder: Path, scale: int) -> tuple[Recording, Recording | None]:
    """The sharp recording, and that of the same instants whose pixels are `scale` times larger."""
    found = [open_files(source.files) for source in find_recordings([folder])]
    found.sort(key=lambda recording: recording.shape[1] * recording.shape[2])
    sharp = found[-1]
    grid = (sharp.shape[1] // scale, sharp.shape[2] // scale)
    if len(found) == 1:
        return sharp, None
    if len(found) == 2 and found[0].shape == (sharp.shape[0], *grid):
        return sharp, found[0]
    shapes = ", ".join("x".join(map(str, recording.shape)) for recording in found)
    raise InputError(
        f"{folder}: holds recordings of {shapes}; expected one, or two whose sides differ by a "
        f"factor of {scale}; put what you need into a corpus with hpc-xvr ingest"
    )


def _add(
    writer: CorpusWriter,
    name: str,
    sharp: Recording,
    coarse: Recording | None,
    split: str,
    address: str,
) -> None:
    info: dict[str, Any] = {
        "camera": sharp.camera,
        "frame_rate_hz": sharp.frame_rate_hz,
        "pixel_size_um": sharp.pixel_size_um,
        "exposure_s": sharp.exposure_s,
        "bit_depth": sharp.bit_depth,
        "scene": name,
        "split": split,
        "source": address,
        "metadata": {"sharp": sharp.path.parent.name},
    }
    lr = None
    if coarse is not None:
        lr = np.stack(list(coarse.frames()))
        info |= {
            "lr_times": [float(t) for t in range(coarse.shape[0])],
            "lr_bit_depth": coarse.bit_depth,
            "metadata": {**info["metadata"], "coarse": coarse.path.parent.name},
        }
    with progress_bar(name, sharp.shape[0], "frames") as advance:

        def frames() -> Iterator[np.ndarray]:
            for frame in sharp.frames():
                advance(1)
                yield frame

        writer.add(name, frames(), sharp.shape, sharp.dtype, info, lr=lr)
