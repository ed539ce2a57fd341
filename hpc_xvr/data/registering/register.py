"""Register two cameras: from their recordings to where and when the one saw what the other did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from hpc_xvr.data.cameras import Recording
from hpc_xvr.data.registering.joint import Cameras, sheared, together
from hpc_xvr.data.registering.placing import (
    FLIPS,
    Comparison,
    Fit,
    Place,
    Thinned,
    shrunk,
    similarity,
)
from hpc_xvr.data.registering.searching import BLUR, Candidate, Evidence, Limits, search
from hpc_xvr.data.registering.timing import Clock, clock_of
from hpc_xvr.data.registration import Registration, Sizes, Timing
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger
from hpc_xvr.version import __version__

KEYS = 24
"""Sharp frames that are looked at, spread over the recording."""
PAIRS = 6
"""Pairs of frames of the same instant that the place is refined on."""
MOST_FRAMES = 20_000
"""Fast frames that are looked at."""
IN_MEMORY = 2**28
"""Bytes of thinned fast frames."""
LONGEST = 112.0
"""Pixels of a thinned fast frame's longer side, for the search in time."""
PLAIN = 0.002
"""Deviation of a frame, of its largest value, up to which it shows nothing."""
SATURATED = 0.5
"""Share of pixels at the largest value that can be stored, from which a frame is of no use."""
UNCERTAIN = 0.5
"""Fast pixels by which a corner may be uncertain."""
BLURS = 0.4, 0.7, 1.0, 1.4
CONTRARY = 0.001
"""Share of the gap by which motion may contradict the one that is stated before it is said."""
DOUBTFUL = 0.1
"""Fast frames by which the instant of a sharp frame may be uncertain before it is said."""
APART = 0.1
"""Share of the motion that no other place may explain, at least."""
CALM = 0.8
"""Deviation, pixels, of a blur against noise, for the search in time."""
WIDE = 10
"""Times as wide is the mean that is taken out there."""
BENT = 0.1
"""Fast pixels by which an affine place must differ from one without shear to be told."""
NEAR = 0.15
"""Of the field of view and of the scale, by which a place may differ from the one it is to be
near."""


@dataclass(frozen=True)
class Registered:
    """What `registered` found, and two pictures of the same instant to look at."""

    registration: Registration
    sharp: np.ndarray
    """(H, W)"""
    fast: np.ndarray
    """(h, w)"""


@dataclass(frozen=True)
class _Films:
    """What is kept of two recordings."""

    name: str
    keys: list[np.ndarray]
    """Usable sharp frames (H, W), float32 in [0, 1]."""
    key_numbers: np.ndarray
    fast: Recording
    thinned: np.ndarray
    """Usable fast frames (T, h', w')."""
    fast_frames: np.ndarray
    """Index of each in the recording."""
    fast_numbers: np.ndarray
    fast_mean: np.ndarray
    """(h, w)"""

    def fast_frame(self, index: int) -> np.ndarray:
        return _grey(self.fast, next(self.fast.frames(index, index + 1)))

    def fast_at(self, number: float) -> np.ndarray:
        """Mean of the frames beside an instant, by its distance to each."""
        place = float(np.interp(number, self.fast_numbers, np.arange(len(self.fast_numbers))))
        low = min(int(place), len(self.fast_frames) - 2) if len(self.fast_frames) > 1 else 0
        share = place - low
        if share < 0.15:
            return self.fast_frame(int(self.fast_frames[low]))
        if share > 0.85:
            return self.fast_frame(int(self.fast_frames[low + 1]))
        a, b = (self.fast_frame(int(self.fast_frames[low + i])) for i in (0, 1))
        return (1 - share) * a + share * b


