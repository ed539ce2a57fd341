"""What `ingest` does to each recording before its frames are stored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hpc_xvr.data.cameras import Recording
from hpc_xvr.data.cameras.recording import runs
from hpc_xvr.data.cameras.source import Source
from hpc_xvr.data.pairing.joining import Pairing, joined
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

LARGEST_STREAM = 2**32
"""Bytes of a second camera's stream: it is held in memory."""


@dataclass(frozen=True)
class Treatment:
    """What is the same for all files of a run.

    Args:
        camera: how the recordings' own, sharp camera is read.
        lr_camera: how the second, fast camera is read.
        pairing: how the second camera's streams fit the recordings.
        multiple_of: height and width must be multiples of this; `crop` cuts the excess.
        scene: what the recordings show.
    """

    camera: CameraReading = field(default_factory=CameraReading)
    lr_camera: CameraReading = field(default_factory=CameraReading)
    pairing: Pairing = field(default_factory=Pairing)
    multiple_of: int = 4
    crop: bool = False
    scene: str | None = None

    def check(self) -> None:
        """Raise InputError for values that are out of range."""
        self.camera.check()
        self.lr_camera.check()
        if "nan" in (self.camera.missing, self.lr_camera.missing):
            raise InputError("--missing nan: a corpus holds no NaN; give --missing skip")
        if self.multiple_of < 1:
            raise InputError(f"multiple_of {self.multiple_of}: must be a whole number from 1")

    def prepared(self) -> Treatment:
        """The same with its flat and dark fields read, so that worker processes get them.

        Raises:
            InputError: a field cannot be read.
        """
        ready = replace(self, lr_camera=self.lr_camera.on_scale_of(self.camera))
        _ = ready.camera.flat_and_dark, ready.lr_camera.flat_and_dark
        return ready

    def fingerprint(self, source: Source) -> str:
        """A hash that is the same for the same files, unchanged, read in the same way."""
        camera = self.camera
        options: dict[str, Any] = {
            "dataset": camera.dataset,
            "flat": camera.flat and str(camera.flat),
            "dark": camera.dark and str(camera.dark),
            "flip_rows": camera.flip_rows,
            "bit_depth": camera.bit_depth,
            "full_scale": camera.full_scale,
            "crop": self.multiple_of if self.crop else 0,
        }
        if camera.missing:
            options["missing"] = camera.missing
        if source.lr is not None:
            options["lr"] = repr((self.pairing, sorted(self.lr_camera.described().items())))
        return source.fingerprint(options)

    def unbroken(self, source: Source) -> list[Source]:
        """The runs of frames of a recording between those that are missing, as sources of their
        own: no sample reaches across a gap."""
        if not self.camera.missing:
            return [source]
        try:
            numbers = self.camera.open_files(source.files, source.dataset).numbers
        except InputError:
            return [source]  # it will be told where it is read
        if numbers is None:
            return [source]
        found, at = [], 0
        for run in runs(np.rint(numbers).astype(int)):
            found.append(replace(source, frames=(at, at + len(run) - 1)))
            at += len(run)
        if len(found) > 1:
            logger.warning(
                "%s: becomes %d recordings, of the frames between those that are missing",
                *(source.path, len(found)),
            )
        return found

    def open(self, source: Source) -> tuple[Recording, Recording | None, dict[str, Any]]:
        """Sharp and fast frames as they are stored, and VideoInfo's fields about them.

        Raises:
            InputError: a file cannot be read, or does not fit the other one or the options.
        """
        recording = self.camera.open_files(source.files, source.dataset)
        if source.frames is not None:
            first, last = source.frames
            recording = recording.cut(*recording.shape[1:], first=first, last=last)
        fast, second = None, {}
        if source.lr is None:
            recording = _fitted(recording, self.multiple_of, self.crop)
        else:
            fast = self.lr_camera.open_files(source.lr.files, source.lr.dataset)
            pair = joined(recording, fast, self.pairing, self.multiple_of, self.crop)
            if source.frames is not None:
                pair = pair.without_far_frames()
            recording, fast, second = pair.sharp, pair.fast, pair.info()
            if fast.nbytes > LARGEST_STREAM:
                raise InputError(
                    f"{fast.path}: has more than {LARGEST_STREAM >> 30} GB of frames: split it"
                )
        info = {
            "camera": recording.camera,
            "frame_rate_hz": recording.frame_rate_hz,
            "pixel_size_um": recording.pixel_size_um,
            "exposure_s": recording.exposure_s,
            "bit_depth": recording.bit_depth,
            "scene": self.scene or "unknown",
            "source": source.name,
            "full_scale": recording.full_scale,
            **second,
        }
        about: dict[str, Any] = {"source_folder": source.folder}
        if source.dataset:
            about["dataset"] = source.dataset
        if stated := self.camera.described():
            about["reading"] = stated
        if source.lr is not None:
            about["lr_source"] = source.lr.name
            if stated := self.lr_camera.described():
                about["lr_reading"] = stated
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
            f"{recording.path}: frames of {height} x {width} pixels are not multiples "
            f"of {multiple_of}{how}"
        )
    return recording.cut(*fit)
