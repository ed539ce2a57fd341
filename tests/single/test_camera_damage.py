"""Damaged, incomplete and impossible camera files: one InputError line, no other exception."""

from __future__ import annotations

import struct
import tracemalloc

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from hpc_xvr.data.cameras import open_camera_file
from support.camera_files import (
    counts,
    refused,
    section,
    stack,
    write_cine,
    write_photron,
)


def test_unknown_and_missing(tmp_path):
    (tmp_path / "film.avi").write_bytes(b"RIFF")
    refused(tmp_path / "film.avi", "Photron", "Phantom", "Shimadzu", "HDF5", "TIFF")
    refused(tmp_path / "none.cine", "no such file")
    refused(tmp_path, "0 sequences")
    path = write_photron(tmp_path, counts((2, 4, 4)), 16)
    refused(path, "no dataset", dataset="x")
    refused(path, "full scale", full_scale=2.0)
    refused(path, "give 1 to 16", bit_depth=17)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"Total Frame": 0}, ["no frames"]),
        ({"Total Frame": 10**15}, ["Total Frame"]),
        ({"Total Frame": 10**9}, ["bytes", "incomplete"]),
        ({"Image Width": 10**9}, ["x 1000000000"]),
        ({"Image Width": -4}, ["Image Width"]),
        ({"Image Height": "many"}, ["Image Height is many"]),
        ({"Color Type": "Color"}, ["Color Type Color"]),
        ({"Color Bit": 14}, ["Color Bit 14"]),
        ({"File Format": "Tiff"}, ["Tiff"]),
        ({"EffectiveBit Side": "Middle"}, ["Lower or Higher"]),
    ],
)
def test_photron_header(tmp_path, keys, words):
    refused(write_photron(tmp_path, counts((2, 4, 4)), 16, **keys), *words)


def test_photron_header_without_optional_keys(tmp_path):
    values = counts((2, 4, 4))
    path = write_photron(tmp_path, values, 16)
    needed = ("Record", "Total", "Image", "Color Bit")
    path.write_text(
        "\n".join(line for line in path.read_text().splitlines() if line.startswith(needed))
    )
    recording = open_camera_file(path)
    np.testing.assert_array_equal(stack(recording), values)
    assert (recording.bit_depth, recording.frame_rate_hz, recording.exposure_s) == (16, 6e4, None)


def test_photron_without_keys_or_partner(tmp_path):
    path = write_photron(tmp_path, counts((2, 4, 4)), 16)
    path.write_text("#Camera Information Header\n")
    refused(path, "Total Frame is missing")
    path.unlink()
    refused(tmp_path / "run.mraw", "run.cih", "missing")
    (tmp_path / "run.cihx").write_bytes(b"CIHX nothing here")
    refused(tmp_path / "run.cihx", "<cih>")


def test_colour_is_refused(tmp_path):
    rgb = counts((8, 6, 3), 8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "RGB", "grey")
    tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb")
    refused(tmp_path / "a.tif", "grey")
    tifffile.imwrite(tmp_path / "b.tif", rgb[..., 0].astype(np.int32), photometric="minisblack")
    refused(tmp_path / "b.tif", "int32", "uint16")


def test_sequence_of_different_sizes_names_the_file(tmp_path):
    for k, size in enumerate([8, 8, 6]):
        Image.fromarray(counts((8, size), 8)).save(tmp_path / f"f{k}.png")
    refused(tmp_path, "f2.png", "8 x 6")
    for k in range(2):
        tifffile.imwrite(tmp_path / f"g{k}.tif", counts((k + 1, 8, 8), 8), photometric="minisblack")
    refused(tmp_path / "g*.tif", "g1.tif", "2 x 8 x 8")
    Image.fromarray(counts((8, 8), 8)).save(tmp_path / "f02.png")
    refused(tmp_path / "f*.png", "number 2 occurs twice")


def test_hdf5_that_was_never_filled(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("d", (50, 64, 64), "u2", chunks=(1, 64, 64))
        data[:7] = 1
    refused(tmp_path / "a.h5", "7 of 50 chunks")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("d", (10**6, 4096, 4096), "u2")
        file["e"] = "text"
    refused(tmp_path / "b.h5", "stores 0 of")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["e"] = "text"
    refused(tmp_path / "c.h5", "no 2-D or 3-D dataset")
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file.create_dataset("d", (0, 64, 64), "u2")
    refused(tmp_path / "d.h5", "no frames")


def test_headers_that_promise_absurd_sizes(tmp_path):
    """Refused before anything of that size is allocated."""
    png = tmp_path / "a.png"
    Image.fromarray(counts((8, 8), 8)).save(png)
    data = bytearray(png.read_bytes())
    data[16:24] = struct.pack(">II", 15_000, 15_000)
    png.write_bytes(data)
    cine = write_cine(tmp_path / "a.cine", counts((2, 8, 8)))
    data = bytearray(cine.read_bytes())
    data[20:24] = struct.pack("<I", 2**32 - 1)
    cine.write_bytes(data)
    dat = tmp_path / "a.dat"
    dat.write_bytes(section("a0a001a0", b"\0" * 100, 100_000 * 40_000))
    tracemalloc.start()
    for path in (png, cine, dat):
        refused(path)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_checksums_of_a_png_are_looked_at(tmp_path):
    Image.fromarray(counts((40, 40), 8)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "a.png").write_bytes(data)
    refused(tmp_path / "a.png", "a.png")


def test_pages_of_another_number_type(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for dtype in ("u2", "f4"):
            file.write(np.ones((8, 8), dtype), photometric="minisblack")
    refused(tmp_path / "a.tif", "frame 1 holds float32", "uint16")


def test_virtual_dataset_that_is_part_of_itself(tmp_path):
    """libhdf5 recurses into it until the stack ends, directly or by way of another file."""
    for name, part in (("a", "."), ("b", "c.h5"), ("c", "b.h5")):
        layout = h5py.VirtualLayout((2, 4, 4), "u2")
        layout[:] = h5py.VirtualSource(part, "data", (2, 4, 4))
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_virtual_dataset("data", layout)
    refused(tmp_path / "a.h5", "made of itself")
    refused(tmp_path / "b.h5", "made of itself")
