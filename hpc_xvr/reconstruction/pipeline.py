"""A fast coarse stream and a few sharp key frames in, sharp frames at the fast rate out.

Shapes: T low-resolution frames, h w their grid, H = scale*h, W = scale*w; N frames of a window.
Times are counted in low-resolution frames: key frame k of a camera lies at frame k * gap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, pairwise
from typing import NamedTuple, Protocol

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


def windows(
    t0: int, t1: int, lr_frames: int, n_out: int, wanted: range | None = None
) -> list[Window]:
    """Windows that give each frame between key frames t0 and t1 exactly once.

    Whole gaps: one window. Centre output: one window a frame. Sequence output: as few as possible,
    side by side; the last one is moved back into the gap, so that its frames lie between the key
    frames it is given, and only what is new in it is kept. A gap shorter than a window gets one in
    its middle.

    Args:
        wanted: only the windows that keep some of these frames.
    """
    half = lr_frames // 2

    def window(centre: int, keep: range) -> Window:
        lr = range(centre - half, centre + half + 1)
        return Window(centre, keep, lr, centre if n_out == 1 else lr.start)

    between = range(t0 + 1, t1)
    asked = between if wanted is None else common(between, wanted)
    if not asked:
        return []
    if lr_frames == WHOLE_GAP:
        return [Window((t0 + t1) // 2, between, range(t0, t1 + 1), t0 + 1)]
    if n_out == 1:
        return [window(t, range(t, t + 1)) for t in asked]
    if len(between) < lr_frames:
        return [window((t0 + t1) // 2, between)]
    first = asked.start - (asked.start - between.start) % lr_frames
    return [
        window(min(start + half, t1 - 1 - half), range(start, min(start + lr_frames, t1)))
        for start in range(first, asked.stop, lr_frames)
    ]


def common(a: range, b: range) -> range:
    """The times that are in both."""
    return range(max(a.start, b.start), min(a.stop, b.stop))


PIECE = 32
"""Frames of a piece of work, about: a longer gap is split, unless a method needs all of it."""


class Piece(NamedTuple):
    """Frames that follow each other and are made from the same key frames: a gap or a part of it,
    with the key frame it begins with, or what lies beyond the outermost key frame.

    Beyond it time is mirrored: the scene is taken to go back the way it came, to the same key frame
    once more. A method sees a gap as any other, and every frame it gets was recorded.
    """

    frames: range
    """That it gives; key frames are passed through."""
    keys: tuple[int, int]
    """Times of the two key frames; the same one twice beyond it."""
    between: tuple[int, int]
    """Times that they stand for: these, or one of them mirrored."""


def pieces(
    times: Sequence[int], length: int, lr_frames: int, n_out: int, frames: range
) -> Iterator[Piece]:
    """The pieces that together give `frames`, in order of time. Where they begin and end does not
    depend on `frames`, so that a frame is always made in the same way.

    Args:
        times: of the key frames, sorted.
        length: of the stream, in frames.
    """
    first, last = times[0], times[-1]
    gaps = ((range(a, b), (a, b), (a, b)) for a, b in pairwise(times))
    before = (range(first), (first, first), (-first, first))
    after = (range(last, length), (last, last), (last, 2 * (length - 1) - last))
    for inside, keys, between in chain([before], gaps, [after]):
        if not common(inside, frames):
            continue
        starts = [inside.start]
        if lr_frames != WHOLE_GAP:  # windows lie side by side from the frame after a key frame on
            step = -(-PIECE // n_out) * n_out
            later = range(between[0] + 1 + step, inside.stop, step)
            starts += [start for start in later if start > inside.start]
        for start, stop in pairwise([*starts, inside.stop]):
            if part := common(range(start, stop), frames):
                yield Piece(part, keys, between)


class Loaded(NamedTuple):
    """What a pass of a method needs, read from the streams."""

    piece: Piece
    window: Window | None
    """None: the first key frame of the piece is passed through."""
    numbers: Sequence[int]
    """Of the low-resolution frames of the window in the stream."""
    lr: Sequence[np.ndarray]
    """These frames."""
    keys: Sequence[np.ndarray]
    """The key frames before and after; if there is no window, only the first."""


class Reconstruction:
    """A method, the streams it is given, and how the frames asked for are made of them.

    `load` reads and `run` computes, so that the two can overlap.

    Args:
        as for `reconstruct`.
    """

    def __init__(
        self,
        method: Method,
        lr: Sequence[np.ndarray],
        keys: Mapping[int, np.ndarray],
        *,
        lr_frames: int,
        n_out: int,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        frames: range | None = None,
    ) -> None:
        times = sorted(keys)
        if lr_frames != WHOLE_GAP and (lr_frames % 2 == 0 or n_out not in (1, lr_frames)):
            raise ValueError(f"lr_frames {lr_frames} must be odd and n_out {n_out} 1 or lr_frames")
        if len(times) < 2 or times[0] < 0 or times[-1] >= len(lr):
            raise InputError(
                f"key frames at {times[:1]}..{times[-1:]} of a stream of {len(lr)} "
                "frames: at least two are needed, all of them within the stream"
            )
        self.method, self.lr, self.keys, self.times = method, lr, keys, times
        self.lr_frames, self.n_out = lr_frames, n_out
        self.device, self.precision = torch.device(device), precision
        self.frames = range(times[0], times[-1] + 1) if frames is None else frames
        """Times of the frames that are made."""

    def pieces(self) -> list[Piece]:
        """The work, in order of time."""
        return list(pieces(self.times, len(self.lr), self.lr_frames, self.n_out, self.frames))

    def load(self, work: Iterable[Piece], only: Collection[int] | None = None) -> Iterator[Loaded]:
        """Read what each pass of these pieces needs, in turn, each frame as few times as possible.

        Raises:
            InputError: a frame cannot be read, or has pixels that are not finite.
        """
        low: dict[int, np.ndarray] = {}  # frames of the last window
        sharp: dict[int, np.ndarray] = {}  # key frames of the last piece

        def key(t: int) -> np.ndarray:
            if t not in sharp:
                frame = _usable(np.asarray(self.keys[t], np.float32), f"the key frame at frame {t}")
                sharp[t] = np.clip(frame, 0, 1)
            return sharp[t]

        def asked(t: int) -> bool:
            return only is None or t in only

        for piece in work:
            sharp = {t: sharp[t] for t in piece.keys if t in sharp}
            start = piece.frames.start
            if start == piece.keys[0] and asked(start):
                yield Loaded(piece, None, (), (), (key(start),))
            for window in windows(*piece.between, self.lr_frames, self.n_out, piece.frames):
                if not any(asked(t) for t in common(window.keep, piece.frames)):
                    continue
                numbers = [self._number(t, piece) for t in window.lr]
                low = {
                    t: low[t] if t in low else _usable(self.lr[t], f"frame {t} of the fast camera")
                    for t in dict.fromkeys(numbers)
                }
                both = tuple(key(t) for t in piece.keys)
                yield Loaded(piece, window, numbers, [low[t] for t in numbers], both)

    def made_of(self, piece: Piece, loads: Iterable[Loaded] | None = None) -> str:
        """A checksum of all that a piece depends on but the method: its place, and the frames that
        `load` reads for it, or has read (`loads`).

        Raises:
            InputError: as `load`.
        """
        seen: set[tuple[str, int]] = set()
        digest = hashlib.blake2b(repr(piece).encode(), digest_size=16)
        for loaded in self.load([piece]) if loads is None else loads:
            digest.update(repr(list(loaded.numbers)).encode())
            for kind, numbers, frames in (
                ("lr", loaded.numbers, loaded.lr),
                ("key", piece.keys, loaded.keys),
            ):
                for number, frame in zip(numbers, frames, strict=False):
                    if (kind, number) not in seen:
                        seen.add((kind, number))
                        digest.update(np.ascontiguousarray(frame).data)
        return digest.hexdigest()

    def depends_on(self, piece: Piece) -> int:
        """The last fast frame that a piece is made of, as if the stream went on; beyond its end
        for pieces that lie at it."""
        ends = [
            window.lr[-1]
            for window in windows(*piece.between, self.lr_frames, self.n_out, piece.frames)
        ]
        return max([*piece.keys, *ends])

    def _number(self, t: int, piece: Piece) -> int:
        """Frame of the stream that stands for a time: frames beyond it repeat the outermost one,
        where time is mirrored they come back."""
        last = len(self.lr) - 1
        if piece.keys[0] == piece.keys[1]:
            t = abs(t) if piece.between[0] < piece.keys[0] else last - abs(last - t)
        return min(max(t, 0), last)

    def run(
        self, loads: Iterable[Loaded], only: Collection[int] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Make the frames of what was loaded: (t, frame (H, W) float32 in [0, 1]), in its order.

        Raises:
            InputError: numbers from the method that are not finite.
        """
        dtype = torch.float64 if self.precision == "float64" else torch.float32
        held: dict[int, Tensor] = {}  # low-resolution frames of the last window
        keys: Sequence[np.ndarray] = ()
        hr = torch.empty(0)

        def to_device(frame: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(frame)).to(self.device, dtype)

        for loaded in loads:
            piece, window, numbers = loaded[:3]
            if window is None:
                yield piece.frames.start, loaded.keys[0]
                continue
            if len(keys) != 2 or any(a is not b for a, b in zip(keys, loaded.keys, strict=True)):
                keys = loaded.keys  # of one gap; its windows get the same tensor
                hr = torch.stack([to_device(key) for key in keys])[None, :, None]  # 1, 2, 1, H, W
            frames = dict(zip(numbers, loaded.lr, strict=True))
            held = {t: held[t] if t in held else to_device(frames[t]) for t in frames}
            before, after = piece.between
            sample = {
                "lr": torch.stack([held[t] for t in numbers])[None, :, None],
                "hr": hr,
                "hr_offset": hr.new_tensor([[before - window.centre, after - window.centre]]),
            }
            out = _run(self.method, sample, self.n_out or len(window.keep), self.precision)
            for t in common(window.keep, piece.frames):
                if only is not None and t not in only:
                    continue
                frame = out[t - window.first]
                if not np.isfinite(frame).all():
                    raise InputError(
                        f"frame {t}: the method gave numbers that are not "
                        "finite; its weights are unusable, take an earlier "
                        "checkpoint, or run with precision float32"
                    )
                yield t, np.clip(frame, 0, 1)


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
    frames: range | None = None,
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
        frames: give these instead; before the first and after the last key frame they are made
            from that one alone (see `Piece`).

    Yields:
        (t, frame (H, W) float32 clipped to [0, 1]); key frames are passed through.

    Raises:
        InputError: a wrong size or time, or numbers from the method that are not finite.
    """
    work = Reconstruction(
        method,
        lr,
        keys,
        lr_frames=lr_frames,
        n_out=n_out,
        device=device,
        precision=precision,
        frames=frames,
    )
    return work.run(work.load(work.pieces(), only), only)


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


class Execution(Protocol):
    """How networks are run: on whole frames, or on parts of them."""

    def carried(self, model: KeyPropagation, lr: Tensor, hr: Tensor) -> Tensor:
        """All frames of a gap."""
        ...

    def key_features(self, model: SwinXVR, hr: Tensor) -> Tensor:
        """See `SwinXVR.hr_features`."""
        ...

    def frames(
        self, model: SwinXVR, lr: Tensor, hr: Tensor, hr_offset: Tensor, features: Tensor
    ) -> Tensor:
        """The frames of a window, given the key frames' features."""
        ...


