"""Who has gone silent: each rank tells rank 0 where it is, and the job ends when one is lost.

Collectives wait for a rank that was killed, stopped or hangs, some of them for ever, and none of
them can tell which rank it was. So a thread on every rank keeps a TCP connection to rank 0 and
sends a line with its step a few times a second at most. Rank 0 ends the job when

- a connection breaks without a goodbye: the rank was killed;
- a rank is silent for the time limit: it was stopped, or its node is gone;
- no rank gets on for the time limit: the one furthest behind is named.

The others watch rank 0 in the same way. MPI_Abort ends the ranks; where there is no MPI, or it
does not answer, each ends itself.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpc_xvr.distributed.launch import Launch, discover
from hpc_xvr.log import logger

if TYPE_CHECKING:
    from hpc_xvr.distributed.comm import Comm

EXIT_CODE = 1
# More patience outside of training: what is imported there keeps a process's other threads waiting.
_STARTING_S = 60.0
# What a rank does in a step, in that order: of ranks that wait for each other, the one that is
# furthest behind is the one the others wait for.
ORDER = ("data", "forward", "backward", "gradients", "update", "logging", "saving", "validation")
_BYE, _END = b"B", b"X"  # from rank 0: it leaves; the job ends


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
    text: bytes = field(default=b"", repr=False)

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.where})"

    @property
    def place(self) -> str:
        return f"in step {self.step} ({self.doing})" if self.step else f"({self.doing})"

    @property
    def position(self) -> tuple[int, int]:
        return self.step or 0, ORDER.index(self.doing) if self.doing in ORDER else len(ORDER)


class Watch:
    """Started on all ranks at once; `stop` says goodbye."""

    def __init__(self, comm: Comm, limit_s: float) -> None:
        # Threads breathe however long a collective may take: no reason to wait longer for one.
        self._comm, self._limit = comm, min(limit_s, 3600.0)
        self._beat = min(1.0, limit_s / 8)
        self._farewell = _BYE
        # Rank 0 can hear a few thousand lines a second from all ranks together.
        self._pause = max(0.02, comm.size / 2000)
        self._told = 0.0
        self._resumed = 0.0
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._where = f"process {os.getpid()} on {socket.gethostname()}"
        launch = discover()
        server = _listen() if comm.is_root else None
        address = (_address(launch), server.getsockname()[1]) if server else None
        address, self._token = comm.broadcast(
            (address, secrets.token_hex(8)) if comm.is_root else None
        )
        self._link: socket.socket | None = None
        if comm.is_root:
            work = threading.Thread(target=self._serve, args=(server,), daemon=True)
        else:
            try:
                self._link = socket.create_connection(address, timeout=20)
                self._link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                logger.warning(
                    "rank 0 cannot be reached at %s:%d (%s): if this rank is lost, the others "
                    "will only see that nothing gets on",
                    *address,
                    error.strerror or error,
                )
                return
            self.tell()
            work = threading.Thread(target=self._follow, daemon=True)
        self._thread = work
        work.start()
        atexit.register(self.stop)

    def tell(self) -> None:
        """Send this rank's place to rank 0, unless that was done a moment ago."""
        now = time.perf_counter()
        if self._link is None or now - self._told < self._pause:
            return
        with self._lock:
            if self._stopping.is_set():
                return
            self._told = now
            place = self._comm.place
            line = [self._token, self._comm.rank, self._where, place.step, place.doing]
            line.append(round(now - place.since, 3))
            with contextlib.suppress(OSError):
                self._link.send(json.dumps(line).encode() + b"\n")

    def stop(self, failed: bool = False) -> None:
        """Say goodbye; safe to call twice. `failed`: this rank has said why and ends the job."""
        if self._stopping.is_set():
            return
        with self._lock:
            self._farewell = _END if failed else _BYE
            self._stopping.set()
            if self._link is not None:
                with contextlib.suppress(OSError):
                    self._link.send(b"failed\n" if failed else b"left\n")
        if self._comm.is_root and threading.current_thread() is not self._thread:
            self._thread.join(2)  # it says goodbye to the others

    def _patience(self, step: int | None) -> float:
        return self._limit + (0 if step else _STARTING_S)

    # Ranks other than 0.

    def _follow(self) -> None:
        """Tell rank 0 that this rank lives, and look whether rank 0 does."""
        link, heard, last = self._link, time.perf_counter(), time.perf_counter()
        assert link is not None
        link.settimeout(self._beat)
        while not self._stopping.is_set():
            self.tell()
            try:
                said = link.recv(64)
            except TimeoutError:
                said = None
            except OSError:
                said = b""
            now = time.perf_counter()
            if now - last > self._limit / 2 + self._beat:
                heard = now  # this process was stopped itself, maybe with all others
            last = now
            if self._stopping.is_set() or (said and _BYE in said):
                return
            if said and _END in said:
                self._comm.leave_record()
                time.sleep(1)  # rank 0 ends the job for all
                os._exit(EXIT_CODE)
            if said:
                heard = now
            if said == b"" or now - heard > self._patience(self._comm.place.step):
                # Rank 1 speaks; if it is gone too, the next one does.
                time.sleep(min(0.2 * (self._comm.rank - 1), 3.0))
                step = self._comm.place.step
                where = f", about when this rank was in step {step}" if step else ""
                what = "died"
                if said != b"":
                    what = f"has given no sign of life for {self._patience(step):g} s"
                self._end(f"[rank {self._comm.rank}] rank 0 {what}{where}")

    # Rank 0.

    def _serve(self, server: socket.socket) -> None:
        """Listen to all ranks until this one stops or the job has to end."""
        peers: dict[int, _Peer] = {0: _Peer(0, self._where, time.perf_counter())}
        events = selectors.DefaultSelector()
        events.register(server, selectors.EVENT_READ)
        last = told = time.perf_counter()
        while not self._stopping.is_set():
            for key, _ in events.select(self._beat / 2):
                if key.fileobj is server:
                    link, _ = server.accept()
                    link.setblocking(False)
                    peer = _Peer(-1, "unknown", time.perf_counter(), link=link)
                    events.register(link, selectors.EVENT_READ, peer)
                else:
                    self._hear(key.data, peers, events)
            now = time.perf_counter()
            if now - last > self._limit / 2 + self._beat:
                self._resumed = now  # stopped ourselves, maybe with all others
                for peer in peers.values():
                    peer.heard = now
            last = now
            self._look_at_myself(peers[0], now)
            problem = self._silent(peers, now) or self._stuck(peers, now)
            if problem:
                self._end(problem, peers)
            if now - told > self._beat:
                self._answer(peers, b".")
                told = now
        self._answer(peers, self._farewell)

    def _look_at_myself(self, me: _Peer, now: float) -> None:
        place = self._comm.place
        me.heard, me.step, me.doing, me.since = now, place.step, place.doing, place.since

    def _hear(self, peer: _Peer, peers: dict[int, _Peer], events: Any) -> None:
        try:
            data = peer.link.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        now = time.perf_counter()
        peer.heard = now
        *lines, peer.text = (peer.text + data).split(b"\n")
        for line in lines:
            if line in (b"left", b"failed"):
                peer.doing = "left"
                if line == b"failed":
                    threading.Timer(2, self._end, (None, peers)).start()  # where there is no MPI
                continue
            try:
                token, rank, where, step, doing, age = json.loads(line)
            except ValueError:
                token = None
            if token != self._token:  # somebody else's program
                events.unregister(peer.link)
                peer.link.close()
                return
            peer.rank, peer.where, peer.step, peer.doing = rank, where, step, doing
            peer.since = now - age
            peers[rank] = peer
        if data:
            return
        events.unregister(peer.link)
        peer.link.close()
        peer.link = None
        if peer.doing == "left" or peer.rank < 0 or self._stopping.is_set():
            return
        # It may have got on since its last line, but not past what needs all ranks.
        mine = self._comm.place.step
        if mine and peer.step and mine - 1 > peer.step:
            peer.step, peer.doing = mine - 1, "unknown"
        self._end(f"{peer.name} died {peer.place}", peers)

    def _silent(self, peers: dict[int, _Peer], now: float) -> str | None:
        for peer in peers.values():
            patience = self._patience(peer.step)
            if peer.doing != "left" and peer.link and now - peer.heard > patience:
                return (
                    f"{peer.name} has given no sign of life for {patience:g} s; it was {peer.place}"
                )
        return None

    def _stuck(self, peers: dict[int, _Peer], now: float) -> str | None:
        """While training, some rank must move on within the limit."""
        if any(p.doing != "left" and not p.step for p in peers.values()):
            return None
        # A little longer than `_silent`, which knows better who it is.
        limit = self._limit + 2 * self._beat
        if any(
            now - max(p.since, self._resumed) < limit for p in peers.values() if p.doing != "left"
        ):
            return None
        least = min(p.position for p in peers.values())
        behind = [p for p in peers.values() if p.position == least]
        if len(behind) == len(peers):
            return f"no rank has got on for {self._limit:g} s; all are {behind[0].place}"
        names = ", ".join(p.name for p in behind[:5]) + (" ..." if len(behind) > 5 else "")
        return (
            f"no rank has got on for {self._limit:g} s; the others wait for {names} "
            f"{behind[0].place}"
        )

    def _answer(self, peers: dict[int, _Peer], what: bytes) -> None:
        for peer in peers.values():
            if peer.link:
                with contextlib.suppress(OSError):
                    peer.link.send(what)

    # The end.

    def _end(self, message: str | None, peers: dict[int, _Peer] | None = None) -> None:
        """Print what happened and end every rank; does not return."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if message:
            advice = "all ranks are ended; --resume goes on from the newest checkpoint"
            print(f"hpc-xvr: error: {message}; {advice}", file=sys.stderr, flush=True)
        self._answer(peers or {}, _END)
        self._comm.leave_record()
        threading.Thread(target=self._comm.abort, args=(EXIT_CODE,), daemon=True).start()
        time.sleep(3)  # should MPI not answer
        os._exit(EXIT_CODE)


def _listen() -> socket.socket:
    server = socket.socket()
    server.bind(("", 0))
    server.listen(1024)
    server.setblocking(False)
    return server


def _address(launch: Launch) -> str:
    one_node = launch.size in (1, launch.local_size)
    return "127.0.0.1" if one_node else socket.gethostname()
