"""Coverage-guided fuzzing of the parsers of test_fuzz.py: inputs that reach new lines are changed
further. Needs atheris (pip install atheris).

    python tests/guided_fuzz.py config --seconds 60
    python tests/guided_fuzz.py all --seconds 30         each in turn

Half of the changes are those of test_fuzz.py, which know the structure, half are libFuzzer's. It
ends with an error, and writes the input to the folder --keep, when one is neither read nor refused.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random

import atheris

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
with atheris.instrument_imports(include=["hpc_xvr"]):
    from support.mutations import several
    from support.parsers import TARGETS, judge


def main() -> int:
    """Fuzz one parser, or each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=["all", *TARGETS])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-problems"))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # of the process that reads
    args = parser.parse_args()
    if args.inside:
        fuzz(args.target, args.seconds, args.seed, args.inside, args.keep)  # ends the process
    args.keep.mkdir(exist_ok=True)
    codes = {}
    for name in TARGETS if args.target == "all" else [args.target]:
        print(f"{name}:", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, name, "--seconds", str(args.seconds)]
            command += ["--seed", str(args.seed), "--keep", str(args.keep), "--inside", folder]
            codes[name] = subprocess.run(command).returncode
    print({name: code for name, code in codes.items() if code} or "nothing was found")
    return max(codes.values())


def fuzz(name: str, seconds: int, seed: int, folder: Path, keep: Path) -> None:
    """Change and read inputs of a parser; libFuzzer ends the process."""
    target = TARGETS[name]
    logger = logging.getLogger("hpc_xvr")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    warnings.simplefilter("ignore")
    corpus, place = folder / "corpus", folder / "place"
    corpus.mkdir()
    place.mkdir()

    def read(data: bytes) -> None:
        answer, where = judge(target, place, data)
        if answer not in ("readable", "refused"):
            raise RuntimeError(f"{name}: {answer} ({where})")

    with atheris.instrument_imports(include=["hpc_xvr"]):  # parsers import what they need
        for number, data in enumerate(target.prepare(place)):
            (corpus / str(number)).write_bytes(data)
            judge(target, place, data)

    def change(data: bytes, size: int, number: int) -> bytes:
        rng = Random(number)
        changed = (
            several(rng, [data], target.change)
            if rng.random() < 0.5
            else atheris.Mutate(data, size)
        )
        return (target.mend(rng, changed) if target.mend else changed)[:size]

    options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={keep}/{name}-"]
    largest = max(path.stat().st_size for path in corpus.iterdir())
    options += [f"-max_len={4 * largest}", "-rss_limit_mb=4096", "-timeout=60", "-verbosity=0"]
    options += ["-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], read, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
