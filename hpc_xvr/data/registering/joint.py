"""The place and the clock together, refined on the pixels of all sharp frames.

With H_k the sharp frame k through the place and the fast camera's blur, on the fast camera's
pixels, and L(t) the fast movie between its frames, what is left over of both cameras is

    r_k = g_k H_k - L(t_k),    t_k = c_0 + c_1 u_k (+ c_2 u_k^2),

and place, blur and clock are where all r_k are smallest. A slow object's place and its time can
be exchanged, so neither is right unless both are found together. Three things would mislead it:

- Noise of the fast camera makes things look as if they moved, and what moves more seems less late
  (errors in variables). The equation of the time is therefore <z, r> = 0, where the instrument z is
  the rate of change between the fast frames further out, whose noise is not that of L(t) (Reiersol
  1945; Fuller 1987, Measurement Error Models, section 1.4). The sharp frames have far less noise:
  of that rate only what their slopes, or their change from one to the next, explain near a pixel is
  taken, which halves the uncertainty of slow motion (Lucas and Kanade 1981 explain it by slopes
  alone).
- What one camera alone sees standing still (dust). Where the mean of what is left over is more than
  noise, the instruments' mean over all sharp frames is taken out, which leaves no weight on it.
- What jumps between two fast frames, nothing says when. Pixels weigh the less, the less steadily
  they change over four frames.

Uncertainties are those of a sandwich over blocks of pixels, which need not
know what left-overs consist of.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.ndimage import maximum_filter

from hpc_xvr.data.registering.movie import Movie, between, steady
from hpc_xvr.data.registering.nearby import Explained, Level, on_grid
from hpc_xvr.data.registering.placing import Fit, Place, Thinned, sampled, shrunk
from hpc_xvr.data.registering.timing import Clock

MOST_PIXELS = 150_000
"""Of a fast frame; larger ones are thinned out."""
STEPS = 15
FIRST = 6
"""Steps in which the sharp frames' blur is made anew."""
STILL = 3.5
"""Deviations from which the mean of what is left over is not noise."""
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
FAR = -6, -3, 3, 6
"""Fast frames, later, at which the cameras are compared to know how much motion there is."""
LEFT = 0.1
"""Share of that motion that may be left over."""
SCATTERED = 0.3
"""Fast frames by which single sharp frames may scatter about the clock."""
UNCERTAIN = 0.25
"""Fast frames by which the instant of a sharp frame may be uncertain."""
ALONE = 0.15
"""Fast frames by which a single sharp frame is uncertain in any case: what lies between fast frames
is not quite known."""
MANY = 4.0
"""Equally certain sharp frames that must show a drift."""
SETTLED = 0.1
"""Fast pixels, at the corners, up to which slopes are those of a place nearby."""
BLOCK = 8
"""Pixels; the left-overs of blocks are nearly independent of each other."""


@dataclass(frozen=True)
class Joint:
    """What is found together."""

    fit: Fit
    clock: Clock | None
    """None where motion does not say clearly enough when the frames were taken."""
    apart: float
    """Share of the motion that no other place explains: near 0 where all that is seen moves alike,
    so that another place at another time fits as well."""


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
    apart: float
    """See `Joint`."""
    late: np.ndarray
    """Fast frames by which each of these alone would be later than the clock says, and the
    deviation of that, (2, used)."""

    @property
    def _weight(self) -> np.ndarray:
        weight: np.ndarray = 1 / self.late[1] ** 2
        return weight

    @property
    def scatter(self) -> float:
        """Fast frames by which single sharp frames scatter about the clock."""
        return math.sqrt(float(np.average(self.late[0] ** 2, weights=self._weight)))

    @property
    def excess(self) -> float:
        """Of the scatter's square, that noise does not explain: the clock, or the movie between
        frames, is not as it is taken to be."""
        return max(0.0, self.scatter**2 - 1 / float(self._weight.mean()))

    @property
    def certain(self) -> np.ndarray:
        """(used,), one over the deviation of each."""
        certain: np.ndarray = 1 / np.sqrt(self.late[1] ** 2 + self.excess)
        return certain

    @property
    def frames(self) -> float:
        """Equally certain sharp frames that would say as much."""
        weight = self.certain**2
        return float(weight.sum()) ** 2 / float((weight**2).sum())

    @property
    def trust(self) -> np.ndarray:
        """(used,), of what each says of the time, if frames scatter as much as these."""
        square: np.ndarray = self.late[1] ** 2
        return square / (square + self.excess)


