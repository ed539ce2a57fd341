"""Weights adapted to one recording: its own key frames are the truth to learn from.

Each key frame lies between two others, so a network can be shown these and the fast frames of both
gaps, and asked for the key frame in the middle. Some key frames are never learned from: only if the
network gets better at these, its new weights are kept.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hpc_xvr import metrics
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger, progress_bar
from hpc_xvr.model.key_propagation import KeyPropagation
from hpc_xvr.reconstruction.material import Material
from hpc_xvr.reconstruction.methods import NamedMethod, model_entry
from hpc_xvr.reconstruction.tiles import whole_windows
from hpc_xvr.train.objective import carried, charbonnier

MARGIN = 0.05
"""Gain (dB) on the key frames held back below which the old weights stay."""
HELD_BACK = 4
"""Key frames that are held back, at most."""
BATCH = 4
SIDE = 64
"""Side of the crops that are learned from, in sharp pixels."""
RATE = 1e-4
"""Learning rate at its peak."""
WARMUP = 10
CARRIED_WEIGHT = 0.1
LOOK_EVERY = 20
"""Steps between two looks at the key frames held back."""
MEMORY = 2**30
"""Bytes of frames to learn from that are kept, about; the others are read again."""


@dataclass(frozen=True)
class Adapted:
    """What came of it."""

    method: NamedMethod
    """With the new weights, or with the old ones where these are better."""
    state: dict[str, Tensor]
    """Its weights."""
    before: float
    """PSNR (dB) of the key frames held back, with the old weights."""
    after: float
    """The same with the weights that were kept."""
    steps: int
    """Optimizer steps up to these; 0: the old ones."""

    def told(self) -> str:
        """In a sentence."""
        if not self.steps:
            return (
                f"no gain of {MARGIN:g} dB or more on the key frames held back "
                f"({self.before:.2f} dB): the weights are unchanged"
            )
        gain = self.after - self.before
        return (
            f"{self.before:.2f} -> {self.after:.2f} dB ({gain:+.2f}) on the key frames held back, "
            f"each made from its neighbours at twice the gap, after {self.steps} steps"
        )


@dataclass(frozen=True)
class Triple:
    """A key frame between two others, and the fast frames from the first to the last of them."""

    lr: np.ndarray
    """T, h, w"""
    keys: np.ndarray
    """2, H, W: before and after."""
    truth: np.ndarray
    """H, W: the one between."""
    place: int
    """Of the truth among the T - 2 frames between the others."""

    @property
    def here(self) -> slice:
        """The same as a slice."""
        return slice(self.place, self.place + 1)


class Triples:
    """Triples of a recording, read when they are needed; some are kept.

    Args:
        times: of the three key frames of each.
        memory: bytes of those that are kept.
    """

    def __init__(
        self, material: Material, times: Sequence[tuple[int, int, int]], memory: int = MEMORY
    ) -> None:
        self._material, self._times = material, times
        _, h, w = material.lr.shape
        height, width = material.keys.shape
        one = 4 * ((self.longest_gap + 1) * h * w + 3 * height * width)
        self._kept = lru_cache(max(1, memory // one))(self._read)

    @property
    def longest_gap(self) -> int:
        """From the first to the last key frame of a triple."""
        return max(last - first for first, _, last in self._times)

    def __len__(self) -> int:
        return len(self._times)

    def __getitem__(self, i: int) -> Triple:
        return self._kept(*self._times[i])

    def __iter__(self) -> Iterator[Triple]:
        return (self[i] for i in range(len(self)))

    def _read(self, first: int, between: int, last: int) -> Triple:
        lr, keys = self._material.lr, self._material.keys
        return Triple(
            np.stack([lr[t] for t in range(first, last + 1)]).astype(np.float32, copy=False),
            np.stack([keys[first], keys[last]]).astype(np.float32, copy=False),
            np.asarray(keys[between], np.float32),
            between - first - 1,
        )


def adapt(
    method: NamedMethod,
    material: Material,
    *,
    steps: int = 120,
    minutes: float = 3.0,
    seed: int = 0,
) -> Adapted:
    """Fine-tune a model on a recording.

    Args:
        method: one of `key_propagation`; it is left as it is. If it works in tiles, key frames
            that are held back are made in them.
        material: the streams of both cameras.
        steps: optimizer steps at most.
        minutes: no further step is begun after this time; a last look at the key frames held back
            follows.
        seed: of the crops.

    Raises:
        InputError: fewer than four key frames, or a method that cannot be adapted.
    """
    model = method.network
    if not isinstance(model, KeyPropagation):
        raise InputError(
            f"adapt: {method.name} is {method.title}; only weights of key_propagation can be "
            "adapted, such as builtin"
        )
    side = None
    if method.tile:
        side = whole_windows(method.name, model, method.tile) // model.scale
    end = time.monotonic() + 60 * minutes
    learned, held = _triples(material)
    for t in material.keys:  # those that show nothing are refused before minutes of work
        _ = material.keys[t]
    widest = held.longest_gap
    if method.longest_gap is not None and widest > method.longest_gap:
        logger.warning(
            "adapt: key frames are made at twice the gap, from others %d frames apart, %s was "
            "trained for %d: less may be gained than with shorter gaps",
            *(widest, method.name, method.longest_gap),
        )
    logger.info(
        "adapt: %d key frames to learn from, %d held back to tell whether it helps",
        len(learned),
        len(held),
    )
    bf16 = method.precision == "bf16"
    best = {name: value.clone() for name, value in model.state_dict().items()}
    before = after = _score(model, held, bf16, side)
    kept, student = 0, copy.deepcopy(model)
    optimizer = torch.optim.Adam(student.parameters(), lr=RATE, betas=(0.9, 0.99))
    rng = np.random.default_rng(seed)
    with progress_bar("adapt", steps, "steps") as advance:
        for step in range(1, steps + 1):
            rate = RATE * min(1.0, step / WARMUP) * (1 - 0.9 * step / steps)
            optimizer.param_groups[0]["lr"] = rate
            triple = learned[int(rng.integers(len(learned)))]
            _learn(student.train(), optimizer, triple, rng, bf16)
            advance(1)
            late = time.monotonic() > end
            if step % LOOK_EVERY == 0 or step == steps or late:
                now = _score(student.eval(), held, bf16, side)
                logger.info("adapt: step %d of %d, %+.2f dB", step, steps, now - before)
                if now > after and now >= before + MARGIN:
                    after, kept = now, step
                    best = {k: v.clone() for k, v in student.state_dict().items()}
            if late and step < steps:
                logger.warning("adapt: stopped after %d of %d steps, by the time", step, steps)
                break
    student.load_state_dict(best)
    entry = model_entry(method.name, student.eval(), method.precision)
    adapted = replace(entry, config=method.config, step=method.step)
    return Adapted(adapted, best, before, after, kept)


def _triples(material: Material) -> tuple[Triples, Triples]:
    """To learn from, and held back: every third, at most HELD_BACK, spread over the recording."""
    times = sorted(material.keys)
    whole = [(a, b, c) for (a, b), (_, c) in pairwise(pairwise(times))]
    if len(whole) < 2:
        raise InputError(
            f"adapt: the recording has {len(times)} key frames; at least 4 are needed, as some are "
            "learned from and others tell whether it helped. Reconstruct without adapting"
        )
    middle = list(range(1, len(whole), 3))
    chosen = {middle[i] for i in np.linspace(0, len(middle) - 1, HELD_BACK).round().astype(int)}

    learned = [times for i, times in enumerate(whole) if i not in chosen]
    return Triples(material, learned), Triples(material, [whole[i] for i in sorted(chosen)])


def _learn(
    model: KeyPropagation,
    optimizer: torch.optim.Optimizer,
    triple: Triple,
    rng: np.random.Generator,
    bf16: bool,
) -> None:
    """A step on random crops of a triple, mirrored, turned and reversed in time."""
    crops = [_crop(triple, model.scale, rng) for _ in range(BATCH)]
    if rng.random() < 0.5:
        crops = [Triple(c.lr[::-1], c.keys[::-1], c.truth, len(c.lr) - 3 - c.place) for c in crops]
    device = next(model.parameters()).device
    lr, keys, truth = (
        torch.from_numpy(np.ascontiguousarray(np.stack(arrays), np.float32)).to(device)
        for arrays in zip(*((c.lr, c.keys, c.truth) for c in crops), strict=True)
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        out = model(lr[:, :, None], keys[:, :, None], only=crops[0].here)
    target = truth[:, None, None]
    loss = charbonnier(out.frames, target) + CARRIED_WEIGHT * carried(out, target)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()


def _crop(triple: Triple, scale: int, rng: np.random.Generator) -> Triple:
    h, w = triple.lr.shape[1:]
    side = min(SIDE // scale, h, w)
    y, x = (int(rng.integers(n - side + 1)) for n in (h, w))
    mirror, turn = rng.random(2) < 0.5

    def cut(frames: np.ndarray, factor: int) -> np.ndarray:
        part = frames[..., factor * y : factor * (y + side), factor * x : factor * (x + side)]
        part = part[..., ::-1] if mirror else part
        return part.swapaxes(-1, -2) if turn else part

    lr, keys = cut(triple.lr, 1), cut(triple.keys, scale)
    return Triple(lr, keys, cut(triple.truth, scale), triple.place)


def _score(model: KeyPropagation, triples: Triples, bf16: bool, tile: int | None) -> float:
    """Mean PSNR (dB) of whole frames; `tile`: made in tiles of this side, in fast pixels."""
    device = next(model.parameters()).device
    found = []
    for triple in triples:
        lr, keys = (
            torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(device)[None, :, None]
            for x in (triple.lr, triple.keys)
        )
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            frame = model(lr, keys, tile, triple.here).frames[0, 0, 0]
        score = metrics.psnr_float(frame.float().clamp(0, 1).cpu().numpy(), triple.truth)
        found.append(min(score, 100.0))  # a frame that stands still tells nothing
    return float(np.mean(found))
