"""Everything that parses what others may have written, each with seeds and a way to damage them.

`python -m support.parsers FOLDER` is a process that reads damaged inputs, so that a crash is seen
and memory is limited. Each line of its standard input, "TARGET FIRST COUNT", asks for the inputs of
these numbers; it answers in lines of JSON: one for each problem, then what became of all.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import io
import json
import logging
import os
import resource
import selectors
import shutil
import socket
import stat
import struct
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from hpc_xvr.errors import InputError
from support import mutations
from support.mutations import of_bytes, of_json, of_json_lines, of_text, of_tree, of_yaml, several
from support.paths import ROOT

SECONDS = 5.0
"""Of the processor, for one input."""
HANGS = 60.0
"""The same by the clock, on a machine that others use, too."""
ROOM = 2**30
"""Bytes that reading may take on top of what the libraries take by themselves."""
LONGEST = 2000
"""Characters of an error."""


@dataclass
class Target:
    """A parser.

    prepare: folder -> seeds, each as bytes.
    read: (folder, bytes); may do nothing but return or raise InputError.
    """

    prepare: Callable[[Path], list[bytes]]
    read: Callable[[Path, bytes], None]
    change: mutations.Change = of_bytes
    mend: Callable[[Random, bytes], bytes] | None = None
    """Makes checksums and lengths right again, or not."""
    cost: int = 1
    """Roughly, in milliseconds."""
    seeds: list[bytes] = field(default_factory=list)

    def input(self, name: str, number: int) -> bytes:
        rng = Random(f"{name} {number}")
        data = several(rng, self.seeds, self.change)
        return self.mend(rng, data) if self.mend else data


# Text.


def _configs(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / "configs").rglob("*.yaml"))]


def _config(folder: Path, data: bytes) -> None:
    from hpc_xvr import config

    path = folder / "config.yaml"
    path.write_bytes(data)
    config.dump(config.load(path))


def _override(folder: Path, data: bytes) -> None:
    from hpc_xvr import config

    config.dump(config.load(None, [data.decode(errors="replace")]))


def _overrides(folder: Path) -> list[bytes]:
    return [
        b"train.steps=100",
        b"model.depths=[2, 2]",
        b"data.corpus=a/b",
        b"data.hr_gap=20",
        b"evaluate.noise=[none, 1000]",
        b"fetch.address.x=http://a/b.zip",
    ]


def _registration(folder: Path, data: bytes) -> None:
    from hpc_xvr.data.registration import read_registration

    if data.lstrip().startswith(b"{") and b"\0" not in data:
        with contextlib.suppress(UnicodeDecodeError):
            read_registration(data.decode())
            return
    (folder / "registration.yaml").write_bytes(data)
    read_registration(str(folder / "registration.yaml"))


def _site(folder: Path, data: bytes) -> None:
    from hpc_xvr.submit.site import read_site

    (folder / "own.env").write_bytes(data)
    site = read_site(str(folder / "own.env"))
    site.directives(2, site.ranks_per_node, site.queue)
    site.fill("-n NODES", 2)


def _journals(folder: Path) -> list[bytes]:
    """Small files that a run leaves in its folder."""
    row = {"time": 1.0, "rank": 0, "host": "n1", "gpu": None, "cpu": 97.5, "memory": 1e9}
    return [
        b'{"step": 100, "time": 1700000000.1}\n',
        json.dumps({"versions": {"torch": "2"}, "ranks": [{"host": "a"}], "earlier": []}).encode(),
        b'{"kind":"train","step":1,"time":1.0,"loss":0.5}\n{"kind":"train","step":2,"loss":0.4}\n',
        b'{"mark": "abc"}',
        json.dumps(row).encode() + b"\n",
        b"start 1 job 77 2026-01-01 00:00:00 at step 0\nstopped: x\n",
        b"77\n78\n79\n",
    ]


def _journal(folder: Path, data: bytes) -> None:
    from hpc_xvr import config
    from hpc_xvr.data import fetch
    from hpc_xvr.submit import restart
    from hpc_xvr.train import reporting, run_folder, utilisation

    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    (run / "utilisation").mkdir(parents=True)
    for name in ("done.json", "environment.json", "a.part.json", "n.jobs", "n.starts"):
        (run / name).write_bytes(data)
    (run / "a.part").write_bytes(b"abc")
    (run / "utilisation/rank-0000.jsonl").write_bytes(data)
    (run / "metrics.jsonl").write_bytes(data)
    cfg = config.load(None, [f"run.dir={run}", "data.corpus=c"])
    run_folder.finished(cfg)
    run_folder.write_environment(run, {"versions": {}})
    json.loads((run / "environment.json").read_text())
    restart.is_done(run, 10)
    chain = restart.Chain(run, "n", run, "78")
    restart.begin(chain, 1, 10, 100)
    restart.end(chain, 100, restart.Launch(code=75))
    fetch._have(run / "a.part")
    utilisation.read(run)
    reporting.kept_lines(run / "metrics.jsonl", 3)


def _evaluations(folder: Path) -> list[bytes]:
    condition = {"corpus": "c", "gap": 8, "noise": "none"}
    row = {
        **condition,
        **{"recording": "v0", "scene": "s", "method": "bicubic", "frames": 9, "keys": 2},
        **{"psnr": 30.0, "ssim": 0.9, "aad": 1.0, "psnr_float": 30.0, "psnr_gradient": 25.0},
        **{"flicker": 0.1, "seconds_per_frame": 0.1, "flops_per_frame": 0.0},
    }
    row["condition"] = {key: row.pop(key) for key in condition}
    facts = {"name": "bicubic", "title": "Bicubic"}
    tree = {"rows": [row], "methods": [facts], "reference": "detail"}
    tree["settings"] = {"split": "test", "lr_source": "binned", "scale": 4, "device": "cpu"}
    cell = {"key": "a" * 24, "row": row}
    return [json.dumps(tree).encode(), json.dumps(cell).encode() + b"\n"]


def _evaluation(folder: Path, data: bytes) -> None:
    from hpc_xvr.evaluate.comparison import write_comparison
    from hpc_xvr.evaluate.results import FILE, Evaluation
    from hpc_xvr.evaluate.resume import Cells
    from hpc_xvr.evaluate.tables import as_csv, as_latex, as_markdown

    place = folder / "evaluation"
    (place / "cells").mkdir(parents=True, exist_ok=True)
    (place / FILE).write_bytes(data)
    (place / "cells/rank-0000.jsonl").write_bytes(data)
    rows = Cells(place, 0).load()
    if rows or not data.startswith(b'{"rows"'):
        return
    evaluation = Evaluation.load(place)
    if evaluation:
        as_csv(evaluation), as_markdown(evaluation), as_latex(evaluation)
        write_comparison(place)


def _reports(folder: Path) -> list[bytes]:
    lines = [{"kind": "train", "step": k, "time": float(k), "loss": 1 / k} for k in range(1, 4)]
    lines += [{"kind": "validation", "step": 3, "psnr": 30.0, "psnr_base": 29.0}]
    lines += [{"kind": "event", "step": 2, "text": "resumed"}]
    config = (ROOT / "configs/pulse.yaml").read_bytes()
    metrics = "".join(json.dumps(line) + "\n" for line in lines)
    return [metrics.encode(), _journals(folder)[1], config]


def _report(folder: Path, data: bytes) -> None:
    from hpc_xvr.report import write_report

    run = folder / "reported"
    run.mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "environment.json", "config.yaml"):
        (run / name).unlink(missing_ok=True)
    (run / "config.yaml").write_text("train: {steps: 3}\n")
    if b'"kind"' in data:
        (run / "metrics.jsonl").write_bytes(data)
    elif data.startswith(b"{"):
        (run / "environment.json").write_bytes(data)
    else:
        (run / "config.yaml").write_bytes(data)
    write_report(run)


# A corpus.


def _corpus_at(folder: Path, store: str = "zarr") -> Path:
    from support.runs import a_corpus

    path = folder / f"corpus-{store}"
    if not path.exists():
        a_corpus(path, store, 2)
    return path


def _read_corpus(path: Path) -> None:
    from hpc_xvr.data.corpus import Corpus

    corpus = Corpus(path)
    problem = None
    for video in corpus.videos:
        try:
            video.info, video.shape, video.dtype, video.split  # noqa: B018
            video.read([0, video.shape[0] - 1], slice(0, 20), slice(0, 20))
            if video.lr_shape:
                video.read_lr([0], slice(0, 4), slice(0, 4))
            corpus.checksums(video.id)
        except InputError as error:
            problem = error
    for _ in corpus.verify():
        pass
    if problem:
        raise problem


def _corpus_file(name: str, store: str = "zarr") -> dict[str, Any]:
    """Target of one file of a corpus."""

    def prepare(folder: Path) -> list[bytes]:
        path = _corpus_at(folder, store)
        return [(path / name).read_bytes()]

    def read(folder: Path, data: bytes) -> None:
        path = _corpus_at(folder, store)
        sound = (path / name).read_bytes()
        (path / name).write_bytes(data)
        try:
            _read_corpus(path)
        finally:
            (path / name).write_bytes(sound)

    return {"prepare": prepare, "read": read}


def _index(rng: Random, data: bytes) -> bytes:
    """Of a shard: an index that lies, with a checksum that is right."""
    from google_crc32c import value

    size = 9 * 16
    if len(data) < size + 4 or rng.random() < 0.3:
        return data
    index = np.frombuffer(data[-size - 4 : -4], "<u8").copy()
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        number = rng.choice((*mutations.WORDS, int(index[0]), len(data), len(data) - 1))
        place = rng.randrange(len(index))
        index[place & ~1 if rng.random() < 0.8 else place] = number % 2**64
    text = index.tobytes()
    return data[: -size - 4] + text + value(text).to_bytes(4, "little")


FOREIGN = {
    "gzip": [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 1}}],
    "zstd": [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 1}}],
    "blosc": [
        {"name": "bytes"},
        {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "shuffle"}},
    ],
    "sharded": [
        {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [1, 16, 20],
                "codecs": [{"name": "bytes"}, {"name": "zstd"}],
                "index_codecs": [{"name": "bytes"}, {"name": "crc32c"}],
                "index_location": "start",
            },
        }
    ],
}


def _foreign_corpora(folder: Path) -> list[bytes]:
    """As other programs store them; an input is one array: its description and its first chunk."""
    import tensorstore

    seeds = []
    for name, codecs in FOREIGN.items():
        place = folder / f"foreign-{name}"
        chunk = [9, 32, 40] if name == "sharded" else [1, 32, 40]
        metadata = {
            "shape": [9, 32, 40],
            "data_type": "uint16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": codecs,
        }
        array = tensorstore.open(
            {"driver": "zarr3", "kvstore": f"file://{place}/", "metadata": metadata},
            create=True,
            open=True,
        ).result()
        array[...] = np.arange(9 * 32 * 40, dtype=np.uint16).reshape(9, 32, 40)
        text = (place / "zarr.json").read_bytes()
        data = (place / "c/0/0/0").read_bytes()
        seeds.append(struct.pack("<I", len(text)) + text + data)
    return seeds


def _cut(data: bytes) -> tuple[bytes, bytes]:
    size = struct.unpack("<I", data[:4])[0] if len(data) >= 4 else 0
    return data[4 : 4 + size], data[4 + size :]


def _change_foreign(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    text, chunk = _cut(data)
    if rng.random() < 0.6:
        text = of_json(rng, text)
    else:
        chunk = of_bytes(rng, chunk, [_cut(other)[1] for other in others])
    return struct.pack("<I", len(text)) + text + chunk


def _foreign(folder: Path, data: bytes) -> None:
    path = _corpus_at(folder)
    text, chunk = _cut(data)
    frames = path / "videos/v0/frames"
    kept = path / "kept"
    frames.rename(kept)
    try:
        for number in range(9):
            (frames / f"c/{number}/0").mkdir(parents=True)
            (frames / f"c/{number}/0/0").write_bytes(chunk)
        (frames / "zarr.json").write_bytes(text)
        _read_corpus(path)
    finally:
        shutil.rmtree(frames)
        kept.rename(frames)


# Weights.


def _tiny_config() -> Any:
    from hpc_xvr import config

    model = {"embed_dim": 8, "depths": [1], "heads": 2, "up_features": 8, "drop_path": 0.0}
    return config.check({"model": model, "data": {"corpus": "c"}}, "a test")


def _tiny_weights() -> dict[str, Any]:
    from hpc_xvr.factory.build import build_model

    return build_model(_tiny_config()).state_dict()


def _safetensors(folder: Path) -> list[bytes]:
    from hpc_xvr.factory.weights import Trained, write_weights

    path = folder / "w.safetensors"
    write_weights(path, Trained(_tiny_weights(), _tiny_config(), 3), {"weights": "raw"})
    return [path.read_bytes()]


def _change_safetensors(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else len(data)
    if rng.random() < 0.2 or size > len(data):
        return of_bytes(rng, data)
    text, rest = data[8 : 8 + size], data[8 + size :]
    try:
        tree = json.loads(text)
        about = tree["__metadata__"]
        if rng.random() < 0.5:
            about["config"] = of_json(rng, about["config"].encode()).decode(errors="replace")
        else:
            tree = of_tree(rng, tree)
        text = json.dumps(tree).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = of_text(rng, text)
    return struct.pack("<Q", len(text)) + text + rest


def _read_weights(suffix: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, data: bytes) -> None:
        from hpc_xvr.factory import weights

        path = folder / f"damaged{suffix}"
        path.write_bytes(data)
        weights.open_model(path)

    return read


def _torch_files(folder: Path) -> list[bytes]:
    import torch

    from hpc_xvr.model.edvr import EDVR

    model = EDVR(lr_frames=3, features=8, groups=2, extract_blocks=1, reconstruct_blocks=1)
    seeds = []
    for state in (model.state_dict(), {"params": model.state_dict()}):
        for new in (True, False):
            data = io.BytesIO()
            torch.save(state, data, _use_new_zipfile_serialization=new)
            seeds.append(data.getvalue())
    return seeds


def _change_torch(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Of a ZIP archive the pickle in it, in most cases."""
    if rng.random() < 0.3:
        return of_bytes(rng, data, others)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            records = {record.filename: old.read(record) for record in old.infolist()}
    except Exception:
        return of_bytes(rng, data, others)
    name = rng.choice([n for n in records if n.endswith("data.pkl")] * 20 + list(records))
    kind = rng.randrange(12)
    if kind == 0:
        del records[name]
    elif kind == 1:
        records[rng.choice(list(records))] = records.pop(name)
    elif kind < 5:
        records[name] = of_text(rng, records[name])
    else:
        records[name] = of_bytes(rng, records[name])
    new = io.BytesIO()
    with zipfile.ZipFile(new, "w") as file:
        for name, content in records.items():
            file.writestr(name, content)
    return new.getvalue()


