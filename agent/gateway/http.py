"""HTTP/1.1 on one connection: llhttp (httptools) reads, this module keeps order and bounds.

Sources: RFC 9110, RFC 9112. Rules:

1. The parser is strict: what two parsers could read differently (Content-Length beside Transfer-Encoding, folded or nameless headers,
   bare line feeds) is no HTTP. What is no HTTP, and what asks for an upgrade, gets 400 without an echo, and the connection ends.
2. A head has at most :data:`MAX_HEAD_BYTES`, :data:`MAX_HEADERS` and :data:`MAX_LINE_BYTES` in a line; a header that decides about a
   request stands in it once.
3. A body is held back at a bound until the handler asks for it (:mod:`agent.gateway.http_messages`), and then up to what the handler allows.
4. Requests of one connection are answered in their order, one at a time. At most :data:`MAX_PIPELINED` wait; while a peer does not read its
   answers, nothing more is taken from it.
5. A handler that can answer at once does so without a task. What came in one turn of the loop is first read, then answered, then sent: the
   same work many times in a row costs less than all kinds of work in turns.
6. A handler that fails with anything but an answer is a fault of ours: it is logged, and the peer gets 500 and no more.
"""

from __future__ import annotations

import asyncio
import functools
import urllib.parse
from collections import deque
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Final, Protocol

import httptools

from agent.gateway.http_messages import Request, Response, error_response
from agent.gateway.turn import Turn

__all__ = [
    "MAX_HEADERS",
    "MAX_HEAD_BYTES",
    "MAX_LINE_BYTES",
    "MAX_PIPELINED",
    "Connection",
    "Server",
]

MAX_HEAD_BYTES: Final = 16 * 1024
MAX_LINE_BYTES: Final = 8 * 1024
MAX_HEADERS: Final = 64
MAX_PIPELINED: Final = 16
_SINGLE: Final = frozenset(
    b"authorization content-encoding content-length content-type expect host inference-header-content-length".split()
)
_BAD_REQUEST: Final = 400
_VERSIONS: Final = frozenset({"1.0", "1.1"})


class Server(Protocol):
    """What a connection belongs to.

    Attributes:
        buffer: where bytes of any of its connections are put, to be read at once.
        turn: answers what came.
    """

    buffer: memoryview
    turn: Turn

    def connected(self, connection: Connection) -> None:
        """Note a connection whose handshake is complete."""

    def disconnected(self, connection: Connection) -> None:
        """Note its end."""

    def handle(self, request: Request) -> Coroutine[Any, Any, Response]:
        """Answer a request."""


