"""Accepts connections to the agent's own surfaces, a bounded number, so that nobody can take the agent's descriptors.

Rules:

1. At most :data:`MAX_CONNECTIONS` of a surface are open; with one more the oldest is cut. Calls here are short: who stays, pays.
2. At most :data:`MAX_GREETINGS` are in their TLS handshake, each for :data:`HANDSHAKE_S`; one more is closed at once.
"""

from __future__ import annotations

import asyncio
import socket
import ssl

import structlog
from aiohttp import web

from agent.control.protocol import make_protocol

__all__ = ["HANDSHAKE_S", "MAX_CONNECTIONS", "MAX_GREETINGS", "Surface"]

MAX_CONNECTIONS = 64
MAX_GREETINGS = 64
HANDSHAKE_S = 10.0
ACCEPTS_A_TURN = 16  # of the event loop
ACCEPT_PAUSE_S = 1.0  # when the process has no descriptor left
_log = structlog.get_logger(__name__)


class Surface:
    """One listener of the agent's. Make it inside the running loop.

    Args:
        server: makes the protocol of a connection and knows those that are open.
        listener: bound; closed by its owner.
        context: TLS, for a listener of the network.
    """

    def __init__(self, server: web.Server, listener: socket.socket, context: ssl.SSLContext | None = None) -> None:
        self._server = server
        self._listener = listener
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._greeting: set[asyncio.Task[None]] = set()
        self._stopped = False

    def start(self) -> None:
        """Accept connections from now on."""
        self._listener.listen(MAX_CONNECTIONS)
        self._listener.setblocking(False)
        self._resume()

    def use(self, context: ssl.SSLContext) -> None:
        """Greet whoever comes from now on with another certificate."""
        self._context = context

    def stop(self) -> None:
        """Accept no more."""
        self._stopped = True
        self._loop.remove_reader(self._listener.fileno())
        for task in self._greeting:
            task.cancel()

    def _resume(self) -> None:
        if not self._stopped:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptor or no memory is left: what waits goes on waiting
                _log.error("accept_failed", error=error.strerror)
                self._loop.remove_reader(self._listener.fileno())
                self._loop.call_later(ACCEPT_PAUSE_S, self._resume)
                return
            if len(self._greeting) >= MAX_GREETINGS:
                sock.close()
                continue
            task = self._loop.create_task(self._greet(sock))
            self._greeting.add(task)
            task.add_done_callback(self._greeting.discard)

    async def _greet(self, sock: socket.socket) -> None:
        timeout_s = HANDSHAKE_S if self._context else None
        try:
            await self._loop.connect_accepted_socket(
                lambda: make_protocol(self._server), sock, ssl=self._context, ssl_handshake_timeout=timeout_s
            )
        except OSError as error:  # TLS errors and time-outs are such, too
            _log.info("handshake_failed", error=str(error))
            return
        for handler in self._server.connections[:-MAX_CONNECTIONS]:
            if handler.transport is not None:
                handler.transport.abort()
