"""Ends the job when a rank is lost, and names it.

Collectives wait for a rank that was killed, stopped or hangs, some of them for ever, and none of
them can tell which rank it was. So every rank but 0 keeps a TCP connection to rank 0, and a thread
at each end of it looks after the other. Rank 0 listens on a free port; all ranks learn the address
and a random secret over the collectives that work at the start, and prove to each other that they
know it before anything else is said or heard (see entrance.py).

    from    says                                  when                      the other end
    ------  ------------------------------------  ------------------------  ------------------------
    rank n  [where, step, doing, age]             at each new step, and     notes where rank n is
            where: process and host; age: for     every beat                since when
            how many seconds it has done that
    rank n  left                                  it ends in good order     expects nothing more
    rank n  failed                                it has said what failed   expects nothing more;
                                                  and ends the job          ends the job 2 s later
    rank 0  .                                     every beat                knows that rank 0 lives
    rank 0  B (bye)                               it ends in good order     stops watching
    rank 0  X (exit)                              the job ends              exits 1 s later

Lines of rank n are JSON or a word and end with a newline; rank 0 says single bytes. A beat is a
second, or an eighth of the time limit if that is less. Rank 0 ends the job when

- a connection closes without `left` or `failed`: the rank was killed;
- a rank is silent for the time limit: it was stopped, or its node is gone;
- no rank gets on for the time limit: the one furthest behind is named.

The others end it when they lose rank 0 in one of the first two ways. Outside of training they are
more patient. MPI_Abort ends the ranks; where there is no MPI, or it does not answer, each ends
itself.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpc_xvr.distributed.entrance import LOOPBACK, Entrance, connect, listen
from hpc_xvr.distributed.launch import Launch, discover
from hpc_xvr.errors import PASSING
from hpc_xvr.log import logger
from hpc_xvr.text import printable

if TYPE_CHECKING:
    from hpc_xvr.distributed.comm import Comm

EXIT_CODE = PASSING
# More patience outside of training: imports there hold up the process's other threads.
_STARTING_S = 60.0
_CONNECTING_S = 30.0
# What a rank does in a step, in that order: of ranks that wait for each other, the one that is
# furthest behind is the one the others wait for.
ORDER = ("data", "forward", "backward", "gradients", "update", "logging", "saving", "validation")
_MPI_S = 2.0  # seconds after a rank failed in which MPI, where there is one, ends the others
_LINE = 4096  # bytes; ranks say some 100 at a time
# The protocol's words.
_LEFT, _FAILED = b"left", b"failed"
_ALIVE, _BYE, _EXIT = b".", b"B", b"X"


def start_watch(comm: Comm, limit_s: float) -> Watch:
    """Watch over the ranks of `comm`, which all call it, with a time limit in seconds."""
    server = listen(_host(discover())) if comm.is_root else None
    told = (_address(server), secrets.token_bytes(32)) if server else None
    address, key = comm.broadcast(told)
    watch: Watch
    if server:
        watch = _RootWatch(comm, limit_s, server, key)
    else:
        try:
            link = connect(address, key, comm.rank, _CONNECTING_S)
        except OSError as error:
            logger.warning(
                "rank 0 cannot be reached at %s:%d (%s): if this rank is lost, the others "
                "will only see that nothing gets on",
                *address,
                error.strerror or error,
            )
            return Watch(comm, limit_s)
        watch = _RankWatch(comm, limit_s, link)
    watch.start()
    return watch


class Watch:
    """What both ends share. By itself it watches nothing: for a rank that cannot reach rank 0."""

    def __init__(self, comm: Comm, limit_s: float) -> None:
        # The watch's threads run while a collective waits, however long dist.timeout_s lets it.
        self._comm, self._limit = comm, min(limit_s, 3600.0)
        self._beat = min(1.0, limit_s / 8)
        self._where = f"process {os.getpid()} on {socket.gethostname()}"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._awake = time.perf_counter()  # when the thread last ran

    def start(self) -> None:
        """Begin to watch; the end of this process in good order will be announced."""
        self._thread.start()
        atexit.register(self.stop)

    def tell(self) -> None:
        """Let the other end know where this rank is, unless that was done a moment ago."""

    def stop(self, failed: bool = False) -> None:
        """Say goodbye; safe to call twice. `failed`: this rank has said why and ends the job."""
        self._stopping.set()

    def _run(self) -> None:
        """Watch the other end until this one stops or the job has to end."""

    def _patience(self, step: int | None) -> float:
        """Seconds for which a rank in that step may be silent."""
        return self._limit + (0 if step else _STARTING_S)

    def _was_stopped(self, now: float) -> bool:
        """Was this process itself stopped since the last call, maybe with all others?"""
        asleep, self._awake = now - self._awake, now
        return asleep > self._limit / 2 + self._beat

    def _end_job(self, message: str | None) -> None:
        """Print what happened and end every rank; does not return."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if message:
            advice = "all ranks are ended; --resume goes on from the newest checkpoint"
            print(f"hpc-xvr: error: {printable(message)}; {advice}", file=sys.stderr, flush=True)
        self._say(_EXIT)
        self._comm.leave_record()
        threading.Thread(target=self._comm.abort, args=(EXIT_CODE,), daemon=True).start()
        time.sleep(3)  # should MPI not answer
        os._exit(EXIT_CODE)

    def _say(self, what: bytes) -> None:
        """To all at the other ends; only rank 0 has something to say to them."""


