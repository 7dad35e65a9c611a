"""Requests and answers of HTTP/1.1 as values: what a handler sees, and what it gives.

Rules:

1. A request's head is complete when a handler gets it; its body may be on its way, and is held back at :data:`UNREAD_BYTES` until it is
   asked for.
2. An answer is whole: status, headers of our own words in ASCII, body. Errors are ``{"error": "…"}``.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

import msgspec

from agent import clock
from agent.errors import PeerError

__all__ = ["UNREAD_BYTES", "Link", "Request", "Response", "error_response"]

UNREAD_BYTES: Final = 64 * 1024
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_KEEP: Final = ""  # is what HTTP/1.1 takes for granted
_CLOSE: Final = "Connection: close\r\n"
_PHRASES: Final = {
    200: b"OK", 400: b"Bad Request", 401: b"Unauthorized", 403: b"Forbidden", 404: b"Not Found", 405: b"Method Not Allowed",
    408: b"Request Timeout", 413: b"Content Too Large", 415: b"Unsupported Media Type", 429: b"Too Many Requests",
    500: b"Internal Server Error", 503: b"Service Unavailable",
}  # fmt: skip


class Link(Protocol):
    """What a request needs of its connection."""

    certificate: bytes | None
    source: str

    def send(self, data: bytes) -> None:
        """Send bytes."""

    def flow(self) -> None:
        """Take more from the peer, or no more."""


class Response:
    """An answer.

    Args:
        status: of HTTP.
        body: whole.
        headers: further header lines, each ended by CRLF, in ASCII.
        content_type: of the body.
    """

    __slots__ = ("body", "close", "content_type", "headers", "status")

    def __init__(
        self, status: int = 200, body: bytes = b"", *, content_type: str = "application/json", headers: str = ""
    ) -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self.headers = headers
        self.close = False

    def encode(self, *, keep_alive: bool, with_body: bool = True) -> bytes:
        """Return the bytes to send."""
        head = (
            f"Server: edgewarden\r\nDate: {clock.http_date(clock.now_us())}\r\nContent-Type: {self.content_type}\r\n"
            f"Content-Length: {len(self.body)}\r\n{self.headers}{_KEEP if keep_alive else _CLOSE}\r\n"
        )
        return b"HTTP/1.1 %d %b\r\n%b%b" % (
            self.status,
            _PHRASES.get(self.status, b""),
            head.encode("ascii"),
            self.body if with_body else b"",
        )


def error_response(status: int, message: str, headers: str = "") -> Response:
    """Return an answer of the protocol's form ``{"error": "…"}``; ``message`` is our own words."""
    return Response(status, msgspec.json.encode({"error": message}), headers=headers)


class Request:
    """A request whose head is complete; its body may still be on its way.

    Attributes:
        method: as it was sent.
        path: decoded, without the query.
        content_length: as it was announced; None when it was not.
        complete: whether the whole body is here.
        expects_continue: whether the client waits for a word before it sends the body.
    """

    __slots__ = (
        "_allowed",
        "_connection",
        "_failed",
        "_headers",
        "_parts",
        "_waiter",
        "complete",
        "content_length",
        "expects_continue",
        "keep_alive",
        "method",
        "path",
        "size",
    )

    def __init__(self, connection: Link, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        self._connection = connection
        self._headers = headers
        self._parts: list[bytes] = []
        self._allowed = UNREAD_BYTES
        self._waiter: asyncio.Future[None] | None = None
        self._failed = False
        self.method = method
        self.path = path
        self.size = 0
        self.complete = False
        self.keep_alive = False
        length = headers.get(b"content-length")
        self.content_length = None if length is None else int(length)
        self.expects_continue = headers.get(b"expect", b"").lower() == b"100-continue"

    @property
    def certificate(self) -> bytes | None:
        """The client's certificate, DER; None when it sent none."""
        return self._connection.certificate

    @property
    def source(self) -> str:
        """The peer's address."""
        return self._connection.source

    def header(self, name: bytes) -> str | None:
        """Return a header by its lower-case name."""
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    def body(self, max_bytes: int) -> bytes:
        """Return the body, as far as it is here.

        Raises:
            PeerError: 413 beyond ``max_bytes``.
        """
        if self.size > max_bytes:
            raise PeerError(413, "body_too_large", f"body: more than {max_bytes} bytes")
        parts = self._parts
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def arrive(self, max_bytes: int, timeout_s: float) -> None:
        """Wait until the body is complete, or larger than allowed.

        Raises:
            PeerError: 408 when it is not complete in time, 400 when it ends too early.
        """
        self._allowed = max_bytes
        if self.expects_continue and not self.size:
            self._connection.send(_CONTINUE)
        self._connection.flow()
        try:
            async with asyncio.timeout(timeout_s):
                while not self.complete and self.size <= max_bytes:
                    if self._failed:
                        raise PeerError(400, "body_cut_short", "the body ended before its announced length")
                    self._waiter = asyncio.get_running_loop().create_future()
                    await self._waiter
        except TimeoutError as error:
            raise PeerError(408, "body_timeout", f"the body was not complete after {timeout_s:g} s") from error

    @property
    def crowded(self) -> bool:
        """Whether more of the body is here than may be held."""
        return self.size > self._allowed and not self.complete

    def feed(self, data: bytes) -> None:
        """Take a part of the body."""
        self._parts.append(data)
        self.size += len(data)
        if self.size > self._allowed:
            self._wake()

    def end(self, *, failed: bool = False) -> None:
        """Note that the body is complete, or will never be."""
        self.complete = not failed
        self._failed = failed
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
