"""HTTP from any bytes, cut anywhere: the same requests, or a refusal; never an error of ours."""

import asyncio
import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import PeerError
from agent.gateway.connections import ConnectionLimits, Front
from agent.gateway.http import Connection
from agent.gateway.http_messages import Response

LIMITS = ConnectionLimits(9, 9, 30.0, 30.0)


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def get_extra_info(self, _: str) -> None:
        return None

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def _served(parts: list[bytes]) -> tuple[list[tuple[str, str, bytes]], Transport, list[Any]]:
    """Feed a connection; returns what its handler saw, what was written, and the errors that reached the loop."""
    seen: list[tuple[str, str, bytes]] = []
    errors: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))

    async def handler(request):
        try:
            if not request.complete:
                await request.arrive(1 << 16, 5.0)
        except PeerError as error:
            return Response(error.status)
        seen.append((request.method, request.path, request.body(1 << 16)))
        return Response(200, b"x")

    front = Front(handler, LIMITS, lambda *_: None)
    front._sources["here"] += 1
    connection, transport = Connection(front, "here"), Transport()
    carrier: Any = transport
    connection.connection_made(carrier)
    for part in parts:
        connection.data_received(memoryview(part))
        for _ in range(4):
            await asyncio.sleep(0)
    connection.connection_lost(None)
    for _ in range(4):
        await asyncio.sleep(0)
    await front.shutdown(0)
    return seen, transport, errors


def _cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges) if begin < end]


REQUESTS = st.lists(
    st.tuples(st.sampled_from(["/a", "/b?c=%20", "/d%2Fe"]), st.binary(max_size=40), st.booleans()),
    min_size=1,
    max_size=5,
)


def _bytes(path: str, body: bytes, *, chunked: bool) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n"
    if not chunked:
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    part = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
    return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + part + b"0\r\n\r\n"


@given(REQUESTS, st.lists(st.integers(0, 1000), max_size=8))
@settings(deadline=None)
def test_requests_are_the_same_however_they_are_cut(requests, places):
    """Method, path and body do not depend on where the network cut the bytes, and each request has one answer."""
    data = b"".join(_bytes(path, body, chunked=chunked) for path, body, chunked in requests)
    seen, transport, errors = asyncio.run(_served(_cut(data, places)))
    paths = {"/a": "/a", "/b?c=%20": "/b", "/d%2Fe": "/d/e"}
    assert seen == [("POST", paths[path], body) for path, body, _ in requests]
    assert transport.written.count(b"HTTP/1.1 200 OK\r\n") == len(requests)
    assert not transport.closed
    assert errors == []


@given(
    st.lists(
        st.binary(max_size=60)
        | st.sampled_from(
            [
                b"GET / HTTP/1.1\r\n",
                b"Host: x\r\n",
                b"Content-Length: 3\r\n",
                b"\r\n",
                b"Transfer-Encoding: chunked\r\n",
            ]
        ),
        max_size=12,
    )
)
@settings(deadline=None)
def test_any_bytes_are_requests_or_a_refusal(parts):
    """Whatever comes, the loop sees no error, at most one refusal is written, and after it nothing."""
    _, transport, errors = asyncio.run(_served([part for part in parts if part]))
    assert errors == []
    refused = transport.written.count(b"HTTP/1.1 400 ")
    assert refused <= 1
    assert transport.closed or not refused
