"""Look at a reconstruction in napari, which reads frames when they are shown."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.result import Result, open_result
from hpc_xvr.log import logger

HELD = 16
"""Frames of a layer that are kept in memory."""
LOOKED_AT = 5
"""Frames whose grey levels set the contrast."""


class Frames:
    """Frames (T, H, W) that are read when they are asked for, as an array of float32."""

    dtype = np.dtype(np.float32)
    ndim = 3

    def __init__(self, shape: tuple[int, int, int], read: Callable[[int], np.ndarray]) -> None:
        self.shape = shape
        self.read = lru_cache(maxsize=HELD)(read)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        key = key if isinstance(key, tuple) else (key,)
        times = np.arange(self.shape[0])[key[0]]
        if np.ndim(times) == 0:
            return self.read(int(times))[key[1:]]
        return np.stack([self.read(int(t))[key[1:]] for t in times])

    def limits(self) -> tuple[float, float]:
        """Grey levels between which nearly all values lie."""
        chosen = np.unique(np.linspace(0, len(self) - 1, LOOKED_AT).round().astype(int))
        low, high = np.quantile(np.stack([self.read(int(t)) for t in chosen]), (0.001, 0.999))
        return float(low), float(high if high > low else low + 1)


def layers_of(result: Result) -> dict[str, tuple[Frames, float]]:
    """Name -> frames, and the side of their pixels in pixels of the result, from the bottom up."""
    recording, material = result.recording, result.material
    found: dict[str, tuple[Frames, float]] = {}
    if material is not None:
        white = np.float32(material.calibration.full_scale)
        lr = material.lr
        shape = (len(recording), *lr.shape[1:])
        fast = Frames(shape, lambda k: np.asarray(lr[result.time_of(k)] * white, np.float32))
        found["fast camera"] = fast, recording.shape[1] / lr.shape[1]
    for name, frames in (("reconstruction", recording), ("uncertainty", result.uncertainty)):
        if frames is not None:

            def read(k: int, frames: Any = frames) -> np.ndarray:
                return np.asarray(next(frames.values(k, k + 1)), np.float32)

            found[name] = Frames(frames.shape, read), 1.0
    return found


def add_layers(viewer: Any, result: Result) -> None:
    """Show all there is of a result; the uncertainty is hidden at first."""
    pixel = result.recording.pixel_size_um or 1.0
    for name, (frames, side) in layers_of(result).items():
        viewer.add_image(
            frames,
            name=name,
            contrast_limits=frames.limits(),
            multiscale=False,
            rgb=False,
            scale=(1.0, pixel * side, pixel * side),
            translate=(0.0, pixel * (side - 1) / 2, pixel * (side - 1) / 2),
            units=("pixel", "um", "um") if result.recording.pixel_size_um else None,
            colormap="magma" if name == "uncertainty" else "gray",
            interpolation2d="nearest",
            visible=name != "uncertainty",
        )
    viewer.dims.axis_labels = ("frame", "y", "x")
    if result.recording.pixel_size_um:
        viewer.scale_bar.visible = True


def view(path: Path) -> None:
    """Open a reconstruction in napari and wait until its window is closed.

    Raises:
        InputError: napari is not installed, there is no screen, or the frames cannot be read.
    """
    instead = f"`hpc-xvr report {path}` makes a page for any browser"
    try:
        napari = importlib.import_module("napari")
    except ImportError:
        raise InputError(
            f"view: needs napari, which is not installed: pip install 'hpc_xvr[view]'; {instead}"
        ) from None
    screen = {"DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"} & os.environ.keys()
    if sys.platform == "linux" and not screen:
        raise InputError(f"view: there is no screen here (DISPLAY is not set); {instead}")
    result = open_result(path)
    if result.absent:
        logger.warning("%s: shown without the two cameras' frames: %s", path, result.absent)
    add_layers(napari.Viewer(title=path.name), result)
    napari.run()
