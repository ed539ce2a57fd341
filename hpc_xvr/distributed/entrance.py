"""Who may speak at a port: only ranks of this job, which prove that they know its secret.

    from    says                                    proof
    ------  --------------------------------------  ------------------------------------------
    root    hpc_xvr CHALLENGE
    rank n  n CHALLENGE PROOF                       of both challenges and n
    root    WORD PROOF                              of both challenges, n and WORD

Each line ends with a newline. A proof is the HMAC-SHA256 of what it is of, under the secret, which
itself never travels; challenges are 16 random bytes. Until the second line has been checked, root
listens to nothing else, reads no more than a line, and not for long.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import secrets
import selectors
import socket
import time
from dataclasses import dataclass
from typing import NamedTuple

LOOPBACK = "127.0.0.1"
_HELLO = "hpc_xvr"
_LINE = 256  # bytes
_WAITING = 64  # connections that have not proved anything yet
# Seconds to prove it in (ranks need milliseconds): as a rule, and if all places to wait are taken.
_PATIENCE_S, _CROWDED_S = 10.0, 0.5


def listen(host: str, port: int = 0) -> socket.socket:
    """A socket that listens at `port` (0: any that is free) of the interface that `host` names.

    It listens on all interfaces where this node does not know which one the others mean: the name
    is unknown here, or means the loopback interface to this node only.

    Raises:
        OSError: the port is in use.
    """
    for interface in dict.fromkeys((_interface(host), "")):
        server = socket.socket()
        try:
            if port:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((interface, port))
            server.listen(1024)
            server.setblocking(False)
            return server
        except OSError as error:
            server.close()
            if not interface or error.errno != errno.EADDRNOTAVAIL:
                raise
    raise AssertionError("the last interface is all of them")


def _interface(host: str) -> str:
    if host == LOOPBACK:
        return host
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return ""
    return "" if address.startswith("127.") else address


def enter(link: socket.socket, key: bytes, rank: int, limit_s: float) -> str:
    """Prove to the other end that this is rank `rank`, make it prove that it is root, and return
    its word. Blocks for at most `limit_s` seconds.

    Raises:
        OSError: it does not answer in time, or is somebody else's program.
    """
    end = time.monotonic() + limit_s
    hello, _, theirs = _read_line(link, end).partition(" ")
    if hello != _HELLO:
        raise ConnectionError("another program listens there")
    mine = secrets.token_hex(16)
    proof = _proof(key, "rank", theirs, mine, rank)
    link.sendall(f"{rank} {mine} {proof}\n".encode())
    word, _, proof = _read_line(link, end).partition(" ")
    if not hmac.compare_digest(proof, _proof(key, "root", theirs, mine, rank, word)):
        raise ConnectionError("what listens there does not know the secret of this job")
    return word


def _read_line(link: socket.socket, end: float) -> str:
    """A line of ASCII; not a byte more, as what follows is meant for others."""
    text = b""
    while not text.endswith(b"\n"):
        link.settimeout(max(end - time.monotonic(), 0.001))
        byte = link.recv(1)
        if not byte or len(text) > _LINE or not byte.isascii():
            raise ConnectionError("it is not rank 0 of this job that listens there")
        text += byte
    return text[:-1].decode("ascii")


def _proof(key: bytes, *parts: object) -> str:
    return hmac.digest(key, " ".join(map(str, parts)).encode(), "sha256").hex()


class Guest(NamedTuple):
    """A rank that has proved who it is, with its connection (non-blocking)."""

    rank: int
    link: socket.socket


@dataclass
class _Visitor:
    """A connection of whomever."""

    link: socket.socket
    challenge: str
    since: float
    text: bytes = b""


class Entrance:
    """Root's side of it. Nothing here waits, and nothing that a visitor does raises.

    Args:
        server: what `listen` returned.
        key: the secret.
        size: ranks 1 to size - 1 may enter.
        events: where `server` and the visitors are registered. Each event of one of them (see
            `owns`) is to be given to `handle`, and `tidy` to be called every second or so.
        word: told to those who may enter: text without spaces.
    """

    def __init__(
        self,
        server: socket.socket,
        key: bytes,
        size: int,
        events: selectors.BaseSelector,
        word: str = "",
    ) -> None:
        self._server, self._key, self._size, self._word = server, key, size, word
        self._events = events
        self._visitors: dict[socket.socket, _Visitor] = {}
        self._open = False
        self.tidy()

    def owns(self, event: selectors.SelectorKey) -> bool:
        """Is it an event of the entrance?"""
        return event.fileobj is self._server or isinstance(event.data, _Visitor)

    def handle(self, event: selectors.SelectorKey) -> Guest | None:
        """Go on with what there is; the rank that has just proved who it is, if one has.

        Its connection is not registered any more.
        """
        if event.fileobj is self._server:
            self._accept()
            return None
        visitor: _Visitor = event.data
        try:
            rank = self._listen_to(visitor)
        except (OSError, ValueError):
            self._hang_up(visitor)
            return None
        if rank is None:
            return None
        self._forget(visitor)
        return Guest(rank, visitor.link)

    def tidy(self) -> None:
        """Hang up on those who take too long; let others in again where there was no room."""
        now = time.monotonic()
        crowded = len(self._visitors) >= _WAITING
        for visitor in list(self._visitors.values()):
            if now - visitor.since > (_CROWDED_S if crowded else _PATIENCE_S):
                self._hang_up(visitor)
        if not self._open and len(self._visitors) < _WAITING:
            self._events.register(self._server, selectors.EVENT_READ)
            self._open = True

    def close(self) -> None:
        """Hang up on all who wait, and stop listening."""
        for visitor in list(self._visitors.values()):
            self._hang_up(visitor)
        self._shut()
        self._server.close()

    def _accept(self) -> None:
        try:
            link, _ = self._server.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptors left, perhaps: until the next `tidy`
            self._shut()
            return
        link.setblocking(False)
        visitor = _Visitor(link, secrets.token_hex(16), time.monotonic())
        self._visitors[link] = visitor
        self._events.register(link, selectors.EVENT_READ, visitor)
        try:
            link.send(f"{_HELLO} {visitor.challenge}\n".encode())
        except OSError:
            self._hang_up(visitor)
        if len(self._visitors) >= _WAITING:
            self._shut()

    def _listen_to(self, visitor: _Visitor) -> int | None:
        """The visitor's rank once it has proved it.

        Raises:
            OSError, ValueError: it is not one of ours, or has gone.
        """
        try:
            data = visitor.link.recv(_LINE)
        except BlockingIOError:
            return None
        visitor.text += data
        if not data or len(visitor.text) > _LINE:
            raise ConnectionError
        if b"\n" not in visitor.text:
            return None
        # Ranks wait for our proof before they say more, so this is the only line.
        number, challenge, proof = visitor.text.decode("ascii").split()
        rank = int(number)
        proved = (visitor.challenge, challenge, rank)
        if not 0 < rank < self._size:
            raise ValueError
        if not hmac.compare_digest(proof, _proof(self._key, "rank", *proved)):
            raise ValueError
        ours = _proof(self._key, "root", *proved, self._word)
        visitor.link.send(f"{self._word} {ours}\n".encode())
        return rank

    def _hang_up(self, visitor: _Visitor) -> None:
        self._forget(visitor)
        visitor.link.close()

    def _forget(self, visitor: _Visitor) -> None:
        del self._visitors[visitor.link]
        self._events.unregister(visitor.link)

    def _shut(self) -> None:
        if self._open:
            self._events.unregister(self._server)
            self._open = False


def connect(address: tuple[str, int], key: bytes, rank: int, limit_s: float) -> socket.socket:
    """A connection to root at `address`, entered as `rank`; tries again for `limit_s` seconds.

    Raises:
        OSError: why the last attempt failed.
    """
    end = time.monotonic() + limit_s
    while True:
        left = max(end - time.monotonic(), 0.001)
        try:
            with contextlib.ExitStack() as undo:
                link = undo.enter_context(socket.create_connection(address, timeout=left))
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                enter(link, key, rank, left)
                undo.pop_all()
                return link
        except OSError:
            if time.monotonic() > end - 0.2:
                raise
        time.sleep(0.2)
