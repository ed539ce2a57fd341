"""Frames that are missing or cannot be read: an error that names them or, where asked, left out,
and the others keep their times."""

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from hpc_xvr.data.cameras import open_camera_file
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.pairing.reading import CameraReading
from support.camera_files import (
    counts,
    refused,
    shimadzu_parts,
    stack,
    write_cine,
    write_photron,
)

FRAMES = counts((6, 16, 24))


def png(path, value):
    Image.fromarray(np.full((16, 24), value, np.uint8)).save(path)


def pictures(folder, *numbers, value=10):
    folder.mkdir(exist_ok=True)
    for number in numbers:
        png(folder / f"f_{number:04}.png", value + number)
    return folder


def virtual(folder, there=("a.h5", "c.h5")):
    """Frames 0 and 1, 2 and 3, 4 and 5 come from a.h5, b.h5 and c.h5."""
    layout = h5py.VirtualLayout(FRAMES.shape, "u2")
    for k, name in enumerate(("a.h5", "b.h5", "c.h5")):
        layout[2 * k : 2 * k + 2] = h5py.VirtualSource(name, "d", (2, 16, 24), "u2")
        if name in there:
            with h5py.File(folder / name, "w") as file:
                file["d"] = FRAMES[2 * k : 2 * k + 2]
    with h5py.File(folder / "v.h5", "w", libver="latest") as file:
        file.create_virtual_dataset("frames", layout)
    return folder / "v.h5"


def missing_part(folder):
    return virtual(folder)


def part_without_its_dataset(folder):
    path = virtual(folder, ("a.h5", "b.h5", "c.h5"))
    with h5py.File(folder / "b.h5", "w") as file:
        file["other"] = 1
    return path


def part_that_is_no_hdf5(folder):
    path = virtual(folder)
    (folder / "b.h5").write_bytes(b"nothing of the kind")
    return path


def hole(folder):
    layout = h5py.VirtualLayout(FRAMES.shape, "u2")
    with h5py.File(folder / "a.h5", "w") as file:
        file["d"] = FRAMES
    source = h5py.VirtualSource("a.h5", "d", FRAMES.shape, "u2")
    layout[:2], layout[4:] = source[:2], source[4:]
    with h5py.File(folder / "v.h5", "w", libver="latest") as file:
        file.create_virtual_dataset("frames", layout)
    return folder / "v.h5"


def missing_tile(folder):
    """The right halves of frames 2 and 3 are gone."""
    layout = h5py.VirtualLayout(FRAMES.shape, "u2")
    parts = {
        "left.h5": np.s_[:, :, :12],
        "right.h5": np.s_[:2, :, 12:],
        "gone.h5": np.s_[2:4, :, 12:],
        "last.h5": np.s_[4:, :, 12:],
    }
    for name, index in parts.items():
        layout[index] = h5py.VirtualSource(name, "d", FRAMES[index].shape, "u2")
        if name != "gone.h5":
            with h5py.File(folder / name, "w") as file:
                file["d"] = FRAMES[index]
    with h5py.File(folder / "v.h5", "w", libver="latest") as file:
        file.create_virtual_dataset("frames", layout)
    return folder / "v.h5"


def chunks_never_written(folder):
    with h5py.File(folder / "c.h5", "w") as file:
        data = file.create_dataset("frames", FRAMES.shape, "u2", chunks=(1, 16, 12))
        data[:2], data[4:] = FRAMES[:2], FRAMES[4:]
        data[2, :, :12] = FRAMES[2, :, :12]  # half of a frame is none
    return folder / "c.h5"


def floats_that_are_nan(folder):
    frames = FRAMES.astype(np.float32)
    frames[2, 3, 4], frames[3] = np.nan, np.inf
    tifffile.imwrite(folder / "f.tif", frames, photometric="minisblack")
    return folder / "f.tif"


def damaged_pages(folder):
    path = folder / "z.tif"
    tifffile.imwrite(path, FRAMES, photometric="minisblack", compression="zlib")
    with tifffile.TiffFile(path) as tif:
        places = [tif.pages[k].dataoffsets[0] for k in (2, 3)]
    data = bytearray(path.read_bytes())
    for at in places:
        data[at : at + 30] = b"\xff" * 30
    path.write_bytes(data)
    return path


IN_THE_MIDDLE = [
    missing_part,
    part_without_its_dataset,
    part_that_is_no_hdf5,
    hole,
    missing_tile,
    chunks_never_written,
    floats_that_are_nan,
    damaged_pages,
]


@pytest.mark.parametrize("make", IN_THE_MIDDLE)
def test_frames_in_the_middle(make, tmp_path, caplog):
    path = make(tmp_path)
    refused(path)
    recording = open_camera_file(path, missing=True)
    assert "frames 2 to 3 are missing and left out" in caplog.text
    assert recording.taken().tolist() == [0, 1, 4, 5]
    frames = np.stack(list(recording.values()))
    np.testing.assert_array_equal(frames, FRAMES[[0, 1, 4, 5]])
    np.testing.assert_array_equal(next(recording.values(2, 3)), FRAMES[4])


