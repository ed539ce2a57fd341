"""The sequence pipeline: who sees which frames, what comes out when, and what is written."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpc_xvr.config import Config, Data
from hpc_xvr.data.cameras import Recording
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.degrade import CameraNoise
from hpc_xvr.data.pairing.joining import Pairing, joined
from hpc_xvr.data.pairing.reading import CameraReading
from hpc_xvr.errors import InputError
from hpc_xvr.reconstruction import workflow, writers
from hpc_xvr.reconstruction.material import CameraFiles, from_recordings
from hpc_xvr.reconstruction.methods import NamedMethod
from hpc_xvr.reconstruction.pipeline import reconstruct, windows
from hpc_xvr.reconstruction.streams import recording_streams, streams_of_pair

SCALE = 4
MODEL = NamedMethod("model", "model", lambda sample: sample["hr"], config=Config())


def marked_clip(frames):
    """LR and HR frames whose grey value is their time: t / 1000."""
    values = np.arange(frames, dtype=np.float32) / 1000
    return (
        [np.full((2, 3), v, np.float32) for v in values],
        [np.full((8, 12), v, np.float32) for v in values],
    )


def keys_of(hr, gap):
    times = [*range(0, len(hr), gap)]
    if times[-1] != len(hr) - 1:
        times.append(len(hr) - 1)
    return {t: hr[t] for t in times}


class Oracle:
    """Returns the truth of each frame it is asked for, and notes what it was shown."""

    def __init__(self, hr, n_out):
        self.hr, self.n_out, self.seen = hr, n_out, []

    def __call__(self, sample):
        lr, hr, offset = sample["lr"], sample["hr"], sample["hr_offset"]
        assert lr.dtype == hr.dtype == offset.dtype == torch.float32
        index = np.rint(1000 * lr[0, :, 0, 0, 0].numpy()).astype(int)
        keys = np.rint(1000 * hr[0, :, 0, 0, 0].numpy()).astype(int)
        assert (lr == lr[..., :1, :1]).all()
        centre = keys[0] - int(offset[0, 0])
        assert centre == keys[1] - int(offset[0, 1])
        self.seen.append((centre, tuple(index), tuple(keys)))
        half = self.n_out // 2
        wanted = [min(max(t, 0), len(self.hr) - 1) for t in range(centre - half, centre + half + 1)]
        return torch.from_numpy(np.stack([self.hr[t] for t in wanted]))[None, :, None]


@settings(max_examples=150, deadline=None)
@given(
    frames=st.integers(2, 45),
    gap=st.integers(1, 25),
    n=st.sampled_from([1, 3, 5, 7]),
    sequence=st.booleans(),
)
def test_every_frame_comes_once_at_its_time_from_the_right_neighbours(frames, gap, n, sequence):
    lr, hr = marked_clip(frames)
    keys = keys_of(hr, gap)
    n_out = n if sequence else 1
    oracle = Oracle(hr, n_out)
    out = list(reconstruct(oracle, lr, keys, lr_frames=n, n_out=n_out))
    assert [t for t, _ in out] == list(range(frames))
    for t, frame in out:
        np.testing.assert_array_equal(frame, hr[t])
    for centre, index, (t0, t1) in oracle.seen:
        assert index == tuple(np.clip(range(centre - n // 2, centre + n // 2 + 1), 0, frames - 1))
        assert t0 < centre < t1
        times = list(keys)
        assert times.index(t1) == times.index(t0) + 1
    if n_out == 1:
        assert [c for c, _, _ in oracle.seen] == [t for t in range(frames) if t not in keys]
    else:
        between = np.diff(list(keys)) - 1
        assert len(oracle.seen) == sum(-(-count // n) for count in between)


def test_sequence_windows_lie_within_the_gap_and_share_it_out():
    plan = windows(20, 40, 5, 5)
    assert [w.centre for w in plan] == [23, 28, 33, 37]
    assert [list(w.keep) for w in plan] == [
        [21, 22, 23, 24, 25],
        [26, 27, 28, 29, 30],
        [31, 32, 33, 34, 35],
        [36, 37, 38, 39],
    ]


def test_reading_is_lazy_and_only_skips_windows():
    lr, hr = marked_clip(41)

    reads = []

    class Counted(list):
        def __getitem__(self, t):
            reads.append(t)
            return super().__getitem__(t)

    stream, oracle = Counted(lr), Oracle(hr, 1)
    run = reconstruct(oracle, stream, keys_of(hr, 20), lr_frames=3, n_out=1)
    assert [next(run)[0] for _ in range(4)] == [0, 1, 2, 3]
    assert reads.count(2) == 1 and max(reads) == 4
    some = list(
        reconstruct(
            oracle := Oracle(hr, 3), lr, keys_of(hr, 20), lr_frames=3, n_out=3, only={20, 22, 31}
        )
    )
    assert [t for t, _ in some] == [20, 22, 31]
    assert len(oracle.seen) == 2


def test_output_is_clipped_and_modes_do_not_leak():
    lr, hr = marked_clip(5)
    states = []

    def wild(sample):
        states.append(
            (
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
            )
        )
        return torch.linspace(-1, 2, 96).reshape(1, 1, 1, 8, 12)

    for precision in ("float32", "bf16"):
        for _, frame in reconstruct(
            wild, lr, keys_of(hr, 4), lr_frames=3, n_out=1, precision=precision
        ):
            assert frame.dtype == np.float32 and frame.min() >= 0 and frame.max() <= 1
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
    assert [s[:2] for s in states] == [(True, False)] * 3 + [(True, True)] * 3
    assert states[-1][2] == torch.bfloat16


def test_bad_methods_and_keys_are_named():
    lr, hr = marked_clip(5)
    keys = keys_of(hr, 4)

    def gives(value):
        return lambda sample: value

    with pytest.raises(ValueError, match=r"\(1, 1, 1, 4, 4\).*expected \(1, 1, 1, 8, 12\)"):
        list(reconstruct(gives(torch.zeros(1, 1, 1, 4, 4)), lr, keys, lr_frames=3, n_out=1))
    with pytest.raises(InputError, match=r"frame 1: .*not finite"):
        list(
            reconstruct(
                gives(torch.full((1, 1, 1, 8, 12), torch.nan)), lr, keys, lr_frames=3, n_out=1
            )
        )
    for bad in ({0: hr[0]}, {0: hr[0], 5: hr[4]}):
        with pytest.raises(InputError, match="at least two"):
            reconstruct(gives(None), lr, bad, lr_frames=3, n_out=1)


# Streams of a recording in a corpus


def info(**changes):
    return {
        "camera": "test",
        "frame_rate_hz": 1000.0,
        "pixel_size_um": 2.0,
        "exposure_s": None,
        "bit_depth": 12,
        "scene": "noise",
        "split": "test",
        "source": "simulated",
        **changes,
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(3)
    frames = rng.integers(0, 4096, (11, 16, 24), dtype=np.uint16)
    slow = rng.integers(0, 1024, (22, 4, 6), dtype=np.uint16)
    with CorpusWriter(tmp_path_factory.mktemp("corpus") / "c") as writer:
        plain = writer.add("plain", frames, frames.shape, frames.dtype, info())
        twin = writer.add(
            "twin",
            frames,
            frames.shape,
            frames.dtype,
            info(lr_times=[t / 2 - 0.1 for t in range(22)], lr_bit_depth=10),
            lr=slow,
        )
        odd = writer.add("odd", frames[:, :15], (11, 15, 24), frames.dtype, info())
        still = np.repeat(frames[:1], 3, axis=0)
        stills = [
            writer.add(name, still, still.shape, still.dtype, info())
            for name in ("still-a", "still-b")
        ]
    return SimpleNamespace(
        plain=plain,
        twin=twin,
        odd=odd,
        stills=stills,
        frames=frames / np.float32(4095),
        slow=slow / np.float32(1023),
    )


def test_binned_stream_and_keys(corpus):
    lr, keys = recording_streams(corpus.plain, 4, Data())
    assert list(keys) == [0, 4, 8, 10] and lr.shape == (11, 4, 6)
    np.testing.assert_allclose(keys[8], corpus.frames[8], atol=1e-6)
    block = corpus.frames[5, 4:8, 8:12].mean()
    assert lr[5].dtype == np.float32 and abs(lr[5][1, 2] - block) < 1e-5
    with pytest.raises(KeyError):
        keys[3]
    assert list(recording_streams(corpus.plain, 5, Data())[1]) == [0, 5, 10]


def test_noise_depends_on_seed_recording_and_frame_only(corpus):
    clean = recording_streams(corpus.plain, 4, Data())[0]
    noisy, _ = recording_streams(corpus.plain, 4, Data(), noise=CameraNoise(1e4), seed=5)
    backwards = [noisy[t] for t in reversed(range(11))][::-1]
    again = recording_streams(corpus.plain, 7, Data(), noise=CameraNoise(1e4), seed=5)[0]
    for t in range(11):
        np.testing.assert_array_equal(backwards[t], again[t])
        assert 0.5 < (noisy[t] - clean[t]).std() / np.sqrt(clean[t].mean() / 1e4) < 1.6
    # The same frame every time, so that only the noise can differ.
    a, b, other = (
        recording_streams(video, 4, Data(), noise=CameraNoise(1e4), seed=seed)[0]
        for video, seed in zip((*corpus.stills, corpus.stills[0]), (5, 5, 6), strict=True)
    )
    assert (a[0] != a[1]).any() and (a[0] != b[0]).any() and (a[0] != other[0]).any()


def test_recorded_stream_is_taken_at_the_nearest_time(corpus):
    data = Data(lr_source="recorded")
    lr, _ = recording_streams(corpus.twin, 4, data)
    for t in range(11):
        np.testing.assert_allclose(lr[t], corpus.slow[2 * t], atol=1e-6)
    with pytest.raises(InputError, match=r"plain.*binned"):
        recording_streams(corpus.plain, 4, data)
    with pytest.raises(InputError, match="noise"):
        recording_streams(corpus.twin, 4, data, noise=CameraNoise(100))
    with pytest.raises(InputError, match=r"twin: .*4x6, with data\.scale 2 .*8x12"):
        recording_streams(corpus.twin, 4, Data(lr_source="recorded", scale=2))


def test_frames_that_cannot_be_binned_are_refused(corpus):
    with pytest.raises(InputError, match=r"odd: 15x24.*12x24"):
        recording_streams(corpus.odd, 4, Data())


# Two camera files


def camera(name, frames, bit_depth):
    """A recording, and the list of frames at which it was opened."""
    opened = []

    def read(start, stop):
        opened.append(start)
        return iter(frames[start:stop])

    return Recording(Path(name), frames.shape, frames.dtype, bit_depth, read), opened


def streams(fast, sharp, pairing, scale=4, crop=False):
    return streams_of_pair(joined(sharp, fast, pairing, scale, crop), scale)


def test_streams_from_two_recordings(caplog):
    rng = np.random.default_rng(0)
    fast = rng.integers(0, 1024, (12, 4, 5), dtype=np.uint16)
    sharp = rng.integers(0, 256, (3, 16, 20), dtype=np.uint8)
    (of_fast, fast_opened), (of_sharp, sharp_opened) = (
        camera("fast", fast, 10),
        camera("sharp", sharp, 8),
    )
    caplog.set_level("INFO", "hpc_xvr")
    lr, keys = streams(of_fast, of_sharp, Pairing(5))
    assert list(keys) == [0, 5, 10] and len(lr) == 12
    assert not caplog.messages
    for k in range(3):
        np.testing.assert_allclose(keys[5 * k], sharp[k] / 255, atol=1e-6)
    for t in (7, 8, 11, 3, 0, 9):
        np.testing.assert_allclose(lr[t], fast[t] / 1023, atol=1e-6)
    assert lr[7].dtype == keys[0].dtype == np.float32
    for n_out in (1, 3):
        fast_opened.clear(), sharp_opened.clear()
        lr, keys = streams(of_fast, of_sharp, Pairing(5))
        out = list(
            reconstruct(
                lambda s, n=n_out: s["hr"][:, :1].expand(-1, n, -1, -1, -1),
                lr,
                keys,
                lr_frames=3,
                n_out=n_out,
            )
        )
        assert [t for t, _ in out] == list(range(11))
        assert len(fast_opened) == len(sharp_opened) == 1


@pytest.mark.parametrize(
    ("pairing", "crop", "times"),
    [
        (Pairing(5, start=-0.4), False, [2, 7, 12]),  # two fast frames before the first sharp one
        (Pairing(5, start=0.4), True, [3, 8, 13]),  # it begins after the first sharp frame
        (Pairing(3.5), False, [0, 4, 7]),  # the second sharp frame lies between two fast ones
    ],
)
def test_sharp_frames_are_keys_at_the_fast_frame_nearest_in_time(pairing, crop, times, caplog):
    fast = np.arange(15, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    sharp = np.arange(4 if crop else 3, dtype=np.uint8)[:, None, None] * np.ones((1, 16, 16), "u1")
    lr, keys = streams(camera("fast", fast, 8)[0], camera("sharp", sharp, 8)[0], pairing, 4, crop)
    assert list(keys) == times
    first = 1 if crop else 0
    assert [round(255 * float(keys[t][0, 0])) for t in times] == [first, first + 1, first + 2]
    assert round(255 * float(lr[9][0, 0])) == 9
    assert ("lies 0.50 fast frames beside" in caplog.text) == (pairing.gap == 3.5)


@pytest.mark.parametrize(
    ("fast", "sharp", "gap", "words"),
    [
        ((12, 4, 5), (3, 16, 24), 5, ["16x24", "4x5", "16x20", "--registration"]),
        ((12, 4, 5), (3, 18, 21), 5, ["rows 0 to 16 of 18", "columns 0 to 20 of 21", "--crop"]),
        ((12, 4, 5), (1, 16, 20), 5, ["1 frame", "at least 2"]),
        ((12, 4, 5), (4, 16, 20), 5, ["sharp frames 0 to 2 of 4", "at most 3.66"]),
        ((3, 4, 5), (9, 16, 20), 5, ["swapped"]),
        ((12, 4, 5), (15, 16, 20), 0.75, ["swapped", "below 1"]),
        ((12, 4, 5), (3, 16, 20), 0, ["gap 0"]),
    ],
)
def test_two_recordings_that_do_not_belong_together(fast, sharp, gap, words):
    with pytest.raises(InputError) as error:
        streams(
            camera("fast", np.zeros(fast, np.uint8), 8)[0],
            camera("sharp", np.zeros(sharp, np.uint8), 8)[0],
            Pairing(gap),
        )
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_the_gap_is_stated_or_that_of_the_rates_or_the_models_own(caplog):
    caplog.set_level("INFO", "hpc_xvr")
    still = np.arange(16, dtype="u1") * np.ones((3, 16, 1), "u1")
    small = np.repeat(still[:, :4, 1::4][:1], 41, 0)

    def gap_of(pairing, fast_rate, slow_rate):
        fast, sharp = (camera(n, small[:s], 8)[0] for n, s in (("f", 41), ("s", 3)))
        sharp = replace(sharp, shape=(3, 16, 16), source=lambda a, b: iter(still[a:b]))
        fast = replace(fast, frame_rate_hz=fast_rate)
        sharp = replace(sharp, frame_rate_hz=slow_rate)
        caplog.clear()
        material = from_recordings(MODEL, fast, sharp, pairing)
        return list(material.keys)[1], caplog.text

    gap, said = gap_of(Pairing(), 8e4, 1e4)
    assert gap == 8 and "every 8 fast ones, from the frame rates" in said
    gap, said = gap_of(Pairing(), None, 1e4)
    assert gap == 20 and "every 20 fast ones, as the model was trained" in said
    gap, said = gap_of(Pairing(5), 8e4, 1e4)
    assert (
        gap == 5 and "the gap is given as 5, but the frame rates (80000 and 10000 Hz) say 8" in said
    )


# Files


@pytest.fixture
def movie():
    return np.random.default_rng(1).random((5, 9, 13)).astype(np.float32)


CALIBRATION = writers.Calibration(frame_rate_hz=2000.0, pixel_size_um=2.5, full_scale=1.25)


def test_tiff_stack_round_trip(tmp_path, movie):
    path = writers.write_sequence(tmp_path / "m.tif", iter(movie), 5, CALIBRATION, first_frame=7)
    with tifffile.TiffFile(path) as file:
        assert file.is_imagej and file.series[0].axes == "TYX"
        found = file.series[0].asarray()
        metadata = file.imagej_metadata
        resolution = file.pages[0].tags["XResolution"].value
    assert found.dtype == np.uint16
    np.testing.assert_allclose(found / 65535, movie, atol=0.51 / 65535)
    assert metadata["frames"] == 5 and metadata["unit"] == "um" and metadata["fps"] == 2000
    assert metadata["Info"].startswith("first frame: 7\nvalue of 65535: 1.25\n{")
    assert resolution[0] / resolution[1] == pytest.approx(1 / 2.5)
    assert np.asarray(Image.open(path)).shape == (9, 13)
    assert [p.name for p in tmp_path.iterdir()] == ["m.tif"]


def test_stacks_beyond_the_classic_limit_are_bigtiff(tmp_path, movie, monkeypatch):
    monkeypatch.setattr(writers.tiff, "TIFF_LIMIT", 1000)
    path = writers.write_sequence(tmp_path / "m.tif", movie, 5, CALIBRATION)
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff and file.is_ome and file.series[0].axes == "TYX"
        np.testing.assert_allclose(file.asarray() / 65535, movie, atol=0.51 / 65535)


def test_hdf5_round_trip(tmp_path, movie):
    path = writers.write_sequence(tmp_path / "m.h5", iter(movie), 5, CALIBRATION, first_frame=7)
    with h5py.File(path) as file:
        data = file["exchange/data"]
        np.testing.assert_allclose(data[:] / 65535, movie, atol=0.51 / 65535)
        assert dict(data.attrs) == {
            "axes": "time:y:x",
            "description": "frames reconstructed from two cameras",
            "program": "hpc_xvr",
            "first_frame": 7,
            "full_scale": 1.25,
            "stored_full_scale": 65535,
            "frame_rate_hz": 2000.0,
            "pixel_size_um": 2.5,
        }
        assert file["implements"].asstr()[()].startswith("exchange:")


def failing(movie):
    yield from movie[:3]
    raise RuntimeError("camera unplugged")


@pytest.mark.parametrize("suffix", [".tif", ".h5", ".nxs"])
def test_nothing_half_written_stays(tmp_path, movie, suffix):
    path = tmp_path / f"m{suffix}"
    path.write_text("older result")
    with pytest.raises(RuntimeError, match="unplugged"):
        writers.write_sequence(path, failing(movie), 5)
    for frames, count, words in (
        (movie[:4], 5, "only 4 of the expected 5 frames"),
        (movie, 4, "more than the expected 4"),
        ([*movie[:4], movie[4, 1:]], 5, "frame 4 is"),
        ([], 5, "no frames"),
        ([*movie[:4], movie[4] * np.nan], 5, "frame 4 .*not finite"),
    ):
        with pytest.raises(InputError, match=words):
            writers.write_sequence(path, iter(frames), count)
    assert path.read_text() == "older result"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_bad_names_and_full_disks_are_refused_first(tmp_path, movie, monkeypatch):
    frames = iter(movie)
    with pytest.raises(InputError, match=r"\.avi.*\.tif, \.tiff, \.h5, \.hdf5"):
        writers.write_sequence(tmp_path / "m.avi", frames, 5)
    with pytest.raises(InputError, match=r"folder .*missing does not exist"):
        writers.write_sequence(tmp_path / "missing" / "m.tif", frames, 5)
    with pytest.raises(InputError, match=r"unknown movie format .*\.gif, \.webp or \.png"):
        writers.write_movie(tmp_path / "m.avi", [], 10, ["a"])
    with pytest.raises(InputError, match="missing does not exist"):
        writers.check_movie(tmp_path / "missing" / "m.gif")
    assert next(frames) is not None
    monkeypatch.setattr(
        writers.sequence.shutil, "disk_usage", lambda path: SimpleNamespace(free=10)
    )
    with pytest.raises(InputError, match=r"needs 0\.00 GB"):
        writers.write_sequence(tmp_path / "m.tif", movie, 5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("suffix", "frames", "expected"),
    [(".gif", 7, 7), (".webp", 7, 7), (".webp", 130, 33), (".png", 7, 1)],
)
def test_movie(tmp_path, suffix, frames, expected):
    ramp = np.linspace(0.1, 0.9, 40, dtype=np.float32)
    panels = [
        (np.full((10, 10), 0.4, np.float32), np.roll(np.tile(ramp, (40, 1)), t, axis=1))
        for t in range(frames)
    ]
    path = writers.write_movie(tmp_path / f"m{suffix}", iter(panels), 20, ["fast", "sharp"])
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == expected
        assert 40 < image.width <= 1000
        first = np.asarray(image.convert("L"))
        if expected > 1:
            assert image.info["loop"] == 0
            image.seek(expected - 1)
            assert (np.abs(np.asarray(image.convert("L"), int) - first) > 40).any()
    assert path.stat().st_size < 400_000


def test_wide_frames_are_stacked_and_scaled_down(tmp_path):
    picture = np.random.default_rng(0).random((200, 512), np.float32)
    panels = [(np.zeros((50, 128), np.float32), picture, 1 - picture)] * 2
    path = writers.write_movie(tmp_path / "m.gif", panels, 20, ["a", "b", "c"])
    with Image.open(path) as image:
        assert image.width == 716 and image.height > 3 * 275


def test_flat_and_dark_fields_of_a_camera_file(tmp_path):
    """Raw = dark + light x transmission; what comes out is the transmission, rows turned."""
    rng = np.random.default_rng(0)
    seen = rng.uniform(0.2, 1.2, (3, 6, 8))
    light, dark = rng.uniform(20000, 40000, (6, 8)), rng.uniform(500, 900, (6, 8))
    files = {"raw": dark + light * seen, "flat": np.stack([dark + light] * 2), "dark": dark[None]}
    for name, frames in files.items():
        whole = frames.round().astype(np.uint16)
        tifffile.imwrite(tmp_path / f"{name}.tif", whole, photometric="minisblack")
    raw, flat, shade = (tmp_path / f"{name}.tif" for name in files)
    recording = CameraReading(flat=flat, dark=shade, flip_rows=True).open(raw)
    found = recording.full_scale * np.stack([f / 65535 for f in recording.frames()])
    np.testing.assert_allclose(found, seen[:, ::-1], atol=2e-4)
    with pytest.raises(InputError, match="needs a flat field as well"):
        CameraReading(dark=shade).open(raw)


@pytest.mark.parametrize(("which", "flat"), [("lr", "sharp"), ("hr", "fast")])
def test_each_camera_gets_its_own_flat_field(tmp_path, which, flat):
    """The other camera's field has another shape: the file it was given for is named."""
    paths = {}
    for name, shape in (("fast", (3, 4, 4)), ("sharp", (2, 16, 16))):
        paths[name] = tmp_path / f"{name}.tif"
        tifffile.imwrite(paths[name], np.ones(shape, np.uint8), photometric="minisblack")
    files = {"lr": paths["fast"], "hr": paths["sharp"]}
    source = CameraFiles(
        **files, **{f"{which}_camera": CameraReading(flat=paths[flat])}, pairing=Pairing(2)
    )
    with pytest.raises(InputError, match=f"{files[which].name}: frames are"):
        workflow.reconstruct_run("bicubic", torch.device("cpu"), source, out=tmp_path / "o.tif")


