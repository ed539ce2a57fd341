"""What `hpc-xvr adapt` gains on the real sequences of real_sequences.py, frame by frame.

Key frames are every --gap-th sharp frame; the truth between them is known but never shown. Each row
says what the recording's own held-back key frames promised, and what all frames between key frames
really gained.

    python benchmarks/adapting.py --data FOLDER
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

import compare
from hpc_xvr.adaptation import adapt
from hpc_xvr.config import Data
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.noise import NoiseLevel
from hpc_xvr.evaluate.rows import Condition
from hpc_xvr.evaluate.scoring import Setting, Unit, score, streams_of
from hpc_xvr.factory.execution import use_threads
from hpc_xvr.reconstruction.material import Material
from hpc_xvr.reconstruction.methods import open_method
from hpc_xvr.reconstruction.writers import Calibration
from real_sequences import ingest
from starting import ROOT


def main() -> None:
    """Adapt to each recording under each condition; print and file the table."""
    args = parse()
    use_threads(args.threads)
    corpus = ingest(args.data, args.work / "real-sequences", args.device)
    method, setting = open_method(args.weights, args.device), Setting(Data())
    rows = []
    for video in Corpus(corpus).split("test"):
        for gap in args.gap:
            for noise in args.noise:
                condition = Condition(str(corpus), gap, NoiseLevel.parse(noise))
                unit = Unit(condition, video)
                if video.shape[0] <= 3 * gap:
                    continue  # fewer than four key frames
                begin = time.perf_counter()
                try:
                    found = adapt(
                        method, Material(*streams_of(unit, setting), Calibration()), minutes=20
                    )
                except InputError as error:
                    print(f"left out: {video.info.scene}, gap {gap}: {error}")
                    continue
                took = time.perf_counter() - begin
                before, after = (
                    float(np.mean([row.psnr for row in score({"x": m}, unit, setting)]))
                    for m in (method, found.method)
                )
                rows.append(
                    {
                        "recording": video.info.scene,
                        "gap": gap,
                        "noise": noise,
                        "before_db": before,
                        "gain_db": after - before,
                        "promised_db": found.after - found.before,
                        "steps": found.steps,
                        "seconds": took,
                    }
                )
                print(line(rows[-1]), flush=True)
    table = "\n".join([*HEAD, *map(line, rows)]) + "\n"
    out = args.results / "adapting"
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(table)
    about = {"rows": rows, "weights": args.weights, "context": compare.context(args)}
    (out / "adapting.json").write_text(json.dumps(about, indent=1) + "\n")


HEAD = (
    "| recording | gap | photons | dB before | gain | of key frames held back | steps kept |",
    "|---|---|---|---|---|---|---|",
)


def line(row: dict) -> str:
    """Of the table, in Markdown."""
    return (
        f"| {row['recording']} | {row['gap']} | {row['noise']} | {row['before_db']:.2f} | "
        f"{row['gain_db']:+.2f} | {row['promised_db']:+.2f} | {row['steps']} |"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="builtin")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gap", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--noise", nargs="+", default=["none", "1e3"])
    compare.add_options(parser)
    parser.set_defaults(work=ROOT / "runs" / "real-sequences", ranks=1)
    args = parser.parse_args()
    args.device = torch.device("cuda" if args.device == "cuda" else "cpu").type
    return args


if __name__ == "__main__":
    main()
