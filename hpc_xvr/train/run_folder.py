"""The folder of a run: never overwritten, picked up again where its newest valid checkpoint is."""

from __future__ import annotations

import errno
import fcntl
import json
import time
from pathlib import Path
from typing import IO, Any

from torch import nn

from hpc_xvr import checkpoint, config
from hpc_xvr.config import Config
from hpc_xvr.errors import InputError, PassingError, explain_os_error, os_problem
from hpc_xvr.factory.weights import mismatch
from hpc_xvr.files import remove_leftovers, write_atomic
from hpc_xvr.log import logger
from hpc_xvr.text import parse_json

# What the weights depend on; everything else may change between two parts of a run.
ARCHITECTURE = ("model.", "data.lr_frames", "data.scale")
FREE_TO_CHANGE = (
    "run.",
    "dist.",
    "checkpoint.",
    "validation.",
    "evaluate.",
    "simulate.",
    "data.workers",
    "data.corpus",
    "data.damaged",
    "data.stage_dir",
    "train.log_every",
    "train.target_psnr",
    "train.micro_batch",
    "train.weights",
)


DONE = "done.json"  # there once the last step is saved and validated; job scripts look for it


def finished(cfg: Config) -> int | None:
    """The step at which a run was done, None for one that is not; rank 0 calls it."""
    try:
        marker = parse_json((cfg.run.dir / DONE).read_text())
        step = marker["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(step, int):
        return None
    wanted, reached = cfg.train.target_psnr, marker.get("target_psnr")
    enough = wanted is not None and isinstance(reached, (int, float)) and reached >= wanted
    return step if step >= cfg.train.steps or enough else None


def mark_done(folder: Path, step: int, target: float | None = None) -> None:
    """Say that the run has reached its last step, or its target (dB), with nothing left to do."""
    marker = {"step": step, "time": round(time.time(), 3)}
    if target is not None:
        marker["target_psnr"] = target
    text = json.dumps(marker).encode()
    write_atomic(folder / DONE, lambda file: file.write(text + b"\n"))


def lock_run(folder: Path, patience: float = 60.0) -> IO[str] | None:
    """Keep other processes out of a run folder for as long as the returned file is open.

    A killed run may take some seconds to be gone while its successor starts already: it waits.
    None where the file system has no locks.

    Raises:
        InputError: another process still has the folder after `patience` seconds, or the folder
            cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise os_problem(f"run folder {folder}: {explain_os_error(error)}", error) from None
    end, told = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                file.close()
                return None
        if time.monotonic() > end:
            raise PassingError(
                f"run folder {folder} is in use by another process; wait for it to end, or choose "
                "another with --set run.dir=..."
            )
        if not told:
            logger.info("waiting for another process to leave %s", folder)
        told = True
        time.sleep(0.2)


def open_run(
    cfg: Config,
    resume: bool,
    model: nn.Module,
    recordings: dict[str, Any] | None = None,
    strict: bool = False,
) -> dict[str, Any] | None:
    """Make the run's folder, or find the state to continue from; rank 0 calls it.

    Args:
        model: the one to be trained: a checkpoint must fit it.
        recordings: what there is to train on (`TrainingSamples.summary`).
        strict: refuse what is only warned of otherwise: other recordings, other settings.

    Returns:
        The newest valid checkpoint, or None for a fresh start.

    Raises:
        InputError: the folder is in use and `resume` is not given, it is not writable, or its
            checkpoint is of another architecture; with `strict` also of other recordings or
            settings.
    """
    folder = cfg.run.dir
    saved = checkpoint.list_checkpoints(folder / "checkpoints")
    if not resume and (saved or any((folder / f).exists() for f in ("metrics.jsonl", DONE))):
        newest = f" (checkpoint of step {saved[0][0]})" if saved else ""
        raise InputError(
            f"run folder {folder} is already used{newest}; add --resume to continue "
            "it, or choose another with --set run.dir=..."
        )
    state = newest_state(folder) if resume else None
    if state is not None:
        _compare(config.flat(state["config"]), config.flat(cfg.model_dump(mode="json")), strict)
        _check_fit(state, model)
        _compare_recordings(state.get("recordings"), recordings, strict)
    try:
        for part in ("checkpoints", "samples"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / DONE).unlink(missing_ok=True)  # more steps are asked for than were done
    except OSError as error:
        raise os_problem(f"run folder {folder}: {explain_os_error(error)}", error) from None
    for part in (".", "checkpoints", "samples"):
        remove_leftovers(folder / part)
    text = config.dump(cfg).encode()
    write_atomic(folder / "config.yaml", lambda file: file.write(text))
    return state


def write_environment(folder: Path, environment: dict[str, Any]) -> None:
    """environment.json: the newest start first, earlier ones under `earlier`."""
    path = folder / "environment.json"
    if path.exists():
        try:
            before = parse_json(path.read_text())
            environment["earlier"] = [before, *before.pop("earlier", [])]
        except (OSError, ValueError, TypeError, AttributeError):
            logger.warning("%s was not readable and is written anew", path)
    text = json.dumps(environment, indent=1).encode()
    write_atomic(path, lambda file: file.write(text))


def newest_state(folder: Path) -> dict[str, Any] | None:
    needs = ("model", "optimizer", "config")
    for path, state in checkpoint.newest_valid(folder / "checkpoints", needs):
        if isinstance(state, checkpoint.CorruptCheckpoint):
            logger.warning("skipped: %s", state)
            continue
        logger.info("resuming from %s (step %d)", path, state["step"])
        return state
    logger.info("nothing to resume in %s; starting from the first step", folder)
    return None


def _check_fit(state: dict[str, Any], model: nn.Module) -> None:
    problem = mismatch(model.state_dict(), state["model"])
    if not problem and state.get("ema"):
        problem = mismatch(dict(model.named_parameters()), state["ema"])
    if problem:
        raise InputError(
            f"cannot resume: the checkpoint of step {state['step']} does not fit this model: "
            f"{problem}; set the model section as it was, or start a new run with another run.dir"
        )


def _compare(then: dict[str, Any], now: dict[str, Any], strict: bool) -> None:
    changed = [k for k in {**then, **now} if then.get(k) != now.get(k)]
    fixed = [k for k in changed if k.startswith(ARCHITECTURE)]
    if fixed:
        listed = "; ".join(f"{k} was {then.get(k)}, is {now.get(k)}" for k in fixed)
        raise InputError(
            f"cannot resume: the checkpoint is of another architecture ({listed}); "
            "set these back, or start a new run with another run.dir"
        )
    for key in changed:
        if not key.startswith(FREE_TO_CHANGE):
            was, is_ = then.get(key), now.get(key)
            _differs(f"config changed since the checkpoint: {key} was {was}, is {is_}", strict)


def _compare_recordings(
    then: dict[str, Any] | None, now: dict[str, Any] | None, strict: bool
) -> None:
    """Which sample a step sees follows from all recordings: one more or less changes most."""
    if not then or not now or then == now:  # older checkpoints do not say
        return
    change = now["count"] - then["count"]
    what = f"{abs(change)} {'more' if change > 0 else 'fewer'}" if change else "as many, but others"
    _differs(
        f"the corpus has other training recordings than at the checkpoint: {now['count']} with "
        f"{now['frames']} frames, it were {then['count']} with {then['frames']} ({what}); the "
        "samples from here on are not those that the run would have seen",
        strict,
    )


def _differs(what: str, strict: bool) -> None:
    if strict:
        raise InputError(f"cannot resume with --strict: {what}; restore it, or leave out --strict")
    logger.warning(what)


def is_intact(folder: Path) -> bool:
    """Has nobody deleted the folder of a run, or what is in it, while it is used?"""
    return all((folder / name).exists() for name in ("config.yaml", "metrics.jsonl"))


def restore(cfg: Config, environment: dict[str, Any], step: int) -> None:
    """Make a run folder again that was deleted in the middle of the run, at `step`.

    Raises:
        InputError: it cannot be made.
    """
    folder = cfg.run.dir
    logger.warning(
        "run folder %s was deleted, or moved, while the run uses it: it is made again with a "
        "checkpoint of step %d; what it held before is not in it any more",
        folder,
        step,
    )
    try:
        for part in ("checkpoints", "samples", "tensorboard"):
            (folder / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_problem(f"run folder {folder}: {explain_os_error(error)}", error) from None
    text = config.dump(cfg).encode()
    write_atomic(folder / "config.yaml", lambda file: file.write(text))
    write_environment(folder, environment)
