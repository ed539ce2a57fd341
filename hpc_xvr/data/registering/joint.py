"""The place and the clock together, refined on the pixels of all sharp frames.

With H_k the sharp frame k through the place and the fast camera's blur, on the fast camera's
pixels, and L(t) the fast movie between its frames, what is left over of both cameras is

    r_k = g_k H_k - L(t_k),    t_k = c_0 + c_1 u_k (+ c_2 u_k^2),

and place, blur and clock are where all r_k are smallest. A slow object's place and its time can
be exchanged, so neither is right unless both are found together. Two things would bias the time:

- Noise of the fast camera makes things look as if they moved, and what moves more seems less late
  (errors in variables). The equation of the time is therefore <z, r> = 0, where the instrument z is
  the rate of change between the fast frames further out, whose noise is not that of L(t) (Reiersol
  1945; Fuller 1987, Measurement Error Models, section 1.4).
- What one camera alone sees standing still (dust, the pixels' gains). The instruments' mean over
  all sharp frames is taken out of them, which leaves no weight on it.

L(t) is Catmull and Rom's cubic through the four nearest frames; between two frames only it would be
blurred by the motion. Uncertainties are those of a sandwich over blocks of pixels, which need not
know what left-overs consist of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter, uniform_filter

from hpc_xvr.data.registering.placing import FLIPS, Fit, Place, Thinned, sampled, shrunk
from hpc_xvr.data.registering.timing import Clock

MOST_PIXELS = 150_000
"""Of a fast frame; larger ones are thinned out."""
STEPS = 15
FIRST = 6
"""Steps in which the sharp frames' blur is made anew."""
WIDE = 9
"""Pixels of each of two boxes over which the local mean is taken out."""
CALM = 0.8
"""Deviation, pixels, by which the instrument is smoothed."""
NEAR = 1.5
"""Deviation, pixels, of the neighbourhood whose motion is told from noise."""
KNOWN = 0.0005
"""Of itself, by which a known gap may be wrong (1 sigma)."""
CONTRARY = 4.0
"""Deviations from which motion is believed, not the gap."""
LATE = 0.1
"""Fast frames by which a drift must bend the clock to be told from none."""
FEW = 6
"""Sharp frames from which a drift is looked for."""
ASIDE = 0.75
"""Fast frames by which a sharp frame may lie aside of the clock."""
SHARE = 0.6
"""Of the sharp frames, that must lie on it."""
REACH = 6
"""Fast frames, earlier and later, at which the cameras must agree less."""
LESS = 5.0
"""By so many deviations."""
CALMER = 1.2
"""Deviation, pixels, by which left-overs are smoothed to tell that."""
SCATTERED = 0.3
"""Fast frames by which single sharp frames may scatter about the clock."""
UNCERTAIN = 0.25
"""Fast frames by which the instant of a sharp frame may be uncertain."""
MODEL = 0.02
"""Fast frames by which it is uncertain in any case: what lies between frames is not quite known."""
BLOCK = 8
"""Pixels; the left-overs of blocks are nearly independent of each other."""


@dataclass(frozen=True)
class Joint:
    """What is found together."""

    fit: Fit
    clock: Clock | None
    """None where motion does not say clearly enough when the frames were taken."""


@dataclass(frozen=True)
class _State:
    middle: np.ndarray
    """HR (row, column) of the middle of the fast frame."""
    matrix: np.ndarray
    """(2, 2)"""
    blur: float
    """Deviation, fast pixels, by which the fast camera is less sharp than a binned sharp frame."""
    times: np.ndarray
    """Coefficients c of the clock, in fast frames."""


@dataclass(frozen=True)
class _Step:
    change: np.ndarray
    """Of the place (4 or 6), of half the blur's square, and of the times."""
    covariance: np.ndarray
    used: np.ndarray
    """Sharp frames with fast ones around them."""
    contrary: float
    """Deviations by which motion contradicts the known gap."""
    late: np.ndarray
    """Fast frames by which each of these alone would be later than the clock says, and the
    deviation of that, (2, used)."""


