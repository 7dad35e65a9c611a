"""Listeners that nobody can fill.

Rules:

1. A bounded number of connections is open; with one more the oldest is cut. Calls are short: who stays, pays.
2. A handshake has :data:`HANDSHAKE_S`; what is in it is not counted above, and ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from agent.errors import ConfigError, HostError

__all__ = ["HANDSHAKE_S", "bind", "serve"]

HANDSHAKE_S = 10.0
BACKLOG = 1024


def bind(name: str, host: str, port: int) -> socket.socket:
    """Bind an address.

    Args:
        name: of the setting, for the error.
        host: address, without brackets.
        port: 0 for any.

    Raises:
        ConfigError: it can't be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{name}: {host}:{port}: {error}") from error


@contextlib.asynccontextmanager
async def serve(
    application: web.Application,
    sock: socket.socket,
    *,
    most: int,
    context: ssl.SSLContext | None = None,
    shutdown_s: float = 0,
) -> AsyncIterator[None]:
    """Serve until the block ends.

    Args:
        application: what is served.
        sock: bound; closed at the end.
        most: connections at a time.
        context: TLS.
        shutdown_s: for calls that are under way at the end.

    Raises:
        HostError: it can't be served.
    """
    runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=shutdown_s)
    await runner.setup()
    loop = asyncio.get_running_loop()
    try:
        server = runner.server
        if server is None:
            raise HostError("a listener can't be served")

        def make_room() -> None:
            for oldest in server.connections[: max(len(server.connections) + 1 - most, 0)]:
                if oldest.transport is not None:
                    oldest.transport.abort()

        def connect() -> RequestHandler:
            loop.call_soon(make_room)  # of those that are accepted in the same turn, the earlier ones are known by then
            return server()

        timeout_s = HANDSHAKE_S if context else None
        listener = await loop.create_server(
            connect, sock=sock, ssl=context, ssl_handshake_timeout=timeout_s, backlog=BACKLOG
        )
        try:
            yield
        finally:
            listener.close()
    finally:
        await runner.cleanup()
