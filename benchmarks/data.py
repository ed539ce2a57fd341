"""Reading training samples: our stores against a PNG file per frame, and what it costs at scale.

    python benchmarks/data.py                  some minutes; files its result in results/
    python benchmarks/data.py --quick          under 50 s, files nothing
    python benchmarks/data.py --json out.json

The sample of the published training: three low-resolution frames, two key frames and the target,
96x96 cut from 400x1024. With PNG files, as today's programs store it, three small and three large
files are decoded whole and cropped; the stores read the chunks that the crop meets. Contestants
take turns, medians and the spread (largest - smallest) / median are reported. Cold: the page cache
is told to forget the files first.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from filing import file_result, usage
from hpc_xvr import config, log
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.corpus.manifest import line
from hpc_xvr.data.corpus.stores import shard, zarr
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.degrade import bin_down
from hpc_xvr.data.samples.loader import training_batches
from hpc_xvr.data.samples.training import TrainingSamples
from hpc_xvr.data.simulate.experiment import simulate_video
from hpc_xvr.train.meters import describe_machine

ROOT = Path(__file__).resolve().parents[1]
SIZE, PATCH, SCALE, BATCH = (400, 1024), 96, 4, 10
INFO = {"camera": "c", "bit_depth": 12, "scene": "keyhole", "split": "train", "source": "simulated"}
CLIPS = 100_000


class PngSamples(Dataset):
    """A PNG file per frame; the samples are those of `TrainingSamples`."""

    def __init__(self, folder: Path, plan: TrainingSamples) -> None:
        self.folder, self.plan = folder, plan

    def __getitem__(self, index: tuple[int, int]) -> dict[str, torch.Tensor]:
        step, slot = index
        number, t = self.plan.slots.pick(step, slot)
        rng = np.random.default_rng([step, slot])
        last = self.plan.videos[number].shape[0] - 1
        before, after = t - rng.integers(1, t, endpoint=True), t + rng.integers(1, last - t + 1)
        y, x = (int(rng.integers(0, (side - PATCH) // SCALE)) for side in SIZE)
        rows, columns = slice(y * SCALE, y * SCALE + PATCH), slice(x * SCALE, x * SCALE + PATCH)
        small = slice(y, y + PATCH // SCALE), slice(x, x + PATCH // SCALE)
        lr = [self._decoded("lr", number, k)[small] for k in (t - 1, t, t + 1)]
        hr = [self._decoded("hr", number, k)[rows, columns] for k in (before, after, t)]
        return {
            "lr": torch.from_numpy(np.stack(lr)[:, None]),
            "hr": torch.from_numpy(np.stack(hr[:2])[:, None]),
            "target": torch.from_numpy(hr[2][None, None]),
        }

    def _decoded(self, kind: str, video: int, t: int) -> np.ndarray:
        with Image.open(self.folder / kind / f"{video:03d}_{t:08d}.png") as image:
            return np.asarray(image, np.float32) * np.float32(1 / 4095)


def make_recordings(frames: int, count: int) -> list[np.ndarray]:
    """Recordings of one simulated experiment, turned and mirrored."""
    video = simulate_video("keyhole", (frames, *SIZE), seed=1, lr_stream=False).frames
    turned = [video, video[:, ::-1], video[:, :, ::-1], video[::-1]]
    return [np.ascontiguousarray(turned[i % 4]) for i in range(count)]


def write_all(folder: Path, recordings: list[np.ndarray]) -> dict[str, Path]:
    paths = {name: folder / name for name in ("png", "zarr", "hdf5")}
    for kind in ("hr", "lr"):
        (paths["png"] / kind).mkdir(parents=True)
    for store in ("zarr", "hdf5"):
        with CorpusWriter(paths[store], store) as writer:
            for i, frames in enumerate(recordings):
                writer.add(f"v{i:03d}", frames, frames.shape, frames.dtype, INFO)
    for i, frames in enumerate(recordings):
        for t, frame in enumerate(frames):
            small = np.round(bin_down(frame, SCALE)).astype(np.uint16)
            for kind, pixels in (("hr", frame), ("lr", small)):
                Image.fromarray(pixels).save(paths["png"] / kind / f"{i:03d}_{t:08d}.png")
    return paths


def samples_of(corpus: Path | Corpus) -> TrainingSamples:
    path = corpus.path if isinstance(corpus, Corpus) else corpus
    data = config.Data(corpus=path, patch=PATCH, noise="none", workers=1)
    return TrainingSamples(corpus, data, "centre", BATCH, seed=1)


@contextmanager
def through_tensorstore() -> Iterator[None]:
    """Zarr arrays opened meanwhile are read by the general reader."""
    zarr.layout = lambda _: None
    try:
        yield
    finally:
        zarr.layout = shard.layout


def rate(samples: Dataset, start: int, seconds: float, most: int = 10**9) -> float:
    """Samples/s of this process."""
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds and done < most:
        samples[divmod(start + done, BATCH)]
        done += 1
    return done / (time.perf_counter() - begin)


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def race(contestants: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds):
        for name, run in contestants.items():
            results[name].append(run(i))
    return results


def read_bytes(samples: Dataset, count: int = 200) -> float:
    """Bytes a sample asks of the system, cached or not, once its clips are open."""

    def total() -> int:
        text = Path("/proc/self/io").read_text()
        return int(text.split("rchar: ")[1].split()[0])

    for k in range(100):
        samples[divmod(k, BATCH)]
    before = total()
    for k in range(count):
        samples[divmod(k, BATCH)]
    return (total() - before) / count


def loader_rate(samples: Dataset, workers: int, seconds: float) -> float:
    """Samples/s that arrive at a trainer with so many workers, after the first batches."""
    steps = 10**6
    if isinstance(samples, TrainingSamples):
        samples.data = samples.data.model_copy(update={"workers": workers})
        loader = training_batches(samples, 0, 1, 0, steps)
    else:
        plan = ([(step, slot) for slot in range(BATCH)] for step in range(steps))
        loader = DataLoader(
            samples,
            batch_sampler=plan,
            num_workers=workers,
            multiprocessing_context="forkserver",
        )
    batches = iter(loader)
    for _ in range(2 * workers + 2):
        next(batches)
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        next(batches)
        done += BATCH
    return done / (time.perf_counter() - begin)


def many_clips(folder: Path, real: Path) -> Path:
    """A corpus of 100,000 clips; each is a link to one that exists."""
    clip = Corpus(real).videos[0]
    lr_times = [float(t) for t in range(256)]
    path = folder / "many"
    (path / "videos").mkdir(parents=True)
    shutil.copy(real / "corpus.json", path)
    attributes = clip.info.model_dump(mode="json") | {"lr_times": lr_times, "lr_bit_depth": 10}
    with (path / "manifest.jsonl").open("wb") as file:
        for i in range(CLIPS):
            id = f"sim-{i:06d}-keyhole"
            (path / "videos" / id).symlink_to(clip.path)
            split = ("train", "validation", "test")[max(0, i % 10 - 7)]
            entry = {"id": id, "shape": list(clip.shape), "dtype": "uint16", "lr_shape": None}
            file.write(line({**entry, "attributes": {**attributes, "split": split}}))
    return path


def at_scale(folder: Path, real: Path, rounds: int) -> dict[str, float]:
    """Opening a corpus of 100,000 clips, and what a worker that reads it weighs."""
    path = many_clips(folder, real)
    code = (
        "import sys, time\n"
        "from hpc_xvr.data.corpus.reader import Corpus\n"
        "page = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "before, begin = page(), time.perf_counter()\n"
        "corpus = Corpus(sys.argv[1])\n"
        "print(time.perf_counter() - begin, (page() - before) / len(corpus))\n"
    )
    runs = []
    for _ in range(rounds):
        out = subprocess.run(
            [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
        ).stdout
        runs.append([float(value) for value in out.split()])
    small, large = worker_rss(real), worker_rss(path)
    return {
        "open_100000_s": statistics.median(seconds for seconds, _ in runs),
        "bytes_per_clip": statistics.median(size for _, size in runs),
        "worker_rss_mb": large,
        "worker_rss_small_corpus_mb": small,
    }


def worker_rss(path: Path) -> float:
    """Resident MB of a worker that has read 600 samples."""
    before = set(psutil.Process().children(recursive=True))
    batches = iter(training_batches(samples_of(path), 0, 1, 0, 80))
    for _ in range(60):
        next(batches)
    started = set(psutil.Process().children(recursive=True)) - before
    size = max(
        process.memory_info().rss
        for process in started
        if "resource_tracker" not in " ".join(process.cmdline())
    )
    del batches
    return size / 1e6


def data_wait(folder: Path, steps: int) -> float:
    """Share of the time that the quickstart's training waits for samples, after its start."""
    run = folder / "run"
    overrides = [
        f"run.dir={run}",
        f"data.corpus={folder / 'quickstart-corpus'}",
        f"train.steps={steps}",
        f"train.log_every={steps // 2}",
        f"validation.every={steps}",
        f"checkpoint.every={steps}",
    ]
    command = ["mpirun", "-n", "2", "--oversubscribe", "hpc-xvr", "train"]
    command.append(str(ROOT / "configs" / "quickstart.yaml"))
    for text in overrides:
        command += ["--set", text]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the training failed:\n{done.stderr}")
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry["data_wait"] for entry in lines if entry["kind"] == "train"][-1]


