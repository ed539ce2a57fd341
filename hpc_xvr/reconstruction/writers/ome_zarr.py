"""OME-Zarr 0.5 (Zarr v3): one image with the axes t, y, x, a chunk a frame, some frames a file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from hpc_xvr.data.cameras.results import PROGRAM
from hpc_xvr.reconstruction.writers.about import Result
from hpc_xvr.text import printable

VERSION = "0.5"
_CODE = re.compile(r"os_error_code='(\d+)'")
SHARD_BYTES = 2**25
"""Of the frames that are written at once, to one file."""


def write(path: Path, result: Result) -> None:
    """Write the frames to array 0, and what they mean to the group's attributes.

    Raises:
        OSError: the disk refuses.
    """
    try:
        _write(path, result)
    except (ValueError, RuntimeError) as error:  # tensorstore's, with the system's in the text
        if found := _CODE.search(str(error)):
            raise OSError(code := int(found[1]), os.strerror(code)) from None
        raise


def _write(path: Path, result: Result) -> None:
    count, height, width = result.shape
    per_frame = result.kind.itemsize * height * width
    together = max(1, min(count, SHARD_BYTES // per_frame))
    array = _create(path / "0", result.shape, result.kind, together, ("t", "y", "x"))
    batch, start = [], 0
    for number, frame in enumerate(result.frames, 1):
        batch.append(frame)
        if len(batch) == together or number == count:
            array[start:number].write(np.stack(batch)).result()
            batch, start = [], number
    for name, picture in result.maps().items():
        _create(path / f"map_{name}", picture.shape, picture.dtype, 0, ("y", "x")).write(
            picture
        ).result()
    attributes = {"ome": _ome(result), PROGRAM: json.loads(result.text())}
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (path / "zarr.json").write_text(json.dumps(group, indent=1, allow_nan=False))


def _create(
    path: Path, shape: tuple[int, ...], kind: np.dtype[Any], together: int, names: tuple[str, ...]
) -> Any:
    """An array of chunks of a frame, `together` of them in a file; 0: one chunk."""
    inner: list[dict[str, Any]] = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {
            "name": "blosc",
            "configuration": {
                "cname": "zstd",
                "clevel": 1,
                "shuffle": "shuffle",
                "typesize": kind.itemsize,
                "blocksize": 0,
            },
        },
        {"name": "crc32c"},  # a frame that was damaged is found when it is read
    ]
    chunk = list(shape[-2:])
    codecs = inner
    if together:
        chunk = [together, *chunk]
        codecs = [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, *shape[-2:]],
                    "codecs": inner,
                    "index_codecs": [
                        {"name": "bytes", "configuration": {"endian": "little"}},
                        {"name": "crc32c"},
                    ],
                    "index_location": "end",
                },
            }
        ]
    return tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(path.resolve())},
            "metadata": {
                "shape": list(shape),
                "data_type": kind.name,
                "dimension_names": list(names),
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "fill_value": 0,
                "codecs": codecs,
            },
            # Frames that are all 0 are written too: a chunk that is missing is one that was lost.
            "store_data_equal_to_fill_value": True,
        },
        create=True,
    ).result()


def _ome(result: Result) -> dict[str, Any]:
    calibration = result.calibration
    rate, pixel, times = calibration.frame_rate_hz, calibration.pixel_size_um, result.times_s
    step, start = (1 / rate if rate else 1.0), float(result.first_frame)
    if rate:
        start = result.first_frame / rate if times is None else float(times[0])
    space = {"type": "space", **({"unit": "micrometer"} if pixel else {})}
    side = pixel or 1.0
    top = result.stored_full_scale
    white = float(top) if top is not None else calibration.full_scale
    return {
        "version": VERSION,
        "multiscales": [
            {
                "name": printable(result.path.name),
                "axes": [
                    {"name": "t", "type": "time", **({"unit": "second"} if rate else {})},
                    {"name": "y", **space},
                    {"name": "x", **space},
                ],
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": [
                            {"type": "scale", "scale": [step, side, side]},
                            {"type": "translation", "translation": [start, 0.0, 0.0]},
                        ],
                    }
                ],
            }
        ],
        "omero": {
            "channels": [
                {
                    "active": True,
                    "color": "FFFFFF",
                    "label": result.meaning(),
                    "window": {"min": 0.0, "max": white, "start": 0.0, "end": white},
                }
            ],
            "rdefs": {"model": "greyscale"},
        },
    }


def is_result(path: Path) -> bool:
    """Whether a folder holds such a result and nothing else."""
    try:
        group = json.loads((path / "zarr.json").read_text())
        ours = group["attributes"][PROGRAM]["program"] == PROGRAM
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(ours) and all(
        entry.name in ("zarr.json", "0") or entry.name.startswith("map_")
        for entry in path.iterdir()
    )
