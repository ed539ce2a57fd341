"""Key propagation, SWIN-XVR, EDVR and EDVR-STF trained on one corpus with the same FLOPs, compared.

Each config of configs/compare gets as many steps as its network's stated FLOPs allow within one
budget (a training step counts three forward passes of each of its samples). The samples of step k
are the same for all networks that take windows; key propagation takes whole gaps of the same
recordings, with the same noise. Then everything is compared with the methods that need no training.

    python benchmarks/compare.py             # reduced widths, two CPU cores, under 40 minutes
    python benchmarks/compare.py --quick     # the same in about a minute, to see that it runs
    python benchmarks/compare.py --published --corpus corpus --ranks 4 --device cuda

A call that was stopped goes on where it was, as training and evaluation do. The page with
its pictures stays in --work; rows, tables, charts and how they were made go to --results.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from filing import RESULTS, without_folders
from hpc_xvr.config import Config, load
from hpc_xvr.factory.build import build_model
from hpc_xvr.train.task import task_of
from starting import ROOT, environment

CONFIGS = ROOT / "configs" / "compare"
MODELS = (
    *("edvr", "edvr_stf", "swin_centre", "swin_sequence", "swin_adaptive", "swin_bayes"),
    "key_propagation",
)
REDUCED = [
    "data.patch=64",
    "data.photons_log10=[2,7]",
    "optim.lr=1.0e-3",
    "optim.ema=0.98",
    "optim.warmup=10",
    "optim.clip_norm=1.0",
    "train.global_batch=8",
    "train.log_every=20",
    "validation.every=100",
    "validation.frames=16",
    "validation.patch=128",
    "checkpoint.every=100",
]
WIDTH = {  # about 200,000 parameters each
    "edvr": ["model.up_features=32", "model.embed_dim=32", "model.heads=4", "model.depths=[2,4]"],
    "edvr_stf": [
        *("model.up_features=32", "model.embed_dim=32", "model.heads=4", "model.depths=[2,4]")
    ],
    "swin": [
        *("model.up_features=32", "model.embed_dim=48", "model.depths=[2,4]", "model.drop_path=0.0")
    ],
    "key_propagation": [
        *("model.embed_dim=64", "model.depths=[2]", "model.heads=2", "model.motions=1"),
        *("model.motion_features=32", "model.frame_features=16", "model.step_features=8"),
        *("optim.clip_norm=0.05", "train.global_batch=4"),
    ],
}
SIMULATED = "{videos: 40, size: [48, 128, 128], splits: {train: 0.7, validation: 0.05, test: 0.25}}"
QUICK = [
    "data.patch=32",
    "data.hr_gap=8",
    "train.global_batch=4",
    "train.log_every=1",
    "validation.frames=2",
    "validation.patch=32",
]
QUICK_WIDTH = {
    "edvr": ["model.embed_dim=8", "model.heads=2", "model.depths=[1,1]"],
    "edvr_stf": ["model.embed_dim=8", "model.heads=2", "model.depths=[1,1]"],
    "swin": ["model.embed_dim=12", "model.depths=[2]", "model.drop_path=0.0"],
    "key_propagation": [
        *("model.embed_dim=16", "model.depths=[1]", "model.motion_features=8", "data.gaps=[2,8]")
    ],
}
QUICK_SIMULATED = (
    "{videos: 6, size: [16, 64, 64], splits: {train: 0.5, validation: 0.17, test: 0.33}}"
)
BUDGET = {"quick": 0.004, "reduced": 10.0, "published": 2000.0}  # TFLOP a model


def main() -> None:
    """Train, evaluate, write down what was done."""
    args = parse()
    args.results.mkdir(parents=True, exist_ok=True)
    commands: list[str] = []
    corpus = args.corpus or args.work / "corpus"
    trained = {}
    for name in args.models:
        trained[name] = train(name, args, corpus, commands)
        print(json.dumps({name: trained[name]}), flush=True)
    begin, out = time.time(), args.work / "evaluation"
    wanted = [
        *(str(args.work / name) for name in args.models),
        *("--corpus", str(corpus), "--out", str(out)),
        *("--set", f"evaluate.pictures={1 if args.quick else 5}"),
        *repeated("--gap", (8,) if args.quick else (8, 20)),
        *repeated("--noise", ("none",) if args.quick else ("none", "1e3", "poisson_gaussian:1e3")),
    ]
    commands.append(evaluate(wanted, args))
    summary = {
        "budget_tflop": args.budget,
        "models": trained,
        "training_seconds": round(sum(model["seconds"] for model in trained.values()), 1),
        "evaluation_seconds": round(time.time() - begin, 1),  # of this call
        "commands": commands,
        "context": context(args),
    }
    file_results(out, args.results / args.name, summary, args)


def file_results(out: Path, folder: Path, about: dict, args: argparse.Namespace) -> None:
    """Copy an evaluation's rows, tables and charts; say how it was made."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("evaluation.csv", "tables.md", "tables.tex"):
        (folder / name).write_text(read_elsewhere((out / name).read_text(), args))
    for path in out.glob("psnr-*.png"):
        shutil.copy(path, folder)
    (folder / "how.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"results: {folder}; page with pictures: {out / 'comparison.html'}")


def train(name: str, args: argparse.Namespace, corpus: Path, commands: list[str]) -> dict:
    """Train one config on the budget; what it cost."""
    config, overrides = settings(name, args, corpus)
    path = CONFIGS / f"{name}.yaml"
    commands.append(call(["train", str(path), *repeated("--set", overrides), "--resume"], args))
    model = build_model(config)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "gflop_a_sample": round(sample_flops(config) / 1e9, 4),
        "steps": config.train.steps,
        "samples": config.train.steps * config.train.global_batch,
        "tflop": round(step_flops(config) * config.train.steps / 1e12, 5),
        "seconds": round(seconds_of(args.work / name), 1),
    }


