"""The Python interface: open the recordings of two cameras, load a model, iterate over frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hpc_xvr.config import Config
from hpc_xvr.data.cameras import Recording
from hpc_xvr.data.cameras.arrays import ArrayLike
from hpc_xvr.data.cameras.pva import channel_of
from hpc_xvr.data.pairing.joining import Pairing
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.data.registering.register import registered
from hpc_xvr.data.registration import Registration, read_registration
from hpc_xvr.distributed.comm import device_of
from hpc_xvr.distributed.launch import discover
from hpc_xvr.errors import InputError
from hpc_xvr.reconstruction.material import (
    CameraFiles,
    Material,
    check_agreement,
    check_gaps,
    from_recordings,
)
from hpc_xvr.reconstruction.methods import NamedMethod, open_method
from hpc_xvr.reconstruction.streams import remembered
from hpc_xvr.reconstruction.tiles import in_tiles
from hpc_xvr.reconstruction.trust import held_out
from hpc_xvr.reconstruction.trust.examination import Examiner, Looked
from hpc_xvr.reconstruction.trust.held_out import HeldOut
from hpc_xvr.reconstruction.trust.observation import observe
from hpc_xvr.reconstruction.trust.uncertainty import surroundings
from hpc_xvr.reconstruction.watching import Watched, frames_as_they_come
from hpc_xvr.reconstruction.workflow import Wanted, chosen_frames, frames_of


@dataclass(frozen=True)
class Model:
    """A trained network or a method without learning, ready to run; made by `load_model`."""

    name: str
    config: Config
    """The config that it was trained with; the default one of a method without learning."""
    step: int
    """Optimizer steps that it was trained for; 0 if unknown."""
    device: torch.device
    precision: str
    """float32, bf16 or float64."""
    lr_frames: int
    """Low-resolution frames that one forward pass takes; odd. 0: those of a whole gap."""
    frames_out: int
    """Frames that one forward pass returns: 1 or `lr_frames`. 0: those of a whole gap."""
    scale: int | None
    """Side of a fast-camera pixel in sharp-camera pixels; None: any."""
    longest_gap: int | None
    """Largest distance of key frames that it was trained for; None: unknown, or any."""
    method: NamedMethod = field(repr=False)


def open_recording(
    source: str | Path | ArrayLike,
    *,
    flat: str | Path | None = None,
    dark: str | Path | None = None,
    dataset: str | None = None,
    bit_depth: int | None = None,
    full_scale: float | None = None,
    flip_rows: bool = False,
    frame_rate_hz: float | None = None,
    pixel_size_um: float | None = None,
    camera: str | None = None,
    allow_links: Sequence[str | Path] = (),
    missing: Literal["skip"] | None = None,
) -> Recording:
    """Open the recording of one camera; frames are read when they are needed.

    Args:
        source: Photron .mraw/.cih/.cihx, Phantom .cine, Shimadzu .dat, HDF5 (FILE.h5::DATASET for
            one of several), TIFF stack, folder or glob of numbered TIFF or PNG files, folder of
            OME-Zarr; or an array (T, H, W) of numpy, h5py, zarr, dask or the like: uint8 or uint16
            counts, or floating-point values from 0 to `full_scale`.
        flat, dark: recordings without sample and without beam; the frames of each are averaged.
            With a flat field, frames are transmissions (raw - dark) / (flat - dark).
        dataset: path inside an HDF5 file.
        bit_depth: significant bits of integers, if fewer than their type has.
        full_scale: physical value that is stored as white, for transmissions (default: 1.5),
            floating-point files (default: their maximum) and floating-point arrays (default: 1).
        flip_rows: turn the frames upside down.
        frame_rate_hz, pixel_size_um, camera: replace what the file says. The pixel size is that
            on the object.
        allow_links: folders that an HDF5 file may lead into (by links, virtual datasets and raw
            files) beside its own.
        missing: skip leaves out frames that are missing or cannot be read, with a warning, and
            keeps the times of the others; all frames are read once for it. Without it such frames
            are an error.

    Raises:
        InputError: the file is missing, damaged or of an unknown format, or an option does not
            apply to its format.
    """
    return CameraReading(
        flat=flat,
        dark=dark,
        dataset=dataset,
        bit_depth=bit_depth,
        full_scale=full_scale,
        flip_rows=flip_rows,
        frame_rate_hz=frame_rate_hz,
        pixel_size_um=pixel_size_um,
        camera=camera,
        allow_links=tuple(allow_links),
        missing=missing,
    ).open(source)


def load_model(
    path: str | Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    checkpoint: Literal["newest", "best"] = "newest",
) -> Model:
    """Load a trained network, or a method without learning.

    Args:
        path: `builtin` or `builtin:NAME` (weights that come with the package), run folder, file of
            `hpc-xvr export`, checkpoint, weights of the authors' program, or the name of a method
            without learning, such as `bayes`.
        device: auto uses a GPU if there is one.
        checkpoint: which one of a run folder: the newest valid one, or that of the best validation.

    Raises:
        InputError: there is no trained model at `path`, or its weights do not fit its config.
    """
    place = device_of(discover(), device)
    method = open_method(path, place, checkpoint)
    return Model(
        name=str(path),
        config=method.config or Config(),
        step=method.step,
        device=place,
        precision=method.precision,
        lr_frames=1 if method.lr_frames is None else method.lr_frames,
        frames_out=method.n_out,
        scale=method.scale,
        longest_gap=method.longest_gap,
        method=method,
    )


def reconstruct(
    model: Model,
    fast: Recording | ArrayLike,
    sharp: Recording | ArrayLike,
    *,
    gap: float | None = None,
    start: float | None = None,
    registration: Registration | dict[str, Any] | str | Path | None = None,
    match_grey: bool = True,
    crop: bool = False,
    force: bool = False,
    frames: tuple[int | None, int | None] = (None, None),
    beyond: bool = False,
    tile: int | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Reconstruct sharp frames at the fast camera's rate, from the first key frame to the last.

    Args:
        model: made by `load_model`.
        fast, sharp: the two cameras' recordings, or arrays (T, h, w) and (K, H, W) as
            `open_recording` takes them.
        gap: fast frames from one sharp frame to the next. Default: that of the registration, else
            from the frame rates or, if they are unknown, as the model was trained.
        start: time of the first fast frame, in sharp frames from the first sharp one. Default:
            that of the registration, else 0.
        registration: where the fast camera's pixels lie on the sharp frames, and when it took its
            frames: as `register` returns it, or a file that `hpc-xvr register` wrote. Default: the
            upper left corners coincide, and (H, W) is scale * (h, w).
        match_grey: bring the fast frames to the sharp camera's grey scale where a gain and an
            offset between the two are certain.
        crop: cut the sharp frames to what the fast camera saw and to multiples of the scale.
        force: go on where key frames lie further apart than the model was trained for, or the
            cameras do not agree.
        frames: first one and the one after the last; only gaps that hold some of them are computed.
        beyond: also the frames before the first and after the last key frame, from that one alone.
        tile: make frames in tiles of so many sharp pixels a side, with what they depend on around
            them, for those that take more memory than there is; the same to rounding.

    Yields:
        (t, frame) in order of time, as they are made: t is the index of the frame in `fast`; the
        frame (H, W) is float32 in [0, 1], where 1 stands for `sharp.full_scale`. Key frames are
        passed through.

    Raises:
        InputError: the recordings do not fit each other or the model.
    """
    material = _material(model, fast, sharp, gap, start, registration, match_grey, crop)
    chosen = chosen_frames(material, Wanted(frames, beyond), "reconstruct")
    check_agreement(material.doubt, force)
    check_gaps(model.method, list(material.keys), force, chosen)
    return frames_of(in_tiles(model.method, tile), material, model.device, chosen)


