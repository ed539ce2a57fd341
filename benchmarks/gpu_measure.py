"""What a visit to a GPU measures: see gpu_visit.sh, which calls this.

    python benchmarks/gpu_measure.py measure --seconds 160 --out FOLDER     settings of training
    python benchmarks/gpu_measure.py frames --seconds 60 --out FOLDER       inference, reading
    python benchmarks/gpu_measure.py table --out FOLDER                     table.md, chosen.json

Rows go to FOLDER/results.jsonl as they come; --device cpu rehearses everything with small networks.
Every step is the trainer's own: model, loss, optimizer and running mean of a config. Before it is
timed, its gradient is compared with that of the plain network in float32.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import one_by_one
from one_by_one import Job, Row

ROOT = Path(__file__).resolve().parents[1]
VISIT = Path(os.environ.get("XVR_VISIT", ROOT / ".visit"))  # what travelled: see gpu_visit.sh
CHOOSABLE = ("none", "parts", "blocks")  # values of train.compile
CLOSE = 0.05  # largest relative error of a gradient in bf16
COMPILE_LIMIT, LIMIT = 60.0, 30.0  # the first ones also load CUDA's libraries
PATIENCE = 6  # times as long for a rehearsal on a busy CPU


@dataclass(frozen=True)
class Case:
    """A training step: of which config, how many samples, computed in which way."""

    config: str
    batch: int
    way: str = "bf16"

    @property
    def name(self) -> str:
        return f"train {self.config}, batch {self.batch}, {self.way}"

    @property
    def bf16(self) -> bool:
        return "bf16" in self.way

    @property
    def recorded(self) -> bool:
        """Whether passes are replayed as a CUDA graph."""
        return "graphs" in self.way and on_gpu()

    @property
    def compile(self) -> str:
        return next((kind for kind in ("parts", "blocks") if kind in self.way), "none")

    @property
    def attention(self) -> str:
        return next((kind for kind in ("flex", "explicit") if kind in self.way), "auto")


# Cheap ones first: what compiles may eat up what is left of the time.
CASES = [
    Case("published", 10, "plain float32"),
    Case("published", 10, "bf16"),
    Case("key_propagation_sharp", 64, "bf16"),
    Case("key_propagation_sharp", 64, "bf16 graphs"),
    Case("key_propagation_sharp", 128, "bf16"),
    Case("published", 10, "float32"),
    Case("published", 10, "plain bf16"),
    Case("published", 10, "bf16 graphs"),
    Case("published", 10, "bf16 blocks"),
    Case("key_propagation", 4, "float32"),
    Case("key_propagation", 4, "bf16"),
    Case("key_propagation", 4, "bf16 graphs"),
    Case("published", 64, "bf16"),
    Case("key_propagation_large", 16, "bf16"),
    Case("key_propagation_large", 16, "bf16 graphs"),
    Case("published", 64, "bf16 blocks"),
    Case("key_propagation", 4, "bf16 blocks"),
    Case("key_propagation_large", 16, "bf16 blocks"),
    Case("published", 10, "bf16 explicit"),
    Case("published", 10, "bf16 parts"),
    Case("published", 10, "bf16 blocks graphs"),
    Case("published", 10, "bf16 flex"),
    Case("published", 10, "bf16 flex blocks"),
    Case("published", 128, "bf16 blocks"),
    Case("published", 32, "bf16"),
]
SMALL = {
    "published": ["model.embed_dim=24", "model.depths=[2]", "data.patch=32", "model.up_features=8"],
    "key_propagation": ["model.embed_dim=24", "model.depths=[2]", "data.patch=32"],
    "key_propagation_sharp": ["model.embed_dim=24", "model.depths=[2]", "data.patch=32"],
    "key_propagation_large": [
        *("model.embed_dim=24", "model.heads=3", "model.depths=[2]"),
        *("data.patch=32", "model.motion_features=16"),
    ],
}
GAP = 12


DEVICE = "cuda"  # set by main


def on_gpu() -> bool:
    """Otherwise it is a rehearsal."""
    return DEVICE == "cuda"


def config_of(name: str, *more: str) -> Any:
    """The config that travels with the program; on a CPU a small form of it."""
    from hpc_xvr.config import load

    settings = [f"run.device={DEVICE}", *([] if on_gpu() else SMALL[name]), *more]
    return load(ROOT / "configs" / f"{name}.yaml", settings)


# Training steps.


def train_step(case: Case, seconds: float = 1.5) -> Row:
    """Seconds, memory and FLOP/s of a step, and how far its gradient is from the plain one's."""
    import torch

    from hpc_xvr.train.meters import peak_memory, reset_peak_memory
    from hpc_xvr.train.optim import MovingAverage, adam

    batch_size = case.batch if on_gpu() else 1
    cfg, device = _config(case), torch.device(DEVICE)
    model, batch = _model(case, cfg), _batch(case.config, batch_size)
    backward = _backward(case, cfg, model, batch)
    expected = _plain_gradient(case.config)
    if case.batch != CASES_BATCH[case.config]:
        error = math.nan
    else:
        backward()
        found = _gradient(model)
        error = float((found - expected).norm() / expected.norm())
        if not error < (CLOSE if case.bf16 else 1e-3):
            raise AssertionError(f"its gradient is off by {error:.3g} of the plain one's norm")
    optimizer = adam(model.parameters(), cfg.optim)
    average = MovingAverage(model, 0.999)

    def step() -> None:
        optimizer.zero_grad(set_to_none=not case.recorded)
        backward()
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        average.update()

    step()
    reset_peak_memory(device)
    row = timed(step, seconds, 5 if on_gpu() else 1)
    flops = batch_size * _flops(case.config, cfg, model)
    return row | {
        "gradient_error": None if math.isnan(error) else round(error, 6),
        "tflops": flops / row["s"] / 1e12,
        "samples_per_s": batch_size / row["s"],
        "memory_gb": peak_memory(device) / 1e9,
    }


