"""Speed of whole reconstructions against the frame-by-frame way, same weights, same run.

    python benchmarks/reconstruct.py                  minutes; files its result in results/
    python benchmarks/reconstruct.py --quick          small frames, files nothing
    python benchmarks/reconstruct.py --json out.json

The frame-by-frame way makes one centre frame a pass, computes the key frames' features again each
time, and runs eagerly in float32. Contestants take turns, medians count. Ratios are of frames a
second. The files go through the command's own code: reading, computing, writing at once.
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hpc_xvr.factory.memory import keep_freed_memory

keep_freed_memory()  # before torch is imported, as the commands do

import click  # noqa: E402
import numpy as np  # noqa: E402
import tifffile  # noqa: E402
import torch  # noqa: E402

from filing import file_result, usage  # noqa: E402
from hpc_xvr import log, metrics  # noqa: E402
from hpc_xvr.config import load  # noqa: E402
from hpc_xvr.data.degrade import bin_down  # noqa: E402
from hpc_xvr.data.pairing.joining import Pairing  # noqa: E402
from hpc_xvr.data.simulate.experiment import simulate_video  # noqa: E402
from hpc_xvr.data.simulate.scenes import SCENES  # noqa: E402
from hpc_xvr.factory.build import build_model  # noqa: E402
from hpc_xvr.factory.execution import prepare, resolve_precision  # noqa: E402
from hpc_xvr.model.xvr import SwinXVR  # noqa: E402
from hpc_xvr.reconstruction import workflow  # noqa: E402
from hpc_xvr.reconstruction.baselines import BASELINES  # noqa: E402
from hpc_xvr.reconstruction.material import CameraFiles, material_of  # noqa: E402
from hpc_xvr.reconstruction.methods import NamedMethod, model_entry, open_method  # noqa: E402
from hpc_xvr.reconstruction.pipeline import reconstruct  # noqa: E402
from hpc_xvr.reconstruction.workflow import reconstruct_with, work_of  # noqa: E402
from hpc_xvr.reconstruction.writers import write_sequence  # noqa: E402
from hpc_xvr.train.meters import describe_machine  # noqa: E402
from starting import ROOT  # noqa: E402

GAP = 8
GAPS = 100
"""Of the recording that two ranks share, one by one: with few of them, one waits for the other at
the end."""
TURNS = 5
NETWORKS = "swin_centre", "swin_sequence", "edvr", "edvr_stf"
"""Of configs/compare."""
DISK_MB_S = 10.0
"""A slow disk, simulated by waiting."""
DEVICE_S = 0.02
"""Seconds a frame of a simulated accelerator."""
SMALL = {"embed_dim": 64, "depths": (2, 2), "heads": 1, "window": 4, "up_features": 32}


def scene(frames: int, height: int, width: int) -> np.ndarray:
    """Sharp frames (T, H, W) in [0, 1]: smooth grains that move."""
    rng = np.random.default_rng(0)
    field = rng.random((height, width + 2 * frames), np.float32)
    for axis in (0, 1):
        for step in (1, 2, 3):
            field = (field + np.roll(field, step, axis)) / 2
    field = (field - field.min()) / np.ptp(field)
    return np.stack([field[:, 2 * t : 2 * t + width] for t in range(frames)])


def frame_by_frame(model: SwinXVR, sharp: np.ndarray, device: torch.device) -> int:
    """One centre frame a pass, nothing kept from pass to pass; the frames made."""
    lr, made = bin_down(sharp, 4), 0
    for t in range(len(sharp)):
        if t % GAP == 0:
            continue
        before = t - t % GAP
        hr = np.stack([sharp[before], sharp[min(before + GAP, len(sharp) - 1)]])
        half = model.lr_frames // 2
        index = np.clip(range(t - half, t + half + 1), 0, len(lr) - 1)
        with torch.inference_mode():
            out = model(
                torch.from_numpy(lr[index])[None, :, None].to(device),
                torch.from_numpy(hr)[None, :, None].to(device),
            )
        out.cpu()
        made += 1
    return made


def made(
    method: NamedMethod, sharp: np.ndarray, device: torch.device, gap: int = GAP
) -> Iterator[tuple[int, np.ndarray]]:
    """All frames, as the pipeline makes them of arrays."""
    return reconstruct(
        method.method,
        bin_down(sharp, 4),
        {t: sharp[t] for t in range(0, len(sharp), gap)},
        lr_frames=1 if method.lr_frames is None else method.lr_frames,
        n_out=method.n_out,
        device=device,
        precision=method.precision,
    )


def ours(method: NamedMethod, sharp: np.ndarray, device: torch.device, gap: int = GAP) -> int:
    """Make all frames; those between key frames count."""
    return sum(t % gap > 0 for t, _ in made(method, sharp, device, gap))


def rates(contestants: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Frames a second of each, the median of `rounds` after one to warm up."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            frames = run()
            if number:
                found[name].append(frames / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def real_time(
    builtin: NamedMethod, size: tuple[int, int], device: torch.device, quick: bool
) -> dict[str, float]:
    """Frames a second of every method, and the mean PSNR of a gap of each simulated experiment;
    of networks at published width only the speed, over three frames, since there are no weights of
    that width, which make no difference to it."""
    result: dict[str, float] = {}
    videos = [
        simulate_video(name, (GAP + 1, *size), seed=77, lr_stream=False)
        for name in list(SCENES)[: 1 if quick else None]
    ]
    movies = [video.frames / np.float32(2 ** video.info["bit_depth"] - 1) for video in videos]
    for what in (*BASELINES, "builtin"):
        method = builtin if what == "builtin" else open_method(what, device)
        speed = rates({what: partial(ours, method, movies[0], device)}, 3)[what]
        psnr = [
            metrics.psnr(frame, movie[t])
            for movie in movies
            for t, frame in made(method, movie, device)
            if t % GAP
        ]
        result[f"realtime_frames_per_s[{what}]"] = speed
        result[f"realtime_psnr_db[{what}]"] = float(np.mean(psnr))
    for name in NETWORKS:
        options = ["model.embed_dim=48", "model.depths=[2,2]", "model.heads=2"] if quick else []
        config = load(ROOT / "configs" / "compare" / f"{name}.yaml", options)
        model = build_model(config).to(device)
        entry = model_entry(name, model, prepare(model, config, device))
        speed = rates({name: partial(ours, entry, movies[0][:5], device, gap=4)}, 1)[name]
        result[f"realtime_frames_per_s[{name}]"] = speed
    return result


def write_shot(folder: Path, sharp: np.ndarray) -> CameraFiles:
    """The files of both cameras."""
    for name, frames in (("fast", bin_down(sharp, 4)), ("sharp", sharp[::GAP])):
        stored = np.rint(frames * 65535).astype(np.uint16)
        tifffile.imwrite(folder / f"{name}.tif", stored, photometric="minisblack")
    return CameraFiles(folder / "fast.tif", folder / "sharp.tif", pairing=Pairing(float(GAP)))


def overlap(method: NamedMethod, source: CameraFiles, folder: Path, device: torch.device) -> dict:
    """Reading, computing and writing one after the other, and the command's way: all at once, with
    one core left free for it, every frame kept in a safe place first, and compared with what the
    fast camera saw. And when the first frame is on disk. Medians of five."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    rounds = [_one_overlap(method, source, folder, device) for _ in range(6)][1:]
    torch.set_num_threads(threads)
    found = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    plain = found["reading_s"] + found["computing_s"] + found["writing_s"]
    return found | {"overlapped_to_plain": found["overlapped_s"] / plain}


