"""Over 2,000 damaged camera files: each is read to its end or refused in one line, and nothing
else happens: no crash, no hang, no other exception, no memory for frames that are not there."""

from __future__ import annotations

import os
import re
import select
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from support import odd_headers, read_child
from support.camera_files import (
    counts,
    shimadzu_parts,
    write_cihx,
    write_cine,
    write_dxchange,
    write_photron,
)

NIGHT = int(os.environ.get("HPC_XVR_FUZZ", "0"))
"""Files in all, half of them damaged and half of them odd; a nightly run sets 100,000, and gets
others each time."""
FILMS = NIGHT // 2 or 400
"""Files with odd but consistent headers."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600 if NIGHT else 300)]

CHILD = Path(read_child.__file__)
SECONDS = 60 if NIGHT else 30
"""For one small file; they take milliseconds."""
EXAMPLES = max(130, NIGHT // 32)
"""Damaged files of each kind."""


def _tiff(**options):
    def write(folder: Path) -> tuple[Path, Path]:
        values = counts((3, 8, 12)).astype(options.pop("dtype", np.uint16))
        tifffile.imwrite(folder / "a.tif", values, photometric="minisblack", **options)
        return folder / "a.tif", folder / "a.tif"

    return write


def _hdf5(**options):
    def write(folder: Path) -> tuple[Path, Path]:
        with h5py.File(folder / "a.h5", "w", libver=options.pop("libver", None)) as file:
            file.create_dataset("entry/frames", data=counts((3, 8, 12)), **options)
        return folder / "a.h5", folder / "a.h5"

    return write


def _virtual(folder: Path) -> tuple[Path, Path]:
    layout = h5py.VirtualLayout((3, 8, 12), "u2")
    layout[:] = h5py.VirtualSource("part.nx", "entry/frames", (3, 8, 12))
    with h5py.File(folder / "part.nx", "w") as file:
        file["entry/frames"] = counts((3, 8, 12))
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_virtual_dataset("entry/frames", layout)
    return folder / "a.h5", folder / "a.h5"


def _dxchange(folder: Path) -> tuple[Path, Path]:
    white, dark = np.full((2, 8, 12), 4000, np.uint16), np.zeros((2, 8, 12), np.uint16)
    path = write_dxchange(folder / "dx.h5", counts((3, 8, 12)), white, dark)
    return path, path


def _shimadzu(folder: Path) -> tuple[Path, Path]:
    (folder / "hpv.dat").write_bytes(b"".join(shimadzu_parts(counts((1, 250, 400), 10))))
    return folder / "hpv.dat", folder / "hpv.dat"


def _cine(folder: Path) -> tuple[Path, Path]:
    path = write_cine(folder / "a.cine", counts((3, 8, 12)))
    return path, path


def _photron(bits: int, damaged: str, opened: str):
    def write(folder: Path) -> tuple[Path, Path]:
        write_photron(folder, counts((3, 8, 12), min(bits, 12)), bits)
        return folder / damaged, folder / opened

    return write


def _cihx(folder: Path) -> tuple[Path, Path]:
    write_cihx(folder, counts((3, 8, 12)))
    return folder / "run.cihx", folder / "run.mraw"


def _png(bits: int):
    def write(folder: Path) -> tuple[Path, Path]:
        for k, frame in enumerate(counts((2, 8, 12), bits)):
            Image.fromarray(frame).save(folder / f"{k}.png")
        return folder / "1.png", folder

    return write


FILES = {
    "cih": _photron(16, "run.cih", "run.cih"),
    "cih of packed pixels": _photron(12, "run.cih", "run.mraw"),
    "cihx": _cihx,
    "mraw": _photron(16, "run.mraw", "run.cih"),
    "cine": _cine,
    "dat": _shimadzu,
    "dxchange": _dxchange,
    "hdf5 in chunks": _hdf5(chunks=(1, 8, 12), compression="gzip", fletcher32=True),
    "hdf5 of a new version": _hdf5(chunks=(2, 4, 12), libver=("v110", "v110")),
    "hdf5 of parts": _virtual,
    "tiff": _tiff(metadata=None),
    "tiff of floats": _tiff(dtype=np.float32),
    "tiff of ImageJ": _tiff(imagej=True),
    "bigtiff, zipped": _tiff(bigtiff=True, compression="zlib"),
    "png": _png(12),
    "png of 8 bit": _png(8),
}
"""What writes a recording and returns the file to damage and the path to open."""

WORDS = [
    0,
    1,
    7,
    255,
    2**15,
    2**16,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 2,
    2**32 - 1,
    2**63,
    2**64 - 1,
]
NUMBERS = ["0", "-1", "1e9", "99999999999", "2147483648", "nan", "inf", "1e308", "", "0.5", "1/0"]
near = st.integers(0, 599)
"""Most damage goes to the header, where it hurts."""
place = st.one_of(near, near, st.integers(0, 2**20))
edit = st.one_of(
    st.tuples(st.just("flip"), place, st.integers(0, 7)),
    st.tuples(st.just("write"), place, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("word"), place, st.tuples(st.sampled_from("<>"), st.sampled_from(WORDS))),
    st.tuples(st.just("cut"), place, st.none()),
    st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("lose"), place, st.integers(1, 64)),
    st.tuples(st.just("zero"), place, st.integers(1, 64)),
    st.tuples(st.just("number"), place, st.sampled_from(NUMBERS)),
)


def damaged(data: bytes, edits) -> bytes:
    for kind, at, what in edits:
        at %= max(1, len(data))
        new, old = b"", 0
        if kind == "flip":
            new, old = bytes([data[at] ^ 1 << what]) if data else b"", 1
        elif kind == "write":
            new, old = what, len(what)
        elif kind == "word":
            order, value = what
            new = struct.pack(order + ("Q" if value >= 2**32 else "I"), value)
            old = len(new)
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            new = what
        elif kind == "lose":
            old = what
        elif kind == "zero":
            new, old = bytes(what), what
        elif kind == "number":
            found = list(re.finditer(rb"\d+", data[:4096]))
            if found:
                match = found[at % len(found)]
                at, old, new = match.start(), len(match[0]), what.encode()
        data = data[:at] + new + data[at + old :]
    return data


class Reader:
    """A process that reads; started again after it died."""

    def __init__(self, sound: list[Path]) -> None:
        self._sound, self._asked = sound, False
        self._start()

    def _start(self) -> None:
        self._asked = False
        self._child = subprocess.Popen(
            [sys.executable, CHILD, *self._sound],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._answer(120) == "ready", self._child.communicate()

    def _answer(self, seconds: float) -> str:
        if not select.select([self._child.stdout], [], [], seconds)[0]:
            return "hangs"
        return self._child.stdout.readline().strip()

    def read(self, path: Path) -> str:
        """readable, refused, or what went wrong."""
        answer = self.digest(path)
        return "readable" if answer.startswith("readable ") else answer

    def digest(self, path: Path) -> str:
        """The same, but readable is followed by a digest of what was read."""
        if self._asked:  # and not answered: the test that did was interrupted
            self.end()
            self._start()
        self._asked = True
        print(path, file=self._child.stdin, flush=True)
        answer = self._answer(SECONDS)
        self._asked = False
        if answer in ("", "hangs"):
            self.end()
            answer = answer or f"ended the process: {self._child.returncode}"
            self._start()
        return answer

    def end(self) -> None:
        self._child.kill()
        self._child.communicate()


def write_all(folder: Path) -> dict[str, tuple[Path, Path]]:
    """(file to damage, path to open) of each kind."""
    made = {}
    for kind, write in FILES.items():
        place = folder / kind.replace(" ", "-")
        place.mkdir()
        made[kind] = write(place)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    sound = write_all(tmp_path_factory.mktemp("sound"))
    reader = Reader([opened for _, opened in sound.values()])
    yield reader
    reader.end()


def check(reader: Reader, target: Path, opened: Path, examples: int) -> dict[str, int]:
    original = target.read_bytes()
    seen = dict.fromkeys(("readable", "refused"), 0)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=not NIGHT,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(edit, min_size=1, max_size=3))
    def attempt(edits) -> None:
        target.write_bytes(damaged(original, edits))
        answer = reader.read(opened)
        assert answer in seen
        seen[answer] += 1

    attempt()
    target.write_bytes(original)
    assert reader.read(opened) == "readable" and sum(seen.values()) >= examples
    return seen


def test_there_are_enough_of_them():
    assert len(FILES) * EXAMPLES >= 2000


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_read_or_refused(kind, files, reader):
    seen = check(reader, *files[kind], EXAMPLES)
    assert seen["refused"] > 20


@pytest.mark.parametrize("kind", odd_headers.FILMS)
def test_odd_headers_are_read_rightly_or_refused(kind, reader, tmp_path):
    """What is read is what was written, whatever the header looks like; what it lies about in a
    way that shows is refused."""
    seen = {"readable": 0, "refused": 0}

    @settings(
        max_examples=FILMS // len(odd_headers.FILMS),
        deadline=None,
        database=None,
        derandomize=not NIGHT,
        suppress_health_check=list(HealthCheck),
    )
    @given(odd_headers.FILMS[kind])
    def attempt(film: odd_headers.Film) -> None:
        for old in tmp_path.iterdir():
            old.unlink()
        for name, data in film.files.items():
            (tmp_path / name).write_bytes(data)
        answer = reader.digest(tmp_path / next(iter(film.files)))
        word = answer.partition(" ")[0]
        assert word in seen, answer
        seen[word] += 1
        if film.refused:
            assert word == "refused"
        elif film.truth is not None:
            assert answer == f"readable {odd_headers.digest(film.truth)}"

    attempt()
    print(kind, seen)
    assert min(seen.values()) >= FILMS // len(odd_headers.FILMS) // 20


@pytest.mark.parametrize(
    "name",
    [
        "photron_pymraw/beam.cihx",
        "pims_cine/cine_781.cine",
        "aps_2bm_radiography/radiography_2BM_0000.tif",
        "tomobank_xfusion_png/rad_00003_low_res.png",
    ],
)
def test_damaged_real_files_are_read_or_refused(name, realdata, reader, tmp_path):
    original = realdata(name)
    target = tmp_path / original.name
    target.write_bytes(original.read_bytes())
    if original.suffix == ".cihx":
        (tmp_path / "beam.mraw").symlink_to(original.with_suffix(".mraw"))
    check(reader, target, target, 30)


@pytest.mark.parametrize(
    "harm, answer",
    [
        ("raise RuntimeError('broken')", "RuntimeError: broken"),
        ("os.abort()", "ended the process: -6"),
        ("time.sleep(60)", "hangs"),
        ("bytearray(2**30)", "MemoryError"),
    ],
)
def test_the_reader_would_see_it(harm, answer, tmp_path, monkeypatch):
    """What the tests above look for is noticed when it happens."""
    path, _ = _photron(16, "run.cih", "run.cih")(tmp_path)
    child = tmp_path / "child.py"
    child.write_text(
        f"import os, time\nfrom support import read_child\n"
        "from hpc_xvr.data.cameras.recording import guarded\n"
        "def harm(path):\n"
        f"    {'with guarded(str(path)): ' if 'bytearray' in harm else ''}{harm}\n"
        "def find(paths, sound=[]):\n"
        "    sound.append(1)\n"
        "    return harm(paths[0]) if len(sound) > 1 else []\n"
        "read_child.find_recordings = find\nread_child.main()\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # `support` is found there too
    monkeypatch.setattr(sys.modules[__name__], "CHILD", child)
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 1)
    reader = Reader([path])
    try:
        assert reader.read(path).startswith(answer)
    finally:
        reader.end()
