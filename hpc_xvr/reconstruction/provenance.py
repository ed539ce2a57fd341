"""What made a result: the command line, the weights' hash, the checksums of the sources."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from hpc_xvr.data.cameras import camera_files, photron
from hpc_xvr.data.cameras.recording import guarded
from hpc_xvr.errors import explain_os_error
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.methods import NamedMethod
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
