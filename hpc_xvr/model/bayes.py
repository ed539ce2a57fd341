"""Bayesian data fusion: the sharp frame as a conditional mean, given all that the cameras saw.

After Xue, Leung and Fung 2017, Remote Sensing 9, 1310, who fuse satellite pictures: sharp frames
and coarse frames are taken as jointly Gaussian, and the estimate is the mean of the wanted frame
given the observed ones. How that is worked out here, x being the sharp frame wanted, y its coarse
frame, z1 and z2 the sharp key frames before and after:

1. Observation. y = H x + n: H is the camera's blur (a Gaussian, where one is given) and the mean
   over scale x scale pixels; n is Gaussian of variance r, in each pixel proportional to the local
   intensity, as photon noise is. The coarse frames at the key times are H z1 and H z2.

2. Prior. In each pixel (x, z1, z2) is Gaussian with the means m and covariances C that y, H z1 and
   H z2 have in a window around it, r taken off the variance of y. So, given the key frames, x is
   Gaussian with mean

       mu = m_x + a1 (z1 - m_z1) + a2 (z2 - m_z2),   a = C_zz^-1 C_zx,

   and what the key frames leave open, e = x - mu, has the variance v = C_xx - a C_zx (of coarse
   pixels; it is raised to that of sharp ones). a and m are interpolated to the sharp grid.

3. Neighbours. e is correlated as a cubic spline is smooth: cov(e) = V = S G G' S, S diagonal with
   the deviations, G a triangle of one coarse pixel. Without that the last step would return
   squares.

4. Estimate. Conditioning on y as well gives

       E[x | y, z1, z2] = mu + V H' (H V H' + R)^-1 (y - H mu).

   The system has one unknown a coarse pixel and is solved by conjugate gradients; H, G and their
   transposes are convolutions.

Where nothing has moved, a1 + a2 = 1 and the key frame is returned; where it has, v is large and y
decides; where y is noisy, r is large and holds it back.

Shapes: B batch, h w low-resolution grid, H = scale*h, W = scale*w.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

HALO = 16  # coarse pixels around a tile; farther ones change the estimate by less than 1e-4


@dataclass(frozen=True)
class Prior:
    """What is known of a frame before its low-resolution frame is taken into account."""

    mean: Tensor
    """(B, 1, H, W): mu, the mean given the key frames."""
    deviation: Tensor
    """(B, 1, H, W): of what the key frames leave open."""


@dataclass(frozen=True)
class BayesianFusion:
    """Call it with low-resolution frames and the key frames around them.

    Args:
        window: side in coarse pixels of the neighbourhood whose statistics are taken; odd.
        blur: standard deviation in coarse pixels of the low-resolution camera's blur, besides its
            pixels' own size.
        noise: standard deviation of the low-resolution frame's noise at intensity 1 (it falls with
            the root of intensity); None: estimated from each frame.
        key_noise: standard deviation of the key frames' noise; keeps equal ones apart.
        tile: side in coarse pixels of the tiles that large frames are worked on in; bounds memory.
        tolerance, steps: of conjugate gradients: the residual's norm that is enough, relative to
            the first, and the steps that are taken at most. Tolerance 0 takes them all, and never
            waits for a GPU.
    """

    window: int = 5
    blur: float = 0.0
    noise: float | None = None
    key_noise: float = 0.01
    tile: int = 256
    tolerance: float = 3e-4
    steps: int = 30

    def __call__(self, lr: Tensor, hr: Tensor) -> Tensor:
        """Each frame by itself: lr (B, N, 1, h, w), hr (B, 2, 1, H, W) -> (B, N, 1, H, W)."""
        y = lr.flatten(0, 1)  # B*N, 1, h, w
        z = hr.squeeze(2).repeat_interleave(lr.shape[1], dim=0)  # B*N, 2, H, W
        variance = self.noise_variance(y, z)  # of whole frames: a tile is too small for it
        h, w = y.shape[-2:]
        out = torch.empty_like(z[:, :1])
        scale = z.shape[-1] // w
        for top in range(0, h, self.tile):
            for left in range(0, w, self.tile):
                rows = slice(max(top - HALO, 0), min(top + self.tile + HALO, h))
                columns = slice(max(left - HALO, 0), min(left + self.tile + HALO, w))
                fine = (..., _times(rows, scale), _times(columns, scale))
                part = self.estimate(y[..., rows, columns], z[fine], variance[..., rows, columns])
                height, width = (min(self.tile, n - i) for n, i in ((h, top), (w, left)))
                i, j = (top - rows.start) * scale, (left - columns.start) * scale
                out[
                    ..., top * scale : (top + height) * scale, left * scale : (left + width) * scale
                ] = part[..., i : i + height * scale, j : j + width * scale]
        return out.unflatten(0, lr.shape[:2])

    def estimate(self, y: Tensor, z: Tensor, variance: Tensor) -> Tensor:
        """y (B, 1, h, w), z (B, 2, H, W), noise variance (B, 1, h, w) -> (B, 1, H, W)."""
        return self.given(self.prior(y, z, variance), y, variance)

    def given(self, prior: Prior, y: Tensor, variance: Tensor) -> Tensor:
        """Steps 3 and 4 of the derivation: what was expected, and y (B, 1, h, w) with its noise
        variance (B, 1, h, w) -> (B, 1, H, W)."""
        scale = prior.mean.shape[-1] // y.shape[-1]
        spread = _spread_weights(scale)
        # G's rows do not add up to the same near the edge; the deviations are those stated.
        unit = _convolve(torch.ones_like(prior.mean), [g * g for g in spread]).rsqrt()
        deviation = prior.deviation * unit

        def covariance(coarse: Tensor) -> Tensor:  # V H' coarse
            fine = _convolve(deviation * self.observe_transposed(coarse, scale), spread)
            return deviation * _convolve(fine, spread)

        def system(coarse: Tensor) -> Tensor:
            return self.observe(covariance(coarse), scale) + variance * coarse

        innovation = y - self.observe(prior.mean, scale)
        # The variance of a coarse pixel by itself: nearly the system's diagonal.
        own = _kept(scale) * F.avg_pool2d(prior.deviation.square(), scale) + variance
        return prior.mean + covariance(_solve(system, innovation, own, self.tolerance, self.steps))

    def prior(self, y: Tensor, z: Tensor, variance: Tensor) -> Prior:
        """Step 2 of the derivation."""
        scale = z.shape[-1] // y.shape[-1]
        coarse = torch.cat((y, self.observe(z, scale)), dim=1)  # B, 3, h, w: x, z1, z2
        mean = self.average(coarse)
        level = coarse.mean((2, 3), keepdim=True)  # small numbers square with less rounding
        xx, x1, x2, c11, c12, c22 = (
            self.average(_products(coarse - level)) - _products(mean - level)
        ).split(1, dim=1)
        m, m1, m2 = mean.split(1, dim=1)
        own = self.key_noise**2
        c11, c22 = c11.clamp(min=0) + own, c22.clamp(min=0) + own
        determinant = c11 * c22 - c12.square()
        a1 = (c22 * x1 - c12 * x2) / determinant
        a2 = (c11 * x2 - c12 * x1) / determinant
        left = (xx - variance).clamp(min=0) - a1 * x1 - a2 * x2
        left = left.clamp(min=own)
        a1, a2, m, m1, m2, left = F.interpolate(
            torch.cat((a1, a2, m, m1, m2, left), dim=1), scale_factor=scale, mode="bilinear"
        ).split(1, dim=1)
        before, after = z.split(1, dim=1)
        return Prior(m + a1 * (before - m1) + a2 * (after - m2), (left / _kept(scale)).sqrt())

    def average(self, x: Tensor) -> Tensor:
        """Mean over the window, at the edge over its part inside: (B, C, h, w) -> same."""
        side = self.window
        return F.avg_pool2d(x, side, 1, side // 2, count_include_pad=False)

    def observe(self, x: Tensor, scale: int) -> Tensor:
        """H: (B, C, H, W) -> (B, C, h, w)."""
        return F.avg_pool2d(_convolve(x, self._blur(scale)), scale)

    def observe_transposed(self, y: Tensor, scale: int) -> Tensor:
        """H': (B, C, h, w) -> (B, C, H, W)."""
        up = F.interpolate(y, scale_factor=scale, mode="nearest") / scale**2
        return _convolve(up, self._blur(scale))

    def _blur(self, scale: int) -> list[float]:
        if not self.blur:
            return [1.0]
        sigma = self.blur * scale
        reach = int(3 * sigma + 1)
        weights = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(-reach, reach + 1)]
        return [weight / sum(weights) for weight in weights]

    def noise_variance(self, y: Tensor, z: Tensor) -> Tensor:
        """Variance of the noise of a low-resolution frame in each pixel: (B, 1, h, w).

        Estimated from its fourth-order differences, less those that the scene itself has: the key
        frames' low-resolution frames are nearly free of noise and show the same scene.
        """
        scale = z.shape[-1] // y.shape[-1]
        level = self.average(y).clamp(min=1e-3)
        floor = (0.25 / 255) ** 2
        if self.noise is not None:
            return self.noise**2 * level + floor
        gains = _noise_gain(y, level)
        coarse = self.observe(z, scale)
        own = _noise_gain(coarse, self.average(coarse).clamp(min=1e-3)).mean(1, keepdim=True)
        return (gains - own).clamp(min=0)[..., None, None] * level + floor


