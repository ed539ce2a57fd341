"""The log of a training in MLPerf's format (`:::MLLOG`), by mlperf-logging, and its check.

Checked are the general rules of MLPerf HPC 3.0 (the package's hpc_3.0.0/common.yaml) and, in the
place of those for one of its four benchmarks, mlperf_hpc.yaml beside this file. Of the package's
other programs none applies: there are no reference convergence points for this benchmark
(rcp_checker), and no submission with system descriptions and code (system_desc, package and
repo_checker, result_summarizer).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_xvr.config import Config
from starting import ROOT

RULES = Path(__file__).parent / "mlperf_hpc.yaml"
VERSION = "3.0.0"


@dataclass(frozen=True)
class Machine:
    """What a log says of the machine."""

    platform: str
    nodes: int
    accelerators: int
    """Of a node."""
    ranks: int


def write(
    path: Path,
    cfg: Config,
    machine: Machine,
    lines: list[dict[str, Any]],
    launched: float,
    cold: bool,
) -> None:
    """Write the log of a run.

    Args:
        lines: of its metrics.jsonl; a `train` line comes right before each `validation`.
        launched: when its ranks were started, seconds since 1970.
        cold: the corpus was in nobody's memory.

    Raises:
        ImportError: mlperf-logging is not installed.
    """
    from mlperf_logging.mllog import mllog

    target = cfg.train.target_psnr
    assert target is not None
    start = next(line for line in lines if line["kind"] == "start")
    train = {line["step"]: line for line in lines if line["kind"] == "train"}
    looks = [line for line in lines if line["kind"] == "validation"]
    opened = start["time"] - start["opening_s"]
    share = cfg.train.global_batch // machine.ranks
    epochs = {look["step"]: round(train[look["step"]]["epoch"], 6) for look in looks}
    last = looks[-1]
    a_step = epochs[last["step"]] / last["step"]  # in epochs
    before: list[tuple[str, Any]] = [
        ("submission_benchmark", "hpc_xvr"),
        ("submission_org", "none"),
        ("submission_division", "open"),
        ("submission_status", "research"),
        ("submission_platform", machine.platform),
        ("number_of_nodes", machine.nodes),
        ("accelerators_per_node", machine.accelerators),
        ("cache_clear", cold),
    ]
    settings: list[tuple[str, Any]] = [
        ("seed", cfg.run.seed),
        ("global_batch_size", cfg.train.global_batch),
        ("gradient_accumulation_steps", share // (cfg.train.micro_batch or share)),
        ("opt_name", "adamw" if cfg.optim.weight_decay else "adam"),
        ("opt_base_learning_rate", cfg.optim.lr),
        ("opt_learning_rate_training_steps", cfg.train.steps),
        ("quality_target", target),
        ("train_samples", round(cfg.train.global_batch / a_step)),
        ("eval_samples", last["frames"]),
    ]

    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    logger = logging.Logger("one log")
    logger.addHandler(handler := logging.FileHandler(path))
    log = mllog.MLLogger(logger, root_dir=str(ROOT))

    def ms(seconds: float) -> int:
        return round(1000 * seconds)

    for key, value in before:
        log.event(key, value, time_ms=ms(launched))
    log.start("init_start", time_ms=ms(launched))
    for key, value in settings:
        log.event(key, value, time_ms=ms(opened))
    log.end("init_stop", time_ms=ms(opened))
    log.start("run_start", time_ms=ms(opened))
    log.start("staging_start", time_ms=ms(start["time"] - start["staging_s"]))
    log.end("staging_stop", time_ms=ms(start["time"]))
    at, since = 0.0, start["time"]
    for look in looks:
        epoch, asked = epochs[look["step"]], train[look["step"]]["time"]
        block = {"first_epoch_num": at, "epoch_count": round(epoch - at, 6)}
        log.start("block_start", metadata=block, time_ms=ms(since))
        log.end("block_stop", metadata={"first_epoch_num": at}, time_ms=ms(asked))
        here = {"epoch_num": epoch}
        log.start("eval_start", metadata=here, time_ms=ms(asked))
        log.event("eval_accuracy", look["psnr"], metadata=here, time_ms=ms(look["time"]))
        log.end("eval_stop", metadata=here, time_ms=ms(look["time"]))
        at, since = epoch, look["time"]
    status = "success" if last["psnr"] >= target else "aborted"
    log.end("run_stop", metadata={"status": status}, time_ms=ms(last["time"]))
    handler.close()


def problems(path: Path) -> list[str]:
    """What the compliance checker objects to in a log.

    Raises:
        ImportError: mlperf-logging is not installed.
    """
    from mlperf_logging.compliance_checker import mlp_compliance, mlp_parser

    checker = mlp_compliance.make_checker("hpc", VERSION, quiet=False, werror=True)
    lines, errors = mlp_parser.parse_file(str(path), VERSION)
    general = Path(mlp_compliance.__file__).parent / f"hpc_{VERSION}" / "common.yaml"
    for rules in (general, RULES):
        checker.configured_checks(lines, str(rules))
    # common.yaml asks for the division's rules, which know the four benchmarks only.
    mlp_compliance.enqueued_configs.clear()
    torn = [f"not a line of MLLOG: {line}" for line, _ in errors]
    return [*torn, *checker.overwritable.values(), *checker.not_overwritable]
