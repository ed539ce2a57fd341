"""Bayesian fusion against the whole covariance matrix, written down entry by entry and solved."""

import numpy as np
import pytest
import torch

from hpc_xvr.config import Data
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.samples.sample import key_frames, window_sample
from hpc_xvr.metrics import psnr
from hpc_xvr.model.bayes import BayesianFusion
from hpc_xvr.model.xvr import BAYES
from hpc_xvr.reconstruction.baselines import BASELINES


def random_sample(h, w, scale, seed=0):
    """Key frames that resemble each other, and a low-resolution frame between them."""
    rng = np.random.default_rng(seed)
    first = rng.random((scale * h, scale * w))
    second = 0.7 * first + 0.3 * rng.random(first.shape)
    between = 0.5 * (first + second) + 0.1 * rng.random(first.shape)
    y = between.reshape(h, scale, w, scale).mean((1, 3)) + 0.01 * rng.standard_normal((h, w))
    return y, first, second


def as_tensors(y, first, second):
    lr = torch.from_numpy(y)[None, None, None]
    return {"lr": lr, "hr": torch.from_numpy(np.stack((first, second)))[None, :, None]}


def observation_matrix(h, w, scale, blur):
    """(h*w, H*W): Gaussian blur that loses what falls off the edge, then means of boxes."""
    height, width = scale * h, scale * w

    def smear(n):
        sigma = blur * scale
        if not sigma:
            return np.eye(n)
        reach = int(3 * sigma + 1)
        taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        taps /= taps.sum()
        return np.array(
            [
                [taps[i - j + reach] if abs(i - j) <= reach else 0 for j in range(n)]
                for i in range(n)
            ]
        )

    rows = np.kron(np.eye(h), np.full(scale, 1 / scale)) @ smear(height)
    columns = np.kron(np.eye(w), np.full(scale, 1 / scale)) @ smear(width)
    return np.kron(rows, columns)


