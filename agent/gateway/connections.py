"""Connections before they become requests: how many, from whom, and how long they may take.

Rules:

1. At most :attr:`ConnectionLimits.total` connections are open, and at most :attr:`ConnectionLimits.per_source` of one address; one more
   is closed before a byte of it is read. They count from their acceptance: one that never begins its TLS handshake takes a place, too.
2. A connection whose handshake is not done within ``header_s`` is cut, and one whose first request is not complete up to its headers within
   ``header_s`` after that; an idle one after ``idle_s``.
3. Bodies are never decompressed here: a body with a content coding is refused by the routes.
"""

import asyncio
import errno
import socket
import ssl
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
BACKLOG = 1024
ACCEPTS_A_TURN = 64  # of the event loop
ACCEPT_PAUSE_S = 1.0  # when the process has no descriptor left
SHUTDOWN_S = 1.0  # for the last words of TLS


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
        self._greeting: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._context: ssl.SSLContext | None = None

    def __call__(self) -> RequestHandler:
        """Make the protocol of one connection."""
        return make_protocol(self)

    @property
    def open_connections(self) -> int:
        """Number of open connections, those without a finished handshake included."""
        return len(self._source_of)

    def start(self, listener: socket.socket, context: ssl.SSLContext) -> None:
        """Accept connections from now on."""
        listener.listen(BACKLOG)
        listener.setblocking(False)
        self._listener, self._context = listener, context
        self._loop.add_reader(listener.fileno(), self._accept)

    def stop(self) -> None:
        """Accept no more; what is open stays open."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener = None

    def _accept(self) -> None:
        """Take what waits, as asyncio's own server does, but look who it is before anything else."""
        for _ in range(ACCEPTS_A_TURN):
            if self._listener is None:
                return
            try:
                sock, peer = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptor or no memory is left: what waits goes on waiting
                self._refused(f"accept_{errno.errorcode.get(error.errno or 0, 'failed')}", "")
                self._loop.remove_reader(self._listener.fileno())
                self._loop.call_later(ACCEPT_PAUSE_S, self._resume)
                return
            source = _plain(peer)
            if (reason := self._excess(source)) is not None:
                self._refused(reason, source)
                sock.close()
                continue
            handler = self()
            self._source_of[handler] = source
            self._sources[source] += 1
            task = self._loop.create_task(self._greet(sock, handler))
            self._greeting.add(task)
            task.add_done_callback(self._greeting.discard)

    def _resume(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _excess(self, source: str) -> str | None:
        if len(self._source_of) >= self._limits.total:
            return "connections"
        if self._sources[source] >= self._limits.per_source:
            return "connections_of_source"
        return None

    async def _greet(self, sock: socket.socket, handler: RequestHandler) -> None:
        try:
            await self._loop.connect_accepted_socket(
                lambda: handler,
                sock,
                ssl=self._context,
                ssl_handshake_timeout=self._limits.header_s,
                ssl_shutdown_timeout=SHUTDOWN_S,
            )
        except OSError:  # TLS errors and time-outs are such, too
            self._refused("handshake", self._source_of.get(handler, ""))
            self._forget(handler)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """The handshake is done: the clock of the first request's headers starts."""
        super().connection_made(handler, transport)
        self._watched[handler] = self._loop.call_later(self._limits.header_s, self._cut, handler, "header_timeout")

    def request_began(self, handler: RequestHandler) -> None:
        """Stop the header clock: the headers of a request are complete."""
        timer = self._watched.pop(handler, None)
        if timer:
            timer.cancel()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Forget a connection."""
        super().connection_lost(handler, exc)
        self._forget(handler)

    def _forget(self, handler: RequestHandler) -> None:
        self.request_began(handler)
        source = self._source_of.pop(handler, None)
        if source is not None:
            self._sources[source] -= 1
            if not self._sources[source]:
                del self._sources[source]

    def _cut(self, handler: RequestHandler, reason: str) -> None:
        self._watched.pop(handler, None)
        self._refused(reason, self._source_of.get(handler, ""))
        if handler.transport is not None:
            handler.transport.abort()


def source_address(transport: asyncio.BaseTransport) -> str:
    """Return the peer's address; IPv4 always as plain IPv4, also where it came through an IPv6 socket, so that one host has one address."""
    return _plain(transport.get_extra_info("peername"))


def _plain(peer: object) -> str:
    return str(peer[0]).removeprefix("::ffff:") if isinstance(peer, tuple) else ""
