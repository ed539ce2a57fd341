"""Samples made on the device are the host's; run on the CPU, which is a device like others."""

import numpy as np
import pytest
import torch

from hpc_xvr.config import Data, load
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.samples.gaps import GapSamples
from hpc_xvr.data.samples.loader import training_batches
from hpc_xvr.data.samples.on_device import batches_on_device, noisy
from hpc_xvr.data.samples.training import TrainingSamples
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import InputError
from support.paths import PULSE
from support.training import train

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    ),
]


@pytest.fixture(scope="module", params=["uint8", "uint16"])
def corpus(request, tmp_path_factory):
    """Recordings of several sizes and bit depths; uint16 ones use the highest bit."""
    path = tmp_path_factory.mktemp(request.param) / "c"
    depths = [8, 8] if request.param == "uint8" else [16, 12, 8]
    rng = np.random.default_rng(0)
    info = {"camera": "t", "frame_rate_hz": 1.0, "pixel_size_um": 1.0, "split": "train"}
    with CorpusWriter(path) as writer:
        for i, depth in enumerate(depths):
            shape = (14 + i, 36 + 4 * i, 44)
            kind = np.uint8 if depth == 8 else np.uint16
            frames = rng.integers(0, 2**depth, shape, endpoint=False).astype(kind)
            more = {"bit_depth": depth, "scene": "t", "source": "t"}
            writer.add(f"v{i}", frames, frames.shape, frames.dtype, info | more)
    return path


def samples_of(kind, corpus, **settings):
    data = Data(**{"patch": 16, "hr_gap": 5, "gaps": (3, 6), "noise": "none", **settings})
    if kind == "gap":
        return GapSamples(Corpus(corpus), data, 4, 7)
    return TrainingSamples(Corpus(corpus), data, kind, 4, 7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["centre", "sequence", "gap"])
def test_samples_without_noise_are_those_of_the_host_on_cpu_and_gpu(corpus, kind, device):
    bent = dict(regrey=True, misregistration=0.7, grey_mismatch=0.1, speed_up=2)
    samples = samples_of(kind, corpus, **(bent if kind == "gap" else {}))
    ours = batches_on_device(samples, torch.device(device), 0, 1, 3, 15)
    theirs = list(training_batches(samples, 0, 1, 3, 15))
    assert len(theirs) == 12
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in b:
            assert a[name].device.type == device and a[name].dtype == torch.float32
            torch.testing.assert_close(a[name].cpu(), b[name], rtol=0, atol=3e-6)
    if kind != "gap":
        assert torch.equal(a["target"].cpu(), b["target"])


def test_content_does_not_depend_on_ranks_and_micro_batches(corpus):
    samples = samples_of("gap", corpus, noise="poisson_gaussian", hr_noise="poisson")
    cpu = torch.device("cpu")
    whole = list(batches_on_device(samples, cpu, 0, 1, 0, 3))
    parts = [list(batches_on_device(samples, cpu, rank, 2, 0, 3, 1)) for rank in (0, 1)]
    for step in range(3):
        for slot in range(4):
            part = parts[slot // 2][2 * step + slot % 2]
            for name, value in whole[step].items():
                assert torch.equal(value[slot], part[name][0])


@pytest.mark.parametrize("photons", [30.0, 1e4, 1e8])
def test_noise_has_the_photons_mean_and_spread(photons):
    frames = torch.full((3, 400 * 500), 0.4)

    def off(*noise):
        """Of each camera's half of each sample."""
        g = torch.Generator()
        made = noisy(frames, (100_000, 100_000), noise, g.manual_seed, [5, 6, 7])
        return [(camera - 0.4).double() for sample in made for camera in sample.chunk(2)]

    spread, none, both = (0.4 / photons) ** 0.5, (0.0, 0.0), (photons, 0.01)
    found = off((none, (photons, 0.0)), (both, none), (none, none))
    for i in (0, 3, 4, 5):
        assert not found[i].any()
    assert abs(float(found[1].mean())) < 5 * spread / 300
    assert float(found[1].std()) == pytest.approx(spread, rel=0.02)
    assert float(found[2].std()) == pytest.approx((spread**2 + 0.01**2) ** 0.5, rel=0.02)
    alone = off(*3 * [(none, none)])
    assert not any(camera.any() for camera in alone)


def test_noise_of_a_sample_is_as_strong_as_the_host_s(corpus):
    """Same photons for the same sample: over many pixels the same error."""
    noise = dict(noise="poisson", photons_log10=(2, 5), hr_noise="poisson")
    dirty = samples_of("gap", corpus, **noise)
    cpu = torch.device("cpu")
    for step, ours in enumerate(batches_on_device(dirty, cpu, 0, 1, 0, 4)):
        for slot in range(4):
            theirs = dirty[step, slot]
            recipe = dirty.draw(step, slot)
            video, crop = dirty.videos[recipe.video], recipe.crop
            exact = crop.turned(video.intensity(recipe.times.lr, crop.y, crop.x))
            for name, true in (("hr", exact[[0, -1]]), ("target", exact[1:-1])):
                a, b = (
                    np.abs(x[name].numpy()[:, 0] - true).mean() for x in (_at(ours, slot), theirs)
                )
                assert a == pytest.approx(b, rel=0.25, abs=1e-6), name


def _at(batch, slot):
    return {name: value[slot] for name, value in batch.items()}


def test_a_training_reads_from_the_device_and_resumes_exactly(pulse_corpus, tmp_path):
    def cfg(name, **more):
        settings = [f"run.dir={tmp_path / name}", f"data.corpus={pulse_corpus}", "run.threads=1"]
        settings += ["data.on_device=true", "checkpoint.every=2", "train.steps=4"]
        return load(PULSE, settings + [f"{k}={v}" for k, v in more.items()])

    losses, whole = train(cfg("whole"), Comm())
    again, same = train(cfg("again", **{"data.workers": 1}), Comm())
    assert losses == again
    for name, value in whole["model"].items():
        assert torch.equal(value, same["model"][name])


def test_what_does_not_fit_or_cannot_be_made_is_refused(corpus, monkeypatch):
    for key, value in (("lr_source", "recorded"), ("noise", "fixed_pattern"), ("damaged", "drop")):
        with pytest.raises(ValueError, match=f"on_device makes no samples with {key} {value}"):
            Data(on_device=True, **{key: value})
    monkeypatch.setattr("hpc_xvr.data.samples.on_device._SHARE", 1e-9)
    with pytest.raises(InputError, match=r"take 0.0 GB, of .* GB that are free on cpu"):
        batches_on_device(samples_of("centre", corpus), torch.device("cpu"), 0, 1, 0, 1)