class _RankWatch(Watch):
    """A rank other than 0: tells rank 0 that it lives, and looks whether rank 0 does."""

    def __init__(self, comm: Comm, limit_s: float, link: socket.socket) -> None:
        super().__init__(comm, limit_s)
        self._link = link
        # Rank 0 can hear a few thousand lines a second from all ranks together.
        self._pause = max(0.02, comm.size / 2000)
        self._told = 0.0
        self._lock = threading.Lock()

    def start(self) -> None:
        self.tell()
        super().start()

    def tell(self) -> None:
        now = time.perf_counter()
        if now - self._told < self._pause:
            return
        with self._lock:
            if self._stopping.is_set():
                return
            self._told = now
            place = self._comm.place
            line = [self._where, place.step, place.doing, round(now - place.since, 3)]
            with contextlib.suppress(OSError):
                self._link.send(json.dumps(line).encode() + b"\n")

    def stop(self, failed: bool = False) -> None:
        if self._stopping.is_set():
            return
        with self._lock:
            self._stopping.set()
            with contextlib.suppress(OSError):
                self._link.send((_FAILED if failed else _LEFT) + b"\n")

    def _run(self) -> None:
        heard = time.perf_counter()
        self._link.settimeout(self._beat)
        while not self._stopping.is_set():
            self.tell()
            said = self._hear()
            now = time.perf_counter()
            if self._was_stopped(now):
                heard = now
            if self._stopping.is_set() or (said and _BYE in said):
                return
            if said and _EXIT in said:
                self._comm.leave_record()
                time.sleep(1)  # rank 0 ends the job for all
                os._exit(EXIT_CODE)
            if said:
                heard = now
            if said == b"":
                self._lost("died")
            elif now - heard > (patience := self._patience(self._comm.place.step)):
                self._lost(f"has given no sign of life for {patience:g} s")

    def _hear(self) -> bytes | None:
        """What rank 0 says within a beat: None if nothing, empty if the connection is broken."""
        try:
            return self._link.recv(64)
        except TimeoutError:
            return None
        except OSError:
            return b""

    def _lost(self, how: str) -> None:
        """Rank 0 is gone: rank 1 says so; if it is gone too, the next one does."""
        rank = self._comm.rank
        time.sleep(min(0.2 * (rank - 1), 3.0))
        step = self._comm.place.step
        where = f", about when this rank was in step {step}" if step else ""
        self._end_job(f"[rank {rank}] rank 0 {how}{where}")


@dataclass
class _Peer:
    """What rank 0 knows of a rank."""

    rank: int
    where: str  # process and host
    heard: float
    step: int | None = None
    doing: str = "starting"
    since: float = 0.0
    link: Any = None
    text: bytes = field(default=b"", repr=False)  # the beginning of a line

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.where})"

    @property
    def place(self) -> str:
        return f"in step {self.step} ({self.doing})" if self.step else f"({self.doing})"

    @property
    def position(self) -> tuple[int, int]:
        return self.step or 0, ORDER.index(self.doing) if self.doing in ORDER else len(ORDER)

    @property
    def left(self) -> bool:
        return self.doing == "left"


