"""The corpus on disk: what is written comes back, and nothing that goes wrong is silent."""

import hashlib
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
import weakref
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_xvr.data.corpus import Corpus, DamagedVideo
from hpc_xvr.data.corpus import reader as corpus_module
from hpc_xvr.data.corpus.writer import CorpusWriter, write_clip
from hpc_xvr.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
INFO = {
    "camera": "SA-Z",
    "frame_rate_hz": 5e4,
    "pixel_size_um": 2.0,
    "bit_depth": 12,
    "scene": "keyhole",
    "split": "train",
    "source": "a.mraw",
    "metadata": {"lens": "10x"},
}
stores = pytest.mark.parametrize("store", ["zarr", "hdf5"])


def clip(seed=0, shape=(5, 140, 200), bits=12):
    return (
        np.random.default_rng(seed)
        .integers(0, 2**bits, shape)
        .astype(np.uint8 if bits <= 8 else np.uint16)
    )


def make(path, store, videos=3):
    with CorpusWriter(path, store) as writer:
        for i in range(videos):
            frames = clip(i)
            writer.add(f"v{i}", iter(frames), frames.shape, frames.dtype, INFO)
    return Corpus(path)


def python(code, *args):
    """A child Python that runs `code` with this project's modules."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def frames_file(video):
    return video.path if video.path.is_file() else video.path / "frames/c/0/0/0"


def left_over(path):
    return [p.name for p in path.iterdir() if p.name.startswith(".")]


@stores
def test_everything_comes_back(tmp_path, store):
    frames, lr = clip(1), clip(2, (9, 35, 50), bits=10)
    info = {
        **INFO,
        "lr_times": [0.5 * i for i in range(9)],
        "lr_bit_depth": 10,
        "full_scale": 1.2,
        "split": "test",
    }
    with CorpusWriter(tmp_path / "c", store) as writer:
        writer.add("b", iter(frames), frames.shape, frames.dtype, info, lr=lr)
        small = clip(3, (2, 9, 7), bits=8)
        written = writer.add("a", small, small.shape, "uint8", {**INFO, "bit_depth": 8})
        assert (written.read(1) == small[1]).all()
    opened = Corpus(tmp_path / "c")
    assert [v.id for v in opened.videos] == ["a", "b"]
    assert [v.id for v in opened.split("test")] == ["b"]
    video = opened["b"]
    assert (video.shape, video.dtype, video.lr_shape) == (frames.shape, np.uint16, lr.shape)
    digest = hashlib.sha256(frames.astype("<u2").tobytes() + lr.astype("<u2").tobytes())
    not_told = {"exposure_s": None, "registration": None, "sha256": digest.hexdigest()}
    assert video.info.model_dump() == {**info, **not_told}
    assert (video.read(4) == frames[4]).all()
    y, x = slice(31, 140), slice(101, 197)
    assert (video.read(2, y, x) == frames[2, y, x]).all()
    assert (video.read([4, 0, 4], y, x) == frames[[4, 0, 4], y, x]).all()
    assert (video.read_lr([8, 1], slice(3, 30), slice(2, 9)) == lr[[8, 1], 3:30, 2:9]).all()
    intensity = video.intensity([0, 3], y, x)
    assert intensity.dtype == np.float32
    np.testing.assert_allclose(intensity, frames[[0, 3], y, x] / 4095, rtol=1e-6)
    np.testing.assert_allclose(video.lr_intensity(5), lr[5] / 1023, rtol=1e-6)
    with pytest.raises(IndexError):
        video.read(5)
    with pytest.raises(InputError, match="no recorded"):
        opened["a"].read_lr(0)
    with pytest.raises(InputError, match="no video q; there are 2: a, b"):
        opened["q"]
    assert list(opened.verify()) == [("a", None), ("b", None)]
    assert left_over(tmp_path / "c") == []


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 128, 129), (2, 257, 3), (2, 100, 400)])
def test_any_program_opens_it(tmp_path, shape):
    frames = clip(4, shape)
    for store in ("zarr", "hdf5"):
        with CorpusWriter(tmp_path / store, store) as writer:
            writer.add("v", frames, frames.shape, frames.dtype, INFO)
    zarr = pytest.importorskip("zarr", reason="zarr-python 3 needs Python 3.11")
    group = zarr.open(tmp_path / "zarr", mode="r")
    assert (group["videos/v/frames"][:] == frames).all()
    assert group["videos/v"].attrs["camera"] == "SA-Z"
    array = group["videos/v/frames"]
    assert array.shards[0] == shape[0]  # one file for the clip
    assert array.chunks[0] == 1 and max(array.chunks[1:]) <= 128
    with h5py.File(tmp_path / "hdf5/corpus.h5") as file:
        assert (file["videos/v/frames"][:] == frames).all()
        assert file["videos/v"].attrs["camera"] == "SA-Z"
        assert max(file["videos/v/frames"].chunks) <= 128
    for store in ("zarr", "hdf5"):
        assert (Corpus(tmp_path / store)["v"].read(range(shape[0])) == frames).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_array_is_described_as_zarr_python_would_describe_it(tmp_path, dtype):
    zarr = pytest.importorskip("zarr", reason="zarr-python 3 needs Python 3.11")
    frames = (clip(4, (3, 128, 129)) % 256).astype(dtype)
    with CorpusWriter(tmp_path / "c", "zarr") as writer:
        writer.add("v", frames, frames.shape, frames.dtype, {**INFO, "bit_depth": 8})
    ours = json.loads((tmp_path / "c/videos/v/frames/zarr.json").read_text())
    (sharding,) = ours["codecs"]
    zarr.create_array(
        store=str(tmp_path / "theirs"),
        shape=frames.shape,
        dtype=dtype,
        fill_value=0,
        chunks=sharding["configuration"]["chunk_shape"],
        shards=ours["chunk_grid"]["configuration"]["chunk_shape"],
        filters=None,
        compressors=zarr.codecs.Crc32cCodec(),
    )
    assert ours == json.loads((tmp_path / "theirs/zarr.json").read_text())


@pytest.fixture(scope="module", params=["zarr", "hdf5"])
def pair(request, tmp_path_factory):
    """A video with a second stream of another type, and what is in it."""
    frames, lr = clip(1), clip(2, (9, 35, 50), bits=8)
    info = {**INFO, "lr_times": [0.5 * i for i in range(9)], "lr_bit_depth": 8}
    path = tmp_path_factory.mktemp("pair") / "c"
    with CorpusWriter(path, request.param) as writer:
        writer.add("run12", frames, frames.shape, frames.dtype, info, lr=lr)
        writer.add("alone", frames, frames.shape, frames.dtype, INFO)
    return Corpus(path), frames, lr


def test_frames_are_an_array_that_is_read_where_it_is_indexed(pair):
    corpus, *stored = pair
    video = corpus["run12"]
    for frames, expected in zip((video.frames, video.lr), stored, strict=True):
        assert (frames.shape, frames.dtype, frames.ndim) == (expected.shape, expected.dtype, 3)
        assert len(frames) == len(expected)
        for key in [
            3,
            -1,
            np.int64(2),
            slice(1, 3),
            slice(None, None, -2),
            slice(3, 1),
            slice(1, 99),
            [4, 0, 4],
            np.array([1, -2]),
            [],
            (3, slice(10, 30), slice(20, 40)),
            (slice(1, 4), slice(-20, None), 7),
            (slice(None), -3),
            (-2, 4, 5),
            (2, slice(30, 5, -7), slice(None, None, 3)),
            (slice(4, None, -3), slice(None, None, -1), slice(40, 2, -1)),
            ([3, 1], slice(2, 9, 2), -1),
            (1, slice(5, 5)),
            ...,
            (..., slice(3, 9)),
            (2, ..., 5),
            (1, 2, 3, ...),
        ]:
            found = frames[key]
            assert found.dtype == expected.dtype and found.shape == expected[key].shape, key
            np.testing.assert_array_equal(found, expected[key], err_msg=str(key))
        np.testing.assert_array_equal(np.asarray(frames), expected)
        assert np.asarray(frames, np.float32).dtype == np.float32
        assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in expected]
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(frames))[1], expected[1])
        for key in (len(expected), -len(expected) - 1, [0, 99], (0, 200), (0, 0, -201)):
            with pytest.raises(IndexError, match="is outside of"):
                frames[key]
        for key in ((0, 0, 0, 0), (..., 0, ...)):
            with pytest.raises(IndexError):
                frames[key]
        for key in ("a", 1.5, (0, [1, 2]), None):
            with pytest.raises(TypeError):
                frames[key]
    assert corpus["alone"].lr is None
    assert repr(video.frames) == "<Frames (5, 140, 200) of video run12>"


def test_frames_read_no_more_than_is_asked_for(pair, monkeypatch):
    """No frame but those that are indexed, none for shape and type."""
    corpus, frames, _ = pair
    video, read = corpus["run12"], []
    array = type(video._arrays.get(video._manifest, "run12", "frames"))
    original = array.read

    def noted(self, t, y, x):
        read.append((list(t), (y.start, y.stop), (x.start, x.stop)))
        return original(self, t, y, x)

    monkeypatch.setattr(array, "read", noted)
    assert video.frames.shape == frames.shape and video.frames.dtype == frames.dtype
    assert video.frames[3:1].shape == (0, 140, 200) and not read
    video.frames[4:1:-2, 10:50:3, 20]
    assert read == [([4, 2], (10, 50), (20, 21))]


def test_damaged_frames_and_crops_with_steps_raise(tmp_path):
    make(tmp_path / "c", "zarr", 1)
    with pytest.raises(IndexError, match=r"steps; index video\.frames"):
        Corpus(tmp_path / "c")["v0"].read(0, slice(None, None, 2))
    (tmp_path / "c/videos/v0/frames/c/0/0/0").unlink()
    with pytest.raises(DamagedVideo, match="video v0"):
        Corpus(tmp_path / "c")["v0"].frames[0]


def test_the_nearest_low_resolution_frame(tmp_path):
    chance = np.random.default_rng(4)
    for number, times in enumerate([[2.5], [0.0, 1, 2], [-3.25, 0.5, 1.5, 1.75, 40]]):
        frames, lr = clip(0, (6, 8, 8)), clip(0, (len(times), 2, 2))
        with CorpusWriter(tmp_path / f"{number}") as writer:
            info = {**INFO, "lr_times": times}
            video = writer.add("v", frames, frames.shape, frames.dtype, info, lr=lr)
        wanted = chance.permutation(np.arange(6)).tolist()  # 1 lies midway between 0.5 and 1.5
        distances = np.abs(np.array(times) - np.array(wanted)[:, None])
        assert video.nearest_lr(wanted) == distances.argmin(axis=1).tolist()
        video.require_lr(scale=4)
        with pytest.raises(InputError, match=r"are 2x2, with data\.scale 2 they must be 4x4"):
            video.require_lr(scale=2)


@stores
def test_a_clip_is_never_held_whole(tmp_path, store):
    alive, most = weakref.WeakSet(), 0

    class Frame(np.ndarray):
        __hash__ = object.__hash__

    def frames():
        nonlocal most
        for _ in range(30):
            frame = np.ones((16, 16), np.uint16).view(Frame)
            alive.add(frame)
            most = max(most, len(alive))
            yield frame
            del frame

    with CorpusWriter(tmp_path / "c", store) as writer:
        writer.add("v", frames(), (30, 16, 16), "uint16", INFO)
    assert most <= 3


@stores
def test_appending_keeps_what_is_there(tmp_path, store):
    make(tmp_path / "c", store, 2)
    more = clip(9)
    with CorpusWriter(tmp_path / "c", store) as writer:
        with pytest.raises(InputError, match="video v0: is there already"):
            writer.add("v0", more, more.shape, more.dtype, INFO)
        writer.add("w", more, more.shape, more.dtype, INFO)
    opened = Corpus(tmp_path / "c")
    assert [v.id for v in opened.videos] == ["v0", "v1", "w"]
    assert [problem for _, problem in opened.verify()] == [None] * 3
    other = "hdf5" if store == "zarr" else "zarr"
    with pytest.raises(InputError, match=f"is stored as {store}, not {other}"):
        CorpusWriter(tmp_path / "c", other)


def bad_inputs():
    good = clip(0, (4, 10, 12))
    nan = good.astype(float)
    nan[0, 1, 1] = np.nan
    large = good.copy()
    large[3, 0, 0] = 4096
    wrong = [*good[:2], good[2, :, :5], good[3]]
    broken = (f for f in (good[0], good[1]))
    lr = np.zeros((2, 5, 6), np.uint16)
    a, c = (4, 10, 12), "uint16"
    return {
        "frames 2 is \\(10, 5\\)": ("v", wrong, a, c, INFO, None),
        "frames 0 has NaN": ("v", nan, a, c, INFO, None),
        "frames 0 is float64": ("v", good / 4095, a, c, INFO, None),
        "frames 3 holds values .*4096": ("v", large, a, c, INFO, None),
        "2 frames came, 4 were": ("v", broken, a, c, INFO, None),
        "more frames than the 3": ("v", good, (3, 10, 12), c, INFO, None),
        "frames are float32": ("v", good, a, "float32", INFO, None),
        "an id is made of": ("../v", good, a, c, INFO, None),
        "an id is made": (".v", good, a, c, INFO, None),
        "split: Input should be 'train'": ("v", good, a, c, {**INFO, "split": "x"}, None),
        "lens: Extra inputs": ("v", good, a, c, {**INFO, "lens": 1}, None),
        "scene: Field required": (
            "v",
            good,
            a,
            c,
            {k: v for k, v in INFO.items() if k != "scene"},
            None,
        ),
        "bit_depth 12 does not fit uint8": ("v", good, a, "uint8", INFO, None),
        "not \\(frames, height, width\\)": ("v", good, (4, 10), c, INFO, None),
        "shape \\(5, 6\\) is not": ("v", good, a, c, {**INFO, "lr_times": [0.0] * 5}, lr[0]),
        "2 low-resolution frames, but 0 lr_times": ("v", good, a, c, INFO, lr),
    }


@stores
@pytest.mark.parametrize("message", bad_inputs())
def test_bad_recordings_are_refused_and_leave_nothing(tmp_path, store, message):
    id, frames, shape, dtype, info, lr = bad_inputs()[message]
    with CorpusWriter(tmp_path / "c", store) as writer:
        with pytest.raises(InputError, match=message) as caught:
            writer.add(id, frames, shape, dtype, info, lr=lr)
        assert "\n" not in str(caught.value)
        assert list((tmp_path / "c/.incoming").iterdir()) == []
        good = clip(0, (4, 10, 12))
        writer.add("good", good, good.shape, good.dtype, INFO)
    assert [v.id for v in Corpus(tmp_path / "c").videos] == ["good"]


def test_a_source_that_fails_is_not_blamed_on_the_corpus(tmp_path):
    def frames():
        yield np.zeros((10, 12), np.uint16)
        raise OSError(5, "Input/output error", "camera.mraw")

    with (
        CorpusWriter(tmp_path / "c") as writer,
        pytest.raises(InputError, match=r"frames cannot be read from their source.*camera.mraw"),
    ):
        writer.add("v", frames(), (4, 10, 12), "uint16", INFO)
    assert not (tmp_path / "c").exists()  # a corpus that got nothing is taken away again


ADD_FOREVER = """
    import sys, numpy as np
    from hpc_xvr.data.corpus.writer import CorpusWriter
    rng = np.random.default_rng(0)
    with CorpusWriter(sys.argv[1], sys.argv[2]) as writer:
        frames = rng.integers(0, 4096, (40, 64, 64)).astype("u2")
        start = int(sys.argv[3])
        info = dict(camera="c", bit_depth=12, scene="s", split="train", source="x")
        writer.add(f"v{start:05}", frames, frames.shape, "u2", info)
        print("adding", flush=True)
        for i in range(start + 1, start + 10000):
            writer.add(f"v{i:05}", frames, frames.shape, "u2", info)
