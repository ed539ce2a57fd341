"""Draws the two pictures of how hpc_xvr works: the network, and the way of the data.

python docs/drawings.py             writes docs/pictures/network.svg and program.svg
python docs/drawings.py --png DIR   the same as PNG, to look at
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parent / "pictures"
INK, GREY, PAPER = "#1f2933", "#66727f", "#ffffff"
DATA, WORK, FILES, NOTE = "#dcecf9", "#fbe8d3", "#e3f1de", "#f3f4f6"
EDGES = {DATA: "#3b7db5", WORK: "#c9781f", FILES: "#4d8a3d", NOTE: "#9aa5b1"}
SMALL, NORMAL, LARGE = 8.2, 9.4, 11

matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "hpc_xvr"})


class Sheet:
    """A drawing in units of a hundredth of its width."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width / 10, height / 10), facecolor=PAPER)
        FigureCanvasAgg(self.figure)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)
        self.axes.axis("off")

    def box(
        self, place: tuple[float, float, float, float], title: str, *lines: str, kind: str = WORK
    ) -> None:
        """A box at (x, y, width, height): a title, and smaller lines below it."""
        x, y, w, h = place
        style = "round,pad=0,rounding_size=0.8"
        self.axes.add_patch(
            FancyBboxPatch((x, y), w, h, boxstyle=style, fc=kind, ec=EDGES[kind], lw=1.1)
        )
        self.text(x + w / 2, y + h / 2 - 0.95 * len(lines), title, NORMAL, weight="bold")
        if lines:
            self.text(x + w / 2, y + h / 2 + 1.15, "\n".join(lines), SMALL)

    def frame(self, x: float, y: float, w: float, h: float, title: str) -> None:
        """A dashed frame around what belongs together."""
        self.axes.add_patch(
            Rectangle((x, y), w, h, fc="none", ec=EDGES[NOTE], lw=1, ls=(0, (4, 3)))
        )
        self.text(x + 1.2, y + 1.9, title, NORMAL, ha="left", color=GREY, weight="bold")

    def text(self, x: float, y: float, text: str, size: float = SMALL, **style: object) -> None:
        options = {"ha": "center", "va": "center", "color": INK, **style}
        self.axes.text(x, y, text, fontsize=size, linespacing=1.35, **options)

    def arrow(self, *points: tuple[float, float], label: str = "", dashed: bool = False) -> None:
        """Straight pieces from point to point, the last with a head."""
        style = {"color": GREY, "lw": 1.3, "ls": (0, (3, 2)) if dashed else "-"}
        for (x0, y0), (x1, y1) in pairwise(points[:-1]):
            self.axes.plot([x0, x1], [y0, y1], solid_capstyle="round", **style)
        self.axes.add_patch(
            FancyArrowPatch(
                *points[-2:], arrowstyle="-|>", mutation_scale=10, shrinkA=0, shrinkB=0, **style
            )
        )
        if label:
            (x0, y0), (x1, y1) = points[-2:]
            self.text((x0 + x1) / 2, (y0 + y1) / 2 - 1.3, label, SMALL, color=GREY)

    def plus(self, x: float, y: float) -> None:
        """A sum."""
        self.axes.plot([x], [y], "o", ms=13, mfc=PAPER, mec=INK, mew=1.1, zorder=3)
        self.text(x, y, "+", LARGE, zorder=4)

    def stack(self, x: float, y: float, side: float, count: int, shade: str) -> None:
        """Frames one behind the other."""
        for i in reversed(range(count)):
            at = (x + 0.9 * i, y - 0.9 * i)
            self.axes.add_patch(Rectangle(at, side, side, fc=shade, ec=EDGES[DATA], lw=1))


