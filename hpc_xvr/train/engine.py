"""The trainer: one loop for every engine, device and number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hpc_xvr import checkpoint
from hpc_xvr.config import Config
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.corpus.staging import Staging
from hpc_xvr.data.samples.loader import training_batches
from hpc_xvr.data.samples.slots import slots_of_rank
from hpc_xvr.data.samples.training import TrainingSamples
from hpc_xvr.distributed.comm import Comm, host
from hpc_xvr.distributed.launch import cpu_threads, discover
from hpc_xvr.errors import CollectiveError, InputError
from hpc_xvr.factory.build import build_model
from hpc_xvr.factory.execution import prepare
from hpc_xvr.factory.weights import initial_weights
from hpc_xvr.log import logger
from hpc_xvr.train.meters import Metrics, Stopwatch, environment
from hpc_xvr.train.objective import l1
from hpc_xvr.train.optim import MovingAverage, adam, learning_rate
from hpc_xvr.train.run_folder import lock_run, mark_done, open_run, write_environment
from hpc_xvr.train.stopping import Stopping
from hpc_xvr.train.utilisation import Sampler, sum_up
from hpc_xvr.train.validation import Validator

SLOW_DISK = 50e6  # bytes/s; what --max-time reckons with until a disk proves slower


class Trainer:
    """Trains the model of a config on all ranks of `comm`; every rank makes one.

    Args:
        resume: continue from the newest valid checkpoint of the run folder, if there is one.
        stopping: what may ask this rank to stop; by default the signals.

    Raises:
        InputError: a config that does not fit the ranks, the corpus or the run folder.
    """

    def __init__(
        self, cfg: Config, comm: Comm, resume: bool = False, stopping: Stopping | None = None
    ) -> None:
        self.cfg, self.comm = cfg, comm
        self.stopping = stopping or Stopping()
        self._lock: IO[str] | None = None
        self.share, self.micro = comm.together(self._shares)
        threads = cfg.run.threads or cpu_threads(discover())
        torch.set_num_threads(threads)

        comm.on_root(lambda: _make_corpus(cfg))
        corpus = comm.together(lambda: Corpus(cfg.data.corpus))
        self.data = comm.together(
            lambda: TrainingSamples(
                corpus, cfg.data, cfg.model.output, cfg.train.global_batch, cfg.run.seed
            )
        )
        self.validator = comm.together(lambda: Validator(cfg, corpus, comm))
        self.model, self.precision = comm.together(self._new_model)
        if cfg.train.weights:  # before anything is written
            comm.on_root(lambda: _first_weights(cfg, build_model(cfg)))
        state = comm.on_root(lambda: self._open_run(resume))

        self.done = state["step"] if state else 0  # optimizer steps behind us
        self._now = self.done  # the step we are in, counted from 1
        self.best = state.get("best") if state else None  # step and PSNR of the best validation
        self._unvalidated = bool(state and state.get("unvalidated"))
        if cfg.data.stage_dir and self.done < cfg.train.steps:
            self._stage(corpus, cfg.data.stage_dir)
        self._build(state)
        self.writer = checkpoint.CheckpointWriter(
            cfg.run.dir / "checkpoints",
            cfg.checkpoint.keep,
            cfg.checkpoint.keep_every,
            cfg.checkpoint.failures,
        )
        size = 4 * sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.writer.slowest = size / SLOW_DISK  # at least, for all we know
        self.clock = Stopwatch(comm.device)
        # Steps without finite gradients: in a row, the longest row, all of them.
        self._bad, self._worst, self._skipped = torch.zeros(3, device=comm.device)
        self._reported = 0
        self._mfu: float | None = None  # of the last report
        self._summed = 0  # steps whose losses are in self._loss
        self._loss = torch.zeros((), dtype=self.dtype, device=comm.device)

        machine = environment(comm, threads)
        self.metrics: Metrics | None = None
        if comm.is_root:
            write_environment(cfg.run.dir, machine)
            self.metrics = Metrics(cfg.run.dir, self.done if resume else None)
            if self.done:
                self.metrics.write("event", self.done, text=f"resumed on {comm.size} ranks")
            self._announce(machine, corpus, threads)

    def _open_run(self, resume: bool) -> dict[str, Any] | None:
        self._lock = lock_run(self.cfg.run.dir)
        return open_run(self.cfg, resume, self.model)

    def _shares(self) -> tuple[int, int]:
        """Samples of this rank in a step, and of one of its micro-batches."""
        train, ranks = self.cfg.train, self.comm.size
        share = len(slots_of_rank(self.comm.rank, ranks, train.global_batch))
        micro = train.micro_batch or share
        if share % micro:
            raise InputError(
                f"train.micro_batch {micro} does not divide the {share} samples of a "
                f"rank (global_batch {train.global_batch} on {ranks} ranks)"
            )
        return share, micro

    def _new_model(self) -> tuple[nn.Module, str]:
        """The model with fresh weights, set up as the config says, and its precision."""
        torch.manual_seed(self.cfg.run.seed)
        model = build_model(self.cfg)
        return model, prepare(model, self.cfg, self.comm.device, training=True)

    def _stage(self, corpus: Corpus, folder: Path) -> None:
        """Copy what the ranks of this node will read to a disk of the node, each rank a part."""
        comm, train = self.comm, self.cfg.train
        hosts = comm.gather(host())
        here = [rank for rank, name in enumerate(hosts) if name == hosts[comm.rank]]
        slots = [s for r in here for s in slots_of_rank(r, comm.size, train.global_batch)]
        ids = self.data.videos_read(slots, self.done, train.steps - 1)
        staging = comm.together(lambda: Staging(corpus, ids, folder))
        comm.together(lambda: staging.copy(here.index(comm.rank), len(here)))
        corpus.read_copies(staging.folder)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.cfg.train.precision == "float64" else torch.float32

    def _build(self, state: dict[str, Any] | None) -> None:
        """Model, optimizer and averaged weights: rank 0's fresh ones, or the checkpoint's."""
        cfg, comm = self.cfg, self.comm
        if state is None:
            state = {"model": comm.on_root(lambda: _first_weights(cfg, self.model))}
        self.model.train()
        self.model.load_state_dict(state["model"])
        self.average = MovingAverage(self.model, cfg.optim.ema) if cfg.optim.ema else None
        if self.average and state.get("ema"):
            self.average.load(state["ema"])
        self.net, self.optimizer = comm.wrap(
            self.model, adam(self.model.parameters(), cfg.optim), self.share // self.micro
        )
        if "optimizer" in state:  # after wrapping: Horovod makes an optimizer of its own
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:  # what the config says now
                group.update(betas=cfg.optim.betas, weight_decay=cfg.optim.weight_decay)

    def _announce(self, machine: dict[str, Any], corpus: Corpus, threads: int) -> None:
        cfg, ranks = self.cfg, machine["ranks"]
        hosts = len({r["host"] for r in ranks})
        packed = cfg.dist.compression
        logger.info(
            "%s, %d rank(s) on %d node(s), %s, %d thread(s) a rank%s; global batch %d = "
            "%d rank(s) x %d micro-batch(es) x %d sample(s)",
            machine["engine"],
            len(ranks),
            hosts,
            ranks[0]["device"],
            threads,
            "" if packed == "none" or len(ranks) == 1 else f", gradients in {packed}",
            cfg.train.global_batch,
            len(ranks),
            self.share // self.micro,
            self.micro,
        )
        parameters = sum(p.numel() for p in self.model.parameters())
        logger.info(
            "%s: %s parameters, %.1f GFLOP a sample and step; %d training and %d "
            "validation recordings, %d steps an epoch",
            cfg.model.name,
            f"{parameters:,}",
            self.flops_per_sample / 1e9,
            len(corpus.split("train")),
            len(corpus.split("validation")),
            self.data.slots.steps_per_epoch,
        )

    @property
    def flops_per_sample(self) -> int:
        """Forward and backward pass, 2 per multiply-add."""
        side = self.cfg.data.patch // self.cfg.data.scale
        return 3 * self.model.flops(side, side)

    def run(self) -> bool:
        """Train to the last step. False: stopped before it, with a checkpoint."""
        self.stopping.listen()
        sampler = Sampler(self.comm, self.cfg.run.dir, self.cfg.run.utilisation_s)
        try:
            finished = self._run()
            if finished:  # after a signal there may be no time for it
                sampler.stop()
                self.comm.mark(None, "summing up")
                self.clock.reset()
                sum_up(self.comm, self.cfg.run.dir, self.clock.all, self._mfu, sampler.cost)
            self.comm.mark(None, "after training")  # where it failed stays known otherwise
            return finished
        except Exception:
            self.writer.wait(60)  # what is being written may be the last good one
            raise
        finally:
            sampler.stop()
            self.stopping.unlisten()

    def _run(self) -> bool:
        cfg = self.cfg
        batches = iter(
            training_batches(
                self.data,
                self.comm.rank,
                self.comm.size,
                self.done,
                cfg.train.steps,
                self.micro,
                pin_memory=self.comm.device.type == "cuda",
            )
        )
        if self._unvalidated:  # the last start was asked to stop before it could
            self._validate()
        self.comm.any_lagged(False)  # forget what an earlier run on these ranks was asked
        self.clock.reset()
        self.stopping.begin()
        while self.done < cfg.train.steps:
            self.train_step(self.done, self._wait_for(batches))
            self.done += 1
            self._check_finite()
            self.writer.check()
            last = self.done == cfg.train.steps
            if last or self.done % cfg.train.log_every == 0:
                self._log()
            stop = self.comm.any_lagged(self.stopping.asked(self.writer.slowest)) and not last
            self._unvalidated = last or self.done % cfg.validation.every == 0
            improved = self._unvalidated and not stop and self._validate()
            if stop or last or improved or self.done % cfg.checkpoint.every == 0:
                self.save()
            if stop:
                self.writer.finish()
                why = self.stopping.reason or "as another rank was asked to"
                logger.info("stopped %s, after step %d; --resume continues", why, self.done)
                return False
        self.writer.finish()
        self.comm.on_root(lambda: mark_done(cfg.run.dir, self.done))
        return True

    def train_step(self, step: int, micro_batches: Iterator[dict[str, Tensor]]) -> None:
        """One optimizer step; reads nothing back from the device."""
        device, parts = self.comm.device, self.share // self.micro
        self._now = step + 1
        # Stochastic depth is the only randomness left here: sampling draws its own.
        torch.manual_seed(hash((self.cfg.run.seed, step, self.comm.rank)) % 2**63)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                self.cfg.optim, step, self.cfg.train.steps, self.cfg.train.global_batch
            )
        self.optimizer.zero_grad()
        for part, batch in enumerate(micro_batches, 1):
            self._at("forward")
            batch = {k: v.to(device, self.dtype, non_blocking=True) for k, v in batch.items()}
            with self.comm.accumulate(self.net, last=part == parts):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    output = self.net(batch["lr"], batch["hr"], batch["hr_offset"])
                loss = l1(output, batch["target"]) / parts
                self._at("backward")
                loss.backward()
            self._loss += loss.detach()
        self._summed += 1
        self._at("gradients")
        self.comm.finish_gradients(self.optimizer)
        self._at("update")
        self._update()

    def _at(self, doing: str) -> None:
        """Note what this rank does now: for the clock, and for the watch over all ranks."""
        self.clock.enter(doing)
        self.comm.mark(self._now, doing)

    def _update(self) -> None:
        """Move the weights, unless a gradient is not finite: averaged gradients are the same on
        all ranks, so all of them skip, without asking each other."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(gradients)
        if self.cfg.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self.cfg.optim.clip_norm, self.norm
            )
        skip = (~torch.isfinite(self.norm)).float()
        self.optimizer.found_inf = skip  # fused Adam leaves everything as it is where this is 1
        self.comm.step(self.optimizer)
        self._bad = (self._bad + 1) * skip
        self._worst = torch.maximum(self._worst, self._bad)
        self._skipped = self._skipped + skip
        if self.average:
            self.average.update()

    def _wait_for(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """A step's micro-batches, with the time spent waiting for them on the clock."""
        for _ in range(self.share // self.micro):
            self._at("data")
            yield next(batches)

    def _check_finite(self) -> None:
        """Warn of skipped steps and give up after too many; looks only now and then on a GPU."""
        self.clock.steps += 1
        limit = self.cfg.train.nonfinite_limit
        if self.comm.device.type != "cpu" and self.done % min(self.cfg.train.log_every, limit):
            return
        skipped, worst = int(self._skipped), int(self._worst)
        if skipped > self._reported and self.comm.is_root:
            logger.warning(
                "step %d: gradients were not finite; skipped on all ranks, %d steps so far",
                self.done,
                skipped,
            )
        self._reported = skipped
        if worst >= limit:
            raise CollectiveError(
                f"step {self.done}: {worst} steps in a row without finite gradients; "
                "lower optim.lr, set optim.clip_norm, or check the corpus with "
                "hpc-xvr inspect --verify"
            )

    def _log(self) -> None:
        """Mean loss of all ranks since the last report, and where the time went."""
        self._at("logging")
        steps = self.clock.steps
        loss = self.comm.all_reduce(self._loss.double()) / self.comm.size / self._summed
        self._loss.zero_()
        self._summed = 0
        speed = self.clock.report(
            steps * self.cfg.train.global_batch, self.flops_per_sample, self.comm.size
        )
        self._mfu = speed.get("mfu")
        if not self.metrics:
            return
        values = {
            "loss": float(loss),
            "grad_norm": float(self.norm),
            "lr": self.optimizer.param_groups[0]["lr"],
            "epoch": self.done / self.data.slots.steps_per_epoch,
            **speed,
        }
        self.metrics.write("train", self.done, **values)
        left = int((self.cfg.train.steps - self.done) * speed["step_s"])
        logger.info(
            "step %d/%d  loss %.5f  lr %.2e  %.1f samples/s  data wait %.1f %%  left %d:%02d",
            self.done,
            self.cfg.train.steps,
            values["loss"],
            values["lr"],
            speed["samples_per_s"],
            100 * speed["data_wait"],
            *divmod(left, 60),
        )

    def _validate(self) -> bool:
        """Look at the validation recordings. Was it the best so far? The same on all ranks."""
        self._unvalidated = False
        if not self.validator.count:
            return False
        self._at("validation")
        weights = self.average.mean if self.average else dict(self.model.named_parameters())

        def predict(sample: dict[str, Tensor]) -> Tensor:
            parts = [sample[k].to(self.comm.device, self.dtype) for k in ("lr", "hr", "hr_offset")]
            with torch.autocast(
                self.comm.device.type, torch.bfloat16, enabled=self.precision == "bf16"
            ):
                return functional_call(self.model, weights, tuple(parts))

        self.model.eval()
        picture = self.cfg.run.dir / "samples" / f"step-{self.done:09d}.png"
        scores = self.validator.run(predict, picture if self.comm.is_root else None)
        self.model.train()
        if self.metrics:
            self.metrics.write("validation", self.done, **scores)
            logger.info(
                "step %d: validation PSNR %.2f dB, SSIM %.4f (bicubic %.2f dB, detail "
                "transfer %.2f dB)",
                self.done,
                scores["psnr"],
                scores["ssim"],
                scores["psnr_bicubic"],
                scores["psnr_detail"],
            )
        self.clock.reset()
        improved = scores["psnr"] > (self.best["psnr"] if self.best else -math.inf)
        if improved:
            self.best = {"step": self.done, "psnr": scores["psnr"]}
        return improved

    def save(self) -> None:
        """Checkpoint from rank 0, written while the run goes on."""
        if not self.comm.is_root:
            return
        self._at("saving")
        self.writer.save(
            {
                "format": "hpc_xvr checkpoint 1",
                "step": self.done,
                "model": self.model.state_dict(),
                "ema": dict(self.average.mean) if self.average else None,
                "optimizer": self.optimizer.state_dict(),
                "config": self.cfg.model_dump(mode="json"),
                "rng": torch.get_rng_state(),
                "best": self.best,
                "unvalidated": self._unvalidated,
                "versions": {"torch": str(torch.__version__)},
            },
            spared=[self.best["step"]] if self.best else (),
        )

    def close(self) -> None:
        """Close files and leave the run folder; safe to call twice."""
        if self._lock:
            self._lock.close()
            self._lock = None
        if self.metrics:
            self.metrics.close()
            self.metrics = None


def _first_weights(cfg: Config, model: nn.Module) -> dict[str, Tensor]:
    if cfg.train.weights:
        initial_weights(model, cfg.train.weights)
    return model.state_dict()


def _make_corpus(cfg: Config) -> None:
    """Simulate the corpus of a config that describes one, where it is not there yet."""
    if cfg.simulate and not Path(cfg.data.corpus).exists():
        from hpc_xvr.data.simulate.corpus import simulate_corpus

        logger.info("simulating %d recordings into %s", cfg.simulate.videos, cfg.data.corpus)
        simulate_corpus(cfg.simulate, cfg.data.corpus)
