"""A connection to NATS JetStream that may be down.

Rules:

1. Each message carries its event's id as ``Nats-Msg-Id``; the stream drops a second one with the same id within :data:`DEDUPLICATE_S`.
2. A message counts as delivered when the named stream, and no other, acknowledged it.
3. The stream is made where it is missing; one that is there is never changed.
4. Where the address says ``tls://`` nothing is published over a connection without TLS, whatever the server says that it can.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ssl

import structlog
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import StreamConfig
from nats.js.errors import NotFoundError

from agent.errors import ConfigError, HostError
from controller.settings import NatsSettings

__all__ = ["JetStream", "StreamError"]

TIMEOUT_S = 5
DEDUPLICATE_S = 2 * 3600  # longer than the longest wait between two attempts with its lease
KEEP_S = 30 * 86_400  # in a stream that is made here
_TLS = "tls://"
_CLIENT_NAME = "edgewarden-controller"
# What the client raises when the server is away or refuses; a ValueError: it sent something that is not JSON.
_FAILURES = (NatsError, OSError, TimeoutError, ValueError)
_log = structlog.get_logger(__name__)


class StreamError(HostError):
    """NATS is not there, or did not take a message."""


class JetStream:
    """Publishes to one stream.

    Raises:
        ConfigError: credentials are named that can't be used here.
    """

    def __init__(self, settings: NatsSettings) -> None:
        if settings.credentials is not None and importlib.util.find_spec("nkeys") is None:
            raise ConfigError("nats.credentials: they need the package nkeys, which is not installed")
        self._settings = settings
        self._client: Client | None = None
        self._stream: JetStreamContext | None = None

    async def connect(self) -> None:
        """Connect and find or make the stream, unless that is done and holds.

        Raises:
            StreamError: it can't be done now.
        """
        if self._client is not None and self._client.is_connected:
            return
        await self.close()
        settings = self._settings
        try:
            # Who asks for a connection decides when to try again, so the client itself never does.
            self._client = Client()  # known before it connects, so that a half-made connection is closed too
            await self._client.connect(
                settings.url,
                name=_CLIENT_NAME,
                allow_reconnect=False,
                max_reconnect_attempts=1,  # else it tries an absent server for minutes, in spite of the line above
                reconnect_time_wait=0,
                connect_timeout=TIMEOUT_S,
                error_cb=_report,
                tls=_tls(settings),
                user_credentials=settings.credentials,
            )
            if settings.url.startswith(_TLS) and not _is_encrypted(self._client):
                raise NatsError("no TLS")
            self._stream = self._client.jetstream(timeout=TIMEOUT_S)
            await self._find_stream(self._stream)
        except _FAILURES as error:
            await self.close()
            raise StreamError(f"nats: {type(error).__name__}") from error

    async def publish(self, event: str, kind: str, body: bytes) -> None:
        """Publish one event and wait until the stream has it.

        Raises:
            StreamError: it is not known to have it.
        """
        if self._stream is None:
            raise StreamError("nats: not connected")
        try:
            await self._stream.publish(
                f"{self._settings.subject}.{kind}",
                body,
                timeout=TIMEOUT_S,
                stream=self._settings.stream,
                headers={"Nats-Msg-Id": event},
            )
        except _FAILURES as error:
            raise StreamError(f"nats: {type(error).__name__}") from error

    async def close(self) -> None:
        """End the connection."""
        client, self._client, self._stream = self._client, None, None
        if client is not None:
            with contextlib.suppress(*_FAILURES):  # it is to end, whatever state it is in
                await client.close()

    async def _find_stream(self, stream: JetStreamContext) -> None:
        settings = self._settings
        try:
            await stream.stream_info(settings.stream)
        except NotFoundError:
            config = StreamConfig(
                name=settings.stream,
                subjects=[f"{settings.subject}.>"],
                max_age=KEEP_S,
                duplicate_window=DEDUPLICATE_S,
            )
            await stream.add_stream(config)


def _tls(settings: NatsSettings) -> ssl.SSLContext | None:
    if not settings.url.startswith(_TLS):
        return None
    return ssl.create_default_context(cafile=settings.ca)


def _is_encrypted(client: Client) -> bool:
    """The client takes a server at its word when that announces no TLS, so the connection itself is asked."""
    writer = getattr(client._transport, "_io_writer", None)  # noqa: SLF001 -- there is no public way to ask it
    return writer is not None and writer.get_extra_info("ssl_object") is not None


async def _report(error: Exception) -> None:
    _log.warning("nats_error", error=type(error).__name__)
