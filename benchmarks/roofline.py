"""What a training step and a reconstructed frame cost at least on a GPU: operations and bytes of
every kernel, counted on tensors without data, so no GPU is needed.

    python benchmarks/roofline.py                   half a minute; files its result in results/
    python benchmarks/roofline.py --quick           one small case, files nothing

A kernel takes at least its operations over the rate of a large matrix product, or its bytes (every
operand read once, every result written once) over the rate of a large copy, whichever is longer.
"eager" adds that up kernel by kernel. "fused" leaves out what a compiler can keep in registers: the
traffic of norms, casts, gathers and element-wise work between products. Below the launches' own
time (LAUNCH_US each) a device waits for its host, unless CUDA graphs replay them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from filing import RESULTS, usage
from hpc_xvr import log
from hpc_xvr.config import load
from hpc_xvr.factory.build import build_model
from hpc_xvr.model import swin
from hpc_xvr.train.task import task_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GPUS = {"H100": 3.35e12, "H200": 4.3e12}
"""Bytes a second of a large copy: H100 from its data sheet, H200 as measured."""
BF16, TF32 = 790e12, 400e12
"""Operations a second of a large product: measured, and half of it."""
LAUNCH_US = 6.0
"""Of the host for a kernel in eager training: a usual figure, to be measured."""

# Parts of the networks, by the innermost modules that a kernel belongs to; first match counts. The
# backward pass of a block is not told apart any further: there the kinds of kernels do.
PARTS = [
    ("HR features", r"hr_convs"),
    ("LR features", r"lr_conv|\.frames"),
    ("blocks", r"blocks"),
    ("stage convolutions", r"stages?\.(\d+\.)?conv|body_conv"),
    ("upsampling", r"head_conv|up_convs|last_conv"),
    ("motion", r"motion"),
    ("choice", r"choose|enter"),
    ("features, warping, loss", r"."),
]
MOVED_ONLY = {"norm", "element-wise", "copies"}
"""Kinds whose traffic a compiler may fuse away."""


@dataclass
class Cost:
    """Sums of one kind of kernels in one part."""

    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 0
    seconds: dict[str, float] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.seconds = dict.fromkeys(GPUS, 0.0)

    def add(self, flops: float, size: float, rate: float) -> None:
        self.flops += flops
        self.bytes += size
        self.launches += 1
        for gpu, bandwidth in GPUS.items():
            self.seconds[gpu] += max(flops / rate, size / bandwidth)


class Counter(TorchDispatchMode):
    """Adds up what every kernel does, by part and kind."""

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__()
        self.costs: dict[tuple[str, str], Cost] = defaultdict(Cost)
        self._tracker = tracker
        self.part: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in _FREE:
            return out
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        count = flop_registry.get(func.overloadpacket)
        flops = float(count(*args, **(kwargs or {}), out_val=out)) if count else 0.0
        size = sum(_size(t) for t in operands) + sum(_size(t) for t in results)
        if name in ("index_select", "index", "gather"):  # of the source only what is asked for
            size -= max(0, _size(operands[0]) - _size(results[0]))
        narrow = any(t.dtype == torch.bfloat16 for t in operands)
        self.note(_kind(name, bool(count)), flops, size, BF16 if narrow else TF32)
        return out

    def note(self, kind: str, flops: float, size: float, rate: float = BF16) -> None:
        """A kernel ran."""
        part = self.part or self._place()
        self.costs[f"blocks: {kind}" if part == "blocks" else part, kind].add(flops, size, rate)

    def _place(self) -> str:
        inner = max(self._tracker.parents, key=len, default="")
        return next((part for part, words in PARTS if re.search(words, inner)), PARTS[-1][0])


_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "t"}


def _kind(name: str, product: bool) -> str:
    if product:
        return "convolution" if "conv" in name else "product"
    if "layer_norm" in name:
        return "norm"
    if re.search(r"copy|clone|cat|index|gather|stack|contiguous", name):
        return "copies"
    return "element-wise"


def _size(t: Tensor) -> int:
    """Bytes of what a tensor shows; broadcast dimensions lie in memory once."""
    shown = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 1]
    return int(torch.Size(shown).numel()) * t.element_size()


class BF16OnMeta(TorchFunctionMode):
    """What autocast does on a GPU; tensors without data have none."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter, self._on = counter, True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(self._counter, *args, kwargs["attn_mask"])
        if func in _CAST and self._on:
            args = [self._narrow(a) for a in args]
            kwargs = {k: self._narrow(v) for k, v in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _narrow(self, x: Any) -> Any:
        return x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() else x

    @contextmanager
    def autocast(self, kind: str, *_: Any, enabled: bool = True) -> Iterator[None]:
        """In the place of torch.autocast."""
        before, self._on = self._on, enabled
        try:
            yield
        finally:
            self._on = before

    def to_matmul_type(self, x: Tensor) -> Tensor:
        """In the place of ours."""
        return x.to(torch.bfloat16) if self._on else x


_CAST = {torch.nn.functional.linear, torch.conv2d, torch.nn.functional.conv2d, torch.matmul}


class _Attention(torch.autograd.Function):
    """Memory-efficient attention: reads q, k, v and bias, writes the output; the backward pass
    writes a gradient of the bias for every window, which is then added up."""

    @staticmethod
    def forward(
        ctx: Any, counter: Counter, q: Tensor, k: Tensor, v: Tensor, bias: Tensor
    ) -> Tensor:
        out = q.new_empty(q.shape)
        n, heads, rows, c = q.shape
        ctx.products = 2.0 * n * heads * rows * k.shape[2] * c
        ctx.counter, ctx.shapes = counter, (n, *bias.shape[1:])
        ctx.save_for_backward(q, k, v, bias, out)
        counter.note("attention", 2 * ctx.products, sum(map(_size, (q, k, v, bias, out))))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out = ctx.saved_tensors
        windows = torch.Size(ctx.shapes).numel() * 2
        size = sum(map(_size, (q, k, v, bias, out, grad, q, k, v))) + windows
        ctx.counter.note("attention", 5 * ctx.products, size)
        ctx.counter.note("bias gradient", 0.0, windows + _size(bias))
        return (None, *(t.new_empty(t.shape) for t in (q, k, v)), bias.new_empty(bias.shape))


class Case(NamedTuple):
    """What is counted: samples of a step, or frames of one pass."""

    title: str
    config: str
    batch: int
    size: tuple[int, int]  # of the low-resolution grid
    training: bool
    settings: tuple[str, ...] = ()


GAP = 12
CASES = [
    Case("published, step of 10", "published", 10, (24, 24), True),
    Case("published, step of 64", "published", 64, (24, 24), True),
    Case("key_propagation, step of 4", "key_propagation", 4, (16, 16), True),
    Case("key_propagation_large, step of 16", "key_propagation_large", 16, (24, 24), True),
    Case("published, 3 frames of 400x1024", "published", 1, (100, 256), False, ("sequence",)),
    Case("published, 3 frames of 1024x1024", "published", 1, (256, 256), False, ("sequence",)),
    Case("key_propagation, 11 frames of 400x1024", "key_propagation", 1, (100, 256), False),
    Case("key_propagation, 11 frames of 1024x1024", "key_propagation", 1, (256, 256), False),
]


def count(case: Case) -> dict[tuple[str, str], Cost]:
    """What every part and kind costs."""
    settings = ["run.device=cpu", *(f"model.output={word}" for word in case.settings)]
    cfg = load(CONFIGS / f"{case.config}.yaml", settings)
    task, (h, w) = task_of(cfg), case.size
    gaps = "hr_offset" not in task.inputs
    n_in, n_out = (GAP + 1, GAP - 1) if gaps else (3, 1)
    with torch.device("meta"):
        model = build_model(cfg).train(case.training)
        lr = torch.rand(case.batch, n_in, 1, h, w)
        hr = torch.rand(case.batch, 2, 1, 4 * h, 4 * w)
        target = torch.rand(case.batch, n_out, 1, 4 * h, 4 * w)
    tracker = ModuleTracker()
    counter = Counter(tracker)
    narrow = BF16OnMeta(counter)
    swin.grid.cache_clear()
    swin.grid(case.batch * (n_out if gaps else 1), 1 if gaps else 5, h, w, 8, torch.device("meta"))
    run: Callable[[], Any] = partial(model, lr, hr)
    with (
        patch.object(swin, "to_matmul_type", narrow.to_matmul_type),
        patch.object(torch, "autocast", narrow.autocast),
    ):
        if not case.training:
            with torch.no_grad():
                model(lr, hr)  # folds what is folded once
                with tracker, counter, narrow:
                    run()
            return dict(counter.costs)
        with tracker, counter, narrow:
            task.loss(run(), {"target": target}).backward()
    counter.part = "optimizer and running mean"
    parameters = sum(p.numel() for p in model.parameters())
    # Adam reads and writes weights and two moments and reads gradients; then norm, running mean.
    counter.note("element-wise", 0.0, 4.0 * parameters * (7 + 1 + 3))
    return dict(counter.costs)


def floors(costs: dict[tuple[str, str], Cost], gpu: str) -> dict[str, float]:
    """Least seconds of all kernels, of those that no compiler fuses away, and of the launches."""
    return {
        "eager": sum(c.seconds[gpu] for c in costs.values()),
        "fused": sum(c.seconds[gpu] for (_, kind), c in costs.items() if kind not in MOVED_ONLY),
        "arithmetic": sum(c.flops for c in costs.values()) / BF16,
        "launches": sum(c.launches for c in costs.values()) * LAUNCH_US * 1e-6,
    }


def by_part(costs: dict[tuple[str, str], Cost]) -> dict[str, Cost]:
    """Over all kinds of kernels."""
    parts: dict[str, Cost] = defaultdict(Cost)
    for (part, _), cost in costs.items():
        parts[part].flops += cost.flops
        parts[part].bytes += cost.bytes
        parts[part].launches += cost.launches
        for gpu, seconds in cost.seconds.items():
            parts[part].seconds[gpu] += seconds
    return dict(sorted(parts.items(), key=lambda item: -item[1].seconds["H100"]))


def show(case: Case, costs: dict[tuple[str, str], Cost]) -> dict[str, float]:
    """Print where the time goes; figure -> number."""
    rows, out = [], {}
    for part, cost in by_part(costs).items():
        movable = sum(
            c.seconds["H100"] for (p, k), c in costs.items() if p == part and k in MOVED_ONLY
        )
        intensity = cost.flops / cost.bytes if cost.bytes else 0.0
        bound = "memory" if cost.seconds["H100"] > 1.5 * cost.flops / BF16 else "arithmetic"
        rows.append(
            (
                part,
                f"{cost.flops / 1e9:.1f}",
                f"{cost.bytes / 1e9:.2f}",
                f"{intensity:.0f}",
                str(cost.launches),
                *(f"{1e3 * cost.seconds[gpu]:.2f}" for gpu in GPUS),
                f"{1e3 * movable:.2f}",
                bound,
            )
        )
        out[f"ms[{case.title},{part}]"] = 1e3 * cost.seconds["H100"]
    columns = ["part", "GFLOP", "GB", "FLOP/byte", "kernels", "H100 ms", "H200 ms"]
    log.print_table(case.title, [*columns, "fusible ms", "bound by"], rows)
    for gpu in GPUS:
        for name, seconds in floors(costs, gpu).items():
            out[f"{name}_ms[{case.title},{gpu}]"] = 1e3 * seconds
    out[f"gflop[{case.title}]"] = sum(c.flops for c in costs.values()) / 1e9
    out[f"gbyte[{case.title}]"] = sum(c.bytes for c in costs.values()) / 1e9
    return out


@click.command(help=usage(__doc__))
@click.option("--quick", is_flag=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(quick: bool, out: Path | None) -> None:
    log.setup()
    result: dict[str, float] = {}
    summary = []
    for case in CASES[2:3] if quick else CASES:
        costs = count(case)
        result |= show(case, costs)
        for gpu in GPUS:
            f = floors(costs, gpu)
            share = f["arithmetic"] / max(f["fused"], 1e-12)
            row = [f"{1e3 * f[k]:.2f}" for k in ("arithmetic", "fused", "eager", "launches")]
            summary.append((case.title, gpu, *row, f"{100 * f['arithmetic'] / f['eager']:.0f}"))
            result[f"mfu_fused[{case.title},{gpu}]"] = share
    columns = ["", "", "arithmetic ms", "fused ms", "eager ms", "launches ms", "MFU eager %"]
    log.print_table("least time of a step or pass", columns, summary)
    if not quick or out:
        out = out or RESULTS / "roofline.json"
        context = {"torch": torch.__version__, "bytes_per_s": GPUS, "bf16": BF16, "tf32": TF32}
        text = json.dumps({**result, "context": context | {"launch_us": LAUNCH_US}}, indent=1)
        out.write_text(text + "\n")
        print(f"written: {out}")


if __name__ == "__main__":
    main()
