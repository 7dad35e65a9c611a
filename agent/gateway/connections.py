"""Connections before they become requests: how many, from whom, and how long they may take.

Rules:

1. At most :attr:`ConnectionLimits.total` connections are open, and at most :attr:`ConnectionLimits.per_source` of one address, TLS
   handshakes included; one more is cut before a byte of it is read.
2. A handshake has ``header_s``. A connection whose first request is not complete up to its headers within ``header_s`` more is cut; an
   idle one after ``idle_s``.
3. Bodies are never decompressed here: a body with a content coding is refused by the routes.
"""

import asyncio
import errno
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from agent.http_protocol import make_protocol

__all__ = ["ConnectionLimits", "Front", "source_address"]

MAX_HEADER_LINE_BYTES = 8190
MAX_HEADERS = 64
BACKLOG = 1024  # connections that the kernel holds for us
ACCEPT_RETRY_S = 0.05
SHUTDOWN_S = 1.0  # for the peer's part of a TLS shutdown
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close at once


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What one listener allows; times in seconds."""

    total: int
    per_source: int
    header_s: float
    idle_s: float


class Front(web.Server):
    """aiohttp's low-level server (no router, no middleware) with limits on connections."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        limits: ConnectionLimits,
        refused: Callable[[str, str], None],
    ) -> None:
        """Serve ``handler``; ``refused(reason, address)`` is told of each connection that was cut."""
        options: dict[str, Any] = {
            "access_log": None,
            "auto_decompress": False,
            "keepalive_timeout": limits.idle_s,
            "lingering_time": 0.0,
            "max_line_size": MAX_HEADER_LINE_BYTES,
            "max_field_size": MAX_HEADER_LINE_BYTES,
            "max_headers": MAX_HEADERS,
            "tcp_keepalive": True,
        }
        super().__init__(handler, **options)
        self._limits = limits
        self._refused = refused
        self._sources: Counter[str] = Counter()
        self._source_of: dict[RequestHandler, str] = {}
        self._watched: dict[RequestHandler, asyncio.TimerHandle] = {}
        self._handshakes: set[asyncio.Task[None]] = set()

    def __call__(self) -> RequestHandler:
        """Make the protocol of one connection."""
        return make_protocol(self)

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
                self,
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

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Start the header clock of a connection whose handshake is complete."""
        super().connection_made(handler, transport)
        self._source_of[handler] = source_address(transport)
        self._watched[handler] = asyncio.get_running_loop().call_later(self._limits.header_s, self._cut, handler)

    def request_began(self, handler: RequestHandler) -> None:
        """Stop the header clock: the headers of a request are complete."""
        timer = self._watched.pop(handler, None)
        if timer:
            timer.cancel()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Forget a connection."""
        super().connection_lost(handler, exc)
        self.request_began(handler)
        source = self._source_of.pop(handler, None)
        if source is not None:
            self._forget(source)

    def _forget(self, source: str) -> None:
        self._sources[source] -= 1
        if not self._sources[source]:
            del self._sources[source]

    def _cut(self, handler: RequestHandler) -> None:
        del self._watched[handler]
        self._refused("header_timeout", self._source_of[handler])
        if handler.transport is not None:
            handler.transport.abort()


def source_address(transport: asyncio.BaseTransport) -> str:
    """Return the peer's address."""
    peer = transport.get_extra_info("peername")
    return _plain(str(peer[0])) if isinstance(peer, tuple) else ""


def _plain(address: str) -> str:
    """Write IPv4 as plain IPv4 also where it came through an IPv6 socket, so that one host has one address."""
    return address.removeprefix("::ffff:")
