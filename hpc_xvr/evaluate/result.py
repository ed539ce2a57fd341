"""A reconstruction's file, and all that is known of it: what is beside it, and its sources."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hpc_xvr.config import Config, Data
from hpc_xvr.data.cameras import Recording, open_camera_file
from hpc_xvr.data.pairing.agreement import Grey
from hpc_xvr.data.pairing.joining import Pairing
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.data.registration import Registration
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.material import CameraFiles, CorpusRecording, Material, material_of
from hpc_xvr.reconstruction.methods import open_method
from hpc_xvr.text import parse_json

SCALES: tuple[Literal[2, 4], ...] = (4, 2)
"""Scales that are tried where neither the method nor the sizes of the frames say."""


@dataclass(frozen=True)
class Result:
    """The frames of a reconstruction, and what they came from as far as it is still there."""

    path: Path
    recording: Recording
    about: dict[str, Any]
    """What `reconstruct` wrote beside it (FILE.json)."""
    trust: dict[str, Any]
    """What was found about its frames (STEM-trust.json)."""
    material: Material | None = None
    """The sources, read and joined as they were for the reconstruction."""
    absent: str = ""
    """Why the sources are not there."""
    uncertainty: Recording | None = None
    """A standard deviation for each pixel, in the unit of the frames."""
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    """Name -> picture (H, W) of all frames together."""
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    """Number of each frame in the fast recording, (T,) rising; from 0 if nothing says."""

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The files that it was made from, as they were named then."""
        return _sources(self.about)

    def time_of(self, k: int) -> int:
        """Index of a frame in the fast stream, which lacks those that are missing."""
        number = int(self.numbers[k])
        places = self.material.places if self.material else None
        return number if places is None else int(np.searchsorted(places, number))

    def at(self, values: dict[int, float]) -> list[float | None]:
        """One value for each frame."""
        found = [values.get(int(number)) for number in self.numbers]
        return [v if v is not None and math.isfinite(v) else None for v in found]

    @property
    def per_frame(self) -> dict[str, list[float | None]]:
        """Numbers that were written for each frame, by their names."""
        found: dict[str, list[float | None]] = {}
        stored = self._stored_numbers()
        for name, values in _dict(self.about.get("per_frame")).items():
            if isinstance(values, list) and len(values) == len(stored) and _numbers(values):
                by = {n: float(v) for n, v in zip(stored, values, strict=True) if v is not None}
                found[str(name)] = self.at(by)
        consistency = _dict(self.trust.get("consistency"))
        frames = consistency.get("frames")
        for name in ("chi_square", "worst_square"):
            values = consistency.get(name)
            if name in found or not isinstance(values, list) or not isinstance(frames, list):
                continue
            if len(values) == len(frames) and _numbers(values):
                by = {
                    int(n): float(v) for n, v in zip(frames, values, strict=True) if v is not None
                }
                found[name] = self.at(by)
        return found

    @property
    def flagged(self) -> list[int]:
        """Indices of the frames that contradict the measurement."""
        wrong: set[int] = set()
        for one in _list(_dict(self.trust.get("consistency")).get("contradicts")):
            wrong.add(_integer(one.get("frame") if isinstance(one, dict) else one, -1))
        stored = self._stored_numbers()
        for name, values in _dict(self.about.get("per_frame")).items():
            if str(name).startswith(("contradict", "flag")) and isinstance(values, list):
                wrong |= {n for n, v in zip(stored, values, strict=False) if v}
        return [k for k, number in enumerate(self.numbers.tolist()) if number in wrong]

    def _stored_numbers(self) -> list[int]:
        frames = _dict(self.about.get("frames"))
        count, *_ = [*_list(frames.get("shape")), len(self.numbers)]
        first = _integer(frames.get("first_frame"))
        return list(range(first, first + _integer(count)))


def is_result(path: Path) -> bool:
    """Whether a path is a reconstruction rather than the folder of a run: a file, or a folder of
    frames."""
    return path.is_file() or path.suffix == ".zarr" or _beside(path).is_file()


def open_result(path: Path, sources: bool = True) -> Result:
    """Open a reconstruction and what is there of all it came from.

    Args:
        sources: read and join the two cameras' recordings, too.

    Raises:
        InputError: the frames cannot be read.
    """
    try:
        recording = open_camera_file(path)
    except InputError:  # frames of NaN where one is missing, or a file that is cut off
        recording = open_camera_file(path, missing=True)
    about = _read(_beside(path))
    trust = _read(path.with_name(f"{path.stem}-trust.json"))
    if trust.get("result", path.name) != path.name:
        logger.warning("%s-trust.json is that of %s: left out", path.stem, trust["result"])
        trust = {}
    frames = _dict(about.get("frames"))
    places = np.rint(recording.taken()).astype(int)
    count, *_ = [*_list(frames.get("shape")), None]
    if frames and count not in (len(recording), int(places[-1]) + 1):
        logger.warning("%s: was changed since %s was written", path, _beside(path).name)
        about, frames = {}, {}
    numbers = (places if recording.numbers is not None else np.arange(len(recording))) + _integer(
        frames.get("first_frame")
    )
    if not frames and isinstance(shown := _dict(trust.get("consistency")).get("frames"), list):
        numbers = np.array(shown, int) if len(shown) == len(recording) else numbers
    material, absent = None, ""
    if sources:
        material, absent = _material(path, about, recording)
        if material is not None and material.places is None and numbers[-1] >= len(material.lr):
            material, absent = None, f"the fast recording ends before frame {numbers[-1]}"
    return Result(
        path,
        recording,
        about,
        trust,
        material,
        absent,
        _uncertainty(path, trust),
        _maps(path, about),
        numbers,
    )


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read(path: Path) -> dict[str, Any]:
    """A file of ours beside a result; empty if there is none, or it is damaged."""
    if not path.is_file():
        return {}
    try:
        tree = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        logger.warning("%s: cannot be read (%s): left out", path, error)
        return {}
    return _dict(tree)


