"""What other users of the machine can do to a run, and what files of others can: nothing.

The table in docs/explanation/security.md names these tests. What strangers do at the ports of a run
is in test_watch.py.
"""

import errno
import io
import json
import os
import pickle
import re
import socket
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import safetensors.torch
import torch

from hpc_xvr import checkpoint, files
from hpc_xvr.cli.ending import run as run_cli
from hpc_xvr.config import load
from hpc_xvr.data.cameras import open_camera_file
from hpc_xvr.data.corpus import Corpus, DamagedVideo
from hpc_xvr.data.corpus.staging import Staging
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.registration import read_registration
from hpc_xvr.distributed import rendezvous
from hpc_xvr.distributed.comm import Comm
from hpc_xvr.distributed.launch import Launch
from hpc_xvr.errors import CollectiveError, InputError, PassingError
from hpc_xvr.factory import weights as weights_files
from hpc_xvr.factory.weights import FORMAT, open_model, read_weights
from hpc_xvr.files import private_folder, private_text, write_atomic
from hpc_xvr.submit.restart import newest_step
from support.paths import ROOT
from support.runs import a_corpus

STRANGER = 54321  # a user id that is nobody's
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="playing another user takes root")


def as_stranger(action):
    """What `action` returns, or the error it meets, when another user does it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(STRANGER)
        os.setuid(STRANGER)
        try:
            said = repr(action())
        except OSError as error:
            said = errno.errorcode[error.errno]
        os.write(write, said.encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(read, 1000).decode()
    os.close(read)
    os.close(write)
    return said


@pytest.fixture
def shared(tmp_path):
    """A folder that every user may write to, as /tmp."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    for above in (tmp_path, *tmp_path.parents[:2]):  # pytest's are for their user only
        if above != Path("/tmp"):
            above.chmod(above.stat().st_mode | 0o755)
    return folder


@pytest.fixture
def precious(tmp_path):
    """Files of the victim that an attack aims at."""
    folder = tmp_path / "precious"
    folder.mkdir()
    for name in (".profile", ".v0.12", "thesis.tex"):
        (folder / name).write_text(name)
    yield folder
    assert sorted(file.name for file in folder.iterdir()) == [".profile", ".v0.12", "thesis.tex"]
    assert all(file.read_text() == file.name for file in folder.iterdir())


# Folders that others can write to.


def staging_folder(corpus, disk):
    folder = Staging(corpus, ["v0"], disk).folder
    folder.rmdir()
    return folder


def test_staging_into_a_planted_link_is_refused(tmp_path, shared, precious):
    corpus = a_corpus(tmp_path / "c")
    staging_folder(corpus, shared).symlink_to(precious)
    with pytest.raises(InputError, match=r"data\.stage_dir .*: is a link; choose a folder of your"):
        Staging(corpus, ["v0"], shared)


@as_root
def test_staging_into_a_folder_that_a_stranger_has_made_is_refused(tmp_path, shared):
    corpus = a_corpus(tmp_path / "c")
    folder = staging_folder(corpus, shared)
    assert as_stranger(lambda: folder.mkdir()) == "None"
    with pytest.raises(InputError, match=f"belongs to user {STRANGER}"):
        Staging(corpus, ["v0"], shared)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_staging_into_a_folder_that_others_may_write_to_is_refused(mode, tmp_path, shared):
    corpus = a_corpus(tmp_path / "c")
    folder = staging_folder(corpus, shared)
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(InputError, match="may be written to by others"):
        Staging(corpus, ["v0"], shared)


def test_staging_where_every_user_could_exchange_the_folder_is_refused(tmp_path, shared):
    corpus = a_corpus(tmp_path / "c")
    shared.chmod(0o777)  # not sticky: everybody may rename what is in it
    with pytest.raises(InputError, match="every user could exchange it"):
        Staging(corpus, ["v0"], shared)


@as_root
def test_staging_in_a_folder_of_a_stranger_is_refused(tmp_path, shared):
    corpus = a_corpus(tmp_path / "c")
    os.chown(shared, STRANGER, STRANGER)
    with pytest.raises(InputError, match=f"in a folder of user {STRANGER}, who could exchange it"):
        Staging(corpus, ["v0"], shared)