def window_statistics(y, z1, z2, side):
    """Mean (3,) and covariance (3, 3) of coarse pixels around each pixel, by loops."""
    h, w = y.shape
    means, covariances = np.empty((h, w, 3)), np.empty((h, w, 3, 3))
    for i in range(h):
        for j in range(w):
            part = np.s_[
                max(i - side // 2, 0) : i + side // 2 + 1, max(j - side // 2, 0) : j + side // 2 + 1
            ]
            values = np.stack([x[part].ravel() for x in (y, z1, z2)])
            means[i, j] = values.mean(1)
            covariances[i, j] = np.cov(values, bias=True)
    return means, covariances


def bilinear(x, scale):
    """(h, w) -> (H, W), pixel centres half-way, edge pixels repeated; by a matrix a side."""

    def matrix(n):
        m = np.zeros((n * scale, n))
        for i in range(n * scale):
            at = min(max((i + 0.5) / scale - 0.5, 0), n - 1)
            low = min(int(at), n - 2)
            m[i, low], m[i, low + 1] = low + 1 - at, at - low
        return m

    return matrix(x.shape[0]) @ x @ matrix(x.shape[1]).T


def smooth_correlation(n, scale):
    """Correlation of one row: autocorrelation of a triangle, cut at the edges."""
    triangle = [[max(0.0, 1 - abs(i - j) / scale) for j in range(n)] for i in range(n)]
    g = np.array(triangle)
    return g @ g.T


@pytest.mark.parametrize(("blur", "scale"), [(0.0, 4), (0.0, 2), (0.4, 4)])
def test_equals_the_conditional_mean_of_the_whole_joint_gaussian(blur, scale):
    h, w, key_noise = 4, 5, 0.02
    y, first, second = random_sample(h, w, scale)
    fusion = BayesianFusion(
        window=3, blur=blur, noise=0.03, key_noise=key_noise, tolerance=1e-7, steps=200
    )

    height, width = scale * h, scale * w
    pixels = height * width
    observe = observation_matrix(h, w, scale, blur)
    coarse = [y] + [(observe @ z.ravel()).reshape(h, w) for z in (first, second)]
    means, covariances = window_statistics(*coarse, side=3)
    level = np.array(
        [
            [y[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean() for j in range(w)]
            for i in range(h)
        ]
    )
    noise = 0.03**2 * level + (0.25 / 255) ** 2
    a = np.empty((h, w, 2))
    left = np.empty((h, w))
    for i in range(h):
        for j in range(w):
            c = covariances[i, j]
            a[i, j] = np.linalg.solve(c[1:, 1:] + key_noise**2 * np.eye(2), c[1:, 0])
            left[i, j] = max(max(c[0, 0] - noise[i, j], 0) - a[i, j] @ c[1:, 0], key_noise**2)

    # Joint Gaussian of (x, z1, z2, y) with those regressions: x = mu + e, y = H x + n. What the
    # key frames' own covariance is does not matter to the conditional mean; take one at random.
    rng = np.random.default_rng(1)
    factor = rng.standard_normal((2 * pixels, 2 * pixels)) / np.sqrt(2 * pixels)
    keys = factor @ factor.T + 0.1 * np.eye(2 * pixels)
    slope = np.hstack([np.diag(bilinear(a[..., k], scale).ravel()) for k in range(2)])
    correlation = np.kron(smooth_correlation(height, scale), smooth_correlation(width, scale))
    deviation = 1 / np.sqrt(np.diag(correlation))
    correlation = deviation[:, None] * correlation * deviation
    interior = smooth_correlation(9 * scale, scale)[4 * scale : 5 * scale, 4 * scale : 5 * scale]
    kept = (interior.mean() / interior[0, 0]) ** 2  # variance of a box / of its pixels
    spread = np.sqrt(bilinear(left, scale).ravel() / kept)
    open_part = spread[:, None] * correlation * spread
    xx = slope @ keys @ slope.T + open_part
    xz = slope @ keys
    joint = np.block(
        [
            [keys, xz.T @ observe.T],
            [observe @ xz, observe @ xx @ observe.T + np.diag(noise.ravel())],
        ]
    )
    mean_x, *mean_z = (bilinear(means[..., k], scale).ravel() for k in range(3))
    seen = np.concatenate(
        [first.ravel() - mean_z[0], second.ravel() - mean_z[1], y.ravel() - observe @ mean_x]
    )
    expected = mean_x + np.hstack([xz, xx @ observe.T]) @ np.linalg.solve(joint, seen)

    found = fusion(**as_tensors(y, first, second)).numpy().reshape(pixels)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert np.abs(expected - mean_x).max() > 0.05  # the observations do matter


def test_blur_and_binning_are_each_others_transposes():
    fusion = BayesianFusion(blur=0.5)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, 24, 32, generator=g, dtype=torch.float64)
    y = torch.rand(1, 1, 6, 8, generator=g, dtype=torch.float64)
    assert (fusion.observe(x, 4) * y).sum() == pytest.approx(
        float((x * fusion.observe_transposed(y, 4)).sum()), rel=1e-12
    )


def test_tiles_make_no_seams():
    y, first, second = random_sample(70, 53, 4)
    sample = as_tensors(y, first, second)
    whole = BayesianFusion(tile=256, tolerance=1e-6)(**sample)
    tiled = BayesianFusion(tile=20, tolerance=1e-6)(**sample)
    assert (whole - tiled).abs().max() < 2e-4
    torch.testing.assert_close(
        whole, BayesianFusion(tile=70, tolerance=1e-6)(**sample), rtol=0, atol=0
    )


def test_samples_of_a_batch_do_not_meet():
    one, two = (as_tensors(*random_sample(12, 9, 4, seed)) for seed in (3, 4))
    both = BayesianFusion()(**{name: torch.cat((one[name], two[name])) for name in one})
    for i, alone in enumerate((one, two)):
        torch.testing.assert_close(both[i : i + 1], BayesianFusion()(**alone), rtol=0, atol=1e-4)


def test_each_frame_of_a_sequence_is_fused_by_itself():
    one, two = (as_tensors(*random_sample(12, 9, 4, seed)) for seed in (3, 4))
    lr = torch.cat((one["lr"], two["lr"]), dim=1)
    both = BayesianFusion()(lr, one["hr"])
    for i in range(2):
        alone = BayesianFusion()(lr[:, i : i + 1], one["hr"])
        torch.testing.assert_close(both[:, i : i + 1], alone, rtol=0, atol=1e-4)


def test_the_steps_that_a_network_s_base_takes_are_enough(pulse_corpus):
    """Scenes that move in places: the hardest to solve for."""
    video = Corpus(pulse_corpus).videos[0]
    sample = window_sample(video, 4, (0, 8), Data(), "centre")
    lr, hr = sample["lr"][None], sample["hr"][None]
    whole = BayesianFusion(tolerance=1e-7, steps=200)(lr, hr)
    assert 255 * (BAYES(lr, hr) - whole).abs().mean() < 0.2
    few = BayesianFusion(tolerance=0, steps=2)(lr, hr)
    assert 255 * (few - whole).abs().mean() > 0.4


def test_a_scene_that_stands_still_is_the_key_frame():
    _, first, _ = random_sample(16, 16, 4)
    y = first.reshape(16, 4, 16, 4).mean((1, 3))
    found = BayesianFusion(key_noise=1e-4)(**as_tensors(y, first, first))
    assert np.abs(found.numpy()[0, 0, 0] - first).max() < 2e-3


@pytest.mark.parametrize("photons", [100, 1000, 10000])
def test_photon_noise_is_estimated(photons):
    y, x = np.mgrid[:128, :160] / 40
    scene = 0.5 + 0.2 * np.sin(3 * x) * np.cos(4 * y)
    coarse = scene.reshape(32, 4, 40, 4).mean((1, 3))
    noisy = np.random.default_rng(0).poisson(coarse * photons) / photons
    sample = as_tensors(noisy, scene, scene)
    found = BayesianFusion().noise_variance(sample["lr"][:, 0], sample["hr"].squeeze(2))
    np.testing.assert_allclose(found.numpy().mean(), (coarse / photons).mean(), rtol=0.25)


@pytest.mark.parametrize("photons", [None, 200.0])
def test_it_beats_bicubic_on_simulated_recordings(pulse_corpus, photons):
    """And what it is made from, where photons are few."""
    scores = {name: [] for name in ("bicubic", "detail", "bayes")}
    for video in Corpus(pulse_corpus).videos:
        for t in (3, 10):
            sample = window_sample(
                video,
                t,
                key_frames(t, 8, video.shape[0]),
                Data(),
                "centre",
                photons=photons,
                rng=np.random.default_rng(t),
            )
            batch = {name: value[None] for name, value in sample.items()}
            truth = sample["target"][0, 0].numpy()
            for name, values in scores.items():
                values.append(psnr(BASELINES[name](batch)[0, 0, 0].numpy(), truth))
    gain = {name: np.mean(scores["bayes"]) - np.mean(scores[name]) for name in scores}
    assert gain["bicubic"] > 1.5
    assert photons is None or gain["detail"] > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same_picture():
    sample = as_tensors(*random_sample(40, 30, 4))
    moved = {name: value.float().cuda() for name, value in sample.items()}
    torch.testing.assert_close(
        BayesianFusion()(**moved).cpu().double(), BayesianFusion()(**sample), rtol=0, atol=1e-3
    )