def short_part(folder):
    path = virtual(folder, ("a.h5", "b.h5", "c.h5"))
    with h5py.File(folder / "c.h5", "w") as file:
        file["d"] = FRAMES[4:5]
    return path


def short_photron(folder):
    path = write_photron(folder, FRAMES % 4096, 16)
    pixels = path.with_suffix(".mraw")
    pixels.write_bytes(pixels.read_bytes()[:-200])
    return path


def short_cine(folder):
    path = folder / "s.cine"
    write_cine(path, FRAMES)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def short_chain(folder):
    """A stack of which the end was not copied: its last page's directory is gone."""
    path = folder / "s.tif"
    with tifffile.TiffWriter(path) as tif:
        for frame in FRAMES:
            tif.write(frame, metadata=None, photometric="minisblack")
    with tifffile.TiffFile(path) as tif:
        end = tif.pages[5].offset + 4
    path.write_bytes(path.read_bytes()[:end])
    return path


def short_bare_pixels(folder):
    """One page, and the pixels of all frames behind it."""
    path = folder / "s.tif"
    tifffile.imwrite(path, FRAMES, imagej=True)
    with tifffile.TiffFile(path) as tif:
        end = tif.pages[0].dataoffsets[0] + FRAMES[:5].nbytes + 100
        first = tif.pages[0]
        if len(tif.pages) > 1:  # the chain ends with the first page, as ImageJ writes large stacks
            at = first.offset + 2 + 12 * len(first.tags)
    data = bytearray(path.read_bytes()[:end])
    data[at : at + 4] = bytes(4)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "make", [short_part, short_photron, short_cine, short_chain, short_bare_pixels]
)
def test_files_that_end_too_early(make, tmp_path, caplog):
    path = make(tmp_path)
    refused(path)
    recording = open_camera_file(path, missing=True)
    assert len(recording) == 5
    whole = FRAMES if make is not short_photron else FRAMES % 4096
    np.testing.assert_array_equal(stack(recording), whole[:5])
    assert caplog.text


def test_a_short_shimadzu_file(tmp_path):
    frames = counts((3, 250, 400), 10)
    path = tmp_path / "s.dat"
    path.write_bytes(b"".join(shimadzu_parts(frames))[: -2 * 250 * 400])
    refused(path)
    np.testing.assert_array_equal(stack(open_camera_file(path, missing=True)), frames[:2])


def test_a_short_raw_file(tmp_path):
    FRAMES.tofile(tmp_path / "raw")
    (tmp_path / "raw").write_bytes((tmp_path / "raw").read_bytes()[:-2])
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    created.set_external(b"raw", 0, FRAMES.nbytes)
    with h5py.File(tmp_path / "e.h5", "w") as file:
        space = h5py.h5s.create_simple(FRAMES.shape)
        h5py.h5d.create(file.id, b"frames", h5py.h5t.NATIVE_UINT16, space, created)
    refused(tmp_path / "e.h5", "raw")
    read = open_camera_file(tmp_path / "e.h5", missing=True)
    np.testing.assert_array_equal(stack(read), FRAMES[:5])


def test_numbers_and_files_of_a_sequence(tmp_path, caplog):
    folder = pictures(tmp_path / "s", 10, 12, 18, 20, 22)
    (folder / "f_0020.png").write_bytes(b"")
    png(folder / "f_0024.png", 34)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "f_0010.png")  # another size
    refused(folder, "f_0018.png", "follows number 12")
    read = open_camera_file(folder, missing=True)
    assert "frames 0, 2 to 3, 5 are missing" in caplog.text
    assert stack(read)[:, 0, 0].tolist() == [22, 28, 32, 34]
    assert read.taken().tolist() == [1, 4, 6, 7]


def test_what_cannot_be_opened_at_all_is_still_an_error(tmp_path):
    folder = pictures(tmp_path / "s", 1, 2)
    for file in folder.iterdir():
        file.write_bytes(b"")
    refused(folder, missing=True)
    inside = tmp_path / "in"
    inside.mkdir()
    layout = h5py.VirtualLayout((2, 16, 24), "u2")
    layout[:] = h5py.VirtualSource(str(tmp_path / "a.h5"), "d", (2, 16, 24), "u2")
    virtual(tmp_path)
    with h5py.File(inside / "v.h5", "w", libver="latest") as file:
        file.create_virtual_dataset("frames", layout)
    refused(inside / "v.h5", "--allow-links", missing=True)


def test_times_are_those_of_the_frames_there_are(tmp_path):
    folder = pictures(tmp_path / "s", 0, 1, 4, 5)
    read = CameraReading(missing="skip", frame_rate_hz=100.0).open(folder)
    assert read.times_s == pytest.approx([0, 0.01, 0.04, 0.05])
    assert read.frame_rate_hz == 100


