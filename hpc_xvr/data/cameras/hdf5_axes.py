"""Which axis of an HDF5 dataset is time and which are rows and columns."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import h5py
import numpy as np

from hpc_xvr.data.cameras.hdf5_links import Files, Place
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

Order = tuple[int | None, int, int]
"""Axes of frames, rows and columns; None: there is one frame."""

_WORDS = {
    "x": "x col cols column columns width horizontal",
    "y": "y row rows line lines height vertical",
    "colour": "c channel channels rgb rgba color colour colors colours band bands",
    "time": "t time frame frames theta angle angles rotation image images projection projections "
    "z n nz scan index energy",
}
_ROLES = {word: role for role, words in _WORDS.items() for word in words.split()}
_SHORTEST = 16
"""Rows and columns of a picture whose last axis of 3 or 4 is taken for its colours."""


def axis_order(
    where: str,
    files: Files,
    dataset: h5py.Dataset,
    routes: Iterable[tuple[Place, str]],
    otherwise: Order | None = None,
) -> Order:
    """The axes of frames, rows and columns, as far as the file says; else in this order.

    Args:
        where: the dataset, for messages.
        routes: groups that hold the dataset, or a link to it, and its name there.
        otherwise: the order where the file does not say any.

    Raises:
        InputError: colours, more than three axes, or axes that are in no order we can tell.
    """
    shape = dataset.shape
    _refuse_pictures(where, dataset)
    names = _stated_names(files, dataset, routes)
    if names is not None and len(names) != len(shape):
        logger.warning(
            "%s: names the axes %s, but has %d of them: read as frames, rows, columns",
            *(where, ", ".join(names), len(shape)),
        )
        names = None
    if names is not None:
        return _order_of(where, shape, names)
    if "MATLAB_class" in dataset.attrs:
        return _matlab_order(where, shape)
    if len(shape) == 3 and shape[2] in (3, 4) and min(shape[:2]) >= _SHORTEST:
        raise InputError(
            f"{where}: is {_size(shape)}, a colour picture: convert it to grey frames, as "
            "(H, W) or (frames, H, W)"
        )
    if otherwise:
        return otherwise
    chunks = dataset.chunks
    if len(shape) == 3 and chunks and chunks[:2] == shape[:2] and chunks[2] == 1 < shape[2]:
        raise InputError(
            f"{where}: is {_size(shape)}, in chunks of {_size(chunks)} as if the last axis counted "
            "frames, but does not name its axes: give it the attribute axes, such as y:x:time"
        )
    return _in_turn(_kept(where, shape))


def _order_of(where: str, shape: tuple[int, ...], names: list[str]) -> Order:
    roles = [_role(name, names) for name in names]
    rows, columns = _only(roles, "y"), _only(roles, "x")
    if rows is None or columns is None:
        kept = _kept(where, shape)
        expected = ("time", "y", "x")[-len(kept) :]
        if any(roles[axis] not in (None, role) for axis, role in zip(kept, expected, strict=True)):
            raise InputError(
                f"{where}: has the axes {_listed(shape, names)}, of which rows and columns cannot "
                "be told: store it as frames, rows (y) and columns (x)"
            )
        return _in_turn(kept)
    others = [axis for axis in range(len(shape)) if axis not in (rows, columns)]
    long = [axis for axis in others if shape[axis] != 1]
    if len(long) > 1 or any(roles[axis] == "colour" for axis in long):
        raise InputError(
            f"{where}: has the axes {_listed(shape, names)}: frames have two, rows and columns, "
            "and a recording three"
        )
    frames = long or others  # at most one of them is longer than 1
    order = (frames[0] if frames else None), rows, columns
    if order[-2:] != (len(shape) - 2, len(shape) - 1):
        logger.info(
            "%s: its axes %s are put in the order frames, rows, columns",
            *(where, _listed(shape, names)),
        )
    return order


def _role(name: str, names: list[str]) -> str | None:
    """time, y, x or colour, by the words in a name such as image_x; None if it says nothing.

    A name that is just x or y comes before others with that letter, such as sample_x.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    found = {_ROLES[word] for word in words if word in _ROLES}
    role = next((role for role in ("x", "y", "colour", "time") if role in found), None)
    if role in ("x", "y") and name.lower() != role and role in [n.lower() for n in names]:
        return None
    return role


def _only(roles: list[str | None], role: str) -> int | None:
    return roles.index(role) if roles.count(role) == 1 else None