CASES_BATCH = {
    "published": 10,
    "key_propagation": 4,
    "key_propagation_sharp": 64,
    "key_propagation_large": 16,
}


def _config(case: Case) -> Any:
    return config_of(
        case.config,
        "model.drop_path=0",
        f"model.attention={case.attention}",
        f"train.compile={case.compile}",
        f"train.precision={'auto' if case.bf16 else 'float32'}",
    )


def _model(case: Case, cfg: Any) -> Any:
    import torch

    from hpc_xvr.factory.build import build_model
    from hpc_xvr.factory.execution import prepare
    from plain_swin import PlainSwinXVR

    torch.manual_seed(0)
    model = build_model(cfg)
    if case.way.startswith("plain"):
        model.__class__ = PlainSwinXVR  # the same weights, written plainly
    prepare(model, cfg, torch.device(DEVICE), training=True)
    if case.way.startswith("plain"):  # float32 is float32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    return model.train()


def _batch(config: str, count: int) -> dict[str, Any]:
    import torch

    from hpc_xvr.train.task import task_of

    cfg = config_of(config)
    g = torch.Generator().manual_seed(1)
    low, side = cfg.data.patch // cfg.data.scale, cfg.data.patch
    frames, out = (GAP + 1, GAP - 1) if "hr_offset" not in task_of(cfg).inputs else (3, 1)
    shapes = {
        "lr": (count, frames, 1, low, low),
        "hr": (count, 2, 1, side, side),
        "target": (count, out, 1, side, side),
        "hr_offset": (count, 2),
    }
    return {k: torch.rand(s, generator=g).to(DEVICE) for k, s in shapes.items()}


def _backward(case: Case, cfg: Any, model: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """Forward and backward pass."""
    import torch

    from hpc_xvr.train.graphs import RecordedPasses
    from hpc_xvr.train.task import task_of

    task = task_of(cfg)

    def run(batch: dict[str, Any]) -> Any:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=case.bf16):
            output = model(*(batch[name] for name in task.inputs if name != "hr_offset"))
        loss = task.loss(output, batch)
        loss.backward()
        return loss.detach()

    return partial(RecordedPasses(run, model.parameters()) if case.recorded else run, batch)


