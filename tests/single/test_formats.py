"""Results in the formats people open: what is written is read back, by us and by their programs."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

import hpc_xvr as xvr
from hpc_xvr.data.cameras import results
from hpc_xvr.errors import InputError
from hpc_xvr.reconstruction import writers
from hpc_xvr.reconstruction.provenance import Checksum, command_line, sources_of, weights_sha256
from hpc_xvr.reconstruction.writers import (
    Calibration,
    Provenance,
    frames_shown,
    open_movie,
    write_sequence,
)
from support.disk import fill

NAMES = ("m.tif", "m.ome.tif", "m.h5", "m.nxs", "m.zarr", "m.ome.zarr", "frames")
KINDS = ("uint16", "float32", "original")
ALL = [(name, kind) for name in NAMES for kind in KINDS if (name, kind) != ("frames", "float32")]


@pytest.fixture
def movie():
    """Frames of a 12 bit camera."""
    counts = np.random.default_rng(1).integers(0, 4096, (5, 24, 31))
    counts[0, 0, :2] = 0, 4095
    return (counts / 4095).astype(np.float32)


def times_of(count):
    """Time stamps that are not quite steady, one frame lost."""
    steps = np.random.default_rng(2).uniform(0.9, 1.1, count) * 5e-4
    steps[9] *= 2
    return np.cumsum(steps) - steps[0]


COUNTS = Calibration(
    2000.0, 2.5, 4095.0, "counts", times_of(20), ("grey matched",), bit_depth=12
)  # fmt: skip
TRANSMISSION = Calibration(80e3, 0.65, 1.25)


def physical(recording):
    """Frames in the unit of the file."""
    top = 2**recording.bit_depth - 1
    full = recording.full_scale if recording.in_floats() else top
    return np.stack([frame * (full / top) for frame in recording.frames()])


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_counts_come_back(tmp_path, movie, name, kind):
    path = write_sequence(tmp_path / name, iter(movie), 5, COUNTS, 7, kind)
    found = xvr.open_recording(path)
    assert found.shape == (5, 24, 31)
    step = 0 if kind == "original" else 0.51 / 65535
    np.testing.assert_allclose(physical(found), movie * 4095.0, atol=4095 * step + 2e-4)
    assert found.frame_rate_hz == pytest.approx(2000, rel=1e-9)
    assert found.pixel_size_um == pytest.approx(2.5, rel=1e-6)
    np.testing.assert_allclose(found.times_s, times_of(20)[7:12] - times_of(20)[7], atol=1e-12)
    assert found.metadata["unit"] == "counts"
    if kind == "original":
        assert (found.bit_depth, found.full_scale) == (12, 1.0) and not found.in_floats()
        assert (np.stack(list(found.frames())) == np.rint(movie * 4095)).all()
    else:
        assert (found.bit_depth, found.full_scale) == (16, 4095.0)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("name", "kind"), [each for each in ALL if each[1] != "original"])
def test_transmissions_come_back(tmp_path, movie, name, kind):
    path = write_sequence(tmp_path / name, iter(movie), 5, TRANSMISSION, 0, kind)
    found = xvr.open_recording(path)
    np.testing.assert_allclose(physical(found), movie * 1.25, atol=1.25 * 1.03 / 65535)
    assert (found.bit_depth, found.full_scale) == (16, 1.25)
    assert found.frame_rate_hz == pytest.approx(80e3, rel=1e-6)
    assert found.pixel_size_um == pytest.approx(0.65, rel=1e-6)
    assert found.times_s is None and "unit" not in found.metadata


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_known_stays_unknown(tmp_path, movie, name):
    found = xvr.open_recording(write_sequence(tmp_path / name, iter(movie), 5))
    assert (found.frame_rate_hz, found.pixel_size_um, found.times_s) == (None, None, None)
    np.testing.assert_allclose(physical(found), movie, atol=1.03 / 65535)


@pytest.mark.parametrize("name", ["m.tif", "m.zarr", "frames"])
def test_one_frame(tmp_path, movie, name):
    path = write_sequence(tmp_path / name, iter(movie[:1]), 1, COUNTS, 3, "original")
    found = xvr.open_recording(path)
    assert found.shape == (1, 24, 31) and found.bit_depth == 12
    np.testing.assert_allclose(physical(found)[0], movie[0] * 4095, atol=1e-3)


def test_all_formats_are_ingested(tmp_path, movie):
    """Files, a folder of PNG and folders of OME-Zarr, named one by one and found in a folder."""
    (tmp_path / "results").mkdir()
    for number, name in enumerate(NAMES):
        frames = np.clip(movie + 0.01 * number, 0, 1)  # else they would be duplicates
        write_sequence(tmp_path / "results" / name, iter(frames), 5, COUNTS, 7)
    for where, paths in (
        ("one", [tmp_path / "results" / name for name in NAMES]),
        ("folder", [tmp_path / "results"]),
    ):
        xvr.ingest(paths, tmp_path / where, crop=True, workers=1)
        videos = list(xvr.Corpus(tmp_path / where).videos)
        assert len(videos) == len(NAMES)
        for video in videos:
            assert video.shape == (5, 24, 28)
            info = video.info
            assert info.frame_rate_hz == pytest.approx(2000) and info.full_scale == 4095
            assert info.pixel_size_um == pytest.approx(2.5)


# In the words of others


def test_imagej_finds_a_time_series(tmp_path, movie):
    path = write_sequence(tmp_path / "m.tif", iter(movie), 5, COUNTS, 7, "original")
    with tifffile.TiffFile(path) as tif:
        said = tif.imagej_metadata
        assert tif.is_imagej and tif.series[0].axes == "TYX" and not tif.is_bigtiff
    assert said["frames"] == 5 and said["hyperstack"] and "slices" not in said
    assert said["finterval"] == 1 / 2000 and said["unit"] == "um" and said["max"] == 4095
    assert said["Info"].startswith(
        "first frame: 7\nvalue of 4095: 4095 counts\ngrey matched\nframes not equally spaced"
    )
    values = write_sequence(tmp_path / "t.tif", iter(movie), 5, TRANSMISSION)
    with tifffile.TiffFile(values) as tif:  # ImageJ's calibration shows transmissions
        assert tif.imagej_metadata["cf"] == 0
        assert tif.imagej_metadata["c1"] == pytest.approx(1.25 / 65535)


IMAGEJ = Path("/usr/share/java/ij.jar")
"""Of Debian's package `imagej`; Fiji opens TIFF with the same code."""
TOLD_BY_IMAGEJ = """
setBatchMode(true);
open(getArgument());
getDimensions(width, height, channels, slices, frames);
getVoxelSize(side, high, deep, unit);
print(width, height, channels, slices, frames);
print(d2s(side, 9), d2s(high, 9), d2s(Stack.getFrameInterval(), 12));
print(unit);
for (t = 1; t <= frames; t++) {
    Stack.setFrame(t);
    row = "";
    for (x = 0; x < width; x++) row += d2s(getValue(x, 3), 9) + " ";
    print(row);
}
getMinAndMax(low, high);
print(low, high);
"""


