"""Do two cameras show the same? Key frames, binned to the fast camera's pixels, against its frames.

Both saw the same object at the same instant, so a fast frame is a binned key frame times a gain,
plus an offset and noise. Whatever else is found (another instant, another place, a mirrored or a
negative picture) says that the recordings were put together in a wrong way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from hpc_xvr.data.degrade import bin_down
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

CONTRADICTION = 0.02
"""Relative difference between a given gap and that of the frame rates that is worth a warning."""
LOOKED_AT = 8
"""Key frames that are compared, spread over the recording."""
REACH = 8
"""Fast frames before and after a key frame that it is compared with."""
ALIKE = 0.9
"""Correlation above which gain and offset are certain enough to be taken out."""
RELATED, TOO_FAR = 0.3, 3.0
"""Correlation above which two cameras show the same, and gain beyond which its flicker is all that
would be seen."""
BETTER = 2.0
"""What another place or time must leave less of, as a ratio of variances, to be told."""
STEADY = 0.8
"""Correlation of fast frames with their neighbours above which noise is not what makes them unlike
the sharp ones: noise that leaves them a correlation of 0.5 would leave their neighbours 0.25."""
FAR, LATE = 1.0, 2.0
"""Fast pixels beside the sharp picture, and fast frames beside its instant, from which on a movie
would be wrong."""
CONTRAST = 0.005
"""Deviation of a binned key frame, of its largest value, up to which nothing can be compared. Not
of full scale: 10-bit counts in 16 bit are all dark."""
SMALLEST = 4
"""Pixels on the shorter side of a fast frame below which there are too few to compare."""
BLURS = 0.3, 0.45, 0.6, 0.75, 0.9, 1.1, 1.4, 1.7, 2.1
"""Deviations of Gaussians, fast pixels, by which the fast camera may be blurred more than a binned
sharp frame."""
TURNED = {
    "upside down": (slice(None, None, -1), slice(None)),
    "mirrored left to right": (slice(None), slice(None, None, -1)),
    "turned by 180 degrees": (slice(None, None, -1), slice(None, None, -1)),
}


@dataclass(frozen=True)
class Grey:
    """fast = gain x sharp + offset, both in shares of their full scales."""

    gain: float = 1.0
    offset: float = 0.0

    def matched(self, frame: np.ndarray) -> np.ndarray:
        """A fast frame on the sharp camera's grey scale."""
        if self == Grey():
            return frame
        matched: np.ndarray = (frame - np.float32(self.offset)) / np.float32(self.gain)
        return matched


@dataclass(frozen=True)
class Agreement:
    """How well the fast frames fit the key frames; means over the key frames that were compared."""

    correlation: float
    grey: Grey
    level: float
    """Mean of the binned key frames."""
    contrast: float
    """Their standard deviation."""
    spread: float
    """Largest difference between the gain of one key frame and the mean one, as a share of it."""
    shift: tuple[float, float]
    """Rows and columns of fast pixels by which the fast camera's picture lies further down and to
    the right."""
    lags: tuple[tuple[int, int], ...]
    """Key frame's number, and how many fast frames later the one comes that fits it best."""
    turned: str
    """Name in TURNED if the fast frames fit only in this way, else empty."""
    usual_shift: tuple[float, float] = (0.0, 0.0)
    """The same as `shift`, but the median: where most key frames lie, not one."""
    steady: float = 0.0
    """Correlation of the fast frames with their neighbours in time: high if they show more than
    noise."""


