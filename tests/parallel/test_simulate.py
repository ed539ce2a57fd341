"""A corpus simulated by two ranks is the one that a single process makes."""

import pytest

from hpc_xvr import config
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.simulate import corpus as simulation
from hpc_xvr.data.simulate.corpus import simulate_corpus
from hpc_xvr.errors import CollectiveError, InputError

SIMULATE = config.Simulate(
    videos=9,
    size=(3, 32, 32),
    cameras={"sa-z": {"share": 0.5}, "hpv-x2": {"share": 0.5}},
)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def made(monkeypatch):
    """Ids that this rank simulates; `fail_at` of them end in an exception."""
    ids, make = [], simulation._make

    def counted(simulate, corpus, item):
        ids.append(item.id)
        if len(ids) == counted.fail_at:
            raise RuntimeError(f"recording {counted.fail_at}")
        return make(simulate, corpus, item)

    counted.fail_at = None
    monkeypatch.setattr(simulation, "_make", counted)
    monkeypatch.setattr(simulation, "_ROUND_S", 0.0)
    return ids, counted


@pytest.fixture
def folder(engine, shared_folder):
    """One that both ranks see, for each engine."""
    path = shared_folder / f"simulated-{engine.name}"
    path.mkdir(exist_ok=True)
    return path


def test_two_ranks_share_the_recordings(engine, folder, made):
    ids, _ = made
    simulate_corpus(SIMULATE, folder / "shared", 1, engine)
    assert (folder / "shared").is_dir()  # on every rank, when the call returns
    shares = engine.gather(list(ids))
    assert sorted(map(len, shares)) == [4, 5] and len({*shares[0], *shares[1]}) == 9
    if engine.is_root:
        simulate_corpus(SIMULATE, folder / "alone", 1)
        assert files(folder / "shared") == files(folder / "alone")
    engine.barrier()


def test_an_interrupted_call_goes_on_with_what_is_missing(engine, folder, made):
    ids, counted = made
    counted.fail_at = 3
    with pytest.raises(RuntimeError, match="recording 3"):
        simulate_corpus(SIMULATE, folder / "broken", 1, engine)
    engine.barrier()
    assert not (folder / "broken").exists()
    kept = {video.id for video in Corpus(folder / ".broken.building").videos}
    assert len(kept) == 4  # two rounds of two ranks
    ids.clear()
    counted.fail_at = None
    engine.barrier()
    simulate_corpus(SIMULATE, folder / "broken", 1, engine)
    again = set().union(*engine.gather(set(ids)))
    assert len(again) == 5 and not again & kept
    assert len(Corpus(folder / "broken").videos) == 9
    engine.barrier()


def test_what_stops_one_rank_ends_all_alike(engine, folder, made, monkeypatch):
    """A corpus that is there already, seen by the root; a disk that is full for another rank."""
    taken = folder / "taken"
    taken.mkdir(exist_ok=True)
    with pytest.raises(CollectiveError, match=r"taken: exists"):
        simulate_corpus(SIMULATE, taken, 1, engine)

    def full(simulate, corpus, item):
        if engine.rank == 1:
            raise InputError("no space left")
        return make(simulate, corpus, item)

    make = simulation._make
    monkeypatch.setattr(simulation, "_make", full)
    with pytest.raises(CollectiveError, match="no space left"):
        simulate_corpus(SIMULATE, folder / "full", 1, engine)
    engine.barrier()
    assert not (folder / "full").exists()
    engine.barrier()
