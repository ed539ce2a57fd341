"""Reconstruct while the cameras record: each gap as soon as its second key frame is there.

Gaps are kept with a checksum of the frames they are made of. When the recordings have ended, they
are reconstructed as any others, and the pieces whose checksums fit need not be made again: the
result is the same file.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from hpc_xvr.config import Config
from hpc_xvr.data.cameras.growing import Growing
from hpc_xvr.data.ranks import ONE_RANK, Ranks
from hpc_xvr.errors import InputError
from hpc_xvr.factory.execution import use_threads
from hpc_xvr.factory.weights import Which
from hpc_xvr.files import check_spared, disk_errors, remove
from hpc_xvr.log import logger, say
from hpc_xvr.reconstruction.material import CameraFiles
from hpc_xvr.reconstruction.methods import NamedMethod, open_method
from hpc_xvr.reconstruction.pipeline import Piece, Reconstruction
from hpc_xvr.reconstruction.spool import ABOUT, Spool
from hpc_xvr.reconstruction.tiles import in_tiles
from hpc_xvr.reconstruction.watching import Gap, Watched, each_message_once
from hpc_xvr.reconstruction.workflow import Wanted, reconstruct_with
from hpc_xvr.reconstruction.writers import Calibration, as_stored, check_sequence, write_sequence
from hpc_xvr.text import parse_json
from hpc_xvr.version import __version__

Publish = Callable[[Iterable[tuple[int, np.ndarray]]], None]
BEHIND = 3
"""Gaps in a row that take longer to make than to record, of which the log tells."""


def follow_run(
    what: Path | str,
    device: torch.device,
    source: CameraFiles,
    *,
    out: Path,
    movie: Path | None = None,
    which: Which = "newest",
    wanted: Wanted,
    silence: float = 30.0,
    wait: float | None = None,
    growing_lr: Growing | None = None,
    growing_hr: Growing | None = None,
    publish: Publish | None = None,
    ranks: Ranks = ONE_RANK,
) -> Path:
    """As `reconstruct_run`, of recordings that are being written. All ranks call it alike and share
    the gaps.

    While they grow, each gap lies as a TIFF stack in the folder `<out>.gaps`, which goes when `out`
    is complete. It ends when the writers have closed their files (HDF5 in SWMR mode), or no
    complete frame has come for `silence` seconds; they have `wait` seconds to begin.

    Args:
        wait: None: `START_S`.
        growing_lr, growing_hr: the recordings, where they do not grow by themselves; on rank 0,
            the others follow the files of `source`.
        publish: is given the frames of each gap when it is made: (number of the fast frame, frame
            (H, W) with values as in `out`), on rank 0.

    Raises:
        InputError: as `reconstruct_run`, or a recording cannot be followed; says where the gaps
            are that were finished.
    """
    method = ranks.together(lambda: open_method(what, device, which))
    use_threads((method.config or Config()).run.threads)
    follower = ranks.together(
        lambda: Follower(method, device, source, out, wanted, silence, wait, ranks)
    )
    watched = follower.watched
    watched.lr, watched.hr = growing_lr or watched.lr, growing_hr or watched.hr
    follower.publish = publish
    try:
        with each_message_once():
            try:
                follower.follow()
            finally:
                for recording in (watched.lr, watched.hr):
                    recording.finish()
        reconstruct_with(method, device, source, out=out, movie=movie, wanted=wanted, ranks=ranks)
    except InputError as error:
        raise follower.with_what_is_kept(error) from None
    if ranks.rank == 0:
        follower.tell_latencies()
        follower.remove_gaps()
    return out


@dataclass(frozen=True)
class _Due:
    """What is to be told of a gap when it is finished."""

    since: float
    """When all that it depends on was there."""
    pieces: list[Piece]
    shape: tuple[int, int]
    calibration: Calibration
    last: tuple[int, np.ndarray] | None
    """The key frame that it ends with, if it is to be published."""


class Follower:
    """Makes the gaps of recordings that grow: of several ranks each its share, and rank 0 tells
    what has become of them.

    Beside the pieces (see `Spool`) lies `news.json` as long as the others are to go on: which
    frames are lost, as rank 0 has heard it.
    """

    def __init__(
        self,
        method: NamedMethod,
        device: torch.device,
        source: CameraFiles,
        out: Path,
        wanted: Wanted,
        silence: float,
        wait: float | None = None,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        check_sequence(out, wanted.dtype)
        check_spared([out], [source.lr, source.hr])
        self.method, self.device, self.source = in_tiles(method, wanted.tile), device, source
        self.out, self.wanted, self._ranks = out, wanted, ranks
        if ranks.rank:  # rank 0 says when it is over
            silence = wait = math.inf
        self.watched = Watched(
            *(self.method, device, source, wanted.frames),
            force=wanted.force,
            silence=silence,
            wait=wait,
        )
        self.gaps = out.with_name(f"{out.name}.gaps")
        self.publish: Publish | None = None
        self._begun = time.time()
        self._latencies: list[float] = []
        self._seen: dict[range, None] = {}
        """Gaps that are made, or are for another rank."""
        self._mine: dict[range, tuple[float, float]] = {}
        """Those that this rank has made: when, and what it took, in seconds."""
        self._awaited: dict[range, _Due] = {}
        """Those that are not told of yet."""
        self._made: dict[range, None] = {}
        """Those that are finished."""
        self._last: tuple[int, np.ndarray] | None = None
        """The last key frame."""
        self._since = 0.0
        """When all frames of the last gap were there."""
        self._behind = 0
        """Gaps in a row that took longer to make than to record."""
        self._told_lost: dict[str, list[int]] = {}
        self._cleared = False

    def follow(self) -> None:
        """Make gaps until the recordings have ended; all ranks call it."""
        facts = {
            "method": self.method.fingerprint,
            "adaptation": "no",
            "sources": f"growing: {self.source!r}",
            "numbers": self.wanted.dtype,
            "tile": str(self.wanted.tile),
            "device": self.device.type,
            "version": __version__,
        }
        kind = "uint16" if self.wanted.dtype == "uint16" else "float32"
        self._spool = Spool(self.out, facts, (0, 0), kind, self._ranks)
        self._news = self._spool.folder / "news.json"
        try:
            self._ranks.on_root(self._tell_lost)
            self._ranks.together(self._follow if self._ranks.rank == 0 else self._help)
        finally:
            if self._ranks.rank == 0:
                self._deliver()
                self._spool.close(keep=not self._spool.is_empty())
                if self.publish and self._last is not None:
                    self.publish([self._last])

    def _follow(self) -> None:
        try:
            for ready in self.watched.looks(self._seen):
                if ready:
                    self._clear()
                self._awaited.update((gap.frames, self._due(gap)) for gap in ready)
                self._tell_lost()
                self._make_mine(ready)
                self._deliver()
                if self._ranks.size > 1 and self._spool.failed():
                    return  # the rank that failed says why
        except BaseException:
            self._spool.fail()
            raise
        finally:
            self._news.unlink(missing_ok=True)

    def _help(self) -> None:
        over = False
        try:
            for ready in self.watched.looks(self._seen):
                if self._spool.failed():
                    return  # the rank that failed says why
                self._read_lost()
                self._make_mine(ready)
                if over and not self.watched.again_wanted:
                    return
                # What rank 0 saw before its end is seen at the look after this one, if not before.
                over = not self._news.exists()
        except BaseException:
            self._spool.fail()
            raise

    def _tell_lost(self) -> None:
        """Let the other ranks know which frames will never be there."""
        lost = {"lr": sorted(self.watched.lr.lost), "hr": sorted(self.watched.hr.lost)}
        if self._ranks.size == 1 or lost == self._told_lost:
            return
        self._told_lost = lost
        beside = self._news.with_name(f".{self._news.name}")
        with disk_errors(self._news):
            beside.write_text(json.dumps(lost))
            beside.replace(self._news)

    def _read_lost(self) -> None:
        with suppress(OSError, ValueError):  # replaced just now; it is read again
            found = parse_json(self._news.read_text())
            assert isinstance(found, dict)
            self.watched.lr.lost.update(found["lr"])
            self.watched.hr.lost.update(found["hr"])

    def _make_mine(self, ready: list[Gap]) -> None:
        """Make this rank's share of these gaps."""
        try:
            for gap in ready:
                if gap.number % self._ranks.size == self._ranks.rank:
                    self._make(gap)
                else:
                    self._seen[gap.frames] = None
        except InputError as error:
            self._deliver()
            self.watched.again(error)

    def _make(self, gap: Gap) -> None:
        begun = time.monotonic()
        self._spool.shape = gap.material.keys.shape
        for piece in gap.pieces:
            self._make_piece(gap.work, piece)
        self._write(gap)
        self._seen[gap.frames] = None
        self._mine[gap.frames] = time.time(), time.monotonic() - begun
        self.watched.was_made(gap)
        self._deliver()

    def with_what_is_kept(self, error: InputError) -> InputError:
        """The error, and where the finished gaps are."""
        if not self._made:
            return error
        first, last = min(f.start for f in self._made), max(f.stop for f in self._made) - 1
        kept = type(error)(
            f"{error}; finished frames {first} to {last} are kept in {self.gaps}, a TIFF a gap"
        )
        kept.exit_code = error.exit_code
        return kept

    def tell_latencies(self) -> None:
        """The median and the worst of the gaps that were made while the cameras recorded."""
        if self._latencies:
            say(
                f"latency, from the last frame that a gap needs on disk to the gap on disk: median "
                f"{median(self._latencies):.2f} s, worst {max(self._latencies):.2f} s "
                f"({len(self._latencies)} gaps)"
            )

    def remove_gaps(self) -> None:
        """Delete the files of the gaps, and their folder if nothing else is in it."""
        for frames in self._made:
            remove(self._file(frames))
        with suppress(OSError):
            self.gaps.rmdir()

    def _file(self, frames: range) -> Path:
        return self.gaps / f"{frames.start:06d}-{frames.stop - 1:06d}.tif"

    def _deliver(self) -> None:
        """Tell of gaps that are finished, in order of time, whoever has made them, and publish
        them."""
        if self._ranks.rank:
            return
        for frames, due in list(self._awaited.items()):
            finished = self._finished(frames)
            if finished is None:
                return
            del self._awaited[frames]
            self._told(frames, due.since, finished)
            if self.publish:
                assert due.last
                self._spool.shape = due.shape
                made = zip(frames, self._spool.frames(due.pieces), strict=True)
                self.publish(self._stored(made, due.calibration))
                self._last = next(self._stored([due.last], due.calibration))

    def _due(self, gap: Gap) -> _Due:
        keys, last = gap.material.keys, None
        if self.publish:
            last = gap.keys[1], np.clip(keys[gap.keys[1]], 0, 1)
        return _Due(gap.since, gap.pieces, keys.shape, gap.material.calibration, last)

    def _finished(self, frames: range) -> float | None:
        """When a gap was finished; None: it is not."""
        if frames in self._mine:
            return self._mine[frames][0]
        if frames not in self._seen:  # for this rank, and not made
            return None
        try:
            return self._file(frames).stat().st_mtime
        except OSError:
            return None

    def _stored(
        self, numbered: Iterable[tuple[int, np.ndarray]], calibration: Calibration
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The frames with the fast camera's numbers, and with values as in the result."""
        for t, frame in numbered:
            yield round(self.watched.numbers[t]), as_stored(frame, self.wanted.dtype, calibration)

    def _make_piece(self, work: Reconstruction, piece: Piece) -> None:
        loads = list(work.load([piece]))
        made_of = work.made_of(piece, loads)
        if self._spool.has(piece, lambda _: made_of):
            return
        frames = [frame for _, frame in work.run(loads)]
        self._spool.save(piece, frames, made_of)

    def _clear(self) -> None:
        """Delete gaps of another recording, or that are to be anew, before the first one."""
        if self._cleared:
            return
        self._cleared = True
        begun = (self._spool.folder / ABOUT).stat().st_mtime
        for old in self.gaps.glob("[0-9]*-[0-9]*.tif"):
            with suppress(FileNotFoundError):
                if old.stat().st_mtime < begun:
                    remove(old)

    def _write(self, gap: Gap) -> None:
        """The gap as a file that can be looked at."""
        with disk_errors(self.gaps):
            self.gaps.mkdir(exist_ok=True)
        write_sequence(
            self._file(gap.frames),
            self._spool.frames(gap.pieces),
            len(gap.frames),
            gap.material.calibration,
            gap.frames.start,
            self.wanted.dtype,
        )

    def _told(self, frames: range, since: float, finished: float) -> None:
        """Note that a gap is finished, all frames of which were there at a time."""
        self._made[frames] = None
        if since < self._begun:
            logger.info("frames %d to %d: made, recorded before", frames[0], frames[-1])
            return
        if frames in self._mine:
            took = self._mine[frames][1]
            interval, self._since = since - (self._since or self._begun), since
            self._behind = self._behind + 1 if took > interval else 0
            if self._behind == BEHIND:
                logger.warning(
                    "a gap takes %.2g s to make and %.2g s to record: the result falls behind the "
                    "cameras",
                    *(took, interval),
                )
        self._latencies.append(max(0.0, finished - since))
        logger.info(
            "frames %d to %d: made %.2f s after the last frame they need",
            *(frames[0], frames[-1], self._latencies[-1]),
        )
