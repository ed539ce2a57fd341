"""Options that say how camera files are read: the same names wherever files are opened.

`--hr-...` is for the sharp camera, `--lr-...` for the fast one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from hpc_xvr.cli.common import File
from hpc_xvr.errors import InputError

if TYPE_CHECKING:
    from hpc_xvr.data.pairing.agreement import Grey
    from hpc_xvr.data.pairing.joining import Pairing
    from hpc_xvr.data.pairing.reading import CameraReading
    from hpc_xvr.reconstruction.material import Source

Command = TypeVar("Command", bound=Callable[..., Any])
_NAMES = {"hr": "Sharp camera", "lr": "Fast camera"}


class _Option(NamedTuple):
    field: str
    """Field of CameraReading, or a dataset that belongs to one."""
    name: str
    help: str
    settings: dict[str, Any]


_A_FILE = {"type": File(), "metavar": "FILE"}
_READING = (
    _Option("flat", "flat", "Recording without sample, for flat-field correction.", _A_FILE),
    _Option("dark", "dark", "Recording without beam, for the same.", _A_FILE),
    _Option(
        "flat_dataset",
        "flat-dataset",
        "Dataset of the flat field, if that is an HDF5 file; the same as FILE.h5::PATH.",
        {"metavar": "PATH"},
    ),
    _Option(
        "dark_dataset", "dark-dataset", "Dataset of the dark field, likewise.", {"metavar": "PATH"}
    ),
    _Option(
        "dataset",
        "dataset",
        "Dataset in HDF5 files, such as /exchange/data.",
        {"metavar": "PATH"},
    ),
    _Option(
        "bit_depth",
        "bit-depth",
        "Significant bits, if the file does not state them (12-bit data in 16-bit TIFF), or states "
        "them wrongly.",
        {"type": click.IntRange(1, 16)},
    ),
    _Option(
        "full_scale",
        "full-scale",
        "Value stored as white. [default: 1.5 for transmissions, the maximum for floating-point "
        "files]",
        {"type": click.FloatRange(min=0, min_open=True)},
    ),
    _Option(
        "flip_rows",
        "flip-rows",
        "Turn frames upside down (Shimadzu's row order differs by instrument).",
        {"is_flag": True},
    ),
    _Option(
        "frame_rate_hz",
        "frame-rate",
        "Frame rate, instead of what the file says.",
        {"type": float, "metavar": "HZ"},
    ),
    _Option(
        "pixel_size_um",
        "pixel-size",
        "Size of a pixel on the object, instead of what the file says.",
        {"type": float, "metavar": "UM"},
    ),
    _Option("camera", "camera", "Name of the camera, instead of what the file says.", {}),
    _Option(
        "missing",
        "missing",
        "Leave out frames that are missing or cannot be read, with a warning; nan: `reconstruct` "
        "writes NaN in place of those of the fast camera. [default: they are an error]",
        {"type": click.Choice(["skip", "nan"])},
    ),
)


def camera_options(camera: str, short: bool = False) -> Callable[[Command], Command]:
    """A decorator that adds `--hr-flat` and so on, or `--lr-...`; `short`: also without prefix."""

    def decorate(command: Command) -> Command:
        for option in reversed(_READING):
            names = [f"--{camera}-{option.name}", f"{camera}_{option.field}"]
            if short:
                names.insert(0, f"--{option.name}")
            text = option.help
            if not short:
                text = f"{_NAMES[camera]}: {text[0].lower()}{text[1:]}"
            command = click.option(*names, help=text, **option.settings)(command)
        return command

    return decorate


def links_option(command: Command) -> Command:
    """A decorator that adds `--allow-links`, for the files of both cameras and their fields."""
    return click.option(
        "--allow-links",
        multiple=True,
        type=File(),
        metavar="DIR",
        help="Folder that HDF5 files may lead into, by links, virtual datasets and raw files, "
        "beside their own; may be repeated.",
    )(command)


def pairing_options(command: Command) -> Command:
    """A decorator that adds `--gap`, `--lr-start`, `--registration` and `--crop`: how the two
    recordings fit together."""
    for decorate in reversed(
        (
            click.option(
                "--gap",
                type=click.FloatRange(min=0, min_open=True),
                help="Fast frames from one sharp frame to the next. "
                "[default: that of the registration, else from the frame rates]",
            ),
            click.option(
                "--lr-start",
                type=float,
                help="Time of the first fast frame, in sharp frames from the first sharp one. "
                "[default: that of the registration, else 0]",
            ),
            click.option(
                "--registration",
                metavar="FILE|TEXT",
                help="Where the fast camera's pixels lie on the sharp frames: a file made by "
                "`hpc-xvr register`, or YAML or JSON with "
                "scale (side of a fast pixel in sharp ones), origin [row, column] of the fast "
                "frame's upper left corner, rotation_deg, flip (rows, columns, both).",
            ),
            click.option(
                "--match-grey",
                metavar="auto|off|GAIN,OFFSET",
                default="auto",
                show_default=True,
                help="Bring the fast frames to the sharp camera's grey scale where a gain and an "
                "offset between the two are certain; or these: fast = GAIN x sharp + OFFSET, in "
                "shares of their full scales.",
            ),
            click.option(
                "--crop",
                is_flag=True,
                help="Cut the sharp frames to what the fast camera saw and to multiples of the "
                "scale.",
            ),
        )
    ):
        command = decorate(command)
    return command


def source_options(command: Command) -> Command:
    """A decorator that adds all options that say what is reconstructed: two camera files, or a
    recording of a corpus."""
    a_path = File()
    for decorate in reversed(
        (
            click.option("--lr", type=a_path, help="Recording of the fast camera."),
            click.option("--hr", type=a_path, help="Recording of the slow, sharp camera."),
            pairing_options,
            camera_options("lr"),
            camera_options("hr"),
            links_option,
            click.option("--video", help="Recording of a corpus, instead of two files."),
            click.option(
                "--corpus", type=a_path, help="Corpus of --video. [default: the run's own]"
            ),
        )
    ):
        command = decorate(command)
    return command


def take_source(options: dict[str, Any]) -> Source:
    """Take the options of `source_options` out of those of a command.

    Raises:
        InputError: neither or both of two camera files and a recording of a corpus.
    """
    from hpc_xvr.reconstruction.material import CameraFiles, CorpusRecording

    hr_camera, lr_camera = take_readings(options)
    pairing = take_pairing(options)
    lr, hr, video, corpus, crop = (options.pop(n) for n in ("lr", "hr", "video", "corpus", "crop"))
    if lr and hr and not video:
        if corpus:
            raise InputError(
                "--corpus is for --video: leave it out for camera files (--lr and --hr)"
            )
        return CameraFiles(lr, hr, lr_camera, hr_camera, pairing, crop)
    if not video or lr or hr:
        raise InputError(
            "give either --lr and --hr (two camera files) or --video (a recording of the corpus)"
        )
    stated = {**lr_camera.described(), **hr_camera.described()}
    matched = pairing.match_grey is not True
    if stated or pairing.start or pairing.registration or matched or crop:
        raise InputError(
            "options of cameras, --lr-start, --registration, --match-grey and --crop are for "
            "camera files (--lr and --hr); leave them out for a recording of a corpus"
        )
    return CorpusRecording(corpus, video, pairing.gap)


def take_readings(options: dict[str, Any]) -> tuple[CameraReading, CameraReading]:
    """Take the options of the sharp and the fast camera, and `--allow-links`, out of those of a
    command.

    Raises:
        InputError: a dataset of a flat or dark field without its file, or given twice.
    """
    allow_links = options.pop("allow_links")
    hr, lr = (_take_reading(camera, options, allow_links) for camera in ("hr", "lr"))
    return hr, lr


def _take_reading(
    camera: str, options: dict[str, Any], allow_links: Sequence[Path]
) -> CameraReading:
    from hpc_xvr.data.pairing.reading import CameraReading

    given = {option.field: options.pop(f"{camera}_{option.field}") for option in _READING}
    for field in ("flat", "dark"):
        dataset = given.pop(f"{field}_dataset")
        if dataset is None:
            continue
        file = given[field]
        if file is None or "::" in str(file):
            reason = "without a file" if file is None else f"and {file}, which names one itself"
            raise InputError(
                f"--{field}-dataset {dataset} is given {reason}: give --{field} FILE.h5 and the "
                "dataset once"
            )
        given[field] = f"{file}::{dataset}"
    return CameraReading(**given, allow_links=tuple(allow_links))


def take_pairing(options: dict[str, Any]) -> Pairing:
    """Take the options of `pairing_options`, but `--crop`, out of those of a command."""
    from hpc_xvr.data.pairing.joining import Pairing
    from hpc_xvr.data.registration import read_registration

    names = "gap", "lr_start", "registration", "match_grey"
    gap, start, text, match = (options.pop(name) for name in names)
    return Pairing(gap, start, read_registration(text) if text else None, _grey(match))


def _grey(text: str) -> bool | Grey:
    """--match-grey: auto, off, or a gain and an offset."""
    from hpc_xvr.data.pairing.agreement import Grey

    if text in ("auto", "off"):
        return text == "auto"
    with suppress(ValueError):
        gain, offset = map(float, text.split(","))
        if 0 < gain < math.inf and math.isfinite(offset):
            return Grey(gain, offset)
    raise InputError(
        f"--match-grey {text}: give auto, off, or GAIN,OFFSET: a number above 0 and a number"
    )
