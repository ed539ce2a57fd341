"""Regular look at held-out recordings while a run trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hpc_xvr.config import Config
from hpc_xvr.data.corpus import Corpus, DamagedVideo, Video
from hpc_xvr.data.samples.sample import Sample, key_frames, window_sample
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.errors import InputError
from hpc_xvr.files import write_atomic
from hpc_xvr.log import logger
from hpc_xvr.metrics import psnr, ssim
from hpc_xvr.model.bases import transfer_detail, transfer_matching_detail, upsample
from hpc_xvr.model.bayes import BayesianFusion


class Validator:
    """The same frames each time: spread over the validation recordings, dealt to the ranks."""

    def __init__(self, cfg: Config, corpus: Corpus, comm: Comm) -> None:
        self._cfg, self._comm = cfg, comm
        videos, gap, count = corpus.split("validation"), cfg.data.hr_gap, cfg.validation.frames
        if cfg.model.name == "key_propagation":
            # Whole gaps, as such a network makes all their frames at once.
            places = _spread(videos, gap, -(-count // (gap - 1)), per_gap=True)
            read = self._read_gap
        else:
            places = _spread(videos, gap, count)
            read = self._read_window
        samples = [self._unless_damaged(read, *place) for place in places[comm.rank :: comm.size]]
        self._mine = [sample for sample in samples if sample is not None]
        if not places and cfg.train.target_psnr is not None:
            raise InputError(
                f"train.target_psnr {cfg.train.target_psnr:g}: {cfg.data.corpus} has no validation "
                "recordings to measure it on; add some, or leave it out"
            )
        self.count = len(places)
        """Samples to validate on all ranks, damaged ones included."""
        self._references: dict[str, float] | None = None

    def _unless_damaged(
        self, read: Callable[[Video, int], Sample], video: Video, t: int
    ) -> Sample | None:
        """A batch of one; None if it is damaged and `data.damaged` is drop."""
        try:
            sample = read(video, t)
        except DamagedVideo as error:
            if self._cfg.data.damaged == "stop":
                raise
            logger.warning("%s; frame %d is not validated", error, t)
            return None
        return {name: torch.as_tensor(value)[None] for name, value in sample.items()}

    def _read_window(self, video: Video, t: int) -> Sample:
        """The sample of a frame. `low` are the low-resolution frames of the target's time."""
        data = self._cfg.data
        keys = key_frames(t, data.hr_gap, video.shape[0])
        y, x = self._middle(video)
        sample = window_sample(video, t, keys, data, "centre", y=y, x=x)
        half = data.lr_frames // 2
        return {**sample, "low": sample["lr"][half : half + 1]}

    def _read_gap(self, video: Video, t: int) -> Sample:
        """The sample of the gap around a frame; `hr_offset` is as of a window of all frames
        between."""
        data = self._cfg.data
        first, last = key_frames(t, data.hr_gap, video.shape[0])
        frames = last - first - 1
        window = data.model_copy(update={"lr_frames": 1})
        y, x = self._middle(video)
        of_frames = [
            window_sample(video, k, (first, last), window, "centre", y=y, x=x)
            for k in range(first, last + 1)
        ]
        low = torch.cat([sample["lr"] for sample in of_frames])
        centre = first + 1 + frames // 2
        return {
            "lr": low,
            "low": low[1:-1],
            "hr": of_frames[0]["hr"],
            "hr_offset": torch.tensor([first - centre, last - centre], dtype=torch.float32),
            "target": torch.cat([sample["target"] for sample in of_frames[1:-1]]),
        }

    def _middle(self, video: Video) -> tuple[slice, slice]:
        """Rows and columns of the part of the frames that is looked at."""
        side = self._cfg.validation.patch // self._cfg.data.scale * self._cfg.data.scale
        starts = [max(0, (n - side) // 2) // 4 * 4 for n in video.shape[1:]]
        y, x = (
            slice(start, start + min(side, n))
            for start, n in zip(starts, video.shape[1:], strict=True)
        )
        return y, x

    @torch.inference_mode()
    def run(self, predict: Callable[[Sample], Tensor], picture: Path | None) -> dict[str, float]:
        """Mean PSNR (dB) and SSIM of the frames on all ranks, and those to beat.

        `predict` gets a batch of one and returns (1, N_out, 1, H, W). Rank 0 writes `picture`.
        """
        scores, outputs = [], []
        for sample in self._mine:
            out, count = predict(sample), sample["target"].shape[1]
            first = (out.shape[1] - count) // 2  # a sequence's centre frame
            pictures = [_image(out[:, first + i]) for i in range(count)]
            truths = [_image(sample["target"][:, i]) for i in range(count)]
            scores += [(_psnr(a, b), ssim(a, b)) for a, b in zip(pictures, truths, strict=True)]
            outputs.append(pictures[count // 2])
        result = dict(zip(("psnr", "ssim", "frames"), self._mean(scores, 2), strict=True))
        if self._references is None:
            rows = [row for sample in self._mine for row in self._baselines(sample)]
            means = self._mean(rows, len(self._compared))
            self._references = {
                f"psnr_{name}": mean for name, mean in zip(self._compared, means, strict=False)
            }
        if picture and outputs:
            try:
                _draw(picture, self._mine[0], outputs[0])
            except InputError as problem:  # a full disk ends no training
                logger.warning("%s", problem)
        return {**result, **self._references}

    @property
    def _compared(self) -> list[str]:
        """Methods without learning that the network is to beat: its own base is one of them."""
        base = self._cfg.model.base
        return ["bicubic", "detail", *([base] if base in ("adaptive", "bayes") else [])]

    def _baselines(self, sample: Sample) -> list[tuple[float, ...]]:
        """PSNR of each of these methods, for each frame."""
        low, keys, offset = sample["low"], sample["hr"], sample["hr_offset"]
        make: dict[str, Callable[[], Tensor]] = {
            "bicubic": lambda: upsample(low, self._cfg.data.scale),
            "detail": lambda: transfer_detail(low, keys, offset),
            "adaptive": lambda: transfer_matching_detail(low, keys, offset),
            "bayes": lambda: BayesianFusion()(low, keys),
        }
        made = [make[name]() for name in self._compared]
        truths = [_image(truth) for truth in sample["target"].unbind(1)]
        return [
            tuple(_psnr(_image(frames[:, i]), truth) for frames in made)
            for i, truth in enumerate(truths)
        ]

    def _mean(self, rows: Sequence[tuple[float, ...]], columns: int) -> list[float]:
        """Means of columns over the rows of all ranks, and how many rows they have."""
        total = torch.zeros(columns + 1, dtype=torch.float64)
        for row in rows:
            total += torch.tensor([*row, 1.0], dtype=torch.float64)
        *sums, count = self._comm.all_reduce(total.to(self._comm.device)).tolist()
        return [*(value / max(count, 1) for value in sums), int(count)]


def _spread(
    videos: Iterable[Video], gap: int, count: int, per_gap: bool = False
) -> list[tuple[Video, int]]:
    """About `count` frames that are not key frames, evenly over recordings and times; `per_gap`:
    only the middle one of each gap."""
    wanted = {gap // 2} if per_gap else set(range(1, gap))
    candidates = [(v, t) for v in videos for t in range(v.shape[0] - 1) if t % gap in wanted]
    if len(candidates) <= count:
        return candidates
    return [candidates[i] for i in np.linspace(0, len(candidates) - 1, count).astype(int)]


def _psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """PSNR of at most 100 dB, so that one frame without motion does not hide all others."""
    return min(psnr(image, truth), 100.0)


def _image(frame: Tensor) -> np.ndarray:
    return frame.float().clamp(0, 1).cpu().numpy().squeeze()


def _draw(path: Path, sample: Sample, output: np.ndarray) -> None:
    """Low resolution (upsampled), reconstruction, truth and 4 x error, side by side."""
    scale = sample["hr"].shape[-1] // sample["lr"].shape[-1]
    middle = sample["target"].shape[1] // 2
    bicubic = _image(upsample(sample["low"], scale)[:, middle])
    truth = _image(sample["target"][:, middle])
    panels = [bicubic, output, truth, np.clip(4 * np.abs(output - truth), 0, 1)]
    strip = np.concatenate([np.pad(p, 2, constant_values=1) for p in panels], axis=1)
    image = Image.fromarray((strip * 255).astype(np.uint8))
    write_atomic(path, lambda file: image.save(file, format="PNG"))