def compare(fast: Sequence[np.ndarray], keys: Mapping[int, np.ndarray]) -> Agreement | None:
    """Compare some key frames with the fast frames around their instants.

    Args:
        fast: frames (h, w) in [0, 1].
        keys: fast frame number -> key frame (s h, s w) in [0, 1], with s a whole number.

    Returns None if no key frame has contrast enough, or frames are too small.
    """
    times = list(keys)
    chosen = np.unique(np.linspace(0, len(times) - 1, LOOKED_AT).round().astype(int))
    fits, lags, ways, alike = [], [], [], []
    for number in chosen:
        t = times[number]
        frame, key = fast[t], keys[t]
        if min(frame.shape) < SMALLEST:
            continue
        low = bin_down(key, key.shape[0] // frame.shape[0])
        if low.std() <= CONTRAST * low.max():
            continue
        fits.append((*_fit(low, frame), low.mean(), low.std()))
        around = range(max(0, t - REACH), min(len(fast), t + REACH + 1))
        left = {other: _left(low, fast[other]) for other in around}
        best = min(left, key=lambda other: left[other])
        lags.append((int(number), best - t if left[t] > BETTER * left[best] else 0))
        beside = max(0, t - 1) if t + 1 == len(fast) else t + 1
        alike.append(_correlation(frame, fast[beside]) if beside != t else 0.0)
        turned = {name: _left(low[way], frame) for name, way in TURNED.items()}
        name = min(turned, key=lambda way: turned[way])
        ways.append(name if left[t] > BETTER * turned[name] else "")
    if not fits:
        return None
    correlation, gain, offset, down, right, level, contrast = np.mean(fits, 0)
    spread = float(np.abs(np.array(fits)[:, 1] - gain).max() / max(abs(gain), 1e-9))
    grey = Grey(float(gain), float(offset))
    usual = max(sorted(set(ways)), key=ways.count)
    return Agreement(
        float(correlation),
        grey,
        float(level),
        float(contrast),
        spread,
        (float(down), float(right)),
        tuple(lags),
        usual,
        (float(np.median([fit[3] for fit in fits])), float(np.median([fit[4] for fit in fits]))),
        float(np.mean(alike)),
    )


def told(found: Agreement, name: str, gap: float, rates: float | None = None) -> str:
    """Warn of what does not fit, with the likely cause; return what certainly does not, and would
    make a wrong movie, as "what: what to do", else nothing.

    Args:
        rates: the gap as the frame rates say, if they are known.

    Raises:
        InputError: a mirrored or a negative picture: nothing right could come of it.
    """
    if found.turned:
        raise InputError(
            f"{name}: the fast frames fit the sharp ones only {found.turned}: give --lr-flip-rows "
            "(or leave it out), or a --registration with flip: rows, columns or both"
        )
    if found.correlation < -0.5:
        raise InputError(
            f"{name}: one camera's picture is the negative of the other's (correlation "
            f"{found.correlation:.2f}): is one of them an attenuation, or stored with white as 0?"
        )
    off = [(number, lag) for number, lag in found.lags if lag]
    aside = max(map(abs, found.shift))
    if len(off) > len(found.lags) / 2:
        problem = f"{name}: {_cause(off, gap)}"
        certain = float(np.median([abs(lag) for _, lag in off])) >= LATE
        if rates and abs(gap / rates - 1) > CONTRADICTION:
            problem += f"; the frame rates, too, say {rates:g}"
            certain = True
    elif aside > 0.5:
        problem = (
            f"{name}: the fast camera's picture lies {found.shift[0]:+.1f} rows and "
            f"{found.shift[1]:+.1f} columns of fast pixels beside the sharp one's: check "
            "--registration (hpc-xvr register finds it)"
        )
        certain = max(map(abs, found.usual_shift)) >= FAR
    elif found.correlation < 0.5:
        certain = found.steady > STEADY
        cause = (
            f", although they resemble each other ({found.steady:.2f}): do"
            if certain
            else ": noise, or do"
        )
        problem = (
            f"{name}: the fast frames hardly resemble the sharp ones (correlation "
            f"{found.correlation:.2f}){cause} the two recordings not belong together? check --gap, "
            "--lr-start, --registration and flat fields"
        )
    else:
        return ""
    if not certain:
        logger.warning("%s", problem)
        return ""
    return problem


def grey_to_match(found: Agreement | None, name: str, match: bool | Grey) -> Grey:
    """The gain and offset to take out: those that are stated, or as `grey_of` if `match`.

    Warns where the key frames certainly have others than those that are stated."""
    if isinstance(match, Grey):
        if found is not None and found.correlation >= ALIKE and found.spread <= 0.1:
            seen = found.grey.gain * found.level + found.grey.offset
            aside = abs(match.gain * found.level + match.offset - seen)
            unlike = abs(match.gain / found.grey.gain - 1) > 0.2
            if unlike or aside > max(0.05 * found.level, 0.1 * found.contrast) * found.grey.gain:
                logger.warning(
                    "%s: --match-grey states fast = %.4g x sharp %+.4f, but the key frames say "
                    "%.4g x sharp %+.4f: frames beside key frames may flicker",
                    *(name, match.gain, match.offset, found.grey.gain, found.grey.offset),
                )
        return match
    return grey_of(found, name) if match and found is not None else Grey()


def grey_of(found: Agreement, name: str) -> Grey:
    """The gain and offset to take out: where they differ from one scale, and are certain.

    Warns where they are taken out, and where they seem to differ but nothing is certain.

    Raises:
        InputError: they differ so much that frames would flicker, but nothing is certain.
    """
    gain, offset = found.grey.gain, found.grey.offset
    aside = abs((gain - 1) * found.level + offset)  # of the means: flicker at the key frames
    if 0.8 < gain < 1.25 and aside < max(0.01 * found.level, 0.02 * found.contrast):
        return Grey()  # blur changes contrast, but not the mean
    relation = f"fast = {gain:.4g} x sharp {offset:+.4f} (shares of their full scales)"
    if found.correlation < ALIKE or found.spread > 0.1 or gain <= 0:
        if found.correlation > RELATED and not 1 / TOO_FAR < gain < TOO_FAR:
            raise InputError(
                f"{name}: the cameras' grey scales differ by a factor of about {gain:.3g}, but not "
                f"certainly enough (correlation {found.correlation:.2f}, gains differ by "
                f"{100 * found.spread:.0f} %) to match them: state --lr-bit-depth, --hr-bit-depth "
                "or full scales, or give --match-grey off to go on without"
            )
        if 0.8 < gain < 1.25 and aside < 0.05 * max(found.level, found.contrast):
            return Grey()  # noise and motion do as much
        logger.warning(
            "%s: the cameras' grey scales may differ, %s, but this is not certain (correlation "
            "%.2f, gains differ by %.0f %%) and nothing was changed: frames beside key frames may "
            "flicker; correct both cameras with flat fields, or state bit depths and full scales",
            *(name, relation, found.correlation, 100 * found.spread),
        )
        return Grey()
    hint = "" if 0.6 < gain < 1.7 else "; so far apart, check --lr-bit-depth and --hr-bit-depth"
    logger.warning(
        "%s: %s: the fast frames are brought to the sharp camera's grey scale (--match-grey off "
        "leaves them)%s",
        *(name, relation, hint),
    )
    return found.grey


def _cause(off: Sequence[tuple[int, int]], gap: float) -> str:
    numbers, lags = np.array(off, float).T
    slope = np.polyfit(numbers, lags, 1)[0] if len(off) > 2 else 0.0
    first, last = off[0], off[-1]
    seen = f"key frame {first[0]} fits the fast frame {first[1]:+d} from its instant best"
    if len(off) > 1:
        seen += f", key frame {last[0]} the one {last[1]:+d}"
    if abs(slope) > 0.3 and np.ptp(lags) > 1:
        return f"{seen}: a --gap of about {gap + slope:.3g} instead of {gap:g} would explain it"
    return (
        f"{seen}: check --lr-start (about {-np.median(lags) / gap:+.3g} from what it is now) and "
        "--gap"
    )


def _fit(low: np.ndarray, frame: np.ndarray) -> tuple[float, float, float, float, float]:
    """Correlation, gain, offset, and rows and columns of shift of a fast frame against a binned
    key frame. The shift: whole pixels by cross-correlation, the rest by least squares with gain
    and offset; 0 unless it explains much more than gain, offset and blur do alone."""
    spectrum = np.fft.fft2(frame - frame.mean()) * np.conj(np.fft.fft2(low - low.mean()))
    peaks = np.fft.ifft2(spectrum).real
    place = np.unravel_index(peaks.argmax(), peaks.shape)
    down, right = (
        int(k) if k <= side // 2 else int(k) - side
        for k, side in zip(place, low.shape, strict=True)
    )
    moved = np.roll(low, (down, right), (0, 1))
    keep = tuple(
        slice(max(k, 0) + 1, side + min(k, 0) - 1)
        for k, side in zip((down, right), low.shape, strict=True)
    )
    if abs(down) > low.shape[0] // 4 or abs(right) > low.shape[1] // 4:
        down, right, moved, keep = 0, 0, low, (slice(1, -1), slice(1, -1))
    ones = np.ones(low.shape)
    inner = slice(1, -1), slice(1, -1)
    (gain, offset), plain, kept, seen = min(
        (
            (*_least_squares([a[inner], ones[inner]], frame[inner]), a[inner].ravel())
            for a in _blurred(low)
        ),
        key=lambda fit: fit[1],
    )
    # Dead pixels and zingers make two pictures of the same no less alike.
    correlation = max(
        _correlation(low, frame), _correlation(seen[kept], frame[inner].ravel()[kept])
    )
    shifted, moving, _ = min(
        (
            _least_squares([part[keep] for part in (a, ones, *np.gradient(a))], frame[keep])
            for a in _blurred(moved)
        ),
        key=lambda fit: fit[1],
    )
    floor = 1e-4 * float(frame.var())
    if shifted[0] > 0 and plain + floor > BETTER * (moving + floor):
        gain, offset, dy, dx = shifted
        return correlation, gain, offset, down - dy / gain, right - dx / gain
    return correlation, gain, offset, 0.0, 0.0


def _blurred(low: np.ndarray) -> Iterator[np.ndarray]:
    """A binned key frame as cameras of more and more blur would see it: a blurred picture has less
    contrast, and that is no gain."""
    yield low
    for sigma in BLURS:
        yield gaussian_filter(low, sigma, mode="nearest")


def _least_squares(
    parts: Sequence[np.ndarray], frame: np.ndarray
) -> tuple[np.ndarray, float, np.ndarray]:
    """Weights of `parts` (h, w) whose sum is nearest to `frame`, the variance that is left, and
    which pixels counted: those far aside (dead ones, zingers) do not."""
    columns, values = np.stack([part.ravel() for part in parts], 1), frame.ravel()
    kept = np.ones(values.size, bool)
    for _ in range(4):
        weights, *_ = np.linalg.lstsq(columns[kept], values[kept], rcond=None)
        aside = np.abs(columns @ weights - values)
        limit = 6 * float(np.median(aside)) + 1e-6
        kept = aside <= limit
    return weights, float(np.mean(np.minimum(aside, limit) ** 2)), kept


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(dtype=float), b - b.mean(dtype=float)
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def _left(low: np.ndarray, frame: np.ndarray) -> float:
    """Share of a fast frame's variance that a binned key frame does not explain; at least 1e-4,
    which rounding leaves."""
    return 1 - max(0.0, _correlation(low, frame)) ** 2 + 1e-4
