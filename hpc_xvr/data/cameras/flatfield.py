"""Flat/dark correction: transmission = (raw - dark) / (flat - dark)."""

from __future__ import annotations

import numpy as np

from hpc_xvr.data.cameras.recording import Recording
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

FULL_SCALE = 1.5
"""Transmission of the largest stored value: phase-contrast edges and noise exceed 1."""


def mean_frame(recording: Recording) -> np.ndarray:
    """Average over all frames, (H, W) float64, in the file's own unit."""
    total = np.zeros(recording.shape[1:])
    for frame in recording.values():
        total += frame
    return total / recording.shape[0]


def transmission(
    recording: Recording,
    flat: np.ndarray,
    dark: np.ndarray | None = None,
    full_scale: float | None = None,
) -> Recording:
    """The recording divided by its flat field, as uint16 of 0..full_scale.

    Pixels without light, where the flat field exceeds the dark one by less than 1 % of what it
    does elsewhere, become 0.

    Args:
        flat, dark: (H, W) averages in the recording's unit; no dark means 0.

    Raises:
        InputError: another shape than the recording's, or a flat field no brighter than the dark
            one.
    """
    shape = recording.shape[1:]
    dark = np.zeros(shape) if dark is None else dark
    for name, field in (("flat", flat), ("dark", dark)):
        if field.shape != shape:
            raise InputError(
                f"{recording.path}: frames are {shape[0]} x {shape[1]} pixels, the "
                f"{name} field is {' x '.join(map(str, field.shape))}: give one "
                "taken with the same camera settings"
            )
    light = flat - dark
    floor = 0.01 * float(np.percentile(light, 99))
    if floor <= 0:
        raise InputError(
            f"{recording.path}: its flat field is not brighter than its dark field: "
            "check that the two are not swapped"
        )
    lit = light > floor
    gain = np.where(lit, 1 / np.where(lit, light, 1), 0).astype(np.float32)
    offset = dark.astype(np.float32)
    unlit = int(lit.size - np.count_nonzero(lit))
    if unlit > 0.01 * lit.size:
        logger.warning(
            "%s: %.1f %% of the pixels get no light in the flat field and become 0",
            recording.path,
            100 * unlit / lit.size,
        )
    return recording.changed(
        lambda frame: (frame - offset) * gain,
        dtype=np.dtype(np.uint16),
        bit_depth=16,
        full_scale=FULL_SCALE if full_scale is None else full_scale,
        scale_doubt="",
        scale_measured=False,
        metadata={**recording.metadata, "correction": "flat and dark", "pixels_unlit": unlit},
    )
