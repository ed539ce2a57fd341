"""TIFF files and series of images that are odd but ordinary: each is read right, or refused."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import zlib

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from hpc_xvr.data.cameras import open_camera_file
from hpc_xvr.data.cameras.numbering import grouped
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.ingest.run import ingest
from hpc_xvr.data.ingest.sources import find_recordings
from hpc_xvr.errors import InputError
from support.camera_files import counts, refused, stack

GREY = {"photometric": "minisblack"}
VALUES = counts((4, 12, 8), 12)


@pytest.fixture
def ingested(tmp_path, hpc_xvr, caplog):
    """ingested(path) -> videos of the corpus made by the command, and all it warned of."""

    def run(path, *options):
        corpus = tmp_path / f"corpus-{len(list(tmp_path.iterdir()))}"
        said = hpc_xvr("ingest", path, "--corpus", corpus, *options)
        return Corpus(corpus).videos, said.err + caplog.text

    return run


def pages_of(path, *pages, **options):
    with tifffile.TiffWriter(path) as file:
        for page, more in pages:
            file.write(page, metadata=None, **GREY, **options, **more)
    return path


def mark(path, pages, kind):
    """Overwrite the tag NewSubfileType of these pages."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        for page in pages:
            file.pages[page].tags[254].overwrite(kind)


# Pages and axes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["imagej", "ome"])
@pytest.mark.parametrize(
    "axes, shape, words",
    [
        ("TCYX", (8, 2, 12, 8), ["2 channels x 8 times"]),
        ("TZYX", (8, 3, 12, 8), ["3 slices x 8 times"]),
        ("TZCYX", (5, 3, 2, 12, 8), ["2 channels x 3 slices x 5 times"]),
    ],
)
def test_channels_and_slices_are_not_frames(tmp_path, kind, axes, shape, words):
    path = tmp_path / ("a.ome.tif" if kind == "ome" else "a.tif")
    tifffile.imwrite(path, counts(shape), **{kind: True}, **GREY, metadata={"axes": axes})
    refused(path, *words, "12 x 8")


def test_slices_alone(tmp_path):
    """A plain stack of ImageJ has slices, whatever they are; a hyperstack or OME means z."""
    path = tmp_path / "plain.tif"
    text = "ImageJ=1.53c\nimages=4\nslices=4\nloop=false\n"
    tifffile.imwrite(path, VALUES, **GREY, description=text, metadata=None, byteorder=">")
    np.testing.assert_array_equal(stack(open_camera_file(path)), VALUES)
    tifffile.imwrite(tmp_path / "z.tif", VALUES, imagej=True, metadata={"axes": "ZYX"})
    refused(tmp_path / "z.tif", "4 slices")
    tifffile.imwrite(tmp_path / "z.ome.tif", VALUES, **GREY, metadata={"axes": "ZYX"})
    refused(tmp_path / "z.ome.tif", "4 slices")


def test_axes_that_tifffile_did_not_ask_for_are_told(tmp_path, caplog):
    tifffile.imwrite(tmp_path / "a.tif", VALUES, imagej=True)
    np.testing.assert_array_equal(stack(open_camera_file(tmp_path / "a.tif")), VALUES)
    assert "4 images are named channels" in caplog.text


def test_shape_and_axes_by_tifffile(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, VALUES, **GREY, metadata={"axes": "TYX"})
    np.testing.assert_array_equal(stack(open_camera_file(path)), VALUES)
    tifffile.imwrite(path, VALUES[:, None, :, :, None], **GREY)
    np.testing.assert_array_equal(stack(open_camera_file(path)), VALUES)
    tifffile.imwrite(path, VALUES, **GREY, metadata={"axes": "CYX"})
    refused(path, "4 channels")
    tifffile.imwrite(path, counts((3, 2, 12, 8)), **GREY)
    refused(path, "3 (?) x 2 (?)")


def test_frames_behind_one_page(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, VALUES, truncate=True, **GREY, byteorder=">")
    np.testing.assert_array_equal(stack(open_camera_file(path)), VALUES)
    path.write_bytes(path.read_bytes()[:-5])
    refused(path, "4 frames", "incomplete")


