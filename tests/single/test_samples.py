"""Samples: the right frames, the same on any number of ranks and workers, never a leaked worker."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from hpc_xvr.config import Data
from hpc_xvr.data.corpus import Corpus, DamagedVideo
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.degrade import bin_down, poisson
from hpc_xvr.data.samples.loader import training_batches
from hpc_xvr.data.samples.sample import key_frames, window_sample
from hpc_xvr.data.samples.slots import slots_of_rank
from hpc_xvr.data.samples.training import TrainingSamples
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

ROOT = Path(__file__).resolve().parents[2]
INFO = {"camera": "c", "bit_depth": 16, "scene": "s", "split": "train", "source": "x"}
SIDE = 48


def stamped(frames, seed=0):
    """Random pictures (T, H, W); no two patches are alike, so a crop tells where it is from."""
    return np.random.default_rng(seed).integers(0, 2**16, (frames, SIDE, SIDE + 8)).astype("u2")


def write(path, lengths, *, store="zarr", lr=False, split="train"):
    with CorpusWriter(path, store) as writer:
        for i, frames in enumerate(lengths):
            data, info, stream = stamped(frames, i), {**INFO, "split": split}, None
            if lr:  # the fast camera took two frames for each of the slow one's, 0.1 late
                stream = (
                    np.random.default_rng(100 + i)
                    .integers(0, 2**10, (2 * frames, SIDE // 4, SIDE // 4 + 2))
                    .astype("u2")
                )
                info |= {"lr_times": [0.5 * k + 0.1 for k in range(2 * frames)], "lr_bit_depth": 10}
            writer.add(f"v{i}", data, data.shape, data.dtype, info, lr=stream)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write(tmp_path_factory.mktemp("batches") / "c", [30, 24, 9, 41])


def dataset(path, output="centre", global_batch=8, seed=3, **data):
    defaults = {"patch": 16, "hr_gap": 6, "noise": "none", "augment": False}
    data = Data(corpus=path, **{**defaults, **data})
    return TrainingSamples(path, data, output, global_batch, seed)


def find(crop, videos, frame=None):
    """(video, t, y, x) of a crop of the stamped pictures."""
    stored = np.round(np.asarray(crop) * 65535).astype(int)
    for v, video in enumerate(videos):
        for t in range(len(video)) if frame is None else range(len(video))[frame : frame + 1]:
            for y, x in np.argwhere(video[t] == stored[0, 0]):
                window = video[t, y : y + stored.shape[0], x : x + stored.shape[1]]
                if np.array_equal(window, stored):
                    return v, t, int(y), int(x)
    raise AssertionError("the crop is in none of the videos")


@pytest.mark.parametrize(
    "output, lr_frames", [("centre", 3), ("sequence", 3), ("sequence", 5), ("centre", 1)]
)
def test_frames_of_a_sample_belong_together(corpus, output, lr_frames):
    videos = [stamped(n, i) for i, n in enumerate([30, 24, 9, 41])]
    data = dataset(corpus, output, lr_frames=lr_frames)
    half, intervals, gaps = lr_frames // 2, set(), set()
    for step in range(12):
        for slot in range(0, 8, 3):
            sample = data[step, slot]
            n_out = lr_frames if output == "sequence" else 1
            assert sample["lr"].shape == (lr_frames, 1, 4, 4)
            assert sample["hr"].shape == (2, 1, 16, 16)
            assert sample["target"].shape == (n_out, 1, 16, 16)
            assert sample["hr_offset"].shape == (2,)
            assert {value.dtype for value in sample.values()} == {torch.float32}
            number, t = data.slots.pick(step, slot)
            centre = sample["target"][n_out // 2, 0]
            v, found, y, x = find(centre, videos, t)
            assert (v, found) == (number, t)
            own = [video if i == v else video[:0] for i, video in enumerate(videos)]
            before, after = (find(key[0], own) for key in sample["hr"])
            assert before[2:] == after[2:] == (y, x)
            assert before[1] < t < after[1]
            gaps |= {t - before[1], after[1] - t}
            crops = videos[v][:, y : y + 16, x : x + 16] / np.float32(65535)
            fitting = [
                i
                for i in (1, 2, 3)
                if half * i <= min(t, len(crops) - 1 - t)
                and np.allclose(
                    sample["lr"][:, 0],
                    bin_down(crops[[t + i * k for k in range(-half, half + 1)]], 4),
                    atol=1e-6,
                )
            ]
            interval = fitting[0]
            intervals.add(interval)
            np.testing.assert_allclose(
                sample["hr_offset"], [(before[1] - t) / interval, (after[1] - t) / interval]
            )
            if output == "sequence":
                for k, target in enumerate(sample["target"][:, 0]):
                    assert find(target, own)[1] == t + interval * (k - half)
    assert intervals == ({1, 2, 3} if lr_frames > 1 else {1})
    assert gaps >= {1, 2, 3, 4, 5, 6} and max(gaps) == 6


@pytest.mark.parametrize("output", ["centre", "sequence"])
@pytest.mark.parametrize("lr_source", ["binned", "recorded"])
def test_orientations_are_shared_by_all_frames(tmp_path, output, lr_source):
    path = write(tmp_path / "c", [30, 24], lr=True)
    plain = dataset(path, output, lr_source=lr_source)
    turned = dataset(path, output, lr_source=lr_source, augment=True)
    seen = set()
    for step in range(6):
        for slot in range(8):
            a, b = plain[step, slot], turned[step, slot]
            assert torch.equal(a["hr_offset"], b["hr_offset"])
            for flips in np.ndindex(2, 2, 2):

                def turn(frames, flips=flips):
                    frames = frames.flip([axis for axis in (-2, -1) if flips[axis + 2]])
                    return frames.transpose(-2, -1) if flips[2] else frames

                if torch.equal(turn(a["target"]), b["target"]):
                    seen.add(flips)
                    assert torch.equal(turn(a["hr"]), b["hr"])
                    torch.testing.assert_close(turn(a["lr"]), b["lr"])
                    break
            else:
                raise AssertionError("none of the eight orientations")
    assert len(seen) == 8


def test_noise_is_photon_noise_on_lr_alone(tmp_path):
    level, photons = 0.4, 50.0
    flat = np.full((12, 64, 64), round(level * 65535), "u2")
    with CorpusWriter(tmp_path / "c") as writer:
        writer.add("v", flat, flat.shape, flat.dtype, INFO)
    fixed = (float(np.log10(photons)),) * 2
    data = dataset(tmp_path / "c", noise="poisson", photons_log10=fixed, patch=64)
    samples = [data[step, slot] for step in range(12) for slot in range(8)]
    assert all(
        (s[name] == samples[0]["hr"][0, 0, 0, 0]).all()
        for s in samples
        for name in ("hr", "target")
    )
    lr = torch.stack([s["lr"] for s in samples]).numpy().ravel().astype(float)
    error = np.sqrt(level / photons / lr.size)
    assert abs(lr.mean() - level) < 5 * error
    # Variance of counts / photons is level / photons; its own relative error is sqrt(2 / n).
    assert abs(lr.var() / (level / photons) - 1) < 5 * np.sqrt(2 / lr.size)
    np.testing.assert_allclose(lr * photons, np.round(lr * photons), atol=1e-4)
    assert lr.min() >= 0 and lr.max() <= 1
    spread = dataset(tmp_path / "c", noise="poisson", photons_log10=(1, 5), patch=64)
    logs = [
        np.log10(level / max(spread[step, 0]["lr"].numpy().astype(float).var(), 1e-9))
        for step in range(60)
    ]  # one level a sample, uniform in its logarithm
    assert 1 < np.percentile(logs, 10) < 2 and 4 < np.percentile(logs, 90) < 5.1
    assert abs(np.median(logs) - 3) < 0.8


def test_poisson_and_binning():
    rng = np.random.default_rng(0)
    frames = rng.random((3, 8, 12)).astype(np.float32)
    binned = bin_down(frames, 4)
    assert binned.dtype == np.float32 and binned.shape == (3, 2, 3)
    np.testing.assert_allclose(binned[1, 1, 2], frames[1, 4:8, 8:12].mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="8x12 cannot be binned by 5"):
        bin_down(frames, 5)
    full = poisson(np.ones((50, 50), np.float32), 10, rng)
    assert full.max() == 1 and full.dtype == np.float32 and full.min() < 0.9
    assert (poisson(np.zeros((4, 4), np.float32), 10, rng) == 0).all()
    np.testing.assert_allclose(poisson(frames, 1e12, rng), frames, atol=1e-5)


def collect(path, world, workers=0, start=0, steps=4, micro=None, seed=3):
    """All samples of each step, put together from the ranks' micro-batches."""
    parts = {}
    for rank in range(world):
        data = dataset(path, workers=workers, noise="poisson", augment=True, seed=seed)
        batches = training_batches(data, rank, world, start, steps, micro)
        share = 8 // world
        count = share // (micro or share)
        batches = list(batches)
        assert len(batches) == (steps - start) * count
        for i, batch in enumerate(batches):
            assert batch["lr"].shape == (micro or share, 3, 1, 4, 4)
            parts.setdefault(start + i // count, []).append(batch)
    return {
        step: {name: torch.cat([part[name] for part in several]) for name in several[0]}
        for step, several in parts.items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[step][name], b[step][name]) for step in a for name in a[step]
    )


