"""Phantom and Photron recordings that are odd but ordinary: read rightly, or said to be wrong.

The cases lie in shared/cases, each with the right answer in its expect.txt.
"""

from __future__ import annotations

import struct
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_xvr.data.cameras import open_camera_file
from hpc_xvr.data.cameras.packing import unpack
from hpc_xvr.data.corpus import Corpus
from support.camera_files import counts, refused, shimadzu_parts, stack, write_cine, write_photron


@pytest.fixture
def ingested(hpc_xvr, cases, tmp_path):
    """ingested("cine-various/plain.cine", "--bit-depth", 12) -> what the corpus then holds of the
    case, and what was said."""

    def run(case: str | Path, *options):
        path = case if isinstance(case, Path) else cases(case)
        corpus = tmp_path / f"corpus{len(list(tmp_path.iterdir()))}"
        said = hpc_xvr("ingest", path, "--corpus", corpus, *options).err
        (video,) = Corpus(corpus).videos
        return video, said

    return run


@pytest.fixture
def truth(cases):
    return np.load(cases("cine-various/truth.npy"))


def frames(video) -> np.ndarray:
    return np.stack([video.read(t) for t in range(video.shape[0])])


@pytest.mark.parametrize(
    "case, options, depth, rate, words",
    [
        ("cine-various/plain.cine", [], 12, 1e5, ""),
        ("cine-various/pretrigger.cine", [], 12, 1e5, ""),
        ("cine-various/every4th.cine", [], 12, 25e3, ""),
        ("cine-various/zero_times.cine", [], 12, 1e5, ""),
        ("cine-various/topdown.cine", [], 12, 1e5, ""),
        ("cine-various/old_software.cine", [], 12, 1e5, "old Phantom software (version 540)"),
        ("cine-various/dropped.cine", [], 12, 1e5, "time stamps jump after frame 2: 5"),
        ("cine-various/backwards.cine", [], 12, 1e5, "time stamps run backwards after frame 2"),
        ("cine-various/rate0.cine", [], 12, 1e5, "no frame rate; its time stamps say"),
        ("cine-various/rate0.cine", ["--frame-rate", "2e5"], 12, 2e5, ""),
        ("cine-various/realbpp0.cine", [], 16, 1e5, "how many bits are significant"),
        ("cine-various/realbpp0.cine", ["--bit-depth", "12"], 12, 1e5, ""),
        ("cine-various/realbpp10.cine", ["--bit-depth", "12"], 12, 1e5, "12 bit you state"),
        ("photron-various/plain.mraw", [], 12, 1e5, ""),
        ("photron-various/packed12.mraw", [], 12, 1e5, ""),
        ("photron-various/higher.cih", [], 12, 1e5, ""),
        ("photron-various/step10.mraw", [], 12, 1e4, ""),
        ("photron-various/sjis.cih", [], 12, 1e5, ""),
        ("photron-various/bom.cih", [], 12, 1e5, ""),
        ("photron-various/utf16.cih", [], 12, 1e5, ""),
        ("photron-various/x_sjis.cihx", [], 12, 1e5, ""),
        ("photron-various/x_utf8.cihx", [], 12, 1e5, ""),
        ("photron-various/x_utf16.cihx", [], 12, 1e5, ""),
        ("photron-various/external.mraw", [], 12, None, "frame rate is unknown"),
        ("photron-various/external.mraw", ["--frame-rate", "5000"], 12, 5000, ""),
        ("photron-various/external2.mraw", ["--frame-rate", "5000"], 12, 5000, ""),
        ("photron-various/longer.mraw", [], 12, 1e5, "7680 bytes, its header promises 5 frames"),
    ],
)
def test_films_that_are_read(ingested, truth, case, options, depth, rate, words):
    video, said = ingested(case, *options)
    np.testing.assert_array_equal(frames(video), truth)
    assert video.info.bit_depth == depth
    assert video.info.frame_rate_hz == (rate and pytest.approx(rate, rel=1e-4))
    assert words in said
    if not words and not options:
        added, following = said.splitlines()  # and no warning
        assert ": added as " in added and "next: " in following


def test_values_at_the_upper_end_are_read_with_all_bits(ingested, truth):
    video, _ = ingested("cine-various/shift4.cine", "--bit-depth", 16)
    np.testing.assert_array_equal(frames(video), truth * 16)
    assert video.info.bit_depth == 16


