"""How far a movie may be believed, measured where the truth is known: on simulated recordings.

    python benchmarks/trust.py                    20 simulated recordings; about 20 minutes
    python benchmarks/trust.py --quick            2 of them, under 50 s
    python benchmarks/trust.py --corpus FOLDER --split test   a corpus of yours, or real sequences
    python benchmarks/trust.py --fit              also fit the weights of the uncertainty again

For each recording, gap and noise: what the key frames left out say of the PSNR, and what it really
is; how many pixels lie within one and two of the standard deviations stated, before and after they
were scaled by the recording's own key frames; which frames are flagged, of the true ones, of the
method's own and of some that were spoilt; and what enforcing agreement does to the PSNR.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc_xvr.factory.memory import keep_freed_memory

keep_freed_memory()  # before torch is imported

import click  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from filing import RESULTS, usage  # noqa: E402
from hpc_xvr import log, metrics  # noqa: E402
from hpc_xvr.config import Data, Simulate  # noqa: E402
from hpc_xvr.data.corpus import Corpus, Video  # noqa: E402
from hpc_xvr.data.simulate.corpus import simulate_corpus  # noqa: E402
from hpc_xvr.evaluate.noise import NoiseLevel  # noqa: E402
from hpc_xvr.reconstruction.methods import NamedMethod, open_method  # noqa: E402
from hpc_xvr.reconstruction.pipeline import reconstruct  # noqa: E402
from hpc_xvr.reconstruction.streams import KeyFrames, Stream, recording_streams  # noqa: E402
from hpc_xvr.reconstruction.trust.consistency import compare_frame, enforce  # noqa: E402
from hpc_xvr.reconstruction.trust.held_out import check  # noqa: E402
from hpc_xvr.reconstruction.trust.observation import observe  # noqa: E402
from hpc_xvr.reconstruction.trust.uncertainty import (  # noqa: E402
    NAMES,
    deviation,
    parts,
    surroundings,
)
from hpc_xvr.train.meters import describe_machine  # noqa: E402

EVERY = 6
"""Of the frames between key frames, every so-manieth is spoilt and enforced."""
SIGMA = np.geomspace(1e-3, 0.3, 26)
"""Edges of the classes of stated deviations."""
PIXELS = 400
"""Of a frame, that the weights are fitted on."""


def spoilt(
    frames: dict[int, np.ndarray], keys: dict[int, np.ndarray], t: int, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """Frame t as it should not be."""
    frame = frames[t]
    before, after = max(k for k in keys if k < t), min(k for k in keys if k > t)
    far = keys[before if t - before > after - t else after]
    yield "the frame 4 later", frames[t + 4 if t + 4 in frames else t - 4]
    yield "the farther key frame", far
    for shift in (1, 2, 4):
        yield f"shifted by {shift} sharp pixels", np.roll(frame, shift, 1)
    height, width = frame.shape
    side = 16
    change = (frame - far) ** 2
    boxes = change[: height // side * side, : width // side * side]
    boxes = boxes.reshape(height // side, side, width // side, side).mean((1, 3))
    i, j = (side * int(k) for k in np.unravel_index(int(boxes.argmax()), boxes.shape))
    lost = frame.copy()
    lost[i : i + side, j : j + side] = far[i : i + side, j : j + side]
    yield "what moved most in 16x16 pixels lost", lost
    row, column = int(rng.integers(12, height - 12)), int(rng.integers(12, width - 12))
    y, x = np.mgrid[:height, :width]
    disc = (y - row) ** 2 + (x - column) ** 2 <= 36
    for contrast in (0.1, 0.2):
        sign = -1 if frame[row, column] > 0.3 else 1
        yield f"a disc of 13 pixels invented, contrast {contrast:g}", frame + sign * contrast * disc


def rank_of(method: NamedMethod, lr: Stream, keys: KeyFrames) -> dict[int, np.ndarray]:
    """All frames of a recording."""
    found = reconstruct(
        method.method,
        lr,
        keys,
        lr_frames=1 if method.lr_frames is None else method.lr_frames,
        n_out=method.n_out,
        precision=method.precision,
    )
    return dict(found)


def examine(method: NamedMethod, video: Video, gap: int, noise: str) -> dict[str, Any] | None:
    """One recording under one condition; None where it has too few key frames."""
    level = NoiseLevel.parse(noise)
    grid = (video.shape[1] // 4, video.shape[2] // 4)
    camera = level.camera(video.id, grid, Data().pattern, 0)
    stream, key_stream = recording_streams(video, gap, Data(), camera)
    fast, keys = list(stream), dict(key_stream)
    lr = Stream(stream.shape, lambda t: fast[t])
    key_frames = KeyFrames(list(keys), key_stream.shape, lambda t: keys[t])
    if len(keys) < 3:
        return None
    around = surroundings(keys, observe(fast, keys))
    held = check(method, lr, key_frames, around)
    frames = rank_of(method, lr, key_frames)
    between = [t for t in sorted(frames) if t not in keys]
    truth = {t: np.clip(video.intensity(t), 0, 1) for t in between}
    rng = np.random.default_rng([zlib.crc32(video.id.encode()), gap])
    psnr, within, scaled = [], np.zeros(2), np.zeros(2)
    classes = np.zeros((2, len(SIGMA) + 1))
    flags: dict[str, list[bool]] = {"true": [], "made": []}
    gains: list[float] = []
    mended: list[float] = []
    fit: list[np.ndarray] = []
    for t in between:
        frame, error = frames[t], np.abs(frames[t] - truth[t])
        psnr.append(min(metrics.psnr_float(frame, truth[t]), 100.0))
        before, after = max(k for k in keys if k < t), min(k for k in keys if k > t)
        place = fast[t], keys[before], keys[after], after - before, around
        sigma = deviation(frame, *place)
        within += [(error <= sigma).mean(), (error <= 2 * sigma).mean()]
        sigma = held.factor * sigma
        scaled += [(error <= sigma).mean(), (error <= 2 * sigma).mean()]
        number = np.searchsorted(SIGMA, sigma.ravel())
        for row, weights in enumerate((None, error.ravel() ** 2)):
            classes[row] += np.bincount(number, weights, len(SIGMA) + 1)
        flags["true"].append(compare_frame(truth[t], fast[t], around.camera).contradicts)
        flags["made"].append(compare_frame(frame, fast[t], around.camera).contradicts)
        if between.index(t) % EVERY:
            continue
        for name, other in spoilt(frames, keys, t, rng):
            told = compare_frame(other, fast[t], around.camera).contradicts
            flags.setdefault(name, []).append(told)
        agreed = enforce(frame, fast[t], around.camera)
        gains.append(metrics.psnr_float(agreed, truth[t]) - metrics.psnr_float(frame, truth[t]))
        far = keys[before if t - before > after - t else after]
        agreed = enforce(far, fast[t], around.camera)
        mended.append(metrics.psnr_float(agreed, truth[t]) - metrics.psnr_float(far, truth[t]))
        own, found = parts(frame.astype(float), *place)
        at = rng.integers(frame.size, size=PIXELS)
        columns = [own, *(found[name] for name in NAMES), error / around.contrast]
        fit.append(np.stack([column.ravel()[at] for column in columns], 1))
    return {
        "recording": video.id,
        "gap": gap,
        "noise": level.name,
        "keys_left_out": len(held.times),
        "told_psnr_db": held.mean_psnr,
        "true_psnr_db": float(np.mean(psnr)),
        "factor": held.factor,
        "within": list(within / len(between)),
        "within_scaled": list(scaled / len(between)),
        "enforced_db": float(np.mean(gains)),
        "enforced_key_db": float(np.mean(mended)),
        "flagged_worse_db": worse_by(psnr, flags["made"]),
        "flags": {name: [sum(told), len(told)] for name, told in flags.items()},
        "classes": classes.tolist(),
        "fit": np.concatenate(fit),
    }


def worse_by(psnr: list[float], flagged: list[bool]) -> float | None:
    """By how many dB the frames flagged are worse than the others of the recording."""
    values, flags = np.array(psnr), np.array(flagged)
    return float(values[~flags].mean() - values[flags].mean()) if 0 < flags.mean() < 1 else None


def fitted(table: np.ndarray) -> np.ndarray:
    """Weights of the uncertainty that make the errors (last column) most likely, for a Student
    distribution of 4 degrees of freedom; scaled so that 68 % lie within one deviation."""
    table = np.asarray(table, np.float64)
    x, error = torch.from_numpy(table[:, :-1]), torch.from_numpy(table[:, -1])
    w = torch.zeros(x.shape[1] + 1, dtype=torch.float64)
    w[1], w[-1] = 0.5, -1.0
    w.requires_grad_()

    def logarithm(w: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.logaddexp(2 * (x[:, 0] + w[0]), 2 * (x[:, 1:] @ w[1:-1] + w[-1]))

    search = torch.optim.LBFGS([w], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        s = logarithm(w)
        value = (s + 2.5 * torch.log1p((error * torch.exp(-s)) ** 2 / 4)).mean()
        value.backward()
        return value

    search.step(loss)
    w = w.detach()
    missing = torch.quantile(error * torch.exp(-logarithm(w)), 0.6827).log()
    w[0] += missing
    w[-1] += missing
    return w.numpy()


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of some rows."""
    told, true = (np.array([row[f"{name}_psnr_db"] for row in rows]) for name in ("told", "true"))
    better = true - told
    flags: dict[str, np.ndarray] = {}
    for row in rows:
        for name, counts in row["flags"].items():
            flags[name] = flags.get(name, np.zeros(2)) + counts
    worse = [row["flagged_worse_db"] for row in rows if row["flagged_worse_db"] is not None]
    found = {
        "recordings": len(rows),
        "correlation": float(np.corrcoef(told, true)[0, 1]) if len(rows) > 2 else None,
        "better_db": float(better.mean()),
        "spread_db": float(better.std(ddof=1)) if len(rows) > 1 else None,
        "too_optimistic": int((better < 0).sum()),
        "true_psnr_db": float(true.mean()),
        "factor": float(np.exp(np.mean(np.log([row["factor"] for row in rows])))),
        "enforced_db": float(np.mean([row["enforced_db"] for row in rows])),
        "enforced_key_db": float(np.mean([row["enforced_key_db"] for row in rows])),
        "flagged_worse_db": float(np.mean(worse)) if worse else None,
        "flagged": {name: round(float(a / b), 4) for name, (a, b) in flags.items()},
        "frames": {name: int(b) for name, (_, b) in flags.items()},
    }
    for name in ("within", "within_scaled"):
        shares = np.array([row[name] for row in rows])
        found[name] = [round(float(x), 4) for x in shares.mean(0)]
        found[f"{name}_spread"] = [round(float(x), 4) for x in shares.std(0)]
    return found


