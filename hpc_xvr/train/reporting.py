"""What a run says of itself: the log, metrics.jsonl, TensorBoard events."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpc_xvr.config import Config
from hpc_xvr.errors import explain_os_error
from hpc_xvr.files import write_atomic
from hpc_xvr.log import Pace, duration, logger
from hpc_xvr.text import parse_json
from hpc_xvr.train.progress import Progress
from hpc_xvr.train.share import Share


class Reporter:
    """Writes the lines of a run on rank 0; on the other ranks it does nothing.

    Args:
        resumed_step: the checkpoint's, if the run may continue an earlier one; else None.
    """

    def __init__(self, cfg: Config, is_root: bool, resumed_step: int | None) -> None:
        self._cfg = cfg
        self._metrics = Metrics(cfg.run.dir, resumed_step) if is_root else None
        self._pace = Pace("training", cfg.train.steps, "steps", resumed_step or 0, by_share=False)

    def resumed(self, step: int, ranks: int) -> None:
        """The run goes on after `step`."""
        if self._metrics:
            self._metrics.write("event", step, text=f"resumed on {ranks} ranks")

    def started(
        self,
        machine: dict[str, Any],
        share: Share,
        parameters: int,
        flops_per_sample: int,
        recordings: tuple[int, int],
        steps_per_epoch: int,
    ) -> None:
        """Who trains, and what on; `recordings` are those for training and for validation."""
        if not self._metrics:
            return
        cfg, ranks = self._cfg, machine["ranks"]
        packed = cfg.dist.compression
        logger.info(
            "%s, %d rank(s) on %d node(s), %s, %d thread(s) a rank%s; global batch %d = "
            "%d rank(s) x %d micro-batch(es) x %d sample(s)",
            machine["engine"],
            len(ranks),
            len({rank["host"] for rank in ranks}),
            ranks[0]["device"],
            ranks[0]["threads"],
            "" if packed == "none" or len(ranks) == 1 else f", gradients in {packed}",
            cfg.train.global_batch,
            len(ranks),
            share.micro_batches,
            share.micro,
        )
        logger.info(
            "%s: %s parameters, %.1f GFLOP a sample and step; %d training and %d "
            "validation recordings, %d steps an epoch",
            cfg.model.name,
            f"{parameters:,}",
            flops_per_sample / 1e9,
            *recordings,
            steps_per_epoch,
        )

    def begins(self, step: int, opening_s: float, staging_s: float) -> None:
        """The first step comes now; seconds since the trainer turned to the corpus, and those of
        them in which recordings were copied to the nodes."""
        if self._metrics:
            self._metrics.write("start", step, opening_s=opening_s, staging_s=staging_s)

    def ended(self, progress: Progress) -> None:
        """No step is left, or none needed."""
        target, best = progress.target, progress.best
        if not self._metrics or target is None or best is None:
            return
        at = f"validation PSNR {best['psnr']:.2f} dB at step {best['step']}"
        if progress.reached:
            logger.info("%s: the target of %g dB is reached, the run is done", at, target)
        else:
            logger.warning("the target of %g dB was not reached; best %s", target, at)

    def passed(self, step: int) -> None:
        """A step is done; tells the log if nothing else has for a minute."""
        if self._metrics:
            self._pace.at(step)

    def trained(self, step: int, speed: dict[str, float], **values: Any) -> None:
        """Loss, gradient norm, learning rate and epoch at a step; `speed` is Stopwatch's report."""
        if not self._metrics:
            return
        values = {name: float(value) for name, value in values.items()}
        self._metrics.write("train", step, **values, **speed)
        steps = self._cfg.train.steps
        logger.info(
            "step %d/%d  loss %.5f  lr %.2e  %.1f samples/s  data wait %.1f %%  left %s",
            step,
            steps,
            values["loss"],
            values["lr"],
            speed["samples_per_s"],
            100 * speed["data_wait"],
            duration((steps - step) * speed["step_s"]),
        )
        self._pace.spoken()

    def validated(self, step: int, scores: dict[str, float], picture: Path | None = None) -> None:
        """The scores of `Validator.run`, and the picture that it drew."""
        if not self._metrics:
            return
        self._metrics.write("validation", step, **scores)
        if picture and picture.exists():
            self._metrics.show("validation/sample", step, picture)
        self._pace.spoken()
        logger.info(
            "step %d: validation PSNR %.2f dB, SSIM %.4f (bicubic %.2f dB, detail "
            "transfer %.2f dB)",
            step,
            scores["psnr"],
            scores["ssim"],
            scores["psnr_bicubic"],
            scores["psnr_detail"],
        )

    def reopen(self) -> None:
        """The run folder was deleted and made again: go on in new files."""
        if self._metrics:
            self._metrics.close()
            self._metrics = Metrics(self._cfg.run.dir, None)

    def close(self) -> None:
        """Flush everything; safe to call twice."""
        if self._metrics:
            self._metrics.close()
            self._metrics = None


class Metrics:
    """Lines of numbers, appended to metrics.jsonl and shown in TensorBoard; rank 0 only.

    On resume, lines beyond the checkpoint's step are dropped, so that a curve never runs twice
    over the same steps.
    """

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / "metrics.jsonl"
        if resumed_step is not None and self._path.exists():
            kept = kept_lines(self._path, resumed_step)
            write_atomic(self._path, lambda file: file.write(kept))
        self._warned = False
        self._file = self._path.open("a", buffering=1)
        self._board = SummaryWriter(
            str(folder / "tensorboard"),
            purge_step=None if resumed_step is None else resumed_step + 1,
        )

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line, on disk at once."""
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        record = {name: None if _not_finite(v) else v for name, v in record.items()}
        with self._going_on():
            self._file.write(json.dumps(record) + "\n")
        with self._going_on():
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def show(self, name: str, step: int, picture: Path) -> None:
        """A grey picture among TensorBoard's images."""
        with self._going_on(), Image.open(picture) as image:
            self._board.add_image(name, np.asarray(image.convert("L")), step, dataformats="HW")

    def close(self) -> None:
        """Flush everything."""
        with self._going_on():
            self._file.close()
        with self._going_on():
            self._board.close()

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """A full disk ends no training: lines wait for room, curves may have gaps."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                logger.warning("metrics cannot be written: %s", explain_os_error(error))
            self._warned = True


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)  # JSON has no NaN


def kept_lines(path: Path, step: int) -> bytes:
    """The lines of a metrics.jsonl up to that step, without those that a crash has torn."""
    lines = path.read_bytes().splitlines(keepends=True)
    return b"".join(line for line in lines if _step_of(line) <= step)


def _step_of(line: bytes) -> float:
    try:
        step = parse_json(line)["step"]
    except (ValueError, KeyError, TypeError):
        step = None
    return step if isinstance(step, (int, float)) else math.inf