def test_several_series(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for part in (VALUES, VALUES[:3]):
            file.write(part, **GREY)
    refused(path, "2 series of 4, 3 frames")
    with tifffile.TiffWriter(path) as file:  # a loop that appends frames
        for frame in VALUES:
            file.write(frame, **GREY)
    np.testing.assert_array_equal(stack(open_camera_file(path)), VALUES)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as file:
        for _ in range(2):
            file.write(VALUES, **GREY, metadata={"axes": "TYX"})
    refused(tmp_path / "a.ome.tif", "2 series (4 x 12 x 8, 4 x 12 x 8)")


@pytest.mark.parametrize("kind", [1, 4])
def test_thumbnails_and_masks_are_no_frames(tmp_path, caplog, kind):
    path, small = tmp_path / "a.tif", {"subfiletype": 1}
    pages_of(path, *(page for f in VALUES for page in ((f, {}), (f[::2], small))))
    mark(path, range(1, 8, 2), kind)
    recording = open_camera_file(path)
    np.testing.assert_array_equal(stack(recording), VALUES)
    np.testing.assert_array_equal(list(recording.frames(2, 3)), VALUES[2:3])
    assert "4 pages that are marked as thumbnails or masks are left out" in caplog.text
    pages_of(path, *((frame, small) for frame in VALUES))
    mark(path, range(4), kind)
    refused(path, "all its pages are marked")


@pytest.mark.parametrize("kind", [0, 1])
def test_images_inside_pages(tmp_path, kind):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for frame in VALUES:
            file.write(frame, subifds=1, metadata=None, **GREY)
            file.write(frame[::2, ::2], subfiletype=kind, metadata=None, **GREY)
    if kind:
        np.testing.assert_array_equal(stack(open_camera_file(path)), VALUES)
    else:
        refused(path, "page 0", "SubIFD")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_of_png(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    for k, frame in enumerate(VALUES):
        Image.fromarray(frame).save(tmp_path / f"f{k}.png", exif=exif)
    theirs = [
        np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"f{k}.png"))) for k in range(4)
    ]
    np.testing.assert_array_equal(stack(open_camera_file(tmp_path)), theirs)


