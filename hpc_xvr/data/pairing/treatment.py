"""What ingest does to every file of a run before its frames are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpc_xvr.data.cameras import Recording, open_files, open_recording
from hpc_xvr.data.cameras.flatfield import mean_frame, transmission
from hpc_xvr.data.cameras.source import Source
from hpc_xvr.data.pairing.joining import Pairing, joined
from hpc_xvr.errors import InputError


@dataclass(frozen=True)
class Reading:
    """How a run is told to read its files.

    Args:
        flat, dark: recordings (averaged) for the flat/dark correction; FILE.h5::PATH for a
            dataset. They replace those that a DXchange file holds.
        dataset, flip_rows, bit_depth, full_scale: see cameras.open_recording.
        frame_rate_hz, pixel_size_um, camera: instead of what the files say.
        multiple_of: divisor that height and width must have; `crop` cuts what is too much.
        pairing: how the second camera's streams belong to the recordings.
        lr_flat, lr_dark, lr_dataset, lr_bit_depth: the same for the second camera's files.
    """

    flat: Path | str | None = None
    dark: Path | str | None = None
    dataset: str | None = None
    flip_rows: bool = False
    bit_depth: int | None = None
    full_scale: float | None = None
    frame_rate_hz: float | None = None
    pixel_size_um: float | None = None
    camera: str | None = None
    scene: str | None = None
    multiple_of: int = 4
    crop: bool = False
    pairing: Pairing = field(default_factory=Pairing)
    lr_flat: Path | str | None = None
    lr_dark: Path | str | None = None
    lr_dataset: str | None = None
    lr_bit_depth: int | None = None

    def check(self) -> None:
        """Raises InputError for values that cannot be."""
        for what, value in (("frame rate", self.frame_rate_hz), ("pixel size", self.pixel_size_um)):
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{what} {value}: must be a number above 0")
        if self.multiple_of < 1:
            raise InputError(f"multiple_of {self.multiple_of}: must be a whole number from 1")
        for dark, flat in ((self.dark, self.flat), (self.lr_dark, self.lr_flat)):
            if dark is not None and flat is None:
                raise InputError(f"dark field {dark}: needs a flat field beside it, give one")

    def fingerprint(self, source: Source) -> str:
        """The same for the same files, unchanged, read in the same way."""
        options: dict[str, Any] = {
            "dataset": self.dataset,
            "flat": self.flat and str(self.flat),
            "dark": self.dark and str(self.dark),
            "flip_rows": self.flip_rows,
            "bit_depth": self.bit_depth,
            "full_scale": self.full_scale,
            "crop": self.multiple_of if self.crop else 0,
        }
        if source.lr is not None:
            options["lr"] = repr(
                (self.pairing, str(self.lr_flat), str(self.lr_dark), self.lr_bit_depth)
            )
        return source.fingerprint(options)

    def treatment(self) -> Treatment:
        """The same with the fields read.

        Raises:
            InputError: a flat or dark field cannot be read.
        """
        told = {
            "camera": self.camera,
            "frame_rate_hz": self.frame_rate_hz,
            "pixel_size_um": self.pixel_size_um,
            "scene": self.scene,
        }
        # Both cameras' transmissions on one scale, so that they can be compared.
        scale = None if self.lr_flat is None else self.full_scale
        return Treatment(
            CameraReading(
                field_of(self.flat),
                field_of(self.dark),
                self.bit_depth,
                self.full_scale,
                self.flip_rows,
            ),
            CameraReading(field_of(self.lr_flat), field_of(self.lr_dark), self.lr_bit_depth, scale),
            self.pairing,
            self.multiple_of,
            self.crop,
            {key: value for key, value in told.items() if value},
        )


def field_of(path: Path | str | None) -> np.ndarray | None:
    """The mean frame of a flat or dark field's file, (H, W)."""
    return None if path is None else mean_frame(open_recording(path, own_flat=False))


@dataclass(frozen=True)
class CameraReading:
    """How the files of one camera are read; `light` and `shade` are its mean fields (H, W)."""

    light: np.ndarray | None = None
    shade: np.ndarray | None = None
    bit_depth: int | None = None
    full_scale: float | None = None
    flip_rows: bool = False

    def open(self, source: Source) -> Recording:
        """The recording, corrected."""
        # A full scale is the transmission's where a flat field is given, else the file's own.
        recording = open_files(
            source.files,
            dataset=source.dataset,
            own_flat=self.light is None,
            bit_depth=self.bit_depth,
            full_scale=self.full_scale if self.light is None else None,
        )
        if self.light is not None:
            recording = transmission(recording, self.light, self.shade, self.full_scale)
        return recording.flipped() if self.flip_rows else recording


@dataclass(frozen=True)
class Treatment:
    """What is the same for all files of a run; `told` replaces what the files say of themselves
    (camera, frame_rate_hz, pixel_size_um, scene)."""

    camera: CameraReading = CameraReading()
    lr_camera: CameraReading = CameraReading()
    pairing: Pairing = field(default_factory=Pairing)
    multiple_of: int = 4
    crop: bool = False
    told: dict[str, Any] = field(default_factory=dict)

    def open(self, source: Source) -> tuple[Recording, Recording | None, dict[str, Any]]:
        """Sharp and fast frames as they are stored, and VideoInfo's fields about them.

        Raises:
            InputError: a file cannot be read, or does not fit the other one or the options.
        """
        recording = self.camera.open(source)
        fast, second = None, {}
        if source.lr is None:
            recording = _fitted(recording, self.multiple_of, self.crop)
        else:
            recording, fast, second = joined(
                recording,
                self.lr_camera.open(source.lr),
                self.pairing,
                self.multiple_of,
                self.crop,
                self.told.get("frame_rate_hz"),
            )
        info = {
            "camera": recording.camera,
            "frame_rate_hz": recording.frame_rate_hz,
            "pixel_size_um": recording.pixel_size_um,
            "exposure_s": recording.exposure_s,
            "bit_depth": recording.bit_depth,
            "scene": "unknown",
            "source": source.name,
            "full_scale": recording.full_scale,
            **second,
            **self.told,
        }
        about = {"source_folder": source.folder}
        if source.dataset:
            about["dataset"] = source.dataset
        if source.lr is not None:
            about["lr_source"] = source.lr.name
        info["metadata"] = {**recording.metadata, **second.get("metadata", {}), **about}
        return recording, fast, info


def _fitted(recording: Recording, multiple_of: int, crop: bool) -> Recording:
    height, width = recording.shape[1:]
    fit = height - height % multiple_of, width - width % multiple_of
    if fit == (height, width):
        return recording
    if min(fit) == 0 or not crop:
        how = "" if min(fit) == 0 else f": pass --crop to cut them to {fit[0]} x {fit[1]}"
        raise InputError(
            f"{recording.path}: frames of {height} x {width} pixels are no multiples "
            f"of {multiple_of}{how}"
        )
    return recording.cut(*fit)
