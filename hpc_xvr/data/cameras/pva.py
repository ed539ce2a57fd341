"""Cameras that send their frames over EPICS: channels of NTNDArrays (PV Access), recorded while
they come.

A process of its own receives each channel, so that no frame waits for a computation, and writes an
HDF5 file that others read meanwhile (SWMR). Frames are told apart by their uniqueId: one that was
lost leaves a hole in the file. Needs pvapy (pip install 'hpc_xvr[pva]').
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import h5py
import numpy as np

from hpc_xvr.data.cameras.growing import CannotFollow, GrowingHdf5
from hpc_xvr.data.cameras.hdf5_choice import DATA
from hpc_xvr.data.cameras.recording import spans
from hpc_xvr.errors import InputError, explain_os_error

REQUEST = "record[queueSize=100]field()"
"""The server keeps so many frames for us if we are late."""
HELD = 256
"""Frames that wait to be written; then the server keeps them, and at last loses some."""
RUNNING = 3.0
"""Frame intervals between the frame that was there when we came and the next one, up to which the
camera was recording already."""
_START = f"""
import json, sys
sys.path[:], *arguments = json.loads(sys.argv[1])
from {__name__} import receive
receive(*arguments)
"""
THERE_S = 10.0
"""Seconds within which a channel must be there: servers offer theirs before cameras record."""
_END_S = 20
"""Seconds that a process has to close its file."""


def channel_of(path: Path | str) -> str | None:
    """The channel's name in pva://NAME; None for a path of another kind."""
    found = re.fullmatch(r"pva:/+(.+)", str(path))
    return found[1] if found else None


def check_installed() -> None:
    """Raise InputError without pvapy."""
    if importlib.util.find_spec("pvaccess") is None:
        raise InputError("pva://: needs pvapy, which is not installed: pip install 'hpc_xvr[pva]'")


