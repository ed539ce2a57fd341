"""Reconstruct while the cameras record: each gap as soon as its second key frame is there.

The recordings are read as if they ended with the last complete frame; of the pieces of work that
this gives, those that more frames cannot change are made and kept with a checksum of the frames
they are made of. When the recordings have ended, they are reconstructed as any others, and the
pieces whose checksums fit need not be made again: the result is the same file.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from hpc_xvr.config import Config
from hpc_xvr.data.cameras import Recording
from hpc_xvr.data.cameras.growing import CannotFollow, Growing, growing
from hpc_xvr.data.pairing.agreement import ALIKE, Grey, compare, grey_to_match, told
from hpc_xvr.data.pairing.joining import Pairing, TooFew
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.data.ranks import ONE_RANK
from hpc_xvr.errors import InputError, PassingError
from hpc_xvr.factory.execution import use_threads
from hpc_xvr.factory.weights import Which
from hpc_xvr.files import check_spared, disk_errors, remove
from hpc_xvr.log import logger, say
from hpc_xvr.reconstruction.material import (
    CameraFiles,
    Material,
    check_agreement,
    check_gaps,
    from_recordings,
)
from hpc_xvr.reconstruction.methods import NamedMethod, open_method
from hpc_xvr.reconstruction.pipeline import Piece, Reconstruction
from hpc_xvr.reconstruction.spool import Spool
from hpc_xvr.reconstruction.streams import KeyFrames, Stream
from hpc_xvr.reconstruction.workflow import Wanted, reconstruct_with, work_of
from hpc_xvr.reconstruction.writers import as_stored, check_sequence, write_sequence
from hpc_xvr.version import __version__

Publish = Callable[[Iterable[tuple[int, np.ndarray]]], None]
START_S = 600.0
"""Seconds that the cameras have to begin."""
BEHIND = 3
"""Gaps in a row that take longer to make than to record, of which the log tells."""
RETRIES, RETRY_S = 10, 0.1
"""Times that frames are read again that could not be read, and seconds between; a file that is not
written in SWMR mode may be caught between two states."""
LOOK_S = 0.05
"""Seconds between two looks at the recordings; more where a look takes long."""


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
    growing_lr: Growing | None = None,
    growing_hr: Growing | None = None,
    publish: Publish | None = None,
) -> Path:
    """As `reconstruct_run` in one process, of recordings that are being written.

    While they grow, each gap lies as a TIFF stack in the folder `<out>.gaps`, which goes when `out`
    is complete. It ends when the writers have closed their files (HDF5 in SWMR mode), or no
    complete frame has come for `silence` seconds; they have `START_S` to begin.

    Args:
        growing_lr, growing_hr: the recordings, where they do not grow by themselves.
        publish: is given the frames of each gap when it is made: (number of the fast frame, frame
            (H, W) with values as in `out`).

    Raises:
        InputError: as `reconstruct_run`, or a recording cannot be followed; says where the gaps
            are that were finished.
    """
    method = open_method(what, device, which)
    use_threads((method.config or Config()).run.threads)
    follower = Follower(method, device, source, out, wanted, silence)
    follower.lr, follower.hr = growing_lr or follower.lr, growing_hr or follower.hr
    follower.publish = publish
    try:
        with _each_message_once():
            try:
                follower.follow()
            finally:
                for recording in (follower.lr, follower.hr):
                    recording.finish()
        reconstruct_with(method, device, source, out=out, movie=movie, wanted=wanted)
    except InputError as error:
        raise follower.with_what_is_kept(error) from None
    follower.tell_latencies()
    follower.remove_gaps()
    return out


class Follower:
    """Makes the gaps of recordings that grow."""

    def __init__(
        self,
        method: NamedMethod,
        device: torch.device,
        source: CameraFiles,
        out: Path,
        wanted: Wanted,
        silence: float,
    ) -> None:
        check_sequence(out, wanted.dtype)
        check_spared([out], [source.lr, source.hr])
        self.method, self.device, self.source = method, device, source
        self.out, self.wanted, self.silence = out, wanted, silence
        self.lr, self.hr = (
            growing(path, camera.dataset, tuple(map(Path, camera.allow_links)))
            for path, camera in ((source.lr, source.lr_camera), (source.hr, source.hr_camera))
        )
        self.gaps = out.with_name(f"{out.name}.gaps")
        self._begun = time.time()
        self._latencies: list[float] = []
        self._made: dict[range, None] = {}
        """Gaps that are finished."""
        self._grey = _HeldGrey(wanted.force)
        self.publish: Publish | None = None
        self._last: tuple[int, np.ndarray] | None = None
        """The last key frame."""
        self._numbers = np.empty(0)
        """Of the frames that the fast camera has sent, lost ones counted."""
        self._since = 0.0
        """When all frames of the last gap were there."""
        self._behind = 0
        """Gaps in a row that took longer to make than to record."""
        self._spool: Spool | None = None
        self._failures = 0
        self._needed = 2, 2
        """Frames of the fast and the sharp camera with which there may be something to do."""
        self._tried = 0, 0
        """What there was when that was last looked for."""

    def follow(self) -> None:
        """Make gaps until the recordings have ended."""
        last, told = time.monotonic(), ""
        logger.info("following %s and %s", self.lr.path, self.hr.path)
        try:
            while True:
                begun = time.monotonic()
                there = self.lr.frames and self.hr.frames
                more = any([self.lr.look(), self.hr.look()])
                limit = self.silence if there else max(self.silence, START_S)
                if not more and begun - last > limit:
                    break
                took = time.monotonic() - begun
                if self._advance() or more:
                    last = time.monotonic()
                if self.lr.ended and self.hr.ended:
                    logger.info("the writers have closed both recordings")
                    return
                if not there:
                    waiting = (self.hr if self.lr.frames else self.lr).waiting
                    if waiting != told:
                        told = waiting
                        logger.info("waiting: %s", told)
                if not more:
                    time.sleep(max(LOOK_S, 2 * took))
        finally:
            if self._spool is not None:
                self._spool.close(keep=True)
            if self.publish and self._last is not None:
                self.publish([self._last])
        silent = f"no complete frame has come for {limit:g} s"
        for recording in (self.lr, self.hr):
            if not recording.frames:
                raise InputError(f"{recording.waiting}; {silent}")
        logger.info("%s; %s; %s", silent, self.lr.waiting, self.hr.waiting)

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

    def _advance(self) -> bool:
        """Make what can be made now; returns whether it was looked for."""
        there = self.lr.frames, self.hr.frames
        if there == self._tried or not all(np.greater_equal(there, self._needed)):
            return False
        self._tried = there
        try:
            self._make(self._material())
            self._failures = 0
        except TooFew as error:
            self.lr.waiting = str(error)
        except (PassingError, CannotFollow):
            raise
        except InputError:
            self.lr.look(), self.hr.look()  # which may tell why
            self._failures += 1
            if self._failures > RETRIES:
                raise
            time.sleep(RETRY_S)
            self._tried = 0, 0
        return True

    def _material(self) -> Material:
        """The recordings up to their last complete frames."""
        source = self.source
        sharp = _opened(self.hr, source.hr_camera, "--hr")
        fast = _opened(self.lr, source.lr_camera.on_scale_of(source.hr_camera), "--lr")
        self._numbers = fast.taken()
        return from_recordings(
            self.method, fast, sharp, source.pairing, source.crop, self._grey.agreed
        )

    def _make(self, material: Material) -> None:
        """Make the pieces that no further frame can change, gap by gap."""
        times = sorted(material.keys)
        start = self.wanted.frames[0] or 0
        stop = min(self.wanted.frames[1] or times[-1], times[-1])
        asked = range(max(start, times[0]), stop)
        work = work_of(self.method, material, self.device, asked)
        check_gaps(self.method, times, self.wanted.force, asked)
        spool = self._opened_spool(material.keys.shape)
        by_gap: dict[tuple[int, int], list[Piece]] = {}
        for piece in work.pieces():
            by_gap.setdefault(piece.keys, []).append(piece)
        for keys, pieces in by_gap.items():
            frames = range(pieces[0].frames.start, pieces[-1].frames.stop)
            if frames in self._made:
                continue
            needed = max(work.depends_on(piece) for piece in pieces)
            if needed >= len(material.lr):
                self._needed = needed + 1, 2
                return
            begun = time.monotonic()
            for piece in pieces:
                self._make_piece(work, piece, spool)
            self._write(material, frames, spool, pieces)
            if self.publish:
                self.publish(self._stored(zip(frames, spool.frames(pieces), strict=True), material))
                key = np.clip(material.keys[keys[1]], 0, 1)
                self._last = next(self._stored([(keys[1], key)], material))
            since = max(self.lr.since(needed + 1), self.hr.since(times.index(keys[1]) + 1))
            self._told(frames, since, time.monotonic() - begun)
            self._grey.check(material, keys[1])
        self._needed = times[-1] + int(min(np.diff(times))) + 1, len(times) + 1

    def _stored(
        self, numbered: Iterable[tuple[int, np.ndarray]], material: Material
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The frames with the fast camera's numbers, and with values as in the result."""
        calibration = material.calibration
        for t, frame in numbered:
            yield round(self._numbers[t]), as_stored(frame, self.wanted.dtype, calibration)

    def _make_piece(self, work: Reconstruction, piece: Piece, spool: Spool) -> None:
        loads = list(work.load([piece]))
        made_of = work.made_of(piece, loads)
        if spool.has(piece, lambda _: made_of):
            return
        frames = [frame for _, frame in work.run(loads)]
        spool.save(piece, frames, made_of)

    def _write(self, material: Material, frames: range, spool: Spool, pieces: list[Piece]) -> None:
        """The gap as a file that can be looked at."""
        with disk_errors(self.gaps):
            self.gaps.mkdir(exist_ok=True)
        if not self._made:
            for old in self.gaps.glob("[0-9]*-[0-9]*.tif"):  # of another recording, or to be anew
                remove(old)
        write_sequence(
            self._file(frames),
            spool.frames(pieces),
            len(frames),
            material.calibration,
            frames.start,
            self.wanted.dtype,
        )

    def _told(self, frames: range, since: float, took: float) -> None:
        """Note that a gap is finished, all frames of which were there at a time, and which took so
        many seconds."""
        self._made[frames] = None
        if since < self._begun:
            logger.info("frames %d to %d: made, recorded before", frames[0], frames[-1])
            return
        interval, self._since = since - (self._since or self._begun), since
        self._behind = self._behind + 1 if took > interval else 0
        if self._behind == BEHIND:
            logger.warning(
                "a gap takes %.2g s to make and %.2g s to record: the result falls behind the "
                "cameras",
                *(took, interval),
            )
        self._latencies.append(max(0.0, time.time() - since))
        logger.info(
            "frames %d to %d: made %.2f s after the last frame they need",
            *(frames[0], frames[-1], self._latencies[-1]),
        )

    def _opened_spool(self, shape: tuple[int, int]) -> Spool:
        if self._spool is None:
            facts = {
                "method": self.method.fingerprint,
                "adaptation": "no",
                "sources": f"growing: {self.source!r}",
                "numbers": self.wanted.dtype,
                "device": self.device.type,
                "version": __version__,
            }
            kind = "uint16" if self.wanted.dtype == "uint16" else "float32"
            self._spool = Spool(self.out, facts, shape, kind, ONE_RANK)
        return self._spool


