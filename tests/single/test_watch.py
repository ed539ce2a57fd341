"""What rank 0 makes of what the other ranks say. Lost ranks are in test_failures.py."""

import contextlib
import json
import resource
import socket
import threading
import time
from pathlib import Path

import pytest

from hpc_xvr.distributed.comm import Comm
from hpc_xvr.distributed.entrance import connect, enter, listen
from hpc_xvr.distributed.watch import EXIT_CODE, _RootWatch

KEY = b"a5" * 16
LIMIT = 0.8  # seconds; a beat is 0.1


class Ended(Comm):
    """Notes that the job would be ended, in place of ending this process."""

    code = None

    def abort(self, code):
        self.code = code


@pytest.fixture
def rank0(monkeypatch):
    monkeypatch.setattr("hpc_xvr.distributed.watch.os._exit", lambda code: None)
    monkeypatch.setattr("hpc_xvr.distributed.watch._STARTING_S", 0.0)
    server = listen("127.0.0.1")
    watch = _RootWatch(Ended(0, 8), LIMIT, server, KEY)
    watch.address = ("127.0.0.1", server.getsockname()[1])
    watch.start()
    yield watch
    watch.stop()
    watch._thread.join()  # or it would end this process after all
    server.close()


def says(rank, step, doing="forward", age=0.0):
    return json.dumps([f"process {rank}", step, doing, age]).encode() + b"\n"


def connected(watch, rank, *said):
    link = connect(watch.address, KEY, rank, 5)
    for words in said:
        link.sendall(words)
    return link


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def hears_nothing_more(link):
    """Has rank 0 hung up?"""
    link.settimeout(2)
    with contextlib.suppress(ConnectionResetError):
        return link.recv(64) == b""
    return True


def test_a_rank_is_known_by_what_it_says_and_hears_that_rank_0_lives(rank0):
    text = says(3, 7, "backward")
    with connected(rank0, 3, text[:10], text[10:]) as link:  # lines may come in pieces
        assert until(lambda: 3 in rank0._peers and rank0._peers[3].step)
        assert rank0._peers[3].name == "rank 3 (process 3)"
        assert rank0._peers[3].place == "in step 7 (backward)"
        link.settimeout(2)
        assert link.recv(1) == b"."
        link.sendall(says(3, 8, "data"))
        assert until(lambda: rank0._peers[3].position == (8, 0))
        link.sendall(b"left\n")
        assert until(lambda: rank0._peers[3].left)
    time.sleep(0.3)
    assert rank0._comm.code is None, "it has said goodbye"


@pytest.mark.parametrize(
    "words",
    [
        b"failed\n",
        b"left\n",
        says(1, 1),
        b"GET / HTTP/1.1\r\n\r\n",
        b"5\n",
        b"[" * 5000 + b"\n",
        b"a" * 10_000,
        b"1 2 3\n",
        b"1 " + b"0" * 32 + b" " + b"0" * 64 + b"\n",
        b"\xff\xfe\n",
        b"\n",
        b"",
    ],
)
def test_a_stranger_is_hung_up_on_and_ends_nothing(words, rank0):
    with socket.create_connection(rank0.address, timeout=5) as link:
        assert link.recv(100).startswith(b"hpc_xvr "), "a challenge, and nothing about the job"
        link.sendall(words)
        if not words:
            link.shutdown(socket.SHUT_WR)
        assert hears_nothing_more(link)
    with connected(rank0, 2, says(2, 5)):
        assert until(lambda: 2 in rank0._peers), "rank 0 still listens"
        assert list(rank0._peers) == [0, 2]
        assert rank0._comm.code is None
        rank0._peers[2].doing = "left"


def test_a_connection_that_breaks_ends_the_job_and_the_others_are_told(rank0, capfd):
    with connected(rank0, 1, says(1, 5)) as other:
        assert until(lambda: 1 in rank0._peers)
        connected(rank0, 2, says(2, 4, "gradients")).close()
        assert until(lambda: rank0._comm.code == EXIT_CODE)
        assert "rank 2 (process 2) died in step 4 (gradients); all ranks are ended" in (
            capfd.readouterr().err
        )
        other.settimeout(2)
        heard = other.recv(64)
        assert heard.endswith(b"X")


def test_a_silent_rank_ends_the_job(rank0, capfd):
    with connected(rank0, 4, says(4, 2)):
        assert until(lambda: rank0._comm.code == EXIT_CODE)
        told = capfd.readouterr().err
    assert "rank 4 (process 4) has given no sign of life for 0.8 s; it was in step 2" in told