@as_root
@pytest.mark.parametrize("store", ["zarr", "hdf5"])
def test_nobody_else_can_plant_copies_in_the_folder(store, tmp_path, shared):
    corpus = a_corpus(tmp_path / "c", store)
    old = os.umask(0)
    try:
        staging = Staging(corpus, ["v0", "v1"], shared)
        staging.copy(0, 1)
    finally:
        os.umask(old)
    assert stat.S_IMODE(staging.folder.stat().st_mode) == 0o700
    name = corpus.original("v0").name
    assert as_stranger(lambda: list(staging.folder.iterdir())) == "EACCES"
    assert as_stranger(lambda: (staging.folder / "planted").mkdir()) == "EACCES"
    assert as_stranger(lambda: (staging.folder / name).rename(shared / "mine")) == "EACCES"
    assert as_stranger(lambda: staging.folder.rename(shared / "mine")) in ("EPERM", "EACCES")


def test_only_leftovers_of_our_own_pattern_are_swept_and_links_are_not_followed(
    tmp_path, shared, precious
):
    corpus = a_corpus(tmp_path / "c")
    folder = Staging(corpus, ["v0"], shared).folder
    (folder / f".999999999-{'0' * 16}.partial").symlink_to(precious)
    (folder / ".999999999").mkdir()
    (folder / ".notes").write_text("mine")
    Staging(corpus, ["v0"], shared)
    assert sorted(path.name for path in folder.iterdir()) == [".999999999", ".notes"]


@pytest.mark.parametrize("store", ["zarr", "hdf5"])
def test_what_does_not_match_the_manifest_is_not_copied(store, tmp_path, shared, caplog):
    corpus = a_corpus(tmp_path / "c", store)
    clip = corpus.original("v0")
    with (clip / "frames/c/0/0/0" if clip.is_dir() else clip).open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    staging = Staging(corpus, ["v0"], shared)
    staging.copy(0, 1)
    assert list(staging.folder.iterdir()) == []
    assert "video v0: does not match the checksums in its manifest" in caplog.text


def exchange_a_chunk(shard):
    """Other values in the first chunk of a shard, and the CRC-32C that belongs to them."""
    data = bytearray(shard.read_bytes())
    size = 32 * 40 * 2
    data[:size] = bytes(size)
    data[size : size + 4] = google_crc32c.value(bytes(size)).to_bytes(4, "little")
    shard.write_bytes(data)


def with_crcs(corpus):
    """The corpus as older versions wrote it: CRC-32C of the files in the manifest."""
    manifest = corpus.path / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for entry in lines:
        clip = corpus.original(entry["id"])
        entry["files"] = {
            name: google_crc32c.value((clip if name == "." else clip / name).read_bytes())
            for name in entry["files"]
        }
    manifest.write_text("".join(json.dumps(e, separators=(",", ":")) + "\n" for e in lines))
    return Corpus(corpus.path)


def test_a_chunk_exchanged_with_its_checksum_is_noticed(tmp_path, shared, caplog):
    corpus = a_corpus(tmp_path / "c")
    shard = corpus.original("v0") / "frames/c/0/0/0"
    before = google_crc32c.value(shard.read_bytes())
    exchange_a_chunk(shard)
    assert not Corpus(corpus.path)["v0"].read(0).any(), "nothing seems wrong with it"
    assert google_crc32c.value(shard.read_bytes()) == before, "nor to the CRC-32C of the file"
    assert dict(corpus.verify())["v0"]
    staging = Staging(corpus, ["v0", "v1"], shared)
    staging.copy(0, 1)
    assert [path.name for path in staging.folder.iterdir()] == ["v1"]
    assert "video v0: does not match the checksums in its manifest" in caplog.text


@pytest.mark.parametrize("store", ["zarr", "hdf5"])
def test_older_corpora_are_compared_with_their_own_checksums(store, tmp_path, shared, caplog):
    corpus = with_crcs(a_corpus(tmp_path / "c", store))
    assert all(isinstance(one, int) for one in corpus.checksums("v0").values())
    assert not any(problem for _, problem in corpus.verify())
    clip = corpus.original("v1")
    with (clip / "frames/c/0/0/0" if clip.is_dir() else clip).open("r+b") as file:
        file.write(b"!")
    staging = Staging(corpus, ["v0", "v1"], shared)
    staging.copy(0, 1)
    assert [path.stem for path in staging.folder.iterdir()] == ["v0"]
    with CorpusWriter(corpus.path, store) as writer:
        writer.move(["v0"], "test")
    again = Corpus(corpus.path)
    assert {type(one) for one in again.checksums("v0").values()} == (
        {int, str} if store == "zarr" else {str}
    )
    assert dict(again.verify())["v0"] is None


