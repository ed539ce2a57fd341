"""What is stored beside the frames of a result: their units, and what made them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hpc_xvr.data.cameras import results
from hpc_xvr.text import printable
from hpc_xvr.version import __version__

FULL = 65535


@dataclass(frozen=True)
class Calibration:
    """Units of a sequence's times, lengths and intensities; what is unknown is None."""

    frame_rate_hz: float | None = None
    pixel_size_um: float | None = None
    full_scale: float = 1.0
    """Physical value (for example transmission) of intensity 1, stored as 65535."""
    unit: str = ""
    """Of `full_scale`: counts of the sharp camera, or empty for transmissions and the unit of a
    floating-point file."""
    times_s: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Time of each frame of the fast recording from its first one, where it has time stamps."""
    notes: tuple[str, ...] = ()
    """What was done to the recordings beforehand, a line each."""
    bit_depth: int | None = None
    """Of the sharp camera's counts; None: its values are floats."""


UNKNOWN = Calibration()


@dataclass
class Provenance:
    """What made a result, stored in it and in `<out>.json` beside it.

    It is read after the last frame, so `per_frame`, `maps` and `extra` may be filled while frames
    are made. Values that are not finite become null in the texts. A future or thread behind a value
    has `result()`, which is waited for.
    """

    command: str = ""
    """The command line, see `command_line`."""
    method: dict[str, Any] = field(default_factory=dict)
    """Name, title, step, hash of the weights."""
    settings: dict[str, Any] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Files, each with path, bytes and sha256."""
    registration: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Plain values of any kind, such as scores and flags of the whole."""
    per_frame: dict[str, Any] = field(default_factory=dict)
    """Name -> one number or text a frame, in the order of the frames."""
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    """Name -> picture (H, W) of floats. HDF5, NeXus and OME-Zarr hold them; beside other formats
    they are files `<out>.NAME.tif`."""

    def origin(self) -> dict[str, Any]:
        """What made it of what, in values of JSON."""
        return {
            "command": printable(self.command),
            "method": plain(self.method),
            "settings": plain(self.settings),
            "sources": plain(self.sources),
            "registration": plain(self.registration),
        }


@dataclass
class Result:
    """What a format's writer is given: numbers as they are stored, and what they mean."""

    path: Path
    """As the user named it, for messages."""
    frames: Iterator[np.ndarray]
    """(H, W) of `kind`, one after the other, once."""
    shape: tuple[int, int, int]
    kind: np.dtype[Any]
    calibration: Calibration
    first_frame: int
    stored_full_scale: int | None
    about: Provenance

    @cached_property
    def times_s(self) -> np.ndarray | None:
        """Of each frame, from the first frame of the fast recording; None: no rate is known."""
        first, stop = self.first_frame, self.first_frame + self.shape[0]
        times, rate = self.calibration.times_s, self.calibration.frame_rate_hz
        if times is not None:
            return np.asarray(times, np.float64)[first:stop]
        return np.arange(first, stop) / rate if rate else None

    @property
    def said(self) -> results.Frames:
        """What readers need to know."""
        calibration = self.calibration
        return results.Frames(
            self.shape,
            self.kind.name,
            calibration.full_scale,
            self.stored_full_scale,
            calibration.unit,
            calibration.frame_rate_hz,
            calibration.pixel_size_um,
            self.first_frame,
            self.times_s if calibration.times_s is not None else None,
            tuple(map(printable, calibration.notes)),
        )

    def text(self, **more: Any) -> str:
        """The JSON text of the result; to be asked for after the last frame."""
        about = {
            "version": __version__,
            **self.about.origin(),
            "extra": plain(self.about.extra),
            "per_frame": self.per_frame(),
            "maps": sorted(self.about.maps),
            **more,
        }
        return results.document(self.said, about)

    def per_frame(self) -> dict[str, list[Any]]:
        """The values a frame, checked.

        Raises:
            ValueError: not one value a frame.
        """
        found = {}
        for name, values in self.about.per_frame.items():
            listed = plain(values)
            if not isinstance(listed, list) or len(listed) != self.shape[0]:
                raise ValueError(f"per_frame {name}: not one value for each of {self.shape[0]}")
            found[printable(name)] = listed
        return found

    def maps(self) -> dict[str, np.ndarray]:
        """The maps as float32, checked.

        Raises:
            ValueError: another size than the frames, or a name that is none for a file.
        """
        found = {}
        for name, values in self.about.maps.items():
            one = np.asarray(values, np.float32)
            if one.shape != self.shape[1:] or not name.replace("_", "a").isalnum():
                raise ValueError(f"map {name}: has the shape {one.shape}, frames {self.shape[1:]}")
            found[name] = one
        return found

    def meaning(self) -> str:
        """A line on what the stored numbers mean."""
        unit = printable(self.calibration.unit)
        if self.stored_full_scale is None:
            return f"values: {unit or 'physical, as the recordings'}"
        white = f"{self.calibration.full_scale:g} {unit}".rstrip()
        return f"value of {self.stored_full_scale}: {white}"


def plain(value: Any) -> Any:
    """Values of JSON: numbers of numpy as Python's, paths and others as printable text, what is
    not finite as None."""
    if hasattr(value, "result"):
        value = value.result()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {printable(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return printable(value)
