"""The bounds on connections to the agent's own surfaces, over real sockets."""

import asyncio
import errno
import socket
import ssl
from types import SimpleNamespace

import pytest
from aiohttp import web

from agent.control import serving
from agent.control.serving import Surface


async def _answer(_: web.BaseRequest) -> web.Response:
    return web.Response(text="yes")


@pytest.fixture
async def server():
    server = web.Server(_answer)
    yield server
    await server.shutdown(0.1)


@pytest.fixture
def listener():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener


async def _call(listener) -> bytes:
    """Connect, ask, and return what came until the end of the connection or of the head."""
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    try:
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        return await reader.readline()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def _until(holds) -> None:
    while not holds():  # noqa: ASYNC110 -- the server has no event to wait for
        await asyncio.sleep(0.001)


async def test_with_one_more_than_may_stay_the_oldest_is_cut(server, listener, monkeypatch):
    """Who came first loses its place; who came last is answered."""
    monkeypatch.setattr(serving, "MAX_CONNECTIONS", 1)
    surface = Surface(server, listener)
    surface.start()
    oldest, writer = await asyncio.open_connection(*listener.getsockname())
    await _until(lambda: server.connections)
    assert await _call(listener) == b"HTTP/1.1 200 OK\r\n"
    assert await oldest.read() == b""
    writer.close()
    surface.stop()


async def test_one_more_handshake_than_may_run_is_closed_at_once(server, listener, monkeypatch):
    """With every place taken by someone who does not speak, the next is closed and not made to wait."""
    monkeypatch.setattr(serving, "MAX_GREETINGS", 1)
    surface = Surface(server, listener, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    surface.start()
    _, silent = await asyncio.open_connection(*listener.getsockname())
    await _until(lambda: surface._greeting)
    assert await _call(listener) == b""
    silent.close()
    surface.stop()


async def test_a_peer_that_does_not_speak_tls_costs_its_own_connection(server, listener):
    """Its handshake fails, and the next is heard."""
    surface = Surface(server, listener, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    surface.start()
    for _ in range(2):
        assert not (await _call(listener)).startswith(b"HTTP")
    await _until(lambda: not surface._greeting)
    assert server.connections == []
    surface.stop()


async def test_without_a_descriptor_left_what_waits_goes_on_waiting(server, listener, monkeypatch):
    """An accept that fails is tried again after a pause; one after the stop is not."""
    monkeypatch.setattr(serving, "ACCEPT_PAUSE_S", 0.01)
    failures = [OSError(errno.EMFILE, "Too many open files")]

    def accept():
        if failures:
            raise failures.pop()
        return listener.accept()

    scarce = SimpleNamespace(
        accept=accept, fileno=listener.fileno, listen=listener.listen, setblocking=listener.setblocking
    )
    surface = Surface(server, scarce)  # type: ignore[arg-type]  # a socket whose accept fails once
    surface.start()
    assert await _call(listener) == b"HTTP/1.1 200 OK\r\n"
    assert failures == []
    surface.stop()
    surface._resume()
    assert asyncio.get_running_loop().remove_reader(listener.fileno()) is False