"""


@pytest.mark.slow
@stores
def test_kill_at_any_moment_keeps_finished_videos(tmp_path, store):
    chance, count = random.Random(1), 0
    for _ in range(4):
        child = python(ADD_FOREVER, tmp_path / "c", store, count)
        assert child.stdout.readline() == "adding\n", child.stderr.read()
        time.sleep(chance.uniform(0, 0.25))
        child.kill()
        child.communicate()
        opened = Corpus(tmp_path / "c")
        ids = [v.id for v in opened.videos]
        assert ids == [f"v{i:05}" for i in range(len(ids))]  # none lost in between
        assert len(ids) > count
        assert all(problem is None for _, problem in opened.verify())
        count = len(ids)
    CorpusWriter(tmp_path / "c", store).close()
    lines = [json.loads(line)["id"] for line in (tmp_path / "c/manifest.jsonl").open()]
    assert sorted(lines) == ids
    assert left_over(tmp_path / "c") == []
    if store == "hdf5":
        with h5py.File(tmp_path / "c/corpus.h5") as file:
            assert sorted(file["videos"]) == ids
            assert file[f"videos/{ids[-1]}/frames"].shape == (40, 64, 64)


@stores
def test_the_split_is_decided_at_the_commit(tmp_path, store):
    """As if it had been known before: in the manifest, in the clip and for its checksums."""
    frames, lr = clip(1), clip(2, (2, 35, 50), bits=10)
    info = {**INFO, "lr_times": [0.0, 1.0]}
    open_info = {key: value for key, value in info.items() if key != "split"}
    described = frames.shape, frames.dtype
    with CorpusWriter(tmp_path / "known", store) as writer:
        writer.add("v", frames, *described, info, lr=lr)
    with CorpusWriter(tmp_path / "c", store) as writer:
        entry = write_clip(tmp_path / "c", store, "w", frames, *described, open_info, lr=lr)
        assert not Corpus(tmp_path / "c").videos
        with pytest.raises(ValueError, match="split"):
            writer.commit(entry)
        video = writer.commit(entry, id="v", split="train")
        assert (video.id, video.split) == ("v", "train")
        with pytest.raises(InputError, match=r"video x: split: one of train, validation, test"):
            writer.add("x", frames, *described, open_info, lr=lr)
        other = write_clip(tmp_path / "c", store, "x", frames, *described, info, lr=lr)
        with pytest.raises(ValueError, match="once"):
            writer.commit(other, split="test")
        writer.discard(other)
    opened, known = Corpus(tmp_path / "c"), Corpus(tmp_path / "known")
    assert [video.info for video in opened.videos] == [video.info for video in known.videos]
    assert list(opened.verify()) == [("v", None)]
    (tmp_path / "c/manifest.jsonl").unlink()  # what the clip itself says
    assert Corpus(tmp_path / "c")["v"].info == known["v"].info
    if store == "zarr":
        stored = json.loads((tmp_path / "c/videos/v/zarr.json").read_text())
        assert stored["attributes"]["split"] == "train"
        attributes = [path / "videos/v/zarr.json" for path in (tmp_path / "c", tmp_path / "known")]
        assert attributes[0].read_bytes() == attributes[1].read_bytes()
    else:
        with h5py.File(tmp_path / "c/corpus.h5") as file:
            assert file["videos/v"].attrs["split"] == "train"
            assert (file["videos/v/frames"][:] == frames).all()


COMMIT_ON_A_FULL_DISK = """
    import resource, sys, numpy as np
    from hpc_xvr.data.corpus import Corpus
    from hpc_xvr.data.corpus.writer import CorpusWriter, write_clip
    from hpc_xvr.errors import InputError
    info = dict(camera="c", bit_depth=12, scene="s", source="x")
    frames = np.ones((2, 64, 64), "u2")
    path, store = sys.argv[1:]
    with CorpusWriter(path, store) as writer:
        first, second = (write_clip(path, store, id, frames, frames.shape, "u2", info)
                         for id in ("first", "second"))
        writer.commit(first, split="train")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            writer.commit(second, split="test")
        except InputError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    print([(v, p) for v, p in Corpus(path).verify()])
