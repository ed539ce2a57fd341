"""Training samples made on the device: all frames of the train split lie in its memory, and a step
costs the host a few random numbers.

What a sample shows (frames, part, orientation, how noisy) is drawn as on the host, so samples are
the same to rounding, on any number of ranks. The noise itself is drawn by the device from (seed,
step, slot): as random as the host's, but not the same numbers.

Shapes: B samples of a micro-batch, n frames of each, P side of a patch, p = P / scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_xvr.data.degrade import CameraNoise
from hpc_xvr.data.samples.gaps import GapSamples
from hpc_xvr.data.samples.loader import training_batches
from hpc_xvr.data.samples.sample import Crop, Misfit, Sample
from hpc_xvr.data.samples.training import TrainingSamples
from hpc_xvr.errors import InputError

_SHARE = 0.5  # of the free memory that the frames may take
_NOISE = 5  # tag of the random stream of seeds: [seed, step, slot, _NOISE]
_MANY = 1e6  # photons above which their number is normally distributed for all we can tell


def batches_on_device(
    samples: TrainingSamples,
    device: torch.device,
    rank: int,
    world: int,
    start_step: int,
    steps: int,
    micro_batch: int | None = None,
) -> Iterator[Sample]:
    """As `training_batches`, but the micro-batches are made on `device`.

    Raises:
        InputError: the frames do not fit into its memory, or cannot be read; and what
            `training_batches` raises.
    """
    frames = DeviceFrames(samples, device)
    recipes: Any = Recipes(samples, frames.starts, frames.units)
    loader = training_batches(recipes, rank, world, start_step, steps, micro_batch)
    return (frames.develop(recipe) for recipe in loader)


class Recipes:
    """What the samples of a data set show, as small tensors; picklable.

    Args:
        starts, units: of each video, see `DeviceFrames`.
    """

    def __init__(self, samples: TrainingSamples, starts: np.ndarray, units: np.ndarray) -> None:
        self._samples, self._starts, self._units = samples, starts, units
        self.data, self.global_batch, self.path = samples.data, samples.global_batch, samples.path

    def __getitem__(self, index: tuple[int, int]) -> Sample:
        step, slot = index
        recipe = self._samples.draw(step, slot)
        video = self._samples.videos[recipe.video]
        _, height, width = video.shape
        times, noise = recipe.times, recipe.noise
        shown = np.array([*times.keys, *times.lr], np.int64)
        rows, columns = _places(recipe.crop, width)
        contrast, brightness = recipe.greys.contrast or (np.nan, np.nan)
        return {
            "frames": torch.from_numpy(self._starts[recipe.video] + shown * (height * width)),
            "rows": torch.from_numpy(rows),
            "columns": torch.from_numpy(columns),
            "unit": torch.tensor(self._units[recipe.video]),
            "hr_offset": torch.tensor(
                [(key - times.centre) / times.interval for key in times.keys], dtype=torch.float32
            ),
            "greys": torch.tensor(
                [float(recipe.greys.negative), contrast, brightness, recipe.greys.gamma or np.nan]
            ),
            "misfit": torch.tensor(_four(recipe.misfit)),
            "noise": torch.tensor([_noise(noise.lr), _noise(noise.hr)], dtype=torch.float64),
            "seed": torch.tensor(_seed([self._samples.seed, step, slot])),
        }


class DeviceFrames:
    """The frames of the train split, as stored, in one row in the memory of a device.

    Attributes:
        starts: where each video's first pixel lies in that row.
        units: intensity of each video's stored value 1.

    Raises:
        InputError: they do not fit, or cannot be read.
    """

    def __init__(self, samples: TrainingSamples, device: torch.device) -> None:
        self.device, self._data = device, samples.data
        self._gaps = isinstance(samples, GapSamples)
        half = samples.data.lr_frames // 2
        whole = slice(1, -1) if self._gaps else slice(None)  # of the frames the fast camera shows
        one = samples.output == "centre" and not self._gaps
        self._target = slice(half, half + 1) if one else whole
        videos = samples.videos
        counts = [int(np.prod(video.shape)) for video in videos]
        wide = any(video.dtype.itemsize > 1 for video in videos)
        self._check_room(sum(counts) * (2 if wide else 1), samples)
        self.starts = np.concatenate(([0], np.cumsum(counts)[:-1])).astype(np.int64)
        self.units = np.array([1 / (2**v.info.bit_depth - 1) for v in videos], np.float32)
        # torch cannot look up uint16 everywhere: the same bits as int16.
        self._stored = torch.empty(
            sum(counts), dtype=torch.int16 if wide else torch.uint8, device=device
        )
        for video, start, count in zip(videos, self.starts.tolist(), counts, strict=True):
            pixels = video.read(range(video.shape[0])).ravel()
            stored = pixels.astype(np.uint16).view(np.int16) if wide else pixels
            self._stored[start : start + count] = torch.from_numpy(stored)
        self._generator = torch.Generator(device)

    def _check_room(self, size: int, samples: TrainingSamples) -> None:
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = psutil.virtual_memory().available
        if size > _SHARE * free:
            raise InputError(
                f"data.on_device: the train recordings of {samples.path} take {size / 1e9:.1f} GB, "
                f"of {free / 1e9:.1f} GB that are free on {self.device} half may be used; set "
                "data.on_device to false"
            )

    def develop(self, recipe: Sample) -> Sample:
        """The micro-batch of a micro-batch of recipes, on the device; nothing is read back."""
        noise, seeds = recipe.pop("noise").tolist(), recipe.pop("seed").tolist()  # on the host
        plain = bool((recipe["greys"][:, 0] == 0).all() and recipe["greys"][:, 1:].isnan().all())
        aligned = bool((recipe["misfit"] == torch.tensor(_ALIGNED)).all())
        if self.device.type == "cuda":
            recipe = {name: part.pin_memory() for name, part in recipe.items()}
        r = {name: part.to(self.device, non_blocking=True) for name, part in recipe.items()}
        places = r["frames"][:, :, None, None] + (
            r["rows"][:, None, :, None] + r["columns"][:, None, None, :]
        )
        stored = self._stored[places]  # B, n, P, P
        bits = stored.int() & 0xFFFF if stored.dtype == torch.int16 else stored
        sharp = bits.float() * r["unit"][:, None, None, None]
        if not plain:
            sharp = regreyed(sharp, r["greys"])
        keys, shown = sharp[:, :2], sharp[:, 2:]
        seen = shown if aligned else moved(shown, r["misfit"])
        lr = F.avg_pool2d(seen, self._data.scale)
        if not aligned:
            gain, offset = r["misfit"][:, 2:, None, None, None].unbind(1)
            lr = (lr * gain + offset).clamp(0, 1)
        lr, hr = self._noisy(lr, keys, noise, seeds)
        batch = {"lr": lr, "hr": hr, "target": shown[:, self._target].contiguous()}
        batch = {name: frames[:, :, None] for name, frames in batch.items()}
        return batch if self._gaps else batch | {"hr_offset": r["hr_offset"]}

    def _noisy(
        self, lr: Tensor, hr: Tensor, noise: Sequence[Sequence[Sequence[float]]], seeds: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Both cameras' frames (B, n, h, w) with each sample's own noise."""
        pixels = lr[0].numel(), hr[0].numel()
        frames = torch.cat((lr.flatten(1), hr.flatten(1)), dim=1)  # B, all pixels of a sample
        frames = noisy(frames, pixels, noise, self._draw, seeds)
        made_lr, made_hr = frames.split(pixels, dim=1)
        return made_lr.reshape(lr.shape), made_hr.reshape(hr.shape)

    def _draw(self, seed: int) -> torch.Generator:
        return self._generator.manual_seed(seed)