@dataclass(frozen=True)
class Cameras:
    """Two recordings."""

    keys: Sequence[np.ndarray]
    """Sharp frames (H, W)."""
    numbers: np.ndarray
    """Of each, in its camera's count."""
    frame: Callable[[int], np.ndarray | None]
    """Fast frame (h, w) of a number, or None where it is missing."""
    size: tuple[int, int]
    """(h, w)"""
    gap: float | None
    """Fast frames a sharp one, where it is known."""


def together(
    cameras: Cameras, place: Place, clock: Clock, blur: float, affine: bool = False
) -> Joint | None:
    """Place, blur and clock at which the two cameras agree best, from near ones.

    Args:
        blur: about that of the fast camera, in its pixels.
        affine: six numbers of the place are free, not four.

    Returns:
        None where there is no such place and clock.
    """
    problem = _Problem(cameras, place, affine)
    at = clock.of_sharp(cameras.numbers)
    best: Joint | None = None
    count = len(cameras.keys)
    for order in (1, 2) if count >= FEW else (min(1, count - 1),):
        times = np.polynomial.polynomial.polyfit(problem.u, at, order)
        solved = problem.searched(_State(place.at(*problem.centre), place.matrix, blur, times))
        if solved is None:
            break
        state, step, clear = solved
        if order == 2:
            bend, deviation = abs(state.times[2]), math.sqrt(step.covariance[-1, -1])
            if bend < max(LATE, 6 * deviation) or step.frames < MANY:
                break
        joint = problem.joint(state, step, clear)
        if best is None or joint.clock is not None:
            best = joint
        if not clear:
            break
    return best


def sheared(cameras: Cameras, found: Joint) -> Fit | None:
    """The place where six numbers of it are free, from what `together` found with four; None where
    there is none."""
    if found.clock is None:
        return None
    place, count = found.fit.place, len(cameras.keys)
    problem = _Problem(cameras, place, affine=True)
    order = 2 if found.clock.drift else min(1, count - 1)
    at = found.clock.of_sharp(cameras.numbers)
    times = np.polynomial.polynomial.polyfit(problem.u, at, order)
    start = _State(place.at(*problem.centre), place.matrix, found.fit.blur, times)
    solved = problem.solved(start, np.arange(count))
    return None if solved is None else problem.fit(*solved)


@dataclass(frozen=True)
class _Nearby:
    """What changes little from step to step while place and blur hardly do."""

    corners: np.ndarray
    """Of the place that it was made for, (4, 2)."""
    blur: float
    inside: np.ndarray
    """Fast pixels on the sharp frames, away from the rim, (h, w)."""
    level: Level
    slopes: dict[int, np.ndarray] = field(default_factory=dict)
    """By place and blur, of each sharp frame, (p, n)."""
    explained: dict[int, Explained] = field(default_factory=dict)
    """By each sharp frame."""
    movie: dict[tuple[int, int], _Around] = field(default_factory=dict)
    """Of each sharp frame and the fast frame before it."""


@dataclass(frozen=True)
class _Around:
    """Of the fast movie about a sharp frame."""

    speed: np.ndarray
    """(n,), change from one frame to the next."""
    rates: list[np.ndarray]
    """Of change as instruments, each (n,)."""
    weight: np.ndarray
    """(n,), near 0 where it does not change steadily, so that little is known between frames."""