def _checkpoints(folder: Path) -> list[bytes]:
    import torch

    from hpc_xvr import checkpoint

    weights = _tiny_weights()
    state = {
        "step": 3,
        "model": weights,
        "ema": dict(weights),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "config": _tiny_config().model_dump(mode="json"),
        "best": {"step": 3, "psnr": 30.0},
    }
    path = folder / "step-000000003.pt"
    checkpoint.save(state, path)
    data = path.read_bytes()
    return [data[: -checkpoint._COMMENT - 2] + b"\0\0"]  # an ordinary torch file


def _seal(rng: Random, data: bytes) -> bytes:
    """With a checksum that is right, as a rule."""
    from hpc_xvr import checkpoint

    if rng.random() < 0.05 or len(data) < 2:
        return data
    body = data[:-2]
    comment = checkpoint._MARK + hashlib.sha256(body).hexdigest().encode()
    return body + struct.pack("<H", len(comment)) + comment


def _checkpoint(folder: Path, data: bytes) -> None:
    from hpc_xvr import checkpoint, config
    from hpc_xvr.factory import weights
    from hpc_xvr.factory.build import build_model
    from hpc_xvr.train import run_folder

    run = folder / "resumed"
    path = checkpoint.path_of(run / "checkpoints", 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    cfg = _tiny_config()
    (run / "config.yaml").write_text(config.dump(cfg))
    problem = None
    for use in (
        lambda: weights.read_weights(path),
        lambda: weights.read_weights(run, "best"),
        lambda: run_folder.open_run(
            cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": run})}),
            True,
            build_model(cfg),
        ),
    ):
        try:
            use()
        except InputError as error:
            problem = error
    if problem:
        raise problem


# Archives.


def _archives(folder: Path) -> list[bytes]:
    import tifffile

    seeds = []
    for compression in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
        zipfile.ZIP_BZIP2,
    ):
        picture = io.BytesIO()
        tifffile.imwrite(picture, np.zeros((3, 8, 12), np.uint16), photometric="minisblack")
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", compression) as file:
            file.writestr("set/sharp/a.tif", picture.getvalue())
            file.writestr("set/read.txt", "hello " * 30)
        seeds.append(data.getvalue())
    return seeds