def registered(
    sharp: Recording,
    fast: Recording,
    *,
    gap: float | None = None,
    near: Registration | None = None,
    affine: bool = False,
    scales: tuple[float, float] = (1.8, 5.6),
    rotation_deg: float = 8.0,
) -> Registered:
    """Find where the pixels of `fast` lie on the frames of `sharp`, and when they were taken.

    The place is found from the scene itself (or a calibration target that does not repeat itself):
    what both cameras saw, whatever their grey scales, noise and blur. The time is found from what
    moves. Without motion, or a single frame of one camera, only the place is.

    Args:
        gap: fast frames from one sharp frame to the next, where it is known better than the
            recordings' frame rates say.
        near: a place that is roughly right; others are not looked for.
        affine: pixels need not be square, nor axes at right angles.
        scales: smallest and largest side of a fast pixel in sharp ones.
        rotation_deg: largest rotation of either sense.

    Raises:
        InputError: a recording shows nothing, or no place is convincing: nothing is guessed.
    """
    if not 1 <= scales[0] < scales[1] <= 20:
        raise InputError(
            f"scales {scales[0]:g} to {scales[1]:g}: the first must be below the second, both "
            "from 1 to 20 (sharp pixels a fast one)"
        )
    if not 0 <= rotation_deg <= 45:
        raise InputError(f"rotation {rotation_deg:g}: must be 0 to 45 degrees")
    films = _films(sharp, fast)
    known_gap = gap or _gap_of_rates(sharp, fast)
    limits = Limits(scales, rotation_deg)
    if near is not None:
        place = similarity(near.flip, near.scale, near.rotation_deg, np.array(near.origin))
        limits = Limits(
            (near.scale * (1 - NEAR), near.scale * (1 + NEAR)),
            min(45.0, abs(near.rotation_deg) + 3),
            (near.flip,),
            place,
        )
    logger.info("%s: looking for the place of the fast camera's frames", films.name)
    candidate = search(_evidence(films, known_gap), limits)
    if candidate is None or not candidate.convincing:
        _refuse(films, candidate, near is not None, limits)
    logger.info(
        "scale about %.2f, flip %s; refining the place and the clock on %d sharp frames",
        *(candidate.place.scale, candidate.place.flip, len(films.keys)),
    )
    fit, clock = _refined(films, candidate.place, known_gap, affine)
    sharps, fasts = _pairs(films, clock)
    candidate = _judged(candidate, fit, sharps, fasts)
    if clock is not None and not candidate.convincing:
        # single frames may be all noise where means over time are not
        candidate = _judged(candidate, fit, *_pairs(films, None))
    deviation = fit.corner_deviation(films.fast.shape[1:])
    if not candidate.convincing:
        _refuse(films, candidate, near is not None, limits)
    if not deviation <= UNCERTAIN:
        raise InputError(
            f"{films.name}: what both saw does not say where all of the fast frame lies (corners "
            f"are uncertain by {deviation:.2f} fast pixels): long edges alone, or noise? take "
            "frames with more structure, or a calibration target"
        )
    _tell(films, clock, known_gap)
    found = {
        "score": round(candidate.place.score, 4),
        "clearness": round(candidate.clearness, 2),
        "overlap": round(candidate.place.overlap, 4),
        **_uncertainties(fit, deviation, fasts[0].shape),
        "lr_blur_px": round(fit.blur, 2),
        **_about_time(clock, known_gap),
        "lr": str(fast.path),
        "hr": str(sharp.path),
        "made_by": f"hpc_xvr {__version__}",
    }
    return Registered(_registration(fit.place, clock, films, affine, found), *_shown(sharps, fasts))


def _judged(
    candidate: Candidate, fit: Fit, sharps: Sequence[np.ndarray], fasts: Sequence[np.ndarray]
) -> Candidate:
    """The refined place as a candidate, as alike as these pictures of both cameras are there."""
    compared = Comparison([Thinned(one) for one in sharps], fasts, fit.place.scale, 1.0, fit.blur)
    place = compared.score(fit.place)
    return replace(candidate, place=place, clearness=compared.clearness(place)[0])


def _films(sharp: Recording, fast: Recording) -> _Films:
    name = f"{sharp.path} with {fast.path}"
    count = sharp.shape[0]
    chosen = np.unique(np.linspace(0, count - 1, min(KEYS, count)).round().astype(int))
    keys, key_frames, why = [], [], []
    for index in chosen.tolist():
        frame = next(sharp.frames(index, index + 1))
        problem = _problem(sharp, frame)
        if problem:
            why.append(f"frame {index} {problem}")
        else:
            keys.append(_grey(sharp, frame))
            key_frames.append(index)
    _left_out(sharp, why, len(chosen))
    h, w = fast.shape[1:]
    frames = min(fast.shape[0], MOST_FRAMES)
    if frames < fast.shape[0]:
        logger.warning(
            "%s: only the first %d of %d frames are looked at", fast.path, frames, fast.shape[0]
        )
    pixels = IN_MEMORY / 4 / frames
    factor = max(1.0, max(h, w) / LONGEST, math.sqrt(h * w / pixels))
    thinned, used, why = [], [], []
    mean = np.zeros((h, w))
    for index, stored in enumerate(fast.frames(0, frames)):
        problem = _problem(fast, stored)
        if problem:
            why.append(f"frame {index} {problem}")
            continue
        frame = _grey(fast, stored)
        mean += frame
        thinned.append(shrunk(frame, factor)[0])
        used.append(index)
    _left_out(fast, why, frames)
    return _Films(
        name,
        keys,
        sharp.taken()[key_frames],
        fast,
        np.stack(thinned),
        np.array(used),
        fast.taken()[used],
        (mean / len(used)).astype(np.float32),
    )