@pytest.mark.parametrize(
    "case, words",
    [
        ("cine-various/color.cine", ["24 bit", "monochrome"]),
        ("cine-various/realbpp10.cine", ["frame 1", "10 bits", "from 11 (--bit-depth)"]),
        ("cine-various/shift4.cine", ["frame 0", "12 bits", "state 16", "multiples of 32"]),
        ("photron-various/says12_is16.mraw", ["16 bit a pixel", "says12_is16.cih", "Color Bit 12"]),
        ("photron-various/colour.mraw", ["Color Type Color"]),
        ("photron-various/tenbit.mraw", ["Color Bit 10"]),
        ("photron-various/nocount.mraw", ["no frames"]),
    ],
)
def test_films_that_are_refused(hpc_xvr, cases, tmp_path, case, words):
    said = hpc_xvr("ingest", cases(case), "--corpus", tmp_path / "corpus", code=2).err
    assert said.count("\n") == 1
    for word in words:
        assert word in said


def test_packed_10_bit_codes_become_linear(ingested, cases):
    linear = np.repeat([64, 125, 290, 623, 998, 1872, 3159, 3947], 4)
    video, _ = ingested("cine-p10/p10.cine")
    np.testing.assert_array_equal(frames(video), np.broadcast_to(linear, (4, 16, 32)))
    assert video.info.bit_depth == 12 and "linear 12 bit" in video.info.metadata["encoding"]
    fields = [f"--{name}={cases(f'cine-p10/{name}.cine')}" for name in ("flat", "dark")]
    video, _ = ingested("cine-p10/p10.cine", *fields)
    light = frames(video)[0, 0, ::4] / 65535 * video.info.full_scale
    np.testing.assert_allclose(light, (linear[::4] - 64) / (3947 - 64), atol=3e-5)
    expected = [0, 0.0157, 0.0582, 0.144, 0.2405, 0.4656, 0.7971, 1]
    np.testing.assert_allclose(light, expected, atol=6e-5)


def test_all_codes_follow_the_published_table(realdata, tmp_path):
    table = np.loadtxt(realdata("../facts/phantom_p10_to_12bit.txt"), np.uint16)
    codes = np.arange(1024, dtype=np.uint16).reshape(1, 32, 32)
    path = _packed(tmp_path / "a.cine", codes)
    np.testing.assert_array_equal(stack(open_camera_file(path)), table[codes])
    refused(path, "12-bit values", bit_depth=10)


def _packed(path: Path, codes: np.ndarray) -> Path:
    """A cine of packed 10 bit, rows from top to bottom."""
    frames, height, width = codes.shape
    bits = codes.reshape(frames, -1, 1) >> np.arange(9, -1, -1, dtype=np.uint16) & 1
    data = np.packbits(bits.reshape(frames, -1).astype(np.uint8), axis=1)
    bare = write_cine(path, np.zeros((frames, height, width), np.uint16)).read_bytes()
    at = struct.unpack_from("<I", bare, 32)[0]
    head = bytearray(bare[: at + 8 * frames])
    struct.pack_into("<II", head, 44 + 16, 256, data.shape[1])
    for k in range(frames):
        struct.pack_into("<Q", head, at + 8 * k, len(head) + k * (8 + data.shape[1]))
    body = b"".join(struct.pack("<II", 8, data.shape[1]) + d.tobytes() for d in data)
    path.write_bytes(head + body)
    return path


@pytest.mark.parametrize("bits", [10, 12])
def test_unpacking(bits):
    values = counts(240, bits)
    packed = np.packbits((values[:, None] >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8))
    np.testing.assert_array_equal(unpack(packed, bits), values)


def test_time_stamps_are_the_times_of_the_frames(cases):
    recording = open_camera_file(cases("cine-dropped-frames/fast.cine"))
    expected = np.array([0, 10, 20, 70, 80, 90, 100, 110, 120]) * 1e-6
    assert recording.times_s.dtype == np.float64
    np.testing.assert_allclose(recording.times_s, expected, atol=1e-9)
    assert recording.frame_rate_hz == 1e5
    later = recording.cut(4, 4, first=2, last=4)
    np.testing.assert_allclose(later.times_s, [0, 50e-6, 60e-6], atol=1e-9)
    np.testing.assert_allclose(recording.flipped().times_s, expected, atol=1e-9)
    for name in ("zero_times", "backwards"):
        assert open_camera_file(cases(f"cine-various/{name}.cine")).times_s is None
    every4th = open_camera_file(cases("cine-various/every4th.cine"))
    np.testing.assert_allclose(every4th.times_s, np.arange(5) * 4e-5, atol=1e-9)


