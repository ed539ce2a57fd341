"""Published test sets from a web server of our own: broken connections, changed files, damage."""

import hashlib
import io
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from hpc_xvr import config
from hpc_xvr.config import Fetch
from hpc_xvr.data import fetch as module
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.fetch import download, fetch, unpack
from hpc_xvr.errors import InputError


class Server:
    """Serves `body` on this machine and breaks off after `limit` bytes an answer."""

    def __init__(self, body, limit=None, ranges=True, codes=()):
        self.body, self.limit, self.ranges, self.codes = body, limit, ranges, list(codes)
        self.asked = []

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.headers.get("Range"))
                if outer.codes:
                    self.send_error(outer.codes.pop(0))
                    return
                tag = hashlib.sha256(outer.body).hexdigest()[:8]
                start = 0
                if outer.ranges and self.headers.get("If-Range") == tag:
                    start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                if start >= len(outer.body):
                    self.send_error(416)
                    return
                rest = outer.body[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(rest)))
                self.send_header("ETag", tag)
                self.end_headers()
                self.wfile.write(rest[: outer.limit])
                self.close_connection = True

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/rad_00001.zip"
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    monkeypatch.setattr(module, "PIECE", 1000)


def archive(frames=5, size=(24, 32), scale=4, coarse=True, extra=()):
    """A ZIP of numbered PNG files in two folders, and the frames."""
    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 65536, (frames, *size), np.uint16)
    small = sharp.reshape(frames, size[0] // scale, scale, -1, scale).mean((2, 4)).astype(np.uint16)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, stack in (("HR", sharp), ("LR", small)) if coarse else (("HR", sharp),):
            for t, frame in enumerate(stack):
                png = io.BytesIO()
                Image.fromarray(frame).save(png, "PNG")
                file.writestr(f"rad/{name}/{name}_{t:05d}.png", png.getvalue())
        for name in extra:
            file.writestr(name, b"x")
    return buffer.getvalue(), sharp, small


def settings(address, folder, **values):
    return Fetch(address={"rad_00001": address}, folder=folder, timeout_s=5, **values)


def test_an_archive_becomes_a_recording_with_both_cameras(tmp_path):
    body, sharp, small = archive()
    digest = hashlib.sha256(body).hexdigest()
    with Server(body, limit=4000) as server:
        wanted = settings(server.address, tmp_path / "d", sha256={"rad_00001": digest})
        assert len(body) > 8000  # three answers at least
        fetch("rad_00001", tmp_path / "corpus", wanted)
        assert len(server.asked) == -(-len(body) // 4000)
        assert server.asked[:2] == [None, "bytes=4000-"]
        video = Corpus(tmp_path / "corpus")["rad_00001"]
        np.testing.assert_array_equal(video.read(range(5)), sharp)
        np.testing.assert_array_equal(video.read_lr(range(5)), small)
        assert video.info.lr_times == [0, 1, 2, 3, 4] and video.info.split == "test"
        assert video.info.source == server.address and video.info.bit_depth == 16
        asked = len(server.asked)
        fetch("rad_00001", tmp_path / "again", wanted)  # all is there: nothing is asked for
        assert len(server.asked) == asked
    assert {p.name for p in (tmp_path / "d" / "rad_00001").iterdir()} == {"rad_00001.zip", "files"}


def test_a_call_goes_on_where_the_last_one_stopped(tmp_path, monkeypatch):
    body = np.random.default_rng(0).bytes(10_000)
    path = tmp_path / "file.zip"
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    with Server(body, limit=4000) as server:
        with pytest.raises(InputError, match=r"broke off at 4000 of 10000.*call again"):
            download(server.address, path)
        assert not path.exists()
        server.limit = None
        download(server.address, path)
        assert server.asked == [None, "bytes=4000-"]
    assert path.read_bytes() == body and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changed_meanwhile_is_taken_from_the_start(tmp_path, monkeypatch, ranges):
    old, new = (np.random.default_rng(seed).bytes(6000) for seed in (1, 2))
    path = tmp_path / "file.zip"
    with Server(old, limit=2500) as server:
        monkeypatch.setattr(module, "ATTEMPTS", 1)
        with pytest.raises(InputError, match="broke off"):
            download(server.address, path)
        server.body, server.limit, server.ranges = new, None, ranges
        monkeypatch.setattr(module, "ATTEMPTS", 3)
        download(server.address, path)
    assert path.read_bytes() == new


def test_a_server_in_trouble_is_asked_again_and_one_that_refuses_is_not(tmp_path):
    body = b"x" * 3000
    with Server(body, codes=[503, 429]) as server:
        download(server.address, tmp_path / "a")
        assert len(server.asked) == 3
        server.codes = [404]
        with pytest.raises(InputError, match=r"answers 404.*fetch\.address"):
            download(server.address, tmp_path / "b")
        assert len(server.asked) == 4
        address = server.address
    with pytest.raises(InputError, match="no connection"):
        download(address, tmp_path / "c", timeout_s=1)
    with pytest.raises(InputError, match=r"begins with https:// or http://"):
        download("ftp://127.0.0.1/x", tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_wrong_checksum_is_no_file(tmp_path):
    with Server(b"y" * 2000) as server:
        with pytest.raises(InputError, match=r"sha256 \w{64} instead of abc and was deleted"):
            download(server.address, tmp_path / "a", sha256="abc")
        assert not (tmp_path / "a").exists()
        digest = hashlib.sha256(b"y" * 2000).hexdigest()
        download(server.address, tmp_path / "a", sha256=digest.upper())


def test_archives_that_are_damaged_or_want_out(tmp_path):
    body, *_ = archive()
    for name, content, words in (
        ("cut.zip", body[:-50], "not a complete ZIP archive"),
        ("flipped.zip", body[:300] + bytes([body[300] ^ 255]) + body[301:], "not a complete ZIP"),
        ("text.zip", b"<html>sign in</html>", "not a complete ZIP archive"),
        ("out.zip", archive(extra=["../evil.txt"])[0], r"\.\./evil\.txt, which lies outside"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            unpack(tmp_path / name, tmp_path / "files")
    assert not (tmp_path / "files").exists() and not (tmp_path.parent / "evil.txt").exists()
    assert not list(tmp_path.glob(".*"))


def test_sharp_frames_alone_and_sets_that_do_not_fit(tmp_path):
    with Server(archive(coarse=False)[0]) as server:
        fetch("rad_00001", tmp_path / "alone", settings(server.address, tmp_path / "d1"))
        assert Corpus(tmp_path / "alone")["rad_00001"].lr_shape is None
        server.body = archive(scale=2)[0]
        with pytest.raises(InputError, match=r"recordings of 5x12x16, 5x24x32; expected"):
            fetch("rad_00001", tmp_path / "two", settings(server.address, tmp_path / "d2"))
    assert not (tmp_path / "two").exists()
    with pytest.raises(
        InputError, match=r"rad_9: unknown data set.*--set fetch\.address\.rad_9=URL"
    ):
        fetch("rad_9", tmp_path / "x", Fetch())


def test_the_command_needs_no_torch(tmp_path):
    body, sharp, _ = archive()
    blocked = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['mpi4py'] = None\n"
        "sys.argv[0] = 'hpc-xvr'\n"
        "from hpc_xvr.cli import main\nmain()"
    )
    with Server(body) as server:
        done = subprocess.run(
            [sys.executable, "-c", blocked, "fetch", "rad_00001", "--corpus", tmp_path / "c",
             "--set", f"fetch.address.rad_00001={server.address}",
             "--set", f"fetch.folder={tmp_path}"],
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rad_00001 added" in done.stdout
    np.testing.assert_array_equal(Corpus(tmp_path / "c")["rad_00001"].read(3), sharp[3])


def test_both_sets_have_an_address():
    assert set(config.load(None).fetch.address) == {"rad_00001", "rad_00002"}