def draw(rows: list[dict[str, Any]], curve: list[list[float]], file: Path) -> None:
    """Told against true PSNR; stated deviations against errors."""
    figure = Figure((9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for noise in dict.fromkeys(row["noise"] for row in rows):
        for gap, marker in zip(sorted({row["gap"] for row in rows}), "o^sDv", strict=False):
            some = [r for r in rows if (r["noise"], r["gap"]) == (noise, gap)]
            left.plot(
                [r["told_psnr_db"] for r in some],
                [r["true_psnr_db"] for r in some],
                marker,
                ms=4,
                color="C0" if noise == "none" else "C1",
                label=f"gap {gap}, {'no noise' if noise == 'none' else noise + ' photons'}",
            )
    ends = [min(r["told_psnr_db"] for r in rows), max(r["true_psnr_db"] for r in rows)]
    left.plot(ends, ends, "k:", lw=1, label="equal")
    left.set(xlabel="PSNR of the key frames left out (dB)", ylabel="true PSNR of the movie (dB)")
    left.legend(fontsize=7)
    stated, found, _ = zip(*curve, strict=True)
    right.plot(stated, found, "o-", ms=4)
    right.plot(stated, stated, "k:", lw=1)
    right.set(xlabel="standard deviation stated", ylabel="root mean square error found")
    figure.savefig(file, dpi=110)


def reliability(rows: list[dict[str, Any]]) -> list[list[float]]:
    """[deviation stated, root mean square error, pixels] of each class with 10,000 pixels."""
    counts, squares = np.sum([row["classes"] for row in rows], 0)
    middle = np.sqrt(SIGMA[1:] * SIGMA[:-1])
    return [
        [float(f"{m:.4g}"), float(f"{np.sqrt(s / n):.4g}"), int(n)]
        for m, n, s in zip(middle, counts[1:-1], squares[1:-1], strict=True)
        if n >= 1e4
    ]


@click.command(help=usage(__doc__))
@click.option("--quick", is_flag=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.option("--corpus", type=click.Path(path_type=Path, exists=True))
@click.option("--split", default="test")
@click.option("--method", default="builtin")
@click.option("--gap", "gaps", multiple=True, type=int, default=(4, 8, 16))
@click.option("--noise", multiple=True, default=("none", "1e3"))
@click.option("--fit", is_flag=True)
@click.option("--name", default="trust")
def main(
    quick: bool,
    out: Path | None,
    corpus: Path | None,
    split: str,
    method: str,
    gaps: tuple[int, ...],
    noise: tuple[str, ...],
    fit: bool,
    name: str,
) -> None:
    """Examine, summarise, draw, file."""
    matplotlib.use("agg")
    log.setup(0)
    torch.set_num_threads(1)  # small frames; a shared machine
    entry = open_method(method)
    with tempfile.TemporaryDirectory() as folder:
        if corpus is None:
            corpus = Path(folder) / "corpus"
            about = {"videos": 2 if quick else 20, "size": (48, 128, 128), "seed": 5150}
            about |= {"splits": {"test": 1.0}, "lr_stream": False}
            about |= {"cameras": {"sa-z": {"share": 1.0, "size": None}}}
            simulate_corpus(Simulate(**about), corpus)
        rows = []
        for video in Corpus(corpus).split(split):
            for gap in gaps[:1] if quick else gaps:
                for level in noise:
                    row = examine(entry, video, gap, level)
                    if row is None:
                        print(f"left out: {video.id} has too few key frames at gap {gap}")
                        continue
                    rows.append(row)
                    print(f"{video.id}, gap {gap}, noise {level}", flush=True)
    result: dict[str, Any] = {"all": summary(rows)}
    for gap in sorted({row["gap"] for row in rows}):
        for level in dict.fromkeys(row["noise"] for row in rows):
            some = [row for row in rows if (row["gap"], row["noise"]) == (gap, level)]
            result[f"gap {gap}, noise {level}"] = summary(some)
    result["reliability"] = reliability(rows)
    if fit:
        weights = fitted(np.concatenate([row["fit"] for row in rows]))
        names = ("own", *NAMES, "constant")
        result["fit"] = dict(zip(names, weights.round(4).tolist(), strict=True))
        result["fit"]["own"] = float(np.exp(weights[0]).round(4))
    told = [{k: v for k, v in row.items() if k not in ("classes", "fit", "flags")} for row in rows]
    print(json.dumps({k: v for k, v in result.items() if k != "reliability"}, indent=1))
    if quick and out is None:
        return
    file = out or RESULTS / f"{name}.json"
    context = {**describe_machine(torch.device("cpu")), "method": method}
    text = json.dumps({**result, "rows": told, "context": context}, indent=1)
    file.write_text(text + "\n")
    if not quick:
        draw(rows, result["reliability"], file.with_suffix(".png"))
    print(f"written: {file}")


if __name__ == "__main__":
    main()
