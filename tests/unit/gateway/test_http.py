"""HTTP on one connection: order, bounds, and what two parsers could read differently. On real sockets with real TLS."""

import asyncio
import contextlib
import json
from typing import Any

import pytest

from agent.errors import PeerError
from agent.gateway.connections import ConnectionLimits
from agent.gateway.http import MAX_HEAD_BYTES, MAX_HEADERS, MAX_LINE_BYTES, MAX_PIPELINED
from agent.gateway.http_messages import UNREAD_BYTES, Response
from tests.support.front import Served, on_each_loop, pki, read_answer

__all__ = ["pki"]

ROOMY = ConnectionLimits(total=100, per_source=100, header_s=30.0, idle_s=30.0)
BAD = {"error": "this is not HTTP as it is spoken here"}


class Echo:
    """Answers with what it was asked; waits where the path says so."""

    def __init__(self):
        self.release = asyncio.Event()
        self.begun = []

    async def __call__(self, request):
        self.begun.append(request.path)
        if request.path == "/wait":
            await self.release.wait()
        if request.path == "/turn":
            await asyncio.sleep(0)
        try:
            if request.path.startswith("/body"):
                if not request.complete:
                    await request.arrive(1 << 20, 5.0)
                return Response(200, request.body(1 << 20))
        except PeerError as error:
            return Response(error.status, error.reason.encode())
        headers = {"method": request.method, "path": request.path, "x": request.header(b"x-word")}
        return Response(200, json.dumps(headers).encode())


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


GET = b"GET /x?query=1 HTTP/1.1\r\nHost: x\r\nX-Word: a b\r\n\r\n"


@on_each_loop
async def test_a_request_is_read_as_it_was_sent(pki):
    """Method, path without its query, decoded once, and headers by any spelling of their name."""
    async with Served(ROOMY, pki, Echo()) as served:
        reader, writer = await served.connect()
        for target, path in ((b"/x?q=%41", "/x"), (b"/a%2Bb", "/a+b"), (b"/a%252Bb", "/a%2Bb"), (b"/", "/")):
            writer.write(b"GET %b HTTP/1.1\r\nHost: x\r\nx-WORD: a b\r\n\r\n" % target)
            status, headers, body = await read_answer(reader)
            assert (status, json.loads(body)) == (200, {"method": "GET", "path": path, "x": "a b"})
            assert headers["server"] == "edgewarden"
            assert headers["date"].endswith(" GMT")
            assert "connection" not in headers
        writer.close()


@on_each_loop
async def test_answers_keep_the_order_of_the_requests(pki):
    """Pipelined requests are answered one after the other, also when an earlier one has to wait."""
    echo = Echo()
    async with Served(ROOMY, pki, echo) as served:
        reader, writer = await served.connect()
        writer.write(GET + GET.replace(b"/x", b"/wait") + GET.replace(b"/x", b"/turn") + post("/body", b"last"))
        assert json.loads((await read_answer(reader))[2])["path"] == "/x"
        await served.until(lambda: echo.begun == ["/x", "/wait"])
        echo.release.set()
        assert json.loads((await read_answer(reader))[2])["path"] == "/wait"
        assert json.loads((await read_answer(reader))[2])["path"] == "/turn"
        assert (await read_answer(reader))[2] == b"last"
        writer.close()


@on_each_loop
async def test_a_peer_that_asks_too_much_at_once_is_cut(pki):
    """More requests than may wait end the connection, after the answers that are due."""
    echo = Echo()
    async with Served(ROOMY, pki, echo) as served:
        reader, writer = await served.connect()
        writer.write(GET.replace(b"/x", b"/wait") + GET * (MAX_PIPELINED + 5))
        await served.until(lambda: echo.begun == ["/wait"])
        echo.release.set()
        answers = (await reader.read()).count(b"HTTP/1.1 200 OK")
        assert 1 <= answers <= MAX_PIPELINED + 2
        assert len(echo.begun) == answers
        writer.close()


