"""A fast coarse stream and a few sharp key frames in, sharp frames at the fast rate out.

Shapes: T low-resolution frames, h w their grid, H = scale*h, W = scale*w; N frames of a window.
Times are counted in low-resolution frames: key frame k of a camera lies at frame k * gap.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_xvr.errors import InputError
from hpc_xvr.model.key_propagation import KeyPropagation
from hpc_xvr.model.xvr import SwinXVR

Method = Callable[[dict[str, Tensor]], Tensor]
"""A batched sample without its target -> (B, N_out, 1, H, W)."""


WHOLE_GAP = 0
"""As `lr_frames` and `n_out`: a method that takes all low-resolution frames from key frame to key
frame, and gives all between."""


class Window(NamedTuple):
    """One pass of a method: its centre frame, and the frames of its output that are kept."""

    centre: int
    keep: range
    lr: range
    """Times of the low-resolution frames it is given; they may stick out of the stream."""
    first: int
    """Time of the first frame that it gives."""


def windows(t0: int, t1: int, lr_frames: int, n_out: int) -> list[Window]:
    """Windows that give each frame between key frames t0 and t1 exactly once.

    Whole gaps: one window. Centre output: one window a frame. Sequence output: as few as possible,
    side by side; the last one is moved back into the gap, so that its frames lie between the key
    frames it is given, and only what is new in it is kept. A gap shorter than a window gets one in
    its middle.
    """
    half = lr_frames // 2

    def window(centre: int, keep: range) -> Window:
        lr = range(centre - half, centre + half + 1)
        return Window(centre, keep, lr, centre if n_out == 1 else lr.start)

    if t1 - t0 < 2:
        return []
    between = range(t0 + 1, t1)
    if lr_frames == WHOLE_GAP:
        return [Window((t0 + t1) // 2, between, range(t0, t1 + 1), t0 + 1)]
    if n_out == 1:
        return [window(t, range(t, t + 1)) for t in between]
    if len(between) < lr_frames:
        return [window((t0 + t1) // 2, between)]
    return [
        window(min(start + half, t1 - 1 - half), range(start, min(start + lr_frames, t1)))
        for start in range(t0 + 1, t1, lr_frames)
    ]


def reconstruct(
    method: Method,
    lr: Sequence[np.ndarray],
    keys: Mapping[int, np.ndarray],
    *,
    lr_frames: int,
    n_out: int,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    only: Collection[int] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Reconstruct sharp frames in order of time, from the first key frame to the last.

    Args:
        method: a model in eval mode or a baseline. Between two key frames it gets the same `hr`
            tensor object at each call.
        lr: T frames (h, w) in [0, 1]; read one by one, those of a window are held.
        keys: time -> (H, W) in [0, 1]; two are held at a time.
        lr_frames: N, odd, or WHOLE_GAP; windows that stick out of the stream repeat its first or
            last frame.
        n_out: frames the method gives: 1 (centre) or lr_frames (sequence: one pass per N frames).
        precision: float32, bf16 (autocast) or float64.
        only: give these times and skip the windows that hold none of them.

    Yields:
        (t, frame (H, W) float32 clipped to [0, 1]); key frames are passed through.

    Raises:
        InputError: a wrong size or time, or numbers from the method that are not finite.
    """
    times = sorted(keys)
    if lr_frames != WHOLE_GAP and (lr_frames % 2 == 0 or n_out not in (1, lr_frames)):
        raise ValueError(f"lr_frames {lr_frames} must be odd and n_out {n_out} 1 or lr_frames")
    if len(times) < 2 or times[0] < 0 or times[-1] >= len(lr):
        raise InputError(
            f"key frames at {times[:1]}..{times[-1:]} of a stream of {len(lr)} "
            "frames: at least two are needed, all of them within the stream"
        )
    return _reconstruct(
        method, lr, keys, times, lr_frames, n_out, torch.device(device), precision, only
    )


