"""Which datasets of an HDF5 file are the recording: the one that was named, that of DXchange, the
default of NeXus, the numbered parts of a master file, or the only one there is."""

from __future__ import annotations

import re
from typing import NamedTuple

import h5py

from hpc_xvr.data.cameras.hdf5_axes import text
from hpc_xvr.data.cameras.hdf5_links import Files, Found, Place
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

DATA = "exchange/data"
"""Frames of DXchange."""
NUMBERED = re.compile(r"data_?(\d{2,})")
"""Datasets of one recording in a master file: data_000001, data_000002, ..."""
MASK = "pixel_mask"
"""Flags of bad pixels beside the frames of a NeXus detector."""


class FramesDataset(NamedTuple):
    """A dataset of frames that was found."""

    name: str
    """In the file that the user named."""
    place: Place
    routes: tuple[tuple[Place, str], ...]
    """Groups that hold it, or a link to it, and its name there."""


def choose(files: Files, name: str | None) -> list[FramesDataset]:
    """The datasets of the recording: one, or the numbered parts."""
    if name is not None:
        found = _at(files, name.strip("/"))
        if found:
            return found
        raise InputError(
            f"{files.path}: has no 2-D or 3-D dataset {name}: choose from "
            f"{_listed(_candidates(files)[0])}"
        )
    if holds_frames(files, files.locate(DATA)):
        return [named(files, DATA)]
    found = _default(files)
    if found:
        return found
    choices, broken = _candidates(files)
    if len(choices) == 1 and not broken:
        return choices[0]
    if broken:
        instead = f"; or choose with --dataset: {_listed(choices)}" if choices else ""
        raise InputError(f"{broken[0].place}{instead}")
    if not choices:
        raise InputError(
            f"{files.path}: holds no 2-D or 3-D dataset of numbers: frames are (H, W) or (frames, "
            "H, W)"
        )
    raise InputError(
        f"{files.path}: holds several datasets, choose one with --dataset: {_listed(choices)}"
    )


def _at(files: Files, name: str) -> list[FramesDataset] | None:
    """The dataset of a name, or what a group of that name holds."""
    place = files.locate(name)
    if place is None:
        return None
    if holds_frames(files, place):
        return [named(files, name)]
    if not isinstance(files.item(place), h5py.Group):
        return None
    found = _signal(files, name)
    if found:
        return found
    inside = [
        key for key in sorted(files.item(place)) if holds_frames(files, files.locate(key, place))
    ]
    return [named(files, f"{name}/{inside[0]}")] if len(inside) == 1 else None


def _default(files: Files) -> list[FramesDataset] | None:
    """What NeXus says is to be shown, if it is a stack of frames.

    Attributes `default` lead there; without them the only entry and its group `data` are it.
    """
    name = ""
    for _ in range(8):
        place = files.locate(name)
        group = None if place is None else files.item(place)
        if not isinstance(group, h5py.Group):
            break
        following = text(group.attrs.get("default"))
        if not following and not name:
            entries = [key for key in list(group) if _is_entry(files, key)]
            following = entries[0] if len(entries) == 1 else ""
        elif not following and "/" not in name and _is_entry(files, name):
            following = "data"
        if not following:
            break
        name = f"{name}/{following.strip('/')}".lstrip("/")
    place = files.locate(name) if name else None
    if place is None:
        return None
    found = [named(files, name)] if holds_frames(files, place) else _signal(files, name)
    if found is None or (len(found) == 1 and files.item(found[0].place).ndim < 3):
        return None
    logger.info("%s: reads %s, the file's default", files.path, _listed([found]))
    return found


def _is_entry(files: Files, name: str) -> bool:
    """Whether a name at the top is an entry; a link that leads nowhere is one by its name."""
    try:
        place = files.locate(name)
    except InputError:
        return name.startswith("entry")
    item = None if place is None else files.item(place)
    if not isinstance(item, h5py.Group):
        return False
    return name.startswith("entry") or text(item.attrs.get("NX_class")) == "NXentry"