@cache
def _plain_gradient(config: str) -> Any:
    """Of the plain network (where there is one) in float32, on the CPU's or GPU's plain kernels."""
    way = "plain float32" if config == "published" else "float32 explicit"
    case = Case(config, CASES_BATCH[config], way)
    cfg = _config(case)
    model = _model(case, cfg)
    batch = _batch(config, case.batch if on_gpu() else 1)
    _backward(case, cfg, model, batch)()
    return _gradient(model)


def _gradient(model: Any) -> Any:
    import torch

    found = torch.cat([p.grad.flatten().float() for p in model.parameters()])
    model.zero_grad()
    return found


def _flops(config: str, cfg: Any, model: Any) -> float:
    """Of a sample's forward and backward pass."""
    from hpc_xvr.train.task import task_of

    if config == "published":
        return float(task_of(cfg).flops(model))
    side = cfg.data.patch // cfg.data.scale
    return 3.0 * (GAP - 1) * model.flops(side, side)


def timed(run: Callable[[], Any], seconds: float, at_once: int = 1) -> Row:
    """Median seconds of a call, and how long the host took to give its work to the device."""
    import torch

    from hpc_xvr.train.meters import synchronise

    device = torch.device(DEVICE)
    run()
    synchronise(device)
    times, host, begin = [], [], time.perf_counter()
    least = 3 if on_gpu() else 1
    while len(times) < least or (
        on_gpu() and time.perf_counter() - begin < seconds and len(times) < 100
    ):
        start = time.perf_counter()
        for _ in range(at_once):
            run()
        given = time.perf_counter()
        synchronise(device)
        times.append((time.perf_counter() - start) / at_once)
        host.append((given - start) / at_once)
    median = statistics.median(times)
    spread = (max(times) - min(times)) / median
    return {"s": median, "host_s": statistics.median(host), "spread": round(spread, 3)}


# What the machine is, and whether it computes what it should.