def follow(
    model: Model,
    fast: str | Path,
    sharp: str | Path,
    *,
    fast_camera: CameraReading | None = None,
    sharp_camera: CameraReading | None = None,
    gap: float | None = None,
    start: float | None = None,
    registration: Registration | dict[str, Any] | str | Path | None = None,
    match_grey: bool = True,
    crop: bool = False,
    force: bool = False,
    frames: tuple[int | None, int | None] = (None, None),
    tile: int | None = None,
    silence: float = 30.0,
    wait: float | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Reconstruct as `reconstruct` while the cameras record: each gap as soon as its second key
    frame is there.

    Args:
        fast, sharp: recordings that grow: HDF5 files, or folders of numbered images; they need not
            be there yet.
        fast_camera, sharp_camera: how they are read, where the files do not say it themselves.
        silence: the recordings have ended when no frame has come for so many seconds, unless their
            writers say so before.
        wait: seconds that the cameras have to begin. Default: 600.

    Yields:
        (t, frame) as `reconstruct`, the frames of a gap one after the other. The grey scales of the
        cameras are compared at the first two key frames, and so held; `reconstruct` compares them
        at all, which may give slightly other frames.

    Raises:
        InputError: a recording does not begin, cannot be followed, shrinks or vanishes, or the two
            do not fit each other or the model.
    """
    for path in (fast, sharp):
        if channel_of(path):
            raise InputError(
                f"{path}: a channel is followed by the command, which can send the frames on to "
                "Python: hpc-xvr reconstruct ... --out pva://NAME"
            )
    pairing = _pairing(gap, start, registration, match_grey)
    reading = fast_camera or CameraReading(), sharp_camera or CameraReading()
    source = CameraFiles(Path(fast), Path(sharp), *reading, pairing, crop)
    method = in_tiles(model.method, tile)
    watched = Watched(
        *(method, model.device, source, frames), force=force, silence=silence, wait=wait
    )
    return frames_as_they_come(watched)


def register(
    fast: Recording | ArrayLike,
    sharp: Recording | ArrayLike,
    *,
    gap: float | None = None,
    near: Registration | dict[str, Any] | None = None,
    affine: bool = False,
) -> Registration:
    """Find where the fast camera's pixels lie on the sharp frames, and when it took its frames.

    Args:
        fast, sharp: the two cameras' recordings of one shot, as `reconstruct` takes them.
        gap: fast frames from one sharp frame to the next. Default: from the frame rates or, if
            they are unknown, from what moves.
        near: a registration that is roughly right; others are not looked for.
        affine: pixels need not be square, nor axes at right angles.

    Returns:
        The registration; `time` is None where nothing moves, `found` holds score and uncertainties.

    Raises:
        InputError: a recording shows nothing, or the two do not match: nothing is guessed.
    """
    if isinstance(near, dict):
        near = Registration.model_validate(near)
    found = registered(_recording(sharp), _recording(fast), gap=gap, near=near, affine=affine)
    return found.registration


@dataclass(frozen=True)
class CheckedFrame:
    """A frame, and how far it may be believed; made by `reconstruct_checked`."""

    t: int
    """Index of the frame in the fast recording."""
    frame: np.ndarray = field(repr=False)
    """(H, W) float32 in [0, 1], where 1 stands for `sharp.full_scale`."""
    deviation: np.ndarray = field(repr=False)
    """(H, W) float32: one standard deviation of each pixel, in the frame's units: 68 % of the
    pixels lie nearer than that to what the sharp camera would have recorded."""
    contradicts: bool
    """Does the fast camera's measurement contradict the frame?"""
    chi_square: float
    """Reduced chi-square of the comparison with it: about 1 where noise is all the difference."""
    place: tuple[int, int]
    """Row and column around which they differ most."""
    aside: np.ndarray = field(repr=False)
    """(h, w) float32: (measured - expected) / deviation, on the fast camera's grid."""


def reconstruct_checked(
    model: Model,
    fast: Recording | ArrayLike,
    sharp: Recording | ArrayLike,
    *,
    gap: float | None = None,
    start: float | None = None,
    registration: Registration | dict[str, Any] | str | Path | None = None,
    match_grey: bool = True,
    crop: bool = False,
    force: bool = False,
    enforce: bool = False,
    check: HeldOut | None = None,
    tile: int | None = None,
) -> Iterator[CheckedFrame]:
    """Reconstruct as `reconstruct`, and look at each frame.

    Args:
        enforce: make the frames agree with the fast camera's, within their noise. `contradicts`
            and what belongs to it are those of the frame before that.
        check: what `check_keys` gave for this recording; scales the deviations.
        tile: as for `reconstruct`.

    Raises:
        InputError: the recordings do not fit each other or the model.
    """
    material = _material(model, fast, sharp, gap, start, registration, match_grey, crop)
    check_agreement(material.doubt, force)
    check_gaps(model.method, list(material.keys), force)
    lr, keys = remembered(material.lr, material.keys)
    material = replace(material, lr=lr, keys=keys)
    examiner = Examiner(
        lr,
        keys,
        surroundings(keys, observe(lr, keys)),
        agree=enforce,
        deviations=True,
        factor=check.factor if check else 1.0,
    )
    frames = frames_of(in_tiles(model.method, tile), material, model.device)
    return (_checked(examiner.look(t, frame)) for t, frame in frames)


def _checked(looked: Looked) -> CheckedFrame:
    found = looked.comparison
    assert looked.deviation is not None
    return CheckedFrame(
        looked.t,
        looked.frame,
        looked.deviation,
        found.contradicts,
        found.chi_square,
        found.place,
        found.aside,
    )


def check_keys(
    model: Model,
    fast: Recording | ArrayLike,
    sharp: Recording | ArrayLike,
    *,
    gap: float | None = None,
    start: float | None = None,
    registration: Registration | dict[str, Any] | str | Path | None = None,
    match_grey: bool = True,
    crop: bool = False,
    force: bool = False,
    tile: int | None = None,
) -> HeldOut:
    """Leave out every other key frame, make it from its neighbours at twice the gap, and compare it
    with what was recorded: an estimate of the movie's error on the safe side.

    The arguments are those of `reconstruct`. `mean_psnr`, `ssim`, `nrmse` and the map `error` say
    how far off the key frames left out were, `expected_psnr` what is to be expected of the movie.

    Raises:
        InputError: fewer than three key frames, or recordings that do not fit.
    """
    material = _material(model, fast, sharp, gap, start, registration, match_grey, crop)
    lr, keys = remembered(material.lr, material.keys)
    held_out.left_out(list(keys))
    check_agreement(material.doubt, force)
    check_gaps(model.method, list(keys), force)
    around = surroundings(keys, observe(lr, keys))
    return held_out.check(in_tiles(model.method, tile), lr, keys, around, model.device)


def _material(
    model: Model,
    fast: Recording | ArrayLike,
    sharp: Recording | ArrayLike,
    gap: float | None,
    start: float | None,
    registration: Registration | dict[str, Any] | str | Path | None,
    match_grey: bool,
    crop: bool,
) -> Material:
    pairing = _pairing(gap, start, registration, match_grey)
    return from_recordings(model.method, _recording(fast), _recording(sharp), pairing, crop)


def _pairing(
    gap: float | None,
    start: float | None,
    registration: Registration | dict[str, Any] | str | Path | None,
    match_grey: bool,
) -> Pairing:
    if isinstance(registration, dict):
        registration = Registration.model_validate(registration)
    elif isinstance(registration, (str, Path)):
        registration = read_registration(str(registration))
    return Pairing(gap, start, registration, match_grey)


def _recording(source: Recording | ArrayLike) -> Recording:
    return source if isinstance(source, Recording) else open_recording(source)