def making(method: NamedMethod, source: CameraFiles, out: Path, device: torch.device) -> float:
    """Seconds from the first frame read to the last one written, as the command logs them."""
    found = []

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "frames/s" in record.msg and isinstance(record.args, tuple):
                _, count, rate = record.args
                found.append(float(count) / float(rate))  # type: ignore[arg-type]

    told = Told()
    log.logger.addHandler(told)
    try:
        reconstruct_with(method, device, source, out=out)
    finally:
        log.logger.removeHandler(told)
    return found[0]


def _one_overlap(
    method: NamedMethod, source: CameraFiles, folder: Path, device: torch.device
) -> dict[str, float]:
    material = material_of(method, source)
    start = time.perf_counter()
    work = work_of(method, material, device)
    loads = list(work.load(work.pieces()))
    reading = time.perf_counter() - start
    start = time.perf_counter()
    frames = [frame for _, frame in work.run(loads)]
    computing = time.perf_counter() - start
    start = time.perf_counter()
    write_sequence(folder / "direct.tif", frames, len(frames))
    writing = time.perf_counter() - start
    (folder / "direct.tif").unlink()
    out = folder / "whole.tif"
    spool, first = folder / ".whole.tif.unfinished", 0.0

    def watch() -> None:
        nonlocal first
        while not first:
            if spool.exists() and any(spool.glob("0*-*[0-9]")):
                first = time.perf_counter() - start
            time.sleep(0.005)

    start = time.perf_counter()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    overlapped = making(method, source, out, device)
    whole = time.perf_counter() - start
    watcher.join(5)
    for path in folder.glob("whole*"):
        path.unlink()
    return {
        "reading_s": reading,
        "computing_s": computing,
        "writing_s": writing,
        "overlapped_s": overlapped,
        "whole_s": whole,
        "first_frame_s": first,
    }