def regreyed(frames: Tensor, greys: Tensor) -> Tensor:
    """`Greys.apply` of each sample: (B, n, P, P), the first two of the n being copies of others;
    greys (B, 4): negative, contrast, brightness, exponent, NaN where there is none."""
    negative, contrast, brightness, gamma = greys[:, :, None, None, None].unbind(1)
    frames = torch.where(negative > 0, 1 - frames, frames)

    def over(how: str, x: Tensor) -> Tensor:
        return getattr(x[:, 2:].flatten(1), how)(1)[:, None, None, None]

    reach = (over("amax", frames) - over("amin", frames)).clamp(min=1e-3)
    factor = torch.minimum(contrast, 1 / reach)
    other = (frames - over("mean", frames)) * factor + brightness
    other = other - (over("amax", other) - 1).clamp(min=0)
    other = other - over("amin", other).clamp(max=0)
    frames = torch.where(contrast.isnan(), frames, other).clamp(0, 1)
    return torch.where(gamma.isnan(), frames, frames**gamma)


def moved(frames: Tensor, misfit: Tensor) -> Tensor:
    """`degrade.shifted` of each sample: (B, n, P, P), misfit (B, 4) of which the first two are
    the shift of rows and columns in pixels."""
    side = frames.shape[-1]
    for axis, shift in ((2, misfit[:, 0]), (3, misfit[:, 1])):
        whole = shift.floor()
        share = (shift - whole)[:, None, None, None]
        at = torch.arange(side, device=frames.device) + whole.long()[:, None]  # B, P
        shape = (-1, 1, side, 1) if axis == 2 else (-1, 1, 1, side)
        near, far = (
            frames.gather(axis, (at + k).clamp(0, side - 1).view(shape).expand_as(frames))
            for k in (0, 1)
        )
        frames = near * (1 - share) + far * share
    return frames