def _material(
    path: Path, about: dict[str, Any], recording: Recording
) -> tuple[Material | None, str]:
    """The sources, joined as they were; or why they are not there."""
    sources = _sources(about)
    if not sources:
        return None, f"{_beside(path).name}, which names the two recordings, is not there"
    settings = _dict(about.get("settings"))
    by_role = {str(one.get("role")): one for one in sources}
    try:
        missing = [one for one in sources if _found(path, one) is None]
        if missing:
            return None, f"{missing[0].get('path')} is not there any more"
        source: CameraFiles | CorpusRecording
        if "recording of a corpus" in by_role:
            one = by_role["recording of a corpus"]
            gap = settings.get("gap")
            source = CorpusRecording(_found(path, one), str(one.get("recording")), gap)
        elif {"lr", "hr"} <= by_role.keys():
            source = _camera_files(path, by_role, settings, about.get("registration"))
        else:
            return None, f"{_beside(path).name} names no two cameras"
        return _joined(source, about, recording.shape[1:])
    except (InputError, ValueError, TypeError, KeyError) as error:
        return None, str(error)


def _joined(
    source: CameraFiles | CorpusRecording, about: dict[str, Any], size: tuple[int, ...]
) -> tuple[Material | None, str]:
    name, why = str(_dict(about.get("method")).get("name") or "bicubic"), ""
    for what, scale in ((name, None), ("bicubic", None), *(("bicubic", side) for side in SCALES)):
        try:  # the weights may be gone: any method reads the sources, if it has the scale
            method = open_method(what, torch.device("cpu"))
            if scale is not None:
                method = replace(method, config=Config(data=Data(scale=scale)))
            material = material_of(method, source)
        except InputError as error:
            why = why or str(error)
            continue
        if tuple(material.keys.shape) == tuple(size):
            return material, ""
    return None, why or f"no key frames of {size[0]} x {size[1]} pixels come of the sources"


def _camera_files(
    path: Path, by_role: dict[str, Any], settings: dict[str, Any], registration: Any
) -> CameraFiles:
    def camera(role: str) -> CameraReading:
        given = dict(_dict(settings.get(role)))
        for kind in ("flat", "dark"):
            if kind in given:
                given[kind] = _found(path, {"path": given[kind]}) or given[kind]
        return CameraReading(**{**given, "allow_links": tuple(given.get("allow_links") or ())})

    lr, hr = (_found(path, by_role[role]) for role in ("lr", "hr"))
    assert lr is not None and hr is not None
    grey = settings.get("match_grey", True)
    return CameraFiles(
        lr,
        hr,
        camera("lr"),
        camera("hr"),
        Pairing(
            settings.get("gap"),
            float(settings.get("start") or 0.0),
            Registration.model_validate(registration) if registration else None,
            Grey(*map(float, grey)) if isinstance(grey, list) else grey is not False,
        ),
        crop=bool(settings.get("crop")),
    )


def _found(path: Path, source: dict[str, Any]) -> Path | None:
    """The file of a source: where it was, seen from here or from the result's folder, or beside
    the result; None if it is in none of these places."""
    text = str(source.get("path"))
    name, _, dataset = text.partition("::")
    stated = Path(name)
    for place in (stated, path.parent / stated, path.parent / stated.name):
        if place.exists():
            return Path(f"{place}::{dataset}") if dataset else place
    return None


def _uncertainty(path: Path, trust: dict[str, Any]) -> Recording | None:
    name = _dict(trust.get("uncertainty")).get("file")
    file = path.parent / str(name)
    if not name or not file.exists():
        return None
    try:
        return open_camera_file(file)
    except InputError as error:
        logger.warning("%s; left out", error)
        return None


def _maps(path: Path, about: dict[str, Any]) -> dict[str, np.ndarray]:
    """Pictures that were written beside the result."""
    found = {}
    for name, file in _dict(about.get("map_files")).items():
        try:
            found[str(name)] = next(open_camera_file(path.parent / str(file)).values(0, 1))
        except InputError as error:
            logger.warning("%s; left out", error)
    return found


def _sources(about: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in _list(about.get("sources")) if isinstance(one, dict)]


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _integer(value: Any, otherwise: int = 0) -> int:
    return value if isinstance(value, int) else otherwise


def _numbers(values: list[Any]) -> bool:
    return all(
        v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in values
    )
