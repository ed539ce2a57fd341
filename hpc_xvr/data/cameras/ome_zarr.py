"""OME-Zarr 0.5: a folder of Zarr v3 whose attributes describe an image with axes and units."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpc_xvr.data.cameras import results, units
from hpc_xvr.data.cameras.recording import Recording, array_recording, check_shape
from hpc_xvr.errors import InputError
from hpc_xvr.files import check_regular
from hpc_xvr.log import logger
from hpc_xvr.text import parse_json

SUFFIXES = (".zarr",)
HEADER = "zarr.json"
LARGEST_CHUNK = 2**30
"""Bytes; a chunk is decoded as a whole."""
BLOCK = 2**28
"""Bytes that are read at once."""


def is_image(path: Path) -> bool:
    """Whether a folder says that it is an OME-Zarr image of Zarr v3, or 0.4 of Zarr v2."""
    if not path.is_dir():
        return False
    if (
        not (path / HEADER).is_file()
        and (path / ".zattrs").is_file()
        and (path / ".zgroup").is_file()
    ):
        return True
    if not (path / HEADER).is_file():
        return False
    try:
        group = parse_json((path / HEADER).read_text())
        return "multiscales" in group["attributes"]["ome"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_ome_zarr(
    path: Path, bit_depth: int | None = None, full_scale: float | None = None
) -> Recording:
    """Open the largest level of an image as a recording: axes t, y, x; others of length 1.

    Raises:
        InputError: another version, several images, channels or slices, or a damaged file.
    """
    if not (path / HEADER).exists():
        raise InputError(f"{path}: is no OME-Zarr of Zarr v3 (0.5): convert it, or export TIFF")
    check_regular(path / HEADER)
    attributes = parse_json((path / HEADER).read_text())["attributes"]
    images = attributes["ome"]["multiscales"]
    if len(images) != 1:
        raise InputError(f"{path}: holds {len(images)} images: save each as one of its own")
    level = images[0]["datasets"][0]
    array = _open(path, str(level["path"]))
    axes = images[0]["axes"]
    shape, order = _order(path, axes, tuple(map(int, array.shape)))
    check_shape(path, shape)
    native = np.dtype(array.dtype.numpy_dtype)
    most = max(1, BLOCK // (native.itemsize * shape[1] * shape[2]))
    block = min(_frames_together(array, order), most)
    fields = {"metadata": {"format": "OME-Zarr"}, **_scales(path, axes, level, images[0])}
    said = results.stated_by(
        json.dumps(attributes[results.PROGRAM]) if results.PROGRAM in attributes else None,
        *(str(path), shape, native),
    )
    slope = None
    if said is not None:
        fields = results.merged(fields, said, str(path))
        if bit_depth is None:
            bit_depth, slope = said.counts_bits, said.slope
        if bit_depth is None and full_scale is None:
            full_scale = said.full_scale

    def source(start: int, stop: int) -> Iterator[np.ndarray]:
        stack = _open(path, str(level["path"]))
        for begin in range(start, stop, block):
            end = min(begin + block, stop)
            box: list[Any] = [0] * len(order)
            for axis, role in enumerate(order):
                box[axis] = slice(begin, end) if role == "t" else slice(None) if role else 0
            # at most `block` frames in memory; rows and columns come last, time first
            values = stack[tuple(box)].read().result()
            for frame in values.reshape(end - begin, *shape[1:]):
                yield frame if slope is None else frame * slope

    if slope is not None:
        native = np.dtype(np.float64)
    return array_recording(path, shape, native, source, bit_depth, full_scale, **fields)


def _open(path: Path, name: str) -> Any:
    import tensorstore

    inside = (path / name).resolve()
    if path.resolve() not in inside.parents:
        raise InputError(f"{path}: leads to {inside}, which lies outside of it: copy it together")
    check_regular(inside / HEADER)
    array = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(inside)},
            "fill_missing_data_reads": False,
        },
        open=True,
        read=True,
    ).result()
    chunk = array.chunk_layout.read_chunk.shape or ()
    if math.prod(side or 1 for side in chunk) * array.dtype.numpy_dtype.itemsize > LARGEST_CHUNK:
        raise InputError(
            f"{path}: has chunks of more than {LARGEST_CHUNK} bytes: write smaller ones"
        )
    return array


def _order(
    path: Path, axes: list[dict[str, Any]], shape: tuple[int, ...]
) -> tuple[tuple[int, int, int], list[str]]:
    """The size of the frames, and of each axis its role: t, y, x, or "" for one of length 1."""
    names = [str(axis["name"]) for axis in axes]
    listed = ", ".join(f"{name} ({n})" for name, n in zip(names, shape, strict=True))
    roles = [name if name in ("t", "y", "x") else "" for name in names]
    wanted = [role for role in roles if role]
    long = [n for role, n in zip(roles, shape, strict=True) if not role and n != 1]
    if long or wanted not in (["t", "y", "x"], ["y", "x"]):
        raise InputError(
            f"{path}: has the axes {listed}: a recording has t, y, x in this order: save one "
            "channel and one slice as an image of its own"
        )
    size = dict(zip(roles, shape, strict=True))
    return (size.get("t", 1), size["y"], size["x"]), roles


def _frames_together(array: Any, order: list[str]) -> int:
    """Frames to read at once: those of a chunk."""
    chunk = array.chunk_layout.read_chunk.shape
    return max(1, int(chunk[order.index("t")] or 1)) if "t" in order and chunk else 1


def _scales(
    path: Path, axes: list[dict[str, Any]], level: dict[str, Any], image: dict[str, Any]
) -> dict[str, Any]:
    """Frame rate and pixel size, where the axes have units."""
    step = dict.fromkeys((str(axis["name"]) for axis in axes), 1.0)
    for each in (level, image):
        for change in each.get("coordinateTransformations", []):
            if change.get("type") == "scale":
                for name, factor in zip(step, change["scale"], strict=True):
                    step[name] *= float(factor)
    factors = {}
    for axis in axes:
        name, unit = str(axis["name"]), str(axis.get("unit", ""))
        factor = units.factor(unit, "s" if name == "t" else "um") if unit else None
        if factor is not None and 0 < step[name] * factor < math.inf:
            factors[name] = step[name] * factor
    fields: dict[str, Any] = {}
    if "t" in factors:
        fields["frame_rate_hz"] = 1 / factors["t"]
    if "x" in factors and "y" in factors:
        if abs(factors["y"] / factors["x"] - 1) > 0.01:
            logger.warning("%s: its pixels are not square: no pixel size is kept", path)
        else:
            fields["pixel_size_um"] = factors["x"]
    return fields
