"""A connection to NATS JetStream that may be down.

Rules:

1. Each message carries its event's id as ``Nats-Msg-Id``; the stream drops a second one with the same id within :data:`DEDUPLICATE_S`.
2. A message counts as delivered when the named stream, and no other, acknowledged it.
3. The stream is made where it is missing; one that is there is never changed.
4. Where the address says ``tls://`` the controller says nothing at all, not even who it is, before the connection is encrypted and the server's
   certificate verified, whatever the server says that it can. Else whoever stands between could have its own nonce signed.
5. Credentials and CAs are read at each connection, so that renewed ones count without a restart. What can't be read at the start is an error of the
   configuration; later it is a failure like any other, and tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Any

import structlog
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import StreamConfig
from nats.js.errors import NotFoundError

from agent.errors import ConfigError, HostError
from controller.settings import NatsSettings
from controller.trust.nats_credentials import load_credentials

__all__ = ["JetStream", "StreamError"]

TIMEOUT_S = 5
CLOSE_S = 2  # for an orderly end of a connection
DEDUPLICATE_S = 2 * 3600  # longer than the longest wait between two attempts with its lease
KEEP_S = 30 * 86_400  # in a stream that is made here
_TLS = "tls://"
_CLIENT_NAME = "edgewarden-controller"
_MAX_WORDS_CHARS = 200
# What the client raises when the server is away or refuses; a ValueError: it sent something that is not JSON.
_FAILURES = (NatsError, OSError, TimeoutError, ValueError)
_log = structlog.get_logger(__name__)


class StreamError(HostError):
    """NATS is not there, or did not take a message."""


class JetStream:
    """Publishes to one stream.

    Raises:
        ConfigError: the CAs or the credentials that are named can't be used.
    """

    def __init__(self, settings: NatsSettings) -> None:
        self._settings = settings
        self._client: _Client | None = None
        self._stream: JetStreamContext | None = None
        _access(settings)

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
            show = _access(settings)
            # Who asks for a connection decides when to try again, so the client itself never does.
            self._client = _Client(
                settings.url
            )  # known before it connects, so that a half-made connection is closed too
            await self._client.connect(
                settings.url,
                name=_CLIENT_NAME,
                allow_reconnect=False,
                max_reconnect_attempts=1,  # else it tries an absent server for minutes, in spite of the line above
                reconnect_time_wait=0,
                connect_timeout=TIMEOUT_S,
                error_cb=_report,
                **show,
            )
            self._stream = self._client.jetstream(timeout=TIMEOUT_S)
            await self._find_stream(self._stream)
        except (*_FAILURES, ConfigError) as error:
            await self.close()
            raise StreamError(_words(error)) from error

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
            raise StreamError(_words(error)) from error

    async def close(self) -> None:
        """End the connection."""
        client, self._client, self._stream = self._client, None, None
        if client is not None:
            # It is to end, whatever state it is in; after a handshake that failed the client waits for an end that nobody tells it.
            with contextlib.suppress(*_FAILURES):
                async with asyncio.timeout(CLOSE_S):
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


class _Client(Client):
    """A client that is silent until the connection is encrypted, where that was asked for."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._demands_tls = url.startswith(_TLS)

    def _connect_command(self) -> bytes:
        """Return the first words to the server; the library takes one at its word that announces no TLS."""
        if self._demands_tls and not self._is_encrypted():
            raise NatsError("the server offers no TLS")
        return super()._connect_command()

    def _is_encrypted(self) -> bool:
        writer = getattr(self._transport, "_io_writer", None)  # there is no public way to ask it
        return writer is not None and writer.get_extra_info("ssl_object") is not None


def _access(settings: NatsSettings) -> dict[str, Any]:
    """Return how to verify the server and what to show it, as arguments of the client.

    Raises:
        ConfigError: a file can't be read or used.
    """
    arguments: dict[str, Any] = {}
    if settings.url.startswith(_TLS):
        try:
            arguments["tls"] = ssl.create_default_context(cafile=settings.ca)
        except OSError as error:
            raise ConfigError(f"nats.ca: {settings.ca}: {error.strerror or 'no certificates in PEM'}") from error
    if settings.credentials is not None:
        # Read here and not by the client, which would wait for ever for the end of a file that is none.
        credentials = load_credentials(settings.credentials)
        arguments["user_jwt_cb"] = lambda: bytearray(credentials.jwt)
        arguments["signature_cb"] = credentials.sign
    return arguments


def _words(error: Exception) -> str:
    """Say what went wrong in one printable line: a part of it may be the server's words."""
    text = str(error).removeprefix("nats: ") or type(error).__name__
    return "nats: " + "".join(mark if mark.isprintable() else "?" for mark in text)[:_MAX_WORDS_CHARS]


async def _report(error: Exception) -> None:
    _log.warning("nats_error", error=_words(error))