@dataclass
class _HeldGrey:
    """The relation of the cameras' grey scales as the first two key frames give it, held for those
    that follow, which are compared with it."""

    grey: Grey | None = None
    _undecided: bool = False
    _name: str = ""
    _gap: float = math.nan
    _match: bool = True

    def __init__(self, force: bool = False) -> None:
        self._force = force

    def agreed(self, lr: Stream, keys: KeyFrames, name: str, pairing: Pairing) -> Grey:
        """What is taken out."""
        self._name, self._gap = name, pairing.gap or math.nan
        if self.grey is None:
            chosen = sorted(keys)[:-3:-1] if self._undecided else sorted(keys)[:2]
            some = {t: keys[t] for t in sorted(chosen)}
            found = compare(lr, some)
            grey = grey_to_match(found, name, pairing.match_grey)
            if found is None:  # nothing to be seen in them
                self._undecided = True
                return grey
            check_agreement(told(found, name, self._gap), self._force)
            self.grey, self._match = grey, pairing.match_grey is not False
            if grey not in (Grey(), pairing.match_grey):
                logger.warning(
                    "%s: while the cameras record, the grey scale is that of the key frames at "
                    "frames %s; at the end all gaps are made once more with that of all key "
                    "frames. --match-grey %.6g,%.6g would state it, and spare that",
                    *(name, " and ".join(map(str, some)), grey.gain, grey.offset),
                )
        return self.grey

    def check(self, material: Material, t: int) -> None:
        """Compare a further key frame with the fast frames on the grey scale that is held.

        Raises:
            CannotFollow: a mirrored or a negative picture.
        """
        found = compare(material.lr, {t: material.keys[t]})
        if found is None or self.grey is None:
            return
        try:
            check_agreement(told(found, self._name, self._gap), force=True)  # of one key frame
        except InputError as error:
            raise CannotFollow(str(error)) from None
        if self._match and found.correlation >= ALIKE and not 0.8 < found.grey.gain < 1.25:
            logger.warning(
                "%s: the cameras' grey scales have changed: at frame %d the fast frames are %.3g "
                "times what the first key frames led to: frames around it flicker",
                *(self._name, t, found.grey.gain),
            )


def _opened(recording: Growing, reading: CameraReading, option: str) -> Recording:
    """The complete frames of a recording.

    Raises:
        CannotFollow: its grey scale is only known when it is complete.
    """
    whole = replace(reading, missing=None)
    dataset = getattr(recording, "dataset", None)
    opened = whole.open_files(recording.files(), dataset, recording.frames)
    if opened.scale_measured:
        raise CannotFollow(
            f"{recording.path}: holds floating-point numbers, whose white is the largest of the "
            f"whole recording, which is not known yet: state it with {option}-full-scale"
        )
    lost = [k for k in sorted(recording.lost) if k < recording.frames]
    return opened.without(lost) if lost else opened


@contextmanager
def _each_message_once() -> Iterator[None]:
    """The recordings are opened again and again; what is said of them is said once."""
    said: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        known = text in said
        said.add(text)
        return not known

    logger.addFilter(new)
    try:
        yield
    finally:
        logger.removeFilter(new)