def test_a_link_where_a_partial_file_is_to_be_is_not_written_through(
    tmp_path, precious, monkeypatch
):
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "0" * 2 * n)  # a stranger who knows
    for suffix in (".json", ".tif"):
        path = tmp_path / f"table{suffix}"
        beside = tmp_path / f".table.{'0' * 16}.partial{suffix}"
        beside.symlink_to(precious / "thesis.tex")
        with pytest.raises(InputError, match="File exists"):
            write_atomic(path, lambda file: file.write(b"overwritten"))
        with pytest.raises(InputError, match="File exists"), files.replacing(path) as name:
            name.write_bytes(b"overwritten")
        assert not path.exists()


def test_partial_files_have_names_that_nobody_can_foretell_and_leave_nothing(tmp_path):
    names = []
    for _ in range(3):
        with files.replacing(tmp_path / "a.txt") as beside:
            names.append(beside.name)
            beside.write_text("x")
    assert len(set(names)) == 3 and all(len(name) > len(".a..partial.txt") + 15 for name in names)
    with pytest.raises(RuntimeError), files.replacing(tmp_path / "b.txt"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_stray_folder_among_leftovers_stops_nothing(tmp_path):
    (tmp_path / ".x.partial").mkdir()
    (tmp_path / ".y.partial").write_text("")
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".x.partial"]


def test_a_lock_or_a_download_is_not_written_through_a_link(tmp_path, precious):
    (tmp_path / "c").mkdir()
    (tmp_path / "c/.lock").symlink_to(precious / "thesis.tex")
    with pytest.raises(InputError, match="symbolic links"):
        CorpusWriter(tmp_path / "c")
    for name, opened in (("a", "ab"), ("w", "wb")):
        part = tmp_path / f"{name}.part"
        part.symlink_to(precious / "thesis.tex")
        if opened == "ab":
            with pytest.raises(InputError, match="is a link; remove it"):
                files.open_own(part, opened)
        else:
            with files.open_own(part, opened) as file:
                file.write(b"a new file")
            assert not part.is_symlink()


def test_a_simulation_is_not_continued_in_a_folder_of_others(tmp_path, precious):
    from hpc_xvr.data.simulate.corpus import simulate_if_missing

    config = load(None, ["simulate.videos=1", "simulate.size=[4, 32, 32]"])
    (tmp_path / ".corpus.building").symlink_to(precious)
    with pytest.raises(InputError, match="is a link; remove it"):
        simulate_if_missing(config.simulate, tmp_path / "corpus")


# Secrets of the ranks.


def test_the_secret_of_the_ranks_is_a_file_of_the_user_alone(tmp_path):
    environment = {"XDG_CONFIG_HOME": str(tmp_path / "config"), "SLURM_JOB_ID": "1"}
    key = rendezvous.job_key(environment)
    file = tmp_path / "config/hpc_xvr/secret"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert rendezvous.job_key(environment) == key
    assert rendezvous.job_key({**environment, "SLURM_JOB_ID": "2"}) != key
    assert [path.name for path in file.parent.iterdir()] == ["secret"]
    file.chmod(0o644)
    with pytest.raises(InputError, match=r"read by others; .* set HPC_XVR_SECRET"):
        rendezvous.job_key(environment)
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="symbolic links"):
        rendezvous.job_key(environment)


@as_root
def test_a_secret_that_a_stranger_has_planted_is_refused(tmp_path):
    private_folder(tmp_path / "hpc_xvr")
    (tmp_path / "hpc_xvr/secret").write_text("known to a stranger")
    os.chown(tmp_path / "hpc_xvr/secret", STRANGER, STRANGER)
    with pytest.raises(InputError, match=f"belongs to user {STRANGER}"):
        private_text(tmp_path / "hpc_xvr/secret", "fresh")


def test_processes_that_make_the_secret_at_once_agree_on_it(tmp_path):
    code = f"""
import sys
from pathlib import Path
from hpc_xvr.files import private_text
sys.stdin.readline()
print(private_text(Path({str(tmp_path / "secret")!r}), sys.argv[1]))
"""
    several = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for one in several:
        one.stdin.write("go\n")
        one.stdin.flush()
    said = {one.communicate(timeout=60)[0] for one in several}
    assert len(said) == 1 and said != {""}


