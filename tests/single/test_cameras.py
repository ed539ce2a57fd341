"""Readers against the real files, the independent libraries and files written from the layout."""

from __future__ import annotations

import hashlib
import tracemalloc
import warnings

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from hpc_xvr.data.cameras import open_camera_file
from hpc_xvr.data.cameras.flatfield import mean_frame, transmission
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.errors import InputError
from support.camera_files import (
    RNG,
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

# Real files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, shape, bit_depth, rate, exposure, camera",
    [
        ("photron_pymraw/ball_12bit.cihx", (15, 384, 384), 12, 30_000, 20e-6, "FASTCAM Nova S16"),
        ("photron_pymraw/beam.cihx", (4, 80, 1024), 12, 50_000 / 2500, 5e-6, "FASTCAM SA-Z"),
        (
            "pyidi_showcase/data_showcase.cih",
            (75, 40, 640),
            8,
            15_000 / 100,
            65.06e-6,
            "FASTCAM SA-Z",
        ),
    ],
)
def test_photron_equals_pymraw(realdata, name, shape, bit_depth, rate, exposure, camera):
    pyMRAW = pytest.importorskip("pyMRAW")
    path = realdata(name)
    recording = open_camera_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, _ = pyMRAW.load_video(str(path))
    assert recording.shape == shape and recording.bit_depth == bit_depth
    assert recording.frame_rate_hz == pytest.approx(rate)
    assert recording.exposure_s == pytest.approx(exposure)
    assert camera in recording.camera
    np.testing.assert_array_equal(stack(recording), theirs)
    by_pixels = open_camera_file(path.with_suffix(".mraw"))
    assert by_pixels == recording
    np.testing.assert_array_equal(next(by_pixels.frames(3, 4)), theirs[3])


@pytest.mark.parametrize(
    "name, shape, bit_depth, rate, camera",
    [
        # The time stamps of cine_781 lie 10 recording intervals apart.
        ("pims_cine/cine_781.cine", (15, 256, 256), 12, 9000, "Phantom"),
        ("pims_cine/cine_legacy.cine", (97, 128, 128), 14, 35_087, "Phantom v7.3"),
        ("pyidi_showcase/data_small_cine.cine", (235, 32, 256), 12, 100, "Phantom"),
    ],
)
def test_cine_equals_pims(realdata, name, shape, bit_depth, rate, camera):
    import pims

    path = realdata(name)
    recording = open_camera_file(path)
    cine = pims.Cine(str(path))
    assert recording.shape == shape and recording.bit_depth == bit_depth
    assert recording.frame_rate_hz == pytest.approx(rate)
    assert recording.exposure_s == pytest.approx(float(cine.all_exposures[0]))
    assert recording.camera.startswith(camera)
    theirs = np.stack([np.asarray(f) for f in cine])
    if "encoding" in recording.metadata:  # pims leaves the codes of packed 10 bit as they are
        table = np.loadtxt(realdata("../facts/phantom_p10_to_12bit.txt"), np.uint16)
        theirs = table[theirs]
    np.testing.assert_array_equal(stack(recording), theirs)


@pytest.mark.parametrize(
    "folder, shape, bits",
    [
        ("trackpy_foam", (9, 768, 768), 8),
        ("aps_2bm_radiography", (10, 500, 500), 16),
    ],
)
def test_numbered_tiff_equals_tifffile(realdata, folder, shape, bits):
    files = sorted(realdata(folder).glob("*.tif"))
    theirs = np.stack([tifffile.imread(file) for file in files])
    for path in (realdata(folder), files[0], realdata(folder) / "*.tif"):
        recording = open_camera_file(path)
        assert recording.shape == shape and recording.bit_depth == bits
        np.testing.assert_array_equal(stack(recording), theirs)
    assert open_camera_file(files[3]).shape == (1, *shape[1:])


def test_spray_cameras_and_their_flat_field(realdata):
    path = realdata("spray_xray_cc0/spray_polychromatic_Re-10600_frame0.hdf5")
    refused(path, "/Camera1, /Camera2, /Camera3", "--dataset")
    refused(path, "no 2-D or 3-D dataset Camera4", "/Camera2", dataset="Camera4")
    with h5py.File(path) as file:
        theirs = file["Camera2"][()]
    recording = open_camera_file(path, dataset="Camera2")
    np.testing.assert_array_equal(stack(recording), theirs[None])
    np.testing.assert_array_equal(stack(open_camera_file(f"{path}::/Camera2")), theirs[None])

    background = realdata("spray_xray_cc0/spray_polychromatic_background.hdf5")
    flat = mean_frame(open_camera_file(f"{background}::flat/Camera2"))
    dark = mean_frame(open_camera_file(f"{background}::dark-current/Camera2"))
    corrected = transmission(recording, flat, dark)
    ours = stack(corrected)[0] / 65535 * corrected.full_scale
    lit = flat - dark > 0.2 * (flat - dark).max()
    expected = (theirs - dark)[lit] / (flat - dark)[lit]
    np.testing.assert_allclose(ours[lit], expected.clip(0, 1.5), atol=2e-5)
    assert 0.3 < np.median(ours[lit]) < 1.1


