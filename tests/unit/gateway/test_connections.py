"""Connections before they become requests, on real sockets with real TLS."""

import contextlib
import json
import socket
import ssl

import pytest

from agent.gateway.connections import ConnectionLimits
from tests.support.front import Served, on_each_loop, pki

__all__ = ["pki"]

ROOMY = ConnectionLimits(total=100, per_source=100, header_s=30.0, idle_s=30.0)
REQUEST = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"


async def _ask(reader, writer):
    writer.write(REQUEST)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])
    return await reader.readexactly(length)


async def _is_cut(reader):
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        return await reader.read() == b""
    return True


@on_each_loop
async def test_a_connection_over_the_total_is_cut(pki):
    """One more than the total is reset before its handshake; when another ends there is room again."""
    async with Served(ConnectionLimits(2, 2, 30.0, 30.0), pki) as served:
        first, second = await served.connect(), await served.connect()
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await served.connect()
        assert served.refused == [("connections", "127.0.0.1")]
        first[1].close()
        await served.until(lambda: served.front.open_connections == 1)
        third = await served.connect()
        assert await _ask(*third) == b"here"
        for _, writer in (second, third):
            writer.close()


@on_each_loop
async def test_one_source_leaves_room_for_others(pki):
    """The limit of one address does not touch another one."""
    async with Served(ConnectionLimits(100, 2, 30.0, 30.0), pki) as served:
        held = [await served.connect("127.0.0.2") for _ in range(2)]
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await served.connect("127.0.0.2")
        other = await served.connect("127.0.0.1")
        assert await _ask(*other) == b"here"
        assert served.refused == [("connections_of_source", "127.0.0.2")]
        for _, writer in (*held, other):
            writer.close()


@on_each_loop
async def test_silent_handshakes_count(pki):
    """Connections that never begin their handshake take the places of their own address only, and lose them in time."""
    async with Served(ConnectionLimits(100, 2, 0.2, 30.0), pki) as served:
        silent = [await served.connect("127.0.0.2", tls=False) for _ in range(2)]
        await served.until(lambda: served.front.open_connections == 2)
        third = await served.connect("127.0.0.2", tls=False)
        assert await _is_cut(third[0])
        other = await served.connect()
        assert await _ask(*other) == b"here"
        await served.until(lambda: served.front.open_connections == 1)
        assert served.refused[0] == ("connections_of_source", "127.0.0.2")
        assert served.refused[1:] == [("handshake", "127.0.0.2")] * 2
        for _, writer in (*silent, third, other):
            writer.close()


@on_each_loop
async def test_what_is_no_tls_is_let_go(pki):
    """Plain text instead of a handshake ends the connection and frees its place."""
    async with Served(ROOMY, pki) as served:
        reader, writer = await served.connect(tls=False)
        writer.write(REQUEST)
        await _is_cut(reader)
        await served.until(lambda: served.front.open_connections == 0)
        assert served.refused == [("handshake", "127.0.0.1")]
        writer.close()


@on_each_loop
async def test_headers_that_do_not_come_to_their_end_are_cut(pki):
    """A connection that sends its headers byte by byte is cut, one that sent a whole request is not."""
    async with Served(ConnectionLimits(9, 9, 0.2, 30.0), pki) as served:
        good, slow = await served.connect(), await served.connect()
        assert await _ask(*good) == b"here"
        slow[1].write(REQUEST[:-2])
        assert await _is_cut(slow[0])
        assert served.refused == [("header_timeout", "127.0.0.1")]
        assert await _ask(*good) == b"here"
        for _, writer in (good, slow):
            writer.close()


@on_each_loop
async def test_an_idle_connection_is_closed(pki):
    """A kept connection is closed when nothing comes for the idle time."""
    async with Served(ConnectionLimits(9, 9, 30.0, 0.1), pki) as served:
        reader, writer = await served.connect()
        assert await _ask(reader, writer) == b"here"
        assert await _is_cut(reader)
        await served.until(lambda: served.front.open_connections == 0)
        writer.close()


@on_each_loop
async def test_accepting_ends_with_its_listener(pki):
    """Shut down, the listener refuses connections, and those that are open live on."""
    async with Served(ROOMY, pki) as served:
        kept = await served.connect()
        served.listener.shutdown(socket.SHUT_RDWR)
        await served.accepting
        with pytest.raises(ConnectionRefusedError):
            await served.connect()
        assert await _ask(*kept) == b"here"
        kept[1].close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"secret" * 2000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: secret\r\n" * 100 + b"\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: secret\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
@on_each_loop
async def test_broken_http_gets_no_echo(pki, sent, caplog):
    """What is no HTTP is answered with fixed words and logged by nobody."""
    async with Served(ROOMY, pki) as served:
        reader, writer = await served.connect()
        writer.write(sent)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.split()[1] == b"400"
        assert json.loads(body) == {"error": "this is not HTTP as it is spoken here"}
        assert b"aiohttp" not in head
        assert caplog.text == ""
        writer.close()


@on_each_loop
async def test_our_own_failure_is_500_without_a_traceback(pki, caplog):
    """A programming error is logged with its traceback and told without it."""

    async def broken(_):
        raise RuntimeError("the inner truth")

    async with Served(ROOMY, pki, broken) as served:
        reader, writer = await served.connect()
        writer.write(REQUEST)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.split()[1] == b"500"
        assert json.loads(body) == {"error": "the node failed at this request"}
        assert "the inner truth" in caplog.text
        writer.close()