def network() -> Figure:
    """The published SWIN-XVR, and the base that may be added to it."""
    s = Sheet(122, 66)
    s.stack(3, 8, 5, 3, DATA)
    s.text(7, 15.8, "fast camera:\n3 frames, h x w")
    s.stack(1.5, 29, 9, 2, DATA)
    s.text(7, 41.2, "sharp camera:\n2 key frames, 4h x 4w")

    s.box((19, 5, 17, 9), "features", "conv 3x3 to 192 channels,", "LeakyReLU")
    s.box(
        (19, 26, 17, 15),
        "features",
        "conv 3x3 to 192 channels,",
        "LeakyReLU; then twice:",
        "conv 3x3, LeakyReLU,",
        "max-pool to half the grid",
    )
    s.arrow((11.5, 9.5), (19, 9.5))
    s.arrow((12.5, 33.5), (19, 33.5))

    s.box(
        (42, 13, 14, 13),
        "5 frames",
        "of features, side",
        "by side in time,",
        "on the h x w grid",
        kind=DATA,
    )
    s.arrow((36, 9.5), (39, 9.5), (39, 16.5), (42, 16.5))
    s.arrow((36, 33.5), (39, 33.5), (39, 22.5), (42, 22.5))

    s.box(
        (61, 13, 18, 13),
        "4 stages",
        "of 2, 2, 18 and 2 blocks;",
        "each ends with a conv 3x3",
        "and a sum with its input",
    )
    s.arrow((56, 19.5), (61, 19.5))
    s.box((83, 14, 11, 11), "conv 3x3", "after LayerNorm")
    s.arrow((79, 19.5), (83, 19.5))
    s.plus(98.5, 19.5)
    s.arrow((94, 19.5), (96.8, 19.5))
    s.arrow((58.5, 19.5), (58.5, 8.5), (98.5, 8.5), (98.5, 17.7))
    s.text(78, 7.2, "skip connection", color=GREY)

    s.box(
        (89, 30, 19, 13),
        "upsampling",
        "conv to 64, LeakyReLU;",
        "twice: conv to 256,",
        "pixel shuffle; conv to 1",
    )
    s.arrow((98.5, 21.3), (98.5, 30))
    s.text(99.8, 25.8, "the centre frame,\nor all three", ha="left", color=GREY)
    s.plus(98.5, 55)
    s.arrow((98.5, 43), (98.5, 53.2))
    s.stack(107, 51, 9, 1, DATA)
    s.arrow((100.3, 55), (107, 55))
    s.text(111.5, 62, "sharp frame, 4h x 4w")

    s.box((19, 50, 17, 10), "base", "none, bicubic, detail,", "adaptive or bayes", kind=NOTE)
    s.arrow((15.8, 9.5), (15.8, 55), (19, 55), dashed=True)
    for y in (9.5, 33.5):
        s.axes.plot([15.8], [y], "o", ms=3.5, color=GREY)
    s.arrow((36, 55), (96.7, 55), dashed=True)
    s.text(80, 53.6, "optional; the paper has none", color=GREY)

    s.frame(42, 31, 42, 18, "one block")
    s.arrow((70, 31), (70, 26), dashed=True)
    s.box((45, 37, 14, 7), "norm, attention", "in windows", kind=NOTE)
    s.box((66, 37, 10, 7), "norm, MLP", "x 2, GELU", kind=NOTE)
    s.plus(62.5, 40.5)
    s.plus(79.5, 40.5)
    s.arrow((42, 40.5), (45, 40.5))
    s.arrow((59, 40.5), (60.8, 40.5))
    s.arrow((64.2, 40.5), (66, 40.5))
    s.arrow((76, 40.5), (77.8, 40.5))
    s.arrow((81.2, 40.5), (84, 40.5))
    s.arrow((43.3, 40.5), (43.3, 35), (62.5, 35), (62.5, 38.7))
    s.arrow((65, 40.5), (65, 35), (79.5, 35), (79.5, 38.7))
    s.text(63, 46.8, "windows of 5 x 8 x 8 tokens; every second block shifts them by 4", color=GREY)
    return s.figure


def program() -> Figure:
    """Which package makes what of what."""
    s = Sheet(124, 62)
    s.box((2, 3, 17, 10), "camera files", "Photron, Phantom,", "Shimadzu, HDF5, images", kind=FILES)
    s.box((23, 3, 15, 10), "data.cameras", "a reader for", "each format")
    s.box((42, 3, 17, 10), "data.pairing", "grey levels; how two", "cameras fit together")
    s.box((63, 3, 15, 10), "data.ingest", "many files at once")
    s.box((63, 17, 15, 10), "data.simulate", "experiments with", "a known truth")
    s.box((84, 10, 17, 10), "corpus", "Zarr or HDF5, with", "checksums (data.corpus)", kind=FILES)
    for x0, x1 in ((19, 23), (38, 42), (59, 63)):
        s.arrow((x0, 8), (x1, 8))
    s.arrow((78, 8), (81, 8), (81, 13), (84, 13))
    s.arrow((78, 22), (81, 22), (81, 17), (84, 17))
    s.box((106, 10, 16, 10), "data.samples", "crops for step k, the", "same on any ranks")
    s.arrow((101, 15), (106, 15))

    s.box((106, 29, 16, 12), "train", "loss, gradients,", "update, validation,", "checkpoints")
    s.arrow((114, 20), (114, 29))
    s.box((84, 25, 17, 7), "distributed", "Horovod, torch, serial")
    s.arrow((101, 28.5), (103.5, 28.5), (103.5, 32), (106, 32))
    s.box((84, 35, 17, 10), "factory", "config and weights", "to a model that runs")
    s.arrow((101, 38), (106, 38))
    s.box((63, 31, 15, 7), "model", "networks, CPU kernels")
    s.arrow((78, 34.5), (81, 34.5), (81, 38), (84, 38))
    s.box((106, 49, 16, 10), "runs/NAME", "config, metrics,", "checkpoints, pictures", kind=FILES)
    s.arrow((114, 41), (114, 49))
    s.arrow((106, 54), (92.5, 54), (92.5, 45))
    s.text(99, 52.7, "weights", color=GREY)

    s.box((42, 35, 17, 10), "reconstruction", "frame by frame, from", "key frame to key frame")
    s.arrow((84, 42), (59, 42), label="model")
    s.arrow((50.5, 13), (50.5, 35))
    s.text(51.7, 24, "two recordings", ha="left", color=GREY)
    s.box((23, 35, 15, 10), "movie", "TIFF, HDF5;", "WebP, GIF to look at", kind=FILES)
    s.arrow((42, 40), (38, 40))
    s.box((42, 49, 17, 10), "evaluate", "methods, scores,", "intervals")
    s.arrow((50.5, 45), (50.5, 49))
    s.box((23, 49, 15, 10), "comparison", "tables, charts,", "comparison.html", kind=FILES)
    s.arrow((42, 54), (38, 54))
    s.box((2, 49, 17, 10), "report", "one page to", "send around")
    s.arrow((23, 54), (19, 54))

    s.box(
        (2, 18, 17, 22),
        "hpc-xvr",
        "cli: one command",
        "for each workflow",
        "",
        "config: YAML and --set",
        "",
        "submit: jobs for",
        "Slurm and PBS",
        kind=NOTE,
    )
    return s.figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--png", type=Path, help="write PNG into this folder instead")
    given = parser.parse_args()
    folder, kind = (given.png, "png") if given.png else (given.folder, "svg")
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("network", network), ("program", program)):
        metadata = {"Date": None} if kind == "svg" else None
        draw().savefig(folder / f"{name}.{kind}", dpi=110, metadata=metadata)


if __name__ == "__main__":
    main()
