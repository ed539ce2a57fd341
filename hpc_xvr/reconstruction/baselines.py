"""Reconstruction without learning: what a trained network is measured against.

Each method takes a batched sample and gives its centre frame. Shapes: B batch, N low-resolution
frames, h w low-resolution grid, H = scale*h, W = scale*w.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hpc_xvr.data.samples.sample import Sample
from hpc_xvr.errors import InputError
from hpc_xvr.model.bases import (
    interpolate_keys,
    key_weights,
    transfer_detail,
    transfer_matching_detail,
    upsample,
)
from hpc_xvr.model.bayes import BayesianFusion


@dataclass(frozen=True)
class Baseline:
    """A method with what tables, pictures and help texts say of it."""

    title: str
    description: str
    method: Callable[[Sample], Tensor]
    flops_per_pixel: int
    """Operations for a pixel of the sharp frame, counted by hand at scale 4."""
    halo: int | None = 0
    """Coarse pixels around one that it looks at; None: it works in tiles of its own, with the noise
    of whole frames."""

    def __call__(self, sample: Sample) -> Tensor:
        """lr (B, N, 1, h, w), hr (B, 2, 1, H, W), hr_offset (B, 2) -> (B, 1, 1, H, W)."""
        return self.method(sample)


def find_baseline(name: str) -> Baseline:
    """The baseline of that name.

    Raises:
        InputError: there is none; names those there are.
    """
    if name not in BASELINES:
        raise InputError(f"unknown method {name!r}: choose from {', '.join(BASELINES)}")
    return BASELINES[name]


def _centre(sample: Sample) -> Tensor:
    lr = sample["lr"]
    middle = lr.shape[1] // 2
    return lr[:, middle : middle + 1]


def _bicubic(sample: Sample) -> Tensor:
    scale = sample["hr"].shape[-1] // sample["lr"].shape[-1]
    return upsample(_centre(sample), scale)


def _nearest_hr(sample: Sample) -> Tensor:
    before, after = sample["hr_offset"].abs().unbind(1)  # B
    hr = sample["hr"]
    later = (after < before).view(-1, 1, 1, 1, 1)
    return hr[:, 1:].where(later, hr[:, :1])


def _linear_hr(sample: Sample) -> Tensor:
    return interpolate_keys(sample["hr"], key_weights(sample["hr_offset"], frames=1))


def _detail(sample: Sample) -> Tensor:
    return transfer_detail(_centre(sample), sample["hr"], sample["hr_offset"])


def _bayes(sample: Sample) -> Tensor:
    return BayesianFusion()(_centre(sample), sample["hr"])


def _adaptive(sample: Sample) -> Tensor:
    return transfer_matching_detail(_centre(sample), sample["hr"], sample["hr_offset"])


# Bicubic interpolation takes 16 products a pixel; the detail of two key frames takes two more of
# them, binning and a difference; conjugate gradients about 20 times two convolutions of 7 + 7 taps.
BASELINES: dict[str, Baseline] = {
    "bicubic": Baseline(
        "bicubic", "bicubic interpolation of the low-resolution frame", _bicubic, 32, 2
    ),
    "nearest_hr": Baseline(
        "nearest key frame",
        "the key frame that is nearer in time (the earlier one half-way)",
        _nearest_hr,
        0,
    ),
    "linear_hr": Baseline(
        "linear between key frames",
        "the two key frames interpolated linearly in time",
        _linear_hr,
        3,
    ),
    "detail": Baseline(
        "detail transfer",
        "bicubic plus the key frames' fine detail interpolated in time",
        _detail,
        104,
        2,
    ),
    "adaptive": Baseline(
        "detail transfer where still",
        "the same, without the detail of places that have moved since",
        _adaptive,
        128,
        2,
    ),
    "bayes": Baseline(
        "Bayesian fusion",
        "Bayesian data fusion (Xue et al. 2017): conditional mean",
        _bayes,
        1400,
        None,
    ),
}
