"""The corpus of configs/corpus_1358.yaml on 1, 2, 4 and 8 ranks: who reads what, seen on the disk.

At thumbnail size, 24 frames of 64 x 64. Only one recording of each scene and camera is simulated
here, the others are links to it; HPC_XVR_CORPUS_1358 names the whole one where it was made
(`hpc-xvr simulate configs/corpus_1358.yaml --set simulate.size=[24,64,64]`).
"""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from hpc_xvr.config import load
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.corpus.layout import HEADER, MANIFEST
from hpc_xvr.data.corpus.manifest import line
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.samples.loader import training_batches
from hpc_xvr.data.samples.slots import centres, slots_of_rank
from hpc_xvr.data.samples.training import TrainingSamples
from hpc_xvr.data.simulate import corpus as simulation

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "corpus_1358.yaml"
SETTINGS = ["simulate.size=[24,64,64]", "data.patch=32", "data.hr_gap=8", "data.workers=0"]
WORLDS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def cfg():
    return load(CONFIG, SETTINGS)


@pytest.fixture(scope="module")
def corpus(cfg, tmp_path_factory):
    if "HPC_XVR_CORPUS_1358" in os.environ:
        return Path(os.environ["HPC_XVR_CORPUS_1358"])
    base = tmp_path_factory.mktemp("corpus_1358")
    first, entries = base / "first", {}
    items = simulation.plan_corpus(cfg.simulate)
    with CorpusWriter(first, "zarr") as writer:
        for item in items:
            if (item.scene, item.camera) not in entries:
                entry = simulation._make(cfg.simulate, first, item)
                entries[item.scene, item.camera] = entry
                writer.commit(entry)
    path = base / "corpus"
    (path / "videos").mkdir(parents=True)
    (path / HEADER).write_bytes((first / HEADER).read_bytes())
    lines = []
    for item in items:
        entry = entries[item.scene, item.camera]
        (path / "videos" / item.id).symlink_to(first / "videos" / entry["id"])
        attributes = {**entry["attributes"], "split": item.split}
        lines.append(line({**entry, "id": item.id, "attributes": attributes}))
    (path / MANIFEST).write_bytes(b"".join(lines))
    return path


@pytest.fixture(scope="module")
def samples(cfg, corpus):
    return training(cfg, corpus)


def training(cfg, corpus, seed=1):
    return TrainingSamples(corpus, cfg.data, "centre", cfg.train.global_batch, seed)


def test_the_corpus_is_what_the_config_says(cfg, corpus):
    videos = Corpus(corpus).videos
    assert len(videos) == 1358
    cameras = Counter((v.info.camera.split(" (")[0], v.info.bit_depth) for v in videos)
    assert cameras == {("Photron FASTCAM SA-Z", 12): 679, ("Shimadzu HPV-X2", 10): 679}
    assert Counter(v.split for v in videos) == {"train": 1086, "validation": 136, "test": 136}
    mix = Counter((v.split, v.info.scene, v.info.camera) for v in videos)
    assert len(mix) == 3 * 5 * 2
    for split, least, most in (("train", 108, 109), ("validation", 13, 14), ("test", 13, 14)):
        counts = [count for (part, *_), count in mix.items() if part == split]
        assert min(counts) == least and max(counts) == most
    assert {(v.shape, v.lr_shape) for v in videos} == {((24, 64, 64), (24, 16, 16))}


def test_at_full_size_each_camera_has_its_own_geometry():
    full = load(CONFIG).simulate
    assert Counter((i.camera, i.size) for i in simulation.plan_corpus(full)) == {
        ("hpv-x2", (256, 248, 400)): 679,
        ("sa-z", (256, 400, 1024)): 679,
    }


@pytest.mark.parametrize("epoch", [0, 3])
def test_every_training_frame_is_in_one_slot_of_one_rank(samples, epoch):
    wanted = {
        (number, t) for number, v in enumerate(samples.videos) for t in centres(v.shape[0], 3)
    }
    dealt = samples.slots.deal(epoch)
    loads = [sum(stop - start for _, start, stop in pieces) for pieces in dealt]
    assert max(loads) - min(loads) <= 0.02 * sum(loads) / len(loads)
    for world in WORLDS:
        seen = Counter(
            (number, t)
            for rank in range(world)
            for slot in slots_of_rank(rank, world, samples.global_batch)
            for number, start, stop in dealt[slot]
            for t in range(start, stop)
        )
        assert seen.keys() == wanted and set(seen.values()) == {1}


@pytest.fixture(scope="module")
def opened(corpus):
    """(id, stream) of every clip's file that this process opens, as the interpreter reports it."""
    seen = []
    folder = corpus / "videos"

    def hook(event, arguments):  # cannot be taken back: it listens to this corpus alone
        if event == "open" and str(arguments[0]).startswith(f"{folder}/"):
            seen.append(Path(arguments[0]).relative_to(folder).parts[:2])

    sys.addaudithook(hook)
    return seen


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_opens_its_own_videos_and_no_others(cfg, corpus, world, opened):
    steps = 18
    by_rank = []
    for rank in range(world):
        opened.clear()
        samples = training(cfg, corpus)  # a rank's own
        assert opened == []
        for batch in training_batches(samples, rank, world, 0, steps):
            assert len(batch["target"]) == 40 // world
        dealt = samples.slots.deal(0)
        own = {
            samples.videos[number].id
            for slot in slots_of_rank(rank, world, 40)
            for number, *_ in dealt[slot]
        }
        assert {stream for _, stream in opened} == {"frames"}  # not the one nobody asked for
        by_rank.append({id for id, _ in opened})
        assert by_rank[-1] <= own
        # 18 draws from some 27 recordings a slot meet half of them.
        assert len(by_rank[-1]) > 0.4 * len(own)
    # Slots are cut to equal length, so that a recording at a cut may be two ranks'.
    shared = sum(map(len, by_rank)) - len(set().union(*by_rank))
    assert shared <= world - 1


def test_an_epochs_order_changes_with_the_epoch_and_repeats_with_the_seed(cfg, corpus, samples):
    steps = samples.slots.steps_per_epoch

    def order(of, epoch):
        return [of.slots.pick(epoch * steps + k, g) for k in range(steps) for g in range(0, 40, 8)]

    first, second = order(samples, 0), order(samples, 1)
    assert first != second and sorted(first) != sorted(second)  # dealt anew, too
    again = training(cfg, corpus)
    assert order(again, 1) == second and order(again, 0) == first
    assert order(training(cfg, corpus, seed=2), 0) != first
