"""How the files of one camera become intensities.

The commands, the Python interface and the metadata of results share this object and its names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from hpc_xvr.data.cameras import Recording, camera_files, open_camera_file, open_files
from hpc_xvr.data.cameras.arrays import ArrayLike, open_array
from hpc_xvr.data.cameras.flatfield import mean_frame, transmission
from hpc_xvr.data.cameras.recording import guarded
from hpc_xvr.errors import InputError

Missing = Literal["skip", "nan"]


@dataclass(frozen=True, kw_only=True)
class CameraReading:
    """How the files of one camera are read; what is None is taken from the files.

    Args:
        dataset: path inside an HDF5 file; also written FILE.h5::PATH.
        flat, dark: recordings without sample and without beam, whose frames are averaged;
            FILE.h5::PATH for a dataset. They replace those that a DXchange file holds.
            Transmission = (raw - dark) / (flat - dark).
        bit_depth: significant bits of integers, if fewer than stored, or other than a cine or
            Photron file states.
        full_scale: physical value that is stored as white, for transmissions (default: 1.5) and
            floating-point files (default: their maximum).
        flip_rows: turn the frames upside down (the row order of Shimadzu cameras differs by
            instrument).
        frame_rate_hz, pixel_size_um, camera: replace what the files say.
        allow_links: folders that HDF5 files may lead into (by links, virtual datasets and raw
            files) beside their own.
        missing: what becomes of frames that are missing or cannot be read: None: an error; skip:
            they are left out, and the others keep their times; nan: the same and, of a fast
            camera, `reconstruct` writes frames of NaN in their place.
    """

    dataset: str | None = None
    flat: Path | str | None = None
    dark: Path | str | None = None
    bit_depth: int | None = None
    full_scale: float | None = None
    flip_rows: bool = False
    frame_rate_hz: float | None = None
    pixel_size_um: float | None = None
    camera: str | None = None
    allow_links: tuple[Path | str, ...] = ()
    missing: Missing | None = None

    def check(self) -> None:
        """Raise InputError for values out of range, or a dark field without a flat one."""
        for what, value in (
            ("frame rate", self.frame_rate_hz),
            ("pixel size", self.pixel_size_um),
            ("full scale", self.full_scale),
        ):
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{what} {value}: must be a number above 0")
        if self.missing not in (None, *get_args(Missing)):
            raise InputError(
                f"missing {self.missing}: must be one of {', '.join(get_args(Missing))}"
            )
        if self.dark is not None and self.flat is None:
            raise InputError(f"dark field {self.dark}: needs a flat field as well: give one")

    @cached_property
    def flat_and_dark(self) -> tuple[np.ndarray, np.ndarray | None] | None:
        """The mean flat and dark fields (H, W), read once; None without a flat field.

        Raises:
            InputError: a field cannot be read, or a dark field is given without a flat one.
        """
        self.check()
        if self.flat is None:
            return None
        flat, dark = (
            None
            if path is None
            else mean_frame(open_camera_file(path, own_flat=False, allow_links=self.allow_links))
            for path in (self.flat, self.dark)
        )
        assert flat is not None
        return flat, dark

    def open(self, source: Path | str | ArrayLike) -> Recording:
        """Open a camera file, a folder or glob of numbered images, or an array of frames
        (T, H, W), and correct it.

        Raises:
            InputError: the file is missing, damaged or of an unknown format, a field has another
                shape, or an option does not apply to the format.
        """
        if not isinstance(source, (str, Path)):
            return self._corrected(
                open_array(source, self.bit_depth, None if self.flat else self.full_scale)
            )
        path = source
        with guarded(str(path)):
            files, inner = camera_files(path, bool(self.missing))
            if inner and self.dataset and inner.strip("/") != self.dataset.strip("/"):
                raise InputError(
                    f"{path}: names a dataset other than {self.dataset}: give only one"
                )
        return self.open_files(files, inner or self.dataset)

    def open_files(
        self, files: Sequence[Path], dataset: str | None, frames: int | None = None
    ) -> Recording:
        """As `open`, for the file or the numbered files of one recording; `frames`: only the first
        ones of an HDF5 file that still grows."""
        # With a flat field the full scale is the transmission's.
        corrects = self.flat_and_dark is not None
        return self._corrected(
            open_files(
                files,
                dataset=dataset,
                own_flat=not corrects,
                bit_depth=self.bit_depth,
                full_scale=None if corrects else self.full_scale,
                allow_links=self.allow_links,
                missing=bool(self.missing),
                frames=frames,
            )
        )

    def _corrected(self, recording: Recording) -> Recording:
        correction = self.flat_and_dark
        if correction is not None:
            recording = transmission(recording, *correction, self.full_scale)
        if self.flip_rows:
            recording = recording.flipped()
        stated = {
            name: value
            for name in ("frame_rate_hz", "pixel_size_um", "camera")
            if (value := getattr(self, name)) is not None
        }
        times, rate = recording.times_s, recording.frame_rate_hz
        if times is not None and rate and self.frame_rate_hz:  # lost frames stay lost
            stated["times_s"] = times * (rate / self.frame_rate_hz)
        recording = replace(recording, **stated)
        if recording.times_s is None and recording.numbers is not None and recording.frame_rate_hz:
            since = recording.numbers - recording.numbers[0]
            return replace(recording, times_s=since / recording.frame_rate_hz)
        return recording

    def on_scale_of(self, other: CameraReading) -> CameraReading:
        """The same with the full scale of another camera if this one has a flat field but no full
        scale, so that the transmissions of the two are comparable."""
        if self.flat is None or self.full_scale is not None:
            return self
        return replace(self, full_scale=other.full_scale)

    def described(self) -> dict[str, Any]:
        """The values that were given, to be stored with what is made from the recording."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["allow_links"] = [str(folder) for folder in self.allow_links]
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in values.items()
            if value not in (None, False, [])
        }
