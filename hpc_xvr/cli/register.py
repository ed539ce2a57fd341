"""The command that registers two cameras."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpc_xvr.cli.cameras import camera_options, links_option, take_readings
from hpc_xvr.cli.common import Examples, File
from hpc_xvr.cli.ending import then, typed
from hpc_xvr.errors import InputError
from hpc_xvr.log import say

if TYPE_CHECKING:
    from hpc_xvr.data.registration import Registration


@click.command(
    cls=Examples,
    examples="""
    hpc-xvr register fast.dat sharp.cine --out cameras.yaml
    hpc-xvr register fast.tif sharp.tif --gap 20 --out cameras.yaml
    hpc-xvr register grid-fast.tif grid-sharp.tif --affine --out cameras.yaml
    hpc-xvr register fast/ sharp/ --near '{scale: 3, origin: [30, 60]}' \\
        --out cameras.yaml
""",
)
@click.argument("lr", type=File())
@click.argument("hr", type=File())
@click.option("--out", required=True, type=File(), help="Result: a YAML file.")
@click.option(
    "--overlay",
    type=File(),
    help="Picture of the two on each other. [default: OUT with .png for its suffix]",
)
@click.option(
    "--gap",
    type=click.FloatRange(min=0, min_open=True),
    help="Fast frames from one sharp frame to the next, to a percent. [default: from the frame "
    "rates, else found from motion]",
)
@click.option(
    "--near",
    metavar="FILE|TEXT",
    help="A registration that is roughly right; only places near it are looked for.",
)
@click.option("--affine", is_flag=True, help="Pixels need not be square, nor axes at right angles.")
@click.option(
    "--scales",
    metavar="LEAST:MOST",
    default="1.8:5.6",
    show_default=True,
    help="Side of a fast pixel in sharp pixels that is looked for.",
)
@click.option(
    "--rotation",
    type=click.FloatRange(0, 45),
    default=8.0,
    show_default=True,
    help="Largest rotation that is looked for, degrees of either sense.",
)
@camera_options("lr")
@camera_options("hr")
@links_option
def register(
    lr: Path,
    hr: Path,
    out: Path,
    overlay: Path | None,
    gap: float | None,
    near: str | None,
    affine: bool,
    scales: str,
    rotation: float,
    **options: Any,
) -> None:
    """Find where and when the fast camera saw what the sharp one did.

    LR and HR are the recordings of the fast and of the sharp camera of one shot, or of a
    calibration target that does not repeat itself. Scale, rotation, origin and flip are found from
    what both saw; gap, start and drift from what moves. OUT is taken by --registration of ingest,
    reconstruct and adapt.

    Recordings that do not match are refused, nothing is guessed. Give each camera the options that
    ingest or reconstruct will get.
    """
    from hpc_xvr.data.registering.register import registered
    from hpc_xvr.data.registering.results import write_overlay, write_registration
    from hpc_xvr.data.registration import read_registration
    from hpc_xvr.files import check_new_file, check_spared

    picture = overlay or out.with_suffix(".png")
    if picture == out:
        raise InputError(f"{out}: the result and --overlay must be two files")
    check_new_file(out)
    check_new_file(picture)
    check_spared([out, picture], [lr, hr])
    hr_camera, lr_camera = take_readings(options)
    rough = read_registration(near) if near else None
    sharp = hr_camera.open(hr)
    fast = lr_camera.on_scale_of(hr_camera).open(lr)
    found = registered(
        sharp,
        fast,
        gap=gap,
        near=rough,
        affine=affine,
        scales=_range(scales),
        rotation_deg=rotation,
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_overlay(picture, found.registration, found.sharp, found.fast)
    write_registration(out, found.registration)
    _show(found.registration)
    say(f"written: {out}; look at {picture}")
    if len(sharp) < 2:
        say("one sharp frame makes no movie: reconstruct needs two of them, one on either side")
        return
    own = ("out", "overlay", "gap", "near", "affine", "scales", "rotation")
    clock = [] if found.registration.time else ["--gap", gap or "GAP"]
    then("reconstruct", "builtin", "--lr", lr, "--hr", hr, *typed(own), *clock,
         "--registration", out, "--crop", "--out", "MOVIE.tif")  # fmt: skip


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise InputError(f"--scales {text}: give two numbers, such as 1.8:5.6") from None
    return low, high


def _show(registration: Registration) -> None:
    from hpc_xvr.log import print_table

    found, time = registration.found, registration.time
    row, column = registration.origin
    origin = found["origin_deviation"]
    rows: list[list[Any]] = [
        ["scale", f"{registration.scale:.4f}", f"{found['scale_deviation']:.4f}"],
        ["origin, sharp row", f"{row:.2f}", f"{origin[0]:.2f}"],
        ["origin, sharp column", f"{column:.2f}", f"{origin[1]:.2f}"],
        [
            "rotation, degrees",
            f"{registration.rotation_deg:.3f}",
            f"{found['rotation_deviation_deg']:.3f}",
        ],
        ["flip", registration.flip, ""],
        ["corners, fast pixels", "", f"{found['corner_deviation_lr_px']:.3f}"],
    ]
    if time is not None:
        rows += [
            ["gap, fast frames", f"{time.gap:.4f}", _deviation(found, "gap_deviation")],
            [
                "start, sharp frames",
                f"{time.lr_start:.4f}",
                _deviation(found, "lr_start_deviation"),
            ],
        ]
        if time.drift:
            rows.append(["drift", f"{time.drift:.2e}", ""])
    title = f"Registered: correlation {found['score']:.3f}, {100 * found['overlap']:.0f} % overlap"
    print_table(title, ["", "value", "uncertainty (1 sigma)"], rows)


def _deviation(found: dict[str, Any], name: str) -> str:
    return f"{found[name]:.4f}" if name in found else "-"
