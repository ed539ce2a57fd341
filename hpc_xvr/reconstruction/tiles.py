"""Frames larger than the memory that a method takes for them: made tile by tile, as the whole frame
would have come out, to rounding.

Tiles follow from what a method states of itself: how far around a tile it looks (`halo`), and that
its windows must lie where they lie in the whole frame. What belongs to whole frames, such as their
mean grey, is still taken from them.

Shapes: see `pipeline`; tiles are rectangles of the coarse grid.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hpc_xvr.errors import InputError
from hpc_xvr.log import logger
from hpc_xvr.model.key_propagation import KeyPropagation
from hpc_xvr.model.tiling import part_of, tiles
from hpc_xvr.model.xvr import SwinXVR
from hpc_xvr.reconstruction.baselines import Baseline, find_baseline
from hpc_xvr.reconstruction.methods import NamedMethod
from hpc_xvr.reconstruction.pipeline import Method, as_method


def in_tiles(entry: NamedMethod, side: int | None, quiet: bool = False) -> NamedMethod:
    """The same method, working in tiles of `side` sharp pixels; None: as it does.

    Args:
        quiet: the log does not say what it costs, as it was said before.

    Raises:
        InputError: it cannot.
    """
    if side is None:
        return entry
    model = entry.network
    if model is None:
        baseline = find_baseline(entry.name)
        if baseline.halo is None:
            logger.info("%s: works in tiles of its own; --tile changes nothing", entry.name)
            return entry
        return replace(entry, method=_baseline_in_tiles(baseline, baseline.halo, side), tile=side)
    if not isinstance(model, (KeyPropagation, SwinXVR)):
        raise InputError(
            f"--tile {side}: {entry.name} ({entry.title}) can look up features at any distance, so "
            "that no tile would come out as in the whole frame; leave --tile out, or take other "
            "weights"
        )
    window = _window(model)
    asked, side = side, whole_windows(entry.name, model, side)
    halo = -(-model.halo * model.scale // window) * window
    if not quiet:
        logger.info(
            "%s: tiles of %dx%d sharp pixels, made with %d around them: up to %.3g times the work "
            "of whole frames",
            *(entry.name, side, side, halo, ((side + 2 * halo) / side) ** 2),
        )
    method, _ = as_method(model, TiledModel(side // model.scale))
    return replace(entry, method=method, tile=asked)


def whole_windows(name: str, model: KeyPropagation | SwinXVR, side: int) -> int:
    """The side of tiles that hold whole windows, in sharp pixels, up to `side`.

    Raises:
        InputError: it is smaller than a window.
    """
    window = _window(model)
    if side < window:
        raise InputError(
            f"--tile {side}: {name} looks at windows of {window} sharp pixels; give at least so "
            "many"
        )
    return side // window * window


def _window(model: KeyPropagation | SwinXVR) -> int:
    coarse = model.stage.window if isinstance(model, KeyPropagation) else model.window
    return coarse * model.scale


class TiledModel:
    """How networks are run in tiles of `side` coarse pixels."""

    def __init__(self, side: int) -> None:
        self.side = side

    def carried(self, model: KeyPropagation, lr: Tensor, hr: Tensor) -> Tensor:
        """lr (B, T, 1, h, w), hr (B, 2, 1, H, W) -> (B, T - 2, 1, H, W)."""
        return model(lr, hr, self.side).frames

    def key_features(self, model: SwinXVR, hr: Tensor) -> Tensor:
        """hr (B, K, 1, H, W) -> (B, K, h, w, C)."""
        grid = hr.shape[-2] // model.scale, hr.shape[-1] // model.scale
        out = torch.empty(0)
        for i, tile in enumerate(tiles(grid, self.side, model.key_halo)):
            made = model.hr_features(part_of(hr, tile.around, model.scale)).movedim(-1, 2)
            if i == 0:
                out = made.new_empty(*hr.shape[:2], *grid, made.shape[2])
            part_of(out.movedim(-1, 2), tile.core).copy_(tile.cut(made))
        return out

    def frames(
        self, model: SwinXVR, lr: Tensor, hr: Tensor, hr_offset: Tensor, features: Tensor
    ) -> Tensor:
        """lr (B, N, 1, h, w), hr (B, 2, 1, H, W), features (B, 2, h, w, C)
        -> (B, N_out, 1, H, W)."""
        fused = model.bayesian(lr, hr) if model.base == "bayes" else None
        out = hr.new_empty(lr.shape[0], model.n_out, *hr.shape[2:])
        for tile in tiles(lr.shape[-2:], self.side, model.halo, model.window):
            around, s = tile.around, model.scale
            made = model(
                part_of(lr, around),
                part_of(hr, around, s),
                hr_offset,
                features[:, :, around[0], around[1]],
                None if fused is None else part_of(fused, around, s),
            )
            part_of(out, tile.core, s).copy_(tile.cut(made, s))
        return out


def _baseline_in_tiles(baseline: Baseline, halo: int, side: int) -> Method:
    def method(sample: dict[str, Tensor]) -> Tensor:
        lr, hr = sample["lr"], sample["hr"]
        scale = hr.shape[-1] // lr.shape[-1]
        out = hr.new_empty(lr.shape[0], 1, *hr.shape[2:])
        for tile in tiles(lr.shape[-2:], side // scale, halo):
            part = {
                "lr": part_of(lr, tile.around),
                "hr": part_of(hr, tile.around, scale),
                "hr_offset": sample["hr_offset"],
            }
            part_of(out, tile.core, scale).copy_(tile.cut(baseline(part), scale))
        return out

    return method