def measure(folder: Path, quick: bool) -> dict[str, float]:
    rounds, seconds = (3, 0.5) if quick else (7, 2.0)
    recordings = make_recordings(16 if quick else 48, 2 if quick else 4)
    paths = write_all(folder, recordings)
    samples = {name: samples_of(paths[name]) for name in ("zarr", "hdf5")}
    general = samples_of(paths["zarr"])
    png = PngSamples(paths["png"], samples["zarr"])
    with through_tensorstore():
        rate(general, 0, 60, 100)  # its arrays are open from here on
    warm = {"png": png, **samples, "zarr through tensorstore": general}
    for contestant in warm.values():
        rate(contestant, 0, seconds)
    result: dict[str, float] = {}
    rows = []

    def note(kind: str, times: dict[str, list[float]], base: str) -> None:
        middle = {name: statistics.median(values) for name, values in times.items()}
        for name, values in times.items():
            spread = (max(values) - min(values)) / middle[name]
            result[f"{kind}_samples_per_s[{name}]"] = middle[name]
            ratio = middle[name] / middle[base]
            rows.append([f"{kind}: {name}", middle[name], f"{ratio:.1f}", f"{100 * spread:.0f} %"])

    note(
        "warm",
        race({n: lambda i, s=s: rate(s, 1000 * i, seconds) for n, s in warm.items()}, rounds),
        "png",
    )
    result["default_vs_png"] = (
        result["warm_samples_per_s[zarr]"] / result["warm_samples_per_s[png]"]
    )
    result["default_vs_tensorstore"] = (
        result["warm_samples_per_s[zarr]"] / result["warm_samples_per_s[zarr through tensorstore]"]
    )

    def cold(path: Path, make: Callable[[], Dataset]) -> Callable[[int], float]:
        def run(i: int) -> float:
            forget(path)
            return rate(make(), 1000 * i, seconds, 50)

        return run

    note(
        "cold",
        race(
            {
                "png": cold(paths["png"], lambda: png),
                "zarr": cold(paths["zarr"], lambda: samples_of(paths["zarr"])),
                "hdf5": cold(paths["hdf5"], lambda: samples_of(paths["hdf5"])),
            },
            rounds,
        ),
        "png",
    )
    for name, contestant in (("png", png), ("zarr", samples["zarr"]), ("hdf5", samples["hdf5"])):
        result[f"kb_per_sample[{name}]"] = read_bytes(contestant) / 1e3
    useful = 6 * PATCH**2 * 2 / 1e3
    result["kb_per_sample[used]"] = useful
    workers = {
        f"{name}, {count} worker(s)": lambda i, s=s, count=count: loader_rate(s, count, seconds)
        for name, s in (("png", png), ("zarr", samples["zarr"]))
        for count in (1, 2)
    }
    note("loader", race(workers, 1 if quick else 3), "png, 1 worker(s)")
    result |= at_scale(folder, paths["zarr"], rounds)
    result["data_wait_fraction"] = data_wait(folder, 8 if quick else 60)
    log.print_table(
        "samples/s at the published geometry, one thread a process",
        ["what", "samples/s", "ratio to png", "spread"],
        rows,
    )
    return result


@click.command(help=usage(__doc__))
@click.option("--quick", is_flag=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(quick: bool, out: Path | None) -> None:
    log.setup()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), quick)
    context = describe_machine(torch.device("cpu")) | {"platform": platform.platform()}
    figures = [(name, f"{value:.3g}") for name, value in result.items() if "_per_s[" not in name]
    log.print_table("figures", ["figure", "value"], figures)
    file_result("data", result, context, out, quick)


if __name__ == "__main__":
    main()