def machine() -> Row:
    """Versions, rate of a large product and of a large copy, what NVML can read."""
    import torch

    from hpc_xvr.factory.execution import resolve_precision
    from hpc_xvr.train.meters import describe_machine

    device = torch.device(DEVICE)
    kind = resolve_precision("auto", device)
    n, dtype = (8192, torch.bfloat16) if on_gpu() else (1024, torch.float32)
    a = torch.randn(n, n, device=device).to(dtype)
    product = timed(lambda: a @ a, 0.5, 5 if on_gpu() else 1)["s"]
    x = torch.randn(2**29 if on_gpu() else 2**22, device=device)
    y = torch.empty_like(x)
    copy = timed(lambda: y.copy_(x), 0.5)["s"]
    return {
        "machine": describe_machine(device),
        "precision": kind,
        "product_tflops": 2 * n**3 / product / 1e12,
        "copy_tb_s": 2 * x.numel() * 4 / copy / 1e12,
        "triton": _version("triton"),
        "cores": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def parity() -> Row:
    """Outputs of the authors' program from their weights, and the built-in network's on a CPU."""
    import numpy as np
    import torch

    from hpc_xvr.factory.execution import set_attention
    from hpc_xvr.factory.weights import open_model
    from hpc_xvr.model.xfusion import load_xfusion

    row: Row = {}
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for name in ("centre", "sequence"):
        data = np.load(ROOT / "tests" / "data" / "authors" / f"{name}.npz")
        weights = {key[6:]: data[key] for key in data if key.startswith("param/")}
        inputs = [torch.from_numpy(data[key]).float().to(DEVICE) for key in ("lr", "hr")]
        expected = torch.from_numpy(data["out"]).float()
        model = load_xfusion(weights).to(DEVICE)
        for kind in ("auto", "explicit"):
            set_attention(model, kind)
            for bf16 in (False, True):
                with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
                    out = model(*inputs).float().cpu()
                key = f"{name} {kind} {'bf16' if bf16 else 'float32'}"
                row[key] = round(float((out - expected).abs().max()), 7)
                if not row[key] < (3e-2 if bf16 else 1e-4):
                    raise AssertionError(f"{key}: off by {row[key]:.3g}")
    model = open_model(Path("builtin"))[0].eval()
    g = torch.Generator().manual_seed(0)
    # Smooth frames: the network sees motion in them.
    hr = torch.nn.functional.interpolate(torch.rand(2, 1, 16, 16, generator=g), scale_factor=8)
    hr = torch.nn.functional.avg_pool2d(hr, 9, 1, 4)[None]
    lr = torch.nn.functional.avg_pool2d(hr[0], 4)
    lr = torch.stack([lr[0] + (lr[1] - lr[0]) * t / GAP for t in range(GAP + 1)])[None]
    with torch.inference_mode():
        expected = model(lr, hr).frames
        model.to(DEVICE)
        for bf16 in (False, True):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
                out = model(lr.to(DEVICE), hr.to(DEVICE)).frames.float().cpu()
            key = f"builtin {'bf16' if bf16 else 'float32'}"
            row[key] = round(float((out - expected).abs().max()), 7)
            if not row[key] < (5e-2 if bf16 else 1e-3):
                raise AssertionError(f"{key}: off by {row[key]:.3g}")
    return row


def trainer(config: str, steps: int, on_device: bool) -> Row:
    """A run of the command itself with the torch engine on one rank: NCCL, NVML, data wait, and
    what the trainer adds to the bare step."""
    cfg = config_of(config)
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            *([] if on_gpu() else SMALL[config]),
            f"run.device={DEVICE}",
            f"run.dir={folder}/run",
            "run.utilisation_s=0.5",
            f"data.corpus={VISIT / 'corpus'}",
            f"data.workers={min(8, max(1, (os.cpu_count() or 2) - 2)) if on_gpu() else 1}",
            f"train.steps={steps}",
            f"train.log_every={max(1, steps // 4)}",
            f"data.on_device={on_device}",
            "train.precision=auto",
            "validation.frames=4",
            *([] if on_gpu() else ["train.global_batch=2", "validation.patch=32"]),
            *(["train.weights=null"] if cfg.train.weights else []),
            "train.graphs=false",  # an engine's gradients cannot be recorded
        ]
        command = [sys.executable, "-m", "hpc_xvr", "train", f"{ROOT}/configs/{config}.yaml"]
        command += ["--engine", "torch"]
        for setting in settings:
            command += ["--set", setting]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-2:]))
        run = Path(folder) / "run"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if line["kind"] == "train"][-1]
        summary = json.loads((run / "utilisation.json").read_text())
        about = json.loads((run / "environment.json").read_text())
    row = {"s": last["step_s"], "data_wait": last["data_wait"], "engine": about["engine"]}
    rank = summary["ranks"][0]
    known = {name: rank.get(name) for name in ("busy_mean", "memory_gb", "power_w")}
    counted = on_gpu() and config == "published"
    flops = 3.0 * cfg.train.global_batch * 76.76e9 if counted else math.nan
    tflops = {} if math.isnan(flops) else {"tflops": flops / last["step_s"] / 1e12}
    return row | known | tflops | {"energy": summary.get("energy")}


TRAINERS = {"trainer": False, "trainer, samples made on the device": True}
GAP_TRAINER = "trainer, key_propagation_sharp, samples made on the device"

# Inference and reading.

FRAMES = [
    ("published", "sequence", (100, 256)),
    ("key_propagation", "gap", (100, 256)),
    ("published", "sequence", (256, 256)),
    ("key_propagation", "gap", (256, 256)),
    ("key_propagation_large", "gap", (100, 256)),
]


