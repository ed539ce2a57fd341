"""Ranks that share the gaps of a recording, or many recordings, write what one process does."""

import time

import numpy as np
import pytest
import tifffile
import torch

from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.pairing.joining import Pairing
from hpc_xvr.errors import CollectiveError, InputError
from hpc_xvr.reconstruction import workflow
from hpc_xvr.reconstruction.material import CameraFiles
from hpc_xvr.reconstruction.methods import open_method
from hpc_xvr.reconstruction.recordings import Shot, reconstruct_all
from hpc_xvr.reconstruction.spool import Spool
from hpc_xvr.reconstruction.workflow import reconstruct_with

CPU = torch.device("cpu")
GAP = 4


def write_shot(folder, frames, seed=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    field = rng.integers(100, 4000, (16, 24 + frames)).astype(np.uint16)
    sharp = np.stack([field[:, t : t + 24] for t in range(frames)])
    fast = bin_down(sharp.astype(np.float32), 4).round().astype(np.uint16)
    tifffile.imwrite(folder / "fast.tif", fast, photometric="minisblack")
    tifffile.imwrite(folder / "sharp.tif", sharp[::GAP], photometric="minisblack")


def cameras(folder):
    return CameraFiles(folder / "fast.tif", folder / "sharp.tif", pairing=Pairing(float(GAP)))


@pytest.fixture
def folder(engine, shared_folder, request):
    """A folder of this test and engine that both ranks see, with three shots."""
    path = shared_folder / f"{request.node.name}"
    if engine.is_root:
        for number, frames in enumerate((41, 13, 17)):
            write_shot(path / f"s{number}", frames, seed=number)
    engine.barrier()
    return path


@pytest.fixture
def saved(monkeypatch, engine):
    """Pieces that this rank has made; those in `broken` cannot be. Rank 0 is slow, so that it does
    not take all of them on a busy machine."""
    pieces, broken, save = [], set(), Spool.save

    def noted(self, piece, frames):
        if piece.frames.start in broken:
            raise InputError(f"no frame {piece.frames.start}")
        pieces.append(piece.frames.start)
        time.sleep(0.05 if engine.is_root else 0)
        save(self, piece, frames)

    monkeypatch.setattr(Spool, "save", noted)
    return pieces, broken


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("what", ["bayes", "builtin"])
def test_two_ranks_share_the_gaps_and_write_the_same_file(engine, folder, saved, what):
    pieces, _ = saved
    method = open_method(what)
    out = folder / f"{what}.tif"
    reconstruct_with(method, CPU, cameras(folder / "s0"), out=out, ranks=engine)
    shares = engine.gather(list(pieces))
    assert all(shares) and sum(map(len, shares)) == 11 == len({*shares[0], *shares[1]})
    if engine.is_root:
        alone = folder / "alone" / out.name  # the file names the one beside it
        alone.parent.mkdir(exist_ok=True)
        reconstruct_with(method, CPU, cameras(folder / "s0"), out=alone)
        assert out.read_bytes() == alone.read_bytes()
        assert not [name for name in names(folder) if name.startswith(".")]
    engine.barrier()


def test_what_fails_on_one_rank_ends_both_and_leaves_nothing(engine, folder, saved):
    _, broken = saved
    if not engine.is_root:
        broken.update(range(4, 44))  # whichever gap is its second
    with pytest.raises(CollectiveError, match=r"no frame \d+"):
        reconstruct_with(
            open_method("detail"), CPU, cameras(folder / "s0"), out=folder / "o.tif", ranks=engine
        )
    engine.barrier()
    assert names(folder) == ["s0", "s1", "s2"]
    engine.barrier()


def test_many_shots_are_dealt_to_the_ranks(engine, folder, saved):
    pieces, _ = saved
    method = open_method("detail")
    shots = [Shot(f"s{number}", cameras(folder / f"s{number}")) for number in range(3)]
    bad = Shot("bad", cameras(folder / "missing"))

    def make(shot, place, ranks, ledger):
        return reconstruct_with(method, CPU, shot.source, out=place, ranks=ranks, ledger=ledger)

    found = reconstruct_all([bad, *shots], make, folder / "out", True, engine)
    assert [o.status for o in found] == ["bad", "made", "made", "made"]
    made = [name for name in names(folder / "out") if not name.endswith(".json")]
    assert made == ["s0.tif", "s1.tif", "s2.tif"]
    assert sum(len(share) for share in engine.gather(list(pieces))) == 11 + 4 + 5
    engine.barrier()
    # Fewer shots than ranks: both work on the one there is.
    pieces.clear()
    reconstruct_all(shots[:1], make, folder / "one", False, engine)
    shares = engine.gather(list(pieces))
    assert all(shares) and sum(map(len, shares)) == 11
    with pytest.raises(CollectiveError, match="missing"):
        reconstruct_all([bad, *shots], make, folder / "none", False, engine)
    engine.barrier()


def test_a_shot_both_work_on_is_refused_alike(engine, folder):
    for source in (cameras(folder / "missing"),):
        with pytest.raises(InputError, match="missing"):
            workflow.reconstruct_run("detail", CPU, source, out=folder / "o.tif", ranks=engine)
    engine.barrier()
