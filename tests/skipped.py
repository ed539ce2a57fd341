"""What several runs of pytest have skipped, and why: `python tests/skipped.py FOLDER`.

FOLDER holds the report of each run, as `pytest --junitxml=FOLDER/NAME.xml` writes it.
"""

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch

from hpc_xvr.model import kernels


def summary(reports):
    """Lines: how many tests were skipped, then how many in which run for which reason."""
    tests, reasons = 0, Counter()
    for path in sorted(reports):
        for case in ElementTree.parse(path).iter("testcase"):
            tests += 1
            for skipped in case.findall("skipped[@type='pytest.skip']"):  # not: expected to fail
                reasons[path.stem, skipped.get("message")] += 1
    rows = [f"{n:5d}  {run}: {reason}" for (run, reason), n in reasons.most_common()]
    return [f"{reasons.total()} of {tests} tests were skipped{':' * bool(rows)}", *rows]


def kernels_here():
    """Which of our own CPU kernels (hpc_xvr/model/cpu) this machine can run."""
    if not kernels.available():
        built = "they were not built for it" if kernels.cpu_has_bf16() else "it lacks AVX-512 BF16"
        return (
            f"CPU kernels: swin_block and swin_block_backward cannot run on this machine; {built}"
        )
    if not torch.cpu._is_amx_tile_supported():
        return "CPU kernels: all run on this machine, by AVX-512 BF16; it lacks AMX"
    return "CPU kernels: all run on this machine, by AMX"


if __name__ == "__main__":
    print("\n".join([*summary(Path(sys.argv[1]).glob("*.xml")), kernels_here()]))
