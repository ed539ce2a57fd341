"""Recordings that are being written, and the gaps that can be made of them.

They are read as if they ended with the last complete frame; of the pieces of work that this gives,
those that more frames cannot change are ready.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from hpc_xvr.data.cameras import Recording
from hpc_xvr.data.cameras.growing import CannotFollow, Growing, growing
from hpc_xvr.data.pairing.agreement import ALIKE, Grey, compare, grey_to_match, told
from hpc_xvr.data.pairing.joining import Pairing, TooFew
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.errors import InputError, PassingError
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.material import (
    CameraFiles,
    Material,
    check_agreement,
    check_gaps,
    from_recordings,
)
from hpc_xvr.reconstruction.methods import NamedMethod
from hpc_xvr.reconstruction.pipeline import Piece, Reconstruction
from hpc_xvr.reconstruction.streams import KeyFrames, Stream
from hpc_xvr.reconstruction.workflow import Wanted, chosen_frames, work_of

START_S = 600.0
"""Seconds that the cameras have to begin, if nothing else is stated."""
RETRIES, RETRY_S = 10, 0.1
"""Times that frames are read again that could not be read, and seconds between; a file that is not
written in SWMR mode may be caught between two states."""
LOOK_S = 0.05
"""Seconds between two looks at the recordings; more where a look takes long."""


@dataclass(frozen=True)
class Gap:
    """A gap all frames of which are there."""

    number: int
    """Of the gaps asked for, the first is 0."""
    frames: range
    keys: tuple[int, int]
    """Times of its key frames."""
    pieces: list[Piece] = field(repr=False)
    work: Reconstruction = field(repr=False)
    material: Material = field(repr=False)
    since: float
    """When all that it depends on was there."""


class Watched:
    """Two recordings that grow.

    Args:
        asked: first frame that is wanted and the one after the last; None: the first there is, and
            the end.
        silence: seconds without a frame after which they have ended.
        wait: seconds that they have to begin; None: `START_S`.
    """

    def __init__(
        self,
        method: NamedMethod,
        device: torch.device,
        source: CameraFiles,
        asked: tuple[int | None, int | None] = (None, None),
        *,
        force: bool = False,
        silence: float,
        wait: float | None = None,
    ) -> None:
        self.method, self.device, self.source = method, device, source
        self.asked, self.force, self.silence = asked, force, silence
        self.wait = max(silence, START_S) if wait is None else wait
        self.lr, self.hr = (
            growing(path, camera.dataset, tuple(map(Path, camera.allow_links)))
            for path, camera in ((source.lr, source.lr_camera), (source.hr, source.hr_camera))
        )
        self.numbers = np.empty(0)
        """Of the frames that the fast camera has sent, lost ones counted."""
        self._grey = _HeldGrey(force)
        self._failures = 0
        self._needed = 2, 2
        """Frames of the fast and the sharp camera with which there may be something to do."""
        self._tried = 0, 0
        """What there was when that was last looked for."""
        self.again_wanted = False
        """Whether it must be looked for once more."""

    def looks(self, made: Collection[range]) -> Iterator[list[Gap]]:
        """At each look, the gaps that are ready and whose frames are not among those `made`;
        ends when both writers have closed their files, or no frame comes any more.

        Who takes them says with `again` where frames could not be read, and must not keep them:
        they hold their files open, and a file that stays open is not seen to grow.

        Raises:
            InputError: the recordings do not begin, cannot be followed, or do not fit.
        """
        last, told = time.monotonic(), ""
        logger.info("following %s and %s", self.lr.path, self.hr.path)
        while True:
            begun = time.monotonic()
            there = self.lr.frames and self.hr.frames
            more = any([self.lr.look(), self.hr.look()])
            limit = self.silence if there else self.wait
            if not more and begun - last > limit:
                break
            took = time.monotonic() - begun
            ready = self.ready(made)
            looked = ready is not None or more
            if ready is None:
                ready = []
            yield ready
            ready.clear()
            if looked:
                last = time.monotonic()
            if self.lr.ended and self.hr.ended and not self.again_wanted:
                logger.info("the writers have closed both recordings")
                return
            if not there:
                waiting = (self.hr if self.lr.frames else self.lr).waiting
                if waiting != told:
                    told = waiting
                    logger.info("waiting: %s", told)
            if not more:
                time.sleep(max(LOOK_S, 2 * took))
        silent = f"no complete frame has come for {limit:g} s"
        for recording in (self.lr, self.hr):
            if not recording.frames:
                longer = "" if there else "; --wait gives it longer to begin"
                raise InputError(f"{recording.waiting}; {silent}{longer}")
        logger.info("%s; %s; %s", silent, self.lr.waiting, self.hr.waiting)

    def ready(self, made: Collection[range]) -> list[Gap] | None:
        """The gaps that are ready but for those `made`; None: nothing has come since the last time
        that could have changed it."""
        there = self.lr.frames, self.hr.frames
        if there == self._tried or not all(np.greater_equal(there, self._needed)):
            return None
        self._tried, self.again_wanted = there, False
        try:
            gaps = list(self._gaps(self.material(), made))
            self._failures = self._failures if gaps else 0
            return gaps
        except TooFew as error:
            self.lr.waiting = str(error)
        except InputError as error:
            self.again(error)
        return []

    def again(self, error: InputError) -> None:
        """Frames could not be read: they are looked for again, unless that was done often enough.

        Raises:
            InputError: `error`.
        """
        if isinstance(error, (PassingError, CannotFollow)):
            raise error
        self.lr.look(), self.hr.look()  # which may tell why
        self._failures += 1
        if self._failures > RETRIES:
            raise error
        time.sleep(RETRY_S)
        self._tried, self._needed, self.again_wanted = (0, 0), (2, 2), True

    def was_made(self, gap: Gap) -> None:
        """Compare the grey scales at the key frame that a gap ends with.

        Raises:
            CannotFollow: the fast camera's picture is mirrored or negative.
        """
        self._failures = 0
        self._grey.check(gap.material, gap.keys[1])

    def material(self) -> Material:
        """The recordings up to their last complete frames."""
        source = self.source
        sharp = _opened(self.hr, source.hr_camera, "--hr")
        fast = _opened(self.lr, source.lr_camera.on_scale_of(source.hr_camera), "--lr")
        self.numbers = fast.taken()
        return from_recordings(
            self.method, fast, sharp, source.pairing, source.crop, self._grey.agreed
        )

    def _gaps(self, material: Material, made: Collection[range]) -> Iterator[Gap]:
        """Those that no further frame can change."""
        times = sorted(material.keys)
        start = self.asked[0] or 0
        stop = min(self.asked[1] or times[-1], times[-1])
        asked = range(max(start, times[0]), stop)
        work = work_of(self.method, material, self.device, asked)
        check_gaps(self.method, times, self.force, asked)
        by_gap: dict[tuple[int, int], list[Piece]] = {}
        for piece in work.pieces():
            by_gap.setdefault(piece.keys, []).append(piece)
        for number, (keys, pieces) in enumerate(by_gap.items()):
            frames = range(pieces[0].frames.start, pieces[-1].frames.stop)
            if frames in made:
                continue
            needed = max(work.depends_on(piece) for piece in pieces)
            if needed >= len(material.lr):
                self._needed = needed + 1, 2
                return
            since = max(self.lr.since(needed + 1), self.hr.since(times.index(keys[1]) + 1))
            yield Gap(number, frames, keys, pieces, work, material, since)
        self._needed = times[-1] + int(min(np.diff(times))) + 1, len(times) + 1


def frames_as_they_come(watched: Watched) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the fast frame, frame (H, W) float32 in [0, 1]), in order of time, each gap when
    it is ready; the last key frame, and what hangs on the recordings' end, when they have ended.

    Raises:
        InputError: see `Watched.looks`; frames from the first to the last key frame are asked for
            that are not there.
    """
    made: dict[range, None] = {}
    done: set[range] = set()
    """Pieces."""
    with each_message_once():
        for ready in watched.looks(made):
            while ready:
                yield from _frames_of_gap(watched, ready.pop(0), made, done)
    material = watched.material()
    frames = chosen_frames(material, Wanted(watched.asked), "follow")
    work = work_of(watched.method, material, watched.device, frames)
    for piece in work.pieces():
        if piece.frames not in done:
            for t, frame in work.run(work.load([piece])):
                yield round(watched.numbers[t]), frame


