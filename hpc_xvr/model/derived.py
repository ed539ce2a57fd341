"""What is computed from parameters once for many inference passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import is_
from typing import Any

import torch
from torch import Tensor


class Derived:
    """Keeps values made from parameters until these change, in passes without gradients.

    Changes are seen by torch's version counters. A pass with gradients forgets all: the optimizer's
    step will follow, and fused Adam leaves no trace on the parameters it changes. Nor do writes
    through `.data`, and a pass without gradients between a backward pass and the step would fill it
    too early: call `clear` after these. Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[tuple[Tensor, ...], list, Any]] = {}

    def may_keep(self, *sources: Tensor) -> bool:
        """Whether `get` may be used in this pass."""
        if torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled():
            self.clear()
            return False
        return not any(source.is_inference() for source in sources)

    def get(self, key: Hashable, sources: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
        """The value of `key`, made anew where one of `sources` is another or was changed."""
        state = [(source.data_ptr(), source._version) for source in sources]
        kept = self._kept.get(key)
        if kept is not None and kept[1] == state and all(map(is_, kept[0], sources)):
            return kept[2]
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        self._kept[key] = (sources, state, value)
        return value

    def __reduce__(self) -> tuple:
        return Derived, ()

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
