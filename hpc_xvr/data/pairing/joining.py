"""Join the recordings of a sharp and a fast camera: one clock, one pixel grid."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_xvr.data.cameras import Recording
from hpc_xvr.data.pairing.agreement import CONTRADICTION, Grey
from hpc_xvr.data.registration import Registration
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

if TYPE_CHECKING:
    from scipy.sparse import csr_array

UNLIKE = 0.1
"""Relative difference between the pixel sizes' ratio and the scale that is worth a warning; lenses
enlarge not quite as much as is written on them."""
ONE_UNIT = 4.0
"""Ratio of the full scales of floating-point files up to which they are taken to have one unit; a
larger one would leave the darker camera few grey levels."""


class TooFew(InputError):
    """There are not enough frames, so far, to join the recordings."""


@dataclass(frozen=True)
class Pairing:
    """How the recordings of the two cameras of a shot fit together.

    Args:
        gap: fast frames from one sharp frame to the next; None: from the frame rates.
        start: time of the first fast frame, in sharp frames from the first one; None: 0.
        registration: where the fast camera's pixels lie on the sharp frames; None: its frames are
            used as they are. Its times hold unless a gap or a start is given.
        match_grey: bring the fast frames to the sharp camera's grey scale where the two differ
            by a gain and an offset (see `agreement`), or by those given here.
    """

    gap: float | None = None
    start: float | None = None
    registration: Registration | None = None
    match_grey: bool | Grey = True
    drift: float = 0.0
    """As in `Timing`."""

    def timed(self, name: str) -> Pairing:
        """The same with gap, start and drift of its registration, as far as none are given; what is
        given and differs is said."""
        time = self.registration.time if self.registration else None
        if self.registration is None or time is None:
            return replace(self, start=self.start or 0.0)
        for given, measured, what in (
            (self.gap, time.gap, "gap"),
            (self.start, time.lr_start, "start"),
        ):
            if given is not None and given != measured:
                logger.warning(
                    "%s: the %s of the registration, %.6g, gives way to the one you state, %.6g",
                    *(name, what, measured, given),
                )
        return replace(
            self,
            gap=time.gap if self.gap is None else self.gap,
            start=time.lr_start if self.start is None else self.start,
            drift=time.drift if self.gap in (None, time.gap) else 0.0,
            registration=self.registration.model_copy(update={"time": None}),
        )


@dataclass(frozen=True)
class Pair:
    """Both recordings of one shot, as `joined` returns them."""

    sharp: Recording
    fast: Recording
    times: np.ndarray
    """Time of each fast frame, in sharp frames from the first one of `sharp`."""
    registration: Registration | None
    origin: dict[str, Any]
    """What the cameras saw before the frames were cut and resampled."""

    def without_far_frames(self) -> Pair:
        """The same without fast frames of a sharp interval and more before or after."""
        near = np.flatnonzero(np.abs(self.times - (last := len(self.sharp) - 1) / 2) < last / 2 + 1)
        fast = self.fast.cut(*self.fast.shape[1:], first=int(near[0]), last=int(near[-1]))
        return replace(self, fast=fast, times=self.times[near])

    def info(self) -> dict[str, Any]:
        """VideoInfo's fields for the second camera."""
        return {
            "lr_times": [round(t, 6) for t in self.times.tolist()],
            "lr_bit_depth": self.fast.bit_depth,
            "registration": self.registration,
            "metadata": self.origin,
        }


def joined(
    sharp: Recording,
    fast: Recording,
    how: Pairing,
    scale: int,
    crop: bool,
    growing: bool = False,
) -> Pair:
    """Put both recordings of one shot on one pixel grid and one clock.

    With a registration, the sharp frames are cut to what the fast camera saw (whole multiples of
    `scale` pixels), and the fast frames are resampled to the grid of those / `scale`. In time, the
    sharp recording is cut to the frames that have a fast frame beside them.

    Args:
        crop: cut what the fast camera did not see, and fast pixels that are only in part on the
            sharp frames; without it that is an error.
        growing: more frames will come; sharp ones behind the fast ones are cut.

    Raises:
        InputError: neither frame rates nor a gap are known, or the recordings do not overlap.
    """
    name = f"{sharp.path} with {fast.path}"
    if how.registration:
        how.registration.check_sizes(name, fast.shape[1:], sharp.shape[1:])
    how = how.timed(name)
    _say_if_sizes_contradict(name, sharp, fast, how.registration)
    times = _times(name, sharp, fast, how)
    first, last = _together(name, times, sharp.shape[0])
    height, width = sharp.shape[1:]
    top, left, view = 0, 0, (height - height % scale, width - width % scale)
    if how.registration:
        top, left, *sides = _field_of_view(how.registration, fast.shape, (height, width), scale)
        view = sides[0], sides[1]
    if min(view) == 0:
        raise InputError(
            f"{name}: the fast camera saw none of the sharp frames: check the registration"
        )
    if (first, last) != (0, sharp.shape[0] - 1) or view != (height, width):
        if not crop and not (growing and first == 0 and view == (height, width)):
            raise InputError(
                f"{name}: together they show sharp frames {first} to {last} of "
                f"{sharp.shape[0]}, rows {top} to {top + view[0]} of {height} and columns {left} "
                f"to {left + view[1]} of {width}: pass --crop to cut the sharp frames to that"
                + _advice(len(times), sharp.shape[0], last)
            )
        fast = _within(fast, (height, width), view, scale) if not how.registration else fast
        sharp = sharp.cut(*view, top=top, left=left, first=first, last=last)
    white = sharp.full_scale
    alike = fast.full_scale < white <= ONE_UNIT * fast.full_scale
    if alike and fast.in_floats() and sharp.in_floats():
        # Both are in one physical unit: one white for both keeps their greys comparable.
        fast = replace(fast, full_scale=white)
    elif fast.full_scale != sharp.full_scale:
        logger.warning(
            "%s: white is %g for the fast camera and %g for the sharp one: correct both with flat "
            "fields, or neither, or state one full scale for both",
            *(name, fast.full_scale, sharp.full_scale),
        )
    about = {
        "lr_camera": fast.camera,
        "lr_frame_rate_hz": fast.frame_rate_hz,
        "lr_exposure_s": fast.exposure_s,
        "lr_full_scale": fast.full_scale,
        "lr_camera_size": list(fast.shape[1:]),
        "hr_camera_size": [height, width],
        "hr_cut_from": [first, top, left],
    }
    if how.registration:
        fast = _resampled(fast, how.registration, (top, left), view, scale)
    origin = {key: value for key, value in about.items() if value is not None}
    return Pair(sharp, fast, times - first, how.registration, origin)