# Ports: the rendezvous without MPI. The watch over the ranks is in test_watch.py.


def test_ranks_meet_among_strangers_and_are_counted_themselves(monkeypatch):
    """Three who say nothing, one bad byte, and a rank that asks twice."""
    me = {"HPC_XVR_SECRET": "open sesame", "MASTER_ADDR": "127.0.0.1", "SLURM_JOB_ID": "77"}
    key = rendezvous.job_key(me)
    rendezvous._announce("127.0.0.1", key, 3, 4711, me)
    address = ("127.0.0.1", rendezvous.ports(key, me)[0])
    silent = [socket.create_connection(address, timeout=5) for _ in range(3)]
    with socket.create_connection(address, timeout=5) as rude:
        rude.sendall(b"\xff\n")
    begin = time.monotonic()
    assert [rendezvous._ask("127.0.0.1", key, rank, me) for rank in (1, 1, 1, 2)] == [4711] * 4
    assert time.monotonic() - begin < 5
    for link in silent:
        link.close()
    time.sleep(0.5)
    with pytest.raises(OSError, match="refused"):  # all are there
        socket.create_connection(address, timeout=5)


def test_a_program_in_the_place_of_rank_0_is_not_believed(monkeypatch):
    monkeypatch.setattr(rendezvous, "_MEETING_S", 1.0)
    me = {"HPC_XVR_SECRET": "open sesame", "SLURM_JOB_ID": "78"}
    theirs = {"HPC_XVR_SECRET": "guessed", "SLURM_JOB_ID": "78"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = {"MASTER_PORT": str(free.getsockname()[1])}
    rendezvous._announce("127.0.0.1", rendezvous.job_key(theirs), 2, 666, {**theirs, **port})
    with pytest.raises(PassingError, match="rank 0 was not found"):
        rendezvous._ask("127.0.0.1", rendezvous.job_key(me), 1, {**me, **port})


def test_ports_that_are_all_in_use_are_trouble_of_the_moment():
    me = {"HPC_XVR_SECRET": "open sesame", "SLURM_JOB_ID": "79"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = {"MASTER_PORT": str(taken.getsockname()[1])}
        with pytest.raises(PassingError, match="all in use"):
            rendezvous._announce("127.0.0.1", rendezvous.job_key(me), 2, 1, {**me, **port})


def test_on_one_node_nothing_listens_to_the_network():
    from hpc_xvr.distributed.entrance import listen
    from hpc_xvr.distributed.watch import _address, _host

    with listen(_host(Launch("Open MPI", 0, 4, 0, 4))) as server:
        assert server.getsockname()[0] == "127.0.0.1"
    with listen(_host(Launch("Open MPI", 0, 4, 0, 2))) as server:
        found, told = server.getsockname()[0], _address(server)[0]
        assert told in (found, socket.gethostname()) and found != "127.0.0.1"


# Sizes and kinds that files state.


def weights_file(path, **model):
    about = {"format": FORMAT, "step": "1", "config": json.dumps({"model": model}), "version": "1"}
    path.write_bytes(safetensors.torch.save({"w": torch.zeros(1)}, about))
    return path


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"depths": [10**9]}, "depths are 1,000,000,000 blocks, at most 512"),
        ({"depths": [1] * 10**5}, "at most 64 items"),
        ({"depths": [512], "embed_dim": 8192, "heads": 8192, "window": 64}, "another architecture"),
        ({"embed_dim": 3 * 10**9}, "embed_dim"),
        ({"window": 10**6}, "window"),
        ({"mlp_ratio": 1e300}, "mlp_ratio"),
        ({"up_features": 10**9}, "up_features"),
        ({"name": "key_propagation", "depths": [2], "motions": 10**9}, "motions"),
        ({"name": "edvr", "depths": [10**9, 1], "heads": 8, "embed_dim": 64}, "depths"),
    ],
)
def test_a_small_file_that_asks_for_a_huge_model_is_refused_at_once(model, message, tmp_path):
    path = weights_file(tmp_path / "w.safetensors", **model)
    begin = time.monotonic()
    with pytest.raises(InputError, match=message) as problem:
        read_weights(path)
    assert "\n" not in str(problem.value)
    assert time.monotonic() - begin < 20


