"""Training steps recorded as CUDA graphs: the host launches one graph where it launched thousands
of kernels, each of which a GPU computes faster than it is launched."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hpc_xvr.train.task import Batch

_WARM_UP = 2  # passes before the recording: libraries choose their kernels, caches fill


class RecordedPasses:
    """Forward and backward passes, recorded once for each shape of a micro-batch and replayed.

    Gradients are added to what is in `grad`, as ever; these tensors must stay the same ones
    (`zero_grad(set_to_none=False)`). All recordings share one pool of memory, so that the largest
    of them, not their sum, is what a GPU must hold.

    Args:
        passes: computes a micro-batch's loss and adds its gradients. It must not wait for the
            device.
        parameters: those that have gradients.
    """

    def __init__(
        self, passes: Callable[[Batch], Tensor], parameters: Iterable[nn.Parameter]
    ) -> None:
        self._passes = passes
        self._parameters = [p for p in parameters if p.requires_grad]
        self._recorded: dict[object, tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch) -> Tensor:
        """The loss, without its history; the next call with this shape overwrites it."""
        shape = tuple((name, x.shape, x.dtype) for name, x in sorted(batch.items()))
        if shape not in self._recorded:
            self._recorded[shape] = self._record(batch)
        graph, inputs, loss = self._recorded[shape]
        for name, x in batch.items():
            inputs[name].copy_(x, non_blocking=True)
        graph.replay()
        return loss

    def _record(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor]:
        inputs = {name: x.clone() for name, x in batch.items()}
        for p in self._parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        before = [p.grad.clone() for p in self._parameters]  # type: ignore[union-attr]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._passes(inputs)
        torch.cuda.current_stream().wait_stream(aside)
        for p, gradient in zip(self._parameters, before, strict=True):
            p.grad.copy_(gradient)  # type: ignore[union-attr]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._passes(inputs)
        return graph, inputs, loss