def noisy(
    frames: Tensor,
    pixels: tuple[int, int],
    noise: Sequence[Sequence[Sequence[float]]],
    generator: Callable[[int], torch.Generator],
    seeds: Sequence[int],
) -> Tensor:
    """`CameraNoise.apply` without a fixed pattern, of each sample of a micro-batch.

    All that depends on no random number is done for the whole batch: a launch for each sample and
    camera would take a GPU longer than its training step.

    Args:
        frames: (B, all pixels of a sample): first those of the fast camera, then the sharp one's.
        pixels: how many are whose.
        noise: of each sample and camera the photons (0: no photon noise) and the read noise.
        generator: gives one that begins at a sample's seed.
    """
    device = frames.device
    of_camera = torch.tensor(noise, dtype=torch.float32)  # B, 2, 2
    some_photons, some_read = (bool((of_camera[:, :, i] > 0).any()) for i in (0, 1))
    many = (of_camera[:, :, 0] > _MANY).any(1).tolist()
    if device.type == "cuda":
        of_camera = of_camera.pin_memory()
    of_camera = of_camera.to(device, non_blocking=True)
    photons, read = (
        torch.cat([of_camera[:, k, i, None].expand(-1, pixels[k]) for k in (0, 1)], dim=1)
        for i in (0, 1)
    )
    counts, normal, reading = [], [], []
    expected = frames * photons
    few = expected.clamp(max=_MANY)
    for i, seed in enumerate(seeds):
        g = generator(seed)
        if some_photons:
            counts.append(torch.poisson(few[i], g))
            normal.append(torch.empty_like(few[i]).normal_(generator=g) if many[i] else few[i])
        if some_read:
            reading.append(torch.empty_like(few[i]).normal_(generator=g))
    if some_photons:
        spread = expected + expected.sqrt() * torch.stack(normal)
        counted = torch.where(expected > _MANY, spread, torch.stack(counts))
        frames = torch.where(photons > 0, (counted / photons).clamp(0, 1), frames)
    if some_read:
        frames = torch.where(read > 0, (frames + read * torch.stack(reading)).clamp(0, 1), frames)
    return frames


def _places(crop: Crop, width: int) -> tuple[np.ndarray, np.ndarray]:
    """What each row and each column of a patch adds to the place of a pixel in its frame: (P,)."""
    rows, columns, transpose = crop.flips
    y = np.arange(crop.y.start, crop.y.stop, dtype=np.int64)[:: -1 if rows else 1] * width
    x = np.arange(crop.x.start, crop.x.stop, dtype=np.int64)[:: -1 if columns else 1]
    places = (x, y) if transpose else (y, x)
    return places[0].copy(), places[1].copy()


def _four(misfit: Misfit) -> list[float]:
    return [*misfit.shift, misfit.gain, misfit.offset]


_ALIGNED = _four(Misfit())


def _noise(noise: CameraNoise) -> tuple[float, float]:
    return noise.photons or 0.0, noise.read_noise


def _seed(words: list[int]) -> int:
    state = np.random.SeedSequence([*words, _NOISE]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