def expanded(path):
    """36 TB in 4 bytes."""
    torch.save({"conv_first.weight": torch.zeros(1).expand(3_000_000, 3_000_000)}, path)


def overstated(path):
    """A storage of seven numbers that is said to be one of 9e12."""
    data, huge = io.BytesIO(), b"\x8a\x06" + (9 * 10**12).to_bytes(6, "little")
    torch.save({"w": torch.zeros(7)}, data)
    with zipfile.ZipFile(data) as good, zipfile.ZipFile(path, "w") as bad:
        for record in good.infolist():
            text = good.read(record)
            if record.filename.endswith("data.pkl"):
                text = text.replace(b"K\x07t", huge + b"t").replace(b"K\x07\x85", huge + b"\x85")
                assert text.count(huge) == 2
            bad.writestr(record.filename, text)


def old_format(path):
    data, huge = io.BytesIO(), b"\x8a\x06" + (9 * 10**12).to_bytes(6, "little")
    torch.save({"w": torch.zeros(7)}, data, _use_new_zipfile_serialization=False)
    path.write_bytes(data.getvalue().replace(b"K\x07N", huge + b"N"))


def compressed(path):
    """200 MB in 200 kB."""
    data = io.BytesIO()
    torch.save({"w": torch.zeros(50_000_000)}, data)
    with (
        zipfile.ZipFile(data) as good,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bad,
    ):
        for record in good.infolist():
            bad.writestr(record.filename, good.read(record))


def a_stage_far_out(path):
    name = "layers.{}.residual_group.blocks.0."
    tensors = {
        name.format(0) + "attn.relative_position_bias_table": torch.zeros(9 * 225, 3),
        name.format(10**9) + "norm1.weight": torch.zeros(3),
        "conv_first.weight": torch.zeros(3, 1, 3, 3),
    }
    torch.save(tensors, path)


def many_frames(path):
    tensors = {
        "layers.0.residual_group.blocks.0.attn.relative_position_bias_table": torch.zeros(
            (2 * 4003 - 1) * 225, 1
        ),
        "layers.0.residual_group.blocks.0.norm1.weight": torch.zeros(3),
        "conv_first.weight": torch.zeros(3, 1, 3, 3),
    }
    torch.save(tensors, path)