def frames(config: str, size: tuple[int, int], way: str) -> Row:
    """Sharp frames a second: windows of three frames, or a gap of twelve."""
    import torch

    from hpc_xvr.factory.build import build_model
    from hpc_xvr.factory.execution import prepare

    kind = next((k for k in CHOOSABLE[1:] if k in way), "none")
    settings = [f"train.compile={kind}", "train.precision=auto"]
    settings += ["model.output=sequence"] if config == "published" else []
    cfg = config_of(config, *settings)
    torch.manual_seed(0)
    model = build_model(cfg)
    precision = prepare(model, cfg, torch.device(DEVICE))
    model.eval()
    h, w = size if on_gpu() else (16, 24)
    count = 3 if config == "published" else GAP + 1
    lr = torch.rand(1, count, 1, h, w, device=DEVICE)
    hr = torch.rand(1, 2, 1, 4 * h, 4 * w, device=DEVICE)

    def run() -> None:
        with (
            torch.inference_mode(),
            torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"),
        ):
            model(lr, hr)

    row = timed(run, 2.0)
    out = 3 if config == "published" else GAP - 1
    flops = model.flops(h, w) * (1 if config == "published" else out)
    return row | {"frames_per_s": out / row["s"], "tflops": flops / row["s"] / 1e12}


def reading(config: str, on_device: bool) -> Row:
    """Training samples a second, with the noise they get; nothing is computed with them."""
    import torch

    from hpc_xvr.data.samples.loader import training_batches
    from hpc_xvr.train.task import task_of

    workers = min(12, max(1, (os.cpu_count() or 2) - 2)) if on_gpu() else 1
    more = [f"data.corpus={VISIT / 'corpus'}", f"data.workers={workers}"]
    more += ["data.on_device=true"] if on_device else []
    cfg = config_of(config, *more)
    device = torch.device(DEVICE)
    samples = task_of(cfg).samples(cfg.data.corpus)
    if on_device:
        from hpc_xvr.data.samples.on_device import batches_on_device

        batches = batches_on_device(samples, device, 0, 1, 0, 4000)
    else:
        batches = iter(training_batches(samples, 0, 1, 0, 4000, pin_memory=on_gpu()))

    def run() -> None:
        for value in next(batches).values():
            value.to(device, non_blocking=True)

    for _ in range(10):  # until all workers are there
        run()
    row = timed(run, 3.0, 10)
    return row | {"samples_per_s": cfg.train.global_batch / row["s"], "workers": workers}


# Jobs, the table and the choice.


def jobs_of(part: str, out: Path) -> list[Job]:
    """The measurements of a part, in order."""
    if part == "measure":
        jobs = [Job("machine", 40, machine), Job("parity", 30, parity)]
        for case in CASES:
            slow = case.compile != "none" or case.attention == "flex"
            limit = COMPILE_LIMIT if slow else LIMIT
            jobs.append(Job(case.name, limit, partial(train_step, case)))
        steps = 200 if on_gpu() else 4
        gaps = partial(trainer, "key_propagation_sharp", steps, True)
        runs = [Job(n, 30, partial(trainer, "published", steps, t)) for n, t in TRAINERS.items()]
        for before, more in (
            ("published, batch 10, float32", [Job(GAP_TRAINER, 30, gaps)]),
            ("published, batch 64, bf16", runs),
        ):
            place = next(i for i, job in enumerate(jobs) if before in job.name)
            jobs[place:place] = more
        return jobs if on_gpu() else [job for job in jobs if "flex" not in job.name]
    ways = ["bf16", "bf16 blocks"]
    jobs = [
        Job(f"frames {config} {4 * h}x{4 * w}, {kind}, {way}", 40, partial(frames, config, s, way))
        for way in ways
        for config, kind, s in FRAMES
        for h, w in [s]
    ]
    read = [
        Job(f"reading {config}, {'on the device' if there else 'on the host'}", 25, job)
        for config in ("published", "key_propagation")
        for there in (False, True)
        for job in [partial(reading, config, there)]
    ]
    return [*jobs[: len(FRAMES)], *read, *jobs[len(FRAMES) :]]


def spoils(error: Exception) -> bool:
    """After an error of CUDA itself nothing on the device can be trusted."""
    return "CUDA" in str(error) or "cuDNN" in str(error) or "cublas" in str(error).lower()


