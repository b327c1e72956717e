"""A wire from the first rank to each other one: when a process ends without a word, the kernel closes its end.

Collectives say so late, if at all: NCCL waits for hours for a rank that was killed on another machine. A wire says
it at once, and within half a minute where a whole machine went dark.
"""

import json
import os
import secrets
import select
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

BYE = b"\n"
"""What a process says that ends in order."""

KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""Seconds of silence before the kernel asks the other machine, between its questions, and their number."""


PATIENCE = 2
"""Seconds that a process may take over its first words."""

TRIES = 3
"""How often a rank calls the first one. If nothing gets through, only collectives tell who is gone, and late."""


@dataclass(frozen=True)
class Peer:
    """A process of the run."""

    rank: int
    host: str
    process: int

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


class Lifelines:
    """The wires of one rank.

    Args:
        rank: of this process; the first one listens, the others call it.
        host: name of the first rank's machine.
        publish: of the first rank: called with what the others need to find it.
        published: of the others: returns that, or None while it is not there.
    """

    def __init__(
        self, rank: int, host: str, publish: Callable[[str], None], published: Callable[[], str | None]
    ) -> None:
        self._me = Peer(rank, socket.gethostname(), os.getpid())
        self._host, self._published = host, published
        self._wires: dict[socket.socket, Peer | None] = {}
        self._server: socket.socket | None = None
        self._secret, self._tries = secrets.token_hex(8), TRIES
        if rank == 0:
            self._server = socket.create_server(("", 0))
            publish(json.dumps([self._server.getsockname()[1], self._secret]))

    def lost(self, seconds: float) -> Peer | None:
        """Wait so long, at most, and return a process that ended without a word, if one did."""
        if self._server is None and not self._wires and self._tries:
            self._call()
        watched = [*self._wires, *([] if self._server is None else [self._server])]
        ready = select.select(watched, [], [], seconds)[0]
        for one in ready:
            if one is self._server:
                self._take(one.accept()[0])
            elif (gone := self._heard(one)) is not None:
                return gone
        return None

    def close(self) -> None:
        """End in order: nobody is missed."""
        for one in self._wires:
            with suppress(OSError):
                one.sendall(BYE)
        for one in [*self._wires, *([] if self._server is None else [self._server])]:
            one.close()
        self._wires.clear()
        self._server = None

    def _call(self) -> None:
        if (told := self._published()) is None:
            return
        self._tries -= 1
        port, self._secret = json.loads(told)
        with suppress(OSError):
            wire = socket.create_connection((self._host, port), timeout=5)
            self._take(wire)
            self._greet(wire)

    def _take(self, wire: socket.socket) -> None:
        wire.setblocking(True)
        # Who says half a word holds up nobody: the kernel gives up, and Python need not look.
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", PATIENCE, 0))
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._wires[wire] = None

    def _greet(self, wire: socket.socket) -> None:
        hello = [self._secret, self._me.rank, self._me.host, self._me.process]
        with suppress(OSError):  # a wire that is cut is heard of in its turn
            wire.sendall(json.dumps(hello).encode().ljust(512))

    def _heard(self, wire: socket.socket) -> Peer | None:
        known = self._wires[wire]
        try:
            said = wire.recv(512, socket.MSG_WAITALL if known is None else 0)
        except OSError:
            said = b""
        if known is None and said != BYE:
            with suppress(ValueError, TypeError):
                secret, *peer = json.loads(said)
                if secret == self._secret:  # a stranger has no say, and is told nothing
                    self._wires[wire] = Peer(*peer)
                    if self._server is not None:
                        self._greet(wire)
                    return None
        wire.close()
        del self._wires[wire]
        return None if said == BYE else known
