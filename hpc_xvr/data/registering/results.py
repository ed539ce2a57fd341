"""What a registration leaves: a YAML file, and a picture for the eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from scipy.ndimage import map_coordinates

from hpc_xvr.data.registering.placing import FLIPS, Thinned, levelled
from hpc_xvr.data.registration import Registration
from hpc_xvr.files import disk_errors, replacing, write_atomic
from hpc_xvr.plotting import STYLE

HEADER = """\
# Where and when the fast camera saw what the sharp one did; made by `hpc-xvr register`.
# Give it to ingest, reconstruct and adapt: --registration {name}
"""
TILES = 8
"""Of the chessboard, along the longer side."""


def write_registration(path: Path, registration: Registration) -> None:
    """Write a file that `read_registration` takes.

    Raises:
        InputError: it cannot be written.
    """
    values = registration.model_dump(mode="json", exclude_none=True)
    text = HEADER.format(name=path.name) + yaml.safe_dump(values, sort_keys=False)
    write_atomic(path, lambda file: file.write(text.encode()))


def write_overlay(
    path: Path, registration: Registration, sharp: np.ndarray, fast: np.ndarray
) -> None:
    """Draw both cameras' pictures of one instant, (H, W) and (h, w), on each other.

    Left: the sharp frame with the fast camera's field of view. Middle: both without local means,
    the sharp one in magenta, the fast one in green: grey where they agree, coloured fringes where
    they do not. Right: a chessboard of the two, whose edges must go through.

    Raises:
        InputError: it cannot be written.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    h, w = fast.shape
    turned = fast[FLIPS[registration.flip]]
    rows, columns = np.meshgrid(np.arange(h) + 0.5, np.arange(w) + 0.5, indexing="ij")
    places = registration.to_hr(np.stack([rows.ravel(), columns.ravel()], 1)).T.reshape(2, h, w)
    smooth, thin = Thinned(sharp).smooth(registration.scale, 0.5)
    seen = map_coordinates(smooth, places / thin - 0.5, order=1, mode="nearest")
    inside = (
        (places[0] >= 0)
        & (places[0] <= sharp.shape[0])
        & (places[1] >= 0)
        & (places[1] <= sharp.shape[1])
    )
    a, b = (np.clip(levelled(one, 15, inside) / 5 + 0.5, 0, 1) for one in (seen, turned))
    colours = np.where(inside[..., None], np.stack([a, b, a], -1), 0.15)
    board = ((rows * TILES // max(h, w)) + (columns * TILES // max(h, w))) % 2 == 0
    greys = [_stretched(one, inside) for one in (seen, turned)]
    chess = np.where(board & inside, greys[0], greys[1])
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(13, 13 / 3 * h / w + 0.9), layout="constrained")
        axes = figure.subplots(1, 3)
        axes[0].imshow(_stretched(sharp, np.ones(sharp.shape, bool)), cmap="gray", vmin=0, vmax=1)
        ring = np.array([(0, 0), (0, w), (h, w), (h, 0), (0, 0)], float)
        ring = registration.to_hr(ring) - 0.5
        axes[0].plot(ring[:, 1], ring[:, 0], color="#e69f00", linewidth=1.5)
        axes[0].set_title("sharp camera, and the fast one's field of view")
        axes[1].imshow(colours)
        axes[1].set_title("sharp magenta, fast green: grey where they agree")
        axes[2].imshow(chess, cmap="gray", vmin=0, vmax=1)
        axes[2].set_title("chessboard of the two")
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
        with replacing(path) as temporary, disk_errors(path):
            figure.savefig(temporary, dpi=110, bbox_inches="tight", pad_inches=0.1)


def _stretched(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    low, high = np.percentile(picture[mask] if mask.any() else picture, (0.5, 99.5))
    stretched: np.ndarray = np.clip((picture - low) / max(high - low, 1e-9), 0, 1)
    return stretched
