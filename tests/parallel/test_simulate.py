"""A corpus simulated by two ranks is the one that a single process makes."""

import pytest
from mpi4py import MPI

from hpc_xvr import config
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.simulate import corpus as simulation
from hpc_xvr.data.simulate.corpus import simulate_corpus

WORLD = MPI.COMM_WORLD
RANK = WORLD.Get_rank()
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
            raise RuntimeError(f"recording {counted.fail_at} of rank {RANK}")
        return make(simulate, corpus, item)

    counted.fail_at = None
    monkeypatch.setattr(simulation, "_make", counted)
    monkeypatch.setattr(simulation, "_ROUND_S", 0.0)
    return ids, counted


def simulate(path):
    simulate_corpus(SIMULATE, path, 1, RANK, 2, WORLD.allgather)


def test_two_ranks_share_the_recordings(shared_folder, made):
    ids, _ = made
    simulate(shared_folder / "shared")
    assert (shared_folder / "shared").is_dir()  # on every rank, when the call returns
    shares = WORLD.allgather(list(ids))
    assert sorted(map(len, shares)) == [4, 5] and len({*shares[0], *shares[1]}) == 9
    if RANK == 0:
        simulate_corpus(SIMULATE, shared_folder / "alone", 1)
        assert files(shared_folder / "shared") == files(shared_folder / "alone")
    WORLD.Barrier()


def test_an_interrupted_call_goes_on_with_what_is_missing(shared_folder, made):
    ids, counted = made
    counted.fail_at = 3
    with pytest.raises(RuntimeError, match="recording 3"):
        simulate(shared_folder / "broken")
    WORLD.Barrier()
    assert not (shared_folder / "broken").exists()
    kept = {video.id for video in Corpus(shared_folder / ".broken.building").videos}
    assert len(kept) == 4  # two rounds of two ranks
    ids.clear()
    counted.fail_at = None
    WORLD.Barrier()
    simulate(shared_folder / "broken")
    again = set().union(*WORLD.allgather(set(ids)))
    assert len(again) == 5 and not again & kept
    assert len(Corpus(shared_folder / "broken").videos) == 9
    WORLD.Barrier()
