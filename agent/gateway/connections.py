"""Connections before they become requests: how many, from whom, and how long they may take.

Rules:

1. At most :attr:`ConnectionLimits.total` connections are open, and at most :attr:`ConnectionLimits.per_source` of one address, TLS
   handshakes included; one more is cut before a byte of it is read.
2. A handshake has ``header_s``. So has each request from its first byte to the end of its headers, and the first one from the end of
   the handshake. Between two requests, and for an answer that is not read, a connection has ``idle_s``.
3. What a connection leaves behind holds on to itself (the TLS layer's buffers do) and is collected every :data:`ENDED_A_COLLECTION`
   connections: memory is bounded by how many are open, not by how many there were.
4. Bodies are never decompressed here: a body with a content coding is refused by the routes.
"""

import asyncio
import contextlib
import errno
import gc
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from agent.gateway.http import Connection
from agent.gateway.http_messages import Request, Response
from agent.gateway.turn import Turn

__all__ = ["ConnectionLimits", "Front"]

BACKLOG = 1024  # connections that the kernel holds for us
ACCEPT_RETRY_S = 0.05
SHUTDOWN_S = 1.0  # for the peer's part of a TLS shutdown
ENDED_A_COLLECTION = 32
READ_BYTES = 128 * 1024  # taken from one connection at a time
MAX_SWEEP_S = 0.5  # how late a connection may be cut at most
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close at once


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What one listener allows; times in seconds."""

    total: int
    per_source: int
    header_s: float
    idle_s: float


class Front:
    """A listener's connections, with limits on them.

    Args:
        handler: answers a request.
        limits: of connections.
        refused: told the reason and the address of each connection that was cut.
    """

    def __init__(
        self,
        handler: Callable[[Request], Coroutine[Any, Any, Response]],
        limits: ConnectionLimits,
        refused: Callable[[str, str], None],
    ) -> None:
        self.handle = handler
        self.buffer = memoryview(bytearray(READ_BYTES))
        self.turn = Turn()
        self._limits = limits
        self._refused = refused
        self._sources: Counter[str] = Counter()
        self._connections: set[Connection] = set()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._sweeping: asyncio.TimerHandle | None = None
        self._sweep_s = min(MAX_SWEEP_S, limits.header_s / 4, limits.idle_s / 4)
        self._empty = asyncio.Event()
        self._empty.set()
        self._ended = 0

    @property
    def open_connections(self) -> int:
        """Number of open connections, those in their handshake included."""
        return self._sources.total()

    async def accept(self, listener: socket.socket, context: ssl.SSLContext) -> None:
        """Accept until cancelled, or until the listener is shut down. A listener belongs to one call."""
        listener.setblocking(False)
        listener.listen(BACKLOG)
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return
                await asyncio.sleep(
                    ACCEPT_RETRY_S
                )  # no descriptor or no memory is left for now, or the client has gone already
                continue
            source = _plain(str(peer[0]))
            if reason := self._full(source):
                self._refused(reason, source)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                sock.close()
                continue
            self._sources[source] += 1
            handshake = loop.create_task(self._shake_hands(sock, source, context))
            self._handshakes.add(handshake)
            handshake.add_done_callback(self._handshakes.discard)

    async def _shake_hands(self, sock: socket.socket, source: str, context: ssl.SSLContext) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: Connection(self, source),
                sock,
                ssl=context,
                ssl_handshake_timeout=self._limits.header_s,
                ssl_shutdown_timeout=SHUTDOWN_S,
            )
        except (OSError, ssl.SSLError):
            self._forget(source)  # it has no protocol that would end
            self._refused("handshake", source)

    def _full(self, source: str) -> str:
        if self.open_connections >= self._limits.total:
            return "connections"
        return "connections_of_source" if self._sources[source] >= self._limits.per_source else ""

    def connected(self, connection: Connection) -> None:
        """See :class:`agent.gateway.http.Server`."""
        self._connections.add(connection)
        self._empty.clear()
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(self._sweep_s, self._sweep)

    def disconnected(self, connection: Connection) -> None:
        """See :class:`agent.gateway.http.Server`."""
        self._connections.discard(connection)
        self._forget(connection.source)
        if not self._connections:
            self._empty.set()

    async def shutdown(self, patience_s: float) -> None:
        """Close every connection; those that are still there after ``patience_s`` are cut."""
        if patience_s > 0:
            for connection in list(self._connections):
                connection.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), patience_s)
        for connection in list(self._connections):
            connection.abort()
        await self._empty.wait()
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None

    def _forget(self, source: str) -> None:
        self._sources[source] -= 1
        if not self._sources[source]:
            del self._sources[source]
        self._ended += 1
        if self._ended % ENDED_A_COLLECTION == 0:
            gc.collect(1)

    def _sweep(self) -> None:
        """Cut what takes too long. One timer for all: one for each request would cost more than the rest of its reading."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self._connections):
            since = connection.waits_since
            if since is None:
                continue
            if connection.head_begun and now - since > self._limits.header_s:
                self._refused("header_timeout", connection.source)
                connection.abort()
            elif not connection.head_begun and now - since > self._limits.idle_s:
                if connection.writable:
                    connection.close()
                else:
                    connection.abort()
        self._sweeping = loop.call_later(self._sweep_s, self._sweep) if self._connections else None


def _plain(address: str) -> str:
    """Write IPv4 as plain IPv4 also where it came through an IPv6 socket, so that one host has one address."""
    return address.removeprefix("::ffff:")