NAMES = (
    *(
        "../a",
        "/etc/x",
        "a/../../b",
        "C:/x",
        "a\\..\\..\\b",
        "",
        "/",
        ".",
        "..",
        "a/",
        "set",
        "a:b",
    ),
    *("a/" * 1200 + "b", "n" * 300, "n" * 5000, "a\0b", "a\nb", "ü" * 130, "set/sharp/a.tif/b"),
    *("a:b", "con", "\ud800", " ", "a/./b", "set/sharp/a.tif"),
)


def _change_archive(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    if rng.random() < 0.4:
        return of_bytes(rng, data, others)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            records = [(info, old.read(info)) for info in old.infolist()]
    except Exception:
        return of_bytes(rng, data, others)
    new = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(new, "w") as file:
        warnings.simplefilter("ignore")
        for info, content in records:
            made = zipfile.ZipInfo(info.filename)
            made.compress_type = info.compress_type
            if rng.random() < 0.5:
                made.filename = rng.choice(NAMES)
            if rng.random() < 0.2:
                made.external_attr = rng.choice((stat.S_IFLNK, stat.S_IFIFO, stat.S_IFDIR)) << 16
                content = rng.choice((b"/etc/passwd", b"../..", content))
            with contextlib.suppress(ValueError, OSError, UnicodeError):
                file.writestr(made, content)
    data = bytearray(new.getvalue())
    if rng.random() < 0.4:  # flags (encryption), method, sizes: in both headers
        at = {
            b"PK\3\4": {6: "H", 8: "H", 18: "I", 22: "I"},
            b"PK\1\2": {8: "H", 10: "H", 20: "I", 24: "I"},
        }
        which = rng.randrange(4)
        value = rng.choice((1, 8, 2**11, 9, 12, 14, 93, 99, *mutations.WORDS))
        for mark, fields in at.items():
            place = data.find(mark)
            offset, form = list(fields.items())[which]
            if place >= 0 and place + offset + 4 <= len(data):
                size = struct.calcsize(form)
                struct.pack_into("<" + form, data, place + offset, value % 2 ** (8 * size))
    return bytes(data)


def _archive(folder: Path, data: bytes) -> None:
    from hpc_xvr.data import fetch

    place = folder / "fetched"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "a.zip").write_bytes(data)
    unpacked = fetch.unpack(place / "a.zip", place / "files")
    assert {path.name for path in place.iterdir()} == {"a.zip", "files"}
    assert not [path for path in unpacked.rglob("*") if path.is_symlink()]
    fetch._two_streams(unpacked, 4)


