"""HDF5 files as others write them: read right, or refused in a line that says why."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_xvr.data.cameras import open_camera_file, units
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.errors import InputError
from support.camera_files import counts, refused, stack
from support.paths import ROOT

FRAMES = counts((6, 16, 24))


def write(path: Path, name="frames", data=FRAMES, **attributes) -> Path:
    with h5py.File(path, "a") as file:
        file[name] = data
        file[name].attrs.update(attributes)
    return path


def write_virtual(path: Path, *parts, shape=FRAMES.shape, dtype="u2", name="frames") -> Path:
    """parts: (index in the whole, file, dataset, shape of that, index in it)."""
    layout = h5py.VirtualLayout(shape, dtype)
    for index, file_name, dataset, size, inner in parts:
        layout[index] = h5py.VirtualSource(file_name, dataset, size, dtype)[inner]
    with h5py.File(path, "w", libver="latest") as file:
        file.create_virtual_dataset(name, layout)
    return path


def write_raw(path: Path, *raw, shape=FRAMES.shape) -> Path:
    """A dataset whose bytes are in other files: (name, offset, size)."""
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    for name, offset, size in raw:
        created.set_external(str(name).encode(), offset, size)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple(shape)
        h5py.h5d.create(file.id, b"frames", h5py.h5t.NATIVE_UINT16, space, created)
    return path


def same(path, frames=FRAMES, **options):
    np.testing.assert_array_equal(stack(open_camera_file(path, **options)), frames)


# Cases of others, through the real command


@pytest.mark.parametrize(
    ("file", "frames"),
    [
        ("hdf5-axes/axes.h5", "truth.npy"),
        ("hdf5-matlab/movie.h5", "truth.npy"),
        ("hdf5-matlab/movie.mat", "truth.npy"),
        ("hdf5-nexus-external/scan_link.nxs", [0, 10, 20]),
        ("hdf5-nexus-external/scan_master.h5", [0, 10, 20, 30, 40, 50]),
        ("hdf5-nexus-external/scan_soft.nxs", [0, 1, 2]),
        ("hdf5-virtual-gaps/good.h5", [100, 101, 102, 103, 104, 105]),
        ("hdf5-flat-constant/whitetheta.h5", [20695] * 4),
        ("hdf5-flat-constant/darkonly.h5", [1000] * 4),
        ("hdf5-flat-constant/whitedead.h5", [1000] * 4),
    ],
)
def test_cases_that_are_read(file, frames, cases, hpc_xvr, tmp_path):
    path = cases(file)
    said = hpc_xvr("ingest", path, "--corpus", tmp_path / "c").err
    (video,) = Corpus(tmp_path / "c").videos
    ours = video.read(range(video.shape[0]))
    if frames == "truth.npy":
        np.testing.assert_array_equal(ours, np.load(path.parent / frames))
    else:
        np.testing.assert_array_equal(ours, np.array(frames)[:, None, None] + np.zeros((16, 24)))
    assert ("its dark field /exchange/data_dark is not used" in said) == ("darkonly" in file)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("nodata.h5", ["frames 3 to 5", "p2_nodata.h5"]),
        ("short.h5", ["frames 3 to 5", "p2_short.h5", "1 x 16 x 24"]),
        ("hole.h5", ["frame 3"]),
    ],
)
def test_cases_of_missing_frames(file, words, cases, hpc_xvr, tmp_path):
    path = cases("hdf5-virtual-gaps") / file
    said = hpc_xvr("ingest", path, "--corpus", tmp_path / "c", code=2).err
    assert all(word in said for word in words), said


def test_case_of_units(cases, hpc_xvr, tmp_path):
    path = cases("hdf5-units/units.h5")
    hpc_xvr("ingest", path, "--corpus", tmp_path / "c")
    (video,) = Corpus(tmp_path / "c").videos
    assert video.info.frame_rate_hz == pytest.approx(100_000)
    assert video.info.exposure_s == pytest.approx(5e-6)
    assert video.info.pixel_size_um == pytest.approx(1.9)


# Axes


@pytest.mark.parametrize(
    ("order", "axes"),
    [
        ((1, 2, 0), "y:x:time"),
        ((2, 1, 0), "x:y:theta"),
        ((0, 2, 1), "[time,x,y]"),
        ((1, 0, 2), ["detector_y", "frame_number", "detector_x"]),
        ((2, 0, 1), ["image_x", ".", "image_y"]),
        ((0, 1, 2), "theta:y:x"),
        ((0, 1, 2), ["time", ".", "."]),
        ((0, 1, 2), ["dim_0", "dim_1", "dim_2"]),
    ],
)
@pytest.mark.parametrize("by", ["dataset", "group", "labels", "scales"])
def test_axes_in_any_order(tmp_path, order, axes, by):
    path = write(tmp_path / "a.h5", "entry/data/frames", FRAMES.transpose(order))
    names = axes if isinstance(axes, list) else axes.strip("[]").replace(":", ",").split(",")
    with h5py.File(path, "a") as file:
        group = file["entry/data"]
        if by == "dataset":
            group["frames"].attrs["axes"] = axes
        elif by == "group":
            group.attrs.update(axes=names, signal="frames")
        for axis, name in enumerate(names):
            if by == "labels" and name != ".":
                group["frames"].dims[axis].label = name
            elif by == "scales" and name != ".":
                file[f"scales/{name}"] = np.arange(FRAMES.transpose(order).shape[axis])
                file[f"scales/{name}"].make_scale()
                group["frames"].dims[axis].attach_scale(file[f"scales/{name}"])
    same(path)
    same(path, dataset="entry/data/frames")


def test_axes_of_the_group_that_links_to_the_frames(tmp_path):
    path = write(tmp_path / "a.h5", "entry/detector/frames", FRAMES.transpose(2, 1, 0))
    with h5py.File(path, "a") as file:
        file["entry/data/movie"] = h5py.SoftLink("/entry/detector/frames")
        file["entry/data"].attrs.update(signal="movie", axes=["x", "y", "t"])
    same(path)
    same(path, dataset="/entry/data")


@pytest.mark.parametrize(
    ("data", "axes", "words"),
    [
        (FRAMES, ["y", "x", "wavelength_y"], ["y (6)", "x (16)"]),
        (FRAMES, ["a", "time", "b"], ["time (16)", "cannot be told"]),
        (FRAMES, "time:x:.", ["x (16)"]),
        (counts((2, 16, 24, 3)), "time:y:x:rgb", ["rgb (3)"]),
        (counts((16, 24, 3)), "y:x:c", ["c (3)"]),
        (counts((2, 5, 16, 24)), "sample_y:sample_x:y:x", ["sample_y (2)", "sample_x (5)"]),
        (counts((2, 5, 16, 24)), None, ["2 x 5 x 16 x 24"]),
        (counts((40, 24, 3), 8), None, ["40 x 24 x 3", "colour"]),
        (counts((1, 6, 1, 24)), None, ["1 x 6 x 1 x 24"]),
    ],
)
def test_axes_that_cannot_be_told(tmp_path, data, axes, words):
    path = write(tmp_path / "a.h5", data=data, **({} if axes is None else {"axes": axes}))
    if axes == ["y", "x", "wavelength_y"]:
        same(path, data.transpose(2, 0, 1))  # the plain y is the rows
    else:
        refused(path, "/frames", *words)


def test_names_that_do_not_fit_are_said(tmp_path, caplog):
    same(write(tmp_path / "a.h5", axes="theta"))
    assert "names the axes theta, but has 3" in caplog.text


@pytest.mark.parametrize("shape", [(6, 1, 16, 24), (1, 6, 16, 24), (6, 16, 24, 1), (1, 1, 16, 24)])
def test_axes_of_length_one_are_left_out(tmp_path, shape):
    data = FRAMES[: int(np.prod(shape)) // (16 * 24)]
    same(write(tmp_path / "a.h5", data=data.reshape(shape)), data)


def test_matlab(tmp_path, caplog):
    attributes = {"MATLAB_class": np.bytes_("uint16")}
    same(write(tmp_path / "a.mat", data=FRAMES.transpose(0, 2, 1), **attributes))
    assert "16 x 24 x 6, read as 6 frames of 16 x 24 pixels" in caplog.text
    same(write(tmp_path / "b.h5", data=FRAMES[0].T, **attributes), FRAMES[:1])
    refused(write(tmp_path / "c.h5", data=counts((3, 24, 16)), **attributes), "16 x 24 x 3")
    (tmp_path / "d.mat").write_bytes(b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(200))
    refused(tmp_path / "d.mat", "-v7.3")


def test_pictures_in_hdf5s_own_format(tmp_path):
    about = {"CLASS": np.bytes_("IMAGE"), "IMAGE_SUBCLASS": np.bytes_("IMAGE_TRUECOLOR")}
    refused(write(tmp_path / "a.h5", data=counts((3, 16, 24), 8), **about), "colour", "3 x 16 x 24")
    about = {"CLASS": np.bytes_("IMAGE"), "IMAGE_WHITE_IS_ZERO": np.uint8(1)}
    refused(write(tmp_path / "b.h5", **about), "IMAGE_WHITE_IS_ZERO")


def test_white_frames_lie_as_the_frames_do(tmp_path):
    data = np.full((16, 16, 16), 500, np.uint16)
    data[:4] = 250
    path = write(tmp_path / "a.h5", "exchange/data", data, axes="y:x:time")
    write(
        path,
        "exchange/data_white",
        np.full((16, 16, 16), 1000, np.uint16) + np.arange(16, dtype="u2"),
    )
    recording = open_camera_file(path)
    ours = stack(recording) / 65535 * recording.full_scale
    np.testing.assert_allclose(ours[3, 10], 500 / 1007.5, atol=1e-4)
    np.testing.assert_allclose(ours[15, 2], 250 / 1007.5, atol=1e-4)


# Which dataset


def test_eiger_master(tmp_path, hpc_xvr):
    """A mask and a flat field stand beside the parts, of different lengths."""
    for part, (first, stop) in enumerate([(0, 1), (1, 4), (4, 6)], 1):
        write(tmp_path / f"s_data_{part:06d}.h5", "entry/data/data", FRAMES[first:stop])
    with h5py.File(tmp_path / "s_master.h5", "w") as file:
        for part in (3, 1, 2):
            file[f"entry/data/data_{part:06d}"] = h5py.ExternalLink(
                f"s_data_{part:06d}.h5", "entry/data/data"
            )
        detector = file.create_group("entry/instrument/detector")
        detector["detectorSpecific/pixel_mask"] = np.zeros((16, 24), np.uint32)
        detector["detectorSpecific/flatfield"] = np.ones((16, 24), np.float32)
        detector["frame_time"], detector["count_time"] = 0.002, 900.0
        detector["frame_time"].attrs["units"], detector["count_time"].attrs["units"] = "s", "us"
    master = tmp_path / "s_master.h5"
    recording = open_camera_file(master)
    np.testing.assert_array_equal(stack(recording), FRAMES)
    np.testing.assert_array_equal(list(recording.frames(2, 5)), FRAMES[2:5])
    assert (recording.frame_rate_hz, recording.exposure_s) == (500, pytest.approx(9e-4))
    same(master, dataset="/entry/data")
    same(master, FRAMES[1:4], dataset="/entry/data/data_000002")
    (tmp_path / "s_data_000002.h5").rename(tmp_path / "elsewhere.h5")
    line = hpc_xvr("ingest", master, "--corpus", tmp_path / "c", code=2).err
    assert "/entry/data/data_000002" in line and "s_data_000002.h5, which is missing" in line
    with h5py.File(master, "a") as file:
        del file["entry/data/data_000002"]
    refused(master, "number 2 is missing")
    write(tmp_path / "s_data_000002.h5", "entry/data/data", counts((3, 16, 20)))
    with h5py.File(master, "a") as file:
        file["entry/data/data_000002"] = h5py.ExternalLink("s_data_000002.h5", "entry/data/data")
    refused(master, "data_000002", "16 x 20", "alike")


def test_parts_in_any_group(tmp_path):
    path = write(tmp_path / "a.h5", "run/data_001", FRAMES[:2])
    write(path, "run/data_000", FRAMES[2:])
    same(path, np.concatenate([FRAMES[2:], FRAMES[:2]]))
    write(path, "run/mask", FRAMES[0])
    refused(path, "--dataset", "/run/data_000 to /run/data_001, /run/mask")


def test_default_data_of_nexus(tmp_path):
    path = write(tmp_path / "a.nxs", "scan/eiger/raw", counts((6, 8, 8)))
    write(path, "scan/movie/m", FRAMES)
    refused(path, "/scan/eiger/raw", "/scan/movie/m")
    with h5py.File(path, "a") as file:
        file.attrs["default"], file["scan"].attrs["default"] = "scan", "movie"
        file["scan/movie"].attrs["signal"] = "m"
    same(path)
    with h5py.File(path, "a") as file:  # a plot is not what we look for
        file["scan/movie/plot"] = np.ones((4, 4))
        file["scan/movie"].attrs["signal"] = "plot"
    refused(path, "several")


def test_a_broken_link_is_not_passed_over(tmp_path):
    """Else the mask would be taken for the recording."""
    path = write(tmp_path / "a.h5", "instrument/mask", FRAMES[0])
    with h5py.File(path, "a") as file:
        file["scan/frames"] = h5py.SoftLink("/instrument/frames")
    refused(path, "/scan/frames", "/instrument/frames", "--dataset: /instrument/mask")
    same(path, FRAMES[:1], dataset="instrument/mask")
    with h5py.File(path, "a") as file:
        file["exchange/data"] = h5py.SoftLink("/exchange/other")
        file["exchange/other"] = h5py.SoftLink("/exchange/data")
    refused(path, "/exchange/data", "circle")


def test_other_frames_of_dxchange_are_mentioned(tmp_path, caplog):
    path = write(tmp_path / "a.h5", "exchange/data")
    write(path, "exchange/bright", FRAMES[:1])
    write(path, "exchange/theta", np.arange(6.0))
    same(path)
    assert "/exchange/bright is not used: if it is a flat or dark field, pass it as --flat or " in (
        caplog.text
    )
    assert "theta" not in caplog.text
    caplog.clear()
    open_camera_file(path, own_flat=False)
    assert not caplog.text


# Units


@pytest.mark.parametrize(
    ("unit", "of", "factor"),
    [
        ("kHz", "Hz", 1e3),
        ("MHz", "Hz", 1e6),
        ("mHz", "Hz", 1e-3),
        ("Hz", "Hz", 1),
        ("frames/s", "Hz", 1),
        ("s-1", "Hz", 1),
        ("s", "Hz", None),
        ("ms", "s", 1e-3),
        ("us", "s", 1e-6),
        ("µs", "s", 1e-6),
        ("μs", "s", 1e-6),
        ("ns", "s", 1e-9),
        ("seconds", "s", 1),
        ("m", "s", None),
        ("min", "s", 60.0),
        ("m", "um", 1e6),
        ("mm", "um", 1e3),
        ("nm", "um", 1e-3),
        ("micron", "um", 1),
        ("um/pixel", "um", 1),
        ("pixel", "um", None),
        ("inch", "um", 25_400.0),
        ("furlong", "um", None),
    ],
)
def test_units(unit, of, factor):
    assert units.factor(unit, of) == (None if factor is None else pytest.approx(factor))


def test_unknown_unit_gives_nothing(tmp_path, caplog):
    path = write(tmp_path / "a.h5", "exchange/data")
    detector = "measurement/instrument/detector"
    write(path, f"{detector}/exposure_time", 0.5, units="jiffies")
    write(path, f"{detector}/frame_rate", np.array([2.0]), units=np.bytes_("MHz"))
    recording = open_camera_file(path)
    assert (recording.exposure_s, recording.frame_rate_hz) == (None, 2e6)
    assert "'jiffies'" in caplog.text and "exposure_time" in caplog.text


# Counts of other types


@pytest.mark.parametrize("dtype", ["i4", "u4", "i2", ">u4", "i8", "u8", "i1"])
def test_counts_need_a_scale(tmp_path, dtype):
    values = (FRAMES % 100).astype(dtype)
    path = write(tmp_path / "a.h5", data=values)
    refused(path, np.dtype(dtype).name, "--bit-depth", "--full-scale")
    same(path, values, bit_depth=12)
    ours = stack(open_camera_file(path, full_scale=200))
    np.testing.assert_array_equal(ours, np.rint(values / 200 * 65535))
    refused(path, "either", bit_depth=12, full_scale=200)


def test_counts_that_do_not_fit_their_scale(tmp_path):
    values = FRAMES.astype("i4")
    values[4, 3, 2] = -1
    refused(write(tmp_path / "a.h5", data=values), "frame 4", "-1", bit_depth=12)
    values[4, 3, 2] = 2**16 + 5  # 5, in 16 bit
    refused(write(tmp_path / "b.h5", data=values), "frame 4", "65541", bit_depth=12)


def test_wide_counts_with_a_flat_field_need_no_scale(tmp_path):
    path = write(tmp_path / "a.h5", "exchange/data", np.full((2, 16, 24), 10**6 + 500, "u4"))
    write(tmp_path / "flat.h5", data=np.full((2, 16, 24), 2 * 10**6, "u4"))
    recording = CameraReading(flat=tmp_path / "flat.h5").open(path)
    assert stack(recording)[0, 0, 0] == round(0.50025 / 1.5 * 65535)
    write(path, "exchange/data_white", np.full((2, 16, 24), 2 * 10**6, "i4"))
    np.testing.assert_array_equal(stack(open_camera_file(path)), stack(recording))


# What is missing


def test_virtual_dataset_of_tiles_and_strides(tmp_path):
    """Four detectors' halves and alternate frames, without a gap."""
    for part in range(4):
        own = FRAMES[part % 2 :: 2, 8 * (part // 2) : 8 * (part // 2) + 8]
        write(tmp_path / f"p{part}.h5", "d", own)
    parts = [
        (np.s_[p % 2 :: 2, 8 * (p // 2) : 8 * (p // 2) + 8], f"p{p}.h5", "d", (3, 8, 24), np.s_[:])
        for p in range(4)
    ]
    same(write_virtual(tmp_path / "a.h5", *parts))
    refused(write_virtual(tmp_path / "b.h5", *parts[:3]), "frame 1", "[1, 8, 0]")
    write(tmp_path / "same.h5", "d", FRAMES)
    twice = [(np.s_[:5], "same.h5", "d", (6, 16, 24), np.s_[:5])] * 2
    refused(write_virtual(tmp_path / "c.h5", *twice), "frame 5")


def test_virtual_dataset_that_grows(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file.create_dataset("d", data=FRAMES, maxshape=(None, 16, 24), chunks=(1, 16, 24))
    layout = h5py.VirtualLayout((1, 16, 24), "u2", maxshape=(None, 16, 24))
    source = h5py.VirtualSource("p.h5", "d", (1, 16, 24), maxshape=(None, 16, 24))
    layout[0 : h5py.h5s.UNLIMITED] = source[0 : h5py.h5s.UNLIMITED]
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        file.create_virtual_dataset("frames", layout)
    same(tmp_path / "a.h5")


def test_virtual_dataset_in_blocks(tmp_path):
    """As two computers write in turn, two frames each; one of them behind another virtual one."""
    write(tmp_path / "p0.h5", "d", FRAMES[[0, 1, 4, 5]])
    write(tmp_path / "q.h5", "d", FRAMES[2:4, ::-1])
    rows = [(np.s_[:, k], "q.h5", "d", (2, 16, 24), np.s_[:, 15 - k]) for k in range(16)]
    write_virtual(tmp_path / "p1.h5", *rows, shape=(2, 16, 24), name="d")
    layout = h5py.VirtualLayout(FRAMES.shape, "u2")
    blocks = h5py.MultiBlockSlice(start=0, stride=4, count=2, block=2)
    layout[blocks, :, :] = h5py.VirtualSource("p0.h5", "d", (4, 16, 24))
    layout[2:4] = h5py.VirtualSource("p1.h5", "d", (2, 16, 24))
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        file.create_virtual_dataset("frames", layout)
    same(tmp_path / "a.h5")
    recording = open_camera_file(tmp_path / "a.h5")
    for k in range(6):
        np.testing.assert_array_equal(next(recording.frames(k, k + 1)), FRAMES[k])


def test_more_parts_than_files_may_be_open(tmp_path):
    """The HDF5 library gives zeros for those that it cannot open."""
    parts = []
    for k in range(150):
        write(tmp_path / f"p{k}.h5", "d", np.full((8, 8), k + 1, np.uint16))
        parts.append((np.s_[k], f"p{k}.h5", "d", (8, 8), np.s_[:]))
    write_virtual(tmp_path / "a.h5", *parts, shape=(150, 8, 8))
    with h5py.File(tmp_path / "b_master.h5", "w") as file:
        for k in range(150):
            file[f"entry/data/data_{k:06d}"] = h5py.ExternalLink(f"p{k}.h5", "d")
    script = (
        "import resource, sys\n"
        "from hpc_xvr.data.cameras import open_camera_file\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "for path in sys.argv[1:]:\n"
        "    frames = open_camera_file(path).frames()\n"
        "    assert [int(f.min()) for f in frames] == list(range(1, 151))\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.h5", tmp_path / "b_master.h5"],
        cwd=ROOT,
        check=True,
    )


def test_a_part_that_vanishes_while_frames_are_read(tmp_path):
    write(tmp_path / "p.h5", "d", FRAMES[3:])
    write(tmp_path / "o.h5", "d", FRAMES[:3])
    halves = [
        (np.s_[:3], "o.h5", "d", (3, 16, 24), np.s_[:]),
        (np.s_[3:], "p.h5", "d", (3, 16, 24), np.s_[:]),
    ]
    recording = open_camera_file(write_virtual(tmp_path / "a.h5", *halves))
    (tmp_path / "p.h5").unlink()
    with pytest.raises(InputError, match=r"p\.h5"):
        list(recording.frames(3, 6))


def test_parts_that_do_not_hold_what_is_mapped(tmp_path):
    whole = (np.s_[:], "p.h5", "d", FRAMES.shape, np.s_[:])
    path = write_virtual(tmp_path / "a.h5", whole)
    with h5py.File(tmp_path / "p.h5", "w") as file:
        written = file.create_dataset("d", FRAMES.shape, "u2", chunks=(1, 16, 24))
        written[:2] = 1
        written[4:] = 1
    refused(path, "p.h5", "4 of 6 chunks", "frames 2 to 3")
    (tmp_path / "p.h5").unlink()
    write(tmp_path / "p.h5", "d", FRAMES.astype("u4") + 2**17)  # HDF5 cuts them to 65535
    refused(path, "p.h5", "uint32")


def test_raw_files(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    raw = tmp_path / "in" / "frames.raw"
    raw.write_bytes(b"head" + FRAMES.tobytes())
    path = write_raw(tmp_path / "in" / "a.h5", ("frames.raw", 4, FRAMES.nbytes))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "frames.raw").write_bytes(bytes(FRAMES.nbytes + 4))  # not this one
    same(path)
    raw.write_bytes(raw.read_bytes()[:-1])
    refused(path, "frames.raw", f"{FRAMES.nbytes - 1} of {FRAMES.nbytes}")
    raw.unlink()
    refused(path, "frames.raw", "missing")


def test_filters_that_are_not_there(tmp_path):
    def write_filtered(code):
        created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        created.set_chunk((1, 16, 24))
        created.set_filter(code, h5py.h5z.FLAG_OPTIONAL)
        with h5py.File(tmp_path / f"{code}.h5", "w") as file:
            space = h5py.h5s.create_simple((1, 16, 24))
            d = h5py.h5d.create(file.id, b"frames", h5py.h5t.NATIVE_UINT16, space, created)
            d.write_direct_chunk((0, 0, 0), b"0123456789")
        return tmp_path / f"{code}.h5"

    refused(write_filtered(33000), "filter 33000", "pip install hdf5plugin")
    if not h5py.h5z.filter_avail(32008):
        monkey = {**os.environ, "PYTHONPATH": f"{ROOT}"}
        script = (
            "import sys; sys.modules['hdf5plugin'] = None\n"
            "from hpc_xvr.data.cameras import open_camera_file\n"
            "open_camera_file(sys.argv[1])"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, write_filtered(32008)],
            capture_output=True,
            text=True,
            env=monkey,
        )
        assert "compressed with bitshuffle (HDF5 filter 32008)" in done.stderr


def test_hdf5plugin_is_used_where_it_is(tmp_path):
    """In processes of their own, as it cannot be taken back."""
    pytest.importorskip("hdf5plugin")
    np.save(tmp_path / "frames.npy", FRAMES)
    scripts = (
        "import h5py, hdf5plugin, numpy as np\n"
        "with h5py.File('a.h5', 'w') as file:\n"
        "    file.create_dataset('f', data=np.load('frames.npy'), chunks=(1, 16, 24),\n"
        "                        **hdf5plugin.Bitshuffle())",
        "import numpy as np\n"
        "from hpc_xvr.data.cameras import open_camera_file\n"
        "ours = np.stack(list(open_camera_file('a.h5').frames()))\n"
        "np.testing.assert_array_equal(ours, np.load('frames.npy'))",
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for script in scripts:
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            check=True,
            env={**os.environ, "PYTHONPATH": path},
        )


# What is outside


@pytest.fixture
def outside(tmp_path):
    """A folder with something secret, and one with the file that leads there."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "in").mkdir()
    write(tmp_path / "secret" / "s.h5", "d")
    (tmp_path / "secret" / "s.raw").write_bytes(FRAMES.tobytes())
    return tmp_path


def lead(folder: Path, how: str, file: str) -> Path:
    path = folder / "a.h5"
    if how == "link":
        with h5py.File(path, "w") as out:
            out["exchange/data"] = h5py.ExternalLink(file, "d")
    elif how == "group":
        with h5py.File(path, "w") as out:
            out["exchange"] = h5py.ExternalLink(file, "/")
    elif how == "virtual":
        write_virtual(path, (np.s_[:], file, "d", FRAMES.shape, np.s_[:]))
    elif how == "link in a part":
        with h5py.File(folder / "p.h5", "w") as out:
            out["d"] = h5py.ExternalLink(file, "d")
        write_virtual(path, (np.s_[:], "p.h5", "d", FRAMES.shape, np.s_[:]))
    else:
        write_raw(path, (file.replace(".h5", ".raw"), 0, FRAMES.nbytes))
    return path


@pytest.mark.parametrize("how", ["link", "virtual", "link in a part", "raw"])
@pytest.mark.parametrize("by", ["absolute", "dots", "symlink"])
def test_nothing_outside_the_folder_is_read_unless_allowed(outside, hpc_xvr, how, by):
    secret = outside / "secret"
    if by == "symlink":
        for name in ("s.h5", "s.raw"):
            (outside / "in" / name).symlink_to(secret / name)
    file = {"absolute": f"{secret}/s.h5", "dots": "../secret/s.h5", "symlink": "s.h5"}[by]
    path = lead(outside / "in", how, file)
    ingest = ["ingest", path, "--corpus", outside / "c"]
    said = hpc_xvr(*ingest, code=2).err
    assert f"leads to {secret.resolve()}/s." in said
    assert f"--allow-links {secret.resolve()}" in said
    assert not (outside / "c" / "videos").exists()
    hpc_xvr(*ingest, "--allow-links", "/nowhere", "--allow-links", secret)
    (video,) = Corpus(outside / "c").videos
    np.testing.assert_array_equal(video.read(range(video.shape[0])), FRAMES)
    assert video.info.metadata["reading"]["allow_links"] == ["/nowhere", str(secret)]


def test_links_into_groups_are_looked_at_too(outside):
    write(outside / "secret" / "s.h5", "data", FRAMES)
    path = lead(outside / "in", "group", "../secret/s.h5")
    refused(path, "outside")
    same(path, allow_links=[outside / "secret"])


@pytest.mark.parametrize("what", ["data_white", "data_dark"])
def test_flat_fields_and_descriptions_are_not_taken_from_outside(outside, what):
    path = write(outside / "in" / "a.h5", "exchange/data")
    write(outside / "secret" / "s.h5", "model", "Secret")
    with h5py.File(path, "a") as file:
        file["measurement/instrument/detector/model"] = h5py.ExternalLink("../secret/s.h5", "model")
    assert open_camera_file(path).camera == "unknown"
    assert open_camera_file(path, allow_links=[outside / "secret"]).camera == "Secret"
    with h5py.File(path, "a") as file:
        file[f"exchange/{what}"] = h5py.ExternalLink("../secret/s.h5", "d")
    refused(path, f"/exchange/{what}", "outside", "--allow-links")


def test_parts_below_the_folder_and_files_that_moved(outside):
    (outside / "in" / "parts").mkdir()
    write(outside / "in" / "parts" / "p.h5", "d")
    for how in ("link", "virtual"):
        same(lead(outside / "in", how, "parts/../parts/p.h5"))
    write(outside / "in" / "p.h5", "d", FRAMES[::-1])
    for how in ("link", "virtual"):
        same(lead(outside / "in", how, "/data/of/another/machine/p.h5"), FRAMES[::-1])


def test_reconstruct_has_the_option_for_both_cameras(outside, hpc_xvr):
    """Refused as the second file is missing, not for the first one's link."""
    path = lead(outside / "in", "link", "../secret/s.h5")
    command = ["reconstruct", "bicubic", "--hr", path, "--lr", outside / "none.tif", "--gap", "2"]
    command += ["--out", outside / "m.tif"]
    assert "--allow-links" in hpc_xvr(*command, code=2).err
    said = hpc_xvr(*command, "--allow-links", outside / "secret", code=2).err
    assert "none.tif" in said and "outside" not in said


def test_prefixes_of_the_environment(outside, monkeypatch):
    """HDF5 would read other parts than those that were looked at."""
    write(outside / "in" / "s.h5", "d", FRAMES[::-1])
    for name in ("HDF5_VDS_PREFIX", "HDF5_EXT_PREFIX", "HDF5_EXTFILE_PREFIX"):
        monkeypatch.setenv(name, str(outside / "secret"))
    for how in ("virtual", "link"):
        same(lead(outside / "in", how, "s.h5"), FRAMES[::-1])
    (outside / "in" / "s.raw").write_bytes(FRAMES[::-1].tobytes())
    refused(lead(outside / "in", "raw", "s.h5"), "HDF5_EXTFILE_PREFIX")


# What is too large


def test_chunks_and_frames_beyond_the_budget(tmp_path):
    """A few kilobytes that would become gigabytes."""
    big = tmp_path / "chunk.h5"
    with h5py.File(big, "w") as file:
        d = file.create_dataset(
            "f", (4096, 1024, 512), "u1", chunks=(4096, 1024, 512), compression="gzip"
        )
        d.id.write_direct_chunk((0, 0, 0), bytes(2**21))
    refused(big, "chunks of 2147483648 bytes")
    with h5py.File(tmp_path / "frame.h5", "w") as file:
        file.create_dataset("f", (1, 2**14, 2**14), "f8", chunks=(1, 64, 2**14), compression="gzip")
    refused(tmp_path / "frame.h5", "frames of 2147483648 bytes")


@pytest.mark.slow
def test_memory_for_many_frames_in_few_bytes(tmp_path):
    """2 GiB of zeros in 2 MiB are read frame by frame."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        d = file.create_dataset(
            "f", (128, 4096, 4096), "u1", chunks=(1, 4096, 4096), compression="gzip"
        )
        for k in range(128):
            d[k] = 0
    script = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from hpc_xvr.data.cameras import open_camera_file\n"
        "print(sum(1 for _ in open_camera_file(sys.argv[1]).frames()))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.h5"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    frames, kilobytes = map(int, done.stdout.split())
    assert frames == 128 and kilobytes < 600_000


# Values and times that the file states beside the numbers


def nexus(path, **fields) -> Path:
    """A NeXus file; fields of its NXdata."""
    with h5py.File(path, "w") as file:
        group = file.create_group("entry/data")
        file["entry"].attrs["NX_class"], group.attrs["NX_class"] = "NXentry", "NXdata"
        group.attrs.update(signal="data", axes=["time", "y", "x"])
        group["data"] = FRAMES
        for name, value in fields.items():
            group[name] = value
    return path


def values(path, **options) -> np.ndarray:
    return np.stack(list(open_camera_file(path, **options).values()))


def test_scale_and_offset_of_the_numbers(tmp_path):
    path = write(tmp_path / "netcdf.h5", scale_factor=0.5, add_offset=-100.0)
    recording = open_camera_file(path)
    np.testing.assert_allclose(values(path), FRAMES * 0.5 - 100)
    assert recording.full_scale == 65535 / 2 - 100
    np.testing.assert_array_equal(stack(open_camera_file(path, bit_depth=12)), FRAMES)
    nexus(tmp_path / "n.h5", data_scaling_factor=2.0, offset=10)
    np.testing.assert_allclose(values(tmp_path / "n.h5"), 10 + 2.0 * FRAMES)
    refused(write(tmp_path / "0.h5", scale_factor=0.0), "scale 0", "--bit-depth")


@pytest.mark.parametrize("name", ["_FillValue", "missing_value"])
def test_numbers_that_stand_for_missing_pixels(name, tmp_path):
    frames = FRAMES.copy()
    frames[3, 2, 1] = 65535
    path = write(tmp_path / "a.h5", data=frames, **{name: np.uint16(65535)})
    refused(path, "frame 3 holds 1 pixels without a value", "65535", "--bit-depth")
    np.testing.assert_array_equal(stack(open_camera_file(path, bit_depth=16)), frames)
    recording = open_camera_file(path, missing=True)
    np.testing.assert_array_equal(stack(recording), np.delete(frames, 3, 0))
    frames[3, 2, 1] = 7
    same(write(tmp_path / "b.h5", data=frames, **{name: np.uint16(65535)}), frames)
    frames[3, 2, 1] = 65535  # stored; the value is half of it
    scaled = write(tmp_path / "c.h5", data=frames, scale_factor=0.5, **{name: np.uint16(65535)})
    refused(scaled, "frame 3 holds 1 pixels without a value")


def test_the_mask_of_a_detector_is_no_frame_and_is_told(tmp_path, caplog):
    path = write(tmp_path / "a.h5", "entry/detector/data")
    mask = np.zeros(FRAMES.shape[1:], np.uint32)
    write(path, "entry/detector/pixel_mask", mask)
    same(path)
    assert "pixel_mask" not in caplog.text
    mask[2, 1] = 1
    write(tmp_path / "b.h5", "entry/detector/data")
    write(tmp_path / "b.h5", "entry/detector/pixel_mask", mask)
    same(tmp_path / "b.h5")
    assert "its pixel_mask marks 1 pixels as bad" in caplog.text
    counts = FRAMES.astype(np.uint32)
    counts[:, 2, 1] = 2**32 - 1
    refused(write(tmp_path / "c.h5", data=counts), "if that value marks bad ones", bit_depth=12)


@pytest.mark.parametrize(
    ("times", "unit", "told"),
    [
        ([0, 1, 2, 3, 4, np.inf], "s", "time stamp of frame 5 is inf"),
        ([0, 1, np.nan, 3, 4, 5], "s", "time stamp of frame 2 is nan"),
        ([0, 1, 3, 2, 4, 5], "s", "run backwards after frame 2"),
        ([0, 1, 2], "s", "has 3 values for 6 frames and is not used"),
        ([0, 1, 2, 3, 4, 5], "turns", "holds no numbers in s or the like"),
    ],
)
def test_odd_times_are_told_and_not_used(tmp_path, caplog, times, unit, told):
    path = nexus(tmp_path / "a.h5", time=np.array(times, float))
    with h5py.File(path, "a") as file:
        file["entry/data/time"].attrs["units"] = unit
    recording = open_camera_file(path)
    assert recording.times_s is None and recording.frame_rate_hz is None
    assert caplog.text.count(told) == 1


@pytest.mark.parametrize("kind", ["nexus", "exchange", "scale"])
def test_time_axes(tmp_path, kind, caplog):
    path, times = tmp_path / "a.h5", np.array([5.0, 6, 7, 9, 10, 11])
    if kind == "nexus":
        nexus(path, time=times)
        name = "entry/data/time"
    elif kind == "exchange":
        write(path, "exchange/data")
        write(path, name := "exchange/time", times)
    else:
        write(write(path), name := "time", times)
        with h5py.File(path, "a") as file:
            file["time"].make_scale("time")
            file["frames"].dims[0].attach_scale(file["time"])
    same(path)
    assert kind == "exchange" or "has no unit" in caplog.text
    with h5py.File(path, "a") as file:
        file[name].attrs["units"] = "ms"
    recording = open_camera_file(path)
    assert recording.times_s == pytest.approx((times - 5) / 1000)
    assert recording.frame_rate_hz == pytest.approx(1000)
    assert "time stamps jump after frame 2" in caplog.text
    assert recording.taken().tolist() == [0, 1, 2, 4, 5, 6]
    with h5py.File(path, "a") as file:
        file[name][3] = 6
    assert open_camera_file(path).times_s is None
    assert "run backwards after frame 2" in caplog.text


def test_chunks_that_contradict_the_order_of_axes(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("frames", data=np.moveaxis(FRAMES, 0, -1), chunks=(16, 24, 1))
    refused(path, "in chunks of 16 x 24 x 1", "attribute axes")
    with h5py.File(path, "a") as file:
        file["frames"].attrs["axes"] = "y:x:time"
    same(path)
