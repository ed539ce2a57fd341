"""Time stamps: they decide when a frame was taken, and at which rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hpc_xvr.log import logger


def frame_times(path: Path, stamps: np.ndarray) -> np.ndarray | None:
    """Seconds from the first frame, (T,) float64; None, with a warning, of stamps that are not
    numbers or do not rise.

    Warns where they jump.

    Args:
        stamps: seconds from any instant, (T,).
    """
    if len(stamps) < 2 or (stamps == stamps[0]).all():
        return None
    if not np.isfinite(stamps).all():
        k = int(np.flatnonzero(~np.isfinite(stamps))[0])
        logger.warning(
            "%s: the time stamp of frame %d is %g: they are not used, and all frames are taken as "
            "equally spaced in time",
            *(path, k, stamps[k]),
        )
        return None
    steps = np.diff(stamps)
    late = np.flatnonzero(steps <= 0)
    if len(late):
        k = int(late[0])
        logger.warning(
            "%s: time stamps %s after frame %d: they are not used, and all frames are taken as "
            "equally spaced in time",
            *(path, "run backwards" if steps[k] < 0 else "stand still", k),
        )
        return None
    typical = _typical(steps)
    odd = np.flatnonzero(np.abs(steps - typical) > 0.5 * typical)
    if len(odd):
        k = int(odd[0])
        others = f", and at {len(odd) - 1} more places" if len(odd) > 1 else ""
        logger.warning(
            "%s: time stamps jump after frame %d: %g s to the next frame instead of %g s%s: "
            "frames were lost, or the frame rate changed",
            *(path, k, steps[k], typical, others),
        )
    times: np.ndarray = np.asarray(stamps - stamps[0], float)
    return times


def rate_of(path: Path, times: np.ndarray, stated: float | None) -> float:
    """Frames a second by the times of the frames; a recording saved every n-th frame has the rate
    that its header states / n. Warns where that states another."""
    steps = np.diff(times)
    typical = _typical(steps)
    interval = float(steps[np.abs(steps - typical) <= 0.5 * typical].mean())
    if stated is None:
        return 1 / interval
    step = max(1, round(interval * stated))
    if abs(interval * stated - step) <= 0.01 * step:
        return stated / step
    logger.warning(
        "%s: its header states %g frames a second, its time stamps %g: the latter is taken",
        *(path, stated, 1 / interval),
    )
    return 1 / interval


def _typical(steps: np.ndarray) -> float:
    """The median, or of an even number of steps the lower one of the two in the middle."""
    return float(np.quantile(steps, 0.5, method="lower"))