"""


@stores
def test_a_commit_that_the_disk_refuses_adds_nothing(tmp_path, store):
    child = python(COMMIT_ON_A_FULL_DISK, tmp_path / "c", store)
    out, err = child.communicate()
    message, after = out.splitlines()
    assert "File too large" in message and "GB are free" in message, err
    assert after == "[('first', None)]" and child.returncode == 0
    assert left_over(tmp_path / "c") == []


@stores
def test_manifest_is_rebuilt_from_the_videos(tmp_path, store):
    expected = [v.info for v in make(tmp_path / "c", store).videos]
    manifest = tmp_path / "c/manifest.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    for damaged in ("", "".join(lines[:2]), "".join(lines)[:-20], "{}\n" + lines[0], "\0\0\n"):
        manifest.write_text(damaged)
        assert [v.info for v in Corpus(tmp_path / "c").videos] == expected
        assert manifest.read_text() == damaged  # reading changes nothing
        CorpusWriter(tmp_path / "c", store).close()
        assert sorted(manifest.read_text().splitlines(keepends=True)) == sorted(lines)


def test_a_removed_video_is_gone(tmp_path):
    video = make(tmp_path / "c", "hdf5")["v1"]
    video.path.unlink()
    assert [v.id for v in Corpus(tmp_path / "c").videos] == ["v0", "v2"]
    CorpusWriter(tmp_path / "c", "hdf5").close()
    with h5py.File(tmp_path / "c/corpus.h5") as file:
        assert sorted(file["videos"]) == ["v0", "v2"]


FILL_THE_DISK = """
    import resource, sys, numpy as np
    from hpc_xvr.data.corpus import Corpus
    from hpc_xvr.data.corpus.writer import CorpusWriter
    from hpc_xvr.errors import InputError
    info = dict(camera="c", bit_depth=12, scene="s", split="train", source="x")
    small, big = np.ones((2, 64, 64), "u2"), np.ones((40, 256, 256), "u2")
    with CorpusWriter(sys.argv[1], sys.argv[2]) as writer:
        writer.add("small", small, small.shape, "u2", info)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            writer.add("big", big, big.shape, "u2", info)
        except InputError as error:
            print(error)
        writer.add("next", small, small.shape, "u2", info)
    print([(v, p) for v, p in Corpus(sys.argv[1]).verify()])
