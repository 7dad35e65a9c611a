"""A front on a real socket with real TLS, and a client that reads its answers."""

import asyncio
import contextlib
import functools
import inspect
import socket
import ssl
from typing import Any

import pytest
import uvloop

from agent.gateway.connections import Front
from agent.gateway.http_messages import Response
from tools.pki import Authority

__all__ = ["Served", "on_each_loop", "pki", "read_answer"]


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pki")
    Authority.create(directory).server("node")
    return directory


def on_each_loop(test):
    """Run a test on asyncio's own loop, and on the one that the gateway runs on."""

    @pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
    @functools.wraps(test)
    def run(loop_factory, **fixtures):
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(test(**fixtures))

    first = inspect.Parameter("loop_factory", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(test)
    run.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])
    return run


class Served:
    """A front that serves, and what it refused."""

    def __init__(self, limits, pki, handler=None):
        self.refused: list[tuple[str, str]] = []
        self.front = Front(handler or self.answer, limits, lambda reason, source: self.refused.append((reason, source)))
        self.server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server_tls.load_cert_chain(pki / "node.pem", pki / "node.key")
        self.tls = ssl.create_default_context(cafile=str(pki / "ca.pem"))

    async def answer(self, _request):
        return Response(200, b"here")

    async def __aenter__(self):
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.accepting = asyncio.create_task(self.front.accept(self.listener, self.server_tls))
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_):
        self.accepting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.accepting
        await self.front.shutdown(0)
        self.listener.close()

    async def connect(self, source="127.0.0.1", *, tls=True):
        options: dict[str, Any] = {"ssl": self.tls, "server_hostname": "127.0.0.1"} if tls else {}
        return await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0), **options)

    async def until(self, holds):
        async with asyncio.timeout(20):
            while not holds():  # noqa: ASYNC110 -- facts of the front, not events
                await asyncio.sleep(0.005)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Read one answer: status, headers by lower-case name, body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))
