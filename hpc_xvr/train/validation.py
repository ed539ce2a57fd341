"""Regular look at held-out recordings while a run trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from hpc_xvr.model.bases import transfer_detail, upsample


class Validator:
    """The same frames each time: spread over the validation recordings, dealt to the ranks."""

    def __init__(self, cfg: Config, corpus: Corpus, comm: Comm) -> None:
        self._cfg, self._comm = cfg, comm
        frames = _spread(corpus.split("validation"), cfg.data.hr_gap, cfg.validation.frames)
        samples = [self._read(video, t) for video, t in frames[comm.rank :: comm.size]]
        self._mine = [sample for sample in samples if sample is not None]
        self.count = len(frames)
        """Frames to validate on all ranks, damaged ones included."""
        self._references: dict[str, float] | None = None

    def _read(self, video: Video, t: int) -> Sample | None:
        """The sample of a frame; None if it is damaged and `data.damaged` is drop."""
        side = self._cfg.validation.patch // self._cfg.data.scale * self._cfg.data.scale
        _, height, width = video.shape
        y, x = (slice(max(0, (n - side) // 2) // 4 * 4, None) for n in (height, width))
        y, x = (slice(s.start, s.start + min(side, n)) for s, n in ((y, height), (x, width)))
        keys = key_frames(t, self._cfg.data.hr_gap, video.shape[0])
        try:
            sample = window_sample(video, t, keys, self._cfg.data, "centre", y=y, x=x)
        except DamagedVideo as error:
            if self._cfg.data.damaged == "stop":
                raise
            logger.warning("%s; frame %d is not validated", error, t)
            return None
        return {name: torch.as_tensor(value)[None] for name, value in sample.items()}

    @torch.inference_mode()
    def run(self, predict: Callable[[Sample], Tensor], picture: Path | None) -> dict[str, float]:
        """Mean PSNR (dB) and SSIM of the centre frames on all ranks, and those to beat.

        `predict` gets a batch of one and returns (1, N_out, 1, H, W). Rank 0 writes `picture`.
        """
        scores, outputs = [], []
        for sample in self._mine:
            out = predict(sample)
            outputs.append(_image(out[:, out.shape[1] // 2]))
            truth = _image(sample["target"][:, 0])
            scores.append((_psnr(outputs[-1], truth), ssim(outputs[-1], truth)))
        result = dict(zip(("psnr", "ssim", "frames"), self._mean(scores), strict=True))
        if self._references is None:
            self._references = dict(
                zip(
                    ("psnr_bicubic", "psnr_detail"),
                    self._mean([self._baselines(sample) for sample in self._mine])[:2],
                    strict=True,
                )
            )
        if picture and outputs:
            try:
                _draw(picture, self._mine[0], outputs[0])
            except InputError as problem:  # a full disk ends no training
                logger.warning("%s", problem)
        return {**result, **self._references}

    def _baselines(self, sample: Sample) -> tuple[float, float]:
        centre = sample["lr"].shape[1] // 2
        truth = _image(sample["target"][:, 0])
        bicubic = upsample(sample["lr"], self._cfg.data.scale)[:, centre]
        detail = transfer_detail(sample["lr"], sample["hr"], sample["hr_offset"])[:, centre]
        return _psnr(_image(bicubic), truth), _psnr(_image(detail), truth)

    def _mean(self, rows: list[tuple[float, float]]) -> list[float]:
        """Means of two columns over the rows of all ranks, and how many rows they have."""
        total = torch.tensor([(*row, 1.0) for row in rows], dtype=torch.float64).reshape(-1, 3)
        a, b, count = self._comm.all_reduce(total.sum(0).to(self._comm.device)).tolist()
        return [a / max(count, 1), b / max(count, 1), int(count)]


def _spread(videos: Iterable[Video], gap: int, count: int) -> list[tuple[Video, int]]:
    """About `count` frames that are not key frames, evenly over recordings and times."""
    candidates = [(v, t) for v in videos for t in range(v.shape[0] - 1) if t % gap]
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
    bicubic = _image(upsample(sample["lr"], scale)[:, sample["lr"].shape[1] // 2])
    truth = _image(sample["target"][:, 0])
    panels = [bicubic, output, truth, np.clip(4 * np.abs(output - truth), 0, 1)]
    strip = np.concatenate([np.pad(p, 2, constant_values=1) for p in panels], axis=1)
    image = Image.fromarray((strip * 255).astype(np.uint8))
    write_atomic(path, lambda file: image.save(file, format="PNG"))
