"""Values computed from parameters once and kept for many inference passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import is_
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

Value = TypeVar("Value")


class Folding(nn.Module):
    """A module that keeps values made from its parameters, in inference only.

    They are kept from `eval()` on, in passes without gradients. What may change a parameter, and
    what then happens to the values:

    - `train()`, `eval()`, loading a state dict, `.to()` and its like: dropped. Copies and pickles
      of the module begin without any.
    - other tensors in the place of the parameters, as `torch.func.functional_call` puts there:
      computed again.
    - writing into a parameter under `no_grad`: computed again; torch counts such writes.
    - an optimizer's step in eval mode: fused optimizers leave no trace on what they change, so
      nothing is kept while a gradient waits, nor after a pass with gradients until the next
      `eval()`.
    - writing behind torch's back (through `.data`, a NumPy view, a collective on either): cannot be
      noticed; call `eval()` afterwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self._settled = False  # eval() was called, and no pass with gradients since
        self._folded: dict[Hashable, tuple[tuple[Tensor, ...], list[int], Any]] = {}

    def folded(
        self, key: Hashable, sources: tuple[Tensor, ...], make: Callable[[], Value]
    ) -> Value | None:
        """What `make` computes from `sources`, kept as `key`; None in a pass that keeps nothing."""
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled():
            self._settled = False
            self._folded.clear()
        if not self._settled or any(_may_change_unseen(source) for source in sources):
            return None
        versions = [source._version for source in sources]
        kept = self._folded.get(key)
        if kept is not None and kept[1] == versions and all(map(is_, kept[0], sources)):
            return kept[2]
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        self._folded[key] = (sources, versions, value)
        return value

    def train(self, mode: bool = True) -> Self:
        self._folded.clear()
        self._settled = not mode
        return super().train(mode)

    def _apply(self, *args: Any, **options: Any) -> Self:
        self._folded.clear()
        return super()._apply(*args, **options)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._folded.clear()
        super()._load_from_state_dict(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_folded": {}}


def _may_change_unseen(source: Tensor) -> bool:
    """An optimizer step may follow, or torch does not count writes."""
    return source.is_inference() or (source.is_leaf and source.grad is not None)