def test_real_png_pair(realdata):
    path = realdata("tomobank_xfusion_png/rad_00003_high_res.png")
    recording = open_camera_file(path)
    assert recording.shape == (1, 800, 1280) and recording.bit_depth == 16
    np.testing.assert_array_equal(stack(recording)[0], np.asarray(Image.open(path)))
    refused(realdata("tomobank_xfusion_png"), "4 sequences")


def test_missing_pixels_of_the_real_cih(realdata):
    refused(realdata("photron_pymraw/sample_60k_16bit.cih"), "sample_60k_16bit.mraw", "missing")


# Each format from its layout ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "bits, keys, bit_depth, shift",
    [
        (8, {}, 8, 0),
        (16, {}, 12, 0),
        (16, {"EffectiveBit Side": "Higher"}, 12, 4),
        (16, {"EffectiveBit Depth": 16}, 16, 0),
        (12, {}, 12, 0),
        (8, {"EffectiveBit Depth": 12, "EffectiveBit Side": "Higher"}, 8, 0),
        (12, {"EffectiveBit Depth": 10, "EffectiveBit Side": "Higher"}, 10, 2),
    ],
)
def test_photron_bits_are_right_aligned(tmp_path, bits, keys, bit_depth, shift):
    values = counts((5, 6, 10), bit_depth)
    path = write_photron(tmp_path, values.astype(np.uint16) << shift, bits, **keys)
    recording = open_camera_file(path)
    assert recording.bit_depth == bit_depth
    np.testing.assert_array_equal(stack(recording), values)
    np.testing.assert_array_equal(list(recording.frames(1, 4)), values[1:4])
    assert recording.exposure_s == pytest.approx(1 / 80_000)


def test_photron_value_above_its_bit_depth_names_the_frame(tmp_path):
    values = counts((3, 4, 4), 12)
    values[2, 1, 1] = 5000
    refused(write_photron(tmp_path, values, 16), "frame 2", "5000", "4095")


def test_cihx(tmp_path):
    values = counts((3, 4, 6))
    recording = open_camera_file(write_cihx(tmp_path, values))
    np.testing.assert_array_equal(stack(recording), values)
    assert recording.frame_rate_hz == 12_500 and recording.exposure_s == pytest.approx(5e-6)
    assert recording.camera == "Photron FASTCAM Nova"


def test_photron_suffixes_in_capitals(tmp_path):
    values = counts((2, 4, 4))
    write_photron(tmp_path, values, 16)
    (tmp_path / "run.mraw").rename(tmp_path / "run.MRAW")
    np.testing.assert_array_equal(stack(open_camera_file(tmp_path / "run.cih")), values)
    np.testing.assert_array_equal(stack(open_camera_file(tmp_path / "run.MRAW")), values)


def test_shimadzu(tmp_path):
    values = counts((3, 250, 400), 10)
    path = tmp_path / "hpv.dat"
    # The tag's bytes also stand in front of the images, where they mean nothing.
    decoy = section("a0a001a0", b"", 7)
    path.write_bytes(decoy + b"".join(shimadzu_parts(values)))
    recording = open_camera_file(path)
    assert recording.frame_rate_hz == pytest.approx(5e6)
    assert recording.exposure_s == pytest.approx(110e-9)
    assert recording.camera == "Shimadzu HPV-X2" and recording.bit_depth == 10
    assert recording.metadata == {"date": "2024/03/01 12:00:00", "first_frame_ns": "0"}
    np.testing.assert_array_equal(stack(recording), values)
    np.testing.assert_array_equal(stack(CameraReading(flip_rows=True).open(path)), values[:, ::-1])

    parts = shimadzu_parts(values)
    path.write_bytes(b"".join(parts[k] for k in (0, 6, 4, 1, 3, 7, 2, 5)))
    again = open_camera_file(path)
    assert again.frame_rate_hz == recording.frame_rate_hz
    np.testing.assert_array_equal(stack(again), values)