def _say_if_sizes_contradict(
    name: str, sharp: Recording, fast: Recording, registration: Registration | None
) -> None:
    """Warn of pixel sizes, which say how large a fast pixel is, that do not fit the frames."""
    scale = registration.scale if registration else sharp.shape[1] / fast.shape[1]
    small, large = sharp.pixel_size_um, fast.pixel_size_um
    if small and large and abs(large / small / scale - 1) > UNLIKE:
        logger.warning(
            "%s: the pixel sizes (%g and %g um) say that a fast pixel is %.3g sharp ones wide, but "
            "it is %.3g: one is wrong (--lr-pixel-size and --hr-pixel-size state them)",
            *(name, large, small, large / small, scale),
        )


def _times(name: str, sharp: Recording, fast: Recording, how: Pairing) -> np.ndarray:
    """Time of each fast frame, in sharp frames from the first one."""
    slow, quick = sharp.frame_rate_hz, fast.frame_rate_hz
    gap = how.gap
    if gap is None:
        if not (slow and quick):
            which, option = ("fast", "--lr-frame-rate") if slow else ("sharp", "--hr-frame-rate")
            raise InputError(
                f"{name}: the frame rate of the {which} camera is unknown: give {option}, or "
                "--gap, the number of fast frames from one sharp frame to the next"
            )
        gap = quick / slow
    start = how.start or 0.0
    if not 0 < gap < math.inf or not math.isfinite(start):
        raise InputError(
            f"{name}: gap {gap:g}, start {start:g}: the gap must be a number of fast frames "
            "above 0, the start a finite number of sharp frames"
        )
    if slow and quick and abs(gap * slow / quick - 1) > CONTRADICTION:
        logger.warning(
            "%s: the gap is given as %g, but the frame rates (%g and %g Hz) say %g: one is wrong",
            *(name, gap, quick, slow, quick / slow),
        )
    since = fast.taken() / gap
    instants = start + since + how.drift * since**2 / 2
    if (np.diff(instants) <= 0).any():
        raise InputError(
            f"{name}: with a drift of {how.drift:g} the times of the fast frames do not rise: "
            "take drift out of the registration"
        )
    # lost sharp frames: from their instants back to the frames there are
    taken = sharp.taken()
    if len(taken) < 2:
        return instants
    number: np.ndarray = np.interp(instants, taken, np.arange(len(taken)))
    before, after = instants < taken[0], instants > taken[-1]
    number[before] = instants[before] - taken[0]
    number[after] = len(taken) - 1 + instants[after] - taken[-1]
    return number


def _together(name: str, times: np.ndarray, frames: int) -> tuple[int, int]:
    """First and last sharp frame with a fast one within half its interval (or half a frame)."""
    interval = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    reach = interval / 2 + 1e-6
    first = max(0, math.ceil(times[0] - reach))
    last = min(frames - 1, math.floor(times[-1] + reach))
    if first > last:
        raise TooFew(
            f"{name}: the fast frames span sharp frames {times[0]:g} to {times[-1]:g}, but "
            f"there are frames 0 to {frames - 1}: check --lr-start, --gap and the frame rates"
        )
    return first, last


def _advice(fast: int, sharp: int, last: int) -> str:
    """What else may be wrong if the fast frames end before the sharp ones."""
    if last == sharp - 1:
        return ""
    if sharp > fast:
        return "; or are the two files swapped?"
    return f", or give a gap of at most {(fast - 1) / (sharp - 1):g} if that one is wrong"


