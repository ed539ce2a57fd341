"""Key frames carried along the fast stream: every sharp pixel moves with the motion that the fast
camera saw, from both sides of a gap.

SWIN-XVR pools the key frames to the coarse grid and looks at a few fast frames. Here a small
network follows the motion from frame to frame of the whole gap, and the key frames themselves are
warped along it at full resolution; windowed attention on the coarse grid then decides for every
pixel between what was carried from either side, what stood still, and what the fast camera says.

Shapes: B gaps; T low-resolution frames from key frame to key frame, N = T - 2 between them; h w
their grid, H = scale*h, W = scale*w; s2 = scale*scale; M motion fields a direction; C channels.
The two directions (forward from the first key frame, backward from the second) are stacked in the
batch, 2B, and share all weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_xvr.model.attention import Kind
from hpc_xvr.model.swin import SwinBlock, SwinStage, WindowAttention, grid
from hpc_xvr.model.tiling import Part, Tile, corner_of, part_of, reach_of_windows, tiles
from hpc_xvr.model.warping import Lookup, chain, detail, enlarge, warp_along

MIN_CONTRAST = 0.005
"""Smallest standard deviation that frames are divided by: below it there is noise only."""
TIME_UNIT = 16
"""Distances to the key frames are given to the network in this many frames."""
PART = 2**15
"""Low-resolution pixels that are fused at once in eval mode (frames are not divided for it)."""
BAND = 2**18
"""Low-resolution pixels of a band that a frame is fused in."""
FRAME_HALO = 2
"""Low-resolution pixels around those that `FrameEncoder` describes: two convolutions in a row."""
FADING = 0.7
"""How much of a gradient goes on from what a step of the motion sees to the steps before it."""
SMALL = 1e-3
"""Deviation of the first weights of layers that start from doing nothing."""


class Carried(NamedTuple):
    """What a pass of the network gives beside the frames, for the training objective."""

    frames: Tensor
    """Reconstructed frames, (B, N, 1, H, W)."""
    forward: Tensor | None = None
    """The first key frame carried to each frame along each motion field, (B, N, M, H, W); in
    training mode only."""
    backward: Tensor | None = None
    """The second one."""


@dataclass(frozen=True)
class Gap:
    """A gap as the network sees it: both directions, normalised."""

    lr: Tensor
    """2B, T, h, w: the frames in the direction's own order of time."""
    key: Tensor
    """2B, 1, H, W: the key frame that the direction starts from."""
    distance: Tensor
    """2B, N, 2: to the key frame it starts from and to the other one."""
    misfit: Tensor
    """2B, 2, h, w: what the fast camera saw at these two times, less what the sharp one did."""
    mean: Tensor
    """B, 1, 1, 1"""
    deviation: Tensor
    """B, 1, 1, 1"""

    @property
    def batch(self) -> int:
        """B"""
        return len(self.mean)

    def view(self, way: slice, n: int, part: Part) -> Gap:
        """A part of the directions `way`'s own frame n, with its neighbours in time, as a gap of
        its own; the key frame stays whole."""
        return replace(
            self,
            lr=part_of(self.lr[way, n : n + 3], part),
            key=self.key[way],
            distance=self.distance[way, n : n + 1],
            misfit=part_of(self.misfit[way], part),
        )

    def grey(self, frames: Tensor) -> Tensor:
        """Frames (B, N, M, H, W) in the greys of the recording."""
        return frames * self.deviation[:, None] + self.mean[:, None]


@dataclass(frozen=True)
class Path:
    """The motion from each key frame on, in the direction's own order of time."""

    flow: Tensor
    """2B, N, 2M, h, w: from each frame back to the key frame."""
    steps: Tensor
    """2B, N, C, h, w: what each step has to say to the fusing part."""
    warped: Tensor | None
    """2B, N, M, H, W: the key frame as carried to each frame; kept in training only, where it is
    part of the objective."""

    @staticmethod
    def both_ways(x: Tensor | None) -> tuple[Tensor, Tensor]:
        """(2B, N, ...) as two of (B, N, ...), both in the recording's order of time."""
        assert x is not None
        ahead, back = x.chunk(2)
        return ahead, back.flip(1)