def test_ingest_makes_recordings_without_a_gap(tmp_path, hpc_xvr):
    folder = pictures(tmp_path / "shot", 0, 1, 2, 5, 6)
    said = hpc_xvr("ingest", folder, "--corpus", tmp_path / "c", code=2).err
    assert "follows number 2" in said
    said = hpc_xvr("ingest", folder, "--corpus", tmp_path / "c", "--missing", "nan", code=2).err
    assert "--missing skip" in said
    asked = ("ingest", folder, "--corpus", tmp_path / "c", "--missing", "skip")
    said = " ".join(hpc_xvr(*asked).err.split())
    assert "becomes 2 recordings" in said
    first, second = Corpus(tmp_path / "c").videos
    assert first.read(range(3))[:, 0, 0].tolist() == [10, 11, 12]
    assert second.read(range(2))[:, 0, 0].tolist() == [15, 16]
    assert first.split == second.split
    assert first.info.metadata["frames_left_out"] == "3 to 4"
    assert first.info.metadata["reading"] == {"missing": "skip"}
    hpc_xvr(*asked)  # nothing new
    assert len(Corpus(tmp_path / "c").videos) == 2


def test_ingest_of_two_cameras(tmp_path, hpc_xvr):
    sharp = pictures(tmp_path / "sharp", 0, 1, 3, 4)
    fast = tmp_path / "fast"
    fast.mkdir()
    for t in range(17):
        if t != 14:
            Image.fromarray(np.full((4, 6), 10 * t, np.uint8)).save(fast / f"t_{t:03}.png")
    hpc_xvr(
        *("ingest", sharp, "--lr", fast, "--gap", 4, "--corpus", tmp_path / "c"),
        *("--missing", "skip", "--lr-missing", "skip"),
    )
    first, second = Corpus(tmp_path / "c").videos
    assert first.info.lr_times == pytest.approx([k / 4 for k in range(8)])
    fasts = [9, 10, 11, 12, 13, 15, 16]  # of which the sharp frames 3 and 4 are 12 and 16
    assert second.info.lr_times == pytest.approx([(k - 12) / 4 for k in fasts])
    assert [int(frame[0, 0]) for frame in second.read_lr(range(7))] == [10 * k for k in fasts]


@pytest.fixture
def pair(tmp_path):
    """Fast frames 0 to 16, a sharp one every 4; the scene grows brighter with time. Frames 5, 6
    and 8 of the fast camera and the sharp frame of the instant 12 are missing."""
    sharp, fast = tmp_path / "sharp", tmp_path / "fast"
    pattern = np.kron(np.random.default_rng(1).integers(0, 24, (8, 12)), np.ones((4, 4)))
    for folder in (sharp, fast):
        folder.mkdir()
    for t in range(17):
        frame = (20 + 10 * t + pattern).astype(np.uint8)
        low = frame.reshape(8, 4, 12, 4).mean((1, 3))
        if t not in (5, 6, 8):
            Image.fromarray(low.round().astype(np.uint8)).save(fast / f"f_{t:03}.png")
        if t % 4 == 0 and t != 12:
            Image.fromarray(frame).save(sharp / f"s_{t // 4}.png")
    return (
        *("reconstruct", "detail", "--lr", fast, "--hr", sharp, "--gap", 4),
        *("--lr-frame-rate", 1000, "--dtype", "float32", "--out"),
    )


def test_reconstruct_leaves_out_missing_frames(pair, tmp_path, hpc_xvr):
    said = hpc_xvr(*pair, tmp_path / "o.h5", code=2).err
    assert "f_007.png: follows number 4" in said
    asked = ("--lr-missing", "skip", "--hr-missing", "skip")
    said = " ".join(hpc_xvr(*pair, tmp_path / "o.h5", *asked).err.split())
    assert "frames 5 to 6, 8 are missing" in said and "frames 3 are missing" in said
    assert "at the instant of sharp frame 2, which is left out" in said
    with h5py.File(tmp_path / "o.h5") as file:
        frames, times = file["exchange/data"][:], file["exchange/time"][:]
        assert "5 to 6, 8" in file["exchange/data"].attrs["notes"]
    there = np.array([t for t in range(17) if t not in (5, 6, 8)])
    assert times == pytest.approx(there / 1000)
    assert frames.mean((1, 2)) == pytest.approx(31.5 + 10 * there, abs=1.5)


def test_reconstruct_marks_missing_frames(pair, tmp_path, hpc_xvr):
    asked = ("--lr-missing", "nan", "--hr-missing", "skip")
    said = hpc_xvr(*pair, tmp_path / "o.tif", *asked, "--dtype", "uint16", code=2).err
    assert "--dtype float32" in said
    hpc_xvr(*pair, tmp_path / "o.tif", *asked)
    frames = tifffile.imread(tmp_path / "o.tif")
    assert len(frames) == 17
    assert np.flatnonzero(np.isnan(frames).all((1, 2))).tolist() == [5, 6, 8]
    there = np.array([t for t in range(17) if t not in (5, 6, 8)])
    assert frames[there].mean((1, 2)) == pytest.approx(31.5 + 10 * there, abs=1.5)
    back = open_camera_file(tmp_path / "o.tif", missing=True)
    assert back.taken().tolist() == there.tolist()
