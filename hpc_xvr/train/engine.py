"""The trainer: one loop for every engine, device and number of ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from hpc_xvr import checkpoint
from hpc_xvr.config import Config
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.corpus.staging import Staging
from hpc_xvr.data.samples.loader import training_batches
from hpc_xvr.data.samples.on_device import batches_on_device
from hpc_xvr.data.samples.slots import slots_of_rank
from hpc_xvr.distributed.comm import Comm, host
from hpc_xvr.factory.build import build_model
from hpc_xvr.factory.execution import use_threads
from hpc_xvr.factory.weights import initial_weights
from hpc_xvr.log import logger
from hpc_xvr.train.learner import Learner, check_graphs, new_model
from hpc_xvr.train.meters import MeanLoss, Stopwatch, environment
from hpc_xvr.train.optim import learning_rate
from hpc_xvr.train.progress import Progress
from hpc_xvr.train.reporting import Reporter
from hpc_xvr.train.run_folder import (
    is_intact,
    lock_run,
    mark_done,
    open_run,
    restore,
    write_environment,
)
from hpc_xvr.train.share import Share
from hpc_xvr.train.stopping import Stopping
from hpc_xvr.train.task import Batch, task_of
from hpc_xvr.train.utilisation import Sampler, sum_up
from hpc_xvr.train.validation import Validator

SLOW_DISK = 50e6  # bytes/s; what --max-time reckons with until a disk proves slower


class Trainer:
    """Trains the model of a config on all ranks of `comm`; every rank makes one.

    Making it reads the corpus and opens the run folder; it writes nowhere else.

    Args:
        resume: continue from the newest valid checkpoint of the run folder, if there is one.
        strict: not if the training recordings, or settings, are others than they were.
        stopping: what may ask this rank to stop; by default the signals.

    Raises:
        InputError: a config that does not fit the ranks, the corpus or the run folder.
    """

    def __init__(
        self,
        cfg: Config,
        comm: Comm,
        resume: bool = False,
        stopping: Stopping | None = None,
        strict: bool = False,
    ) -> None:
        self._made, self._staging_s = time.monotonic(), 0.0
        self.cfg, self.comm = cfg, comm
        self.stopping = stopping or Stopping()
        self.share = comm.together(lambda: Share.of(cfg.train, comm.rank, comm.size))
        threads = comm.together(lambda: use_threads(cfg.run.threads))

        self.corpus = comm.together(lambda: Corpus(cfg.data.corpus))
        self.task = task_of(cfg)
        self.samples = comm.together(lambda: self.task.samples(self.corpus))
        self.validator = comm.together(lambda: Validator(cfg, self.corpus, comm))
        model, precision = comm.together(lambda: new_model(cfg, comm.device))
        if cfg.train.weights:  # before anything is written
            weights = cfg.train.weights
            comm.on_root(lambda: initial_weights(build_model(cfg), weights))
        if cfg.train.graphs:
            comm.together(lambda: check_graphs(comm))

        self._held = ExitStack()  # the run folder's lock and files
        self._recordings = self.samples.summary() if comm.is_root else None
        state = comm.on_root(lambda: self._open_folder(resume, model, strict))
        self.progress = Progress.of(state, cfg.train.steps, cfg.train.target_psnr)
        parts = self.share.micro_batches
        self.learner = Learner(model, precision, cfg, comm, self.task, parts, state)
        self.checkpoints = self._checkpoint_writer()
        self.clock = Stopwatch(comm.device)
        self.loss = MeanLoss(self.learner.dtype, comm)
        self._machine = environment(comm, threads)
        self.reporter = self._start_report(self._machine, resume)

    def _open_folder(
        self, resume: bool, model: torch.nn.Module, strict: bool
    ) -> dict[str, Any] | None:
        """Take the run folder; the state to continue from. Rank 0 calls it."""
        self._lock()
        return open_run(self.cfg, resume, model, self._recordings, strict)

    def _lock(self) -> None:
        lock = lock_run(self.cfg.run.dir)
        if lock is not None:
            self._held.enter_context(lock)

    def _checkpoint_writer(self) -> checkpoint.CheckpointWriter:
        cfg = self.cfg.checkpoint
        folder = self.cfg.run.dir / "checkpoints"
        writer = checkpoint.CheckpointWriter(folder, cfg.keep, cfg.keep_every, cfg.failures)
        size = 4 * sum(p.numel() * p.element_size() for p in self.learner.model.parameters())
        writer.slowest = size / SLOW_DISK  # at least, for all we know
        return writer

    def _start_report(self, machine: dict[str, Any], resume: bool) -> Reporter:
        cfg, comm, step = self.cfg, self.comm, self.progress.step
        if comm.is_root:
            write_environment(cfg.run.dir, machine)
        reporter = Reporter(cfg, comm.is_root, step if resume else None)
        self._held.callback(reporter.close)
        if step:
            reporter.resumed(step, comm.size)
        reporter.started(
            machine,
            self.share,
            sum(p.numel() for p in self.learner.model.parameters()),
            self.flops_per_sample,
            (len(self.samples.videos), len(self.corpus.split("validation"))),
            self.samples.slots.steps_per_epoch,
        )
        return reporter

    @property
    def flops_per_sample(self) -> int:
        """Forward and backward pass, 2 per multiply-add."""
        return self.task.flops(self.learner.model)

    def run(self) -> bool:
        """Train to the last step, or the target. False: stopped before it, with a checkpoint."""
        began = time.monotonic()
        self.stage()
        self._staging_s = time.monotonic() - began
        self.stopping.listen()
        first = self.progress.step
        sampler = Sampler(self.comm, self.cfg.run.dir, self.cfg.run.utilisation_s)
        try:
            finished = self._train()
            if finished:  # after a signal there may be no time for it
                sampler.stop()
                self.comm.mark(None, "summing up")
                self.clock.reset()
                samples = (self.progress.step - first) * self.cfg.train.global_batch
                sum_up(
                    self.comm,
                    self.cfg.run.dir,
                    self.clock.all,
                    self.clock.mfu,
                    sampler.cost,
                    sampler.energy,
                    samples,
                )
            self.comm.mark(None, "after training")  # where it failed stays known otherwise
            return finished
        except Exception:
            self.checkpoints.wait(60)  # what is being written may be the last good one
            raise
        finally:
            sampler.stop()
            self.stopping.unlisten()

    def _train(self) -> bool:
        cfg, progress = self.cfg, self.progress
        batches = self.batches()
        if progress.unvalidated and self._validate() and progress.finished:
            self.save()  # it is the best one
        self.comm.any_lagged(False)  # forget what an earlier run on these ranks was asked
        self.clock.reset()
        self.stopping.begin()
        self.reporter.begins(progress.step, time.monotonic() - self._made, self._staging_s)
        while not progress.finished:
            self.train_step(progress.step, batches)
            progress.step += 1
            self.learner.skipped.check(progress.step)
            self.checkpoints.check()
            restored = False
            if progress.due(cfg.train.log_every):
                restored = self._restore_folder()
                self._log()
            self.reporter.passed(progress.step)
            stop = self._asked_to_stop()
            progress.unvalidated = progress.due(cfg.validation.every)
            improved = progress.unvalidated and not stop and self._validate()
            if stop or improved or restored or progress.due(cfg.checkpoint.every):
                self.save()
            if stop:
                return self._leave()
        self.checkpoints.finish()
        self.reporter.ended(progress)
        target = progress.target if progress.reached else None
        self.comm.on_root(lambda: mark_done(cfg.run.dir, progress.step, target))
        return True

    def train_step(self, step: int, batches: Iterator[Batch]) -> None:
        """One optimizer step on the next micro-batches; reads nothing back from the device.

        `step` counts from 0.
        """
        cfg, learner, parts = self.cfg, self.learner, self.share.micro_batches
        enter = partial(self._enter, step + 1)
        # Stochastic depth is the only randomness left here: sampling draws its own.
        torch.manual_seed(hash((cfg.run.seed, step, self.comm.rank)) % 2**63)
        rate = learning_rate(cfg.optim, step, cfg.train.steps, cfg.train.global_batch)
        learner.begin_step(rate)
        for part in range(1, parts + 1):
            enter("data")
            batch = next(batches)
            enter("forward")
            batch = learner.to_device(batch)
            with self.comm.accumulate(learner.net, last=part == parts):
                self.loss.add(learner.backward(batch, enter))
        self.loss.end_step()
        enter("gradients")
        self.comm.finish_gradients(learner.optimizer)
        enter("update")
        learner.update()
        self.clock.steps += 1

    def _enter(self, step: int, doing: str) -> None:
        """Note what this rank does now: for the clock, and for the watch over all ranks."""
        self.clock.enter(doing)
        self.comm.mark(step, doing)

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches of all steps that are left."""
        comm, progress = self.comm, self.progress
        share = (comm.rank, comm.size, progress.step, progress.steps, self.share.micro)
        if self.cfg.data.on_device:
            return comm.together(lambda: batches_on_device(self.samples, comm.device, *share))
        pinned = comm.device.type == "cuda"
        return iter(training_batches(self.samples, *share, pin_memory=pinned))

    # What happens once in a while.

    def stage(self) -> None:
        """Copy what the ranks of this node will read to a disk of the node, each rank a part."""
        comm, folder, batch = self.comm, self.cfg.data.stage_dir, self.cfg.train.global_batch
        if not folder or self.progress.finished:
            return
        hosts = comm.gather(host())
        here = [rank for rank, name in enumerate(hosts) if name == hosts[comm.rank]]
        slots = [s for rank in here for s in slots_of_rank(rank, comm.size, batch)]
        ids = self.samples.videos_read(slots, self.progress.step, self.progress.steps - 1)
        staging = comm.together(lambda: Staging(self.corpus, ids, folder))
        comm.together(lambda: staging.copy(here.index(comm.rank), len(here)))
        self.corpus.read_copies(staging.folder)

    def _asked_to_stop(self) -> bool:
        """Was any rank asked to, a step ago? Not after the last step: it ends by itself."""
        asked = self.stopping.asked(self.checkpoints.slowest)
        return self.comm.any_lagged(asked) and not self.progress.finished

    def _leave(self) -> bool:
        """Stop before the last step, once the checkpoint is on disk."""
        self.checkpoints.finish()
        why = self.stopping.reason or "as another rank was asked to"
        logger.info("stopped %s, after step %d; --resume continues", why, self.progress.step)
        return False

    def _restore_folder(self) -> bool:
        """Was the run folder deleted? Rank 0 makes it again."""
        folder = self.cfg.run.dir
        if not self.comm.is_root or is_intact(folder):
            return False
        restore(self.cfg, self._machine, self.progress.step)
        self._lock()
        self.reporter.reopen()
        return True

    def _log(self) -> None:
        """Mean loss of all ranks since the last report, and where the time went."""
        step = self.progress.step
        self._enter(step, "logging")
        loss = self.loss.take()
        speed = self.clock.report(
            self.cfg.train.global_batch, self.flops_per_sample, self.comm.size
        )
        self.reporter.trained(
            step,
            speed,
            loss=loss,
            grad_norm=self.learner.norm,
            lr=self.learner.optimizer.param_groups[0]["lr"],
            epoch=step / self.samples.slots.steps_per_epoch,
        )

    def _validate(self) -> bool:
        """Look at the validation recordings. Was it the best so far? The same on all ranks."""
        step, folder = self.progress.step, self.cfg.run.dir / "samples"
        self.progress.unvalidated = False
        if not self.validator.count:
            return False
        self._enter(step, "validation")
        picture = folder / f"step-{step:09d}.png" if self.comm.is_root else None
        with self.learner.predicting() as predict:
            scores = self.validator.run(predict, picture)
        self.reporter.validated(step, scores, picture)
        self.clock.reset()
        return self.progress.improves(scores["psnr"])

    def save(self) -> None:
        """Checkpoint from rank 0, written while the run goes on."""
        if not self.comm.is_root:
            return
        progress = self.progress
        self._enter(progress.step, "saving")
        self.checkpoints.save(
            {
                "format": "hpc_xvr checkpoint 1",
                "step": progress.step,
                **self.learner.state(),
                "config": self.cfg.model_dump(mode="json"),
                "rng": torch.get_rng_state(),
                "recordings": self._recordings,
                "best": progress.best,
                "unvalidated": progress.unvalidated,
                "versions": {"torch": str(torch.__version__)},
            },
            spared=[progress.best["step"]] if progress.best else (),
        )

    def close(self) -> None:
        """Close files and leave the run folder; safe to call twice."""
        self._held.close()
