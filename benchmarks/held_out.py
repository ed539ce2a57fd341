"""Trained networks and the methods without learning on simulated experiments that no network here
was trained on: the numbers of the built-in weights' card and of the README.

    python benchmarks/held_out.py [builtin RUN ...]     20 recordings; ten minutes on a core
    python benchmarks/held_out.py --quick               5 small ones; under a minute

Twice: with cameras that fit exactly, near key frames and far ones, clean and noisy (held-out), and
with the fast camera half a pixel aside and noise on the key frames (held-out-misfit). A call that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import compare
from starting import ROOT

CONFIG = ROOT / "configs" / "key_propagation.yaml"
SIMULATED = [
    "simulate.scenes=[keyhole,spray,bubbles,crack,tissue]",
    "simulate.splits={test: 1.0}",
    "simulate.seed=2024",
]
LONG = ["simulate.videos=20", "simulate.size=[48,128,128]"]
SHORT = ["simulate.videos=5", "simulate.size=[17,64,64]"]
MISFIT = ["evaluate.misregistration=0.5", "evaluate.hr_noise=1e4"]


def main() -> None:
    """Simulate, evaluate, copy rows, tables and charts to the results."""
    args = parse()
    corpus = args.work / "corpus"
    simulated = [*SIMULATED, *(SHORT if args.quick else LONG), f"data.corpus={corpus}"]
    commands = [
        compare.call(["simulate", str(CONFIG), *compare.repeated("--set", simulated)], args)
    ]
    gaps, noise = ((4, 8), ("none",)) if args.quick else ((8, 20, 40), ("none", "1e3"))
    for name, conditions in (
        ("held-out", [*compare.repeated("--gap", gaps), *compare.repeated("--noise", noise)]),
        (
            "held-out-misfit",
            [*compare.repeated("--gap", gaps[:2]), *compare.repeated("--set", MISFIT)],
        ),
    ):
        out = args.work / name
        wanted = [*args.runs, "--corpus", str(corpus), "--out", str(out), "--reference", "bayes"]
        wanted += [*conditions, "--set", "evaluate.pictures=0"]
        about = {"commands": [*commands, compare.evaluate(wanted, args)]}
        about |= {"context": compare.context(args)}
        compare.file_results(out, args.results / name, about, args)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", default=["builtin"], help="trained models")
    parser.add_argument("--quick", action="store_true")
    compare.add_options(parser)
    parser.set_defaults(work=ROOT / "runs" / "held-out", ranks=1)
    args = parser.parse_args()
    args.work, args.results = (Path(path).resolve() for path in (args.work, args.results))
    return args


if __name__ == "__main__":
    main()
