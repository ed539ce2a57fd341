"""Ranks that share the gaps of recordings while the cameras record."""

import re
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from hpc_xvr.data.cameras.growing import CannotFollow
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.pairing.joining import Pairing
from hpc_xvr.errors import CollectiveError
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.following import Follower, follow_run
from hpc_xvr.reconstruction.material import CameraFiles
from hpc_xvr.reconstruction.spool import Spool
from hpc_xvr.reconstruction.workflow import Wanted, reconstruct_run

CPU = torch.device("cpu")
GAP, FRAMES = 4, 41


@pytest.fixture
def folder(engine, shared_folder, request):
    """A folder of this test and engine that both ranks see."""
    path = shared_folder / request.node.name
    if engine.is_root:
        path.mkdir()
    engine.barrier()
    return path


def cameras():
    rng = np.random.default_rng(0)
    field = rng.integers(100, 4000, (16, 24 + FRAMES)).astype(np.uint16)
    sharp = np.stack([field[:, t : t + 24] for t in range(FRAMES)])
    fast = bin_down(sharp.astype(np.float32), 4).round().astype(np.uint16)
    return fast, sharp[::GAP]


WRITER = """
import sys, time, h5py, numpy as np
folder, pause, gap = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
stacks = {name: np.load(f"{folder}/{name}.npy") for name in ("fast", "sharp")}
files = {name: h5py.File(f"{folder}/{name}.h5", "w", libver="latest") for name in stacks}
data = {}
for name, stack in stacks.items():
    size = stack.shape[1:]
    data[name] = files[name].create_dataset(
        "exchange/data", (0, *size), stack.dtype, maxshape=(None, *size), chunks=(1, *size)
    )
    files[name].swmr_mode = True
for t in range(len(stacks["fast"])):
    for name, number, new in (("sharp", t // gap, t % gap == 0), ("fast", t, True)):
        if new:
            data[name].resize(number + 1, 0)
            data[name][number] = stacks[name][number]
            data[name].flush()
    time.sleep(pause)
"""
"""Both cameras of a shot, in SWMR mode."""


@contextmanager
def recording(engine, folder, pause):
    """Rank 0 starts a process that records."""
    if not engine.is_root:
        yield
        return
    for name, stack in zip(("fast", "sharp"), cameras(), strict=True):
        np.save(folder / f"{name}.npy", stack)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(pause), str(GAP)])
    try:
        yield
    finally:
        writer.kill()
        writer.wait()


def source(folder):
    files = folder / "fast.h5", folder / "sharp.h5"
    return CameraFiles(*files, pairing=Pairing(float(GAP)))


def following(engine, folder, made, pause=0.02, **more):
    """Follow, while rank 0 records; `made` gets the gaps that this rank makes."""
    make = Follower._make

    def noted(self, gap):
        made.append(gap.frames.start)
        return make(self, gap)

    with recording(engine, folder, pause), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Follower, "_make", more.pop("make", noted))
        return follow_run(
            *("bayes", CPU, source(folder)),
            out=folder / "movie.tif",
            wanted=Wanted(),
            silence=30.0,
            ranks=engine,
            **more,
        )


@pytest.mark.parametrize("late", [0.0, 0.3])
def test_two_ranks_share_the_gaps_and_write_the_same_file(
    engine, folder, caplog, monkeypatch, late
):
    """Also if rank 1 is still at work when rank 0 has seen the end."""
    make = Spool.save

    def slowly(self, *args):
        time.sleep(late if engine.rank else 0)
        make(self, *args)

    monkeypatch.setattr(Spool, "save", slowly)
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", "hpc_xvr")
    made, published = [], []
    following(engine, folder, made, publish=lambda frames: published.extend(t for t, _ in frames))
    shares = [sorted(set(share)) for share in engine.gather(made)]
    turns = list(range(0, 40, 8)), list(range(4, 40, 8))
    assert shares == [*turns]
    if engine.is_root:
        assert published == list(range(FRAMES))
        text = "\n".join(record.getMessage() for record in caplog.records)
        told = re.findall(r"frames (\d+) to (\d+): made", text)
        wanted = [(str(t), str(t + 3)) for t in range(0, 40, 4)]
        assert list(dict.fromkeys(told)) == wanted
        assert "40 of 41 frames were finished before" in text
        (folder / "offline").mkdir()
        offline = folder / "offline" / "movie.tif"
        reconstruct_run("bayes", CPU, source(folder), out=offline, wanted=Wanted())
        assert (folder / "movie.tif").read_bytes() == offline.read_bytes()
        assert not [p.name for p in folder.iterdir() if p.name[0] == "." or p.suffix == ".gaps"]
    engine.barrier()


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_cannot_make_ends_all_and_finished_gaps_are_kept(engine, folder, rank):
    make = Follower._make

    def broken(self, gap):
        if self._ranks.rank == rank and gap.frames.start >= 20:
            raise CannotFollow(f"rank {rank} cannot")
        return make(self, gap)

    with pytest.raises(CollectiveError, match=f"rank {rank} cannot") as error:
        following(engine, folder, [], make=broken)
    assert error.value.exit_code == 2
    if engine.is_root:  # who prints it
        assert re.search(
            r"; finished frames 0 to \d+ are kept in .*movie.tif.gaps", str(error.value)
        )
    engine.barrier()
    if engine.is_root:
        kept = sorted(path.name for path in (folder / "movie.tif.gaps").iterdir())
        assert "000000-000003.tif" in kept and "000004-000007.tif" in kept
    engine.barrier()