def test_a_real_film_whose_last_frame_is_not_of_it(ingested, realdata):
    """Its stamp is 292 days late and it was exposed a thousand times longer."""
    video, said = ingested(Path(realdata("pyidi_showcase/data_small_cine.cine")))
    assert "time stamps jump after frame 233: 2.52806e+07 s" in said
    assert "frame 234 was exposed for 0.065535 s" in said
    assert video.info.frame_rate_hz == 100


def _edited(path: Path, *edits: tuple[int, str, int]) -> Path:
    data = bytearray(path.read_bytes())
    for at, form, value in edits:
        struct.pack_into(form, data, at, value)
    path.write_bytes(data)
    return path


SETUP = 84
"""Offset of the setup in files of write_cine."""


def test_the_time_stamps_decide_on_the_frame_rate(hpc_xvr, tmp_path):
    path = write_cine(tmp_path / "a.cine", counts((5, 8, 8)), rate=1000)
    _edited(path, (SETUP + 768, "<I", 1300))
    said = hpc_xvr("ingest", path, "--corpus", tmp_path / "c").err
    assert "states 1300 frames a second, its time stamps 1000" in said
    assert open_camera_file(path).frame_rate_hz == pytest.approx(1000)


def test_what_a_cine_says_of_time_and_size(tmp_path):
    path = write_cine(tmp_path / "a.cine", counts((3, 8, 8)), rate=1000)
    trigger = 2**62 + 2**31  # half a second after the first frame
    _edited(path, (36, "<Q", trigger), (24 - 8, "<i", -500))
    recording = open_camera_file(path)
    assert recording.exposure_s == pytest.approx(1e-6, rel=1e-4)
    about = recording.metadata
    assert about["first_frame_after_trigger_s"] == -0.5 and about["first_image"] == -500
    assert about["trigger_time"].startswith("2004-01-10T13:37:04.5")
    assert about["sensor_pixel_um"] == 20


def test_cine_whose_time_stamps_are_gone(hpc_xvr, tmp_path):
    values = counts((3, 8, 8))
    path = write_cine(tmp_path / "a.cine", values)
    at = SETUP + struct.unpack_from("<H", path.read_bytes(), SETUP + 142)[0]
    _edited(path, (at + 4, "<H", 999))
    said = hpc_xvr("ingest", path, "--corpus", tmp_path / "c").err
    assert "time stamps are missing or damaged" in said and "equally spaced" in said
    recording = open_camera_file(path)
    assert recording.times_s is None and recording.frame_rate_hz == 1000
    np.testing.assert_array_equal(stack(recording), values)
    _edited(path, (at + 4, "<H", 1002), (at, "<I", 8 + 8 * 2))
    refused(path, "2 time stamps for 3 frames")


def test_frames_that_share_bytes_are_refused(tmp_path):
    path = write_cine(tmp_path / "a.cine", counts((4, 8, 8)))
    at = struct.unpack_from("<I", path.read_bytes(), 32)[0]
    second = struct.unpack_from("<Q", path.read_bytes(), at + 8)[0]
    refused(_edited(path, (at + 24, "<Q", second)), "frames 1 and 3 share bytes")


def test_an_unreadable_frame_in_the_middle_is_named(tmp_path):
    path = write_cine(tmp_path / "a.cine", counts((4, 8, 8)))
    at = struct.unpack_from("<I", path.read_bytes(), 32)[0]
    third = struct.unpack_from("<Q", path.read_bytes(), at + 16)[0]
    refused(_edited(path, (third, "<I", 3)), "frame 2 has a damaged header")
    refused(_edited(path, (third, "<II"[:2], 8), (third + 4, "<I", 100)), "frame 2 states 100")


def test_cine_with_more_frames_than_its_header_says(hpc_xvr, tmp_path):
    values = counts((5, 8, 8))
    path = write_cine(tmp_path / "a.cine", values)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(2 * (8 + 2 * 8 * 8)))
    said = hpc_xvr("ingest", path, "--corpus", tmp_path / "c").err
    assert "enough for 2 more frames" in said
    np.testing.assert_array_equal(stack(open_camera_file(path)), values)


def test_cine_whose_two_headers_disagree_about_the_size(hpc_xvr, tmp_path):
    path = write_cine(tmp_path / "a.cine", counts((2, 8, 16)))
    _edited(path, (SETUP + 737, "<H", 8), (SETUP + 739, "<H", 16))
    said = hpc_xvr("ingest", path, "--corpus", tmp_path / "c").err
    assert "8 x 16 pixels, its camera setup 16 x 8" in said