def _within(fast: Recording, size: tuple[int, int], view: tuple[int, int], scale: int) -> Recording:
    """The fast frames without a last row or column that is only in part on sharp frames of `size`,
    which are cut to `view`."""
    cut = [
        part // scale if seen == -(-side // scale) else seen
        for seen, side, part in zip(fast.shape[1:], size, view, strict=True)
    ]
    return fast if cut == list(fast.shape[1:]) else fast.cut(*cut)


def _field_of_view(
    registration: Registration, lr: tuple[int, int, int], hr: tuple[int, int], scale: int
) -> tuple[int, int, int, int]:
    """Top, left, height and width (multiples of scale) of the sharp pixels within the LR frame."""
    corners = np.array([(r, c) for r in (0, lr[1]) for c in (0, lr[2])], float)
    above_left, above_right, below_left, below_right = registration.to_hr(corners)
    top = max(0.0, above_left[0], above_right[0])
    bottom = min(float(hr[0]), below_left[0], below_right[0])
    left = max(0.0, above_left[1], below_left[1])
    right = min(float(hr[1]), above_right[1], below_right[1])
    top, left = math.ceil(top - 1e-6), math.ceil(left - 1e-6)
    height, width = (max(0, math.floor(side + 1e-6)) for side in (bottom - top, right - left))
    return top, left, height - height % scale, width - width % scale


def _resampled(
    fast: Recording,
    registration: Registration,
    corner: tuple[int, int],
    view: tuple[int, int],
    scale: int,
) -> Recording:
    """The fast frames as a camera with pixels of `scale` x `scale` sharp ones would record them.

    A fast pixel is the mean over its area, so what is interpolated are quadratic splines whose
    means over the fast pixels are the recorded values (their coefficients are those of a cubic
    spline through the values; Unser 1999, IEEE Signal Process. Mag. 16, 22). Each new pixel is the
    mean of Gauss's points in its parts: exact where its edges are edges of fast pixels. Linear
    interpolation blurs, which cost 4 to 5 dB of the result of `bayes`.
    """
    from scipy.ndimage import spline_filter  # slow to import, and few recordings need them

    grid = view[0] // scale, view[1] // scale
    table = _weights(registration.model_dump_json(), fast.shape[1:], corner, view, scale)
    top = 2**fast.bit_depth - 1

    def resample(frame: np.ndarray) -> np.ndarray:
        smooth = spline_filter(frame.astype(float), order=3, mode="reflect")
        values: np.ndarray = (table @ smooth.ravel()).reshape(grid)
        if frame.dtype.kind == "f":
            return values
        stored: np.ndarray = np.clip(np.rint(values), 0, top).astype(frame.dtype)
        return stored

    return replace(fast.changed(resample), shape=(fast.shape[0], *grid))


@lru_cache(2)  # a recording that is followed is opened again and again
def _weights(
    stated: str, size: tuple[int, int], corner: tuple[int, int], view: tuple[int, int], scale: int
) -> csr_array:
    """What each spline coefficient of a fast frame adds to each new pixel, see `_resampled`; a
    sparse matrix of new pixels x fast ones.

    Args:
        stated: the registration, as JSON.
    """
    from scipy.sparse import csr_array

    registration = Registration.model_validate_json(stated)
    height, width = size
    grid = view[0] // scale, view[1] // scale
    parts = max(2, math.ceil(scale / registration.scale - 1e-6))
    points = 2 * parts
    gauss = np.array([-0.5, 0.5]) / math.sqrt(3)
    inside = ((np.arange(parts)[:, None] + 0.5 + gauss) / parts).ravel()
    rows, columns = (
        corner[axis] + scale * (np.arange(grid[axis])[:, None] + inside) for axis in (0, 1)
    )  # (h, points), (w, points)
    places = np.stack(np.meshgrid(rows.ravel(), columns.ravel(), indexing="ij"), -1)
    places = registration.to_lr(places.reshape(-1, 2), (height, width)) - 0.5
    row_of, column_of = (np.repeat(np.arange(side), points) for side in grid)
    pixel = (row_of[:, None] * grid[1] + column_of).ravel()
    middle = np.rint(places).astype(int)
    aside = places - middle
    weights, at = [], []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            weight = _quadratic(aside[:, 0] - down) * _quadratic(aside[:, 1] - right)
            row = np.clip(middle[:, 0] + down, 0, height - 1)
            column = np.clip(middle[:, 1] + right, 0, width - 1)
            weights.append(weight / points**2)
            at.append(row * width + column)
    return csr_array(
        (np.concatenate(weights), (np.tile(pixel, 9), np.concatenate(at))),
        shape=(grid[0] * grid[1], height * width),
    )


def _quadratic(x: np.ndarray) -> np.ndarray:
    """The quadratic B-spline, 0 from 1.5 on."""
    x = np.abs(x)
    inner, outer = 0.75 - x**2, 0.5 * (1.5 - x) ** 2
    spline: np.ndarray = np.where(x <= 0.5, inner, np.where(x < 1.5, outer, 0.0))
    return spline