def hidden(method: NamedMethod, source: CameraFiles, folder: Path, device: torch.device) -> dict:
    """How much of writing to a slow disk is hidden behind computing.

    (a) computing alone, (b) the command with frames made before, (c) the command; the share is
    (a + b - c) / min(a, b). The disk is simulated by waiting. `hidden_share` is of computing that
    waits, too, as for an accelerator: what the pipeline by itself allows, however busy the machine
    is. `hidden_share_one_thread` is of one thread that computes, and needs a second core that is
    idle. Medians of three.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kept: list[torch.Tensor] = []

    def keep(sample: dict[str, torch.Tensor]) -> torch.Tensor:
        kept.append(method.method(sample))
        return kept[-1]

    material = material_of(method, source)

    def computing(how: NamedMethod) -> float:
        work = work_of(how, material, device)
        loads = list(work.load(work.pieces()))
        start = time.perf_counter()
        for _ in work.run(loads):
            pass
        return time.perf_counter() - start

    def replayed(seconds: float) -> NamedMethod:
        frames = iter(list(kept))

        def wait(_: dict[str, torch.Tensor]) -> torch.Tensor:
            time.sleep(seconds)
            return next(frames)

        return replace(method, method=wait)

    def share(how: Callable[[], NamedMethod]) -> dict[str, float]:
        alone = computing(how())
        written = _slow_disk(replayed(0), source, folder, device)
        both = _slow_disk(how(), source, folder, device)
        hides = (alone + written - both) / min(alone, written)
        return {"computing_s": alone, "writing_s": written, "both_s": both, "share": hides}

    computing(replace(method, method=keep))
    result = {}
    for kind, how in (("", lambda: replayed(DEVICE_S)), ("_one_thread", lambda: method)):
        rounds = [share(how) for _ in range(3)]
        for name in rounds[0]:
            result[f"hidden_{name}{kind}"] = statistics.median(r[name] for r in rounds)
    torch.set_num_threads(threads)
    return result


def _slow_disk(
    method: NamedMethod, source: CameraFiles, folder: Path, device: torch.device
) -> float:
    """Reconstruct to a disk that takes DISK_MB_S; seconds."""

    def write(path: Path, frames: Iterator[np.ndarray], *rest: Any) -> Path:
        def slowly() -> Iterator[np.ndarray]:
            for frame in frames:
                time.sleep(2e-6 * frame.size / DISK_MB_S)
                yield frame

        return write_sequence(path, slowly(), *rest)

    workflow.write_sequence = write  # type: ignore[assignment]
    try:
        took = making(method, source, folder / "slow.tif", device)
    finally:
        workflow.write_sequence = write_sequence
    for path in folder.glob("slow*"):
        path.unlink()
    return took


def ranks_speedup(folder: Path) -> dict[str, float]:
    """Frames a second of two ranks that share a shot over those of one, one thread each, as the
    commands log them; and the same of two commands side by side that make a shot each: what two
    cores of this machine give at most. Medians of all turns."""
    turns = [_ranks_turn(folder) for _ in range(TURNS)]
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}


def _ranks_turn(folder: Path) -> dict[str, float]:
    def started(out: str, *launcher: str) -> subprocess.Popen[str]:
        files = ["--lr", "fast.tif", "--hr", "sharp.tif", "--gap", str(GAP), "--out", out]
        return subprocess.Popen(
            [*launcher, sys.executable, "-m", "hpc_xvr", "reconstruct", "builtin", *files],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rate(process: subprocess.Popen[str]) -> float:
        said = process.communicate()[1]
        if process.returncode:
            raise RuntimeError(said)
        return float(said.partition(" frames/s")[0].rpartition(" ")[2])

    alone = rate(started("alone.tif"))
    shared = rate(started("shared.tif", "mpirun", "-n", "2", "--oversubscribe"))
    both = [started(f"side{k}.tif") for k in range(2)]
    sides = sum(rate(process) for process in both)
    for path in folder.glob("[as]*.tif*"):
        if path.name != "sharp.tif":
            path.unlink()
    return {"two_ranks_speedup": shared / alone, "two_commands_speedup": sides / alone}


@click.command(help=usage(__doc__ or ""))
@click.option("--quick", is_flag=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.option("--device", "name", default="cpu", type=click.Choice(["cpu", "cuda"]))
def main(quick: bool, out: Path | None, name: str) -> None:
    log.setup()
    device = torch.device(name)
    precision = resolve_precision("auto", device)
    size, rounds = ((32, 32), 1) if quick else ((400, 1024), 3)
    options = SMALL if quick else {}
    result: dict[str, float] = {}

    # The same weights, one frame a pass and all of a window.
    torch.manual_seed(0)
    model = SwinXVR(drop_path=0.0, **options).to(device).eval()
    sequence = SwinXVR(drop_path=0.0, output="sequence", **options).to(device).eval()
    sequence.load_state_dict(model.state_dict())
    small = (32, 32) if quick else (128, 256)
    sharp = scene(GAP + 1, *small)
    methods = {"centre": model_entry("centre", model, precision)}
    methods["sequence"] = model_entry("sequence", sequence, precision)
    methods["builtin"] = open_method("builtin", device)
    found = rates(
        {
            "frame by frame": lambda: frame_by_frame(model, sharp, device),
            **{
                what: (lambda method=method: ours(method, sharp, device))
                for what, method in methods.items()
            },
        },
        rounds,
    )
    result |= {f"frames_per_s[{what}]": value for what, value in found.items()}
    for what in methods:
        result[f"{what}_speedup"] = found[what] / found["frame by frame"]

    result |= real_time(methods["builtin"], size, device, quick)

    folder = Path(tempfile.mkdtemp(prefix="hpc_xvr-"))
    try:
        frames = 4 * GAP + 1 if quick else 12 * GAP + 1
        source = write_shot(folder, scene(frames, *size))
        # A method whose computing takes a few times as long as reading and writing.
        result |= overlap(open_method("adaptive", device), source, folder, device)
        source = write_shot(folder, scene(4 * GAP + 1 if quick else 40 * GAP + 1, *small))
        result |= hidden(open_method("adaptive", device), source, folder, device)
        if not quick and device.type == "cpu" and shutil.which("mpirun"):
            write_shot(folder, scene(GAPS * GAP + 1, *small))
            result |= ranks_speedup(folder)
    finally:
        shutil.rmtree(folder)
    for what, value in result.items():
        print(f"{what:45} {value:10.3f}")
    context = describe_machine(device)
    context |= {"size": list(size), "small_size": list(small), "gap": GAP, "precision": precision}
    file_result("reconstruct", result, context, out, quick)


if __name__ == "__main__":
    main()