def together(
    keys: Sequence[np.ndarray],
    key_numbers: np.ndarray,
    frame: Callable[[int], np.ndarray | None],
    size: tuple[int, int],
    place: Place,
    clock: Clock,
    gap: float | None,
    blur: float,
    affine: bool = False,
) -> Joint | None:
    """Place, blur and clock at which the two cameras agree best, from near ones.

    Args:
        keys: sharp frames (H, W).
        key_numbers: number of each in its camera's count.
        frame: fast frame (h, w) of a number, or None where it is missing.
        size: (h, w).
        gap: fast frames a sharp one, where it is known.
        blur: about that of the fast camera, in its pixels.
        affine: six numbers of the place are free, not four.

    Returns:
        None where there is no such place and clock.
    """
    problem = _Problem(keys, key_numbers, frame, place, size, gap, affine)
    at = clock.of_sharp(key_numbers)
    best: Joint | None = None
    for order in (1, 2) if len(keys) >= FEW else (min(1, len(keys) - 1),):
        times = np.polynomial.polynomial.polyfit(problem.u, at, order)
        solved = problem.searched(_State(place.at(*problem.centre), place.matrix, blur, times))
        if solved is None:
            break
        state, step, clear = solved
        if order == 2:
            bend, deviation = abs(state.times[2]), math.sqrt(step.covariance[-1, -1])
            if bend < max(LATE, 6 * deviation):
                break
        joint = problem.joint(state, step, clear)
        if best is None or joint.clock is not None:
            best = joint
        if not clear:
            break
    return best


