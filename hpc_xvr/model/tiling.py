"""Frames in tiles: which part of a frame a tile needs to come out as it would in the whole frame.

A tile is a rectangle of the coarse grid. It is made from itself and a halo: the pixels around it
that it depends on. What lies at the rim of the halo comes out wrong, as the frame seems to end
there, and is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

Part = tuple[slice, slice]
"""Rows and columns."""


class Tile(NamedTuple):
    """A rectangle of the coarse grid, and the larger one that it is made from."""

    core: Part
    around: Part

    def cut(self, x: Tensor, scale: int = 1) -> Tensor:
        """The core of what was made of `around`: (..., scale*h', scale*w') -> smaller."""
        top, left = corner_of(self.around)
        rows, columns = self.core
        inner = (
            slice(rows.start - top, rows.stop - top),
            slice(columns.start - left, columns.stop - left),
        )
        return part_of(x, inner, scale)


def tiles(shape: Sequence[int], side: int, halo: int, align: int = 1) -> Iterator[Tile]:
    """Tiles that cover a grid of `shape` (h, w), row by row.

    Args:
        side: of a tile; rounded down to a multiple of `align`, at least one of them.
        halo: pixels around it; rounded up to a multiple of `align`.
        align: tiles and halos begin at multiples of it, where they do not end with the grid.
    """
    side = max(1, side // align) * align
    halo = -(-halo // align) * align
    rows, columns = (
        [
            (slice(i, min(i + side, n)), slice(max(i - halo, 0), min(i + side + halo, n)))
            for i in range(0, n, side)
        ]
        for n in shape
    )
    for row in rows:
        for column in columns:
            yield Tile((row[0], column[0]), (row[1], column[1]))


def part_of(x: Tensor, part: Part, scale: int = 1) -> Tensor:
    """That part of the coarse grid, of frames `scale` times as fine: a view, nothing is copied."""
    rows, columns = (slice(along.start * scale, along.stop * scale) for along in part)
    return x[..., rows, columns]


def corner_of(part: Part) -> tuple[int, int]:
    """Its first row and column."""
    return part[0].start, part[1].start


def reach_of_windows(reach: int, blocks: int, window: int) -> int:
    """How far shifted-window blocks see, in pixels beyond a tile that begins and ends with a
    window.

    Args:
        reach: how far what comes after them looks beyond the tile.
        blocks: windows lie at multiples of `window` in the first, third, ... and half a window
            further in the others.
    """
    before, after = -reach, reach  # first and last, where the tile is nothing but its edge at 0
    for block in reversed(range(blocks)):
        shift = window // 2 if block % 2 else 0
        before = (before - shift) // window * window + shift
        after = -(-(after - shift) // window) * window + shift
    return max(-before, after)
