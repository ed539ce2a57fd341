"""What rank 0 makes of what the other ranks say. Lost ranks are in test_failures.py."""

import contextlib
import json
import socket
import time

import pytest

from hpc_xvr.distributed.comm import Comm
from hpc_xvr.distributed.watch import _listen, _RootWatch

TOKEN = "a5" * 8
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
    server = _listen()
    watch = _RootWatch(Ended(), LIMIT, server, TOKEN)
    watch.address = ("127.0.0.1", server.getsockname()[1])
    watch.start()
    yield watch
    watch.stop()
    watch._thread.join()  # or it would end this process after all
    server.close()


def says(rank, step, doing="forward", token=TOKEN, age=0.0):
    line = [token, rank, f"process {rank}", step, doing, age]
    return json.dumps(line).encode() + b"\n"


def connected(watch, *said):
    link = socket.create_connection(watch.address, timeout=5)
    for words in said:
        link.sendall(words)
    return link


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
    with connected(rank0, text[:10], text[10:]) as link:  # lines may come in pieces
        assert until(lambda: 3 in rank0._peers)
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
    "words", [says(1, 1, token="b6" * 8), b"GET / HTTP/1.1\r\n\r\n", b"5\n", b"[1, 2]\n", b"\n"]
)
def test_somebody_else_s_program_is_hung_up_on_and_ends_nothing(words, rank0):
    with connected(rank0, words) as link:
        assert hears_nothing_more(link)
    with connected(rank0, says(2, 5)):
        assert until(lambda: 2 in rank0._peers), "rank 0 still listens"
        assert list(rank0._peers) == [0, 2]
        assert rank0._comm.code is None
        rank0._peers[2].doing = "left"


def test_a_connection_that_breaks_ends_the_job_and_the_others_are_told(rank0, capfd):
    with connected(rank0, says(1, 5)) as other:
        assert until(lambda: 1 in rank0._peers)
        connected(rank0, says(2, 4, "gradients")).close()
        assert until(lambda: rank0._comm.code == 1)
        assert "rank 2 (process 2) died in step 4 (gradients); all ranks are ended" in (
            capfd.readouterr().err
        )
        other.settimeout(2)
        heard = other.recv(64)
        assert heard.endswith(b"X")


def test_a_silent_rank_ends_the_job(rank0, capfd):
    with connected(rank0, says(4, 2)):
        assert until(lambda: rank0._comm.code == 1)
        told = capfd.readouterr().err
    assert "rank 4 (process 4) has given no sign of life for 0.8 s; it was in step 2" in told


def test_ranks_that_get_nowhere_end_the_job_and_the_one_behind_is_named(rank0, capfd):
    rank0._comm.mark(3, "gradients")
    with connected(rank0) as first, connected(rank0) as second:
        begin = time.monotonic()
        while rank0._comm.code is None and time.monotonic() < begin + 5:
            age = time.monotonic() - begin
            first.sendall(says(1, 3, "gradients", age=age))
            second.sendall(says(2, 3, "forward", age=age))
            time.sleep(0.05)
        told = capfd.readouterr().err
    assert "no rank has got on for 0.8 s; the others wait for rank 2 (process 2) in step 3" in told


def test_rank_0_says_goodbye_and_others_that_fail_are_given_time_to_say_why(rank0):
    with connected(rank0, says(1, 5), b"failed\n") as link:
        assert until(lambda: 1 in rank0._peers and rank0._peers[1].left)
        rank0.stop()
        link.settimeout(2)
        assert link.recv(64).endswith(b"B")
    assert rank0._comm.code is None