def _grey(recording: Recording, frame: np.ndarray) -> np.ndarray:
    return frame.astype(np.float32) / (2**recording.bit_depth - 1)


def _problem(recording: Recording, frame: np.ndarray) -> str:
    """Why a frame shows nothing, or nothing."""
    low, high = int(frame.min()), int(frame.max())
    if low == high:
        return f"has one value everywhere, {low}"
    if np.count_nonzero(frame == 2**recording.bit_depth - 1) > SATURATED * frame.size:
        return "is saturated"
    if frame.std() <= PLAIN * high:
        return f"has no contrast ({low} to {high})"
    return ""


def _left_out(recording: Recording, why: Sequence[str], looked_at: int) -> None:
    if len(why) == looked_at:
        raise InputError(
            f"{recording.path}: shows nothing that could be registered: {why[0]}"
            + (f", and so on for all {looked_at} that were looked at" if looked_at > 1 else "")
            + ": was the shutter open, the exposure right, the bit depth stated?"
        )
    if why:
        logger.warning(
            "%s: %d of %d frames that were looked at are left out: %s%s",
            *(recording.path, len(why), looked_at, why[0], ", ..." if len(why) > 1 else ""),
        )


def _gap_of_rates(sharp: Recording, fast: Recording) -> float | None:
    if sharp.frame_rate_hz and fast.frame_rate_hz:
        return fast.frame_rate_hz / sharp.frame_rate_hz
    return None