def test_ranks_that_get_nowhere_end_the_job_and_the_one_behind_is_named(rank0, capfd):
    rank0._comm.mark(3, "gradients")
    with connected(rank0, 1) as first, connected(rank0, 2) as second:
        begin = time.monotonic()
        while rank0._comm.code is None and time.monotonic() < begin + 5:
            age = time.monotonic() - begin
            first.sendall(says(1, 3, "gradients", age=age))
            second.sendall(says(2, 3, "forward", age=age))
            time.sleep(0.05)
        told = capfd.readouterr().err
    assert "no rank has got on for 0.8 s; the others wait for rank 2 (process 2) in step 3" in told


def test_rank_0_says_goodbye_and_others_that_fail_are_given_time_to_say_why(rank0):
    with connected(rank0, 1, says(1, 5), b"failed\n") as link:
        assert until(lambda: 1 in rank0._peers and rank0._peers[1].left)
        rank0.stop()
        link.settimeout(2)
        assert link.recv(64).endswith(b"B")
    assert rank0._comm.code is None


def test_a_rank_that_fails_without_mpi_ends_the_job_once_however_often_it_says_so(
    rank0, monkeypatch
):
    monkeypatch.setattr("hpc_xvr.distributed.watch._MPI_S", 0.2)
    before = threading.active_count()
    with connected(rank0, 1, says(1, 5), b"failed\n" * 2000):
        assert until(lambda: 1 in rank0._peers and rank0._peers[1].left)
        assert threading.active_count() <= before
        assert until(lambda: rank0._comm.code == EXIT_CODE)


def test_a_rank_that_is_there_already_cannot_be_replaced(rank0):
    with connected(rank0, 1, says(1, 5)) as link:
        assert until(lambda: 1 in rank0._peers and rank0._peers[1].step)
        with connected(rank0, 1, says(1, 9)) as second:
            assert hears_nothing_more(second)
        assert rank0._peers[1].step == 5
        link.sendall(b"left\n")
        assert until(lambda: rank0._peers[1].left)


def test_a_rank_that_is_none_of_this_job_may_not_enter(rank0):
    for rank in (0, -1, 8):
        with (
            socket.create_connection(rank0.address, timeout=5) as link,
            pytest.raises(OSError, match="rank 0 of this job"),
        ):
            enter(link, KEY, rank, 5)


def test_the_secret_does_not_travel_and_an_old_proof_is_worth_nothing(rank0):
    """A stranger who has heard all that a rank said, and says it again."""
    heard = []

    class Overheard(socket.socket):
        def sendall(self, data, *flags):
            heard.append(bytes(data))
            return super().sendall(data, *flags)

    with Overheard() as link:
        link.connect(rank0.address)
        enter(link, KEY, 4, 5)
        link.sendall(b"left\n")
        assert until(lambda: 4 in rank0._peers and rank0._peers[4].left)
    assert KEY.hex().encode() not in heard[0] and KEY not in heard[0]
    with socket.create_connection(rank0.address, timeout=5) as link:
        link.recv(100)
        link.sendall(heard[0].replace(b"4 ", b"5 ", 1))
        assert hears_nothing_more(link)
    with socket.create_connection(rank0.address, timeout=5) as link:
        link.recv(100)
        link.sendall(heard[0])
        assert hears_nothing_more(link)


def test_a_rank_does_not_believe_a_stranger_in_rank_0_s_place():
    server = socket.create_server(("127.0.0.1", 0))

    def pretend():
        link, _ = server.accept()
        with link:
            link.sendall(b"hpc_xvr " + b"0" * 32 + b"\n")
            link.recv(1000)
            link.sendall(b"4711 " + b"0" * 64 + b"\n")

    threading.Thread(target=pretend, daemon=True).start()
    with (
        server,
        socket.create_connection(server.getsockname(), timeout=5) as link,
        pytest.raises(OSError, match="does not know the secret"),
    ):
        enter(link, KEY, 1, 5)


@pytest.fixture
def descriptors():
    """As many as 1,200 connections need, of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"a process may have only {hard} descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_crowd_of_silent_strangers_takes_no_descriptors_and_lets_ranks_in(rank0, descriptors):
    before = open_files()
    crowd = [socket.create_connection(rank0.address, timeout=5) for _ in range(1200)]
    try:
        time.sleep(0.3)
        assert open_files() - before - len(crowd) <= 65
        with connect(rank0.address, KEY, 2, 20) as link:
            link.sendall(says(2, 5) + b"left\n")
            assert until(lambda: 2 in rank0._peers and rank0._peers[2].left)
    finally:
        for link in crowd:
            link.close()
    assert rank0._comm.code is None


def test_without_descriptors_rank_0_goes_on_watching(rank0):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connected(rank0, 1, says(1, 5)) as rank:
        link = socket.socket()
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files(), limits[1]))
        try:
            link.connect(rank0.address)
            time.sleep(0.3)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        link.close()
        rank.sendall(says(1, 6) + b"left\n")
        assert until(lambda: rank0._peers[1].left)
    with connected(rank0, 2, says(2, 6), b"left\n"):
        assert until(lambda: 2 in rank0._peers and rank0._peers[2].left)