# Cameras that describe themselves in text; the others are in test_camera_fuzz.py.


def _photron_headers(folder: Path) -> list[bytes]:
    from support.camera_files import counts, write_cihx, write_photron

    write_photron(folder, counts((3, 8, 12)), 12)
    cih = (folder / "run.cih").read_bytes()
    (folder / "run.cih").unlink()
    write_cihx(folder, counts((3, 8, 12)))
    cihx = (folder / "run.cihx").read_bytes()
    (folder / "run.cihx").unlink()
    return [cih, cih.decode().encode("utf-16"), cihx]


def _photron(folder: Path, data: bytes) -> None:
    from hpc_xvr.data.cameras import open_camera_file

    path = folder / ("run.cihx" if data.startswith(b"CIHX") else "run.cih")
    path.write_bytes(data)
    try:
        for _ in open_camera_file(path).frames():
            pass
    finally:
        path.unlink()


# Messages.


class _Ended(Exception):
    pass


def _messages(folder: Path) -> list[bytes]:
    return [
        b'["process 1 on n1", 7, "backward", 0.1]\n',
        b'["process 1 on n1", null, "starting", 0.0]\n["x", 8, "data", 1]\nleft\n',
        b"failed\n",
    ]


def _watched(folder: Path, data: bytes) -> None:
    """What a rank says, to rank 0's watch; no thread runs."""
    from hpc_xvr.distributed import watch as module
    from hpc_xvr.distributed.comm import Comm

    class Quiet(Comm):
        def abort(self, code: int) -> None:
            """Nothing to end."""

    server = socket.create_server(("127.0.0.1", 0))
    ours, theirs = socket.socketpair()
    with server, ours, theirs:
        watch = module._RootWatch(Quiet(0, 4), 5.0, server, b"k" * 32)
        watch._end_job = lambda message: None  # type: ignore[method-assign]
        ours.setblocking(False)
        peer = module._Peer(1, "unknown", 0.0, link=ours)
        watch._peers[1] = peer
        watch._events.register(ours, selectors.EVENT_READ, peer)
        for k in range(0, len(data), 1000):
            with contextlib.suppress(BrokenPipeError):
                theirs.sendall(data[k : k + 1000])
            if peer.link:
                watch._hear(peer)
                watch._stuck(time.perf_counter())
                watch._silent(time.perf_counter())
        f"{peer.place} {peer.position} {peer.name}".encode(errors="backslashreplace")
        watch._say(b".")
        watch._events.close()