def test_samples_do_not_depend_on_ranks_workers_or_resuming(corpus):
    alone = collect(corpus, 1)
    for world, micro in ((2, None), (4, 1), (8, None), (1, 2)):
        assert same(collect(corpus, world, micro=micro), alone)
    assert same(collect(corpus, 2, workers=2), alone)
    assert same(collect(corpus, 1, start=2), {step: alone[step] for step in (2, 3)})
    assert not same(collect(corpus, 1, seed=4), alone)


def test_both_stores_give_the_same_samples(corpus, tmp_path):
    other = write(tmp_path / "c", [30, 24, 9, 41], store="hdf5")
    assert same(collect(other, 1), collect(corpus, 1))


def test_recorded_stream_is_the_nearest_in_time(tmp_path):
    path = write(tmp_path / "c", [20], lr=True)
    video = Corpus(path)["v0"]
    data = Data(corpus=path, lr_source="recorded", hr_gap=5)
    sample = window_sample(
        video, 7, (5, 10), data, "centre", photons=5.0, y=slice(8, 40), x=slice(16, 48)
    )
    lr = video.lr_intensity(range(40))
    # Frame t is nearest to LR frame 2t - 0 at t + 0.1 (2t - 1 is at t - 0.4).
    np.testing.assert_array_equal(sample["lr"][:, 0], lr[[12, 14, 16], 2:10, 4:12])
    np.testing.assert_array_equal(sample["hr"][:, 0], video.intensity([5, 10])[:, 8:40, 16:48])
    training = dataset(path, lr_source="recorded", noise="poisson")
    everywhere = set()
    for step in range(10):
        sample = training[step, 0]
        _, t, y, x = find(sample["target"][0, 0], [stamped(20)])
        assert y % 4 == 0 and x % 4 == 0
        everywhere |= {y, x}
        np.testing.assert_array_equal(
            sample["lr"][1, 0], lr[2 * t, y // 4 : y // 4 + 4, x // 4 : x // 4 + 4]
        )
    assert len(everywhere) > 5


def test_windows_for_evaluation(corpus):
    video, frames = Corpus(corpus)["v2"], stamped(9, 2) / np.float32(65535)
    data = Data(corpus=corpus, lr_frames=5)
    sample = window_sample(video, 0, (0, 6), data, "sequence")
    times = [0, 0, 0, 1, 2]  # the clip's ends repeat
    np.testing.assert_allclose(sample["target"][:, 0], frames[times], atol=1e-7)
    np.testing.assert_allclose(sample["lr"][:, 0], bin_down(frames[times], 4), atol=1e-6)
    np.testing.assert_allclose(sample["hr"][:, 0], frames[[0, 6]], atol=1e-7)
    assert sample["hr_offset"].tolist() == [0, 6]
    crop = window_sample(video, 7, (6, 8), data, "centre", y=slice(3, 21), x=slice(5, 50))
    assert crop["target"].shape == (1, 1, 16, 44) and crop["lr"].shape == (5, 1, 4, 11)
    np.testing.assert_allclose(crop["target"][0, 0], frames[7, 3:19, 5:49], atol=1e-7)
    np.testing.assert_allclose(crop["lr"][4, 0], bin_down(frames[8, 3:19, 5:49], 4), atol=1e-6)
    assert crop["hr_offset"].tolist() == [-1, 1]
    noisy = [
        window_sample(
            video, 4, (0, 6), data, "centre", photons=10.0, rng=np.random.default_rng(seed)
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(noisy[0]["lr"], noisy[1]["lr"])
    assert not torch.equal(noisy[0]["lr"], noisy[2]["lr"])
    assert torch.equal(noisy[0]["hr"], noisy[2]["hr"])


def test_key_frames():
    assert [key_frames(t, 4, 11) for t in range(11)] == [(0, 4)] * 4 + [(4, 8)] * 4 + [(8, 10)] * 3
    assert [key_frames(t, 4, 9) for t in (7, 8)] == [(4, 8), (4, 8)]
    assert key_frames(2, 20, 5) == (0, 4)
    assert key_frames(0, 20, 1) == (0, 0)


def test_what_cannot_be_trained_on(tmp_path, corpus):
    with pytest.raises(InputError, match=r"video v0: .*48x56 .* data\.patch 96; set .* to 48"):
        dataset(corpus, patch=96)
    with pytest.raises(InputError, match=r"v0.*no recorded low-resolution stream.*binned"):
        dataset(corpus, lr_source="recorded")
    two = write(tmp_path / "lr", [9], lr=True)
    with pytest.raises(InputError, match=r"v0.*12x14, with data\.scale 2 .*24x28"):
        dataset(two, lr_source="recorded", scale=2)
    test_only = write(tmp_path / "test", [9, 9], split="test")
    with pytest.raises(InputError, match="none of its 2 videos is in the train split"):
        dataset(test_only)
    with pytest.raises(InputError, match=r"lr_frames 11 .* longest of 2 has 9"):
        dataset(write(tmp_path / "short", [4, 9]), lr_frames=11)
    with pytest.raises(InputError, match="cannot be shared by 3 ranks"):
        training_batches(dataset(corpus), 0, 3, 0, 1)
    with pytest.raises(InputError, match=r"micro_batch 3 does not divide .* 4 samples"):
        training_batches(dataset(corpus), 0, 2, 0, 1, 3)


def test_damage_reaches_the_trainer_from_a_worker(tmp_path):
    path = write(tmp_path / "c", [9])
    shard = path / "videos/v0/frames/c/0/0/0"
    content = np.frombuffer(shard.read_bytes(), "u1").copy()
    content[100 : SIDE * SIDE * 2 * 9 : 500] ^= 1
    shard.write_bytes(content.tobytes())
    for workers in (0, 1):
        with pytest.raises(DamagedVideo, match=r"^corpus .*video v0.*checksum") as error:
            next(iter(training_batches(dataset(path, workers=workers), 0, 1, 0, 3)))
        assert "\n" not in str(error.value)
        assert multiprocessing.active_children() == []


def test_damaged_recordings_are_passed_over_by_all_alike(tmp_path, monkeypatch):
    path = write(tmp_path / "c", [9, 12, 15, 11])
    intact = dataset(path)
    whole = {(step, slot): intact[step, slot] for step in range(8) for slot in range(8)}
    for video in ("v1", "v3"):
        (path / f"videos/{video}/frames/c/0/0/0").unlink()
    data = dataset(path, damaged="drop")
    named: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: named.append(text % values))
    read = {index: data[index] for index in whole}
    assert sorted(line.split("video ")[1][:2] for line in named) == ["v1", "v3"]  # once each
    lost = [index for index in whole if data.slots.pick(*index)[0] in (1, 3)]
    assert 10 < len(lost) < 54
    for index, sample in read.items():
        same = all(torch.equal(sample[key], whole[index][key]) for key in sample)
        assert same == (index not in lost)  # samples of the others are what they were
    for world, workers in ((1, 1), (2, 0)):  # the substitutes are the same for everyone
        for rank in range(world):
            loader = training_batches(
                dataset(path, damaged="drop", workers=workers), rank, world, 0, 4
            )
            for step, batch in enumerate(loader):
                for i, slot in enumerate(slots_of_rank(rank, world, 8)):
                    assert torch.equal(batch["target"][i], read[step, slot]["target"])
    for video in ("v0", "v2"):
        (path / f"videos/{video}/frames/c/0/0/0").unlink()
    with pytest.raises(InputError, match=r"none of 50 samples could be read.*--verify"):
        dataset(path, damaged="drop")[0, 0]


def test_a_data_set_is_small_to_send(corpus):
    data = dataset(corpus)
    data[0, 0]
    sent = pickle.dumps(data)
    assert len(sent) < 20_000
    again = pickle.loads(sent)
    assert all(torch.equal(again[3, 2][k], v) for k, v in data[3, 2].items())


RUN = """
    import os, signal, sys, time
    from hpc_xvr.config import Data
    from hpc_xvr.data.samples.loader import training_batches
    from hpc_xvr.data.samples.training import TrainingSamples

    def main():
        global batches  # as a traceback does, this keeps the loader until the interpreter ends
        data = Data(corpus=sys.argv[1], patch=16, workers=2)
        batches = iter(training_batches(TrainingSamples(sys.argv[1], data, "centre", 8, 1), 0, 1,
                                        0, 10_000))
        next(batches)
        caught = []
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, lambda number, _: caught.append(number))
        print("reading", flush=True)
        if sys.argv[2] == "raise":
            raise RuntimeError("as a bug would")
        while len(caught) < 4:
            next(batches)
        for _ in range(100):
            next(batches)
        print("went on", flush=True)
        time.sleep(60)

    if __name__ == "__main__":
        main()
"""


@pytest.fixture
def run(tmp_path, corpus):
    """run(how) -> (process, its children) of a script that reads with two workers."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RUN))
    started = []

    def start(how):
        process = subprocess.Popen(
            [sys.executable, script, corpus, how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        assert process.stdout.readline() == "reading\n", process.stderr.read()
        return process, psutil.Process(process.pid).children(recursive=True)

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def gone(children, seconds):
    _, alive = psutil.wait_procs(children, timeout=seconds)
    return not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_workers_survive_the_jobs_signals_and_not_a_killed_rank(run):
    process, children = run("signals")
    workers = [p for p in children if "forkserver" in " ".join(p.cmdline())]
    assert len(workers) == 3  # the fork server and two workers: no plain fork
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        os.killpg(process.pid, number)  # as a batch system signals a whole job
        time.sleep(0.1)
    assert process.stdout.readline() == "went on\n", process.stderr.read()
    assert all(p.is_running() for p in children)
    process.kill()
    assert gone(children, 15)


@pytest.mark.slow
def test_an_exception_ends_the_run_and_its_workers(run):
    process, children = run("raise")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "as a bug would" in errors
    assert gone(children, 15)
