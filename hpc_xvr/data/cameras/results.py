"""What results of this program say of their frames: one JSON text, the same in every format.

Writers store it where a format keeps texts (ImageJ's info, OME's description, a file beside images,
attributes of Zarr), readers take from it what the format itself cannot say. It is believed only
where the frames are those it was written for: other programs keep texts when they change pictures.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpc_xvr.log import logger
from hpc_xvr.text import parse_json

PROGRAM = "hpc_xvr"
STAMPS = "time stamps"
"""Where HDF5's axis of time comes from, if not from the frame rate."""
ABOUT = "about.json"
"""The text in a folder of images."""
_START = re.compile(rf'\{{\s*"program":\s*"{PROGRAM}"')
SAME = 1e-5
"""Relative difference up to which two numbers are one; TIFF keeps resolutions as fractions."""


@dataclass(frozen=True)
class Frames:
    """The frames of a result: numbers as they are stored, and what they mean. Unknown is None."""

    shape: tuple[int, int, int]
    dtype: str
    full_scale: float = 1.0
    """Physical value of intensity 1, in `unit`."""
    stored_full_scale: int | None = None
    """The integer that stands for it; None: floats, which are physical values."""
    unit: str = ""
    frame_rate_hz: float | None = None
    pixel_size_um: float | None = None
    first_frame: int = 0
    """Number of the first frame in the fast recording."""
    times_s: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Of each frame, from the first frame of the fast recording, where that has time stamps."""
    notes: tuple[str, ...] = ()

    @property
    def counts_bits(self) -> int | None:
        """Bits of a camera's counts that are stored as they are; None: something else is stored."""
        top = self.stored_full_scale
        if top is None or top != self.full_scale or top & (top + 1):
            return None
        return top.bit_length()

    @property
    def slope(self) -> float | None:
        """What stored integers are multiplied by to be physical; None: they are, or are counts."""
        if self.stored_full_scale is None or self.counts_bits:
            return None
        return self.full_scale / self.stored_full_scale

    def fields(self) -> dict[str, Any]:
        """Of a recording: rate, pixel size, and times from the first frame."""
        times = self.times_s
        found = {
            "frame_rate_hz": self.frame_rate_hz,
            "pixel_size_um": self.pixel_size_um,
            "times_s": None if times is None else times - times[0],
        }
        return {name: value for name, value in found.items() if value is not None}

    def metadata(self) -> dict[str, Any]:
        """The unit, where it has a name."""
        return {"unit": self.unit} if self.unit else {}

    def described(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "full_scale": self.full_scale,
            "stored_full_scale": self.stored_full_scale,
            "unit": self.unit,
            "frame_rate_hz": self.frame_rate_hz,
            "pixel_size_um": self.pixel_size_um,
            "first_frame": self.first_frame,
            "times_s": None if self.times_s is None else self.times_s.tolist(),
            "notes": list(self.notes),
        }


def stated_by(
    text: str | None, where: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Frames | None:
    """What a text says of frames (T, H, W) of `dtype`; None if it is not ours, or of others.

    Warns of a text of ours that is damaged or does not belong to these frames.
    """
    start = _START.search(text or "")
    if not text or start is None:
        return None
    try:
        document = parse_json(text[start.start() : text.rfind("}") + 1])
        if not isinstance(document, dict) or document.get("program") != PROGRAM:
            return None
        frames = _frames(document["frames"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        logger.warning("%s: what it says of its own origin is damaged (%s): not used", where, error)
        return None
    if (frames.shape, frames.dtype) != (tuple(shape), dtype.name):
        logger.warning(
            "%s: was changed by another program since this one wrote it (%s %s then, %s %s now): "
            "what it said of times, bits and full scale then is not used",
            *(where, _size(frames.shape), frames.dtype, _size(shape), dtype.name),
        )
        return None
    return frames


def merged(native: dict[str, Any], said: Frames, where: str) -> dict[str, Any]:
    """Fields of a recording: what the format itself says, and of our text what it does not.

    Warns of a number that was changed since; the format's own counts. A rate that a reader made of
    our own time stamps is not such a change.
    """
    fields = said.fields()
    if _are_ours(native.get("times_s"), said):
        derived = ("times_s", "frame_rate_hz")
        native = {name: value for name, value in native.items() if name not in derived}
    for name, value in native.items():
        ours = fields.get(name)
        if isinstance(value, float) and ours and not math.isclose(value, ours, rel_tol=SAME):
            logger.warning(
                "%s: its %s was changed by another program: %g is used", where, name, value
            )
            fields[name] = value
            if name == "frame_rate_hz":
                fields.pop("times_s", None)
    metadata = native.get("metadata", {})
    return {**native, **fields, "metadata": {**metadata, **said.metadata()}}


def _are_ours(stamps: np.ndarray | None, said: Frames) -> bool:
    """Are these time stamps of a file those that it was given? Equal steps where it had none."""
    if stamps is None or said.frame_rate_hz is None:
        return False
    ours = said.fields().get("times_s")
    if ours is None:
        ours = np.arange(said.shape[0]) / said.frame_rate_hz
    return stamps.shape == ours.shape and np.allclose(
        stamps, ours, rtol=SAME, atol=SAME / said.frame_rate_hz
    )


def document(frames: Frames, about: dict[str, Any]) -> str:
    """The text: `about` (plain values) and the frames, a line each."""
    content = {"program": PROGRAM, **about, "frames": frames.described()}
    lines = (f'"{key}": {json.dumps(value, allow_nan=False)}' for key, value in content.items())
    return "{{\n {}\n}}".format(",\n ".join(lines))


def _frames(said: dict[str, Any]) -> Frames:
    shape = tuple(int(n) for n in said["shape"])
    times = said.get("times_s")
    stored = said.get("stored_full_scale")
    found = None if times is None else np.asarray(times, np.float64)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"a shape {list(shape)}")
    if found is not None and not (
        found.shape == shape[:1] and np.isfinite(found).all() and (np.diff(found) > 0).all()
    ):
        raise ValueError("times that are not one a frame, and rising")
    if stored is not None and not 1 <= int(stored) <= 65535:
        raise ValueError(f"a largest number {stored}")
    rate, pixel = (said.get(name) for name in ("frame_rate_hz", "pixel_size_um"))
    return Frames(
        (shape[0], shape[1], shape[2]),
        str(said["dtype"]),
        _number(said["full_scale"]),
        None if stored is None else int(stored),
        str(said.get("unit", "")),
        None if rate is None else _number(rate),
        None if pixel is None else _number(pixel),
        int(said.get("first_frame", 0)),
        found,
    )


def _number(value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{value} where a number above 0 belongs")
    return number


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