def _greetings(folder: Path) -> list[bytes]:
    return [b"1 " + b"0" * 32 + b" " + b"0" * 64 + b"\n", b"hpc_xvr " + b"1" * 32 + b"\n4711 ab\n"]


def _greeted(folder: Path, data: bytes) -> None:
    """What a stranger says at the entrance, and in the place of rank 0."""
    from hpc_xvr.distributed.entrance import Entrance, _Visitor, enter

    events = selectors.DefaultSelector()
    server = socket.create_server(("127.0.0.1", 0))
    ours, theirs = socket.socketpair()
    with server, ours, theirs:
        entrance = Entrance(server, b"k" * 32, 4, events, "4711")
        ours.setblocking(False)
        visitor = _Visitor(ours, "0" * 32, time.monotonic())
        entrance._visitors[ours] = visitor
        key = events.register(ours, selectors.EVENT_READ, visitor)
        theirs.sendall(data[:4000])
        for _ in range(20):
            assert entrance.handle(key) is None, "a stranger was let in"
            if ours not in entrance._visitors:
                break
        entrance.close()
        events.close()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data[:4000])
        theirs.shutdown(socket.SHUT_WR)
        try:
            enter(ours, b"k" * 32, 1, 2.0)
        except OSError:
            return
        raise AssertionError("a stranger was believed")