class _RootWatch(Watch):
    """Rank 0: hears from all ranks, itself included, and judges."""

    def __init__(self, comm: Comm, limit_s: float, server: socket.socket, key: bytes) -> None:
        super().__init__(comm, limit_s)
        self._farewell = _BYE
        self._resumed = 0.0  # when this process last went on after it had been stopped
        self._failed_at: float | None = None  # when a rank said so
        self._me = _Peer(0, self._where, time.perf_counter())
        self._peers = {0: self._me}
        self._events = selectors.DefaultSelector()
        self._entrance = Entrance(server, key, comm.size, self._events)

    def stop(self, failed: bool = False) -> None:
        if self._stopping.is_set():
            return
        self._farewell = _EXIT if failed else _BYE
        self._stopping.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(2)  # it says goodbye to the others

    def _run(self) -> None:
        told = time.perf_counter()
        while not self._stopping.is_set():
            for key, _ in self._events.select(self._beat / 2):
                if self._entrance.owns(key):
                    self._admit(key)
                else:
                    self._hear(key.data)
            self._entrance.tidy()
            now = time.perf_counter()
            if self._was_stopped(now):
                self._resumed = now
                for peer in self._peers.values():
                    peer.heard = now
            self._look_at_myself(now)
            problem = self._silent(now) or self._stuck(now)
            failed = self._failed_at is not None and now - self._failed_at > _MPI_S
            if problem or failed:
                self._end_job(problem)
            if now - told > self._beat:
                self._say(_ALIVE)
                told = now
        self._say(self._farewell)

    # Listening.

    def _admit(self, event: selectors.SelectorKey) -> None:
        guest = self._entrance.handle(event)
        if guest is None:
            return
        if guest.rank in self._peers:  # there is one of each
            guest.link.close()
            return
        peer = _Peer(guest.rank, "unknown", time.perf_counter(), link=guest.link)
        self._peers[guest.rank] = peer
        self._events.register(guest.link, selectors.EVENT_READ, peer)

    def _hear(self, peer: _Peer) -> None:
        try:
            data = peer.link.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        peer.heard = time.perf_counter()
        *lines, peer.text = (peer.text + data).split(b"\n")
        understood = len(peer.text) <= _LINE and all(self._understand(one, peer) for one in lines)
        if not data or not understood:
            self._hang_up(peer)
            self._broken(peer)

    def _understand(self, line: bytes, peer: _Peer) -> bool:
        """Note what a rank says; False if it makes no sense."""
        if line == _LEFT:
            peer.doing = "left"
            return True
        if line == _FAILED:
            peer.doing = "left"
            self._failed_at = self._failed_at or peer.heard
            return True
        try:
            where, step, doing, age = json.loads(line[:_LINE])
            if step is not None:
                step = int(step)
            if not math.isfinite(age):
                return False
        except (ValueError, TypeError, OverflowError, RecursionError):
            return False
        peer.where, peer.step, peer.doing = str(where), step, str(doing)
        peer.since = peer.heard - age
        return True

    def _hang_up(self, peer: _Peer) -> None:
        self._events.unregister(peer.link)
        peer.link.close()
        peer.link = None

    def _look_at_myself(self, now: float) -> None:
        me, place = self._me, self._comm.place
        me.heard, me.step, me.doing, me.since = now, place.step, place.doing, place.since

    def _say(self, what: bytes) -> None:
        for peer in list(self._peers.values()):
            if peer.link:
                with contextlib.suppress(OSError):
                    peer.link.send(what)

    # Judging.

    def _broken(self, peer: _Peer) -> None:
        """A connection has closed: without a goodbye the rank was killed."""
        if peer.left or self._stopping.is_set():
            return
        # It may have got on since its last line, but not past what needs all ranks.
        mine = self._comm.place.step
        if mine and peer.step and mine - 1 > peer.step:
            peer.step, peer.doing = mine - 1, "unknown"
        self._end_job(f"{peer.name} died {peer.place}")

    def _silent(self, now: float) -> str | None:
        for peer in self._peers.values():
            patience = self._patience(peer.step)
            if not peer.left and peer.link and now - peer.heard > patience:
                return (
                    f"{peer.name} has given no sign of life for {patience:g} s; it was {peer.place}"
                )
        return None

    def _stuck(self, now: float) -> str | None:
        """While training, some rank must move on within the limit."""
        peers = list(self._peers.values())
        here = [peer for peer in peers if not peer.left]
        if any(not peer.step for peer in here):
            return None
        # A little longer than `_silent`, which knows better who it is.
        limit = self._limit + 2 * self._beat
        if any(now - max(peer.since, self._resumed) < limit for peer in here):
            return None
        least = min(peer.position for peer in peers)
        behind = [peer for peer in peers if peer.position == least]
        if len(behind) == len(peers):
            return f"no rank has got on for {self._limit:g} s; all are {behind[0].place}"
        names = ", ".join(peer.name for peer in behind[:5]) + (" ..." if len(behind) > 5 else "")
        return (
            f"no rank has got on for {self._limit:g} s; the others wait for {names} "
            f"{behind[0].place}"
        )


def _host(launch: Launch) -> str:
    """By which name the others know this node."""
    one_node = launch.size in (1, launch.local_size)
    return LOOPBACK if one_node else socket.gethostname()


def _address(server: socket.socket) -> tuple[str, int]:
    """Where the others reach it."""
    interface, port = server.getsockname()
    return (socket.gethostname() if interface == "0.0.0.0" else interface), port
