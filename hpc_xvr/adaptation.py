"""Weights adapted to one recording: its own key frames are the truth to learn from.

Each key frame lies between two others, so a network can be shown these and the fast frames of both
gaps, and asked for the key frame in the middle. Some key frames are never learned from: only if the
network gets better at these, its new weights are kept.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hpc_xvr import metrics
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger, progress_bar
from hpc_xvr.model.key_propagation import Carried, KeyPropagation
from hpc_xvr.reconstruction.material import Material
from hpc_xvr.reconstruction.methods import NamedMethod, model_entry
from hpc_xvr.reconstruction.tiles import in_tiles
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
        minutes: no further step is begun after this time.
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
    learned, held = _triples(material)
    logger.info(
        "adapt: %d key frames to learn from, %d held back to tell whether it helps",
        len(learned),
        len(held),
    )
    bf16 = method.precision == "bf16"
    best = {name: value.clone() for name, value in model.state_dict().items()}
    before = after = _score(method, held)
    kept, student = 0, copy.deepcopy(model).eval()
    tried = in_tiles(model_entry(method.name, student, method.precision), method.tile, quiet=True)
    optimizer = torch.optim.Adam(student.parameters(), lr=RATE, betas=(0.9, 0.99))
    rng = np.random.default_rng(seed)
    end = time.monotonic() + 60 * minutes
    with progress_bar("adapt", steps, "steps") as advance:
        for step in range(1, steps + 1):
            rate = RATE * min(1.0, step / WARMUP) * (1 - 0.9 * step / steps)
            optimizer.param_groups[0]["lr"] = rate
            _learn(student.train(), optimizer, learned[rng.integers(len(learned))], rng, bf16)
            advance(1)
            late = time.monotonic() > end
            if step % LOOK_EVERY == 0 or step == steps or late:
                student.eval()
                now = _score(tried, held)
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


def _triples(material: Material) -> tuple[list[Triple], list[Triple]]:
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

    def read(first: int, between: int, last: int) -> Triple:
        return Triple(
            np.stack([material.lr[t] for t in range(first, last + 1)]),
            np.stack([material.keys[first], material.keys[last]]),
            np.asarray(material.keys[between]),
            between - first - 1,
        )

    held = [read(*whole[i]) for i in sorted(chosen)]
    return [read(*times) for i, times in enumerate(whole) if i not in chosen], held


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
        out = model(lr[:, :, None], keys[:, :, None])
    here = slice(crops[0].place, crops[0].place + 1)
    out = Carried(*(pictures[:, here] for pictures in out))
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


def _score(method: NamedMethod, triples: list[Triple]) -> float:
    """Mean PSNR (dB) of whole frames."""
    assert method.network is not None
    device = next(method.network.parameters()).device
    found = []
    for triple in triples:
        sample = {
            name: torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(device)[None, :, None]
            for name, x in (("lr", triple.lr), ("hr", triple.keys))
        }
        bf16 = method.precision == "bf16"
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            frame = method.method(sample)[0, triple.place, 0]
        score = metrics.psnr_float(frame.float().clamp(0, 1).cpu().numpy(), triple.truth)
        found.append(min(score, 100.0))  # a frame that stands still tells nothing
    return float(np.mean(found))