TARGETS: dict[str, Target] = {
    "config": Target(_configs, _config, of_yaml, cost=5),
    "override": Target(_overrides, _override, of_yaml, cost=2),
    "registration": Target(
        lambda folder: [
            b"{scale: 2.92, origin: [34, 57]}",
            b"scale: 2.92\norigin: [34.5, 57]\nrotation_deg: 1.5\nflip: rows\n",
        ],
        _registration,
        of_yaml,
    ),
    "site": Target(
        lambda folder: [p.read_bytes() for p in sorted((ROOT / "hpc_xvr/submit/sites").iterdir())],
        _site,
        of_text,
    ),
    "journals": Target(_journals, _journal, of_json_lines, cost=4),
    "evaluation": Target(_evaluations, _evaluation, of_json, cost=2),
    "report": Target(_reports, _report, of_json_lines, cost=400),
    "corpus.json": Target(**_corpus_file("corpus.json"), change=of_json, cost=5),
    "manifest": Target(**_corpus_file("manifest.jsonl"), change=of_json_lines, cost=8),
    "zarr.json of a recording": Target(
        **_corpus_file("videos/v0/zarr.json"), change=of_json, cost=8
    ),
    "zarr.json of an array": Target(
        **_corpus_file("videos/v0/frames/zarr.json"), change=of_json, cost=8
    ),
    "shard": Target(**_corpus_file("videos/v0/frames/c/0/0/0"), mend=_index, cost=8),
    "foreign zarr": Target(_foreign_corpora, _foreign, _change_foreign, cost=12),
    "hdf5 clip": Target(**_corpus_file("videos/v0.h5", "hdf5"), cost=15),
    "safetensors": Target(
        _safetensors, _read_weights(".safetensors"), _change_safetensors, cost=20
    ),
    "torch": Target(_torch_files, _read_weights(".pth"), _change_torch, cost=20),
    "checkpoint": Target(_checkpoints, _checkpoint, _change_torch, _seal, cost=60),
    "archive": Target(_archives, _archive, _change_archive, cost=6),
    "photron header": Target(_photron_headers, _photron, of_text, cost=3),
    "watch": Target(_messages, _watched, of_json_lines),
    "entrance": Target(_greetings, _greeted, of_text, cost=2),
}