class Channel(GrowingHdf5):
    """A channel whose frames are recorded in `file` from now on; the frame that it holds when we
    come is an old one and left out.

    Args:
        lenient: frames may be lost.
        wait: seconds within which it must be there.
    """

    def __init__(self, channel: str, file: Path, lenient: bool, wait: float = THERE_S) -> None:
        super().__init__(file, DATA)
        self.channel, self._wait = channel, wait
        self._problem, self._finished = "", False
        self._asked: float | None = None
        """When it was first asked for; None: not yet, or it is there."""
        path = [str(Path(folder).absolute()) for folder in sys.path if folder]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, json.dumps([path, channel, str(file), lenient])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the program; the end of its input ends it
        )
        self.waiting = (
            f"pva://{channel}: no such channel so far (check that it is served, its name, and "
            "EPICS_PVA_ADDR_LIST)"
        )
        self._reader = threading.Thread(target=self._read, name="pva", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "problem" in said:
                self._problem = said["problem"]
            elif "lost" in said:
                self.lost.update(range(*said["lost"]))
            elif "asked" in said:
                self._asked = time.monotonic()
            else:
                self._asked = None
                self.waiting = f"pva://{self.channel}: is there, and has sent no frame yet"
        if not self._problem and not self._finished:
            self._problem = "the process that receives it has ended"

    def look(self) -> bool:
        problem = self._problem  # frames that came before it count
        more = (self.frames > 0 or self.path.exists()) and super().look()
        self.ended = False  # a channel does not say when its recording ends
        if problem and not more:
            raise CannotFollow(f"pva://{self.channel}: {problem}")
        asked = self._asked
        if asked is not None and time.monotonic() - asked > self._wait:
            raise CannotFollow(
                f"{self.waiting}; it was looked for {self._wait:g} s long; --wait gives it longer"
            )
        return more

    def finish(self) -> None:
        """Receive no more, and close the file."""
        self._finished = True
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()


@contextmanager
def published(channel: str | None) -> Iterator[Any]:
    """Serve a channel: yields a function that sends (number, frame) of integers or floats (H, W);
    None without a name."""
    if channel is None:
        yield None
        return
    import pvaccess
    from pvapy.utility.adImageUtility import AdImageUtility

    server = pvaccess.PvaServer()
    server.addRecord(channel, pvaccess.NtNdArray(), None)
    server.start()

    def send(numbered: Iterable[tuple[int, np.ndarray]]) -> None:
        for number, frame in numbered:
            server.update(channel, AdImageUtility.generateNtNdArray2D(number, frame))

    try:
        yield send
    finally:
        server.stop()


# The process that receives ------------------------------------------------------------------------


class _Frame(NamedTuple):
    number: int
    """Its uniqueId."""
    seconds: float
    """Its time stamp."""
    values: np.ndarray | None
    """None: it is empty."""


class _Problem(Exception):
    """Ends the recording, in one line."""


class _Recorder:
    """Writes the frames of a channel to a file.

    Args:
        lenient: frames may be lost.
    """

    def __init__(self, file: Path, lenient: bool) -> None:
        self._path, self._lenient = file, lenient
        self._file: h5py.File | None = None
        self._before: _Frame | None = None
        self._first: _Frame | None = None
        self.count = 0

    def take(self, frame: _Frame) -> None:
        """Write a frame.

        Raises:
            _Problem: it does not follow the others.
        """
        if self._before is None:  # what the channel held when we came
            self._before = frame
        old = self._before
        if frame is old or (
            self._first is None and old.values is not None and frame[:2] == old[:2]
        ):
            return
        if frame.values is None:
            raise _Problem(f"has sent an empty frame (uniqueId {frame.number})")
        if self._first is None or self._file is None:
            self._first = frame
            self._begin(frame.values)
        assert self._file is not None
        number = frame.number - self._first.number
        if number == self.count - 1:
            return  # sent once more
        if number < self.count:
            raise _Problem(
                f"has begun to count anew: uniqueId {frame.number} after "
                f"{self._first.number + self.count - 1}"
            )
        if self.count == 1:
            self._check_begun(frame)
        data = self._file[DATA]
        if frame.values.shape != data.shape[1:] or frame.values.dtype != data.dtype:
            raise _Problem(
                f"frame {number} is {frame.values.shape} {frame.values.dtype}, the first one "
                f"{data.shape[1:]} {data.dtype}: all must be alike"
            )
        if number > self.count:
            lost = ", ".join(spans(range(self.count, number)))
            if not self._lenient:
                raise _Problem(
                    f"frame {lost} was lost on the way: give --lr-missing or --hr-missing to go on "
                    "without, or have the camera send more slowly"
                )
            _say(lost=[self.count, number])
        data.resize(number + 1, 0)
        data[number] = frame.values
        data.flush()
        self.count = number + 1

    def _begin(self, frame: np.ndarray) -> None:
        shape = frame.shape
        try:
            self._file = h5py.File(self._path, "x", libver="latest", locking=False)
        except FileExistsError:
            raise _Problem(f"{self._path}: is there already") from None
        self._file.create_dataset(
            DATA, (0, *shape), frame.dtype, maxshape=(None, *shape), chunks=(1, *shape)
        )
        self._file.swmr_mode = True

    def _check_begun(self, second: _Frame) -> None:
        """The first frame must be the first of the recording, not the first that we have seen."""
        assert self._before is not None
        assert self._first is not None
        interval = second.seconds - self._first.seconds
        since = self._first.seconds - self._before.seconds
        goes_on = self._first.number == self._before.number + 1
        if self._before.values is not None and goes_on and since < RUNNING * interval:
            raise _Problem(
                "was recording already, so the instant of its first frame is not known: start "
                "hpc-xvr before the cameras"
            )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def receive(channel: str, file: str, lenient: bool) -> None:
    """Record a channel until standard input ends; says on standard output, in JSON, what becomes of
    it."""
    import pvaccess
    from pvapy.utility.adImageUtility import AdImageUtility

    arrived: Queue[Any] = Queue(HELD)
    recorder = _Recorder(Path(file), lenient)

    def take(pv: Any) -> None:
        try:
            values, depth = AdImageUtility.reshapeNtNdArray(pv)[1:5:3]
            if depth is not None:
                raise ValueError("is in colour")
            stamp = pv["timeStamp"]
            seconds = stamp["secondsPastEpoch"] + 1e-9 * stamp["nanoseconds"]
            values = None if values is None else np.array(values)
            arrived.put(_Frame(int(pv["uniqueId"]), float(seconds), values))
        except Exception as error:  # whatever a channel may hold
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            arrived.put(_Problem(f"a frame cannot be read as an NTNDArray ({reason})"))

    def wait() -> None:
        sys.stdin.read()
        arrived.put(None)

    threading.Thread(target=wait, daemon=True).start()
    source = pvaccess.Channel(channel, pvaccess.PVA)
    source.setConnectionCallback(arrived.put)
    source.monitor(take, REQUEST)
    _say(asked=True)
    there = False
    try:
        while (item := arrived.get()) is not None:
            if isinstance(item, _Frame):
                recorder.take(item)
            elif isinstance(item, _Problem):
                raise item
            elif item:
                there = True
                _say(connected=True)
            elif there:
                raise _Problem(f"has gone away after {recorder.count} frames")
    except _Problem as problem:
        _say(problem=str(problem))
    except OSError as error:
        _say(problem=f"cannot write {file}: {explain_os_error(error)}")
    with suppress(OSError, RuntimeError):  # a disk that is full
        recorder.close()
    sys.stdout.flush()
    os._exit(0)  # threads of pvaccess may wait for us to take more


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)