class _WholeFrames:
    def carried(self, model: KeyPropagation, lr: Tensor, hr: Tensor) -> Tensor:
        return model(lr, hr).frames

    def key_features(self, model: SwinXVR, hr: Tensor) -> Tensor:
        return model.hr_features(hr)

    def frames(
        self, model: SwinXVR, lr: Tensor, hr: Tensor, hr_offset: Tensor, features: Tensor
    ) -> Tensor:
        return model(lr, hr, hr_offset, features)


WHOLE_FRAMES: Execution = _WholeFrames()


def as_method(model: nn.Module, execution: Execution = WHOLE_FRAMES) -> tuple[Method, int]:
    """Wrap a model for `reconstruct`; returns it with the number of frames that a pass gives, or
    WHOLE_GAP.

    SWIN-XVR makes the features of a key frame once for both gaps that it belongs to. In key
    propagation there is nothing to share: it takes the greys of each gap as its unit, and key
    frames enter it only by being carried.
    """

    seen: list[tuple[Tensor, Tensor]] = []  # the last two key frames and their features

    def key_features(model: SwinXVR, hr: Tensor) -> Tensor:
        """Those of a key frame that two gaps share are made once. Each one is made by itself, so
        that they do not depend on which gap came first."""
        features = []
        for key in hr.split(1, dim=1):
            known = [f for frame, f in seen if frame is key or torch.equal(frame, key)]
            features.append(known[0] if known else execution.key_features(model, key))
        seen[:] = zip(hr.split(1, dim=1), features, strict=True)
        return torch.cat(features, dim=1)

    last: dict[str, Tensor] = {}  # the last pair of key frames and their features

    def method(sample: dict[str, Tensor]) -> Tensor:
        hr = sample["hr"]
        try:
            if isinstance(model, KeyPropagation):
                return execution.carried(model, sample["lr"], hr)
            if not isinstance(model, SwinXVR):
                return _on_whole_blocks(model, sample["lr"], hr, sample["hr_offset"])
            if last.get("hr") is not hr:
                last.update(hr=hr, features=key_features(model, hr))
            offset, features = sample["hr_offset"], last["features"]
            return execution.frames(model, sample["lr"], hr, offset, features)
        except ValueError as error:  # frames of a size the model cannot take
            raise InputError(f"{type(model).__name__}: {error}") from None

    return method, WHOLE_GAP if isinstance(model, KeyPropagation) else getattr(model, "n_out", 1)
