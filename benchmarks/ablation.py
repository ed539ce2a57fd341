"""What matters in training key_propagation: one thing changed at a time, at equal compute.

Each variant of configs/key_propagation.yaml is trained from scratch with as many steps as its FLOPs
allow within one budget, for several seeds, and validated on recordings that it has not seen: near
key frames and far ones, clean and noisy. The table gives each variant's difference from the
reference, seed by seed, with a 95 % interval of its mean.

    python benchmarks/ablation.py                     # an hour on two cores
    python benchmarks/ablation.py --only l1 --seeds 1,2,3,4,5
    python benchmarks/ablation.py --quick             # a minute, to see that it runs

A call that was stopped goes on where it was, as training and evaluation do.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from scipy.stats import t as student

import compare
from hpc_xvr.config import load
from starting import ROOT

CONFIG = ROOT / "configs" / "key_propagation.yaml"
SHORT = [
    "optim.lr=1.5e-3",
    "optim.ema=0.99",
    "optim.warmup=50",
    "validation.frames=8",
    "train.log_every=50",
]
QUICK = [
    "simulate.videos=12",
    "simulate.size=[24,64,64]",
    "simulate.splits={train: 0.5, validation: 0.5, test: 0.0}",
    "model={name: key_propagation, embed_dim: 16, depths: [1], heads: 1, motion_features: 8}",
    "data.gaps=[2,8]",
    "data.patch=32",
]
WITHOUT_LAYERS = "simulate.scenes=[keyhole,spray,bubbles,crack,tissue]"
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "reference": ("as in configs/key_propagation.yaml", []),
    "misfit-first": (
        "cameras that do not fit exactly from the first step",
        ["data.misregistration=0.5", "data.grey_mismatch=0.05"],
    ),
    "clean-keys": ("no noise on key frames", ["data.hr_noise=none"]),
    "more-noise": ("10 to 10^7 photons, as published", ["data.photons_log10=[1.0,7.0]"]),
    "same-greys": ("no other greys, no skipped frames", ["data.regrey=false", "data.speed_up=1"]),
    "no-layers": ("no recordings of moving layers", [WITHOUT_LAYERS]),
    "short-gaps": ("gaps of 2 to 8 frames only", ["data.gaps=[2,8]"]),
    "no-carried-loss": ("no loss on the carried key frames", ["train.carried_weight=0"]),
    "l1": ("L1 instead of Charbonnier", ["train.loss=l1"]),
    "no-averaging": ("last weights instead of averaged ones", ["optim.ema=0"]),
    "loose-clipping": ("gradients clipped ten times as late", ["optim.clip_norm=0.5"]),
    "slow": ("learning rate two thirds", ["optim.lr=1.0e-3"]),
    "batch-8": ("batch 8, half the steps", ["train.global_batch=8"]),
    "patch-96": ("crops of 96 pixels, fewer steps", ["data.patch=96"]),
    "both-lookups": ("key frames looked up linearly and by cubic ones", ["model.lookup=both"]),
    "one-motion": ("one motion field a direction", ["model.motions=1"]),
}
CONDITIONS = ("8:none", "20:1000")


def main() -> None:
    """Train what is not trained yet, evaluate everything, write the table."""
    args = parse()
    commands, runs = [], {}
    for name in args.only:
        for seed in args.seeds:
            runs[name, seed] = train(name, seed, args, commands)
    out = args.work / "evaluation"
    ours = [f"{run.name}={run}" for run in runs.values()]
    wanted = [*ours, "--corpus", str(args.corpus), "--split", "validation", "--out", str(out)]
    wanted += ["--reference", runs[args.only[0], args.seeds[0]].name]
    wanted += ["--config", str(CONFIG), "--set", "evaluate.pictures=0"]
    gaps, levels = zip(*(text.split(":") for text in CONDITIONS), strict=True)
    wanted += compare.repeated("--gap", gaps) + compare.repeated("--noise", levels)
    commands.append(compare.evaluate(wanted, args))
    scores = scores_of(out / "evaluation.csv")
    table = written(scores, args)
    print(table)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "ablation.md").write_text(table)
    about = {"budget_tflop": args.budget, "seeds": args.seeds, "commands": commands}
    numbers = {f"{n} {s} {c}": v for (n, s), by in scores.items() for c, v in by.items()}
    about |= {"psnr_db": numbers, "context": compare.context(args)}
    (args.results / "ablation.json").write_text(json.dumps(about, indent=1) + "\n")


def train(name: str, seed: int, args: argparse.Namespace, commands: list[str]) -> Path:
    """Train a variant on the budget; its run folder."""
    run = args.work / f"{name}-{seed}"
    own = [*SHORT, *(QUICK if args.quick else []), *VARIANTS[name][1], *args.set]
    corpus = args.corpus
    if WITHOUT_LAYERS in own:
        corpus = args.work / "corpus-without-layers"
    own += [f"run.seed={seed}", f"run.device={args.device}", f"data.corpus={corpus}"]
    config = load(CONFIG, [*own, f"run.dir={run}"])
    steps = max(1, round(args.budget * 1e12 / compare.step_flops(config)))
    own += [f"run.dir={run}", f"train.steps={steps}", f"validation.every={steps}"]
    own += [f"checkpoint.every={steps}"]
    commands.append(
        compare.call(["train", str(CONFIG), *compare.repeated("--set", own), "--resume"], args)
    )
    return run


Scores = dict[tuple[str, int], dict[str, float]]
"""(variant, seed) -> condition -> mean PSNR (dB) over the recordings."""


def scores_of(path: Path) -> Scores:
    """Read the rows of an evaluation."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            name, _, seed = row["method"].rpartition("-")
            if not seed.isdigit():  # a method without learning
                continue
            by = found.setdefault((name, int(seed)), {})
            by.setdefault(f"{row['gap']}:{row['noise']}", []).append(float(row["psnr"]))
    return {key: {c: float(np.mean(v)) for c, v in by.items()} for key, by in found.items()}