def _matlab_order(where: str, shape: tuple[int, ...]) -> Order:
    """MATLAB stores rows x columns x frames with its axes reversed."""
    kept = _kept(where, shape)
    frames, columns, rows = _in_turn(kept)
    if frames is not None and shape[frames] == 3:
        raise InputError(
            f"{where}: is {_size(shape[::-1])} in MATLAB, a colour picture or three frames: store "
            "its frames with one axis for the colours less, or one by one"
        )
    logger.warning(
        "%s: MATLAB's %s, read as %s of %d x %d pixels",
        where,
        _size(shape[::-1]),
        "one frame" if frames is None else f"{shape[frames]} frames",
        shape[rows],
        shape[columns],
    )
    return frames, rows, columns


def _kept(where: str, shape: tuple[int, ...]) -> list[int]:
    """At most three axes: those that are left without some of length 1."""
    if len(shape) < 2:
        raise InputError(f"{where}: has the shape {shape}: frames are (H, W) or (frames, H, W)")
    single = [axis for axis, n in enumerate(shape) if n == 1]
    ways: dict[tuple[int, ...], list[int]] = {}
    for dropped in itertools.combinations(single, max(0, len(shape) - 3)):
        kept = [axis for axis in range(len(shape)) if axis not in dropped]
        ways.setdefault(tuple(shape[axis] for axis in kept), kept)
    if len(ways) != 1:
        raise InputError(
            f"{where}: has {len(shape)} axes, {_size(shape)}: frames have two, rows and columns, "
            "and a recording three"
        )
    return next(iter(ways.values()))


def _in_turn(kept: list[int]) -> Order:
    """Frames, rows, columns."""
    return (kept[0] if len(kept) == 3 else None), kept[-2], kept[-1]


def _refuse_pictures(where: str, dataset: h5py.Dataset) -> None:
    """HDF5's own image format: colours, and grey from white to black."""
    about = {name: text(dataset.attrs.get(name)) for name in ("CLASS", "IMAGE_SUBCLASS")}
    if about["CLASS"] != "IMAGE":
        return
    if about["IMAGE_SUBCLASS"] == "IMAGE_TRUECOLOR":
        raise InputError(
            f"{where}: is a colour picture, {_size(dataset.shape)}: convert it to grey"
        )
    white_is_zero = np.asarray(dataset.attrs.get("IMAGE_WHITE_IS_ZERO", 0)).reshape(-1)
    if white_is_zero.size and white_is_zero[0] == 1:
        raise InputError(
            f"{where}: its attribute IMAGE_WHITE_IS_ZERO says that white is 0: store it inverted"
        )


def _stated_names(
    files: Files, dataset: h5py.Dataset, routes: Iterable[tuple[Place, str]]
) -> list[str] | None:
    """Names of the axes: of DXchange and old NeXus at the dataset, of NeXus at its group, of
    ilastik, and HDF5's own labels and scales of dimensions."""
    names = names_in(dataset.attrs.get("axes"))
    if names:
        return names
    for place, name in routes:
        group = files.item(place)
        signals = [
            text(group.attrs.get("signal")),
            *names_in(group.attrs.get("auxiliary_signals")),
        ]
        names = names_in(group.attrs.get("axes"))
        if names and (signals == [""] or name in signals):
            return names
    tags = text(dataset.attrs.get("axistags"))
    if tags.startswith("{"):
        return [str(axis["key"]) for axis in json.loads(tags)["axes"]]
    labels = [_label(dimension) for dimension in dataset.dims]
    return labels if any(labels) else None


def _label(dimension: Any) -> str:
    if dimension.label or not len(dimension):
        return str(dimension.label)
    return str(dimension[0].name or "").rpartition("/")[2]


def names_in(value: Any) -> list[str]:
    """An attribute of strings, or one string of names between colons or commas."""
    if isinstance(value, np.ndarray) and value.size > 1:
        return [text(item) for item in value.reshape(-1)]
    one = text(value).strip("[]() ")
    return [name.strip() for name in re.split("[:,]", one)] if one else []


def text(value: Any) -> str:
    """An attribute as text; what is none becomes "" """
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size == 1 else ""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return value.strip("\0 ") if isinstance(value, str) else ""


def _listed(shape: tuple[int, ...], names: Sequence[str]) -> str:
    return ", ".join(f"{name or '.'} ({n})" for name, n in zip(names, shape, strict=True))


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