def wide(path):
    """Each tensor is there, but the model that they stand for is of 40 GB."""
    tensors = {
        "conv_first.weight": torch.zeros(100_000, 1, 1, 1),
        "fusion.feat_fusion.weight": torch.zeros(1, 300_000, 1, 1),
        "pcd_align.cas_dcnpack.conv_offset.weight": torch.zeros(216, 1),
        "conv_hr.weight": torch.zeros(64, 1),
    }
    torch.save(tensors, path)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (expanded, r"states 36,000,000,000,000 bytes of tensors, but has 1,"),
        (overstated, r"states 36,000,000,000,000 bytes"),
        (old_format, "not readable as tensors"),
        (compressed, "compressed"),
        (a_stage_far_out, "lack stages"),
        (many_frames, "known window"),
        (wide, "fit no known model"),
    ],
)
def test_tensors_of_strangers_are_no_larger_than_their_file(plant, message, tmp_path):
    path = tmp_path / "w.pth"
    plant(path)
    code = f"""
import resource
import hpc_xvr.factory.weights as weights
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (8_000_000_000,) * 2)
try:
    weights.open_model(Path({str(path)!r}))
except weights.InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    assert re.search(message, line), line


def test_a_checkpoint_with_the_right_checksum_is_not_believed_either(tmp_path):
    path = checkpoint.path_of(tmp_path, 3)
    checkpoint.save({"step": 3, "model": {"w": torch.zeros(1).expand(10**6, 10**6)}}, path)
    with pytest.raises(checkpoint.CorruptCheckpoint, match="states 4,000,000,000,000 bytes"):
        checkpoint.load(path)


class Code:
    def __reduce__(self):
        return (print, ("code ran",))


def test_nobody_is_advised_to_let_a_file_run_its_code(tmp_path, capfd):
    path = tmp_path / "w.pth"
    for new in (True, False):
        torch.save({"model": Code()}, path, _use_new_zipfile_serialization=new)
        with pytest.raises(InputError, match="may bring code along; save the model's state_dict"):
            open_model(path)
        with pytest.raises(InputError) as problem:
            weights_files.initial_weights(torch.nn.Linear(1, 1), path)
        assert "weights_only" not in str(problem.value)
    path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(InputError) as problem:
        open_model(path)
    assert "weights_only" not in str(problem.value)
    assert "code ran" not in capfd.readouterr().out


def changed_json(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def restate(corpus, shape):
    """Another shape in the manifest."""
    file = corpus.path / "manifest.jsonl"
    file.write_text(file.read_text().replace("[9,32,40]", json.dumps(shape, separators=(",", ":"))))


def inner(tree, *chunk):
    tree["codecs"][0]["configuration"]["chunk_shape"] = list(chunk)


def outer(tree, *chunk):
    tree["chunk_grid"]["configuration"]["chunk_shape"] = list(chunk)


SHAPES = {
    "array larger than stated": (lambda m: m.update(shape=[9, 2**30, 2**30]), None),
    "frames beyond any camera": (lambda m: m.update(shape=[9, 2**30, 2**30]), [9, 2**30, 2**30]),
    "manifest alone": (lambda m: None, [9, 16384, 16384]),
    "many frames": (
        lambda m: (m.update(shape=[2**30, 32, 40]), outer(m, 2**30, 32, 40)),
        [2**30, 32, 40],
    ),
    "huge chunks": (lambda m: (inner(m, 1, 2**30, 2**30), outer(m, 9, 2**30, 2**30)), None),
    "huge shard": (lambda m: outer(m, 2**40, 32 * 2**10, 40 * 2**10), None),
    "chunks of nothing": (lambda m: inner(m, 1, 0, 0), None),
    "negative": (lambda m: m.update(shape=[9, -32, 40]), [9, -32, 40]),
    "no integer": (lambda m: m.update(shape=[9, 1e300, "40"]), None),
    "one chunk": (
        lambda m: (
            m.update(codecs=[{"name": "bytes", "configuration": {"endian": "little"}}]),
            outer(m, 9, 2**20, 2**20),
        ),
        None,
    ),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_of_a_corpus_are_believed_no_further_than_its_files_reach(case, tmp_path):
    change, stated = SHAPES[case]
    corpus = a_corpus(tmp_path / "c")
    changed_json(corpus.original("v0") / "frames/zarr.json", change)
    if stated:
        restate(corpus, stated)
    if case == "huge chunks":  # and an index that says so, too
        index = np.array([(0, 2**61 + 4)] * 9, "<u8").tobytes()
        shard = corpus.original("v0") / "frames/c/0/0/0"
        shard.write_bytes(index + google_crc32c.value(index).to_bytes(4, "little"))
    code = f"""
import resource
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.errors import InputError
resource.setrlimit(resource.RLIMIT_AS, (4_000_000_000,) * 2)
try:
    Corpus({str(corpus.path)!r})["v0"].read(0)
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    assert "video v0" in line


def test_an_hdf5_clip_does_not_read_other_files_or_what_was_never_stored(tmp_path):
    import h5py

    corpus = a_corpus(tmp_path / "c", "hdf5")
    (tmp_path / "private").write_bytes(bytes(range(256)) * 100)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["frames"] = np.full((9, 32, 40), 7, np.uint16)

    def external(file):
        store = [(str(tmp_path / "private"), 0, 9 * 32 * 40 * 2)]
        file.create_dataset("frames", (9, 32, 40), np.uint16, external=store)

    def virtual(file):
        layout = h5py.VirtualLayout((9, 32, 40), np.uint16)
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "frames", (9, 32, 40))
        file.create_virtual_dataset("frames", layout)

    def link(file):
        file["frames"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "frames")

    def never_stored(file):
        file.create_dataset("frames", (9, 32, 40), np.uint16, chunks=(1, 32, 40))

    for plant, message in [
        (external, "other files"),
        (virtual, "other files"),
        (link, "link to elsewhere"),
        (never_stored, "hardly anything is stored"),
    ]:
        with h5py.File(corpus.original("v0"), "r+") as file:
            del file["frames"]
            plant(file)
        with pytest.raises(DamagedVideo, match=message):
            Corpus(corpus.path)["v0"].read(0)