@pytest.mark.skipif(
    not (IMAGEJ.exists() and shutil.which("java") and shutil.which("xvfb-run")),
    reason="ImageJ, or a screen for it, is not installed (apt: imagej xvfb xauth)",
)
@pytest.mark.parametrize("kind", ["original", "uint16", "float32"])
def test_imagej_itself_opens_it(tmp_path, movie, kind):
    """Frames are frames, not slices; pixels have a size, and values their unit."""
    of = COUNTS if kind == "original" else TRANSMISSION
    path = write_sequence(tmp_path / "m.tif", iter(movie), 5, of, 7, kind)
    macro = tmp_path / "look.ijm"
    macro.write_text(TOLD_BY_IMAGEJ)
    java = ["java", f"-Duser.home={tmp_path}", "-cp", str(IMAGEJ), "ij.ImageJ"]
    command = ["xvfb-run", "-a", *java, "-batch", str(macro), str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    said = done.stdout.splitlines()
    assert said[0].split() == ["31", "24", "1", "1", "5"]  # one channel, one slice, five frames
    scale = [float(x) for x in said[1].split()]
    assert scale == pytest.approx([of.pixel_size_um] * 2 + [1 / of.frame_rate_hz], rel=1e-6)
    assert said[2] in ("\u00b5m", "um", "micron")
    shown = np.array([[float(x) for x in row.split()] for row in said[3:8]])
    white = 4095 if kind == "original" else 1.25
    np.testing.assert_allclose(shown, movie[:, 3] * white, atol=white * 2e-5)
    low, high = map(float, said[8].split())
    assert 0 <= low < high <= white * 1.001


def test_bioformats_finds_a_time_series(tmp_path, movie, monkeypatch):
    monkeypatch.setattr(writers.tiff, "TIFF_LIMIT", 1000)
    path = write_sequence(tmp_path / "m.tif", iter(movie), 5, COUNTS, 7, "original")
    (tmp_path / "again").mkdir()
    again = write_sequence(tmp_path / "again" / "m.tif", iter(movie), 5, COUNTS, 7, "original")
    assert path.read_bytes() == again.read_bytes()  # nothing random in it
    with tifffile.TiffFile(path) as tif:
        assert tif.is_bigtiff and tif.is_ome and tif.series[0].axes == "TYX"
        text = tif.ome_metadata
    pixels = ET.fromstring(text).find("{*}Image/{*}Pixels")
    expected = {
        "SizeT": "5", "SizeY": "24", "SizeX": "31", "SizeC": "1", "SizeZ": "1", "Type": "uint16",
        "SignificantBits": "12", "TimeIncrement": "0.0005", "TimeIncrementUnit": "s",
        "PhysicalSizeX": "2.5", "PhysicalSizeXUnit": "µm",
    }  # fmt: skip
    assert expected.items() <= pixels.attrib.items()
    times = [float(plane.get("DeltaT")) for plane in pixels.findall("{*}Plane")]
    np.testing.assert_allclose(times, times_of(20)[7:12], rtol=1e-6)


def test_tomography_programs_find_dxchange(tmp_path, movie):
    """As dxchange's and tomopy's readers do: data, white, dark, theta; normalised they are
    transmissions. Our own reader does not normalise them again."""
    path = write_sequence(tmp_path / "m.h5", iter(movie), 5, TRANSMISSION, 7)
    with h5py.File(path) as file:
        assert file["implements"].asstr()[()] == "exchange:measurement:provenance"
        exchange = file["exchange"]
        data, white, dark = (
            exchange[key][:].astype(float) for key in ("data", "data_white", "data_dark")
        )
        np.testing.assert_allclose((data - dark) / (white - dark), movie * 1.25, atol=2e-5)
        assert exchange["theta"].shape == (5,) and np.isnan(exchange["theta"][:]).all()
        assert exchange["theta"].attrs["units"] == "deg" and exchange["time"].attrs["units"] == "s"
        np.testing.assert_allclose(exchange["time"][:], np.arange(7, 12) / 80e3)
        detector = file["measurement/instrument/detector"]
        assert detector["frame_rate"][()] == 80e3
    with h5py.File(write_sequence(tmp_path / "c.h5", iter(movie), 5, COUNTS, 7)) as file:
        assert "data_white" not in file["exchange"]  # white is not known of counts
        assert file["exchange/data"].attrs["units"] == "counts"


def test_silx_and_h5web_show_nexus_as_a_movie(tmp_path, movie):
    nxdata = pytest.importorskip("silx.io.nxdata", reason="silx is not installed")
    from silx.io import open as silx_open

    path = write_sequence(tmp_path / "m.nxs", iter(movie), 5, COUNTS, 7)
    with silx_open(str(path)) as file:
        found = nxdata.get_default(file)
        assert found is not None and found.is_valid
        assert found.interpretation == "image"
        assert file["entry/data/data"].attrs["interpretation"] == "image"  # for h5web
        assert found.axes_dataset_names == ["time", "y", "x"]
        np.testing.assert_allclose(found.axes[0][()], times_of(20)[7:12])
        assert found.axes[2][-1] == 30 * 2.5
        assert [axis.attrs["units"] for axis in found.axes] == ["s", "um", "um"]
        np.testing.assert_allclose(found.signal[()] / 65535, movie, atol=1e-5)


def test_the_label_of_nexus_says_what_the_stored_numbers_are(tmp_path, movie):
    for kind, label in (
        ("uint16", "transmission, value of 65535: 1.25"),
        ("float32", "transmission"),
    ):
        path = write_sequence(tmp_path / f"{kind}.nxs", iter(movie), 5, TRANSMISSION, dtype=kind)
        with h5py.File(path) as file:
            assert file["entry/data/data"].attrs["long_name"] == label


@pytest.mark.parametrize("name", NAMES)
def test_a_path_may_lead_upwards(tmp_path, movie, name, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "there").mkdir()
    path = write_sequence(Path("../there") / name, iter(movie), 5, COUNTS, 7)
    np.testing.assert_allclose(physical(xvr.open_recording(path)) / 4095, movie, atol=1e-4)


def test_nxtomo_reads_nexus(tmp_path, movie):
    module = pytest.importorskip("nxtomo.application.nxtomo", reason="nxtomo is not installed")
    path = write_sequence(tmp_path / "m.nxs", iter(movie), 5, COUNTS, 7)
    tomo = module.NXtomo().load(str(path), "entry", detector_data_as="as_numpy_array")
    module.NXtomo.check_consistency(tomo, raises_error=True)
    detector = tomo.instrument.detector
    np.testing.assert_allclose(detector.data / 65535, movie, atol=1e-5)
    assert detector.x_pixel_size.to("um").magnitude == pytest.approx(2.5)
    assert tomo.sample.x_pixel_size.to("um").magnitude == pytest.approx(2.5)
    assert [key.value for key in detector.image_key_control] == [0] * 5
    assert np.isnan(tomo.sample.rotation_angle.magnitude).all()  # not known, and not made up


def test_ome_zarr_is_valid(tmp_path, movie):
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    path = write_sequence(tmp_path / "m.ome.zarr", iter(movie), 5, COUNTS, 7, "original")
    group = zarr.open_group(path, mode="r")
    assert (group["0"][:] == np.rint(movie * 4095)).all()
    assert group["0"].metadata.dimension_names == ("t", "y", "x")
    said = group.attrs["ome"]["multiscales"][0]
    units = [(axis["name"], axis["type"], axis["unit"]) for axis in said["axes"]]
    assert units == [
        ("t", "time", "second"), ("y", "space", "micrometer"), ("x", "space", "micrometer")
    ]  # fmt: skip
    scale, shift = said["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == [1 / 2000, 2.5, 2.5]
    assert shift["translation"] == [times_of(20)[7], 0, 0]
    models = pytest.importorskip("ome_zarr_models.v05", reason="ome-zarr-models is not installed")
    image = models.Image.from_zarr(group)
    assert image.attributes.ome.version == "0.5"


def test_ome_zarr_of_many_files_and_none(tmp_path, movie, monkeypatch):
    monkeypatch.setattr(writers.ome_zarr, "SHARD_BYTES", 2 * movie[0].size * 2)
    path = write_sequence(tmp_path / "m.zarr", iter(movie), 5, COUNTS, 0, "original")
    assert len(list((path / "0" / "c").iterdir())) == 3  # two frames each
    found = xvr.open_recording(path)
    np.testing.assert_array_equal(list(found.frames(3)), np.rint(movie[3:] * 4095))
    part = path / "0" / "c" / "2" / "0" / "0"
    damaged = bytearray(part.read_bytes())
    damaged[40] ^= 1
    part.write_bytes(damaged)
    with pytest.raises(InputError, match="frame 4: cannot be read"):
        list(found.frames(4))
    shutil.rmtree(path / "0" / "c" / "1")
    with pytest.raises(InputError, match="frame 2: cannot be read"):
        list(found.frames())
    dark = write_sequence(tmp_path / "dark.zarr", iter(movie * 0), 5)  # zeros are stored, too
    assert not np.stack(list(xvr.open_recording(dark).frames())).any()


def others_zarr(path, shape, axes, **ome):
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    group = zarr.open_group(path, mode="w")
    array = group.create_array(
        "s0", shape=shape, dtype="uint16", chunks=(1,) * len(shape[:-2]) + shape[-2:]
    )
    array[:] = np.arange(np.prod(shape)).reshape(shape)
    units = {"t": "millisecond", "y": "nanometer", "x": "nanometer"}
    kinds = {"t": "time", "c": "channel"}
    named = [
        {"name": a, "type": kinds.get(a, "space"), **({"unit": units[a]} if a in units else {})}
        for a in axes
    ]
    scale = [{"t": 2.0, "y": 650.0, "x": 650.0}.get(a, 1.0) for a in axes]
    level = {"path": "s0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
    group.attrs["ome"] = {
        "version": "0.5", "multiscales": [{"axes": named, "datasets": [level]}], **ome
    }  # fmt: skip
    return path


def test_ome_zarr_of_others(tmp_path):
    found = xvr.open_recording(others_zarr(tmp_path / "a.zarr", (4, 1, 1, 6, 8), "tczyx"))
    assert found.shape == (4, 6, 8) and found.bit_depth == 16
    assert found.frame_rate_hz == pytest.approx(500) and found.pixel_size_um == pytest.approx(0.65)
    np.testing.assert_array_equal(list(found.frames(1, 3)), np.arange(48, 144).reshape(2, 6, 8))
    with pytest.raises(InputError, match=r"axes t \(4\), c \(2\), y \(6\), x \(8\)"):
        xvr.open_recording(others_zarr(tmp_path / "b.zarr", (4, 2, 6, 8), "tcyx"))
    others_zarr(tmp_path / "c.zarr", (4, 6, 8), "tyx")
    said = json.loads((tmp_path / "c.zarr" / "zarr.json").read_text())
    said["attributes"]["ome"]["multiscales"][0]["datasets"][0]["path"] = "../a.zarr/s0"
    (tmp_path / "c.zarr" / "zarr.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match="lies outside of it"):
        xvr.open_recording(tmp_path / "c.zarr")
    old = tmp_path / "old.zarr"
    old.mkdir()
    (old / ".zattrs").write_text('{"multiscales": []}')
    (old / ".zgroup").write_text('{"zarr_format": 2}')
    with pytest.raises(InputError, match=r"no OME-Zarr of Zarr v3 \(0\.5\): convert it"):
        xvr.open_recording(old)


# What was changed since


def test_texts_are_not_believed_of_other_frames(tmp_path, movie, caplog):
    """Fiji keeps the info when it cuts a stack, converts it or calibrates it anew."""
    path = write_sequence(tmp_path / "m.tif", iter(movie), 5, COUNTS, 7, "original")
    with tifffile.TiffFile(path) as tif:
        said, frames = tif.imagej_metadata, tif.asarray()
    kept = {"axes": "TYX", "Info": said["Info"], "unit": "um", "finterval": 1 / 2000}
    scale = {"imagej": True, "resolution": (1 / 2.5, 1 / 2.5)}
    tifffile.imwrite(tmp_path / "cut.tif", frames[1:3], metadata=kept, **scale)
    found = xvr.open_recording(tmp_path / "cut.tif")
    assert found.bit_depth == 16 and found.times_s is None
    assert found.frame_rate_hz == pytest.approx(2000)  # ImageJ's own words count
    assert "changed by another program" in caplog.text and "2 x 24 x 31 uint16 now" in caplog.text
    caplog.clear()
    tifffile.imwrite(tmp_path / "rate.tif", frames, metadata={**kept, "finterval": 0.1}, **scale)
    found = xvr.open_recording(tmp_path / "rate.tif")
    assert found.frame_rate_hz == pytest.approx(10) and found.times_s is None
    assert found.bit_depth == 12 and "frame_rate_hz was changed" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"times_s": [0, 2, 1, 3, 4]},
        {"times_s": [0, 1]},
        {"full_scale": -1},
        {"full_scale": "x"},
        {"stored_full_scale": 10**9},
        {"shape": "abc"},
        {"frame_rate_hz": float("1e999")},
    ],
)
def test_a_damaged_text_is_told_and_left_out(tmp_path, movie, caplog, change):
    path = write_sequence(tmp_path / "frames", iter(movie), 5, COUNTS, 7, "original")
    about = json.loads((path / results.ABOUT).read_text())
    about["frames"] |= change
    (path / results.ABOUT).write_text(json.dumps(about))
    found = xvr.open_recording(path)
    assert found.bit_depth == 16 and found.times_s is None and found.frame_rate_hz is None
    assert "damaged" in caplog.text
    (path / results.ABOUT).write_text('{"program": "hpc_xvr", [[[')
    assert xvr.open_recording(path).bit_depth == 16


def test_a_frame_of_a_folder_that_is_gone_is_missed(tmp_path, movie, caplog):
    path = write_sequence(tmp_path / "frames", iter(movie), 5, COUNTS, 7, "original")
    assert [p.name for p in sorted(path.iterdir())][1:3] == ["frame_000007.png", "frame_000008.png"]
    (path / "frame_000011.png").unlink()
    assert xvr.open_recording(path).bit_depth == 16 and "5 x 24 x 31" in caplog.text
    (path / "frame_000009.png").unlink()
    with pytest.raises(InputError, match="missing"):
        xvr.open_recording(path)


# Provenance


def test_provenance_is_in_every_format_and_beside_it(tmp_path, movie):
    """Also what is known only when the last frame was made."""

    def frames():
        for number, frame in enumerate(movie):
            about.per_frame.setdefault("chi_square", []).append(1.5 * number)
            yield frame
        about.per_frame["flag"] = ["", "", "contradicts", "", ""]
        about.per_frame["score"] = np.array([1.0, np.nan, 3, 4, 5])
        about.maps["error"] = movie.mean(0)
        about.extra["worst"] = np.float32(0.5)

    for name in NAMES:
        about = Provenance(
            command="hpc-xvr reconstruct \x1b[31m\nx",
            sources=[{"path": "a.tif", "sha256": SimpleNamespace(result=lambda: "12ab")}],
            registration={"scale": 2.92},
        )
        path = write_sequence(tmp_path / name, frames(), 5, COUNTS, 7, about=about)
        said = json.loads((tmp_path / f"{name}.json").read_text())
        inside = json.loads(text_of(path))
        for key in ("result", "written", "map_files"):
            said.pop(key)
        assert inside == said, name
        assert said["command"] == "hpc-xvr reconstruct ?[31m x" and said["version"]
        assert said["sources"] == [{"path": "a.tif", "sha256": "12ab"}]
        assert said["registration"] == {"scale": 2.92} and said["extra"] == {"worst": 0.5}
        assert said["per_frame"]["chi_square"] == [0, 1.5, 3, 4.5, 6]
        assert said["per_frame"]["score"] == [1, None, 3, 4, 5]
        assert said["frames"]["first_frame"] == 7
        np.testing.assert_allclose(map_of(path), movie.mean(0), rtol=1e-6)
        assert xvr.open_recording(path).shape == (5, 24, 31)  # the maps are not taken for frames
    with h5py.File(tmp_path / "m.h5") as file:
        np.testing.assert_array_equal(file["provenance/per_frame/score"][:], [1, np.nan, 3, 4, 5])
        assert file["provenance/per_frame/flag"].asstr()[2] == "contradicts"


def text_of(path):
    if path.suffix == ".tif":
        with tifffile.TiffFile(path) as tif:
            if tif.is_imagej:
                text = tif.imagej_metadata["Info"]
            else:
                text = ET.fromstring(tif.ome_metadata).findtext("{*}Image/{*}Description")
        return text[text.index("{\n") :]
    if path.suffix in (".h5", ".nxs"):
        name = {".h5": "provenance/about", ".nxs": "entry/reconstruction/note/about"}[path.suffix]
        with h5py.File(path) as file:
            return file[name].asstr()[()]
    if path.suffix == ".zarr":
        return json.dumps(json.loads((path / "zarr.json").read_text())["attributes"]["hpc_xvr"])
    return (path / "about.json").read_text()


def map_of(path):
    if path.suffix in (".h5", ".nxs"):
        name = {".h5": "provenance", ".nxs": "entry/reconstruction/note"}[path.suffix]
        with h5py.File(path) as file:
            return file[f"{name}/maps/error"][:]
    if path.suffix == ".zarr":
        zarr = pytest.importorskip("zarr", reason="zarr is not installed")
        return zarr.open_array(path / "map_error", mode="r")[:]
    return tifffile.imread(path.with_name(f"{path.name}.error.tif"))


def test_values_that_do_not_belong_to_the_frames_are_refused(tmp_path, movie):
    for about in (
        Provenance(per_frame={"flag": [1, 2]}),
        Provenance(maps={"error": np.zeros((3, 3))}),
        Provenance(maps={"../x": movie[0]}),
    ):
        with pytest.raises(ValueError, match=r"per_frame flag|map "):
            write_sequence(tmp_path / "m.h5", iter(movie), 5, COUNTS, about=about)
    with pytest.raises(ValueError, match="20 times for frames 18 to 22"):
        write_sequence(tmp_path / "m.h5", iter(movie), 5, COUNTS, 18)
    assert not list(tmp_path.iterdir())


def test_an_older_text_does_not_stay_beside_a_new_result(tmp_path, movie):
    write_sequence(tmp_path / "m.tif", iter(movie), 5, about=Provenance(command="old"))
    (tmp_path / "own.tif.json").write_text('{"mine": 1}')
    for name in ("m.tif", "own.tif"):

        def failing():
            yield from movie
            raise RuntimeError

        with pytest.raises(RuntimeError):
            write_sequence(tmp_path / name, failing(), 5, about=Provenance())
    assert "old" in (tmp_path / "m.tif.json").read_text()
    write_sequence(tmp_path / "m.tif", iter(movie), 5, about=Provenance(command="new"))
    assert '"command": "new"' in (tmp_path / "m.tif.json").read_text()


def test_secrets_and_control_characters_stay_out_of_command_lines():
    words = [
        "hpc-xvr", "reconstruct", "--lr", "my file.tif", "--token", "abc", "--password=xyz",
        "API_KEY=123", "https://me:pw@host/x.h5", "a\x1b[0m\nb", "--key-frames", "3", "it's",
    ]  # fmt: skip
    assert command_line(words) == (
        "hpc-xvr reconstruct --lr 'my file.tif' --token '***' --password='***'"
        " API_KEY='***' https://***@host/x.h5 'a?[0m b' --key-frames 3 'it'\"'\"'s'"
    ).replace("'***'", "***")


# All or nothing


def failing(movie):
    yield from movie[:3]
    raise RuntimeError("camera unplugged")


@pytest.mark.parametrize("name", NAMES)
def test_a_result_appears_complete_or_not_at_all(tmp_path, movie, name):
    path = tmp_path / name
    with pytest.raises(RuntimeError, match="unplugged"):
        write_sequence(path, failing(movie), 5, about=Provenance())
    assert not list(tmp_path.iterdir())
    write_sequence(path, iter(movie), 5, COUNTS)
    for frames, count, words in (
        (movie[:4], 5, "only 4 of the expected 5 frames"),
        (movie, 4, "more than the expected 4"),
        ([*movie[:4], movie[4, 1:]], 5, "frame 4 is"),
        ([*movie[:4], movie[4] * np.nan], 5, "frame 4 .*not finite"),
        ([], 5, "no frames"),
    ):
        with pytest.raises(InputError, match=words):
            write_sequence(path, iter(frames), count)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]  # the older one is as it was
    np.testing.assert_allclose(physical(xvr.open_recording(path)), movie * 4095, atol=0.1)
    write_sequence(path, iter(1 - movie[:2]), 2, COUNTS)
    np.testing.assert_allclose(
        physical(xvr.open_recording(path)), 4095 - movie[:2] * 4095, atol=0.1
    )
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["frames", "m.zarr"])
def test_a_folder_with_anything_else_is_not_replaced(tmp_path, movie, name):
    path = write_sequence(tmp_path / name, iter(movie), 5)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other things than an older result"):
        writers.check_sequence(path)
    with pytest.raises(InputError, match="holds other things"):
        write_sequence(path, iter(movie), 5)
    assert (path / "notes.txt").read_text() == "mine"
    (tmp_path / f"file-{name}").write_text("mine")
    with pytest.raises(InputError, match="is a file, and the result is a folder"):
        write_sequence(tmp_path / f"file-{name}", iter(movie), 5)
    (tmp_path / f"link-{name}").symlink_to(path)
    with pytest.raises(InputError, match="is a link"):
        write_sequence(tmp_path / f"link-{name}", iter(movie), 5)