def _reconstruct(
    method: Method,
    lr: Sequence[np.ndarray],
    keys: Mapping[int, np.ndarray],
    times: list[int],
    lr_frames: int,
    n_out: int,
    device: torch.device,
    precision: str,
    only: Collection[int] | None,
) -> Iterator[tuple[int, np.ndarray]]:
    dtype = torch.float64 if precision == "float64" else torch.float32
    held: dict[int, Tensor] = {}  # low-resolution frames of the last window
    sharp: dict[int, np.ndarray] = {}  # key frames of the last gap

    def to_device(frame: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(frame)).to(device, dtype)

    def low(t: int) -> Tensor:
        return to_device(_usable(lr[t], f"frame {t} of the fast camera"))

    def key(t: int) -> np.ndarray:
        if t not in sharp:
            frame = _usable(np.asarray(keys[t], np.float32), f"the key frame at frame {t}")
            sharp[t] = np.clip(frame, 0, 1)
        return sharp[t]

    for t0, t1 in pairwise(times):
        sharp = {t0: sharp[t0]} if t0 in sharp else {}
        if only is None or t0 in only:
            yield t0, key(t0)
        plan = [
            w
            for w in windows(t0, t1, lr_frames, n_out)
            if only is None or any(t in only for t in w.keep)
        ]
        if not plan:
            continue
        hr = torch.stack([to_device(key(t)) for t in (t0, t1)])[None, :, None]  # 1, 2, 1, H, W
        for window in plan:
            index = [min(max(t, 0), len(lr) - 1) for t in window.lr]
            held = {t: held[t] if t in held else low(t) for t in dict.fromkeys(index)}
            sample = {
                "lr": torch.stack([held[t] for t in index])[None, :, None],
                "hr": hr,
                "hr_offset": hr.new_tensor([[t0 - window.centre, t1 - window.centre]]),
            }
            out = _run(method, sample, n_out or len(window.keep), precision)  # n_out, H, W
            for t in window.keep:
                if only is None or t in only:
                    frame = out[t - window.first]
                    if not np.isfinite(frame).all():
                        raise InputError(
                            f"frame {t}: the method gave numbers that are not "
                            "finite; its weights are unusable, take an earlier "
                            "checkpoint, or run with precision float32"
                        )
                    yield t, np.clip(frame, 0, 1)
    if only is None or times[-1] in only:
        yield times[-1], key(times[-1])


def _usable(frame: np.ndarray, name: str) -> np.ndarray:
    """The frame, if all its numbers are finite."""
    if not np.isfinite(frame).all():
        raise InputError(
            f"{name}: {np.count_nonzero(~np.isfinite(frame))} of its {frame.size} pixels are not "
            "finite numbers; mend or leave out the frame"
        )
    return frame


def _run(method: Method, sample: dict[str, Tensor], n_out: int, precision: str) -> np.ndarray:
    """One pass. Inference mode and autocast end before a frame is yielded to the caller."""
    hr = sample["hr"]
    cast = (
        torch.autocast(hr.device.type, dtype=torch.bfloat16)
        if precision == "bf16"
        else nullcontext()
    )
    with torch.inference_mode(), cast:
        out = method(sample)
    if out.shape != (1, n_out, 1, *hr.shape[-2:]):
        raise ValueError(
            f"the method gave {tuple(out.shape)} for lr {tuple(sample['lr'].shape)} "
            f"and hr {tuple(hr.shape)}; expected {(1, n_out, 1, *hr.shape[-2:])}"
        )
    return out[0, :, 0].float().cpu().numpy()


def _on_whole_blocks(model: nn.Module, lr: Tensor, hr: Tensor, hr_offset: Tensor) -> Tensor:
    """EDVR halves its grid twice: frames are padded to multiples of 4, and the result is cut."""
    scale = hr.shape[-1] // lr.shape[-1]
    bottom, right = (-n % 4 for n in lr.shape[-2:])

    def continued(x: Tensor, factor: int) -> Tensor:
        pad = (0, factor * right, 0, factor * bottom)
        return F.pad(x.flatten(0, 1), pad, mode="replicate").unflatten(0, x.shape[:2])

    out: Tensor = model(continued(lr, 1), continued(hr, scale), hr_offset)
    return out[..., : hr.shape[-2], : hr.shape[-1]]


def as_method(model: nn.Module) -> tuple[Method, int]:
    """Wrap a model for `reconstruct`; returns it with the number of frames that a pass gives, or
    WHOLE_GAP."""

    known: dict[str, torch.Tensor] = {}  # features of the last pair of key frames

    def method(sample: dict[str, torch.Tensor]) -> torch.Tensor:
        hr = sample["hr"]
        try:
            if isinstance(model, KeyPropagation):
                return model(sample["lr"], hr).frames
            if not isinstance(model, SwinXVR):
                return _on_whole_blocks(model, sample["lr"], hr, sample["hr_offset"])
            if known.get("hr") is not hr:
                known.update(hr=hr, features=model.hr_features(hr))
            return model(sample["lr"], hr, sample["hr_offset"], known["features"])
        except ValueError as error:  # frames of a size the model cannot take
            raise InputError(f"{type(model).__name__}: {error}") from None

    return method, WHOLE_GAP if isinstance(model, KeyPropagation) else getattr(model, "n_out", 1)