def _frames_of_gap(
    watched: Watched, gap: Gap, made: dict[range, None], done: set[range]
) -> Iterator[tuple[int, np.ndarray]]:
    """Those that are not done yet; a gap whose frames cannot be read comes again."""
    for piece in gap.pieces:
        if piece.frames in done:
            continue
        try:
            loads = list(gap.work.load([piece]))
        except InputError as error:
            watched.again(error)
            return
        for t, frame in gap.work.run(loads):
            yield round(watched.numbers[t]), frame
        done.add(piece.frames)
    made[gap.frames] = None
    try:
        watched.was_made(gap)
    except InputError as error:
        watched.again(error)


@dataclass
class _HeldGrey:
    """The relation of the cameras' grey scales as the first two key frames give it, held for those
    that follow, which are compared with it."""

    force: bool
    """Go on although the cameras do not fit."""
    grey: Grey | None = None
    _undecided: bool = False
    _name: str = ""
    _gap: float = math.nan
    _match: bool = True

    def agreed(self, lr: Stream, keys: KeyFrames, name: str, pairing: Pairing) -> Grey:
        """What is taken out.

        Raises:
            CannotFollow: cameras that certainly do not show the same at one time.
        """
        self._name, self._gap = name, pairing.gap or math.nan
        if self.grey is None:
            chosen = sorted(keys)[:-3:-1] if self._undecided else sorted(keys)[:2]
            some = {t: keys[t] for t in sorted(chosen)}
            found = compare(lr, some)
            grey = grey_to_match(found, name, pairing.match_grey)
            if found is None:  # nothing to be seen in them
                self._undecided = True
                return grey
            try:
                check_agreement(told(found, name, self._gap), self.force)
            except InputError as error:
                raise CannotFollow(str(error)) from None
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
def each_message_once() -> Iterator[None]:
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