@pytest.mark.parametrize("suffix", [".tif", ".h5"])
def test_a_flat_fielded_result_says_what_white_is(tmp_path, suffix):
    """65535 is a transmission of 1.5 (or of the stated full scale), and the result says so."""
    light = np.full((16, 16), 1000, np.uint16)
    for name, scale, frames in (("fast", 4, 5), ("sharp", 1, 2)):
        field = light[::scale, ::scale]
        seen = np.repeat(field[None] // 2, frames, 0)
        tifffile.imwrite(tmp_path / f"{name}.tif", seen, photometric="minisblack")
        tifffile.imwrite(tmp_path / f"{name}-flat.tif", field, photometric="minisblack")
    for full_scale in (None, 2.0):
        source = CameraFiles(
            tmp_path / "fast.tif",
            tmp_path / "sharp.tif",
            CameraReading(flat=tmp_path / "fast-flat.tif"),
            CameraReading(flat=tmp_path / "sharp-flat.tif", full_scale=full_scale),
            Pairing(4),
        )
        out = tmp_path / f"out{suffix}"
        workflow.reconstruct_run("bicubic", torch.device("cpu"), source, out=out)
        if suffix == ".tif":
            with tifffile.TiffFile(out) as file:
                said = float(
                    file.imagej_metadata["Info"].partition("value of 65535: ")[2].split()[0]
                )
                frames = file.asarray()
        else:
            with h5py.File(out) as file:
                said = file["exchange/data"].attrs["full_scale"]
                frames = file["exchange/data"][()]
        assert said == (full_scale or 1.5)
        np.testing.assert_allclose(frames[0] * said / 65535, 0.5, atol=1e-4)  # a key frame
        np.testing.assert_allclose((frames[2] * said / 65535).mean(), 0.5, atol=0.1)