def _noise_gain(x: Tensor, level: Tensor) -> Tensor:
    """Variance of the fine differences per intensity, robustly: (B, C, h, w) -> (B, C)."""
    second = x.new_tensor([1.0, -2.0, 1.0])
    kernel = (second[:, None] * second) / 6  # white noise keeps its variance
    rows = F.conv2d(x.flatten(0, 1)[:, None], kernel[None, None])
    scaled = rows.square() / level.flatten(0, 1)[:, None, 1:-1, 1:-1]
    return (scaled.flatten(1).median(1).values / 0.4549).view(x.shape[:2])  # median of chi^2_1


def _products(x: Tensor) -> Tensor:
    """Squares and mixed products of three channels: (B, 3, h, w) -> (B, 6, h, w)."""
    return torch.stack([x[:, i] * x[:, j] for i in range(3) for j in range(i, 3)], dim=1)


def _times(part: slice, scale: int) -> slice:
    return slice(part.start * scale, part.stop * scale)


def _spread_weights(scale: int) -> list[float]:
    """G in one direction: a triangle whose feet are one coarse pixel from its top."""
    return [1 - abs(d) / scale for d in range(1 - scale, scale)]


@cache
def _kept(scale: int) -> float:
    """Variance of a coarse pixel / that of a sharp one, of what is correlated as G G' says."""
    triangle = _spread_weights(scale)

    def alike(lag: int) -> float:
        return sum(a * b for a, b in zip(triangle[lag:], triangle, strict=False))

    lags = [abs(lag) for lag in range(1 - scale, scale)]
    together = sum((scale - lag) / scale**2 * alike(lag) for lag in lags)
    return (together / alike(0)) ** 2