def written(scores: Scores, args: argparse.Namespace) -> str:
    """The table, in Markdown."""
    first = args.only[0]
    heads = [f"gap {c.split(':')[0]}, {c.split(':')[1]}" for c in CONDITIONS]
    lines = [
        f"Mean PSNR (dB) over {len(args.seeds)} seeds after {args.budget:g} TFLOP each; others as "
        f"differences from the reference, seed by seed, with 95 % intervals of their means.",
        "",
        f"| variant | changed | {' | '.join(heads)} |",
        f"|---|---|{'---|' * len(heads)}",
    ]
    for name in args.only:
        cells = []
        for condition in CONDITIONS:
            values = np.array([scores[name, seed][condition] for seed in args.seeds])
            if name == first:
                cells.append(f"{values.mean():.2f}")
                continue
            values -= [scores[first, seed][condition] for seed in args.seeds]
            cells.append(f"{values.mean():+.2f}{_interval(values)}")
        lines.append(f"| {name} | {VARIANTS[name][0]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _interval(values: np.ndarray) -> str:
    if len(values) < 2:
        return ""
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f" [{values.mean() - half:+.2f}, {values.mean() + half:+.2f}]"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=lambda text: list(map(int, text.split(","))), default=None)
    parser.add_argument("--budget", type=float, help="TFLOP of training a run [default: 16]")
    parser.add_argument("--corpus", type=Path, help="[default: simulated on first use]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    compare.add_options(parser)
    parser.set_defaults(work=ROOT / "runs" / "ablation", ranks=2)
    args = parser.parse_args()
    args.budget = args.budget or (0.002 if args.quick else 16.0)
    args.seeds = args.seeds or ([1] if args.quick else [1, 2, 3])
    args.corpus = args.corpus or args.work / "corpus"
    args.only = ["reference", *(name for name in args.only if name != "reference")]
    return args


if __name__ == "__main__":
    main()
