"""Every recording holds its own truth: its key frames.

Every other key frame is left out, made from its neighbours at twice the gap, and compared with what
was recorded. The frames of the movie lie nearer to key frames than that, so their errors are
smaller: what is found is an upper estimate. How much smaller they are was measured on simulated
recordings (benchmarks/trust.py).

Shapes: h w the fast camera's grid, H = scale*h, W = scale*w; K key frames that were left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from hpc_xvr import metrics
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger, track
from hpc_xvr.reconstruction.methods import NamedMethod
from hpc_xvr.reconstruction.pipeline import reconstruct
from hpc_xvr.reconstruction.streams import KeyFrames, Stream
from hpc_xvr.reconstruction.trust.uncertainty import Surroundings, deviation

NEEDED = 3
"""Key frames that a recording must have."""
BETTER_DB = 1.3
"""By how much the frames of the movie are nearer to the truth than the key frames left out."""
SPREAD_DB = 0.8
"""Standard deviation of that from recording to recording."""
EQUAL_DB = 100.0
"""What equal frames count in means."""
WITHIN = 0.6827
"""Share of a Gaussian's values within one standard deviation."""
_BINS = np.geomspace(1e-4, 1e4, 2001)


@dataclass(frozen=True)
class HeldOut:
    """What the key frames that were left out say."""

    times: tuple[int, ...]
    """Which they are, as numbers of fast frames."""
    gap: int
    """Largest distance of the key frames that they were made from."""
    psnr: tuple[float, ...]
    """dB, of each."""
    ssim: tuple[float, ...]
    """Of each; NaN for frames too small for it."""
    nrmse: tuple[float, ...]
    """Of each: the root mean square of frame - truth, divided by that of truth."""
    error: np.ndarray = field(repr=False, compare=False)
    """(H, W) float32: root of the mean squared error at each pixel, of full scale."""
    factor: float
    """Of the uncertainty: with it, 68 % of the pixels lie within one standard deviation."""
    within: tuple[float, float]
    """Shares of pixels within one and two standard deviations before that factor."""

    @property
    def mean_psnr(self) -> float:
        """dB: mean over the key frames left out, an estimate on the safe side."""
        return float(np.mean(np.minimum(self.psnr, EQUAL_DB)))

    @property
    def expected_psnr(self) -> float:
        """dB: what the frames of the movie will have on average, to SPREAD_DB."""
        return self.mean_psnr + BETTER_DB

    def told(self) -> str:
        """In a sentence."""
        few = "" if len(self.times) > 2 else f" (few: it rests on {len(self.times)})"
        return (
            f"{len(self.times)} key frame{'s' * (len(self.times) > 1)} left out and made from "
            f"their neighbours{few}: PSNR "
            f"{self.mean_psnr:.1f} dB, SSIM {float(np.mean(self.ssim)):.3f}, error "
            f"{100 * float(np.mean(self.nrmse)):.1f} %; frames of the movie lie nearer to key "
            f"frames: {self.expected_psnr:.1f} +- {SPREAD_DB:g} dB is to be expected"
        )


def left_out(times: Sequence[int]) -> list[int]:
    """Every other key frame, of those between two others.

    Raises:
        InputError: there is none.
    """
    if len(times) < NEEDED:
        raise InputError(
            f"--check: the recording has {len(times)} key frames; at least {NEEDED} are needed, "
            "since one that is left out must lie between two others: reconstruct without --check"
        )
    return sorted(times)[1:-1:2]


def check(
    method: NamedMethod,
    lr: Stream,
    keys: KeyFrames,
    around: Surroundings,
    device: torch.device | str = "cpu",
) -> HeldOut:
    """Leave out every other key frame and make it from its neighbours, at twice the gap.

    Raises:
        InputError: fewer than three key frames.
    """
    held = left_out(list(keys))
    rest = [t for t in sorted(keys) if t not in set(held)]
    gap = max(b - a for a, b in pairwise(rest))
    if method.longest_gap is not None and gap > method.longest_gap:
        logger.warning(
            "check: without every other key frame the gaps are %d frames, %s was trained for %d: "
            "the estimate is even more on the safe side than it is anyway",
            *(gap, method.name, method.longest_gap),
        )
    frames = reconstruct(
        method.method,
        lr,
        KeyFrames(rest, keys.shape, keys.__getitem__),
        lr_frames=1 if method.lr_frames is None else method.lr_frames,
        n_out=method.n_out,
        device=device,
        precision=method.precision,
        only=set(held),
    )
    psnr, ssim, nrmse = [], [], []
    square = np.zeros(keys.shape)
    counts = np.zeros(len(_BINS) + 1, int)
    for t, frame in track(frames, "checking", len(held), "key frames"):
        truth = np.clip(np.asarray(keys[t], np.float32), 0, 1)
        error = frame.astype(np.float64) - truth
        square += error**2
        psnr.append(metrics.psnr_float(frame, truth))
        ssim.append(metrics.ssim(frame, truth) if min(truth.shape) >= metrics.WINDOW else np.nan)
        size = float(np.sqrt(np.square(truth, dtype=np.float64).mean()))
        nrmse.append(float(np.sqrt((error**2).mean())) / max(size, 1e-12))
        before, after = max(k for k in rest if k < t), min(k for k in rest if k > t)
        sigma = deviation(frame, lr[t], keys[before], keys[after], after - before, around)
        classes = np.searchsorted(_BINS, (np.abs(error) / sigma).ravel())
        counts += np.bincount(classes, minlength=len(counts))
    share = np.cumsum(counts) / counts.sum()
    return HeldOut(
        times=tuple(held),
        gap=gap,
        psnr=tuple(psnr),
        ssim=tuple(ssim),
        nrmse=tuple(nrmse),
        error=np.sqrt(square / len(held)).astype(np.float32),
        factor=float(_BINS[min(int(np.searchsorted(share, WITHIN)), len(_BINS) - 1)]),
        within=(
            float(share[np.searchsorted(_BINS, 1.0)]),
            float(share[np.searchsorted(_BINS, 2.0)]),
        ),
    )