@pytest.mark.parametrize("name", [*NAMES, "m.mp4", "m.gif"])
def test_a_disk_that_fills_up_is_one_line(small_disk, monkeypatch, name):
    """Noise, which does not compress; what is free is not known beforehand, as with a quota."""
    large = np.random.default_rng(0).random((40, 256, 256), np.float32)
    real = shutil.disk_usage
    monkeypatch.setattr(
        writers.sequence.shutil,
        "disk_usage",
        lambda path: SimpleNamespace(free=10**12) if path == small_disk else real(path),
    )
    with pytest.raises(InputError, match="No space left") as error:
        if name.endswith(("mp4", "gif")):
            fill(small_disk)
            writers.write_movie(small_disk / name, ([f] for f in large), 10, ["a"])
        else:
            write_sequence(small_disk / name, iter(large), 40)
    assert "\n" not in str(error.value) and name in str(error.value)
    assert [p.name for p in small_disk.iterdir() if p.name != "filler"] == []
    monkeypatch.undo()
    if not name.endswith(("mp4", "gif")):
        with pytest.raises(InputError, match=r"needs 0\.01 GB"):
            write_sequence(small_disk / name, iter(large), 40)


@pytest.mark.skipif(not shutil.which("mount"), reason="no mount")
@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_disk_is_refused_before_the_frames_are_made(small_disk, movie, name):
    import subprocess

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    frames = iter(movie)
    with pytest.raises(InputError, match="the file system is read-only"):
        write_sequence(small_disk / name, frames, 5)
    assert (next(frames) == movie[0]).all()