class Connection(asyncio.BufferedProtocol):
    """One connection.

    Attributes:
        certificate: the client's, DER.
        source: the peer's address.
        waits_since: monotonic seconds since when the peer owes something; None while it is our turn.
        head_begun: whether what it owes is the rest of a head.
        writable: whether it reads its answers.
    """

    def __init__(self, server: Server, source: str) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._parser: Any = httptools.HttpRequestParser(self)
        self._queue: deque[Request] = deque()  # complete heads that wait, in their order
        self._busy = False
        self._broken = False  # what came last is no HTTP
        self._closing = False
        self._reading = True
        self.writable = True
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._header_count = self._header_bytes = 0
        self._head_bytes = 0
        self._in_head = self._head_fresh = self._head_alone = False
        self._receiving: Request | None = None
        self._task: asyncio.Task[Response] | None = None
        self.transport: asyncio.Transport | None = None
        self.certificate: bytes | None = None
        self.source = source
        self.head_begun = True
        self.waits_since: float | None = None

    # --- what the loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start with a fresh head."""
        self.transport = transport  # type: ignore[assignment]  # a stream's
        tls = transport.get_extra_info("ssl_object")
        self.certificate = tls.getpeercert(binary_form=True) if tls else None
        self.waits_since = self._loop.time()
        self._server.connected(self)

    def connection_lost(self, _: BaseException | None) -> None:
        """End what is on its way; a handler goes on to its own end, for what it does is recorded."""
        self._closing = True
        self.waits_since = None
        if self._receiving is not None:
            self._receiving.end(failed=True)
        self._queue.clear()
        self.transport = None
        self._parser = None  # it holds on to this, and what holds on to itself stays until a collector comes by
        self._server.disconnected(self)

    def get_buffer(self, _: int) -> memoryview:
        """Return where the next bytes go: what comes is read before anything else happens, so that one buffer serves all connections."""
        return self._server.buffer

    def buffer_updated(self, size: int) -> None:
        """Read what came."""
        self.data_received(self._server.buffer[:size])

    def data_received(self, data: memoryview) -> None:
        """Read on."""
        if self._closing or self._broken:
            return
        self._head_alone = self._receiving is None and not self._in_head
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._break()
        except httptools.HttpParserUpgrade:
            self._break()
        else:
            if self._in_head:
                self._count_head(len(data))
        if not self._busy:
            self._server.turn.ready(self)
        if self._busy or not self._reading or self._receiving is not None:
            self.flow()

    def _count_head(self, size: int) -> None:
        """Count what came of a head that is not complete; a first part that came with the end of another message is not counted."""
        self._head_bytes += 0 if self._head_fresh else size
        self._head_fresh = False
        if self._head_bytes > MAX_HEAD_BYTES:
            self._break()

    def pause_writing(self) -> None:
        """The peer does not read its answers."""
        self.writable = False
        self.waits_since, self.head_begun = self._loop.time(), False
        self.flow()

    def resume_writing(self) -> None:
        """It reads again."""
        self.writable = True
        self.waits_since = None if self._busy else self._loop.time()
        self.answer()

    # --- what the parser tells

    def on_message_begin(self) -> None:
        """A head begins."""
        self._target, self._headers, self._header_count, self._header_bytes = b"", {}, 0, 0
        self._head_bytes, self._in_head, self._head_fresh = 0, True, not self._head_alone
        if not self._busy:
            self.waits_since, self.head_begun = self._loop.time(), True

    def on_url(self, target: bytes) -> None:
        """A part of the request's target."""
        self._target += target
        if len(self._target) > MAX_LINE_BYTES:
            raise _NotHttpError

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        name = name.lower()
        size = len(name) + len(value)
        self._header_count += 1
        self._header_bytes += size
        if self._header_count > MAX_HEADERS or size > MAX_LINE_BYTES or self._header_bytes > MAX_HEAD_BYTES:
            raise _NotHttpError
        if name in _SINGLE and name in self._headers:
            raise _NotHttpError
        self._headers[name] = value

    def on_headers_complete(self) -> None:
        """The head is complete."""
        parser = self._parser
        self._in_head = False
        if len(self._queue) >= MAX_PIPELINED or parser.get_http_version() not in _VERSIONS or parser.should_upgrade():
            raise _NotHttpError
        target = self._target
        if not target.startswith(b"/"):
            raise _NotHttpError
        path = target.partition(b"?")[0].decode("latin-1")
        if "%" in path:
            path = urllib.parse.unquote(path)
        request = Request(self, parser.get_method().decode("latin-1"), path, self._headers)
        request.keep_alive = parser.should_keep_alive()
        self._receiving = request
        self._queue.append(request)

    def on_body(self, data: bytes) -> None:
        """A part of a body."""
        if self._receiving is not None:
            self._receiving.feed(data)

    def on_message_complete(self) -> None:
        """The body is complete."""
        self._head_alone = False
        if self._receiving is not None:
            self._receiving.end()
            self._receiving = None

    # --- order

    def send(self, data: bytes) -> None:
        """Send bytes, as long as there is somebody to take them."""
        if self.transport is not None:
            self.transport.write(data)

    def deliver(self, data: bytes, *, last: bool) -> None:
        """Send an answer, and end the connection after the last one."""
        self.send(data)
        if last:
            self.close()

    def answer(self) -> None:
        """Answer what waits, unless an answer is on its way."""
        if not self._busy:
            self._next()
        self.flow()

    def close(self) -> None:
        """End the connection after the answer that is on its way."""
        if self._busy:
            self._closing = True
        elif self.transport is not None:
            self._closing = True
            self.transport.close()

    def abort(self) -> None:
        """End the connection now."""
        if self.transport is not None:
            self.transport.abort()

    def flow(self) -> None:
        """Take more from the peer, or no more, by what waits."""
        wants = self.writable and len(self._queue) < MAX_PIPELINED
        if wants and self._receiving is not None:
            wants = not self._receiving.crowded
        if wants is not self._reading and self.transport is not None and not self.transport.is_closing():
            self._reading = wants
            if wants:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    def _break(self) -> None:
        """What came is no HTTP: say so after the answers that are due, and end."""
        self._broken = True
        if self._receiving is not None:
            self._receiving.end(failed=True)
            self._receiving = None

    def _next(self) -> None:
        """Answer what waits, in its order, until a handler has to wait itself."""
        while self._queue and self.writable and not self._closing:
            request = self._queue.popleft()
            self._busy = True
            self.waits_since = None
            handling = self._server.handle(request)
            if not request.complete:
                self._go_on(request, handling)
                return
            waits_for: Any = _FAILED
            with _Fault(self, request):
                waits_for = _begin(handling)
            if isinstance(waits_for, Response):
                self._answer(request, waits_for)
            elif asyncio.isfuture(waits_for):
                # Resumed, the coroutine takes the result, or the error, out of what it waits for.
                waits_for.add_done_callback(functools.partial(self._go_on, request, handling))
                return
            elif waits_for is not _FAILED:  # a bare yield
                self._go_on(request, handling)
                return
        if self._broken and not self._closing and not self._queue:
            self._closing = True
            refusal = error_response(_BAD_REQUEST, "this is not HTTP as it is spoken here")
            self._server.turn.deliver(self, refusal.encode(keep_alive=False), last=True)

    def _go_on(self, request: Request, handling: Coroutine[Any, Any, Response], _: object = None) -> None:
        self._task = self._loop.create_task(handling)
        self._task.add_done_callback(functools.partial(self._done, request))

    def _done(self, request: Request, task: asyncio.Task[Response]) -> None:
        self._task = None
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            self.failed(request, error)
        else:
            self._answer(request, task.result())
        self._next()
        self.flow()

    def failed(self, request: Request, error: BaseException) -> None:
        """Log what our own code failed at; its caller is told no more than that."""
        self._loop.call_exception_handler({"message": "a request failed", "exception": error, "protocol": self})
        response = error_response(500, "the node failed at this request")
        response.close = True
        self._answer(request, response)

    def _answer(self, request: Request, response: Response) -> None:
        self._busy = False
        # What is left of a refused body is not read: the connection ends with the answer.
        last = self._closing or response.close or not request.keep_alive or not request.complete
        if last:
            self._closing = True
        else:
            self.waits_since, self.head_begun = self._loop.time(), self._in_head
        data = response.encode(keep_alive=not last, with_body=request.method != "HEAD")
        self._server.turn.deliver(self, data, last=last)


class _NotHttpError(Exception):
    """Raised in a callback of the parser, which hands it on as its own error."""


class _Fault:
    """What a handler fails at before its first wait: reported as a task's failure would be."""

    __slots__ = ("_connection", "_request")

    def __init__(self, connection: Connection, request: Request) -> None:
        self._connection = connection
        self._request = request

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Report an error; the loop's own ways to stop pass."""
        if not isinstance(error, Exception):
            return False
        self._connection.failed(self._request, error)
        return True


_FAILED: Final = object()


def _begin(handling: Coroutine[Any, Any, Response]) -> Any:  # noqa: ANN401 -- a Response, or what the coroutine waits for
    """Run a handler to its first wait. Returns its answer, or what it waits for."""
    try:
        return handling.send(None)
    except StopIteration as done:
        return done.value