"""


@stores
def test_a_disk_that_takes_no_more_is_an_input_error(tmp_path, store):
    child = python(FILL_THE_DISK, tmp_path / "c", store)
    out, err = child.communicate()
    message, after = out.splitlines()
    assert "File too large" in message and "GB are free" in message, err
    assert after == "[('next', None), ('small', None)]"
    assert left_over(tmp_path / "c") == [] and child.returncode == 0
    assert not list((tmp_path / "c").rglob("*big*"))


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"Not a directory.*GB are free"):
        CorpusWriter(tmp_path / "file/c")
    with pytest.raises(InputError, match="holds something other than a corpus"):
        CorpusWriter(tmp_path / "file")
    with pytest.raises(InputError, match="holds something other than a corpus"):
        CorpusWriter(tmp_path)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    child = python(
        """
        import os, sys
        from hpc_xvr.data.corpus.writer import CorpusWriter
        from hpc_xvr.errors import InputError
        os.chdir(sys.argv[1])
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            CorpusWriter("c")
        except InputError as error:
            print(error)
    """,
        locked,
    )
    assert "Permission denied" in child.communicate()[0]
    assert [p.name for p in tmp_path.iterdir()] != [] and list(locked.iterdir()) == []


def test_one_writer_at_a_time(tmp_path):
    make(tmp_path / "c", "zarr", 1)
    lock = tmp_path / "c/.lock"
    child = python(
        """
        import sys, time
        from hpc_xvr.data.corpus.writer import CorpusWriter
        with CorpusWriter(sys.argv[1]):
            print("writing", flush=True)
            time.sleep(60)
    """,
        tmp_path / "c",
    )
    assert child.stdout.readline() == "writing\n"
    with pytest.raises(InputError, match=f"being written by process {child.pid} on"):
        CorpusWriter(tmp_path / "c")
    assert len(Corpus(tmp_path / "c")) == 1  # readers do not care
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert lock.exists()
    with CorpusWriter(tmp_path / "c"):  # its owner is dead
        assert lock.read_text().split() == [socket.gethostname(), str(os.getpid())]
    assert not lock.exists()
    lock.write_text("another-host 1\n")
    with pytest.raises(InputError, match=r"process 1 on another-host.*delete .*\.lock"):
        CorpusWriter(tmp_path / "c")


def test_lock_without_kernel_locks(tmp_path, monkeypatch):
    """Some parallel file systems have no flock: the process number decides."""

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("hpc_xvr.data.corpus.lock.fcntl.flock", refuse)
    make(tmp_path / "c", "zarr", 1)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for process, taken in ((os.getpid(), False), (dead.pid, True)):
        (tmp_path / "c/.lock").write_text(f"{socket.gethostname()} {process}\n")
        if taken:
            CorpusWriter(tmp_path / "c").close()
        else:
            with pytest.raises(InputError, match="being written"):
                CorpusWriter(tmp_path / "c")


def data_offsets(video):
    """Ranges of bytes of the file that hold frames."""
    if video.path.is_dir():
        return [(0, frames_file(video).stat().st_size)]
    with h5py.File(video.path) as file:
        chunks = file["frames"].id
        infos = [chunks.get_chunk_info(i) for i in range(chunks.get_num_chunks())]
    return [(info.byte_offset, info.byte_offset + info.size) for info in infos]


@stores
def test_every_flipped_byte_is_found(tmp_path, store):
    video = make(tmp_path / "c", store)["v1"]
    path, chance = frames_file(video), random.Random(3)
    ranges = data_offsets(video)
    intact = path.read_bytes()
    for _ in range(12):
        at = chance.randrange(*chance.choice(ranges))
        damaged = bytearray(intact)
        damaged[at] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        problems = dict(Corpus(tmp_path / "c").verify())
        assert problems["v1"], f"byte {at}"
        assert problems["v0"] is None and problems["v2"] is None
        opened = Corpus(tmp_path / "c")
        with pytest.raises(InputError, match=r"corpus .*c, video v1: .*checksum.*restore") as error:
            for t in range(5):
                opened["v1"].read(t)
        assert "\n" not in str(error.value)
        assert (opened["v0"].read(2) == clip(0)[2]).all()
    path.write_bytes(intact[: len(intact) // 2])
    assert dict(Corpus(tmp_path / "c").verify())["v1"]
    frames_file(video).unlink()
    if store == "zarr":  # zeros would be read from it if nobody looked
        assert dict(Corpus(tmp_path / "c").verify())["v1"]
        with pytest.raises(InputError, match="v1"):
            Corpus(tmp_path / "c")["v1"].read(0)


def test_verify_compares_with_the_manifest(tmp_path):
    make(tmp_path / "c", "zarr")
    attributes = tmp_path / "c/videos/v2/zarr.json"
    attributes.write_text(attributes.read_text().replace('"train"', '"test"'))
    assert [problem for _, problem in Corpus(tmp_path / "c").verify()][:2] == [None, None]
    assert "attributes" in dict(Corpus(tmp_path / "c").verify())["v2"]
    manifest = tmp_path / "c/manifest.jsonl"
    manifest.write_text(
        manifest.read_text().replace(Corpus(tmp_path / "c")["v0"].info.sha256, "0" * 64)
    )
    assert "sha256" in dict(Corpus(tmp_path / "c").verify())["v0"]


def test_what_is_no_corpus_says_so(tmp_path):
    with pytest.raises(InputError, match=r"no corpus there.*ingest"):
        Corpus(tmp_path / "nothing")
    make(tmp_path / "c", "zarr", 1)
    header = tmp_path / "c/corpus.json"
    header.write_text(header.read_text().replace('"schema": 1', '"schema": 2'))
    for opened in (Corpus, CorpusWriter):
        with pytest.raises(InputError, match=r"schema version 2.*reads version 1"):
            opened(tmp_path / "c")
    header.write_text('{"format": "other"}')
    with pytest.raises(InputError, match=r"corpus\.json is not that of a corpus"):
        Corpus(tmp_path / "c")


@stores
def test_handles_travel_and_stay_few(tmp_path, store, monkeypatch):
    opened = make(tmp_path / "c", store, 5)
    expected = opened["v3"].read(1)
    sent = pickle.dumps(opened.videos)
    assert len(sent) < 10_000  # information only, no array
    assert (pickle.loads(sent)[3].read(1) == expected).all()
    monkeypatch.setattr(corpus_module, "_OPEN_ARRAYS", 2)
    opened = Corpus(tmp_path / "c")
    for _ in range(2):
        for i, video in enumerate(opened.videos):
            assert (video.read(4) == clip(i)[4]).all()
            files = len(
                [f for f in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(f.resolve())]
            )
            assert files <= 2 or store == "zarr"
            assert len(opened.videos[0]._arrays._arrays) <= 2


def test_opening_needs_no_array_library():
    code = """
        import sys
        import hpc_xvr.data.corpus.reader
        print([m for m in ("torch", "zarr", "tensorstore", "h5py") if m in sys.modules])
    """
    assert python(code).communicate()[0] == "[]\n"
