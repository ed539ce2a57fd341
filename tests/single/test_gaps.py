"""Samples of whole gaps: which frames they show, that they are the same on any number of ranks."""

import numpy as np
import pytest
import torch

from hpc_xvr.config import Data
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.degrade import bin_down, shifted
from hpc_xvr.data.samples.gaps import GapSamples, seen_apart
from hpc_xvr.data.samples.loader import training_batches
from hpc_xvr.data.samples.sample import Greys, Misfit
from hpc_xvr.errors import InputError

INFO = {"camera": "test", "bit_depth": 12, "scene": "marks", "split": "train", "source": "test"}


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """Recordings of 30 and 12 frames whose grey is their time: 100 t + 1000 for the second."""
    path = tmp_path_factory.mktemp("gaps") / "corpus"
    with CorpusWriter(path) as writer:
        for name, frames, first in (("long", 30, 0), ("short", 12, 1000)):
            levels = first + 100 * np.arange(frames, dtype=np.uint16)
            clip = np.broadcast_to(levels[:, None, None], (frames, 32, 40))
            writer.add(name, clip, clip.shape, np.uint16, INFO)
    return path


def plain(**settings):
    still = {"noise": "none", "patch": 16, "regrey": False, "gaps": (2, 20)}
    return Data(**{**still, **settings})


def test_a_gap_is_shown_from_key_frame_to_key_frame_in_equal_steps(marked):
    samples = GapSamples(marked, plain(), 4, seed=3)
    gaps, speeds, backwards = set(), set(), 0
    for step in range(60):
        for slot in range(4):
            sample = samples[step, slot]
            gap = samples.gap(step)
            assert sample["lr"].shape == (gap + 1, 1, 4, 4)
            assert sample["target"].shape == (gap - 1, 1, 16, 16)
            levels = torch.cat((sample["hr"][:1], sample["target"], sample["hr"][1:]))
            marks = (4095 * levels[:, 0, 0, 0]).round().int()
            speed = torch.unique(marks.diff())
            assert len(speed) == 1 and abs(int(speed)) in (100, 200, 300)
            torch.testing.assert_close(sample["lr"][:, 0, 0, 0], levels[:, 0, 0, 0])
            gaps.add(gap)
            speeds.add(abs(int(speed)) // 100)
            backwards += int(speed) < 0
    assert min(gaps) == 2 and max(gaps) > 15 and speeds == {1, 2, 3}
    assert 80 < backwards < 160


def test_every_frame_of_every_recording_is_learned(marked):
    samples = GapSamples(marked, plain(speed_up=1, augment=False), 2, seed=0)
    seen = set()
    for step in range(150):
        for slot in range(2):
            sample = samples[step, slot]
            seen.update((4095 * sample["target"][:, 0, 0, 0]).round().int().tolist())
    wanted = {100 * t for t in range(1, 29)} | {1000 + 100 * t for t in range(1, 11)}
    assert seen == wanted


def test_content_depends_on_seed_step_and_slot_alone(marked):
    samples = GapSamples(marked, plain(noise="poisson", regrey=True), 4, seed=1)
    whole = [next(iter(training_batches(samples, 0, 1, k, k + 1))) for k in range(3)]
    for rank in range(2):
        for step, of_step in enumerate(whole):
            share = next(iter(training_batches(samples, rank, 2, step, step + 1)))
            for name, value in share.items():
                assert torch.equal(value, of_step[name][2 * rank : 2 * rank + 2])
    other = GapSamples(marked, plain(noise="poisson", regrey=True), 4, seed=2)
    assert not all(
        a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(samples[0, 0].values(), other[0, 0].values(), strict=True)
    )


def test_a_misfit_shifts_and_scales_what_the_fast_camera_sees():
    rng = np.random.default_rng(0)
    sharp = rng.random((3, 16, 24)).astype(np.float32)
    np.testing.assert_array_equal(seen_apart(sharp, 4, Misfit()), bin_down(sharp, 4))
    ramp = np.broadcast_to(np.arange(24, dtype=np.float32) / 100, (3, 16, 24))
    moved = shifted(ramp, 1.25, -1.5)
    np.testing.assert_allclose(moved[:, :, 2:], ramp[:, :, 2:] - 0.015, atol=1e-6)
    np.testing.assert_array_equal(moved[:, :, 0], 0)  # the border continued
    np.testing.assert_allclose(shifted(sharp, 2, 0)[:, :-2], sharp[:, 2:], atol=1e-7)
    lr = seen_apart(sharp, 4, Misfit(gain=0.9, offset=0.05))
    np.testing.assert_allclose(lr, 0.9 * bin_down(sharp, 4) + 0.05, atol=1e-6)


def test_greys_change_within_the_scale_and_keep_the_scene():
    rng = np.random.default_rng(0)
    frames = rng.uniform(0.2, 0.6, (5, 8, 8)).astype(np.float32)
    changed = 0
    for _ in range(60):
        other = Greys.draw(rng).apply(frames)
        assert other.dtype == np.float32 and other.min() >= 0 and other.max() <= 1
        order = np.argsort(frames, None), np.argsort(other, None)
        assert (order[0] == order[1]).all() or (order[0] == order[1][::-1]).all()
        changed += not np.array_equal(other, frames)
    assert 30 < changed < 58


def test_recorded_streams_are_taken_at_their_times(tmp_path):
    clip = np.zeros((9, 32, 32), np.uint16)
    clip += (100 * np.arange(9, dtype=np.uint16))[:, None, None]
    lr = (50 * np.arange(18, dtype=np.uint16))[:, None, None] + np.zeros((1, 8, 8), np.uint16)
    with CorpusWriter(tmp_path / "c") as writer:
        info = {**INFO, "lr_times": [t / 2 for t in range(18)]}
        writer.add("a", clip, clip.shape, np.uint16, info, lr=lr)
    data = plain(lr_source="recorded", gaps=(4, 4), speed_up=1)
    sample = GapSamples(tmp_path / "c", data, 1, 0)[0, 0]
    keys = sample["hr"][:, 0, 0, 0]
    torch.testing.assert_close(sample["lr"][[0, -1], 0, 0, 0], keys)
    torch.testing.assert_close(sample["lr"][1:-1, 0, 0, 0], sample["target"][:, 0, 0, 0])
    for key in ("misregistration", "grey_mismatch"):  # not left out in silence
        with pytest.raises(InputError, match=f"data.{key} 0.1: .*set it to 0"):
            GapSamples(tmp_path / "c", data.model_copy(update={key: 0.1}), 1, 0)


def test_recordings_that_are_too_short_are_named(marked):
    with pytest.raises(
        InputError, match=r"longest train video has 30 .*set data.gaps to \[2, 29\]"
    ):
        GapSamples(marked, plain(gaps=(2, 30)), 1, 0)