@pytest.fixture(params=["device", "pipe", "socket"])
def endless(request, tmp_path):
    """(make(name), its kind): something in the place of a file that may never end."""
    opened = []

    def plant(name):
        path = tmp_path / name
        path.unlink(missing_ok=True)
        if request.param == "device":
            path.symlink_to("/dev/zero")
        elif request.param == "pipe":
            os.mkfifo(path)
        else:
            opened.append(socket.socket(socket.AF_UNIX))
            opened[-1].bind(str(path))
        return path

    yield plant, f"is a {request.param}, not a file"
    for one in opened:
        one.close()


def test_inputs_that_are_no_files_are_refused_by_kind(endless):
    plant, message = endless
    for use, name in [
        (load, "config.yaml"),
        (read_weights, "weights.safetensors"),
        (read_weights, "weights.pt"),
        (open_model, "weights.pth"),
        (checkpoint.load, "step-000000001.pt"),
        (checkpoint.read_tensors, "w.pth"),
        (lambda path: weights_files.initial_weights(torch.nn.Linear(1, 1), path), "w.pth"),
        (lambda path: weights_files.initial_weights(None, path), "w.safetensors"),
        (lambda path: read_registration(str(path)), "registration.yaml"),
        *((open_camera_file, f"film{suffix}") for suffix in (".tif", ".png", ".h5", ".cine")),
        *((open_camera_file, f"film{suffix}") for suffix in (".dat", ".mraw", ".cihx")),
        (open_camera_file, "frame_0001.tif"),
        (lambda path: Corpus(path.parent), "corpus.json"),
    ]:
        with pytest.raises(InputError, match=message):
            use(plant(name))


def test_parts_of_a_corpus_that_are_no_files_are_refused(tmp_path, endless):
    plant, _ = endless
    for name in ("manifest.jsonl", "videos/v0/frames/zarr.json", "videos/v0/frames/c/0/0/0"):
        folder = tmp_path / name.replace("/", "-")
        corpus = a_corpus(folder)
        (corpus.path / name).unlink()
        path = plant("planted")
        path.rename(corpus.path / name)
        with pytest.raises(InputError):
            Corpus(folder)["v0"].read(0)


# Checkpoints.


def test_a_stray_folder_does_not_stop_pruning_or_count_as_progress(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in range(1, 6):
        checkpoint.save({"step": step}, checkpoint.path_of(folder, step))
    for step in (2, 999):
        checkpoint.path_of(folder, step).unlink(missing_ok=True)
        checkpoint.path_of(folder, step).mkdir()
    checkpoint.prune(folder, 2, 5)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step-{step:09d}.pt" for step in (2, 4, 5, 999)
    ]
    assert newest_step(tmp_path) == 5


# Exit codes.


def ends_with(error, monkeypatch, capsys):
    def command(**_):
        raise error

    with pytest.raises(SystemExit) as end:
        run_cli(command)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, 74),
        (errno.EDQUOT, 74),
        (errno.EMFILE, 74),
        (errno.EADDRINUSE, 74),
        (errno.ECONNRESET, 74),
        (errno.ENOENT, 2),
        (errno.EACCES, 2),
        (errno.EROFS, 2),
        (errno.EFBIG, 2),
    ],
)
def test_trouble_of_the_moment_is_told_from_bad_input(number, code, monkeypatch, capsys, tmp_path):
    error = OSError(number, os.strerror(number), "file")

    def write(file):
        raise error

    assert ends_with(error, monkeypatch, capsys)[0] == code
    with pytest.raises(InputError) as problem:
        write_atomic(tmp_path / "a", write)
    assert problem.value.exit_code == code
    with pytest.raises(InputError) as problem, files.disk_errors(tmp_path):
        raise error
    assert problem.value.exit_code == code
    told, line = ends_with(problem.value, monkeypatch, capsys)
    assert told == code and line.count("\n") == 1


def test_ranks_that_fail_together_keep_the_exit_code(monkeypatch, capsys):
    def full():
        raise PassingError("disk full")

    for way in (Comm().together, Comm().on_root):
        with pytest.raises(CollectiveError) as problem:
            way(full)
        assert ends_with(problem.value, monkeypatch, capsys)[0] == 74


def test_every_test_that_security_names_is_there():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/explanation/security.md").read_text()))
    there = {
        name
        for path in (ROOT / "tests/single").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 50
    assert named <= there, named - there
