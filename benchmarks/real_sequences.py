"""The methods on real high-speed sequences that no network here was trained on: two drops that
merge, a falling ball, foam, a jet, a vibrating beam, a tensile test in an x-ray tube's light.

The sharp frames are a camera's own; the low-resolution ones are made by binning, so the truth is
known, with its noise: limits.json says which PSNR that alone leaves, as nobody can foretell it. The
built-in weights and further models (run folders, files of weights) join in.

    python benchmarks/real_sequences.py --data FOLDER [builtin RUN ...]

FOLDER holds pims_cine, photron_pymraw, pyidi_showcase, trackpy_foam and nist_tensile, as their
projects distribute them; what is missing is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
from scipy.ndimage import convolve

import compare
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.corpus.reader import Video
from starting import ROOT

SEQUENCES = {
    "merging drops": "pims_cine/cine_781.cine",
    "jet": "pims_cine/cine_legacy.cine",
    "falling ball": "photron_pymraw/ball_12bit.cihx",
    "foam": "trackpy_foam",
    "vibration": "pyidi_showcase/data_showcase.cih",
    "beam": "pyidi_showcase/data_small_cine.cine",
    "tensile test": "nist_tensile",
}


def main() -> None:
    """Ingest what is there, evaluate it, copy the tables to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", default=["builtin"], help="trained models")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gap", type=int, nargs="+", default=[4, 8, 20])
    parser.add_argument("--noise", nargs="+", default=["none", "1e3"])
    parser.add_argument("--name", default="real-sequences")
    compare.add_options(parser)
    parser.set_defaults(work=ROOT / "runs" / "real-sequences", ranks=1)
    args = parser.parse_args()
    out = args.work / "evaluation"
    corpus = ingest(args.data, args.work / "real-sequences", args.device)
    wanted = [*args.runs, "--corpus", str(corpus), "--split", "test", "--reference", "bayes"]
    wanted += ["--out", str(out), "--set", f"evaluate.pictures={len(SEQUENCES)}"]
    wanted += compare.repeated("--gap", args.gap) + compare.repeated("--noise", args.noise)
    command = compare.evaluate(wanted, args)
    text = command.replace(f"{args.work}/", "").replace(str(args.data), "FOLDER")
    about = {"command": text, "context": compare.context(args)}
    folder = args.results.resolve() / args.name
    compare.file_results(out, folder, about, args)
    limits = {v.info.scene: noise_limit(v) for v in Corpus(corpus).split("test")}
    (folder / "limits.json").write_text(json.dumps(limits, indent=1) + "\n")


def ingest(data: Path, corpus: Path, device: str) -> Path:
    """Ingest the sequences that are there, unless it is done; the corpus."""
    known = {v.info.scene for v in Corpus(corpus).split("test")} if corpus.exists() else set()
    for scene, name in SEQUENCES.items():
        if scene in known:
            continue
        if not (data / name).exists():
            print(f"left out: {name} is not in {data}")
            continue
        command = ["ingest", str(data / name), "--corpus", str(corpus), "--split", "test"]
        alone = argparse.Namespace(ranks=1, device=device, work=corpus.parent)
        compare.call([*command, "--scene", scene, "--crop"], alone)
    return corpus


def noise_limit(video: Video) -> float:
    """PSNR (dB) of a recording without its noise against itself.

    The noise is what a difference of Laplacians lets through, which flat, sloping and evenly curved
    parts of a picture do not (Immerkaer, Computer Vision and Image Understanding 64, 1996). Texture
    finer than that counts as noise, so a network may stand above this.
    """
    differences = np.outer((1, -2, 1), (1, -2, 1)).astype(float)
    white = 2**video.info.bit_depth - 1
    numbers = np.linspace(0, video.shape[0] - 1, min(video.shape[0], 12)).astype(int)
    passed = [convolve(video.read(int(n)) / white, differences)[1:-1, 1:-1] for n in numbers]
    deviation = math.sqrt(math.pi / 2) / 6 * float(np.mean(np.abs(passed)))
    return round(-20 * math.log10(max(deviation, 1e-6)), 2)


if __name__ == "__main__":
    main()