@pytest.mark.parametrize("path", ["/body", "/body%20"])
@on_each_loop
async def test_a_body_may_come_in_parts_and_chunks(pki, path):
    """Whole, byte by byte, or chunked: the handler gets the same bytes."""
    async with Served(ROOMY, pki, Echo()) as served:
        reader, writer = await served.connect()
        writer.write(post(path, b"whole"))
        assert (await read_answer(reader))[2] == b"whole"
        for byte in post(path, b"slow"):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert (await read_answer(reader))[2] == b"slow"
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        writer.write(head + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n")
        assert (await read_answer(reader))[2] == b"abcde"
        writer.write(post(path, b""))
        assert (await read_answer(reader))[2] == b""
        writer.close()


@on_each_loop
async def test_a_large_body_waits_for_its_reader(pki):
    """Of a body that nobody has asked for, little more than the bound is taken; asked for, all of it comes."""
    large = bytes(1 << 20)
    gate = asyncio.Event()
    seen = []

    async def handler(request):
        await gate.wait()
        seen.append(request.size)
        if not request.complete:
            await request.arrive(1 << 20, 10.0)
        return Response(200, str(len(request.body(1 << 20))).encode())

    async with Served(ROOMY, pki, handler) as served:
        reader, writer = await served.connect()
        writer.write(post("/body", large))
        await asyncio.sleep(0.3)
        gate.set()
        assert (await read_answer(reader))[2] == str(len(large)).encode()
        assert seen[0] < 8 * UNREAD_BYTES
        writer.close()


@on_each_loop
async def test_a_body_over_what_the_handler_allows_is_refused_unread(pki):
    """413 as soon as it is known, the connection ends, and the rest is not taken."""

    async def handler(request):
        try:
            if not request.complete:
                await request.arrive(1000, 10.0)
            return Response(200, request.body(1000))
        except PeerError as error:
            return Response(error.status, error.reason.encode())

    async with Served(ROOMY, pki, handler) as served:
        reader, writer = await served.connect()
        writer.write(
            b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"500\r\n" + b"x" * 0x500
        )
        status, headers, body = await read_answer(reader)
        assert (status, headers["connection"], body) == (413, "close", b"body_too_large")
        assert await reader.read() == b""
        writer.close()


@on_each_loop
async def test_a_body_that_is_late_or_cut_short_is_an_error(pki):
    """408 after the time-out; when the peer leaves, the handler learns that nothing more comes."""
    reasons = []

    async def handler(request):
        try:
            await request.arrive(1000, 0.1 if request.path == "/late" else 10.0)
        except PeerError as error:
            reasons.append((error.status, error.reason))
            return Response(error.status, error.reason.encode())
        return Response(200)

    async with Served(ROOMY, pki, handler) as served:
        reader, writer = await served.connect()
        writer.write(post("/late", b"12345")[:-1])
        assert (await read_answer(reader))[0] == 408
        assert await reader.read() == b""
        writer.close()
        _, writer = await served.connect()
        writer.write(post("/gone", b"12345")[:-1])
        await served.until(lambda: len(served.front._connections) == 1)
        await asyncio.sleep(0.05)
        writer.transport.abort()
        await served.until(lambda: len(reasons) == 2)
        assert reasons == [(408, "body_timeout"), (400, "body_cut_short")]


@on_each_loop
async def test_a_client_that_waits_is_told_to_go_on(pki):
    """``Expect: 100-continue`` gets its word when the body is asked for, and no word when it is here already."""
    async with Served(ROOMY, pki, Echo()) as served:
        reader, writer = await served.connect()
        request = post("/body", b"12345", "Expect: 100-continue")
        writer.write(request[:-5])
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(request[-5:])
        assert (await read_answer(reader))[2] == b"12345"
        writer.write(request)
        assert (await read_answer(reader))[0] == 200
        writer.close()


@on_each_loop
async def test_an_answer_to_head_has_no_body(pki):
    """Its length is told, its bytes are not sent, and the next answer begins where it must."""
    async with Served(ROOMY, pki, Echo()) as served:
        reader, writer = await served.connect()
        writer.write(GET.replace(b"GET", b"HEAD") + GET)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"Content-Length: 0" not in head
        assert (await read_answer(reader))[0] == 200
        writer.close()


@pytest.mark.parametrize(
    ("request_line", "header", "kept"),
    [
        ("GET / HTTP/1.1", "", True),
        ("GET / HTTP/1.1", "Connection: close\r\n", False),
        ("GET / HTTP/1.0", "", False),
        ("GET / HTTP/1.0", "Connection: keep-alive\r\n", True),
    ],
)
@on_each_loop
async def test_a_connection_is_kept_as_the_version_says(pki, request_line, header, kept):
    """HTTP/1.1 keeps it, HTTP/1.0 ends it, and either may say otherwise."""
    async with Served(ROOMY, pki, Echo()) as served:
        reader, writer = await served.connect()
        writer.write(f"{request_line}\r\nHost: x\r\n{header}\r\n".encode())
        _, headers, _ = await read_answer(reader)
        assert ("connection" not in headers) is kept
        if not kept:
            assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
        b"GET / HTTP/0.9\r\nHost: x\r\n\r\n",
        b"GET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 1\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0x1\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked, x\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * MAX_HEADERS + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * MAX_LINE_BYTES + b"\r\n\r\n",
        b"GET /" + b"a" * MAX_LINE_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"b" * (MAX_LINE_BYTES - 9) + b"\r\n" + b"B: " + b"b" * MAX_LINE_BYTES,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)  # fmt: skip