def choose(rows: list[Row]) -> dict[str, Any]:
    """The fastest right way to train each config that a setting can ask for."""
    seconds = {row["name"]: row["s"] for row in rows if "error" not in row and "s" in row}
    chosen: dict[str, Any] = {}
    for case in CASES:
        if case.batch != CASES_BATCH[case.config] or not case.bf16 or case.name not in seconds:
            continue
        if any(word in case.way for word in ("plain", "explicit")):
            continue
        best = chosen.get(case.config)
        if best is None or seconds[case.name] < best["s"]:
            settings = [f"train.compile={case.compile}", f"model.attention={case.attention}"]
            settings += ["train.graphs=true"] if "graphs" in case.way else []
            chosen[case.config] = {"s": seconds[case.name], "settings": settings, "way": case.way}
    host, device = (seconds.get(name, math.inf) for name in TRAINERS)
    for best in chosen.values():
        best["settings"].append(f"data.on_device={str(device < host).lower()}")
    return chosen


def table(rows: list[Row]) -> str:
    """The rows as Markdown: times, ratios to plain float32, and what went wrong."""
    named = {row["name"]: row for row in rows}
    about = named.get("machine", {})
    peak = about.get("product_tflops")
    device = about.get("machine", {}).get("device", "unknown device")
    lines = [f"# {device}", ""]
    if peak:
        lines += [f"Product {peak:.0f} TFLOP/s, copy {about['copy_tb_s']:.2f} TB/s.", ""]
    lines += ["| | ms | host ms | TFLOP/s | % of product | x plain | /s | GB | gradient off |"]
    lines += ["|---" * 9 + "|"]
    plain = named.get(Case("published", 10, "plain float32").name, {}).get("s")
    problems = []
    for row in rows:
        if "error" in row:
            problems.append(f"- {row['name']}: {row['error']}")
            continue
        if "s" not in row:
            continue
        tflops, rate = row.get("tflops"), row.get("frames_per_s", row.get("samples_per_s"))
        against = plain / row["s"] if plain and "published, batch 10" in row["name"] else None
        cells = [
            row["name"],
            f"{1e3 * row['s']:.2f}",
            *(_cell(1e3 * row["host_s"] if "host_s" in row else None, ".2f"),),
            _cell(tflops, ".1f"),
            _cell(100 * tflops / peak if tflops and peak else None, ".0f"),
            _cell(against, ".1f"),
            _cell(rate, ".4g"),
            _cell(row.get("memory_gb"), ".1f"),
            _cell(row.get("gradient_error"), ".2g"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for name in (*TRAINERS, GAP_TRAINER, "parity"):
        if "error" not in named.get(name, {"error": ""}):
            told = {k: v for k, v in named[name].items() if k not in ("name", "took_s")}
            lines += ["", f"{name}: {json.dumps(told)}"]
    if problems:
        lines += ["", "Without a figure:", *problems]
    return "\n".join(lines) + "\n"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main() -> int:
    import argparse

    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["measure", "frames", "table"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", nargs="*", help="run these in this process")
    parser.add_argument("--only", default="", help="those whose name this pattern is found in")
    args = parser.parse_args()
    DEVICE = args.device
    results = args.out / "results.jsonl"
    if args.part != "table":
        jobs = {job.name: job for job in jobs_of(args.part, args.out)}
        if args.worker is not None:
            from hpc_xvr.factory.memory import keep_freed_memory

            keep_freed_memory()
            return one_by_one.work([jobs[name] for name in args.worker], results, spoils)
        args.out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, args.part, "--device", args.device]
        command += ["--out", str(args.out), "--worker"]
        patience = 1 if on_gpu() else PATIENCE
        limits = {n: patience * j.limit_s for n, j in jobs.items() if re.search(args.only, n)}
        one_by_one.supervise(command, limits, results, args.seconds)
    rows = one_by_one.read(results)
    (args.out / "chosen.json").write_text(json.dumps(choose(rows), indent=1) + "\n")
    (args.out / "table.md").write_text(table(rows))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