class KeyPropagation(nn.Module):
    """Reconstructs all frames between two key frames at once.

    Args:
        scale: H / h, 2 or 4.
        features: channels of the fusing part.
        blocks, heads, window, mlp_ratio: its shifted-window transformer blocks.
        motions: motion fields in each direction; what moves over each other needs more than one.
        motion_features: hidden channels of the network that follows the motion.
        frame_features: channels that describe a low-resolution frame and its neighbours in time.
        step_features: channels that a step of the motion leaves for the fusing part.
        lookup: how key frames are interpolated between their pixels: linearly, or both linearly
            and by cubic polynomials, to choose from.
        attention: see SwinXVR.
    """

    def __init__(
        self,
        scale: int = 4,
        features: int = 96,
        blocks: int = 5,
        heads: int = 3,
        window: int = 8,
        mlp_ratio: float = 2.0,
        motions: int = 2,
        motion_features: int = 64,
        frame_features: int = 24,
        step_features: int = 16,
        lookup: Literal["linear", "both"] = "linear",
        attention: Kind = "auto",
    ) -> None:
        super().__init__()
        if scale not in (2, 4):
            raise ValueError(f"scale must be 2 or 4, got {scale}")
        if features % heads:
            raise ValueError(f"features {features} must be a multiple of heads {heads}")
        self.scale, self.motions = scale, motions
        self._lookups: tuple[Lookup, ...] = ("linear", "cubic") if lookup == "both" else ("linear",)
        self.frames = FrameEncoder(frame_features)
        self.motion = MotionStep(scale, motions, frame_features, motion_features, step_features)
        candidates = 2 * motions + 2
        seen = 2 * step_features + frame_features + 2 + (candidates + 1) * scale**2
        if lookup == "both":  # the cubic ones are chosen from, not looked at
            candidates += 2 * motions
        self.enter = nn.Conv2d(seen, features, 3, padding=1)
        transformer = [
            SwinBlock(features, heads, 1, window, mlp_ratio, 0.0, attention) for _ in range(blocks)
        ]
        self.stage = SwinStage(transformer, features, window)
        self.choose = Choice(features, candidates, scale)
        self.apply(_initialise)
        for block in transformer:  # branches that start small: training is steadier
            with torch.no_grad():
                block.attn.proj.weight.mul_(0.1)
                block.fc2.weight.mul_(0.1)

    @property
    def halo(self) -> int:
        """Coarse pixels around a tile of whole windows that it depends on when the motion is known
        and whole key frames are there to look up. (How far it depends on a key frame is a matter of
        how far things move.)"""
        return self._choice_halo + 1 + FRAME_HALO  # a step's `look` lies between

    @property
    def _choice_halo(self) -> int:
        """The same of the choice by what it sees: a convolution, blocks, two convolutions."""
        return reach_of_windows(2, len(self.stage.blocks), self.stage.window) + 1

    def widened(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the same network with linear lookups only, to begin from: what was looked up
        by cubic polynomials is chosen as readily as the same looked up linearly."""
        carried, s2 = 2 * self.motions, self.scale**2
        parts, names = (carried * s2, 2 * s2, 2 * s2), ("choose.conv.weight", "choose.conv.bias")
        fits = all(name in weights and weights[name].shape[:1] == (sum(parts),) for name in names)
        if len(self._lookups) < 2 or not fits:
            return weights
        weights = dict(weights)
        for name in names:
            linear, still, rest = weights[name].split(parts)
            if name.endswith("bias"):
                linear = linear - math.log(2)
            weights[name] = torch.cat((linear, still, linear, rest))
        return weights

    def forward(
        self, lr: Tensor, hr: Tensor, tile: int | None = None, only: slice = slice(None)
    ) -> Carried:
        """Reconstruct.

        In eval mode a few frames are fused at a time, and large ones in bands, so that memory grows
        little with the gap and the frames; the result is the same.

        Args:
            lr: (B, T, 1, h, w) low-resolution frames in [0, 1], from key frame to key frame.
            hr: (B, 2, 1, H, W) the key frames, taken with the first and the last of them.
            tile: in eval mode: work in tiles of this side, in low-resolution pixels. Only the
                frames and the motion then take memory that grows with them. The result is the same
                to rounding: greys and motion are those of whole frames.
            only: which of the T - 2 frames between are made; the motion is followed through all.

        Returns:
            These frames and, in training mode, the key frames as they were carried to each of them.

        Raises:
            ValueError: shapes that do not fit.
        """
        self._check(lr, hr)
        gap = self._normalised(lr, hr)
        if tile and not self.training:
            return Carried(self._in_tiles(gap, tile, only))
        frame_features = self.frames(gap)  # 2B, N, C, h, w
        path = self._follow(gap, frame_features)
        if self.training:
            out = self._fuse(gap, frame_features, path, only)
            ahead, back = self._carried(gap, path, only)
            return Carried(gap.grey(out), gap.grey(ahead), gap.grey(back))
        first, last, _ = only.indices(frame_features.shape[1])
        at_once = max(1, PART // (hr.shape[0] * lr.shape[-2] * lr.shape[-1]))
        parts = [slice(n, min(n + at_once, last)) for n in range(first, last, at_once)]
        outs = [self._fuse(gap, frame_features, path, part) for part in parts]
        return Carried(gap.grey(torch.cat(outs, dim=1)))

    def _fuse(self, gap: Gap, frame_features: Tensor, path: Path, part: slice) -> Tensor:
        """The frames of `part`, (B, n, 1, H, W), still without their greys."""
        low = gap.lr[: gap.batch, 1:-1][:, part].flatten(0, 1)[:, None]  # B*n, 1, h, w
        carried = [  # B*n, 2M, H, W
            torch.cat(self._carried(gap, path, part, lookup), dim=2).flatten(0, 1)
            for lookup in self._lookups
        ]
        frames = len(low) // gap.batch
        fused = self._fused(
            low,
            carried,
            torch.stack(gap.key.chunk(2), dim=1)[:, :, 0],
            [said[:, part].flatten(0, 1) for said in path.both_ways(path.steps)],
            frame_features[: gap.batch, part].flatten(0, 1),
            gap.distance[: gap.batch, part].flatten(0, 1),
        )
        return fused.unflatten(0, (gap.batch, frames))

    def _fused(
        self,
        low: Tensor,
        carried: Sequence[Tensor],
        keys: Tensor,
        said: Sequence[Tensor],
        frame_features: Tensor,
        distance: Tensor,
    ) -> Tensor:
        """(B*n, 1, h, w), (B*n, 2M, H, W) of each lookup, (B, 2, H, W), two of (B*n, C, h, w),
        (B*n, C, h, w), (B*n, 2) -> (B*n, 1, H, W) still without its greys."""
        bicubic = enlarge(low, self.scale)
        frames = len(low) // len(keys)
        still = _for_each(F.pixel_unshuffle(keys, self.scale), frames)
        pictures = [F.pixel_unshuffle(carried[0], self.scale), still]
        pictures.append(F.pixel_unshuffle(bicubic, self.scale))
        numbers = frame_features.dtype
        seen = torch.cat(
            (
                *said,
                frame_features,
                *((picture - low).to(numbers) for picture in pictures),
                _maps(distance, low).to(numbers),
            ),
            dim=1,
        )
        maps = self._choice(_channels_last(seen))
        linear, *cubic = (detail(by_lookup, self.scale) for by_lookup in carried)
        as_they_stood = _for_each(detail(keys, self.scale), frames)
        return self.choose(maps, bicubic, torch.cat((linear, as_they_stood, *cubic), dim=1))

    def _in_tiles(self, gap: Gap, side: int, only: slice) -> Tensor:
        """The frames of `only`, (B, n, 1, H, W), in their greys. Each step of the motion is made of
        whole frames, tile by tile, so that it does not matter how far things move."""
        h, w = gap.lr.shape[-2:]
        frames, s, both = gap.lr.shape[1] - 2, self.scale, slice(None)
        flow = gap.key.new_zeros(2 * gap.batch, frames, 2 * self.motions, h, w, dtype=torch.float32)
        for n in range(frames):
            before = flow[:, n - 1] if n else torch.zeros_like(flow[:, 0])
            for tile in tiles((h, w), side, self.motion.halo + FRAME_HALO):
                view = gap.view(both, n, tile.around)
                known = self._seen_by_step(view, before, n, tile)
                further, _ = self.motion.further(*known, part_of(before, tile.around))
                core = part_of(flow[:, n], tile.core)
                core.copy_(
                    chain(before, tile.cut(further), (tile.core[0].start, tile.core[1].start))
                )
        first, last, _ = only.indices(frames)
        out = gap.key.new_empty(gap.batch, last - first, 1, s * h, s * w)
        keys = torch.stack(gap.key.chunk(2), dim=1)[:, :, 0]  # B, 2, H, W
        ahead, back = slice(0, gap.batch), slice(gap.batch, None)
        for n in range(first, last):
            for tile in tiles((h, w), side, self.halo, self.stage.window):
                part, said, frame_features = tile.around, [], torch.empty(0)
                carried: list[list[Tensor]] = [[] for _ in self._lookups]
                for way, own in ((ahead, n), (back, frames - 1 - n)):  # in its own order of time
                    view = gap.view(way, own, part)
                    before = flow[way, own - 1] if own else torch.zeros_like(flow[way, 0])
                    known = self._seen_by_step(view, before, own, tile)
                    said.append(self.motion.look_at(*known)[1])
                    moved = part_of(flow[way, own], part)
                    for lookup, pictures in zip(self._lookups, carried, strict=True):
                        key, corner = view.key.float(), corner_of(part)
                        pictures.append(warp_along(key, moved, s, corner, lookup))
                    if way == ahead:
                        frame_features = known[0]
                low = part_of(gap.lr[ahead, n + 1, None], part)
                both_ways = [torch.cat(pictures, dim=1) for pictures in carried]
                still = part_of(keys, part, s)
                distance = gap.distance[ahead, n]
                fused = self._fused(low, both_ways, still, said, frame_features, distance)
                made = tile.cut(gap.grey(fused[:, None])[:, 0], s)
                part_of(out[:, n - first], tile.core, s).copy_(made)
        return out

    def _seen_by_step(
        self, view: Gap, before: Tensor, n: int, tile: Tile
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `MotionStep` is given of frame n in a tile: its features, the frame itself, and the
        key frame carried by the motion `before` (K, 2M, h, w) it."""
        features = self.frames(view)[:, 0]
        if n:
            flow = part_of(before, tile.around)
            warped = warp_along(view.key.float(), flow, self.scale, corner_of(tile.around))
        else:
            key = part_of(view.key.float(), tile.around, self.scale)
            warped = key.expand(-1, self.motions, -1, -1)
        return features, view.lr[:, 1, None], warped

    def _carried(
        self, gap: Gap, path: Path, part: slice, lookup: Lookup = "linear"
    ) -> tuple[Tensor, Tensor]:
        """The key frames as they were carried to the frames of `part`, from either side: two of
        (B, n, M, H, W)."""
        if self.training and lookup == "linear":
            ahead, back = path.both_ways(path.warped)
            return ahead[:, part], back[:, part]
        ahead, back = (flow[:, part] for flow in path.both_ways(path.flow))  # B, n, 2M, h, w
        flow = torch.cat((ahead, back))
        key = gap.key.float()[:, None].expand(-1, flow.shape[1], -1, -1, -1)
        warped = warp_along(key.flatten(0, 1), flow.flatten(0, 1), self.scale, lookup=lookup)
        ahead, back = warped.unflatten(0, flow.shape[:2]).chunk(2)
        return ahead, back

    def _choice(self, seen: Tensor) -> Tensor:
        """What the choice is made by, (K, s2*(candidates + 2), h, w); in eval mode in bands of
        whole windows, each with the rows around it that it depends on."""
        height, width = seen.shape[-2:]
        window = self.stage.window
        rows = max(1, BAND // (window * width)) * window
        if self.training or rows >= height:
            return self._chosen(seen)
        halo = -(-self._choice_halo // window) * window
        bands = []
        for top in range(0, height, rows):
            above = min(top, halo)
            band = self._chosen(seen[:, :, top - above : top + rows + halo])
            bands.append(band[:, :, above : above + rows])
        return torch.cat(bands, dim=2)

    def _chosen(self, seen: Tensor) -> Tensor:
        fused = F.leaky_relu(self.enter(_channels_last(seen)), 0.1)
        image = fused.permute(0, 2, 3, 1)[:, None]  # K, 1, h, w, C
        image = self.stage(image.to(torch.promote_types(image.dtype, torch.float32)))
        chosen: Tensor = self.choose.conv(_channels_last(image[:, 0].permute(0, 3, 1, 2)))
        return chosen

    def _normalised(self, lr: Tensor, hr: Tensor) -> Gap:
        """Both directions, with mean 0 and deviation 1 over the two key frames: a dark recording
        looks like a bright one."""
        keys, lr = hr[:, :, 0], lr[:, :, 0]
        mean = keys.mean((1, 2, 3), keepdim=True)
        deviation = keys.std((1, 2, 3), keepdim=True).clamp(min=MIN_CONTRAST)
        keys, lr = (keys - mean) / deviation, (lr - mean) / deviation
        # At the key frames' own times the sharp camera knows better what the fast one saw; how far
        # that was off tells of noise, and of cameras that are not quite aligned or calibrated.
        first, last = F.avg_pool2d(keys, self.scale).split(1, dim=1)  # B, 1, h, w
        misfit = torch.cat((lr[:, :1] - first, lr[:, -1:] - last), dim=1)
        lr = torch.cat((first, lr[:, 1:-1], last), dim=1)
        frames = lr.shape[1] - 2
        since = torch.arange(1, frames + 1, device=lr.device, dtype=lr.dtype) / TIME_UNIT
        distance = torch.stack((since, since.flip(0)), dim=1)  # N, 2
        return Gap(
            lr=torch.cat((lr, lr.flip(1))),
            key=torch.cat(keys.split(1, dim=1)),
            distance=distance.expand(2 * len(lr), -1, -1),
            misfit=torch.cat((misfit, misfit.flip(1))),
            mean=mean,
            deviation=deviation,
        )

    def _follow(self, gap: Gap, frame_features: Tensor) -> Path:
        """Chain the motion from the key frame on. The only part that runs frame by frame."""
        flow = gap.key.new_zeros(
            len(gap.key), 2 * self.motions, *gap.lr.shape[-2:], dtype=torch.float32
        )
        key = gap.key.float()
        warped = key.expand(-1, self.motions, -1, -1)
        flows, carried, steps = [], [], []
        lows = gap.lr[:, 1:-1, None].unbind(1)
        for features, low in zip(frame_features.unbind(1), lows, strict=True):
            flow, said = self.motion(features, low, warped, flow)
            warped = warp_along(key, flow, self.scale)
            flows.append(flow)
            steps.append(said)
            if self.training:
                carried.append(warped)
        return Path(
            torch.stack(flows, 1),
            torch.stack(steps, 1),
            torch.stack(carried, 1) if carried else None,
        )

    def _check(self, lr: Tensor, hr: Tensor) -> None:
        b, t, c, h, w = lr.shape if lr.ndim == 5 else (0, 0, 0, 0, 0)
        if t < 3 or c != 1:
            raise ValueError(f"lr must be (B, T >= 3, 1, h, w), got {tuple(lr.shape)}")
        expected = (b, 2, 1, self.scale * h, self.scale * w)
        if tuple(hr.shape) != expected:
            raise ValueError(
                f"hr must be {expected} for lr {tuple(lr.shape)}, got {tuple(hr.shape)}"
            )

    def flops(self, h: int, w: int) -> int:
        """Floating-point operations for one frame that comes out (2 per multiply-add).

        Counts convolutions, linear layers and attention products, padding included.
        """
        once = [self.enter, self.stage.conv, self.choose.conv]
        both = [m for part in (self.frames, self.motion) for m in part.modules()]
        total = sum(2 * h * w * conv.weight.numel() for conv in once)
        total += sum(2 * 2 * h * w * m.weight.numel() for m in both if isinstance(m, nn.Conv2d))
        g = grid(1, 1, h, w, self.stage.window, torch.device("cpu"))
        tokens = g.plain.from_image.numel()
        for i, block in enumerate(self.stage.blocks):
            assert isinstance(block, SwinBlock)
            layers = (block.attn.qkv, block.attn.proj, block.fc1, block.fc2)
            total += 2 * tokens * sum(layer.weight.numel() for layer in layers)
            groups = (g.shifted if i % 2 else g.plain).groups
            width = block.attn.proj.out_features
            total += sum(4 * group.count * group.tokens**2 * width for group in groups)
        return total


class FrameEncoder(nn.Module):
    """Describes each low-resolution frame between the keys, with its neighbours in time."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3 + 2 + 2, features, 3, padding=1)
        self.second = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, gap: Gap) -> Tensor:
        """-> (2B, N, C, h, w)"""
        before, now, after = gap.lr[:, :-2], gap.lr[:, 1:-1], gap.lr[:, 2:]  # 2B, N, h, w
        misfit = gap.misfit[:, None].expand(-1, now.shape[1], -1, -1, -1)
        x = torch.cat((torch.stack((before - now, now, after - now), dim=2), misfit), dim=2)
        x = x.flatten(0, 1)
        x = torch.cat((x, _maps(gap.distance.flatten(0, 1), x)), dim=1)  # 2B*N, 7, h, w
        y = F.leaky_relu(self.first(_channels_last(x)), 0.1)
        y = F.leaky_relu(self.second(y), 0.1)
        return y.unflatten(0, now.shape[:2])


class MotionStep(nn.Module):
    """From the motion up to one frame to the motion up to the next.

    It looks at how what was carried so far differs from the next low-resolution frame, and gives
    the further motion d of each field on the coarse grid: flow(p) <- flow(p + d(p)) + d(p).
    """

    halo = 4
    """Coarse pixels around those of `further` that it depends on: four convolutions in a row."""

    def __init__(
        self, scale: int, motions: int, frame_features: int, hidden: int, step_features: int
    ) -> None:
        super().__init__()
        self.scale, self.motions = scale, motions
        seen = frame_features + motions * scale**2
        self.look = nn.Conv2d(seen, step_features, 3, padding=1)
        self.first = nn.Conv2d(seen + step_features + 2 * motions, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.last = nn.Conv2d(hidden, 2 * motions, 3, padding=1)

    def forward(
        self, frame: Tensor, low: Tensor, warped: Tensor, flow: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            frame: (2B, C, h, w) features of the frame that is next.
            low: (2B, 1, h, w) the frame itself.
            warped: (2B, M, H, W) the key frame as carried to the frame before.
            flow: (2B, 2M, h, w) motion so far, (x, y) of each field in coarse pixels.

        Returns:
            The motion to this frame, and what the step says to the fusing part (2B, C, h, w).
        """
        # Over 20 steps and more gradients of some samples grow a thousand times, and drown others.
        further, said = self.further(frame, low, _fading(warped), _fading(flow))
        return chain(flow, further), said

    def look_at(self, frame: Tensor, low: Tensor, warped: Tensor) -> tuple[Tensor, Tensor]:
        """What the step sees, and what it says of it to the fusing part."""
        miss = F.pixel_unshuffle(warped, self.scale) - low
        seen = torch.cat((frame, miss.to(frame.dtype)), dim=1)
        return seen, F.leaky_relu(self.look(_channels_last(seen)), 0.1)

    def further(
        self, frame: Tensor, low: Tensor, warped: Tensor, flow: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The further motion (2B, 2M, h, w), and what the step says."""
        seen, said = self.look_at(frame, low, warped)
        y = torch.cat((seen, said, flow.to(frame.dtype)), dim=1)
        y = F.leaky_relu(self.first(_channels_last(y)), 0.1)
        return self.last(F.leaky_relu(self.second(y), 0.1)).float(), said


class Choice(nn.Module):
    """Decides for every sharp pixel whose detail it takes.

    out = bicubic + sum_k w_k detail(candidate_k) + residual, where the w_k and the weight of taking
    none add up to 1: the fast camera has the last word on everything it can see, the candidates
    give the detail that it cannot.
    """

    def __init__(self, features: int, candidates: int, scale: int) -> None:
        super().__init__()
        self.candidates, self.scale = candidates, scale
        self.conv = nn.Conv2d(features, scale**2 * (candidates + 2), 3, padding=1)

    def forward(self, maps: Tensor, bicubic: Tensor, details: Tensor) -> Tensor:
        """What `conv` gave (K, s2*(candidates + 2), h, w), (K, 1, H, W), (K, candidates, H, W)
        -> (K, 1, H, W)"""
        maps = F.pixel_shuffle(maps.float(), self.scale)
        weights, residual = maps.split((self.candidates + 1, 1), dim=1)
        weights = weights.softmax(dim=1)[:, :-1]
        return bicubic + (weights * details).sum(1, keepdim=True) + residual


def _for_each(of_gap: Tensor, frames: int) -> Tensor:
    """What is the same in all frames of a gap, (B, ...), for each of them, (B*frames, ...)."""
    return of_gap[:, None].expand(-1, frames, *of_gap.shape[1:]).flatten(0, 1)


def _fading(x: Tensor) -> Tensor:
    """x, whose gradient counts less."""
    return FADING * x + (1 - FADING) * x.detach() if x.requires_grad else x


def _maps(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers (K, n) as constant maps (K, n, h, w)."""
    return numbers.to(like.dtype)[..., None, None].expand(-1, -1, *like.shape[-2:])


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _initialise(module: nn.Module) -> None:
    """Motion and choice start from doing nothing. Linear layers keep torch's own start, about three
    times as wide as SWIN-XVR's: +0.2 dB after short trainings."""
    if isinstance(module, WindowAttention):
        nn.init.trunc_normal_(module.bias_table, std=0.02)
    elif isinstance(module, (MotionStep, Choice)):
        last = module.last if isinstance(module, MotionStep) else module.conv
        nn.init.normal_(last.weight, std=SMALL)
        if last.bias is not None:
            nn.init.zeros_(last.bias)