def test_names_and_numbers_that_cannot_be(tmp_path, movie):
    for name, words in (
        ("m.avi", r"unknown format \.avi; end the name in one of \.tif, .*\.zarr.* folder of PNG"),
        ("m.mp4", r"to look at, --movie .*m\.mp4"),
        ("shot_2.5kHz", r"unknown format \.5khz"),
    ):
        with pytest.raises(InputError, match=words):
            writers.check_sequence(tmp_path / name)
    with pytest.raises(InputError, match="PNG files hold integers"):
        writers.check_sequence(tmp_path / "frames", "float32")
    with pytest.raises(InputError, match="PNG files hold integers"):  # the camera's are floats
        write_sequence(tmp_path / "frames", iter(movie), 5, TRANSMISSION, 0, "original")
    with pytest.raises(InputError, match="dtype int8: choose from uint16, float32, original"):
        writers.check_sequence(tmp_path / "m.tif", "int8")


def test_values_that_are_cut_are_told(tmp_path, movie, caplog):
    write_sequence(tmp_path / "m.tif", iter(movie * 1.000005), 5)
    assert "were cut" not in caplog.text  # less than half a step
    write_sequence(tmp_path / "m.tif", iter(movie * 1.2 - 0.1), 5, TRANSMISSION)
    assert "17 % of the values lie below 0 or above full scale 1.25" in caplog.text
    caplog.clear()
    write_sequence(tmp_path / "m.tif", iter(movie * 1.2 - 0.1), 5, TRANSMISSION, 0, "float32")
    assert not caplog.text
    np.testing.assert_allclose(
        tifffile.imread(tmp_path / "m.tif"), (movie * 1.2 - 0.1) * 1.25, rtol=1e-5
    )


