"""Scores must be those one gets by hand, whoever computes them and however they are shared out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from hpc_xvr.config import Data
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.degrade import shifted as shifted_frames
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate import figures
from hpc_xvr.evaluate.noise import NO_NOISE, NoiseLevel
from hpc_xvr.evaluate.resume import Cells, key_of
from hpc_xvr.evaluate.rows import Condition
from hpc_xvr.evaluate.scoring import Setting, Unit, check_methods, frame_at, score, streams_of
from hpc_xvr.reconstruction.methods import NamedMethod, baseline_entry

DATA = Data(lr_frames=3)


def moving_blob(frames, size, speed, seed):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    texture = F.interpolate(
        torch.from_numpy(rng.random((1, 1, size // 2, size // 2))), scale_factor=2
    )[0, 0].numpy()
    clip = [
        0.3 + 0.2 * texture + 0.4 * (np.hypot(y - 0.5, x - 0.2 - speed * t) < 0.15)
        for t in range(frames)
    ]
    return np.round(np.stack(clip) * 4095).astype(np.uint16)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    with CorpusWriter(tmp_path_factory.mktemp("corpus") / "c") as writer:
        return [
            writer.add(
                f"clip{i}",
                clip,
                clip.shape,
                clip.dtype,
                {
                    "camera": "test",
                    "bit_depth": 12,
                    "scene": "blob",
                    "split": "test",
                    "source": "simulated",
                },
            )
            for i, clip in enumerate(
                [
                    moving_blob(9, 32, 0.06, 0),
                    moving_blob(12, 24, 0.03, 1),
                    moving_blob(6, 16, 0.05, 2),
                ]
            )
        ]


def shifted(sample):
    """A sequence method with errors of its own in every frame."""
    lr = sample["lr"]
    up = F.interpolate(lr.flatten(0, 1), scale_factor=4).unflatten(0, lr.shape[:2])
    return up + 0.01 * torch.arange(lr.shape[1]).view(1, -1, 1, 1, 1)


ENTRIES = {
    "bicubic": baseline_entry("bicubic"),
    "detail": baseline_entry("detail"),
    "shifted": NamedMethod("shifted", "shifted", shifted, n_out=3, flops=lambda h, w, s: h * w * s),
}
SETTING = Setting(DATA)


def unit(video, gap=4, noise="none"):
    return Unit(Condition("corpus", gap, NoiseLevel.parse(noise)), video)


def scored(videos, noise="none", entries=ENTRIES, gap=4, seed=0):
    setting = Setting(DATA, seed)
    return [row for v in videos for row in score(entries, unit(v, gap, noise), setting)]


def scores(frame, truth):
    """PSNR, SSIM and AAD as published, by scikit-image."""
    a, b = (np.round(np.clip(x, 0, 1) * 255).astype(np.uint8) for x in (frame, truth))
    return (
        peak_signal_noise_ratio(a, b, data_range=255),
        structural_similarity(a, b, data_range=255),
        np.abs(a.astype(int) - b).mean(),
        peak_signal_noise_ratio(frame.clip(0, 1), truth, data_range=1),
    )


def test_numbers_equal_direct_computation(videos):
    found = scored(videos[:2])
    for video in videos[:2]:
        frames = video.intensity(range(video.shape[0]))
        binned = frames.reshape(len(frames), frames.shape[1] // 4, 4, -1, 4).mean((2, 4))
        last = len(frames) - 1
        movies = {name: [] for name in ("bicubic", "shifted")}
        for t in range(len(frames)):
            if t % 4 == 0 or t == last:
                for movie in movies.values():
                    movie.append(frames[t])
                continue
            coarse = torch.from_numpy(binned[t])[None, None]
            movies["bicubic"].append(
                F.interpolate(coarse, scale_factor=4, mode="bicubic")[0, 0].numpy().clip(0, 1)
            )
            # Gaps of 4 hold one window of 3, whose frames are 0, 1 and 2 from its start.
            end = min(t // 4 * 4 + 4, last)
            start = t // 4 * 4 + 1 if end - t // 4 * 4 == 4 else (t // 4 * 4 + end) // 2 - 1
            level = 0.01 * (t - start)
            movies["shifted"].append(
                (np.kron(binned[t], np.ones((4, 4), np.float32)) + np.float32(level)).clip(0, 1)
            )
        for name, movie in movies.items():
            row = next(r for r in found if (r.method, r.recording) == (name, video.id))
            between = [t for t in range(len(frames)) if t % 4 and t != last]
            assert (row.frames, row.keys) == (len(between), len(frames) - len(between))
            np.testing.assert_allclose(
                (row.psnr, row.ssim, row.aad, row.psnr_float),
                np.mean([scores(movie[t], frames[t]) for t in between], axis=0),
                rtol=1e-4,
            )
            # All changes from frame to frame but those from one key frame to the next.
            change = np.abs(np.diff(movie, axis=0) - np.diff(frames, axis=0)).mean((1, 2)) * 255
            keys = [t for t in range(len(frames)) if t not in between]
            counted = [t for t in range(last) if not (t in keys and t + 1 in keys)]
            assert row.flicker == pytest.approx(change[counted].mean(), rel=1e-4)
            gradients = [np.stack(np.gradient(x, axis=(1, 2))) for x in (np.array(movie), frames)]
            errors = np.square(gradients[0] - gradients[1]).mean((0, 2, 3))[between]
            assert row.psnr_gradient == pytest.approx(-10 * np.log10(errors).mean(), rel=1e-4)
            assert 0 < row.seconds_per_frame < 5
    assert {row.flops_per_frame for row in found if row.method == "shifted"} == {
        8 * 8 * 4,
        6 * 6 * 4,
    }


def test_noise_lowers_the_score_and_is_the_same_again(videos):
    def numbers(rows):
        return [row.psnr for row in rows]

    quiet, noisy = scored(videos[:1]), scored(videos[:1], "200", seed=1)
    assert numbers(noisy) == numbers(scored(videos[:1], "200", seed=1))
    assert numbers(noisy) != numbers(scored(videos[:1], "200", seed=2))
    assert noisy[0].psnr < quiet[0].psnr - 0.5
    read = scored(videos[:1], "poisson_gaussian:200:0.05", seed=1)
    assert read[0].psnr < noisy[0].psnr


def test_a_fixed_pattern_stays_the_same_throughout_a_recording(videos):
    clean, _ = streams_of(unit(videos[0]), Setting(DATA, 1))
    stream, _ = streams_of(unit(videos[0], noise="fixed_pattern:1e9:1e-6"), Setting(DATA, 1))
    pattern = [stream[t] / clean[t] for t in (1, 2)]
    assert 0.01 < pattern[0].std() < 0.04
    np.testing.assert_allclose(pattern[0], pattern[1], atol=2e-3)


def test_cameras_that_do_not_fit_exactly(videos):
    """Low-resolution frames shifted by half a fast pixel somewhere, key frames with noise."""
    exact = Setting(DATA)
    loose = Setting(DATA, hr_noise=NoiseLevel.parse("1e4"), misregistration=0.5)
    shift = loose.shift("clip0")
    assert np.hypot(*shift) == pytest.approx(0.5 * DATA.scale)
    assert shift == loose.shift("clip0") != loose.shift("clip1")
    (lr, keys), (clean_lr, clean) = (streams_of(unit(videos[0]), s) for s in (loose, exact))
    truth = videos[0].intensity(0)
    np.testing.assert_array_equal(clean[0], truth)
    assert 0.3 < (keys[0] - truth).std() / np.sqrt(truth.mean() / 1e4) < 1.7
    np.testing.assert_array_equal(keys[0], keys[0])  # the same whenever it is read
    moved = bin_down(shifted_frames(truth[None], *shift), DATA.scale)[0]
    np.testing.assert_allclose(lr[0], moved, atol=1e-6)
    assert np.abs(lr[0] - clean_lr[0]).max() > 1e-3
    recorded = Setting(Data(lr_source="recorded"), misregistration=0.5)
    with pytest.raises(InputError, match=r"only binned .* leave evaluate\.misregistration out"):
        streams_of(unit(videos[0]), recorded)


@pytest.mark.parametrize(
    ("text", "name", "label"),
    [
        ("none", "none", "no noise"),
        ("1e3", "1000", "photon noise: 1000 photons a pixel"),
        ("1234567", "1234567.0", "photon noise: 1.23457e+06 photons a pixel"),
        ("poisson:1e3", "1000", "photon noise: 1000 photons a pixel"),
        (
            "poisson_gaussian:50",
            "poisson_gaussian:50",
            "photon and read noise: 50 photons a pixel, read noise 0.5 %",
        ),
        (
            "fixed_pattern:50:0.02",
            "fixed_pattern:50:0.02",
            "photon and read noise, fixed pattern: 50 photons a pixel, read noise 2 %",
        ),
    ],
)
def test_noise_levels_have_one_name(text, name, label):
    noise = NoiseLevel.parse(text)
    assert (noise.name, noise.label) == (name, label)
    assert NoiseLevel.parse(noise.name) == noise
    assert (noise == NO_NOISE) == (text == "none")


@pytest.mark.parametrize("text", ["some", "-3", "0", "poisson:1:2", "none:3", "1e3:", "inf"])
def test_noise_that_cannot_be(text):
    with pytest.raises(InputError, match=r"noise '.*': give none, a number of photons.*kinds: "):
        NoiseLevel.parse(text)


def test_finished_rows_are_found_again_and_unfinished_ones_are_not(videos, tmp_path):
    one = unit(videos[0])
    rows = scored(videos[:1])
    keys = {row.method: key_of(one, ENTRIES[row.method], SETTING) for row in rows}
    first, second = Cells(tmp_path, 0), Cells(tmp_path, 1)
    first.add([(keys["bicubic"], rows[0])])
    with (tmp_path / "cells" / "rank-0000.jsonl").open("a") as file:
        file.write('{"key": "abc", "row": {"condi')  # killed here
    first.add([(keys["detail"], rows[1])])
    second.add([(keys["shifted"], rows[2])])
    assert first.load() == {keys[row.method]: row for row in rows}
    # What numbers depend on makes another key; what they do not, does not.
    key = keys["shifted"]
    again = NamedMethod("shifted", "another title", shifted, n_out=3)
    moved = Unit(Condition("elsewhere", 4), videos[0])
    assert key == key_of(moved, again, SETTING)
    for other in (
        key_of(unit(videos[1]), again, SETTING),
        key_of(unit(videos[0], gap=5), again, SETTING),
        key_of(unit(videos[0], noise="10"), again, SETTING),
        key_of(one, NamedMethod("shifted", "", shifted, fingerprint="other weights"), SETTING),
        key_of(one, again, Setting(DATA, seed=1)),
        key_of(one, again, Setting(Data(lr_frames=5))),
        key_of(one, again, Setting(DATA, misregistration=0.5)),
        key_of(one, again, Setting(DATA, hr_noise=NoiseLevel.parse("1e4"))),
    ):
        assert other != key


def test_bad_input_is_refused(videos):
    with pytest.raises(InputError, match=r"clip0: all its 9 frames are key frames.*evaluate\.gap"):
        scored(videos, gap=1)
    with pytest.raises(InputError, match=r"peer: works at scale 2, .*data\.scale 4"):
        check_methods({"peer": NamedMethod("peer", "", shifted, scale=2)}, DATA)


def test_a_method_that_meets_the_truth_exactly(videos, tmp_path):
    frames = np.repeat(videos[0].read(0)[None], 5, axis=0)
    with CorpusWriter(tmp_path / "still") as writer:
        still = writer.add(
            "still",
            frames,
            frames.shape,
            frames.dtype,
            {"camera": "test", "bit_depth": 12, "scene": "blob", "split": "test", "source": "s"},
        )
    row = scored([still], entries={"nearest_hr": baseline_entry("nearest_hr")})[0]
    assert row.psnr == row.psnr_float == float("inf") and row.aad == row.flicker == 0
    Cells(tmp_path, 0).add([("key", row)])
    assert Cells(tmp_path, 0).load() == {"key": row}


def test_side_by_side_shows_frames_details_errors_and_a_profile(videos, tmp_path):
    noisy = unit(videos[0], noise="500")
    panels = {name: frame_at(method, noisy, 6, SETTING) for name, method in ENTRIES.items()}
    figure = figures.side_by_side(panels, videos[0].intensity(6), "clip0")
    path = figures.save(figure, tmp_path / "p.png")
    with Image.open(path) as image:
        assert image.width == pytest.approx(1408, abs=4) and image.height > 900
        pixels = np.asarray(image.convert("RGB")).astype(int)
    coloured = np.ptp(pixels, axis=2) > 60
    assert coloured[: image.height // 3].any()
    assert coloured[image.height // 2 : image.height * 3 // 4].mean() > 0.01
    profile = figure.axes[-1]
    labels = profile.get_legend_handles_labels()[1]
    assert labels == ["truth", *ENTRIES]
    truth = profile.lines[0].get_ydata()
    x = profile.lines[0].get_xdata()
    row = int(profile.get_xlabel().partition("row ")[2].rstrip(")"))
    np.testing.assert_array_equal(truth, videos[0].intensity(6)[row, x[0] : x[-1] + 1])
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]