@on_each_loop
async def test_what_is_no_plain_http_is_refused(pki, sent):
    """It is answered once, with fixed words, no handler sees it, and nothing that follows is read."""
    echo = Echo()
    async with Served(ROOMY, pki, echo) as served:
        reader, writer = await served.connect()
        writer.write(sent + b"\r\n\r\n" * (not sent.endswith(b"\r\n")) + GET)
        status, headers, body = await read_answer(reader)
        assert (status, headers["connection"], json.loads(body)) == (400, "close", BAD)
        assert await reader.read() == b""
        assert echo.begun == []
        writer.close()


@on_each_loop
async def test_a_head_without_an_end_is_cut(pki):
    """A head that grows in small parts ends at its bound, not in memory."""
    async with Served(ROOMY, pki, Echo()) as served:
        _, writer = await served.connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nA: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < MAX_HEAD_BYTES:
                writer.write(b"b" * 512)
                await writer.drain()
                await asyncio.sleep(0.001)
                sent += 1
        assert sent * 512 < 2 * MAX_HEAD_BYTES
        await served.until(lambda: served.front.open_connections == 0)
        writer.close()


@on_each_loop
async def test_a_request_that_precedes_nonsense_is_answered(pki):
    """What is broken refuses itself, not what came before it."""
    async with Served(ROOMY, pki, Echo()) as served:
        reader, writer = await served.connect()
        writer.write(GET + b"\x00nonsense\r\n\r\n")
        assert (await read_answer(reader))[0] == 200
        assert (await read_answer(reader))[0] == 400
        assert await reader.read() == b""
        writer.close()


@on_each_loop
async def test_slow_headers_of_a_kept_connection_are_cut(pki):
    """Each request has the same time for its head, not only the first."""
    async with Served(ConnectionLimits(9, 9, 0.2, 30.0), pki, Echo()) as served:
        reader, writer = await served.connect()
        writer.write(GET)
        assert (await read_answer(reader))[0] == 200
        writer.write(GET[:-2])
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await read_answer(reader)
        assert served.refused == [("header_timeout", "127.0.0.1")]
        writer.close()


@on_each_loop
async def test_a_peer_that_does_not_read_is_not_served_on(pki):
    """Answers that are not taken stop the reading of requests, and after the idle time the connection is cut."""
    served_count = 0

    async def handler(_request):
        nonlocal served_count
        served_count += 1
        return Response(200, bytes(1 << 18))

    async with Served(ConnectionLimits(9, 9, 30.0, 0.4), pki, handler) as served:
        _, writer = await served.connect()
        writer.transport.pause_reading()
        for _ in range(200):
            writer.write(GET)
            await asyncio.sleep(0.001)
        await served.until(lambda: served.front.open_connections == 0)
        assert served_count < 150
        writer.transport.abort()


@on_each_loop
async def test_a_handler_that_fails_after_a_wait_is_500_as_well(pki, caplog):
    """A programming error is logged and told without its words, wherever in the handler it happens."""

    async def broken(_request):
        await asyncio.sleep(0)
        raise RuntimeError("the inner truth")

    async with Served(ROOMY, pki, broken) as served:
        reader, writer = await served.connect()
        writer.write(GET)
        status, _, body = await read_answer(reader)
        assert (status, json.loads(body)) == (500, {"error": "the node failed at this request"})
        assert await reader.read() == b""
        assert "the inner truth" in caplog.text
        writer.close()


@on_each_loop
async def test_a_handler_learns_how_what_it_waits_for_ended(pki):
    """Result, failure and cancellation reach the handler, also when they are what it waits for first."""
    waits = []

    async def handler(_request):
        waits.append(asyncio.get_running_loop().create_future())
        try:
            return Response(200, await waits[-1])
        except (PeerError, asyncio.CancelledError) as error:
            await asyncio.sleep(0)
            return Response(200, type(error).__name__.encode())

    async with Served(ROOMY, pki, handler) as served:
        reader, writer = await served.connect()
        endings: list[tuple[str, list[Any], bytes]] = [
            ("set_result", [b"a result"], b"a result"),
            ("set_exception", [PeerError(400, "x", "y")], b"PeerError"),
            ("cancel", [], b"CancelledError"),
        ]
        for count, (end, arguments, answer) in enumerate(endings, start=1):
            writer.write(GET)
            await served.until(lambda count=count: len(waits) == count)
            getattr(waits[-1], end)(*arguments)
            assert (await read_answer(reader))[2] == answer
        writer.close()


@on_each_loop
async def test_a_shutdown_lets_the_answer_go_out(pki):
    """A connection in work is closed after its answer, an idle one at once."""
    echo = Echo()
    async with Served(ROOMY, pki, echo) as served:
        reader, writer = await served.connect()
        writer.write(GET.replace(b"/x", b"/wait"))
        await served.until(lambda: echo.begun)
        idle, idle_writer = await served.connect()
        ending = asyncio.create_task(served.front.shutdown(10.0))
        assert await idle.read() == b""
        echo.release.set()
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == (200, "close")
        assert await reader.read() == b""
        for each in (writer, idle_writer):
            each.close()
        await ending
