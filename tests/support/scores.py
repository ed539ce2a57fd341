"""Rows of evaluations that never were."""

from hpc_xvr.evaluate.noise import NoiseLevel
from hpc_xvr.evaluate.rows import Condition, Row


def row(method, recording, psnr, gap=8, noise="none", scene="spray", corpus="c"):
    """A row whose other numbers follow from its PSNR; `mine` is a model of 2 GFLOP a frame."""
    flops = 2e9 if method == "mine" else 3e5
    return Row(
        Condition(corpus, gap, NoiseLevel.parse(noise)), recording, scene, method, 18, 2, psnr,
        0.9 + psnr / 1000, 5 - psnr / 10, psnr + 0.01, psnr + 3, 1 - psnr / 100, 0.0123, flops
    )  # fmt: skip