def test_an_orientation_behind_the_pixels_is_refused(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "f.png"
    Image.fromarray(VALUES[0]).save(path, exif=exif)
    data = path.read_bytes()
    at = data.index(b"eXIf") - 4
    chunk = data[at : at + 12 + int.from_bytes(data[at : at + 4])]
    path.write_bytes(data.replace(chunk, b"").replace(data[-12:], chunk + data[-12:]))
    assert Image.open(path).getexif()[274] == 6
    refused(path, "orientation", "behind the pixels")


@pytest.mark.parametrize("unit", ["s", "ms"])
def test_times_of_ome_planes(tmp_path, caplog, unit):
    path, ratio = tmp_path / "a.ome.tif", {"s": 1, "ms": 1e-3}[unit]
    plane = {"DeltaT": [1.0, 2, 3, 5], "DeltaTUnit": [unit] * 4, "ExposureTime": [0.5] * 4}
    tifffile.imwrite(path, VALUES, **GREY, metadata={"axes": "TYX", "Plane": plane})
    recording = open_camera_file(path)
    assert recording.times_s == pytest.approx(np.array([0, 1, 2, 4]) * ratio)
    assert recording.frame_rate_hz == pytest.approx(1 / ratio)
    assert recording.exposure_s == 0.5
    assert "time stamps jump after frame 2" in caplog.text


def png_of(path, frame, depth: int, colour: int):
    """A PNG of numbers that are packed already."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", 12, len(frame), depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in frame)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def test_numbers_that_pillow_would_change(tmp_path):
    frame = counts((8, 12), 12)
    colours = np.repeat(frame[..., None], 3, -1).astype(">u2")
    refused(png_of(tmp_path / "rgb.png", colours, 16, 2), "RGB image of 16 bit")
    small = counts((8, 12), 4)
    packed = (small[:, ::2] << 4 | small[:, 1::2]).astype(np.uint8)
    recording = open_camera_file(png_of(tmp_path / "four.png", packed, 4, 0))
    assert recording.bit_depth == 4
    np.testing.assert_array_equal(stack(recording), small[None])


def test_animations_are_refused(tmp_path):
    first, *others = (Image.fromarray((frame % 256).astype(np.uint8)) for frame in VALUES)
    first.save(tmp_path / "a.png", save_all=True, append_images=others)
    refused(tmp_path / "a.png", "animation of 4 frames")


def test_suffixes_and_hidden_files(tmp_path):
    for k, name in enumerate(("f0.TIF", "f1.tif", "f2.TIF", "._f0.TIF")):
        tifffile.imwrite(tmp_path / name, VALUES[k], **GREY)
    np.testing.assert_array_equal(stack(open_camera_file(tmp_path)), VALUES[:3])


def test_names_that_differ_in_two_numbers_are_told(tmp_path, hpc_xvr):
    (tmp_path / "in").mkdir()
    for k, name in enumerate(("c_10-58.tif", "c_10-59.tif", "c_11-00.tif", "other_1.tif")):
        tifffile.imwrite(tmp_path / "in" / name, VALUES[k], **GREY)
    said = hpc_xvr("ingest", tmp_path / "in", "--corpus", tmp_path / "c").err
    assert "become 2 recordings" in " ".join(said.split())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"f_{k:02x}.tif" for k in range(8, 13)], "f_0a.tif: follows f_09.tif, .* hexadecimal"),
        ([f"{k:04X}.tif" for k in range(8, 13)], "000A.tif: follows 0009.tif, .* hexadecimal"),
        ([f"t_{k / 2}ms.tif" for k in range(6)], "t_0.5ms.tif: follows t_0.0ms.tif, .* fractions"),
    ],
)
def test_numbers_that_are_not_whole_decimals_are_refused(names, message, tmp_path):
    """Each would lose every sixth or second frame, and the sequence look whole."""
    for k, name in enumerate(names):
        tifffile.imwrite(tmp_path / name, VALUES[k % len(VALUES)], **GREY)
    for path in (tmp_path, tmp_path / names[0]):
        with pytest.raises(InputError, match=message):
            open_camera_file(path)
    with pytest.raises(InputError, match=message):
        ingest([tmp_path], tmp_path / "c")


@pytest.mark.parametrize(
    "names",
    [
        [f"scan1.{k:04d}.tif" for k in range(9, 12)],
        [f"v1.{k}.tif" for k in range(3)],
        [f"f_{k}.tif" for k in range(8, 13)],
        [f"a_{k:02d}.tif" for k in range(8, 13)],
    ],
)
def test_decimal_numbers_that_look_like_others_are_read(names, tmp_path):
    for k, name in enumerate(names):
        tifffile.imwrite(tmp_path / name, VALUES[k % len(VALUES)], **GREY)
    found = stack(open_camera_file(tmp_path))
    np.testing.assert_array_equal(found, [VALUES[k % len(VALUES)] for k in range(len(names))])


def test_images_beside_a_sequence_are_told(tmp_path, caplog):
    for k, name in enumerate(("f_0.tif", "f_1.tif", "dark.tif")):
        tifffile.imwrite(tmp_path / name, VALUES[k], **GREY)
    assert len(ingest([tmp_path], tmp_path / "c")) == 2
    assert "1 of its images are in no sequence of numbers (dark.tif)" in caplog.text


def test_numbers_that_go_on_in_the_next_folder_share_a_split(tmp_path, caplog):
    rng = np.random.default_rng(0)
    long = np.cumsum(rng.integers(0, 20, (60, 12, 8)), 0).astype("u2")
    for k, frame in enumerate(long):
        folder = tmp_path / "in" / f"{k // 3:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(folder / f"{k:05d}.tif", frame, **GREY)
    outcomes = ingest([tmp_path / "in"], tmp_path / "c")
    assert {outcome.split for outcome in outcomes} == {"train"} and len(outcomes) == 20
    assert "seems to go on where" in caplog.text and "into one folder" in caplog.text
    for k in range(60):  # other recordings
        if k % 3 == 0:
            other = rng.integers(0, 2**15, (12, 8)).astype("u2")
        frame = long[k % 3] + other
        tifffile.imwrite(tmp_path / "in" / f"{k // 3:03d}" / f"{k:05d}.tif", frame, **GREY)
    outcomes = ingest([tmp_path / "in"], tmp_path / "d")
    assert {outcome.split for outcome in outcomes} == {"train", "validation", "test"}


def test_significant_bits_of_ome(tmp_path):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, VALUES, **GREY, metadata={"axes": "TYX", "SignificantBits": 12})
    text = tifffile.tiffcomment(path)
    assert open_camera_file(path).bit_depth == 12
    assert open_camera_file(path, bit_depth=14).bit_depth == 14
    tifffile.tiffcomment(path, text.replace('Bits="12"', 'Bits="8"'))
    refused(path, "holds the value", "8 bits end at 255")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_pillow(tmp_path, orientation):
    path = tmp_path / "a.tif"
    tag = [(274, "H", 1, orientation, True)]
    pages_of(path, *((frame, {}) for frame in VALUES), extratags=tag)
    image = Image.fromarray(VALUES[0])
    image.getexif()[274] = orientation
    theirs = np.asarray(ImageOps.exif_transpose(image))
    recording = open_camera_file(path)
    np.testing.assert_array_equal(stack(recording)[0], theirs)
    assert recording.shape[1:] == theirs.shape


def test_orientations_that_differ(tmp_path):
    tags = [{"extratags": [(274, "H", 1, k, True)]} for k in (3, 1)]
    pages_of(tmp_path / "a.tif", *((VALUES[0], tag) for tag in tags))
    refused(tmp_path / "a.tif", "frame 1", "orientation")
    pages_of(tmp_path / "b.tif", (VALUES[0], {"extratags": [(274, "H", 1, 9, True)]}))
    refused(tmp_path / "b.tif", "orientation 9", "1 to 8")


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_grey_stored_as_colour(tmp_path, suffix):
    frame = counts((8, 12), 8)
    rgb = np.repeat(frame[..., None], 3, -1)
    path = tmp_path / f"a.{suffix}"
    write = tifffile.imwrite if suffix == "tif" else lambda to, a, **_: Image.fromarray(a).save(to)
    write(path, rgb, photometric="rgb")
    np.testing.assert_array_equal(stack(open_camera_file(path))[0], frame)
    rgb[3, 4, 1] ^= 1
    write(path, rgb, photometric="rgb")
    refused(path, "in colour", "grey")


def test_three_frames_marked_as_colour(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", VALUES[:3], photometric="rgb", planarconfig="separate")
    refused(tmp_path / "a.tif", "three frames", "minisblack")


# Grey scale ---------------------------------------------------------------------------------------


def imagej(path, values, *lines):
    text = f"ImageJ=1.53c\nimages={len(values)}\nframes={len(values)}\n" + "\n".join(lines)
    tifffile.imwrite(path, values, **GREY, description=text, metadata=None, byteorder=">")
    return path


def test_signed_images_of_imagej(tmp_path, caplog):
    true = VALUES.astype(int) - 1000
    raw = (true + 32768).astype("u2")
    recording = open_camera_file(imagej(tmp_path / "a.tif", raw, "cf=0", "c0=-32768.0", "c1=1.0"))
    np.testing.assert_array_equal(stack(recording), true.clip(0))
    assert recording.bit_depth == 15
    share = 100 * (true < 0).mean()
    assert f"{share:.3g} % of the values lie below 0" in caplog.text
    np.testing.assert_array_equal(list(recording.values()), true)


def test_calibrations_of_imagej(tmp_path):
    path = imagej(tmp_path / "a.tif", VALUES, "cf=0", "c0=0.5", "c1=0.25")
    recording = open_camera_file(path, full_scale=2000.0)
    np.testing.assert_allclose(stack(recording) / 65535 * 2000, 0.5 + VALUES / 4, atol=0.02)
    refused(imagej(tmp_path / "b.tif", VALUES, "cf=1", "c0=0.5", "c1=0.25", "c2=1"), "cf=1")
    refused(imagej(tmp_path / "b.tif", VALUES, "cf=0"), "cf=0")
    plain = imagej(tmp_path / "c.tif", VALUES, "cf=0", "c0=0.0", "c1=1.0")
    np.testing.assert_array_equal(stack(open_camera_file(plain)), VALUES)


def test_half_precision(tmp_path):
    values = (VALUES / 4095).astype("f2")
    tifffile.imwrite(tmp_path / "a.tif", values, **GREY)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = values
    for path in (tmp_path / "a.tif", tmp_path / "a.h5"):
        ours = stack(open_camera_file(path))
        expected = values.astype(float) / float(values.max()) * 65535
        np.testing.assert_allclose(ours, expected, atol=0.51)


@pytest.mark.parametrize("dtype", ["i2", "i4", "u4"])
def test_other_integers(tmp_path, dtype):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, VALUES.astype(dtype), **GREY)
    np.testing.assert_array_equal(stack(open_camera_file(path, bit_depth=12)), VALUES)
    refused(path, "1 to 1", bit_depth=17)
    if dtype == "i2":
        assert open_camera_file(path).bit_depth == 15
        return
    refused(path, "bit depth", "full scale")
    recording = open_camera_file(path, full_scale=5000.0)
    np.testing.assert_allclose(stack(recording) / 65535 * 5000, VALUES, atol=0.04)
    tifffile.imwrite(path, VALUES.astype(dtype) * 100, **GREY)
    refused(path, "bits end at 65535", bit_depth=16)


@pytest.mark.parametrize("suffix", ["tif", "h5"])
def test_negative_floats_are_told(tmp_path, caplog, suffix):
    values = np.linspace(-1, 3, 4 * 12 * 8).reshape(4, 12, 8).astype("f4")
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, values, **GREY)
    else:
        with h5py.File(path, "w") as file:
            file["data"] = values
    recording = open_camera_file(path)
    np.testing.assert_allclose(stack(recording) / 65535 * 3, values.clip(0), atol=3e-5)
    assert "25 % of the values lie below 0 and became 0" in caplog.text
    caplog.clear()
    list(recording.frames(2))
    assert not caplog.text


def test_one_hot_pixel(tmp_path, caplog):
    values = np.linspace(0.2, 1, 6 * 20 * 20).reshape(6, 20, 20).astype("f4")
    tifffile.imwrite(tmp_path / "usual.tif", values, **GREY)
    values[3, 5, 7] = 50_000
    tifffile.imwrite(tmp_path / "hot.tif", values, **GREY)
    stack(open_camera_file(tmp_path / "usual.tif"))
    stack(open_camera_file(tmp_path / "hot.tif", full_scale=1.0))
    # As a flat field its scale does not matter.
    ingest([tmp_path / "usual.tif"], tmp_path / "c", flat=tmp_path / "hot.tif")
    ingest([tmp_path / "hot.tif"], tmp_path / "d", flat=tmp_path / "usual.tif")
    assert "99.9 %" not in caplog.text
    stack(open_camera_file(tmp_path / "hot.tif"))
    assert "99.9 % of the values lie below 0.002 % of full scale 50000" in caplog.text
    assert "frame 3" in caplog.text and "--full-scale" in caplog.text


# What files say of themselves ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "unit, factor", [("um", 1), ("micron", 1), ("\\u00B5m", 1), ("mm", 1000), ("pixel", None)]
)
def test_units_of_imagej(tmp_path, unit, factor):
    text = f"ImageJ=1.53c\nimages=4\nframes=4\nunit={unit}\nfinterval=2.0\ntunit=usec\nfps=7.0\n"
    path = tmp_path / "a.tif"
    more = {"resolution": (1 / 1.9, 1 / 1.9), "description": text, "metadata": None}
    tifffile.imwrite(path, VALUES, **GREY, **more)
    recording = open_camera_file(path)
    assert recording.frame_rate_hz == pytest.approx(5e5)
    expected = None if factor is None else pytest.approx(1.9 * factor, rel=1e-5)
    assert recording.pixel_size_um == expected


def test_units_of_ome(tmp_path):
    path = tmp_path / "a.ome.tif"
    said = {"PhysicalSizeX": 1900, "PhysicalSizeXUnit": "nm", "TimeIncrement": 2}
    said |= {"axes": "TYX", "TimeIncrementUnit": "µs"}
    tifffile.imwrite(path, VALUES, **GREY, metadata=said)
    ingest([path], tmp_path / "c")
    info = Corpus(tmp_path / "c").videos[0].info
    assert info.frame_rate_hz == pytest.approx(5e5) and info.pixel_size_um == pytest.approx(1.9)


def test_pixels_that_are_not_square(tmp_path, caplog):
    text = "ImageJ=1.53c\nimages=4\nframes=4\nunit=um\n"
    more = {"resolution": (1.0, 2.0), "description": text, "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", VALUES, **GREY, **more)
    assert open_camera_file(tmp_path / "a.tif").pixel_size_um is None
    assert "not square" in caplog.text


# Numbers in names, and parts ----------------------------------------------------------------------


def named(folder, *names):
    """The recordings that files of these names are."""
    return [[file.name for file in g.in_order()] for g in grouped(folder / name for name in names)]


@pytest.mark.parametrize(
    "recordings",
    [
        [["a-2.png", "a-1.png", "a0.png", "a1.png"]],
        [["a_-2.png", "a_-1.png"]],
        [["-2.png", "-1.png"]],
        [["a-8.png", "a-7.png"]],
        [["a-0.png", "a-1.png", "a-2.png"]],
        [["2026-01-15-1.png", "2026-01-15-2.png"]],
        [["a-0.png", "a-1.png"], ["a0.png", "a1.png"]],
        [["a - 1.png", "a - 2.png"]],
        [["img_0001_20us.png", "img_0002_20us.png"], ["img_0001_40us.png", "img_0002_40us.png"]],
        [[f"img_{k:09d}_Default_000.png" for k in (0, 1, 10)][:2]],
        [[f"img_{k:09d}_X_{z:03d}.png" for k in (0, 1, 2)] for z in (0, 1)],
        [[f"a_t{k:03d}_z{z}.png" for k in (0, 1, 2)] for z in (0, 1)],
        [["s1_9.png", "s1_10.png"], ["s2_9.png", "s2_10.png"]],
        [["r.tif", "r.part2.tif", "r.part3.tif"]],
        [["r_part1.tif", "r_part2.tif"]],
        [["r.tif", "r@0001.tif", "r@0002.tif"]],
        [["r_MMStack_Pos0.ome.tif", "r_MMStack_Pos0_1.ome.tif", "r_MMStack_Pos0_2.ome.tif"]],
        [["r.tif"], ["s.tif"]],
    ],
    ids=lambda recordings: recordings[0][0],
)
def test_names_of_one_recording(tmp_path, recordings):
    names = [name for recording in recordings for name in recording]
    assert sorted(named(tmp_path, *names)) == sorted(recordings)
    assert sorted(named(tmp_path, *reversed(names))) == sorted(recordings)


def test_a_minus_that_may_separate_is_told(tmp_path, caplog):
    named(tmp_path, "a-2.png", "a-1.png", "a0.png")
    named(tmp_path, "b_-2.png", "b_-1.png")
    assert not caplog.text
    named(tmp_path, "img-0001.png", "img-0002.png")
    assert "-2 comes first" in caplog.text and "(img_0001.png)" in caplog.text


@pytest.mark.parametrize(
    "names, words",
    [
        (["a-3.png", "a-2.png", "a0.png", "a1.png"], "a0.png: follows number -2"),
        (["r.part1.tif", "r.part2.tif", "r.part4.tif"], "r.part4.tif: follows number 2"),
        (["r.part1.tif", "r.part3.tif"], "r.part3.tif: follows number 1"),
        (["r.part2.tif", "r.part3.tif"], "first part is missing"),
        (["r.tif", "r.part3.tif"], "r.part3.tif: follows number 1"),
    ],
)
def test_missing_numbers(tmp_path, names, words):
    with pytest.raises(Exception, match=re.escape(words)):
        named(tmp_path, *names)


def test_parts_are_one_recording(tmp_path, caplog):
    for part in (1, 2):
        tifffile.imwrite(tmp_path / f"r.part{part}.tif", VALUES[2 * part - 2 : 2 * part], **GREY)
    for path in (tmp_path, tmp_path / "r.part1.tif"):
        recording = open_camera_file(path)
        np.testing.assert_array_equal(stack(recording), VALUES)
        np.testing.assert_array_equal(list(recording.frames(1, 3)), VALUES[1:3])
        assert len(find_recordings([path])) == 1
    tifffile.imwrite(tmp_path / "r.part2.tif", VALUES[2:, :6], **GREY)
    refused(tmp_path, "r.part2.tif", "2 x 6 x 8")


def test_parts_that_ome_names(tmp_path):
    paths = [tmp_path / "r_MMStack_Pos0.ome.tif", tmp_path / "r_MMStack_Pos0_1.ome.tif"]
    planes = "".join(
        f'<TiffData FirstT="{k}" IFD="{k % 2}" PlaneCount="1">'
        f'<UUID FileName="{paths[k // 2].name}">urn:uuid:{k // 2}</UUID></TiffData>'
        for k in range(4)
    )
    text = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image><Pixels SizeX="8" '
        f'SizeY="12" SizeT="4" SizeC="1" SizeZ="1" Type="uint16">{planes}</Pixels></Image></OME>'
    )
    for k, path in enumerate(paths):
        part = VALUES[2 * k : 2 * k + 2]
        tifffile.imwrite(path, part, **GREY, description=text, metadata=None, ome=False)
    np.testing.assert_array_equal(stack(open_camera_file(paths[0])), VALUES)
    np.testing.assert_array_equal(stack(open_camera_file(tmp_path)), VALUES)
    paths[1].unlink()
    refused(paths[0], "2 of the 4 frames", "r_MMStack_Pos0_1.ome.tif")


def test_stacks_that_go_on_share_a_split(tmp_path, caplog):
    rng = np.random.default_rng(0)
    long = np.cumsum(rng.integers(0, 20, (60, 12, 8)), 0).astype("u2")
    for k in range(20):
        tifffile.imwrite(tmp_path / f"r_{k}.tif", long[3 * k : 3 * k + 3], **GREY)
    outcomes = ingest([tmp_path], tmp_path / "c")
    assert {outcome.split for outcome in outcomes} == {"train"} and len(outcomes) == 20
    assert "r_1.tif: seems to go on where r_0.tif ends" in caplog.text
    for k in range(20):  # other recordings, which happen to be numbered
        frames = long[:3] + rng.integers(0, 2**15, (12, 8)).astype("u2")
        tifffile.imwrite(tmp_path / f"r_{k}.tif", frames, **GREY)
    outcomes = ingest([*tmp_path.glob("*.tif")], tmp_path / "d")
    assert {outcome.split for outcome in outcomes} == {"train", "validation", "test"}


# Messages that do not blame the file --------------------------------------------------------------


def packed12(path, frames):
    """A TIFF of 12 bit numbers, two in three bytes."""
    data, at = bytearray(b"II*\0\0\0\0\0"), 4
    for frame in frames:
        a, b = frame.reshape(-1, 2).astype(int).T
        pixels = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype("u1").tobytes()
        start = len(data)
        data += pixels
        data[at : at + 4] = struct.pack("<I", len(data))
        height, width = frame.shape
        tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, start), (277, 1)]
        tags += [(278, height), (279, len(pixels))]
        data += struct.pack("<H", len(tags))
        data += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        at = len(data)
        data += b"\0\0\0\0"
    path.write_bytes(data)
    return path


def lzw(path, frame):
    """A TIFF whose page says that it is compressed by LZW."""
    tifffile.imwrite(path, frame, **GREY, metadata=None, compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags["Compression"].overwrite(5)
    return path


def test_codecs_that_are_missing_are_named(tmp_path):
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        for path in (packed12(tmp_path / "a.tif", VALUES), lzw(tmp_path / "b.tif", VALUES[0])):
            said = refused(path, "frame 0", "imagecodecs", "hpc_xvr[codecs]")
            assert "damaged" not in said
        refused(tmp_path / "a.tif", "packed 12 bit")
        refused(tmp_path / "b.tif", "LZW")
    else:
        recording = open_camera_file(packed12(tmp_path / "a.tif", VALUES))
        np.testing.assert_array_equal(stack(recording), VALUES)
        assert recording.bit_depth == 12
        tifffile.imwrite(tmp_path / "b.tif", VALUES, **GREY, compression="lzw", predictor=True)
        np.testing.assert_array_equal(stack(open_camera_file(tmp_path / "b.tif")), VALUES)


def test_lossy_pages_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, VALUES[0], **GREY, metadata=None)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags["Compression"].overwrite(7)
    refused(path, "JPEG", "grey levels")


def test_a_frame_in_the_middle_that_cannot_be_decoded(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, VALUES, **GREY, compression="zlib")
    with tifffile.TiffFile(path) as file:
        at = file.pages[2].dataoffsets[0]
    data = bytearray(path.read_bytes())
    data[at : at + 8] = b"\xff" * 8
    path.write_bytes(data)
    refused(path, "a.tif: frame 2")


# The cases ----------------------------------------------------------------------------------------


def test_cases_of_grey_scale(cases, ingested):
    (video,), said = ingested(cases("float-hot-pixel/zinger.tif"))
    assert "99.9 % of the values lie below 0.002 % of full scale 50000" in said
    for name in ("attenuation.h5", "attenuation.tif"):
        _, said = ingested(cases(f"hdf5-negative-floats/{name}"))
        assert re.search(r"51(\.\d)? % of the values lie below 0", said)
    (video,), _ = ingested(cases("tiff-imagej-signed/signed.tif"))
    np.testing.assert_array_equal(video.frames[:], np.load(cases("tiff-imagej-signed/truth.npy")))
    (video,), _ = ingested(cases("tiff-various/f16.tif"))
    truth = (np.load(cases("tiff-various/truth.npy")) / 4000).astype("f2").astype(float)
    np.testing.assert_allclose(video.frames[:], truth / truth.max() * 65535, atol=0.51)


def test_cases_of_metadata_and_axes(cases, ingested, hpc_xvr, tmp_path):
    (video,), _ = ingested(cases("tiff-imagej-calibrated/calibrated.tif"))
    assert (video.info.frame_rate_hz, video.info.pixel_size_um) == (
        pytest.approx(5e5),
        pytest.approx(1.9),
    )
    for name in ("two_channels.tif", "two_channels.ome.tif"):
        path = cases(f"tiff-2channel-hyperstack/{name}")
        said = hpc_xvr("ingest", path, "--corpus", tmp_path / "x", code=2)
        assert "2 channels x 8 times" in said.err and said.err.count("\n") == 1
    (video,), _ = ingested(cases("tiff-shaped-truncated/truncated.tif"))
    assert video.frames[:][:, 0, 0].tolist() == list(range(0, 100, 10))


def test_cases_of_names(cases, ingested):
    for name, greys in (("shot", range(97, 104)), ("pre", range(92, 100))):
        (video,), _ = ingested(cases(f"png-negative-numbers/{name}"))
        assert video.frames[:][:, 0, 0].tolist() == list(greys)
    videos, said = ingested(cases("tiff-various/parts"))
    assert len({video.split for video in videos}) == 1 and "seems to go on" in said
    (video,), _ = ingested(cases("png-various/nat"))
    assert video.frames[:][:, 0, 0].tolist() == list(range(12))


def test_cases_of_many_kinds(cases, ingested, hpc_xvr, tmp_path):
    truth = np.load(cases("tiff-various/truth.npy"))
    names = ["bigend_bigtiff", "deflate", "deflate_pred", "int16"]
    names += ["mask_page", "thumb", "thumb_last", "orient3"]
    for name in names:
        (video,), _ = ingested(cases(f"tiff-various/{name}.tif"))
        np.testing.assert_array_equal(video.frames[:], truth)
    (video,), _ = ingested(cases("tiff-various/rgb.tif"))
    np.testing.assert_array_equal(video.frames[:], (truth >> 4).astype("u1"))
    (video,), _ = ingested(cases("tiff-various/tiled.tif"))
    np.testing.assert_array_equal(video.frames[:][:, :16, :24], truth)
    for name in ("int32", "uint32"):
        (video,), _ = ingested(cases(f"tiff-various/{name}.tif"), "--bit-depth", 12)
        np.testing.assert_array_equal(video.frames[:], truth)
    refusals = {
        "tiff-various/series.tif": "2 series",
        "tiff-various/minwhite.tif": "white",
        "tiff-various/nan.tif": "frame 2",
        "tiff-various/int32.tif": "bit depth",
        "png-various/gap": "f4.png",
        "png-various/la": "LA",
        "png-various/one": "grey",
        "png-various/pal": "grey",
        "png-various/mixed": "f3.png",
        "png-various/stamp": "201.png",
    }
    for name, word in refusals.items():
        said = hpc_xvr("ingest", cases(name), "--corpus", tmp_path / "x", code=2)
        assert word in said.err and said.err.count("\n") == 1


def test_the_command_itself(cases, tmp_path):
    command = [sys.executable, "-m", "hpc_xvr", "ingest", cases("tiff-various/packed12.tif")]
    done = subprocess.run([*command, "--corpus", tmp_path / "c"], capture_output=True, text=True)
    if done.returncode:
        assert done.returncode == 2 and "packed 12 bit" in done.stderr
        assert "damaged" not in done.stderr
    else:
        truth = np.load(cases("tiff-various/truth.npy"))
        np.testing.assert_array_equal(Corpus(tmp_path / "c").videos[0].frames[:], truth)