@dataclass
class _Parts:
    """What is left over of K sharp frames on n fast pixels, and what it depends on."""

    used: np.ndarray
    """(K,), the sharp frames."""
    inside: np.ndarray
    """(h, w), the pixels."""
    seen: np.ndarray
    """(K, n), the sharp frames themselves."""
    rest: np.ndarray
    """(K, n)"""
    explained: list[Explained]
    moving: np.ndarray
    """(n,)"""
    wander: np.ndarray
    """(K, n), the rate of change as instrument."""
    slopes: np.ndarray = field(init=False)
    """(K, p, n)"""
    instruments: np.ndarray = field(init=False)
    """(K, p, n)"""

    def motion(self, frames: Sequence[int], rests: np.ndarray) -> float:
        """What of these left-overs (len(frames), n) motion would explain, a mean square."""
        explained = [
            float((self.moving * rest) @ self.explained[k](rest))
            for k, rest in zip(frames, rests, strict=True)
        ]
        return statistics.mean(explained)


class _Problem:
    """Both cameras' frames, and the steps to where they agree best."""

    def __init__(self, cameras: Cameras, place: Place, affine: bool) -> None:
        self.keys = [Thinned(key) for key in cameras.keys]
        self.numbers = np.asarray(cameras.numbers, float)
        self.half = max(1.0, float(np.ptp(self.numbers)) / 2)
        self.u = (self.numbers - self.numbers.mean()) / self.half
        self.flip, self.scale, self.size = place.flip, place.scale, cameras.size
        self.gap, self.believed, self.affine = cameras.gap, True, affine
        self.factor = max(1.0, math.sqrt(self.size[0] * self.size[1] / MOST_PIXELS))
        small, corner = shrunk(np.zeros(self.size), self.factor)
        self.movie = Movie(cameras.frame, small.shape, self.factor, place.flip)
        self.centre = np.array(self.size) / 2
        rows, columns = (
            corner[axis] + self.factor * (np.arange(small.shape[axis]) + 0.5) - self.centre[axis]
            for axis in (0, 1)
        )
        self.rows, self.columns = np.meshgrid(rows, columns, indexing="ij")
        self.trust = np.ones(len(self.keys))
        self._sharp_of = math.nan
        self._sharp: tuple[list[tuple[np.ndarray, ...]], int] = [], 1
        self._nearby: _Nearby | None = None

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
        self.trust = np.ones(len(self.keys))
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
            if solved is None:
                return None
            state, step = solved
        if step.excess:
            self.trust[step.used] = step.trust
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
        deviations they agree less there than here; 0 deviations where motion is left over here."""
        parts = self._parts(state, use)
        if parts is None:
            return 0, 0.0
        still = _still(parts)
        level = Level(parts.inside)
        times = np.polynomial.polynomial.polyval(self.u, state.times)
        noise = 2.2 * float(np.median(np.abs(parts.rest))) ** 2
        found = []
        odd: list[float] = []
        for shift in range(-REACH, REACH + 1):
            there, away = [], []
            for number, k in enumerate(parts.used.tolist()):
                four = self.movie.four(math.floor(times[k]) + shift) if shift else None
                if four is None:
                    continue
                movie = level(between(four, times[k] % 1)[parts.inside])
                seen = parts.seen[number]
                gain = float(seen @ movie) / max(float(seen @ seen), 1e-12)
                there.append(number)
                away.append(gain * seen - movie)
            if len(there) < SHARE * len(parts.used):
                continue
            if shift in FAR:
                odd.append(parts.motion(there, np.stack(away)))
            # the change of the squares is the sum times the difference, without the noise of that
            sums, change = np.stack(away) + parts.rest[there], parts.rest[there] - np.stack(away)
            if abs(shift) == 1:  # noise is more than motion
                change = shift * parts.wander[there]
            else:
                change = parts.moving * np.stack(
                    [parts.explained[n](c) for n, c in zip(there, change, strict=True)]
                )
            if len(there) > 2:
                change -= still * change.mean(0)
            deviation = math.sqrt(2 * noise * float((change**2).sum()))
            found.append((-float((sums * change).sum()) / max(deviation, 1e-20), shift))
        if not found:
            return 0, 0.0
        clear, shift = min(found)
        everywhere = list(range(len(parts.used)))
        draw = np.random.default_rng(0).standard_normal(parts.rest.shape, np.float32)
        floor = parts.motion(everywhere, math.sqrt(noise) * draw)
        left = parts.motion(everywhere, parts.rest) - floor
        if clear > 0 and not (odd and left <= LEFT * (statistics.mean(odd) - floor)):
            clear = 0.0
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
        used, inside, rest = parts.used, parts.inside, parts.rest
        slopes, instruments = parts.slopes, parts.instruments
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
        place, time = slice(6 if self.affine else 4), -len(state.times)
        explained = np.linalg.solve(normal[place, place], normal[place, time])
        apart = 1 - float(normal[time, place] @ explained) / float(normal[time, time])
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
        wander = instruments[:, -len(state.times)] / self.trust[used, None]
        speed = slopes[:, -len(state.times)]
        power = (wander * speed).sum(1)
        noise = 1.5 * float(np.median(np.abs(rest)))
        size = np.sqrt((wander**2).sum(1))
        late = -(wander * rest).sum(1) / np.where(power > 0, power, np.inf)
        spread = noise * size / np.maximum(power, 1e-9 * power.max())
        return _Step(change, covariance, used, contrary, apart, np.stack([late, spread]))

    def at(self, state: _State) -> np.ndarray:
        """Where the fast pixels lie on the sharp frames, (2, h, w)."""
        at: np.ndarray = state.middle[:, None, None] + np.einsum(
            "ij,jhw->ihw", state.matrix, np.stack([self.rows, self.columns])
        )
        return at

    def nearby(self, state: _State) -> _Nearby:
        """What is known of a place and a blur near these."""
        corners = (
            state.middle + (np.indices((2, 2)).reshape(2, 4).T - 0.5) * self.size @ state.matrix.T
        )
        known = self._nearby
        if (
            known is not None
            and abs(known.blur - state.blur) <= SETTLED
            and np.abs(known.corners - corners).max() <= SETTLED * self.scale
        ):
            return known
        at, margin = self.at(state), self.scale * self.factor
        inside = np.ones(at.shape[1:], bool)
        for axis in (0, 1):
            inside &= (at[axis] > margin) & (at[axis] < self.keys[0].shape[axis] - margin)
        self._nearby = _Nearby(corners, state.blur, inside, Level(inside))
        return self._nearby

    def _parts(self, state: _State, use: np.ndarray) -> _Parts | None:
        """What is left over, and what it depends on; None where there is too little."""
        nearby = self.nearby(state)
        inside, level = nearby.inside, nearby.level
        if inside.sum() < 50:
            return None
        pictures, thin = self.sharp(state.blur)
        at = self.at(state) / thin - 0.5
        times = np.polynomial.polynomial.polyval(self.u, state.times)
        shown = [level(sampled(values, at, inside)) for values, *_ in pictures]
        used, rests, units, optics, around = [], [], [], [], []
        for k in use.tolist():
            number = math.floor(times[k])
            four = self.movie.four(number)
            if four is None:
                continue
            if k not in nearby.slopes:
                slopes = [level(sampled(part, at, inside)) for part in pictures[k][1:]]
                self._geometry(nearby, k, slopes, shown)
            if (k, number) not in nearby.movie:
                self._movie(nearby, k, number, four)
            seen = shown[k]
            movie = level(between(four, times[k] - number)[inside])
            norm = max(float(seen @ seen), 1e-12)
            gain = float(seen @ movie) / norm
            used.append(k)
            rests.append(gain * seen - movie)
            units.append(seen / math.sqrt(norm))
            optics.append(gain * nearby.slopes[k])
            around.append(nearby.movie[k, number])
        if not used:
            return None
        speeds = np.stack([one.speed for one in around])
        moving = self.movie.moving(times[used])[inside]
        wander = _least_noisy(moving * np.stack([one.rates for one in around], 1), speeds)
        basis = self.u[used, None] ** np.arange(len(state.times))  # (K, p)
        clocks = -self.trust[used, None, None] * basis[:, :, None] * wander[:, None]
        parts = _Parts(
            np.array(used),
            inside,
            np.stack(shown)[used],
            np.stack(rests),
            [nearby.explained[k] for k in used],
            moving,
            wander,
        )
        if len(used) > 2:
            clocks -= _still(parts) * clocks.mean(0)
        parts.instruments = np.concatenate([np.stack(optics), clocks], 1)
        for instrument, unit, one in zip(parts.instruments, units, around, strict=True):
            weighted = one.weight * unit
            instrument -= np.outer(instrument @ weighted, unit) / (unit @ weighted)  # free gain
            instrument *= one.weight
        parts.slopes = np.concatenate([np.stack(optics), -basis[:, :, None] * speeds[:, None]], 1)
        return parts

    def _geometry(
        self, nearby: _Nearby, k: int, slopes: Sequence[np.ndarray], shown: Sequence[np.ndarray]
    ) -> None:
        """Add how a sharp frame depends on place and blur."""
        rows, columns = self.rows[nearby.inside], self.columns[nearby.inside]
        down, right, bend = slopes
        geometry = (
            [down, right, down * rows, down * columns, right * rows, right * columns]
            if self.affine
            else [down, right, down * rows + right * columns, right * rows - down * columns]
        )
        nearby.slopes[k] = np.stack([*geometry, self.scale**2 * bend])
        features = [down, right]
        if len(shown) > 1:
            features.append(shown[min(k + 1, len(shown) - 1)] - shown[max(k - 1, 0)])
        nearby.explained[k] = Explained(nearby.inside, features)

    def _movie(self, nearby: _Nearby, k: int, number: int, four: Sequence[np.ndarray]) -> None:
        """Add how the fast movie changes about a sharp frame."""
        inside, level, explained = nearby.inside, nearby.level, nearby.explained[k]
        rates = [explained(level(rate[inside])) for rate in self.movie.rates(number)]
        speed = level((four[2] - four[1])[inside])
        nearby.movie[k, number] = _Around(speed, rates, steady(four)[inside])

    def fit(self, state: _State, step: _Step) -> Fit:
        count = 6 if self.affine else 4
        place = Place(self.flip, state.matrix, state.middle - state.matrix @ self.centre)
        return Fit(place, step.covariance[:count, :count], state.blur)

    def joint(self, state: _State, step: _Step, clear: bool) -> Joint:
        """The result in the units of others; without a clock that is too uncertain."""
        count = 6 if self.affine else 4
        fit = self.fit(state, step)
        covariance = step.covariance[count + 1 :, count + 1 :]

        def deviation(u: np.ndarray | float) -> float:
            basis = np.atleast_1d(u)[:, None] ** np.arange(len(state.times))
            return math.sqrt(float(np.einsum("ki,ij,kj->k", basis, covariance, basis).max()))

        # errors of whole frames, which blocks of pixels do not show
        free = 1 if self.believed and self.gap is not None else len(state.times)
        basis = self.u[step.used, None] ** np.arange(free)
        share = np.linalg.pinv(basis * step.certain[:, None]) * step.certain
        aside = float(((basis @ share) ** 2).sum(1).max()) * (step.excess + ALONE**2 / step.frames)
        worst = math.hypot(deviation(self.u[step.used]), math.sqrt(aside))
        scatter = step.scatter
        if not (clear and worst <= UNCERTAIN and scatter <= SCATTERED):
            return Joint(fit, None, step.apart)
        order = len(state.times) - 1
        at = np.polynomial.polynomial.polyval(self.u, state.times)
        if order:
            clock = Clock.of_instants(self.numbers, at, order)
            if clock is None:
                return Joint(fit, None, step.apart)
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
            step.apart,
        )


def _least_noisy(rates: np.ndarray, speeds: np.ndarray) -> np.ndarray:
    """Of instruments (m, K, n) those (K, n) that leave the time least uncertain."""
    told = (rates * speeds).sum((1, 2)) / np.sqrt((rates**2).sum((1, 2)) + 1e-20)
    best: np.ndarray = rates[told.argmax()]
    return best


def _still(parts: _Parts) -> np.ndarray:
    """(n,), 1 where what is left over has a mean that is more than noise, or is beside it; else
    0."""
    mean = parts.rest.mean(0)
    odd = np.abs(mean) > STILL * 1.5 * float(np.median(np.abs(mean)))
    return maximum_filter(on_grid(odd, parts.inside), 3)[parts.inside]