def test_cine_saved_every_fifth_frame(tmp_path):
    values = counts((6, 8, 12))
    recording = open_camera_file(write_cine(tmp_path / "a.cine", values, rate=1000, step=5))
    np.testing.assert_array_equal(stack(recording), values)
    assert recording.frame_rate_hz == 200 and recording.bit_depth == 12
    assert recording.metadata["record_rate_hz"] == 1000
    assert recording.metadata["sensor_pixel_um"] == 20


@pytest.mark.parametrize("options", [{}, {"chunks": (4, 8, 5), "compression": "gzip"}])
def test_dxchange_is_flat_corrected(tmp_path, options):
    clean = RNG.uniform(0.2, 1.2, (9, 12, 10))
    dark = np.full((4, 12, 10), 100, np.uint16)
    white = np.full((5, 12, 10), 1100, np.uint16)
    white += np.array([0, 1, 2, 3, 4], np.uint16)[:, None, None]
    white -= 2
    white[:, 3, 4] = 100
    data = np.rint(100 + clean * 1000).astype(np.uint16)
    path = write_dxchange(tmp_path / "dx.h5", data, white, dark, **options)
    recording = open_camera_file(path)
    ours = stack(recording) / 65535 * recording.full_scale
    dead = np.zeros((12, 10), bool)
    dead[3, 4] = True
    np.testing.assert_allclose(ours[:, ~dead], ((data - 100.0) / 1000)[:, ~dead], atol=2e-5)
    assert not ours[:, dead].any() and recording.metadata["pixels_unlit"] == 1
    assert (recording.camera, recording.exposure_s, recording.pixel_size_um) == (
        "Oryx",
        0.002,
        1.17,
    )
    assert open_camera_file(path, full_scale=1.25).full_scale == 1.25
    np.testing.assert_array_equal(stack(open_camera_file(path, own_flat=False)), data)


def test_plain_hdf5_with_one_dataset(tmp_path):
    values = counts((3, 8, 4), 16)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["entry/frames"] = values.astype(">u2")
        file["entry/times"] = np.arange(3.0)
    recording = open_camera_file(tmp_path / "a.hdf5")
    np.testing.assert_array_equal(stack(recording), values)
    assert recording.dtype.isnative


