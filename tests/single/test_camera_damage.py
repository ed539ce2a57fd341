"""Damaged, incomplete and impossible camera files: one InputError line, no other exception."""

from __future__ import annotations

import random
import struct
import tracemalloc
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from camera_files import (
    counts,
    refused,
    section,
    shimadzu_parts,
    stack,
    write_cihx,
    write_cine,
    write_dxchange,
    write_photron,
)
from PIL import Image

from hpc_xvr.data.cameras import open_recording
from hpc_xvr.errors import InputError


def test_unknown_and_missing(tmp_path):
    (tmp_path / "film.avi").write_bytes(b"RIFF")
    refused(tmp_path / "film.avi", "Photron", "Phantom", "Shimadzu", "HDF5", "TIFF")
    refused(tmp_path / "none.cine", "no such file")
    refused(tmp_path, "0 sequences")
    path = write_photron(tmp_path, counts((2, 4, 4)), 16)
    refused(path, "no dataset", dataset="x")
    refused(path, "itself", bit_depth=12)


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
        ({"Record Rate(fps)": "nan"}, ["Record Rate(fps)"]),
        ({"Record Rate(fps)": ""}, ["Record Rate(fps) is missing"]),
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
    recording = open_recording(path)
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


def samples(folder: Path) -> list[tuple[Path, Path, dict]]:
    """(what to damage, what to open, options) for every format."""
    small, wide = counts((3, 8, 12)), counts((2, 250, 400), 10)
    write_photron(folder, small, 16, "lower")
    write_cihx(folder, small, "xml")
    (folder / "hpv.dat").write_bytes(b"".join(shimadzu_parts(wide)))
    write_cine(folder / "a.cine", small)
    white, dark = np.full((2, 8, 12), 4000, np.uint16), np.zeros((2, 8, 12), np.uint16)
    write_dxchange(folder / "dx.h5", small, white, dark)
    write_dxchange(folder / "zip.h5", small, chunks=(1, 8, 12), compression="gzip", fletcher32=True)
    tifffile.imwrite(folder / "a.tif", small, photometric="minisblack", metadata=None)
    tifffile.imwrite(folder / "z.tif", small, photometric="minisblack", compression="zlib")
    (folder / "png").mkdir()
    for k, frame in enumerate(small):
        Image.fromarray(frame).save(folder / "png" / f"{k}.png")
    names = [
        "lower.cih",
        "lower.mraw",
        "xml.cihx",
        "xml.mraw",
        "hpv.dat",
        "a.cine",
        "dx.h5",
        "zip.h5",
        "a.tif",
        "z.tif",
    ]
    return [(folder / name, folder / name, {}) for name in names] + [
        (folder / "png" / "1.png", folder / "png", {})
    ]


def damaged(data: bytes, random_: random.Random) -> bytes:
    kind = random_.choice(["cut", "flip", "flip", "zero", "ones", "insert", "word"])
    at = random_.randrange(len(data))
    if kind != "cut" and random_.random() < 0.7:
        at %= min(len(data), 600)  # headers are where it hurts
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + random_.randbytes(random_.randrange(1, 40)) + data[at:]
    new = {
        "flip": lambda: bytes([data[at] ^ 1 << random_.randrange(8)]),
        "zero": lambda: bytes(random_.randrange(1, 16)),
        "ones": lambda: b"\xff" * random_.randrange(1, 9),
        "word": lambda: struct.pack("<I", random_.choice([1, 2**16, 2**31 - 1, 2**32 - 2])),
    }
    piece = new[kind]()
    return data[:at] + piece + data[at + len(piece) :]


@pytest.mark.timeout(60)
def test_mutations_give_nothing_but_input_errors(tmp_path):
    refusals, total = 0, 0
    tracemalloc.start()
    for target, path, options in samples(tmp_path):
        original = target.read_bytes()
        promised = len(stack(open_recording(path, **options)))
        for seed in range(40):
            target.write_bytes(damaged(original, random.Random(f"{target.name} {seed}")))
            total += 1
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    stack(open_recording(path, **options))
            except InputError as error:
                refusals += 1
                assert "\n" not in str(error) and str(tmp_path) in str(error)
        # Where the pixels do not stand last, the last byte may be one that says nothing.
        last = [len(original) - 1] if target.suffix in (".mraw", ".cine", ".h5") else []
        for length in (0, 1, len(original) // 2, *last):
            target.write_bytes(original[:length])
            refused(path)
        target.write_bytes(original)
        assert len(stack(open_recording(path, **options))) == promised
    assert total == 440 and refusals > 150
    assert tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()


def test_checksums_of_a_png_are_looked_at(tmp_path):
    Image.fromarray(counts((40, 40), 8)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "a.png").write_bytes(data)
    refused(tmp_path / "a.png", "a.png")