def _evidence(films: _Films, gap: float | None) -> Iterator[Callable[[], Evidence]]:
    """Pictures that may show the same: means over time, then a sharp frame and fast ones."""
    yield lambda: (np.mean(films.keys, 0), [films.fast_mean])
    count = len(films.fast_frames)
    if count == 1 and len(films.keys) == 1:
        return
    middle = len(films.keys) // 2
    at = {count // 4, count // 2, 3 * count // 4}
    if gap is not None:
        guess = np.abs(films.fast_numbers - gap * films.key_numbers[middle]).argmin()
        at = {int(guess), count // 2}
    yield lambda: (
        films.keys[middle],
        [films.fast_frame(int(films.fast_frames[i])) for i in sorted(at)],
    )


def _clock(films: _Films, place: Place, gap: float | None) -> Clock | None:
    """When about the fast frames were taken, as far as motion says so."""
    size = films.fast.shape[1:]
    thin = films.thinned.shape[1:]
    factor = min(size[axis] / thin[axis] for axis in (0, 1))
    factor = max(1.0, max(size) / LONGEST, factor if max(size) / factor < LONGEST else 1.0)
    first = [(size[axis] - factor * thin[axis]) / 2 for axis in (0, 1)]
    rows, columns = np.meshgrid(
        *(first[axis] + factor * (np.arange(thin[axis]) + 0.5) for axis in (0, 1)), indexing="ij"
    )
    at = place.at(rows, columns)
    pixel = place.scale * factor
    height, width = films.keys[0].shape
    inside = (at[0] > pixel) & (at[0] < height - pixel) & (at[1] > pixel) & (at[1] < width - pixel)
    if inside.sum() < 50:
        return None
    seen = []
    for key in films.keys:
        smooth, thinner = Thinned(key).smooth(pixel, BLUR / factor)
        low = map_coordinates(smooth, at / thinner - 0.5, order=1, mode="nearest")
        seen.append(_without_mean(low)[inside])
    way = FLIPS[place.flip]
    fast = np.stack([_without_mean(frame)[way][inside] for frame in films.thinned])
    return clock_of(np.stack(seen), fast, films.key_numbers, films.fast_numbers, gap)


def _without_mean(frame: np.ndarray) -> np.ndarray:
    """A frame without its local mean, and without the beam's flicker; calmed."""
    calm = gaussian_filter(frame / max(float(frame.mean()), 1e-9), CALM)
    rest: np.ndarray = calm - gaussian_filter(calm, WIDE * CALM)
    return rest


def _refined(
    films: _Films, place: Place, gap: float | None, affine: bool
) -> tuple[Fit, Clock | None]:
    """Place and clock together; only the place, on means over time, where motion says too little of
    the clock."""
    clock = _clock(films, place, gap)
    numbers = {
        int(n): int(index) for n, index in zip(films.fast_numbers, films.fast_frames, strict=True)
    }

    def frame(number: int) -> np.ndarray | None:
        return films.fast_frame(numbers[number]) if number in numbers else None

    size = films.fast.shape[1:]
    cameras = Cameras(films.keys, films.key_numbers, frame, size, gap)
    found = together(cameras, place, clock, BLUR) if clock is not None else None
    if found is not None and found.apart < APART:
        raise InputError(
            f"{films.name}: all that both saw moves alike, so that one place at one time fits as "
            "well as another at another: register a shot in which something stands still (a "
            "calibration target, the edge of the beam), and use its file with --lr-start"
        )
    if found is not None and found.clock is not None:
        fit, clock = found.fit, found.clock
        if affine:
            free = together(cameras, fit.place, clock, fit.blur, affine=True)
            if free is not None:
                return free.fit, free.clock
        bent = sheared(cameras, found)
    else:
        clock = None
        pair = [Thinned(np.mean(films.keys, 0))], [films.fast_mean]
        scores = {blur: Comparison(*pair, place.scale, 1.0, blur).score(place) for blur in BLURS}
        blur = max(scores, key=lambda b: scores[b].score)
        comparison = Comparison(*pair, place.scale, 1.0, blur)
        fit = comparison.refined(place)
        bent = comparison.refined(fit.place, affine=True)
        if affine:
            return bent, None
        # means over time are blurred by motion: the place is often surer where it is found together
        # with a clock, however uncertain that is
        if found is not None and found.fit.corner_deviation(size) < fit.corner_deviation(size):
            return found.fit, None
    if bent is not None:
        _tell_bent(fit, bent, size)
    return fit, clock


def _tell_bent(fit: Fit, bent: Fit, size: tuple[int, ...]) -> None:
    aside = np.abs(bent.place.corners(size) - fit.place.corners(size)).max() / fit.place.scale
    if aside > max(BENT, 4 * bent.corner_deviation(size)):
        logger.warning(
            "pixels are not quite square, or axes not at right angles: with --affine the corners "
            "would lie up to %.2f fast pixels elsewhere",
            aside,
        )


def _pairs(films: _Films, clock: Clock | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Sharp and fast pictures of the same instants."""
    if clock is None:
        return [np.mean(films.keys, 0)], [films.fast_mean]
    at = clock.of_sharp(films.key_numbers)
    there = np.nonzero((at >= films.fast_numbers[0]) & (at <= films.fast_numbers[-1]))[0]
    aside = np.abs(at[there] - np.rint(at[there]))
    if len(there) > PAIRS:  # those whose instant a fast frame shares, spread over the recording
        groups = np.array_split(np.arange(len(there)), PAIRS)
        there = there[[group[aside[group].argmin()] for group in groups]]
    return [films.keys[k] for k in there], [films.fast_at(float(at[k])) for k in there]


def _refuse(films: _Films, candidate: Candidate | None, near: bool, limits: Limits) -> NoReturn:
    swapped = search(
        iter([lambda: (films.fast_mean, [np.mean(films.keys, 0)])]), Limits(flips=limits.flips)
    )
    if swapped is not None and swapped.convincing:
        raise InputError(
            f"{films.name}: the two match with the first camera as the sharp one (its pixels are "
            f"{swapped.place.scale:.2f} times as fine): are the two files swapped?"
        )
    least = "nothing fits"
    if candidate is not None:
        least = (
            f"the best place correlates with {candidate.place.score:.2f} and stands out by "
            f"{candidate.clearness:.1f} deviations"
        )
    low, high = limits.scales
    raise InputError(
        f"{films.name}: no place is convincing ({least}; scales {low:.3g} to {high:.3g}, rotations "
        f"up to {limits.rotation_deg:g} degrees): are they of the same shot, and does anything "
        "show in both? "
        + (
            "Leave --near out if it is not certain"
            if near
            else "Widen --scales or --rotation, or say with --near where about it lies"
        )
    )


def _tell(films: _Films, clock: Clock | None, gap: float | None) -> None:
    if clock is not None:
        if gap is not None and abs(clock.gap / gap - 1) > CONTRARY:
            logger.warning(
                "%s: %.5g fast frames a sharp one by what moves, %.5g by the frame rates or --gap: "
                "motion is believed; are these right?",
                *(films.name, clock.gap, gap),
            )
        if clock.deviation > DOUBTFUL:
            logger.warning(
                "%s: when the sharp frames were taken is uncertain by up to %.2f fast frames (1 "
                "sigma): little motion, or noise; compare with the trigger if you can",
                *(films.name, clock.deviation),
            )
        return
    alone = len(films.keys) < 2 or len(films.fast_frames) < 3
    logger.warning(
        "%s: %s: when the fast camera started is not known%s; state it with --lr-start%s",
        films.name,
        "too few frames to see motion" if alone else "no motion that both saw fits one clock",
        "" if gap is None else f" (the gap is {gap:g} by the frame rates)",
        "" if gap is not None else " and --gap",
    )


def _uncertainties(fit: Fit, deviation: float, size: tuple[int, ...]) -> dict[str, float]:
    """Deviations of the numbers in the result; the origin is that of the corner."""
    covariance, scale = fit.covariance, fit.place.scale
    centre = np.array(size) / 2
    count = len(covariance)
    j = np.zeros((2, count))
    j[:, :2] = np.eye(2)
    r, c = -centre
    j[:, 2:] = [[r, -c], [c, r]] if count == 4 else [[r, c, 0, 0], [0, 0, r, c]]
    origin = np.sqrt(np.maximum(np.diag(j @ covariance @ j.T), 0))
    turn = covariance[3, 3] if count == 4 else (covariance[3, 3] + covariance[4, 4]) / 4
    along = covariance[2, 2] if count == 4 else (covariance[2, 2] + covariance[5, 5]) / 4
    return {
        "corner_deviation_lr_px": round(deviation, 4),
        "scale_deviation": round(math.sqrt(along), 6),
        "rotation_deviation_deg": round(math.degrees(math.sqrt(turn) / scale), 5),
        "origin_deviation": [round(float(v), 4) for v in origin],  # type: ignore[dict-item]
    }


def _about_time(clock: Clock | None, gap: float | None) -> dict[str, Any]:
    about: dict[str, Any] = {}
    if gap is not None:
        about["gap_stated"] = round(gap, 6)
    if clock is None:
        return about
    about["keys_used"] = clock.used
    for key, value in (
        ("gap_deviation", clock.gap_deviation),
        ("lr_start_deviation", clock.start_deviation),
        ("time_deviation_lr_frames", clock.deviation),
        ("time_scatter_lr_frames", clock.scatter),
    ):
        if math.isfinite(value):
            about[key] = float(f"{value:.4g}")
    return about


def _registration(
    place: Place, clock: Clock | None, films: _Films, affine: bool, found: dict[str, Any]
) -> Registration:
    (a, b), (c, d) = (tuple(round(float(v), 7) for v in row) for row in place.matrix)
    time = None
    if clock is not None:
        time = Timing(
            gap=round(clock.gap, 6), lr_start=round(clock.start, 6), drift=round(clock.drift, 9)
        )
    h, w = films.fast.shape[1:]
    height, width = films.keys[0].shape
    return Registration(
        scale=round(place.scale, 6),
        origin=(round(float(place.origin[0]), 4), round(float(place.origin[1]), 4)),
        rotation_deg=round(place.rotation_deg, 5),
        flip=place.flip,
        affine=((a, b), (c, d)) if affine else None,
        time=time,
        made_for=Sizes(lr=(h, w), hr=(height, width)),
        found=found,
    )


def _shown(sharps: list[np.ndarray], fasts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    middle = len(sharps) // 2
    return sharps[middle], fasts[middle]
