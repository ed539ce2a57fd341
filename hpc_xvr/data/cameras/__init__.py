"""Camera files: one reader per format, and one function that opens any of them."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from hpc_xvr.data.cameras import (
    hdf5,
    images,
    numbering,
    ome_zarr,
    phantom_cine,
    photron,
    shimadzu,
)
from hpc_xvr.data.cameras.recording import Recording, guarded
from hpc_xvr.errors import InputError
from hpc_xvr.files import check_regular

__all__ = ["FORMATS", "SUFFIXES", "Recording", "camera_files", "open_camera_file", "open_files"]

PHOTRON = (".mraw", ".cih", ".cihx")
HDF5 = (".h5", ".hdf5", ".hdf", ".nxs")
MATLAB = ".mat"
"""HDF5 if it was saved with -v7.3; not searched for in folders, where it may hold anything."""
SUFFIXES = (*PHOTRON, ".cine", ".dat", *HDF5, *images.IMAGE_SUFFIXES)
FORMATS = (
    "Photron .mraw with .cih or .cihx, Phantom .cine, Shimadzu HPV-X2 .dat, HDF5 (DXchange, "
    f"NeXus or any dataset: {' '.join(HDF5)}, MATLAB v7.3: {MATLAB}), "
    "TIFF stacks, folders of numbered .tif or .png, OME-Zarr 0.5"
)


def open_camera_file(
    path: Path | str,
    *,
    dataset: str | None = None,
    own_flat: bool = True,
    bit_depth: int | None = None,
    full_scale: float | None = None,
    allow_links: Sequence[Path | str] = (),
    missing: bool = False,
) -> Recording:
    """Open a camera file, a folder or glob of numbered images, or the first image of a sequence.

    Args:
        dataset: path inside an HDF5 file; also written FILE.h5::PATH.
        own_flat: apply the white and dark frames that a DXchange file holds.
        bit_depth: significant bits of integers, where the file does not state them, or wrongly.
        full_scale: physical value of the largest stored value, for floating-point files and
            transmissions.
        allow_links: folders that an HDF5 file may lead into, beside its own.
        missing: leave out frames that are missing or cannot be read, for which all are read once;
            without it they are an error.

    Raises:
        InputError: the file is missing, damaged or of an unknown format, or an option does not
            apply to its format.
    """
    with guarded(str(path)):
        files, inner = camera_files(path, missing)
        if inner and dataset and inner.strip("/") != dataset.strip("/"):
            raise InputError(f"{path}: names a dataset other than {dataset}: give only one")
        return open_files(
            files,
            dataset=inner or dataset,
            own_flat=own_flat,
            bit_depth=bit_depth,
            full_scale=full_scale,
            allow_links=allow_links,
            missing=missing,
        )


def open_files(
    files: Sequence[Path],
    *,
    dataset: str | None = None,
    own_flat: bool = True,
    bit_depth: int | None = None,
    full_scale: float | None = None,
    allow_links: Sequence[Path | str] = (),
    missing: bool = False,
    frames: int | None = None,
) -> Recording:
    """Open the file, or the numbered files, of one recording; arguments as `open_camera_file`.

    `frames`: of an HDF5 file that still grows, see `open_hdf5`.
    """
    first = files[0]
    suffix = first.suffix.lower()
    with guarded(str(first)):
        zarr = ome_zarr.is_image(first)
        for file in () if zarr else files:
            check_regular(file)
        if dataset and suffix not in (*HDF5, MATLAB):
            raise InputError(
                f"{first}: is not an HDF5 file, so it has no dataset {dataset}: leave it out"
            )
        if zarr:
            return ome_zarr.open_ome_zarr(first, bit_depth, full_scale)
        if suffix in (*HDF5, MATLAB):
            return hdf5.open_hdf5(
                first, dataset, own_flat, bit_depth, full_scale, allow_links, missing, frames
            )
        if suffix in images.IMAGE_SUFFIXES:
            if len(files) > 1:
                return images.open_sequence(files, bit_depth, full_scale, missing)
            return images.open_stack(first, bit_depth, full_scale, missing)
        if suffix not in SUFFIXES:
            raise InputError(f"{first}: unknown kind of file; supported are {FORMATS}")
        if full_scale is not None:
            raise InputError(
                f"{first}: holds counts: a full scale is for floating-point numbers and "
                "transmissions only"
            )
        if suffix == ".cine":
            found = phantom_cine.open_cine(first, bit_depth, missing)
        elif suffix == ".dat":
            found = shimadzu.open_shimadzu(first, bit_depth, missing)
        else:
            found = photron.open_photron(first, bit_depth, missing)
        return found.without_missing() if missing else found


def camera_files(path: Path | str, missing: bool = False) -> tuple[list[Path], str | None]:
    """Files of one recording, and the dataset named after `::`.

    Args:
        missing: numbers of frames may be missing.

    Raises:
        InputError: no such file, an unknown suffix, or a folder that is not one numbered sequence.
    """
    name, _, inner = str(path).partition("::")
    path = Path(name)
    if ome_zarr.is_image(path):
        return [path], inner or None
    if path.is_dir():
        return _sequence(path, sorted(path.iterdir()), missing), None
    if not path.exists():
        matches = [Path(match) for match in sorted(glob.glob(name))]  # noqa: PTH207 - any root
        if not matches:
            raise InputError(f"{path}: no such file or folder")
        return (_sequence(path, matches, missing), None) if len(matches) > 1 else (matches, None)
    check_regular(path)
    suffix = path.suffix.lower()
    if suffix not in (*SUFFIXES, MATLAB):
        raise InputError(f"{path}: unknown kind of file; supported are {FORMATS}")
    if suffix in images.IMAGE_SUFFIXES:
        alike = [file for file in path.parent.iterdir() if file.suffix.lower() == suffix]
        group = next(group for group in numbering.grouped(alike) if path in group.files)
        if len(group.files) > 1 and (
            group.parts or images.page_count(*(group.files if missing else [path])) == 1
        ):
            ordered = group.in_order(missing)
            if not group.parts and ordered[0] == path:
                numbering.refuse_other_numbers(alike)
            return (ordered if ordered[0] == path else [path]), None
    return [path], inner or None


def _sequence(path: Path, found: list[Path], missing: bool) -> list[Path]:
    files = [
        file
        for file in found
        if file.suffix.lower() in images.IMAGE_SUFFIXES and not file.name.startswith(".")
    ]
    groups = numbering.grouped(files)
    numbering.refuse_other_numbers(files)
    if len(groups) != 1:
        raise InputError(
            f"{path}: holds {len(groups)} sequences of numbered .tif or .png files: "
            "give one file or a folder with one sequence"
        )
    return groups[0].in_order(missing)