def test_hdf5_virtual_dataset(tmp_path):
    values = counts((2, 4, 4), 16)
    layout = h5py.VirtualLayout((4, 4, 4), np.uint16)
    for k in range(2):
        with h5py.File(tmp_path / f"part{k}.h5", "w") as file:
            file["data"] = values
        layout[2 * k : 2 * k + 2] = h5py.VirtualSource(f"part{k}.h5", "data", (2, 4, 4))
    with h5py.File(tmp_path / "master.h5", "w") as file:
        file.create_virtual_dataset("data", layout)
    np.testing.assert_array_equal(stack(open_camera_file(tmp_path / "master.h5"))[2:], values)
    (tmp_path / "part1.h5").unlink()
    refused(tmp_path / "master.h5", "part1.h5", "missing")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib"},
        {"bigtiff": True},
        {"byteorder": ">"},
        {"imagej": True},
    ],
)
def test_tiff_stack(tmp_path, options):
    values = counts((4, 12, 8), 16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", **options)
    recording = open_camera_file(tmp_path / "a.tif")
    np.testing.assert_array_equal(stack(recording), values)
    np.testing.assert_array_equal(list(recording.frames(2)), values[2:])


def test_imagej_stack_of_one_page(tmp_path):
    """ImageJ's layout above 4 GB: one page, the other frames behind it."""
    values = counts((5, 6, 8), 16)
    path = tmp_path / "big.tif"
    tifffile.imwrite(path, values[0], imagej=True, byteorder=">")
    with tifffile.TiffFile(path) as tif:
        start, size = tif.pages[0].dataoffsets[0], path.stat().st_size
        text = tif.pages[0].tags["ImageDescription"]
        room, at = text.count, text.valueoffset
    assert start + values[0].nbytes == size
    note = b"ImageJ=1.11a\nimages=5\n\0"
    assert len(note) <= room
    data = bytearray(path.read_bytes())
    data[at : at + room] = note.ljust(room, b"\0")
    path.write_bytes(data + values[1:].astype(">u2").tobytes())
    np.testing.assert_array_equal(stack(open_camera_file(path)), values)
    path.write_bytes(path.read_bytes()[:-5])
    refused(path, "5 frames", "incomplete")


def test_bit_depth_of_a_wider_container(tmp_path):
    values = counts((2, 4, 4), 12)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack")
    recording = open_camera_file(tmp_path / "a.tif", bit_depth=12)
    assert recording.bit_depth == 12
    np.testing.assert_array_equal(stack(recording), values)
    values[1, 0, 0] = 4096
    tifffile.imwrite(tmp_path / "b.tif", values, photometric="minisblack")
    refused(tmp_path / "b.tif", "frame 1", "4096", bit_depth=12)
    refused(tmp_path / "b.tif", "1 to 16", bit_depth=17)


@pytest.mark.parametrize("suffix, dtype", [(".png", "u1"), (".png", "u2"), (".tif", "u2")])
def test_numbers_sort_as_numbers(tmp_path, suffix, dtype):
    values = counts((12, 6, 8), 8 * int(dtype[1])).astype(dtype)
    for k, frame in enumerate(values):
        path = tmp_path / f"run3_{k}{suffix}"
        Image.fromarray(frame).save(path) if suffix == ".png" else tifffile.imwrite(path, frame)
    for path in (tmp_path, tmp_path / f"run3_0{suffix}", tmp_path / f"run3_*{suffix}"):
        np.testing.assert_array_equal(stack(open_camera_file(path)), values)
    assert open_camera_file(tmp_path).path.name == f"run3_*{suffix}"
    (tmp_path / f"run3_7{suffix}").unlink()
    refused(tmp_path, f"run3_8{suffix}", "follows number 6", "missing")


@pytest.mark.parametrize("kind", ["tif", "h5", "folder"])
def test_float_frames_keep_their_full_scale(tmp_path, kind):
    values = RNG.uniform(-0.01, 1.3, (4, 6, 8)).astype(np.float32)
    path = tmp_path / f"a.{kind}"

    def write():
        if kind == "tif":
            tifffile.imwrite(path, values, photometric="minisblack")
        elif kind == "h5":
            write_dxchange(path, values)
        else:
            path.mkdir(exist_ok=True)
            for k, frame in enumerate(values):
                tifffile.imwrite(path / f"{k}.tiff", frame)

    write()
    recording = open_camera_file(path)
    assert recording.full_scale == values.max() and recording.bit_depth == 16
    np.testing.assert_allclose(
        stack(recording) / 65535 * recording.full_scale, values.clip(0), atol=1.3 / 65535
    )
    stated = open_camera_file(path, full_scale=2.0)
    np.testing.assert_allclose(stack(stated) / 65535 * 2, values.clip(0), atol=2 / 65535)
    values[2, 3, 3] = np.nan
    write()
    refused(path, "frame 2", "1 values", "NaN")
    refused(path, "frame 2", "NaN", full_scale=2.0)
    refused(path, "full scale is -1", full_scale=-1.0)


def test_values_above_full_scale_are_told(tmp_path, caplog):
    write_dxchange(tmp_path / "a.h5", np.full((2, 4, 4), 0.7, np.float32))
    assert stack(open_camera_file(tmp_path / "a.h5", full_scale=0.5)).min() == 65535
    assert ": 100 %" in caplog.text and "0.5" in caplog.text


def test_flat_field_that_is_no_flat_field(tmp_path):
    recording = open_camera_file(write_photron(tmp_path, counts((2, 4, 6)), 16))
    with pytest.raises(InputError, match=r"4 x 6 pixels, the dark field is 4 x 4"):
        transmission(recording, np.ones((4, 6)), np.ones((4, 4)))
    with pytest.raises(InputError, match=r"not brighter"):
        transmission(recording, np.zeros((4, 6)), np.ones((4, 6)))


def test_long_recording_is_read_lazily(tmp_path):
    """64 MB in the file, a few frames in memory."""
    frame = counts((1, 512, 512), 12)
    path = write_photron(tmp_path, frame, 16, **{"Total Frame": 128})
    (tmp_path / "run.mraw").write_bytes(frame.tobytes() * 128)
    tracemalloc.start()
    recording = open_camera_file(path)
    assert sum(int(f[0, 0]) for f in recording.frames()) == 128 * int(frame[0, 0, 0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_checksum_of_the_real_film(realdata):
    """A checksum of the packed 12-bit film: holds without any other library."""
    frames = stack(open_camera_file(realdata("photron_pymraw/ball_12bit.mraw")))
    assert hashlib.sha256(frames.astype("<u2").tobytes()).hexdigest()[:16] == "72e92de42669032f"