def seconds_of(run: Path) -> float:
    """Of all training steps, however many starts they took; validation not counted."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    total, before = 0.0, 0
    for line in (line for line in lines if line["kind"] == "train"):
        total += line["step_s"] * (line["step"] - before)
        before = line["step"]
    return total


def settings(name: str, args: argparse.Namespace, corpus: Path) -> tuple[Config, list[str]]:
    """The config of a model with the steps that the budget allows, and how it is overridden."""
    overrides = [f"run.dir={args.work / name}", f"data.corpus={corpus}"]
    overrides += [f"run.device={args.device}"]
    if args.threads:
        overrides += [f"run.threads={args.threads}"]
    if not args.published:
        kind = "swin" if name.startswith("swin") else name
        overrides += REDUCED + WIDTH[kind]
        if args.quick:
            overrides += QUICK + QUICK_WIDTH[kind]
        if not args.corpus:
            overrides += [f"simulate={QUICK_SIMULATED if args.quick else SIMULATED}"]
    overrides += args.set
    config = load(CONFIGS / f"{name}.yaml", overrides)
    steps = max(round(args.budget * 1e12 / step_flops(config)), 1)
    overrides += [f"train.steps={steps}"]
    return load(CONFIGS / f"{name}.yaml", overrides), overrides


def sample_flops(config: Config) -> float:
    """FLOPs of a training sample, forward and backward, as the network states them."""
    return task_of(config).flops(build_model(config))


def step_flops(config: Config) -> float:
    """Of a training step."""
    return sample_flops(config) * config.train.global_batch


def repeated(option: str, values: Iterable[object]) -> list[str]:
    """The option once for each value."""
    return [text for value in values for text in (option, str(value))]


def evaluate(wanted: list[str], args: argparse.Namespace) -> str:
    """Run hpc-xvr evaluate on the ranks; the command as one would type it."""
    threads = ["--set", f"run.threads={args.threads}"] if args.threads else []
    return call(["evaluate", *wanted, *threads, "--device", args.device], args)


def call(arguments: list[str], args: argparse.Namespace) -> str:
    """Run hpc-xvr on the ranks; the command as one would type it."""
    launcher = ["mpirun", "-n", str(args.ranks), "--oversubscribe"] if args.ranks > 1 else []
    command = [*launcher, sys.executable, "-m", "hpc_xvr", *arguments]
    subprocess.run(command, check=True, env=environment())
    return read_elsewhere(shlex.join([*launcher, "hpc-xvr", *arguments]), args)


def read_elsewhere(text: str, args: argparse.Namespace) -> str:
    """A text without the folders of this machine."""
    return text.replace(f"{ROOT}/", "").replace(f"{args.work}/", f"{args.work.name}/")


def context(args: argparse.Namespace) -> dict:
    """Versions, device and date."""
    from torch import device

    from hpc_xvr.train.meters import describe_machine

    kind = "cuda" if args.device == "cuda" else "cpu"
    found = describe_machine(device(kind))
    return {**found, "command": without_folders(found["command"]), "ranks": args.ranks}


def parse() -> argparse.Namespace:
    """The command line; folders and ranks have defaults for the kind of run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--published", action="store_true", help="published widths (needs a GPU)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    add_training_options(parser)
    args = parser.parse_args()
    kind = "quick" if args.quick else "published" if args.published else "reduced"
    if args.published and not args.corpus:
        parser.error("--published needs --corpus: reduced simulated recordings would not do")
    return completed(args, "compare", kind)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every study: where it works, and on what."""
    parser.add_argument("--work", type=Path, help="runs and corpus [runs/NAME]")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--ranks", type=int, help="[1; 2 for reduced widths]")
    parser.add_argument("--threads", type=int, help="CPU threads of a rank")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "auto"])


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Options of studies that train networks, and those of every study."""
    parser.add_argument("--quick", action="store_true", help="about a minute, tiny networks")
    parser.add_argument("--budget", type=float, help="TFLOP that each network is trained with")
    parser.add_argument("--corpus", type=Path, help="default: a simulated one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    add_options(parser)


def completed(args: argparse.Namespace, study: str, kind: str) -> argparse.Namespace:
    """The options of a study that trains, with the defaults of its kind."""
    args.name = f"{study}-{kind}"
    args.ranks = args.ranks or (2 if kind == "reduced" else 1)
    args.budget = args.budget or BUDGET[kind]
    args.work = (args.work or ROOT / "runs" / args.name).resolve()
    args.results = args.results.resolve()
    args.corpus = args.corpus and args.corpus.resolve()
    return args


if __name__ == "__main__":
    main()