class _Problem:
    """Both cameras' frames, and the steps to where they agree best."""

    def __init__(
        self,
        keys: Sequence[np.ndarray],
        key_numbers: np.ndarray,
        frame: Callable[[int], np.ndarray | None],
        place: Place,
        size: tuple[int, int],
        gap: float | None,
        affine: bool,
    ) -> None:
        self.keys = [Thinned(key) for key in keys]
        self.numbers = np.asarray(key_numbers, float)
        self.half = max(1.0, float(np.ptp(self.numbers)) / 2)
        self.u = (self.numbers - self.numbers.mean()) / self.half
        self.frame, self.flip, self.scale = frame, place.flip, place.scale
        self.gap, self.believed, self.affine = gap, True, affine
        self.size = size
        self.factor = max(1.0, math.sqrt(size[0] * size[1] / MOST_PIXELS))
        small, corner = shrunk(np.zeros(size), self.factor)
        self.centre = np.array(self.size) / 2
        rows, columns = (
            corner[axis] + self.factor * (np.arange(small.shape[axis]) + 0.5) - self.centre[axis]
            for axis in (0, 1)
        )
        self.rows, self.columns = np.meshgrid(rows, columns, indexing="ij")
        self._fast: dict[int, np.ndarray | None] = {}
        self._sharp_of = math.nan
        self._sharp: tuple[list[tuple[np.ndarray, ...]], int] = [], 1

    def fast(self, number: int) -> np.ndarray | None:
        """Fast frame of a number, flipped, with a mean of 1."""
        if number not in self._fast:
            frame = self.frame(number)
            if frame is not None:
                frame = shrunk(frame[FLIPS[self.flip]], self.factor)[0]
                frame = frame / max(float(frame.mean()), 1e-9)
            self._fast[number] = frame
        return self._fast[number]

    def sharp(self, blur: float) -> tuple[list[tuple[np.ndarray, ...]], int]:
        """Sharp frames as the fast camera's optics show them: values, slopes and Laplacian a sharp
        pixel; and by how much they are thinned out."""
        if not abs(self._sharp_of - blur) <= 0.002:
            pictures: list[tuple[np.ndarray, ...]] = []
            thin = 1
            for key in self.keys:
                smooth, thin = key.smooth(self.scale * self.factor, blur / self.factor)
                down, right = np.gradient(smooth)
                bend = np.gradient(down, axis=0) + np.gradient(right, axis=1)
                pictures.append((smooth, down / thin, right / thin, bend / thin**2))
            self._sharp_of, self._sharp = blur, (pictures, thin)
        return self._sharp

    def searched(self, state: _State) -> tuple[_State, _Step, bool] | None:
        """The unknowns at which the cameras agree best, and if they clearly agree less whole frames
        earlier and later."""
        use = np.arange(len(self.keys))
        for _ in range(3):
            solved = self.solved(state, use)
            if solved is None:
                return None
            state, step = solved
            if step.contrary > CONTRARY:
                self.believed, shift = False, 0
                continue
            shift, clear = self.elsewhere(state, step.used)
            if not shift:
                break
            state = replace(state, times=state.times + shift * np.eye(len(state.times))[0])
        if shift or step.contrary > CONTRARY:
            return None
        if clear < LESS:
            return state, step, False
        aside = np.abs(step.late[0]) > np.maximum(ASIDE, 4 * step.late[1])
        if aside.any():  # frames that are not of this clock
            use = step.used[~aside]
            if len(use) < max(1, SHARE * len(step.used)):
                return None
            solved = self.solved(state, use)
            return None if solved is None else (*solved, True)
        return state, step, True

    def solved(self, state: _State, use: np.ndarray) -> tuple[_State, _Step] | None:
        """The unknowns at which nothing changes any more."""
        step = None
        for number in range(STEPS):
            step = self.step(state, use)
            if step is None:
                return None
            state = self._after(state, step.change, fixed_blur=number >= FIRST)
            if number >= FIRST and np.abs(step.change[-len(state.times) :]).max() < 1e-3:
                break
        return None if step is None else (state, step)

    def elsewhere(self, state: _State, use: np.ndarray) -> tuple[int, float]:
        """How many frames earlier or later the cameras agree best (0: here), and by how many
        deviations they agree less there than here."""
        inside, at, thin = self.seen(state)
        level = _Level(inside, CALMER)
        pictures, _ = self.sharp(state.blur)
        sharp = {k: level(sampled(pictures[k][0], at / thin - 0.5, inside)) for k in use.tolist()}
        times = np.polynomial.polynomial.polyval(self.u, state.times)
        rests: dict[int, dict[int, np.ndarray]] = {}
        for shift in range(-REACH, REACH + 1):
            rests[shift] = {}
            for k, seen in sharp.items():
                four = self.four(math.floor(times[k]) + shift)
                if four is not None:
                    movie = level(_between(four, times[k] % 1)[inside])
                    gain = float(seen @ movie) / max(float(seen @ seen), 1e-12)
                    rests[shift][k] = gain * seen - movie
        if not rests[0]:
            return 0, 0.0
        here = np.stack(list(rests[0].values()))
        noise = 2.2 * float(np.median(np.abs(here))) ** 2
        alike = 2 * math.pi * CALMER**2  # pixels that noise has in common, once it is smoothed
        change = np.stack([rest for some in rests.values() for rest in some.values()]).var(0)
        weight = (change / (change + 4 * np.median(change) + 1e-20)) ** 2
        found = []
        for shift, some in rests.items():
            common = [k for k in some if k in rests[0]]
            if not shift or len(common) < SHARE * len(use):
                continue
            pair = [np.stack([rests[j][k] for k in common]) for j in (shift, 0)]
            if len(common) > 2:
                pair = [one - one.mean(0) for one in pair]
            there, now = (float((one**2 @ weight).sum()) for one in pair)
            deviation = 2 * noise * math.sqrt(alike * len(common) * float((weight**2).sum()))
            found.append(((there - now) / max(deviation, 1e-20), shift))
        if not found:
            return 0, 0.0
        clear, shift = min(found)
        return (shift if clear < 0 else 0), clear

    def _after(self, state: _State, change: np.ndarray, fixed_blur: bool) -> _State:
        """The state a step further, but no longer one than half a fast frame or one pixel."""
        count = 6 if self.affine else 4
        place, blur, times = np.split(change, [count, count + 1])
        far = max(np.abs(times).max() / 0.5, np.abs(place[:2]).max() / self.scale, 1.0)
        place, times = place / far, times / far
        if self.affine:
            turn = place[2:].reshape(2, 2)
        else:
            turn = np.array([[place[2], -place[3]], [place[3], place[2]]])
        square = state.blur**2 + 2 * (0.0 if fixed_blur else float(blur[0]))
        return _State(
            state.middle + place[:2],
            state.matrix + turn,
            math.sqrt(min(max(square, 0.05), 4.0)),
            state.times + times,
        )

    def step(self, state: _State, use: np.ndarray) -> _Step | None:
        """One step of Gauss and Newton with instruments, and what is known where it starts."""
        parts = self._parts(state, use)
        if parts is None:
            return None
        used, inside, rest, slopes, instruments = parts
        limit = 3 * float(np.median(np.abs(rest))) + 1e-9
        weighted = instruments / np.maximum(1, np.abs(rest) / limit)[:, None]
        normal = np.einsum("kpn,kqn->pq", weighted, slopes)
        scores = np.einsum("kpn,kn->pn", weighted, rest)
        block = BLOCK * self.factor
        numbers = np.stack([self.rows[inside] // block, self.columns[inside] // block])
        _, index = np.unique(numbers, axis=1, return_inverse=True)
        sums = np.stack([np.bincount(index.ravel(), score) for score in scores])
        try:
            inverse = np.linalg.inv(normal)
        except np.linalg.LinAlgError:
            return None
        change = -inverse @ scores.sum(1)
        covariance = inverse @ (sums @ sums.T) @ inverse.T
        known = len(change) - len(state.times) + 1
        contrary = 0.0
        if (
            self.believed and self.gap is not None and len(state.times) > 1
        ):  # one more observation (Kalman 1960)
            expected = self.gap * self.half
            variance = covariance[known, known] + (KNOWN * expected) ** 2
            gain = covariance[:, known] / variance
            aside = expected - state.times[1] - change[known]
            contrary = abs(aside) / math.sqrt(variance)
            change = change + gain * aside
            covariance = covariance - np.outer(gain, covariance[known])
        # what each frame says of its own instant
        wander, speed = instruments[:, -len(state.times)], slopes[:, -len(state.times)]
        power = (wander * speed).sum(1)
        noise = 1.5 * float(np.median(np.abs(rest)))
        size = np.sqrt((wander**2).sum(1))
        late = -(wander * rest).sum(1) / np.where(power > 0, power, np.inf)
        spread = noise * size / np.maximum(power, 1e-9 * power.max())
        return _Step(change, covariance, used, contrary, np.stack([late, spread]))

    def seen(self, state: _State) -> tuple[np.ndarray, np.ndarray, int]:
        """Which fast pixels lie on the sharp frames, away from the rim, and where, (2, h, w); and
        by how much these are thinned out."""
        at = state.middle[:, None, None] + np.einsum(
            "ij,jhw->ihw", state.matrix, np.stack([self.rows, self.columns])
        )
        margin = self.scale * self.factor
        inside = np.ones(at.shape[1:], bool)
        for axis in (0, 1):
            inside &= (at[axis] > margin) & (at[axis] < self.keys[0].shape[axis] - margin)
        return inside, at, self.sharp(state.blur)[1]

    def four(self, number: int) -> list[np.ndarray] | None:
        """The fast frames from one before a number to two after it."""
        four = [one for i in (-1, 0, 1, 2) if (one := self.fast(number + i)) is not None]
        return four if len(four) == 4 else None

    def _parts(
        self, state: _State, use: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
        """Which frames are used (K,), and which pixels (h, w); then, of these, left-overs (K, n),
        their slopes and the instruments (K, p, n)."""
        inside, at, thin = self.seen(state)
        if inside.sum() < 50:
            return None
        level = _Level(inside)
        pictures, _ = self.sharp(state.blur)
        at = at / thin - 0.5
        times = np.polynomial.polynomial.polyval(self.u, state.times)
        rows, columns = self.rows[inside], self.columns[inside]
        used, rests, units, optics, movers, speeds, powers = [], [], [], [], [], [], []
        for k in use.tolist():
            number = math.floor(times[k])
            four = self.four(number)
            if four is None:
                continue
            seen, down, right, bend = (
                level(sampled(picture, at, inside)) for picture in pictures[k]
            )
            movie = level(_between(four, times[k] - number)[inside])
            mover = (four[3] - four[0]) / 3
            further = [self.fast(number + i) for i in (-2, 3)]
            if further[0] is not None and further[1] is not None:
                mover = (mover + (further[1] - further[0]) / 5) / 2
            mover = gaussian_filter(mover, CALM)
            norm = max(float(seen @ seen), 1e-12)
            gain = float(seen @ movie) / norm
            geometry = (
                [down, right, down * rows, down * columns, right * rows, right * columns]
                if self.affine
                else [down, right, down * rows + right * columns, right * rows - down * columns]
            )
            used.append(k)
            rests.append(gain * seen - movie)
            units.append(seen / math.sqrt(norm))
            optics.append(gain * np.stack([*geometry, self.scale**2 * bend]))
            speeds.append(level((four[2] - four[1])[inside]))
            movers.append(mover)
            powers.append(gaussian_filter(mover**2, NEAR))
        if not used:
            return None
        noise = 4 * float(np.median(np.stack(powers)[:, inside])) + 1e-20
        basis = self.u[used, None] ** np.arange(len(state.times))  # (K, p)
        wander = np.stack(
            [
                level((mover * power / (power + noise))[inside])
                for mover, power in zip(movers, powers, strict=True)
            ]
        )
        clocks = -basis[:, :, None] * wander[:, None]
        if len(used) > 2:
            clocks -= clocks.mean(0)
        instruments = np.concatenate([np.stack(optics), clocks], 1)
        for instrument, unit in zip(instruments, units, strict=True):  # each frame's gain is free
            instrument -= np.outer(instrument @ unit, unit)
        slopes = np.concatenate(
            [np.stack(optics), -basis[:, :, None] * np.stack(speeds)[:, None]], 1
        )
        return np.array(used), inside, np.stack(rests), slopes, instruments

    def joint(self, state: _State, step: _Step, clear: bool) -> Joint:
        """The result in the units of others; without a clock that is too uncertain."""
        count = 6 if self.affine else 4
        place = Place(self.flip, state.matrix, state.middle - state.matrix @ self.centre)
        fit = Fit(place, step.covariance[:count, :count], state.blur)
        covariance = step.covariance[count + 1 :, count + 1 :]

        def deviation(u: np.ndarray | float) -> float:
            basis = np.atleast_1d(u)[:, None] ** np.arange(len(state.times))
            return math.sqrt(float(np.einsum("ki,ij,kj->k", basis, covariance, basis).max()))

        # that frames scatter more than noise has them is a clock, or a movie between frames, that
        # is not as it is taken to be
        weight = 1 / step.late[1] ** 2
        scatter = math.sqrt(float(np.average(step.late[0] ** 2, weights=weight)))
        excess = max(0.0, scatter**2 - 1 / float(weight.mean()))
        frames = float(weight.sum()) ** 2 / float((weight**2).sum())
        worst = math.hypot(deviation(self.u[step.used]), math.sqrt(excess / frames), MODEL)
        if not (clear and worst <= UNCERTAIN and scatter <= SCATTERED):
            return Joint(fit, None)
        order = len(state.times) - 1
        at = np.polynomial.polynomial.polyval(self.u, state.times)
        if order:
            clock = Clock.of_instants(self.numbers, at, order)
            if clock is None:
                return Joint(fit, None)
        else:
            assert self.gap is not None
            clock = Clock(self.gap, float(self.numbers[0] - at[0] / self.gap))
        at_start = deviation((clock.start - float(self.numbers.mean())) / self.half)
        gap_deviation = math.nan
        if len(state.times) > 1:
            gap_deviation = math.sqrt(covariance[1, 1]) / self.half
        return Joint(
            fit,
            replace(
                clock,
                gap_deviation=gap_deviation,
                start_deviation=at_start / clock.gap,
                deviation=worst,
                scatter=scatter,
                used=len(step.used),
            ),
        )


class _Level:
    """Takes the local mean out of pictures that are known at some pixels only, and smooths them."""

    def __init__(self, inside: np.ndarray, calm: float = 0.0) -> None:
        self.inside, self.calm = inside, calm
        self.weight = np.maximum(self._mean(inside.astype(np.float32)), 1e-3)[inside]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(n,) to (n,)"""
        picture = np.zeros(self.inside.shape, np.float32)
        picture[self.inside] = values
        rest: np.ndarray = values - self._mean(picture)[self.inside] / self.weight
        if self.calm:
            picture[self.inside] = rest
            rest = gaussian_filter(picture, self.calm, truncate=3)[self.inside]
        return rest

    @staticmethod
    def _mean(picture: np.ndarray) -> np.ndarray:
        for _ in range(2):
            picture = uniform_filter(picture, WIDE, mode="constant")
        return picture


def _between(four: Sequence[np.ndarray], s: float) -> np.ndarray:
    """The picture at the share s of the way from the second of four frames to the third (Catmull
    and Rom 1974)."""
    a, b, c, d = four
    picture: np.ndarray = b + 0.5 * s * (
        (c - a) + s * (2 * a - 5 * b + 4 * c - d + s * (3 * (b - c) + d - a))
    )
    return picture
