"""Looks at every frame of a movie on its way to the file, and tells what it found.

What is found goes to the log, into `STEM-trust.json` beside the movie and, where they are wanted,
into a file of maps and a movie of uncertainties. Nothing is kept but some numbers a frame.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

from hpc_xvr.errors import InputError
from hpc_xvr.files import check_folder, replacing, write_atomic
from hpc_xvr.log import logger
from hpc_xvr.reconstruction.methods import NamedMethod
from hpc_xvr.reconstruction.streams import KeyFrames, Stream
from hpc_xvr.reconstruction.trust.consistency import (
    FRAME_LIMIT,
    SQUARE_LIMIT,
    Comparison,
    compare_frame,
    enforce,
)
from hpc_xvr.reconstruction.trust.held_out import SPREAD_DB, HeldOut, check, left_out
from hpc_xvr.reconstruction.trust.observation import SQUARE, observe
from hpc_xvr.reconstruction.trust.uncertainty import Surroundings, deviation, surroundings
from hpc_xvr.reconstruction.writers import Calibration, check_sequence, write_sequence
from hpc_xvr.text import parse_json

MAPS = (".h5", ".hdf5")
PER_FRAME = ("chi_square", "worst_square", "contradicts")
"""What is stored with each frame of a result."""
TOLD = 12
"""Frames that a line of the log names."""
MEANING = (
    "one standard deviation: 68 % of pixels lie nearer than this to what the sharp camera would "
    "have recorded"
)


@dataclass(frozen=True)
class Asked:
    """What is asked for, besides the comparison with the fast camera, which is always made."""

    check: bool = False
    """Leave out every other key frame, and tell how well it is made from its neighbours."""
    enforce: bool = False
    """Make the frames agree with the fast camera's."""
    uncertainty: Path | None = None
    """File of a standard deviation for each pixel of each frame."""
    maps: Path | None = None
    """File of the maps of both comparisons (HDF5)."""

    def verify(self, out: Path) -> None:
        """Refuse files that could not be written.

        Raises:
            InputError: unknown suffix, missing folder, or one name for two files.
        """
        if self.uncertainty:
            check_sequence(self.uncertainty)
        if self.maps:
            if self.maps.suffix.lower() not in MAPS:
                raise InputError(
                    f"{self.maps}: maps are written as HDF5; end the name in {' or '.join(MAPS)}"
                )
            check_folder(self.maps)
        names = [path.resolve() for path in (out, self.uncertainty, self.maps) if path]
        if len(set(names)) < len(names):
            raise InputError(
                f"{out}: movie, uncertainty and maps need a file each; give them different names"
            )


class Looked(NamedTuple):
    """A frame, and what is to be thought of it."""

    t: int
    frame: np.ndarray
    """(H, W), as it is written."""
    comparison: Comparison
    """Of the frame as it was made, before anything was enforced."""
    deviation: np.ndarray | None = None
    """(H, W) float32: standard deviation of each pixel, of full scale."""


class Examiner:
    """Looks at the frames of one recording, in order of time."""

    def __init__(
        self,
        lr: Stream,
        keys: KeyFrames,
        around: Surroundings,
        *,
        agree: bool = False,
        deviations: bool = False,
        factor: float = 1.0,
    ) -> None:
        self._lr, self._keys, self._around = lr, keys, around
        self._agree, self._deviations, self._factor = agree, deviations, factor
        self._times = np.array(sorted(keys))

    def look(self, t: int, frame: np.ndarray) -> Looked:
        """Compare frame (H, W) of time t; see `Looked`. Key frames stay as they were recorded."""
        camera, measured = self._around.camera, self._lr[t]
        comparison = compare_frame(frame, measured, camera)
        is_key = t in self._keys
        if self._agree and not is_key:
            frame = enforce(frame, measured, camera)
        if not self._deviations:
            return Looked(t, frame, comparison)
        if is_key:
            return Looked(t, frame, comparison, self._around.own(frame))
        after = int(np.searchsorted(self._times, t))
        first, last = (int(self._times[i]) for i in (after - 1, after))
        sigma = deviation(
            frame,
            measured,
            self._keys[first],
            self._keys[last],
            last - first,
            self._around,
            self._factor,
        )
        return Looked(t, frame, comparison, sigma)