@pytest.mark.parametrize("bits, more, words", [(8, 2, "16 bit"), (16, 0.75, "12 bit")])
def test_mraw_just_as_large_as_with_other_bits(tmp_path, bits, more, words):
    path = write_photron(tmp_path, counts((4, 8, 8), 8), bits)
    data = path.with_suffix(".mraw").read_bytes() * 2
    path.with_suffix(".mraw").write_bytes(data[: int(more * len(data) / 2)])
    refused(path, words, f"Color Bit {bits}", "correct")


def test_bit_depth_that_is_stated_for_photron(tmp_path):
    values = counts((3, 8, 8), 14)
    path = write_photron(tmp_path, values, 16, **{"EffectiveBit Depth": "none"})
    refused(path, "EffectiveBit Depth is none")
    recording = open_camera_file(path, bit_depth=14)
    assert recording.bit_depth == 14
    np.testing.assert_array_equal(stack(recording), values)
    # Where values lie is the header's business: a flat field is read without a stated depth.
    values = counts((3, 8, 8), 12)
    path = write_photron(tmp_path, values << 4, 16, **{"EffectiveBit Side": "Higher"})
    np.testing.assert_array_equal(stack(open_camera_file(path, bit_depth=14)), values)


def test_headers_in_utf_16_without_a_byte_order_mark(tmp_path):
    values = counts((2, 8, 8))
    path = write_photron(tmp_path, values, 16, **{"Comment Text": "µ"})
    text = path.read_text()
    for encoding in ("utf-16-le", "utf-16-be"):
        path.write_bytes(text.encode(encoding))
        recording = open_camera_file(path)
        assert recording.metadata["Comment Text"] == "µ"
        np.testing.assert_array_equal(stack(recording), values)


def test_shimadzu_bits(hpc_xvr, tmp_path):
    values = counts((2, 250, 400), 10)
    path = tmp_path / "a.dat"
    parts = shimadzu_parts(values)
    path.write_bytes(b"".join(parts))
    assert open_camera_file(path, bit_depth=10).bit_depth == 10
    refused(path, "10 bit", bit_depth=12)
    begin = path.read_bytes().index(parts[6]) + 14
    data = bytearray(path.read_bytes())
    data[begin + 200_000] |= 1  # first pixel of frame 1
    path.write_bytes(data)
    said = hpc_xvr("ingest", path, "--corpus", tmp_path / "c", "--crop").err
    assert "frame 1 has values in the lower 6 of 16 bits" in said


def test_datasets_of_flat_and_dark_fields(hpc_xvr, tmp_path):
    path = write_photron(tmp_path, np.full((2, 8, 8), 600, np.uint16), 16)
    with h5py.File(tmp_path / "fields.h5", "w") as file:
        file["a/flat"] = np.full((3, 8, 8), 1100, np.uint16)
        file["a/dark"] = np.full((3, 8, 8), 100, np.uint16)
    fields = tmp_path / "fields.h5"
    named = ["--flat-dataset", "/a/flat", "--dark-dataset", "/a/dark"]
    hpc_xvr("ingest", path, "--corpus", tmp_path / "c", "--flat", fields, "--dark", fields, *named)
    (video,) = Corpus(tmp_path / "c").videos
    np.testing.assert_allclose(frames(video) / 65535 * video.info.full_scale, 0.5, atol=3e-5)
    assert video.info.metadata["reading"]["flat"] == f"{fields}::/a/flat"
    for given in ([], ["--flat", f"{fields}::/a/flat"]):
        said = hpc_xvr("ingest", path, "--corpus", tmp_path / "c", *given, *named[:2], code=2).err
        assert "--flat-dataset /a/flat is given" in said


def test_lower_bits_that_the_header_denies_are_told(tmp_path, caplog):
    frames = counts((2, 6, 8))
    path = write_photron(tmp_path, frames << 4, 16, **{"EffectiveBit Side": "Higher"})
    np.testing.assert_array_equal(stack(open_camera_file(path)), frames)
    assert not caplog.text
    path = write_photron(tmp_path, frames << 3, 16, **{"EffectiveBit Side": "Higher"})
    np.testing.assert_array_equal(stack(open_camera_file(path)), frames >> 1)
    assert "values in the lower 4 of 16 bits" in caplog.text