def _convolve(x: Tensor, weights: list[float]) -> Tensor:
    """Rows, then columns, with zeros outside; symmetric weights, so its own transpose.

    Shifted sums: on large frames nine times as fast as torch's convolution of one channel.
    """
    reach = len(weights) // 2
    if not reach:
        return x
    for dim, pad in ((-2, (0, 0, reach, reach)), (-1, (reach, reach))):
        size = x.shape[dim]
        wide = F.pad(x, pad)
        x = wide.narrow(dim, reach, size) * weights[reach]
        for i in range(reach):
            pair = wide.narrow(dim, i, size) + wide.narrow(dim, 2 * reach - i, size)
            x.add_(pair, alpha=weights[i])
    return x


def _solve(
    system: Callable[[Tensor], Tensor],
    right: Tensor,
    diagonal: Tensor,
    tolerance: float,
    steps: int,
) -> Tensor:
    """Conjugate gradients for each of B positive definite systems: (B, 1, h, w) -> same.

    Preconditioned by `diagonal`: where things move, pixels vary a thousand times as much as
    elsewhere.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((1, 2, 3), keepdim=True)

    solution = torch.zeros_like(right)
    residual = right.clone()
    direction = residual / diagonal
    energy = dot(residual, direction)
    enough = tolerance**2 * energy + 1e-30
    for _ in range(steps):
        if tolerance and bool((energy <= enough).all()):
            break
        image = system(direction)
        length = energy / dot(direction, image).clamp(min=1e-30)
        solution = solution + length * direction
        residual = residual - length * image
        scaled = residual / diagonal
        energy, before = dot(residual, scaled), energy
        direction = scaled + (energy / before.clamp(min=1e-30)) * direction
    return solution