def judge(target: Target, folder: Path, data: bytes) -> tuple[str, str]:
    """(readable, ""), (refused, the error), or (a problem, where it is)."""
    begin = time.process_time()
    answer, where = "readable", ""
    try:
        target.read(folder, data)
    except InputError as error:
        answer, where = "refused", str(error)
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError) or "allocat" in str(cause):
                return f"memory: {cause!r:.200}", _place(cause)
            cause = cause.__cause__ or cause.__context__
        if "\n" in str(error) or len(str(error)) > LONGEST:
            return f"a message of {len(str(error))} characters", _place(error)
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}", _place(error)
    if (seconds := time.process_time() - begin) > SECONDS:
        return f"took {seconds:.1f} s", where[:100]
    return answer, where


def _place(error: BaseException) -> str:
    """Where in this program it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/hpc_xvr/" in f.filename] or frames[-1:]
    return f"{own[-1].filename.rpartition('/hpc_xvr/')[2]}:{own[-1].lineno} {own[-1].name}"


def _limited() -> None:
    """From now on this process may take ROOM more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logger = logging.getLogger("hpc_xvr")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    now = os.open(folder / "now", os.O_RDWR | os.O_CREAT, 0o600)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        name, first, count = line.rstrip("\n").rsplit(" ", 2)
        target = TARGETS[name]
        place = folder / name.replace(" ", "-")
        place.mkdir(exist_ok=True)
        if not target.seeds:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            target.seeds = target.prepare(place)
            for number, seed in enumerate(target.seeds, 1):
                whole = target.mend(Random(1), seed) if target.mend else seed
                answer, where = judge(target, place, whole)
                if answer != "readable":
                    problem = {"number": -number, "problem": f"sound, but {answer}", "where": where}
                    print(json.dumps(problem), file=answers, flush=True)
        _limited()
        seen = {"readable": 0, "refused": 0}
        for number in range(int(first), int(first) + int(count)):
            os.pwrite(now, b"%20d" % number, 0)
            data = target.input(name, number)
            faulthandler.dump_traceback_later(HANGS, exit=True)
            answer, where = judge(target, place, data)
            faulthandler.cancel_dump_traceback_later()
            if answer in seen:
                seen[answer] += 1
            else:
                problem = {"number": number, "problem": answer, "where": where}
                print(json.dumps(problem), file=answers, flush=True)
        print(json.dumps({"seen": seen}), file=answers, flush=True)


def one(name: str, number: int, folder: Path) -> Iterator[str]:
    """Read one input here, to look at what is wrong with it."""
    target = TARGETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    target.seeds = target.prepare(folder)
    data = target.input(name, number)
    yield repr(data[:3000])
    target.read(folder, data)
    yield "readable"


if __name__ == "__main__":
    main()
