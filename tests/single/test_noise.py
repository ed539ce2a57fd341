"""Noise models: the statistics they promise, patterns that stay, targets that stay clean."""

import numpy as np
import pytest

from hpc_xvr.config import Data, load
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.degrade import CameraNoise, fixed_pattern
from hpc_xvr.data.samples.training import TrainingSamples
from hpc_xvr.errors import InputError

SIDE = 64
LEVEL = 0.5


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """Two recordings that show the same grey everywhere: what is not grey in a sample is noise."""
    path = tmp_path_factory.mktemp("flat") / "c"
    frames = np.full((12, SIDE, SIDE), round(LEVEL * 65535), np.uint16)
    info = {"camera": "c", "bit_depth": 16, "scene": "s", "split": "train", "source": "x"}
    with CorpusWriter(path) as writer:
        for i in range(2):
            writer.add(f"v{i}", frames, frames.shape, frames.dtype, info)
    return path


def samples(path, count=60, **data):
    settings = {"patch": 32, "hr_gap": 4, "augment": False, "noise": "none", **data}
    return TrainingSamples(path, Data(corpus=path, **settings), "centre", 4, 7), count


def stack(made, key):
    dataset, count = made
    return np.stack([dataset[k // 4, k % 4][key].numpy()[:, 0] for k in range(count)])


def test_apply_has_the_mean_and_variance_it_promises():
    frames = np.full((400, 50, 50), LEVEL, np.float32)
    rng = np.random.default_rng(0)
    noise = CameraNoise(photons=1000, read_noise=0.01)
    noisy = noise.apply(frames, rng)
    assert noisy.dtype == np.float32
    # 1e6 pixels: the mean to 5 standard errors, the variance to 1 %.
    variance = LEVEL / 1000 + 0.01**2
    assert abs(noisy.mean() - LEVEL) < 5 * (variance / noisy.size) ** 0.5
    assert noisy.var() == pytest.approx(variance, rel=0.01)
    assert (CameraNoise().apply(frames, rng) == frames).all()
    dark = CameraNoise(read_noise=0.1).apply(0 * frames, rng)
    assert dark.min() == 0 and dark.max() <= 1


def test_a_fixed_pattern_has_its_strength_and_columns():
    gain = fixed_pattern((200, 300), 0.02, [3])
    assert gain.dtype == np.float32 and gain.mean() == pytest.approx(1, abs=3e-3)
    assert gain.std() == pytest.approx(0.02, rel=0.1)
    columns = gain.mean(axis=0)
    assert columns.var() == pytest.approx(0.02**2 / 2, rel=0.25)
    assert (fixed_pattern((200, 300), 0.02, [3]) == gain).all()
    assert (fixed_pattern((200, 300), 0.02, [4]) != gain).any()


@pytest.mark.parametrize("camera, pixels", [("lr", 3 * 8 * 8), ("hr", 2 * 32 * 32)])
def test_each_kind_reaches_its_camera_alone(flat, camera, pixels):
    prefix = "" if camera == "lr" else "hr_"
    for kind, extra in (("none", 0.0), ("poisson", 0.0), ("poisson_gaussian", 0.05**2)):
        made = samples(
            flat,
            **{f"{prefix}noise": kind, f"{prefix}photons_log10": (4.0, 4.0)},
            read_noise=(0.05, 0.05),
        )
        noisy = stack(made, camera)
        expected = 0.0 if kind == "none" else LEVEL / 10**4 + extra
        if camera == "lr" or kind == "none":
            assert noisy.var() == pytest.approx(expected, rel=0.1, abs=1e-12)
        else:
            assert noisy.var() == pytest.approx(expected, rel=0.05)
        other = {"lr": "hr", "hr": "lr"}[camera]
        assert stack(made, other).var() == pytest.approx(0, abs=1e-12)
        assert stack(made, "target").var() == pytest.approx(0, abs=1e-12)


def test_photons_are_drawn_anew_for_each_sample(flat):
    noisy = stack(samples(flat, noise="poisson", photons_log10=(2.0, 6.0)), "lr")
    spread = np.log10(noisy.reshape(len(noisy), -1).var(axis=1))
    assert spread.max() - spread.min() > 2.5  # of 4 decades


def test_the_pattern_belongs_to_the_recording(flat):
    """Same gains in every frame and sample of a recording, wherever the crop lies and however it
    is turned; other gains in the other recording."""
    dataset, count = samples(
        flat,
        noise="fixed_pattern",
        photons_log10=(12.0, 12.0),
        read_noise=(0.0, 0.0),
        pattern=0.05,
        augment=True,
        count=80,
    )
    maps = {v: fixed_pattern((SIDE // 4, SIDE // 4), 0.05, [dataset.seed, v, 4]) for v in range(2)}
    turned = 0
    for k in range(count):
        index = (k // 4, k % 4)
        number, _ = dataset.slots.pick(*index)
        lr = dataset[index]["lr"].numpy()[:, 0] / LEVEL
        assert np.allclose(lr[0], lr[1], atol=1e-4) and np.allclose(lr[0], lr[2], atol=1e-4)
        places = [
            (turn, y, x)
            for turn in range(8)
            for y in range(9)
            for x in range(9)
            if np.allclose(turned_by(lr[0], turn), maps[number][y : y + 8, x : x + 8], atol=1e-3)
        ]
        assert len(places) == 1
        turned += places[0][0] > 0
    assert turned > count / 2


def turned_by(crop, turn):
    crop = crop.T if turn & 4 else crop
    return crop[:: -1 if turn & 1 else 1, :: -1 if turn & 2 else 1]


def test_ranges_that_make_no_sense():
    for text in ("data.read_noise=[0.2,0.1]", "data.hr_photons_log10=[5,13]"):
        with pytest.raises(InputError, match="must be low <= high within"):
            load(None, [text])
    with pytest.raises(InputError, match=r"data\.noise: Input should be 'none', 'poisson'"):
        load(None, ["data.noise=gauss"])
