"""The processes that share work on data, as such work sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Ranks(Protocol):
    """Processes that share a task: `size` of them, this one is number `rank`, the root is 0.

    All of them call each method, in the same order. Several ranks are a `distributed.comm.Comm`.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank."""
        ...

    def on_root(self, action: Callable[[], T]) -> T:
        """What `action` returns on the root, on every rank.

        Raises:
            InputError: what `action` raised, on every rank.
        """
        ...

    def together(self, action: Callable[[], T]) -> T:
        """What `action` returns here, after all ranks have called theirs.

        Raises:
            InputError: what the first of the ranks raised whose `action` failed, on every rank.
        """
        ...


class OneRank:
    """This process by itself."""

    rank = 0
    size = 1

    def gather(self, value: T) -> list[T]:
        return [value]

    def on_root(self, action: Callable[[], T]) -> T:
        return action()

    def together(self, action: Callable[[], T]) -> T:
        return action()


ONE_RANK = OneRank()
