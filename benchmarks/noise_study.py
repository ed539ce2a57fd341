"""What kind of noise to train with: SWIN-XVR trained on each kind, tested on every one.

The paper trains with photon noise and asks what other kinds would do. Each network here is the
same, from the same seed, on the same recordings, and sees the same samples but for their noise;
each is then scored on held-out recordings under each test noise. A row of the matrix is a training,
a column a test; the diagonal tells what a network can do about noise it knows.

    python benchmarks/noise_study.py              # two CPU cores, about half an hour
    python benchmarks/noise_study.py --quick      # about a minute, to see that it runs

Writes noise-study-KIND.json and .png into --results. A call that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import compare
from hpc_xvr.reconstruction.baselines import BASELINES

TRAIN = {
    "none": ["data.noise=none"],
    "poisson": ["data.noise=poisson"],
    "poisson_gaussian": ["data.noise=poisson_gaussian"],
    "fixed_pattern": ["data.noise=fixed_pattern"],
}
TEST = ("none", "1e4", "1e3", "1e2", "poisson_gaussian:1e3:0.01", "fixed_pattern:1e3:0.01")
QUICK_TEST = ("none", "1e2", "poisson_gaussian:1e3:0.01")
PLAIN = ("bicubic", "detail", "bayes")
NAMES = {
    "none": "none",
    "poisson": "photon",
    "poisson_gaussian": "+ read",
    "fixed_pattern": "+ pattern",
}


def main() -> None:
    """Train a network a kind of noise, score each on all, draw the matrix."""
    args = parse()
    args.results.mkdir(parents=True, exist_ok=True)
    corpus = args.corpus or args.work / "corpus"
    commands = []
    for kind in args.kinds:
        config, overrides = compare.settings("swin_adaptive", args, corpus)
        own = [*overrides, *TRAIN[kind], f"run.dir={args.work / kind}", *args.set]
        options = compare.repeated("--set", own)
        path = compare.CONFIGS / "swin_adaptive.yaml"
        commands.append(compare.call(["train", str(path), *options, "--resume"], args))
    out = args.work / "evaluation"
    levels = QUICK_TEST if args.quick else TEST
    wanted = [f"train_{kind}={args.work / kind}" for kind in args.kinds]
    wanted += ["--corpus", str(corpus), "--out", str(out), "--set", "evaluate.pictures=0"]
    wanted += compare.repeated("--method", PLAIN) + compare.repeated("--noise", levels)
    wanted += ["--gap", str(config.data.hr_gap)]
    commands.append(compare.evaluate(wanted, args))
    result = study(json.loads((out / "evaluation.json").read_text()), args.kinds)
    result |= {
        "steps": config.train.steps,
        "tflop_each": args.budget,
        "commands": commands,
        "context": compare.context(args),
    }
    file = args.results / f"{args.name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, file.with_suffix(".png"))
    print(result["says"])
    print(f"results: {file}")


def study(evaluation: dict, kinds: tuple[str, ...]) -> dict:
    """The matrix of mean PSNR, methods without learning below, and what it says in words."""
    whole = [s for s in evaluation["summaries"] if s["scene"] is None]
    tests = list(dict.fromkeys(s["condition"]["noise"] for s in whole))
    psnr = {(s["method"], s["condition"]["noise"]): s["values"]["psnr"]["mean"] for s in whole}
    matrix = {kind: {t: psnr[f"train_{kind}", t] for t in tests} for kind in kinds}
    plain = {name: {t: psnr[name, t] for t in tests} for name in PLAIN}
    return {
        "train": list(kinds),
        "test": tests,
        "psnr_db": matrix,
        "without_learning_db": plain,
        "recordings": whole[0]["recordings"],
        "says": in_words(matrix, plain),
    }


def in_words(matrix: dict[str, dict[str, float]], plain: dict[str, dict[str, float]]) -> str:
    """One paragraph, made from the numbers alone."""
    tests = list(next(iter(matrix.values())))
    best = {t: max(matrix, key=lambda kind: matrix[kind][t]) for t in tests}
    loss = {k: max(matrix[best[t]][t] - row[t] for t in tests) for k, row in matrix.items()}
    safest = min(loss, key=loss.get)
    parts = [
        f"tested with {t}, training with {best[t]} is best ({matrix[best[t]][t]:.2f} dB, "
        f"{matrix[best[t]][t] - min(row[t] for row in matrix.values()):.2f} dB above the worst)"
        for t in tests
    ]
    sentences = ["T" + "; ".join(parts)[1:] + "."]
    sentences.append(
        f"The training that loses least over all tests is {safest}: at most "
        f"{loss[safest]:.2f} dB, against "
        + ", ".join(f"{loss[k]:.2f} dB for {k}" for k in matrix if k != safest)
        + "."
    )
    beaten = [t for t in tests if max(p[t] for p in plain.values()) > matrix[best[t]][t]]
    if beaten:
        strongest = {t: max(plain, key=lambda name: plain[name][t]) for t in beaten}
        sentences.append(
            "A method without learning is above all of them at "
            + ", ".join(f"{t} ({strongest[t]}, {plain[strongest[t]][t]:.2f} dB)" for t in beaten)
            + "."
        )
    else:
        sentences.append("No method without learning is above the best of them anywhere.")
    return " ".join(sentences)


def draw(result: dict, path: Path) -> None:
    """PSNR of each training (row) and test (column), coloured by what it loses to the best."""
    rows = [result["psnr_db"][kind] for kind in result["train"]]
    rows += list(result["without_learning_db"].values())
    names = [f"trained: {NAMES[kind]}" for kind in result["train"]]
    names += [BASELINES[name].title for name in result["without_learning_db"]]
    numbers = np.array([[row[t] for t in result["test"]] for row in rows])
    loss = numbers.max(0) - numbers
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        size = (1.5 * len(result["test"]) + 3, 0.55 * len(names) + 1.8)
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        shown = axis.imshow(loss, cmap="Blues_r", aspect="auto", vmin=0, vmax=max(loss.max(), 0.1))
        for i, j in np.ndindex(*numbers.shape):
            dark = loss[i, j] < 0.45 * loss.max()
            weight = "bold" if loss[i, j] < 0.005 else "normal"
            style = {"ha": "center", "va": "center", "weight": weight}
            axis.text(j, i, f"{numbers[i, j]:.2f}", color="white" if dark else "black", **style)
        axis.axhline(len(result["train"]) - 0.5, color="white", linewidth=3)
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks(
            range(len(result["test"])), [t.replace(":", "\n", 1) for t in result["test"]]
        )
        axis.set_xlabel("noise of the test: photons a pixel, or kind, photons and read noise")
        axis.set_title(f"PSNR in dB, mean of {result['recordings']} recordings")
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        figure.colorbar(shown, label="dB below the best of the column")
        figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    """The command line; `compare` reads the same names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=list(TRAIN), default=list(TRAIN))
    compare.add_training_options(parser)
    parser.set_defaults(published=False)
    args = parser.parse_args()
    return compare.completed(args, "noise-study", "quick" if args.quick else "reduced")


if __name__ == "__main__":
    main()
