"""The search for a place: candidates on a coarse grid, refined and judged on finer ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hpc_xvr.data.registering.placing import (
    COARSE,
    FLIPS,
    MIDDLE,
    Comparison,
    Flip,
    Place,
    Thinned,
    candidates,
)

NEAR = 0.2
"""Of the longer side of the field of view, by which corners may be away from where they are said to
be about."""
JUDGED = 6
"""Candidates that are refined a second time."""
FINER = 2.0
"""Times as many pixels are compared where the coarse grid shows nothing."""
CONVINCING = (0.0, 12.0), (0.25, 8.0), (0.6, 6.0), (0.7, 5.0)
"""Correlation, and the deviations by which it must stand out of that beside the place: any of these
pairs is enough. Long straight edges look alike some pixels along them, but fit well; noise leaves
little correlation, but at one place alone."""
ALONE = 0.85, 2.0
"""Correlation, and how many times as much any other place must leave unexplained: enough, too, as
for rulings, which fit nearly as well one period further, but not quite."""
BEYOND = 1.15
"""Factor by which a refined place may leave the scales that were asked for."""
BLUR = 0.7
"""Deviation, fast pixels, by which fast cameras are usually blurred beyond their pixels."""


@dataclass(frozen=True)
class Limits:
    """What is searched."""

    scales: tuple[float, float] = (1.8, 5.6)
    rotation_deg: float = 8.0
    flips: tuple[Flip, ...] = tuple(FLIPS)
    near: Place | None = None
    """Corners of the fast frame must lie near those of this place."""


@dataclass(frozen=True)
class Candidate:
    place: Place
    clearness: float
    number: int
    """Of the fast picture."""
    rival: float = 1.0
    """Correlation of the best other place."""

    @property
    def alone(self) -> bool:
        score, times = ALONE
        left = 1 - self.place.score**2
        return self.place.score >= score and 1 - self.rival**2 >= times * left

    @property
    def convincing(self) -> bool:
        return self.alone or any(
            self.place.score >= score and self.clearness >= clear for score, clear in CONVINCING
        )


Evidence = tuple[np.ndarray, Sequence[np.ndarray]]
"""A picture of the sharp camera, and some of the fast one, any of which may show the same."""


def search(evidence: Iterable[Callable[[], Evidence]], limits: Limits) -> Candidate | None:
    """The clearest place of the first evidence that is convincing, on the coarse grid or, if none
    is, on a finer one; else the clearest of all that is not."""
    clearest: Candidate | None = None
    pictures = []
    for make in evidence:
        sharp, fasts = make()
        pictures.append((Thinned(sharp), fasts))
    finer = min(FINER * COARSE, max(pictures[0][1][0].shape)) if pictures else COARSE
    for longest in (COARSE, finer) if finer > COARSE else (COARSE,):
        for sharp_, fasts in pictures[: None if longest == COARSE else 1]:
            found = best_place(sharp_, fasts, limits, longest)
            if found and (clearest is None or found.clearness > clearest.clearness):
                clearest = found
            if clearest and clearest.convincing:
                return clearest
    return clearest


def best_place(
    sharp: Thinned, fasts: Sequence[np.ndarray], limits: Limits, longest: float
) -> Candidate | None:
    """The clearest place, or None where there is none within the limits."""
    size = fasts[0].shape
    known: dict[tuple[int, int, float], Comparison] = {}

    def compared(place: Place, number: int, longest: float) -> Comparison:
        step = round(math.log(place.scale) / 0.06)
        key = step, number, longest
        if key not in known:
            known[key] = Comparison(
                [sharp], [fasts[number]], math.exp(0.06 * step), max(size) / longest, BLUR
            )
        return known[key]

    def within(place: Place) -> bool:
        low, high = limits.scales
        if limits.near is not None:
            aside = np.abs(limits.near.corners(size) - place.corners(size)).max()
            if aside > NEAR * max(size) * place.scale:
                return False
        return (
            place.overlap > 0.15
            and low / BEYOND < place.scale < BEYOND * high
            and abs(place.rotation_deg) < limits.rotation_deg + 3
        )

    coarse = [
        (compared(place, number, longest).refined(place, steps=12).place, number)
        for place, number in candidates(
            sharp, fasts, limits.scales, limits.rotation_deg, longest, limits.flips
        )
    ]
    coarse = [(place, number) for place, number in coarse if within(place)]
    coarse.sort(key=lambda one: -one[0].score * math.sqrt(one[0].overlap))
    near = 3 * max(size) / longest
    apart: list[tuple[Place, int]] = []
    for place, number in coarse:
        mine = place.corners(size)
        if all(
            other.flip != place.flip
            or np.abs(other.corners(size) - mine).max() > near * place.scale
            for other, _ in apart
        ):
            apart.append((place, number))
    judged: list[Candidate] = []
    for place, number in apart[:JUDGED]:
        fine = compared(place, number, max(longest, MIDDLE))
        place = fine.refined(place, steps=15).place
        if within(place):
            clearness, share = fine.clearness(place)
            judged.append(Candidate(place, clearness, number, min(1.0, share * place.score)))
    if not judged:
        return None
    best, *others = sorted(judged, key=lambda one: -one.place.score)
    there = best.place.corners(size)
    for other in others:  # that the same place was found twice is no rival
        place = other.place
        away = np.abs(place.corners(size) - there).max()
        if place.flip != best.place.flip or away > 2 * place.scale:
            best = replace(best, rival=max(best.rival, place.score))
    if best.alone:
        return best
    return replace(max(judged, key=lambda one: one.clearness), rival=1.0)
