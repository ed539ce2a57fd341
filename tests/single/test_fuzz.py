"""Everything that parses, under damaged inputs: each is read or refused in one line, and nothing
else happens: no crash, no other exception, no hang, no memory for what is not there.

HPC_XVR_FUZZ=100000 reads that many in all; HPC_XVR_FUZZ_FIRST is the number of the first one of
each parser, so that other inputs can be had. The cameras' own files are in test_camera_fuzz.py.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from importlib.util import find_spec

import google_crc32c
import h5py
import numpy as np
import pytest

from hpc_xvr import checkpoint
from hpc_xvr.config import load
from hpc_xvr.data import fetch
from hpc_xvr.data.cameras import open_camera_file
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.registration import read_registration
from hpc_xvr.data.scout import check_survivable
from hpc_xvr.errors import InputError
from hpc_xvr.evaluate.results import FILE, Evaluation
from hpc_xvr.report import write_report
from hpc_xvr.submit.restart import is_done
from hpc_xvr.submit.site import read_site
from hpc_xvr.text import parse_json, parse_yaml
from hpc_xvr.train import reporting, run_folder, utilisation
from support.mutations import BOMB
from support.parsers import TARGETS
from support.paths import ROOT
from support.runs import a_corpus

ALL = int(os.environ.get("HPC_XVR_FUZZ", "400"))
MODULE = "support.parsers"
FIRST = int(os.environ.get("HPC_XVR_FUZZ_FIRST", "0"))
_SHARES = {name: min(1.0, 10 / target.cost) for name, target in TARGETS.items()}


def shares(total: int) -> dict[str, int]:
    """How many inputs each parser gets; slow ones get fewer."""
    whole = sum(_SHARES.values())
    return {name: max(3, round(total * share / whole)) for name, share in _SHARES.items()}


class Child:
    """The process that reads; started again after it died."""

    def __init__(self, folder) -> None:
        self._folder = folder
        self._process = None

    def ask(self, name: str, first: int, count: int) -> tuple[dict[str, int], list[str]]:
        """What became of these inputs, and what is wrong."""
        seen, problems, end = {}, [], first + count
        while first < end:
            if self._process is None:
                self._start()
            self._process.stdin.write(f"{name} {first} {end - first}\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                said = json.loads(line)
                if "seen" in said:
                    seen = {key: seen.get(key, 0) + n for key, n in said["seen"].items()}
                    return seen, problems
                problems.append(f"{name} {said['number']}: {said['problem']} ({said['where']})")
            code = self._process.wait()
            number = int((self._folder / "now").read_text())
            last = (self._folder / "stderr").read_text()[-1500:]
            problems.append(f"{name} {number}: ended the process with {code}: {last}")
            self._process, first = None, number + 1
        return seen, problems

    def _start(self) -> None:
        self._folder.mkdir(exist_ok=True)
        with (self._folder / "stderr").open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "OMP_NUM_THREADS": "1",
                    "MALLOC_ARENA_MAX": "2",
                },
            )

    def end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    child = Child(tmp_path_factory.mktemp("fuzz") / "child")
    yield child
    child.end()


@pytest.mark.timeout(3 * 3600 if ALL > 10_000 else 300)
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs_are_read_or_refused(name, child):
    begin = time.monotonic()
    seen, problems = child.ask(name, FIRST, shares(ALL)[name])
    print(name, seen, f"{time.monotonic() - begin:.1f} s")
    assert not problems, "\n".join(problems[:20])


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed")
def test_coverage_guides_the_changes(tmp_path):
    command = [sys.executable, ROOT / "tests/guided_fuzz.py", "registration", "--seconds", "5"]
    done = subprocess.run([*command, "--keep", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stderr.partition("new_units_added:")[2].split()[0]) > 5
    assert not list(tmp_path.iterdir())


# What was found in this way, by name.


def endless(path):
    """The text of an attribute lies in a heap in which the HDF5 library never finds the end."""
    with h5py.File(path, "w") as file:
        file["entry/frames"] = np.zeros((2, 8, 8), np.uint16)
        file["entry/frames"].attrs["units"] = "counts"
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, data.find(b"GCOL") + 24, 2**64 - 16)
    path.write_bytes(data)
    return path


def test_an_hdf5_file_in_which_the_library_never_comes_to_an_end_is_refused(tmp_path):
    begin = time.process_time()
    with pytest.raises(InputError, match="has not ended after 2 s"):
        open_camera_file(endless(tmp_path / "a.h5"))
    assert time.process_time() - begin < 5
    check_survivable(_sound(tmp_path / "b.h5"))  # with the same process


def _sound(path):
    with h5py.File(path, "w") as file:
        file["entry/frames"] = np.zeros((2, 8, 8), np.uint16)
        file["entry/name"] = "shot"
    return path


def test_hdf5_files_are_looked_at_by_one_process_that_may_be_lost(tmp_path):
    from hpc_xvr.data import scout

    check_survivable(_sound(tmp_path / "a.h5"))
    first = scout._scout
    check_survivable(_sound(tmp_path / "b.h5"))
    assert scout._scout is first
    first._process.kill()
    first._process.wait()
    check_survivable(_sound(tmp_path / "c.h5"))
    assert scout._scout is not first


def test_a_damaged_clip_does_not_hang_what_verifies_it(tmp_path):
    corpus = a_corpus(tmp_path / "c", "hdf5", 1)
    clip = corpus.original("v0")
    data = bytearray(clip.read_bytes())
    struct.pack_into("<Q", data, data.find(b"GCOL") + 24, 2**64 - 16)
    clip.write_bytes(data)
    assert "has not ended after" in dict(corpus.verify())["v0"]


def test_offsets_beyond_a_shard_are_refused(tmp_path):
    corpus = a_corpus(tmp_path / "c", videos=1)
    shard = corpus.original("v0") / "frames/c/0/0/0"
    data = bytearray(shard.read_bytes())
    for offset in (2**63, 2**64 - 1, len(data) - 100):
        struct.pack_into("<Q", data, len(data) - 148, offset)
        data[-4:] = google_crc32c.value(bytes(data[-148:-4])).to_bytes(4, "little")
        shard.write_bytes(data)
        with pytest.raises(InputError, match="leads outside"):
            Corpus(corpus.path)["v0"].read(0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [0.5, 32, 40]),
        ("shape", [9, 32, True]),
        ("bit_depth", 0.5),
        ("lr_bit_depth", -1),
        ("lr_bit_depth", float("nan")),
        ("lr_bit_depth", -float("inf")),
        ("lr_shape", [0, 8, 10]),
    ],
)
def test_a_line_of_the_manifest_with_odd_numbers_is_not_believed(key, value, tmp_path):
    """Such a recording is known by its own attributes, as one without a line is."""
    corpus = a_corpus(tmp_path / "c")
    manifest = corpus.path / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[1][key] = value
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    manifest.write_text(text)
    video = Corpus(corpus.path)["v1"]
    assert video.shape == (9, 32, 40) and video.info.bit_depth == 12
    assert video.read(8).shape == (32, 40)


@pytest.mark.parametrize(
    "name", ["a/" * 1200 + "b", "n" * 300, "", "encrypted", "deflate", "link", "both", "lzma"]
)
def test_archives_that_cannot_be_unpacked_are_refused(name, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        info = zipfile.ZipInfo("x" if name in ("", "encrypted", "deflate", "link") else name)
        info.filename = "" if name == "" else info.filename
        info.compress_type = zipfile.ZIP_LZMA if name == "lzma" else zipfile.ZIP_DEFLATED
        info.external_attr = (0o120777 << 16) if name == "link" else 0
        file.writestr(info, "/etc/passwd " * 9)
        if name == "both":
            file.writestr("both/inside", "")
    data = bytearray(packed.getvalue())
    if name == "encrypted":
        for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            data[data.find(mark) + at] |= 1
    if name == "deflate":
        data[31:40] = b"\xff" * 9
    (tmp_path / "a.zip").write_bytes(data)
    if name == "link":  # is unpacked as the text it holds
        assert not (fetch.unpack(tmp_path / "a.zip", tmp_path / "files") / "x").is_symlink()
        return
    deep = "at most 100 are taken" if name.startswith("a/") else None
    with pytest.raises(InputError, match=deep):
        fetch.unpack(tmp_path / "a.zip", tmp_path / "files")
    assert not (tmp_path / "files").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "stands for more than 10,000,000 values"),
        ("a: &a [1, *a]", "refers to itself"),
        ("{a: " * 200 + "1" + "}" * 200, "nested too deeply"),
        ("a: !!int ''", "has no digits"),
    ],
)
def test_yaml_that_no_program_walks_through_is_refused(text, message):
    begin = time.process_time()
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)
    assert time.process_time() - begin < 5
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 200 + "]" * 200)


@pytest.mark.parametrize("path", ["$$" + "x" * 300, "$HOME/" + "x" * 300, "$$\x01b", "a$b" * 2000])
def test_paths_that_no_file_can_have_are_taken_or_refused(path):
    try:
        load(None, [f"data.corpus={path}"])
    except InputError as error:
        assert len(str(error)) <= 2000 and "\n" not in str(error)


def test_what_errors_quote_is_cut():
    for use in (
        lambda: load(None, ["x" * 50_000 + "=1"]),
        lambda: read_registration("{" + "scale: 1, " * 5000),
        lambda: load(None, ["train.steps\n=x"]),
    ):
        with pytest.raises(InputError) as problem:
            use()
        assert len(str(problem.value)) <= 2000 and "\n" not in str(problem.value)


JOURNALS = [b"7", b"[]", b'{"step": null, "time": "x", "earlier": 3}', b"[" * 5000, b"\xff\xfe"]


@pytest.mark.parametrize("text", JOURNALS)
def test_damaged_journals_of_a_run_stop_nothing(text, tmp_path):
    for name in ("done.json", "environment.json", "metrics.jsonl", "a.part.json"):
        (tmp_path / name).write_bytes(text + b"\n")
    (tmp_path / "a.part").write_bytes(b"abc")
    (tmp_path / "utilisation").mkdir()
    (tmp_path / "utilisation/rank-0.jsonl").write_bytes(text + b'\n{"time": 1, "rank": 0}\n')
    assert run_folder.finished(load(None, [f"run.dir={tmp_path}", "data.corpus=c"])) is None
    assert not is_done(tmp_path, 1)
    run_folder.write_environment(tmp_path, {"python": "3"})
    assert json.loads((tmp_path / "environment.json").read_text())["python"] == "3"
    assert reporting.kept_lines(tmp_path / "metrics.jsonl", 9) == b""
    assert fetch._have(tmp_path / "a.part") == (0, "")
    assert utilisation.read(tmp_path) == [{"time": 1, "rank": 0}]


def test_a_mark_that_is_no_header_is_not_sent(tmp_path):
    (tmp_path / "a.part").write_bytes(b"abc")
    for mark, known in (("abc", True), ("a\r\nCookie: b", False), (7, False), ("\u00fc", False)):
        (tmp_path / "a.part.json").write_text(json.dumps({"mark": mark}))
        assert fetch._have(tmp_path / "a.part") == ((3, mark) if known else (0, ""))


def test_a_report_of_odd_lines_and_settings_is_written(tmp_path):
    lines = [
        '{"kind":"event","step":1}',
        '{"kind":"train","step":1e300,"loss":"x","samples_per_s":"y","data_wait":[]}',
        '{"kind":"validation","step":2,"psnr":1e309,"psnr_bicubic":{}}',
        '{"kind":["train"],"step":3}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "environment.json").write_text('{"earlier": 3}')
    (tmp_path / "config.yaml").write_text("train: {steps: [1]}\nmodel: 7\nrun: [x]\n")
    write_report(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("psnr", "30"), ("frames", 1e300), ("scene", None), ("gap", [8])]
)
def test_results_of_other_types_are_refused(key, value, tmp_path):
    tree = json.loads(TARGETS["evaluation"].prepare(tmp_path)[0])
    place = tree["rows"][0]
    (place["condition"] if key == "gap" else place)[key] = value
    (tmp_path / FILE).write_text(json.dumps(tree))
    with pytest.raises(InputError, match="another version"):
        Evaluation.load(tmp_path)


def test_site_files_that_are_no_text_or_lack_a_directive_are_refused(tmp_path):
    own = tmp_path / "own.env"
    own.write_bytes(b"XVR_SCHEDULER=\xff\n")
    with pytest.raises(InputError, match="cannot be read"):
        read_site(str(own))
    text = (ROOT / "hpc_xvr/submit/sites/slurm.env").read_text()
    own.write_text("\n".join(li for li in text.splitlines() if "QUEUE_DIRECTIVE" not in li))
    with pytest.raises(InputError, match="XVR_QUEUE_DIRECTIVE"):
        read_site(str(own)).directives(1, 1, "short")


def test_a_pickle_gets_no_memory_for_what_it_says_to_hold(tmp_path):
    """A text of 2 GB in a file of 30 bytes."""
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\2X\0\0\0\x7fabc")
    asked = []

    class Noting(checkpoint._Bounded):
        def read(self, size=-1, /):
            data = super().read(size)
            asked.append(len(data))
            return data

    with Noting(io.FileIO(path)) as file:
        assert len(file.read(2**31)) == path.stat().st_size
    with pytest.raises(InputError, match="not readable as tensors"):
        checkpoint.read_tensors(path)


def test_chunks_of_other_programs_are_bounded(tmp_path):
    corpus = a_corpus(tmp_path / "c", videos=1)
    text = corpus.original("v0") / "frames/zarr.json"
    meta = json.loads(text.read_text())
    meta["chunk_grid"]["configuration"]["chunk_shape"] = [1, 2**15, 2**14]
    meta["codecs"][0] = {"name": "bytes", "configuration": {"endian": "little"}}
    text.write_text(json.dumps(meta))
    with pytest.raises(InputError, match="chunks of more than"):
        Corpus(corpus.path)["v0"].read(0)


@pytest.mark.parametrize(
    ("harm", "answer"),
    [
        ("raise RuntimeError('broken')", "RuntimeError: broken"),
        ("os.abort()", "ended the process with -6"),
        ("time.sleep(60)", "ended the process with 1"),
        ("sum(range(10**8))", "took "),
        ("bytearray(2**31)", "memory"),
        ("raise InputError('a' * 3000 + chr(10))", "refused"),
    ],
)
def test_it_would_be_seen(harm, answer, tmp_path, monkeypatch):
    """What the tests above look for is noticed when it happens."""
    code = f"""
import os, time
from support import parsers
from hpc_xvr.errors import InputError
parsers.HANGS, parsers.SECONDS = 60.0, 0.5
def harm(folder, data):
    if data == b"sound":
        return
    try:
        {harm}
    except MemoryError as error:
        raise InputError("no memory") from error
parsers.TARGETS = {{"x": parsers.Target(lambda folder: [b"sound"], harm)}}
parsers.main()
"""
    if "sleep" in harm:
        code = code.replace("60.0", "2.0")
    (tmp_path / "fuzz_child.py").write_text(code)
    monkeypatch.setattr(sys.modules[__name__], "MODULE", "fuzz_child")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    child = Child(tmp_path / "child")
    try:
        seen, problems = child.ask("x", 0, 1)
        assert answer in str(problems or seen), (seen, problems)
    finally:
        child.end()
