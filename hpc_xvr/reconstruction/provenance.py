"""What made a result: the command line, the weights' hash, the checksums of the sources."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from hpc_xvr.config import Config
from hpc_xvr.data.cameras import camera_files, photron
from hpc_xvr.data.cameras.recording import guarded
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.pairing.agreement import Grey
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.errors import explain_os_error
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.material import CameraFiles, CorpusRecording, Source
from hpc_xvr.reconstruction.methods import NamedMethod
from hpc_xvr.reconstruction.writers import Provenance
from hpc_xvr.text import printable

_BLOCK = 2**22
_SECRET = re.compile(
    r"(pass(word|wd|phrase)?|secret|token|credentials?|api[-_]?key|access[-_]?key|auth)$", re.I
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")


def command_line(words: Sequence[str]) -> str:
    """A command line as one printable text, with *** for what are secrets by their names: the
    values of --token and the like, NAME_PASSWORD=..., and user and password in addresses."""
    told: list[str] = []
    hide = False
    for word in words:
        name, sign, value = word.partition("=")
        if hide and not word.startswith("-"):
            word = "***"
        elif sign and value and _SECRET.search(name):
            word = f"{name}=***"
        hide = word.startswith("-") and not sign and _SECRET.search(word) is not None
        word = _IN_ADDRESS.sub("***@", printable(word))
        told.append(word if re.fullmatch(r"[\w@%+=:,./*-]+", word) else _quoted(word))
    return " ".join(told)


def _quoted(word: str) -> str:
    inside = word.replace("'", "'\"'\"'")
    return f"'{inside}'"


def method_facts(method: NamedMethod) -> dict[str, Any]:
    """Name, title, step and precision of a method, and the SHA-256 of a network's weights."""
    facts: dict[str, Any] = {"name": method.name, "title": method.title}
    if method.step:
        facts["step"] = method.step
    if method.network is not None:
        facts |= {
            "precision": method.precision,
            "parameters": method.parameters,
            "weights_sha256": weights_sha256(method.network),
        }
    return facts


def weights_sha256(network: nn.Module) -> str:
    """Of all names, sizes and values of a network's state."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        whole = value.detach().cpu().contiguous().view(-1)
        digest.update(whole.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sources_of(
    paths: Mapping[str, Path | str | None], missing: Mapping[str, bool] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """The files of each role (lr, hr, hr flat, ...), with size and SHA-256; of the cameras (lr, hr)
    named in `missing`, some may be missing.

    The checksums are computed beside the caller's work, and waited for where they are needed. That
    of numbered images is of all their bytes, in order; what HDF5 files link to is not in it.
    """
    found = []
    for role, path in paths.items():
        if path is None:
            continue
        with guarded(str(path)):
            files, dataset = camera_files(path, missing.get(role.partition(" ")[0], False))
            files = _with_header(files)
            sum_of = Checksum(files)
            source: dict[str, Any] = {
                "role": role,
                "path": str(path),
                "files": len(sum_of.files),
                "bytes": sum(file.stat().st_size for file in sum_of.files),
                "sha256": sum_of,
            }
        found.append(source | ({"dataset": dataset} if dataset else {}))
    return found


def _with_header(files: Sequence[Path]) -> list[Path]:
    """With the other file of a Photron recording: header, then pixels."""
    first = files[0]
    suffix = first.suffix.lower()
    if suffix == ".mraw":
        return [*filter(None, [photron.header_of(first)]), first]
    if suffix in (".cih", ".cihx"):
        return [first, *filter(None, [photron.pixels_of(first)])]
    return list(files)


class Checksum:
    """The SHA-256 of files, one after the other, computed in a thread."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = [one for file in files for one in _inside(file)]
        self._digest = hashlib.sha256()
        self._error: OSError | None = None
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="checksum", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for path in self.files:
                with path.open("rb") as file:
                    while block := file.read(_BLOCK):
                        self._digest.update(block)
        except OSError as error:
            self._error = error

    def result(self) -> str | None:
        """The checksum, when it is there; None, with a warning, of what could not be read to its
        end: a file that has gone since it was used is no reason to lose the result."""
        self._thread.join()
        if self._error is not None:
            name = self._error.filename or self.files[0]
            logger.warning("%s: its checksum is left out: %s", name, explain_os_error(self._error))
            self._error, self._failed = None, True
        return None if self._failed else self._digest.hexdigest()


def _inside(path: Path) -> list[Path]:
    """A file, or all files of a folder (OME-Zarr) in the order of their names."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def provenance_of(
    method: NamedMethod, source: Source, command: str = "", **settings: Any
) -> Provenance:
    """What is stored with a result: what made it, of what. Checksums are computed meanwhile.

    Raises:
        InputError: a source cannot be read.
    """
    about = Provenance(command, method_facts(method), dict(settings))
    if isinstance(source, CorpusRecording):
        config = method.config or Config()
        corpus = source.corpus or config.data.corpus
        info = Corpus(corpus)[source.video].info
        about.sources = [
            {
                "role": "recording of a corpus",
                "path": str(corpus),
                "recording": source.video,
                "camera_file": info.source,
                "sha256": info.sha256,
            }
        ]
        own = source.gap is None and info.lr_times is not None
        about.settings["gap"] = None if own else source.gap or config.data.hr_gap
        registration = info.registration
    else:
        cameras = {"lr": (source.lr, source.lr_camera), "hr": (source.hr, source.hr_camera)}
        files: dict[str, Path | str | None] = {}
        for role, (path, reading) in cameras.items():
            files |= {role: path, f"{role} flat": reading.flat, f"{role} dark": reading.dark}
            about.settings[role] = reading.described()
        about.sources = sources_of(
            files, {role: bool(reading.missing) for role, (_, reading) in cameras.items()}
        )
        pairing = source.pairing
        registration, grey = pairing.registration, pairing.match_grey
        about.settings |= {
            "gap": pairing.gap,
            "start": pairing.start,
            "match_grey": [grey.gain, grey.offset] if isinstance(grey, Grey) else grey,
            "crop": source.crop,
        }
    about.registration = registration.model_dump(mode="json") if registration else None
    return about


def facts_of(source: Source) -> str:
    """A checksum of which files and options a reconstruction comes from: their names, sizes and
    times of change, not their contents."""
    if isinstance(source, CorpusRecording):
        facts: list[Any] = [str(source.corpus), source.video, source.gap]
    else:
        cameras = source.lr_camera, source.hr_camera
        facts = [repr(source.pairing), source.crop, *(c.described() for c in cameras)]
        for file in _files_of(source):
            for one in _inside(file):
                found = one.stat()
                facts.append([str(one.resolve()), found.st_size, found.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def read_places(method: NamedMethod, source: Source) -> list[Path]:
    """The files that a reconstruction reads, and the folders all of whose files it reads."""
    if isinstance(source, CorpusRecording):
        return [Path(source.corpus or (method.config or Config()).data.corpus)]
    folders = [path for path in map(Path, (source.lr, source.hr)) if path.is_dir()]
    return [*folders, *_files_of(source)]


def _files_of(source: CameraFiles) -> list[Path]:
    """The files of both cameras, and of their flat and dark fields."""
    cameras = source.lr_camera, source.hr_camera
    recordings: list[tuple[Path | str, CameraReading]]
    recordings = [(source.lr, cameras[0]), (source.hr, cameras[1])]
    recordings += [(f, c) for c in cameras for f in (c.flat, c.dark) if f]
    return [
        file
        for path, camera in recordings
        for file in _with_header(camera_files(path, bool(camera.missing))[0])
    ]