@dataclass
class Examination:
    """All that was found in one movie."""

    around: Surroundings
    held_out: HeldOut | None = None
    enforced: bool = False
    uncertainty: Path | None = None
    keys: Collection[int] = ()
    """Key frames, which are passed through."""
    frames: list[int] = field(default_factory=list)
    chi_square: list[float] = field(default_factory=list)
    worst_square: list[float] = field(default_factory=list)
    place: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Frame -> where it contradicts the measurement most, in sharp pixels; those that do."""

    def add(self, looked: Looked) -> None:
        """One frame more."""
        found = looked.comparison
        self.frames.append(looked.t)
        self.chi_square.append(found.chi_square)
        self.worst_square.append(found.worst)
        if found.contradicts:
            self.place[looked.t] = found.place

    @property
    def contradicts(self) -> list[int]:
        """Frames that the measurement contradicts."""
        return list(self.place)

    @property
    def judged(self) -> bool:
        """Is the fast camera's noise known? Else no frame is flagged, whatever it shows."""
        return self.around.camera.keys > 0

    def per_frame(self, frames: Sequence[int | None]) -> dict[str, list[Any]]:
        """What is stored with the frames of a result: chi-square, that of the worst square, and
        whether the measurement contradicts the frame.

        Args:
            frames: number of each; None: one that is missing.
        """
        at = {t: i for i, t in enumerate(self.frames)}
        places = [None if t is None else at[t] for t in frames]

        def listed(values: Sequence[Any]) -> list[Any]:
            return [None if i is None else values[i] for i in places]

        flags = [t in self.place for t in self.frames]
        values = (
            [round(x, 4) for x in self.chi_square],
            [round(x, 3) for x in self.worst_square],
            flags if self.judged else [None] * len(flags),
        )
        return {name: listed(these) for name, these in zip(PER_FRAME, values, strict=True)}

    def gist(self, out: Path) -> dict[str, Any]:
        """What is stored with a result about all of it, and the file that has more."""
        held = self.held_out
        return {
            "file": trust_file(out).name,
            "judged": self.judged,
            "contradicts": self.contradicts,
            "chi_square_median": round(float(np.median(self.chi_square)), 4),
            "chi_square_largest": round(max(self.chi_square), 4),
            "enforced": self.enforced,
            "held_out_psnr_db": held.mean_psnr if held else None,
            "expected_psnr_db": held.expected_psnr if held else None,
            "uncertainty": self.uncertainty.name if self.uncertainty else None,
        }

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file: all of it, with the limits and units."""
        camera = self.around.camera
        found: dict[str, Any] = {
            "camera": {
                "from": f"{camera.keys} key frames",
                "blur_fast_pixels": camera.blur,
                "gain": camera.gain,
                "offset": camera.offset,
                "gain_uneven_by": round(camera.uneven_by, 4),
                "read_variance": camera.read,
                "variance_per_intensity": camera.shot,
                "displacement_fast_pixels": math.sqrt(camera.slope),
                "pixels_left_out": 0 if camera.usable is None else int((~camera.usable).sum()),
                "known": self.judged,
            },
            "consistency": {
                "frames": self.frames,
                "chi_square": [round(x, 4) for x in self.chi_square],
                "worst_square": [round(x, 3) for x in self.worst_square],
                "square_fast_pixels": SQUARE,
                "limits": {"chi_square": FRAME_LIMIT, "worst_square": SQUARE_LIMIT},
                "contradicts": [
                    {"frame": t, "row": row, "column": column}
                    for t, (row, column) in self.place.items()
                ],
                "enforced": self.enforced,
            },
            "held_out": None,
            "uncertainty": None,
        }
        held = self.held_out
        if held:
            found["held_out"] = {
                "frames": list(held.times),
                "longest_gap": held.gap,
                "psnr_db": [_finite(x) for x in held.psnr],
                "ssim": [_finite(x) for x in held.ssim],
                "nrmse": [_finite(x) for x in held.nrmse],
                "mean_psnr_db": held.mean_psnr,
                "expected_psnr_db": held.expected_psnr,
                "expected_spread_db": SPREAD_DB,
            }
        if self.uncertainty:
            found["uncertainty"] = {
                "file": self.uncertainty.name,
                "meaning": MEANING,
                "factor": held.factor if held else 1.0,
                "scaled_by": f"{len(held.times)} held-out key frames" if held else None,
            }
        return found

    def tell(self) -> None:
        """A summary in the log; a warning if frames contradict the measurement."""
        if not self.judged:
            logger.warning(
                "consistency: the frames are too small to know the fast camera's noise; whether "
                "they contradict the measurement is not judged"
            )
            return
        worst = int(np.argmax(self.chi_square))
        logger.info(
            "consistency with the fast camera: chi-square %.2f in the middle, %.2f at most "
            "(frame %d); 1 is what noise leaves",
            *(float(np.median(self.chi_square)), self.chi_square[worst], self.frames[worst]),
        )
        if not self.place:
            return
        most = max(self.place, key=lambda t: self.worst_square[self.frames.index(t)])
        row, column = self.place[most]
        named = ", ".join(map(str, self.contradicts[:TOLD]))
        if recorded := [t for t in self.contradicts if t in self.keys]:
            logger.warning(
                "%d of the flagged frames are key frames, as they were recorded (%s): there the "
                "cameras differ by themselves; look at registration, times and flat fields",
                *(len(recorded), ", ".join(map(str, recorded[:TOLD]))),
            )
        logger.warning(
            "%d of %d frames contradict what the fast camera measured: %s%s; most of all frame %d "
            "around row %d, column %d: %s",
            *(len(self.place), len(self.frames), named),
            ", ..." if len(self.place) > TOLD else "",
            *(most, row, column),
            "it was enforced, the place stays doubtful"
            if self.enforced
            else "do not rely on them there, or try --enforce",
        )


def trust_file(out: Path) -> Path:
    """Where the findings on a movie are written."""
    return out.with_name(f"{out.stem}-trust.json")


def flags_of(out: Path) -> tuple[int, int] | None:
    """How many frames of a result are flagged, and of how many; None: that is not known."""
    try:
        found = parse_json(trust_file(out).read_text())
        if found["result"] != out.name:
            return None
        consistency = found["consistency"]
        flags = len(consistency["contradicts"]), len(consistency["frames"])
        return flags if found["camera"]["known"] else None
    except (OSError, ValueError, TypeError, LookupError):
        return None


class Examining(NamedTuple):
    """A movie that is being looked at."""

    found: Examination
    examiner: Examiner
    sinks: list[Any]

    def through(self, frames: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
        """The frames as they are to be written, each looked at."""
        for t, frame in frames:
            looked = self.examiner.look(t, frame)
            self.found.add(looked)
            for sink in self.sinks:
                sink(looked)
            yield t, looked.frame


@contextmanager
def examining(
    method: NamedMethod,
    streams: tuple[Stream, KeyFrames],
    calibration: Calibration,
    asked: Asked,
    out: Path,
    frames: range | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Examining]:
    """Look at a movie while it is written: pass its frames `through` what is yielded.

    Args:
        frames: those of the movie; default: from the first key frame to the last.

    At the end the findings are written; after an exception nothing is.

    Raises:
        InputError: a file cannot be written; `check` with fewer than three key frames.
    """
    lr, keys = streams
    asked.verify(out)
    if asked.check:
        left_out(list(keys))  # before minutes of work
    around = surroundings(keys, observe(lr, keys))
    logger.info("%s", around.camera.told())
    held = check(method, lr, keys, around, device) if asked.check else None
    if held:
        logger.info("check: %s", held.told())
    if asked.uncertainty and not held:
        logger.info(
            "uncertainty: as on simulated recordings; with --check it is scaled by this "
            "recording's own key frames"
        )
    found = Examination(around, held, asked.enforce, asked.uncertainty, set(keys))
    examiner = Examiner(
        lr,
        keys,
        around,
        agree=asked.enforce,
        deviations=bool(asked.uncertainty),
        factor=held.factor if held else 1.0,
    )
    frames = frames or range(min(keys), max(keys) + 1)
    first, count = frames.start, len(frames)
    with ExitStack() as stack:
        sinks: list[Any] = []
        if asked.maps:
            maps = stack.enter_context(_maps(asked.maps, count, lr.shape[1:], first, held))
            sinks.append(maps)
        if asked.uncertainty:
            told = replace(calibration, notes=(*calibration.notes, MEANING))
            writer = stack.enter_context(_beside(asked.uncertainty, count, told, first))
            sinks.append(writer)
        yield Examining(found, examiner, sinks)
    found.tell()
    # m.tif and m.h5 have the same trust file: it says whose it is
    text = json.dumps({"result": out.name, **found.as_dict()}, indent=1) + "\n"
    write_atomic(trust_file(out), lambda file: file.write(text.encode()))
    for path in (asked.uncertainty, asked.maps, trust_file(out)):
        if path:
            logger.info("written: %s", path)


@contextmanager
def _maps(
    path: Path, count: int, grid: tuple[int, int], first: int, held: HeldOut | None
) -> Iterator[Any]:
    """Write the maps as they come."""
    with replacing(path) as beside, h5py.File(beside, "w") as file:
        aside = file.create_dataset(
            "consistency/aside", (count, *grid), np.float32, chunks=(1, *grid), compression="lzf"
        )
        aside.attrs["meaning"] = (
            "(measured - expected) / standard deviation, on the fast camera's grid; squared: "
            "chi-square"
        )
        aside.attrs["first_frame"] = first
        if held:
            error = file.create_dataset("held_out/error", data=held.error)
            error.attrs["meaning"] = (
                "root mean square error at each pixel of the key frames left out, of full scale"
            )
            error.attrs["frames"] = held.times
        total = np.zeros(grid)

        def sink(looked: Looked) -> None:
            aside[looked.t - first] = looked.comparison.aside
            np.add(total, np.square(looked.comparison.aside), out=total)

        yield sink
        mean = file.create_dataset("consistency/chi_square", data=(total / count).astype("f4"))
        mean.attrs["meaning"] = "mean of chi-square over all frames, on the fast camera's grid"


@contextmanager
def _beside(path: Path, count: int, calibration: Calibration, first: int) -> Iterator[Any]:
    """Write deviations to a file of their own while the movie is written to another."""
    queue: Queue[np.ndarray | None] = Queue(2)
    failed: list[BaseException] = []

    def frames() -> Iterator[np.ndarray]:
        while (frame := queue.get()) is not None:
            yield frame

    def write() -> None:
        try:
            write_sequence(path, frames(), count, calibration, first, "float32")
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=write, name="uncertainty", daemon=True)
    thread.start()

    def put(frame: np.ndarray | None) -> None:
        while not failed:
            try:
                queue.put(frame, timeout=0.2)
                return
            except Full:
                continue

    def sink(looked: Looked) -> None:
        put(looked.deviation)
        if failed:
            raise failed[0]

    try:
        yield sink
    finally:  # the writer refuses a file of too few frames, and leaves nothing of it
        put(None)
        thread.join()
    if failed:
        raise failed[0]


def _finite(x: float) -> float | None:
    return round(float(x), 5) if math.isfinite(x) else None