# Movies


def ramp_movie(count, height=61, width=83):
    """A step that moves, of odd size."""
    for t in range(count):
        frame = np.full((height, width), 0.25, np.float32)
        frame[:, : 2 * t] = 0.75
        yield [frame[::2, ::2], frame]


def test_mp4_plays_everywhere(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    calibration = Calibration(80e3, 2.0)
    path = writers.write_movie(
        tmp_path / "m.mp4", ramp_movie(40), 24, ["fast", "result"],
        calibration=calibration, first_frame=100, comment="hpc-xvr x",
    )  # fmt: skip
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 24 and file.metadata["comment"] == "hpc-xvr x"
        assert stream.width % 2 == 0 and stream.height % 2 == 0
        frames = [frame.to_ndarray(format="gray") for frame in file.decode(stream)]
    assert len(frames) == 40
    shown = frames[20].astype(int)
    right = shown[30:, shown.shape[1] // 2 + 10 :]
    bright = (right > 160).mean()
    assert 0.3 < bright < 0.65, bright  # 40 of 83 columns, and the scale bar
    moov, mdat = (path.read_bytes().index(word) for word in (b"moov", b"mdat"))
    assert moov < mdat  # it plays while it loads


def test_mp4_warns_of_frames_beyond_its_grey_scale(tmp_path, caplog):
    pytest.importorskip("av", reason="PyAV is not installed")
    dark = np.random.default_rng(0).random((32, 32), np.float32) * 0.1
    frames = [[dark]] * 30 + [[dark + 0.8]] * 30
    writers.write_movie(tmp_path / "m.mp4", frames, 24, ["result"])
    assert "50 % of the pixels are brighter or darker than its grey scale" in caplog.text


def test_mp4_without_av_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install 'hpc_xvr\[movie\]', or end .*\.webp"):
        writers.check_movie(tmp_path / "m.mp4")


def test_scale_bars_are_as_long_as_they_say(tmp_path):
    """2 um a pixel, 400 pixels, shown 720 - 4 wide: 200 um are 100 pixels, 179 shown."""
    frame = np.full((120, 400), 0.5, np.float32)
    frame[0, :2] = 0, 1
    with open_movie(tmp_path / "m.gif", 8, ["result"], calibration=Calibration(2e3, 2.0)) as movie:
        movie.add([frame])
    with Image.open(tmp_path / "m.gif") as image:
        shown = np.asarray(image.convert("L"))
    rows = shown[-12:-8, 4:]  # the bar, in the lower left corner
    run = np.flatnonzero(rows[1] < 250)
    lit = int(np.diff(np.concatenate([[0], run])).max()) - 1
    assert lit == pytest.approx(200 / 2 * 716 / 400, abs=1)


@pytest.mark.parametrize(
    ("seconds", "interval", "text"),
    [
        (0.25, 1 / 2000, "250.00 ms"), (20 / 80e3, 1 / 80e3, "0.250 ms"),
        (1.5, 0.04, "1.500 s"), (3e-6, 2e-7, "3.00 µs"), (0, 60.0, "0 s"),
    ],
)  # fmt: skip
def test_times_tell_neighbouring_frames_apart(seconds, interval, text):
    assert writers.film._time(seconds, interval) == text


def test_frames_of_a_thinned_movie_keep_their_numbers(tmp_path):
    with open_movie(tmp_path / "m.webp", 8, ["a"]) as movie:
        asked = []
        for t in range(200):
            if movie.wanted:
                asked.append(t)
            movie.add([np.random.default_rng(t).random((16, 16))] if movie.wanted else None, 7 + t)
        numbers = [kept.number for kept in movie._kept]
    assert numbers == list(range(7, 207, 4)) and len(asked) < 130


@pytest.mark.parametrize("suffix", [".png", ".webp", ".mp4"])
@pytest.mark.parametrize(
    ("count", "gap"), [(25, 4), (41, 8), (41, 2), (473, 8), (500, 7), (9, 8), (6, 5), (61, 1)]
)
def test_a_short_movie_shows_more_than_key_frames(count, gap, suffix):
    """Those are as they were recorded: a strip of them would show nothing of the reconstruction."""
    frames = range(3, 3 + count)
    keys = set(frames[::gap])
    shown = frames_shown(Path(f"m{suffix}"), frames, keys)
    limit = {".png": 6, ".webp": 60, ".mp4": count}[suffix]
    assert shown == frames or (len(shown) <= limit and count > limit)
    assert len(shown) >= min(limit, count) * 0.5
    assert sum(t in keys for t in shown) <= len(keys) / count * len(shown) + 0.5
    assert shown[0] - frames[0] <= shown.step and frames[-1] - shown[-1] <= shown.step


# The command


def test_the_command_stores_what_made_the_result(tmp_path, movie, hpc_xvr, monkeypatch):
    """Key frames pass through: with --dtype original they are the camera's counts, to the bit."""
    monkeypatch.chdir(tmp_path)
    counts = np.random.default_rng(3).integers(0, 4096, (3, 16, 24)).astype(np.uint16)
    fast = np.repeat(counts, 4, 0)[:9].reshape(9, 4, 4, 6, 4).mean((2, 4)).astype(np.uint16)
    meta = {"axes": "TYX", "unit": "um"}
    for name, frames, size, interval in (("lr", fast, 8, 0.001), ("hr", counts, 2, 0.004)):
        tifffile.imwrite(
            f"{name}.tif", frames, imagej=True, resolution=(1 / size, 1 / size),
            metadata={**meta, "finterval": interval},
        )  # fmt: skip
    both = ["--lr", "lr.tif", "--hr", "hr.tif", "--lr-bit-depth", 12, "--hr-bit-depth", 12]
    hpc_xvr(
        "reconstruct", "nearest_hr", *both, "--out", "m.nxs", "--dtype", "original",
        "--movie", "m.webp", "--movie-shows", "result", "--device", "cpu",
    )  # fmt: skip
    said = json.loads((tmp_path / "m.nxs.json").read_text())
    assert said["command"].startswith("hpc-xvr reconstruct nearest_hr --lr lr.tif")
    assert said["method"]["name"] == "nearest_hr"
    assert [source["role"] for source in said["sources"]] == ["lr", "hr"]
    for source in said["sources"]:
        digest = hashlib.sha256((tmp_path / source["path"]).read_bytes()).hexdigest()
        assert source["sha256"] == digest
    assert said["settings"]["hr"] == {"bit_depth": 12} and said["settings"]["dtype"] == "original"
    assert said["extra"]["key_frames"] == [0, 4, 8]
    found = xvr.open_recording(tmp_path / "m.nxs")
    assert (found.bit_depth, found.frame_rate_hz, found.pixel_size_um) == (12, 1000, 2.0)
    frames = list(found.frames())
    for key, t in enumerate((0, 4, 8)):
        np.testing.assert_array_equal(frames[t], counts[key])
    with Image.open(tmp_path / "m.webp") as image:
        assert image.getexif()[0x010E] == said["command"]
    hpc_xvr("reconstruct", "nearest_hr", *both, "--out", "frames", "--dtype", "float32", code=2)


def test_checksums_of_sequences_pairs_and_files_that_go_away(tmp_path, movie, caplog):
    frames = write_sequence(tmp_path / "frames", iter(movie), 5)
    files = sorted(frames.glob("*.png"))
    (source,) = sources_of({"lr": frames, "lr dark": None})
    whole = b"".join(file.read_bytes() for file in files)
    assert (source["files"], source["bytes"]) == (5, len(whole))
    assert source["sha256"].result() == hashlib.sha256(whole).hexdigest()
    gone = Checksum([files[0], tmp_path / "gone.tif"])
    assert [gone.result(), gone.result()] == [None, None]
    assert caplog.text.count("gone.tif: its checksum is left out") == 1


def test_the_hash_of_weights_tells_them_apart():
    torch = pytest.importorskip("torch")
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    assert weights_sha256(one) == weights_sha256(other)
    with torch.no_grad():
        other.bias[1] += 1e-6
    assert weights_sha256(one) != weights_sha256(other)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    assert len(weights_sha256(one)) == 64
