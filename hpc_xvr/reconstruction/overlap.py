"""Reading, computing and writing at the same time: threads around the thread that computes.

Files, checksums and conversions leave the interpreter to others, so threads are enough.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

T = TypeVar("T")

_TICK = 0.1
"""Seconds after which a waiting thread looks whether it is still wanted."""
_END = object()


class Stopped(Exception):
    """Ends a thread whose work nobody waits for any more."""


@contextmanager
def ahead(items: Iterable[T], depth: int) -> Iterator[Iterator[T]]:
    """Make `items` in a thread of their own, up to `depth` of them ahead of who takes them.

    What making them raises is raised where they are taken.
    """
    queue: Queue[object] = Queue(depth)
    over = threading.Event()
    problem: list[BaseException] = []

    def fill() -> None:
        try:
            for item in items:
                _put(queue, item, over)
        except Stopped:
            return
        except BaseException as error:  # for the thread that waits
            problem.append(error)
        with suppress(Stopped):
            _put(queue, _END, over)

    def taken() -> Iterator[T]:
        while (item := queue.get()) is not _END:
            yield item  # type: ignore[misc]
        if problem:
            raise problem[0]

    thread = threading.Thread(target=fill, name="reading", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        over.set()
        thread.join()


class Behind(Generic[T]):
    """A thread that does something with each thing it is given, in turn, at most `depth` behind.

    As a context it ends when all is done; after an exception it leaves the rest.
    """

    def __init__(self, action: Callable[[T], object], depth: int = 1) -> None:
        self._action = action
        self._queue: Queue[object] = Queue(depth)
        self._over = threading.Event()
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writing", daemon=True)

    def give(self, item: T) -> None:
        """Hand over the next thing; waits while `depth` are waiting.

        Raises:
            what the action has raised for an earlier one.
        """
        try:
            _put(self._queue, item, self._over)
        except Stopped:
            self.check()
            raise

    def check(self) -> None:
        """Raise what the action has raised."""
        if self._problem is not None:
            raise self._problem

    def __enter__(self) -> Behind[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._over.set()
        with suppress(Stopped):
            _put(self._queue, _END, self._over)
        self._thread.join()
        if kind is None:
            self.check()

    def _work(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=_TICK)
            except Empty:
                if self._over.is_set():
                    return
                continue
            if item is _END or self._over.is_set():
                return
            try:
                self._action(item)  # type: ignore[arg-type]
            except BaseException as error:  # for the thread that gives
                self._problem = error
                self._over.set()
                return


class Beside:
    """A function that runs in a thread of its own. It is handed an event that is set when it should
    end, which it does by raising `Stopped`."""

    def __init__(self, action: Callable[[threading.Event], object]) -> None:
        self.over = threading.Event()
        self._problem: BaseException | None = None

        def run() -> None:
            try:
                action(self.over)
            except BaseException as error:  # for the thread that waits
                self._problem = error

        self._thread = threading.Thread(target=run, name="assembling", daemon=True)

    def check(self) -> None:
        """Raise what the function has raised."""
        if self._problem is not None:
            raise self._problem

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.over.set()
        self._thread.join()
        if kind is None:
            self.check()


def _put(queue: Queue[object], item: object, over: threading.Event) -> None:
    while not over.is_set():
        try:
            queue.put(item, timeout=_TICK)
            return
        except Full:
            continue
    raise Stopped
