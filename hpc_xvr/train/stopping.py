"""When a run stops before its last step: a signal came, or its time is nearly up."""

from __future__ import annotations

import signal
import time
from types import FrameType

import psutil

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LEAVING = 10.0  # seconds from the last checkpoint on disk to the end of the process


class Stopping:
    """Listens for signals and watches the clock of this rank; the ranks agree elsewhere.

    Handlers only raise a flag; the loop looks at it between two steps, and saves.

    Args:
        max_time: seconds from the start of this process within which it must have ended.
    """

    def __init__(self, max_time: float | None = None) -> None:
        age = time.time() - psutil.Process().create_time()
        self._end = None if max_time is None else time.monotonic() + max_time - age
        self._before: dict[int, object] = {}
        self._training = False
        self._steps, self._slowest, self._last = 0, 0.0, 0.0
        self._interrupted = False
        self.reason: str | None = None

    def listen(self) -> None:
        """Take over the signals; may be called again."""
        for number in STOP_SIGNALS:
            self._before.setdefault(number, signal.getsignal(number))
            signal.signal(number, self._raise_flag)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # see submit/shield.py

    def unlisten(self) -> None:
        """Give the signals back."""
        self._training = False
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def begin(self) -> None:
        """The first step starts now."""
        self._training, self._last = True, time.monotonic()

    def asked(self, saving: float) -> bool:
        """Should this rank stop? To be called once a step, whose time it takes.

        Args:
            saving: seconds that a checkpoint may take.
        """
        now = time.monotonic()
        took, self._last = now - self._last, now
        self._steps += 1
        # The first step warms up, or compiles: it says little once there is a second one.
        self._slowest = max(self._slowest, took) if self._steps > 2 else took
        # A flag raised now is answered one step later; one step more may pass until we look again,
        # and one is for a machine that has become slower.
        needed = 3 * self._slowest + 2 * saving + _LEAVING
        if self._end is not None and now + needed > self._end:
            self.reason = self.reason or "as --max-time is nearly over"
        return self.reason is not None

    def _raise_flag(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted or not self._training:
                raise KeyboardInterrupt  # the second Ctrl-C means it; before training it may
            self._interrupted = True
        self.reason = "by a signal"