def _signal(files: Files, name: str) -> list[FramesDataset] | None:
    """The data of a group: its signal, its numbered parts, or its dataset named data."""
    place = files.locate(name)
    group = None if place is None else files.item(place)
    if not isinstance(group, h5py.Group):
        return None
    signal = text(group.attrs.get("signal"))
    numbered = [key for key in sorted(group) if NUMBERED.fullmatch(key)]
    if signal and signal not in numbered:
        inside = f"{name}/{signal}"
        return [named(files, inside)] if holds_frames(files, files.locate(inside)) else None
    if "data" in group and not signal:
        inside = f"{name}/data"
        return [named(files, inside)] if holds_frames(files, files.locate(inside)) else None
    if not numbered:
        return None
    found = [named(files, f"{name}/{key}") for key in numbered]
    if not all(holds_frames(files, each.place) for each in found):
        return None
    return _in_sequence(files, found)


def _in_sequence(files: Files, found: list[FramesDataset]) -> list[FramesDataset]:
    """Numbered datasets in order.

    Raises:
        InputError: a number is missing.
    """

    def number(each: FramesDataset) -> int:
        match = NUMBERED.fullmatch(each.name.rpartition("/")[2])
        assert match is not None
        return int(match[1])

    found = sorted(found, key=number)
    numbers = [number(each) for each in found]
    first = min(numbers[0], 1)
    for expected, have in enumerate(numbers, first):
        if have != expected:
            raise InputError(
                f"{files.path}: /{found[0].name} and following are one recording, but number "
                f"{expected} is missing: complete it, or choose one with --dataset"
            )
    return found


def _candidates(files: Files) -> tuple[list[list[FramesDataset]], list[Found]]:
    """All recordings in a file, and the links that lead nowhere."""
    broken: list[Found] = []
    found: dict[Place, FramesDataset] = {}
    for name, place in files.datasets():
        if isinstance(place, InputError):
            broken.append(Found(name, place))
        elif holds_frames(files, place) and not (
            name.rpartition("/")[2] == MASK and is_mask(files.item(place))
        ):
            route = _route(files, name)
            known = found.get(place, FramesDataset(name, place, ()))
            found[place] = known._replace(routes=(*known.routes, *route))
    groups: dict[str, list[FramesDataset]] = {}
    for each in found.values():
        folder, _, key = each.name.rpartition("/")
        groups.setdefault(f"{folder}/" if NUMBERED.fullmatch(key) else each.name, []).append(each)
    for name, place in broken:
        folder, _, key = name.rpartition("/")
        if NUMBERED.fullmatch(key) and f"{folder}/" in groups and isinstance(place, InputError):
            raise place
    return [
        _in_sequence(files, group) if len(group) > 1 else group for group in groups.values()
    ], broken


def named(files: Files, name: str) -> FramesDataset:
    place = files.locate(name)
    assert place is not None
    return FramesDataset(name, place, _route(files, name))


def _route(files: Files, name: str) -> tuple[tuple[Place, str], ...]:
    """The group that a name is in, and the group that what it leads to is in."""
    folder, _, key = name.rpartition("/")
    group, place = files.locate(folder), files.locate(name)
    assert group is not None
    assert place is not None
    own, _, own_key = place.name.rpartition("/")
    return (group, key), (Place(place.path, own), own_key)


def holds_frames(files: Files, place: Place | None) -> bool:
    files.close_some()
    item = None if place is None else files.item(place)
    return isinstance(item, h5py.Dataset) and item.ndim >= 2 and item.dtype.kind in "uif"


def _listed(choices: list[list[FramesDataset]]) -> str:
    """Names, of numbered ones the first and the last."""
    names = [
        " to ".join(
            f"/{each.name}" for each in (group if len(group) == 1 else group[:: len(group) - 1])
        )
        for group in choices
    ]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more if names else "none"


def is_mask(item: h5py.Dataset) -> bool:
    """Flags of the pixels of a frame, one a pixel."""
    return item.ndim == 2 and item.dtype.kind in "iu"
