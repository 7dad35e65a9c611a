"""Waiting for an OPA server, against one that this test plays, with the certificate that the real one would get."""

import asyncio
import contextlib
import ssl
from types import SimpleNamespace
from typing import Any

import pytest

from agent.errors import PolicyError
from agent.policy.opa_server import OpaProgram, OpaServer


@pytest.fixture
def server():
    nobody: Any = None  # the program is never started, and the bundle never read
    made = OpaServer(nobody, OpaProgram("/none"), nobody)
    yield made
    made.close()


@contextlib.asynccontextmanager
async def playing(server, *statuses):
    """Answer with these statuses, the last one for ever; yields who asked."""
    asked = []
    certificate, key, _ = server._files
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"/proc/self/fd/{certificate.fd}", f"/proc/self/fd/{key.fd}")

    async def answer(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.0 %d x\r\n\r\n" % statuses[min(len(asked), len(statuses)) - 1])
            await writer.drain()
        writer.close()

    playing_server = await asyncio.start_server(answer, "127.0.0.1", server.access.port, ssl=context)
    async with playing_server:
        yield asked


async def test_a_server_that_is_up_and_not_ready_is_asked_again(server):
    """Ready is what says so itself, to who has the token."""
    process: Any = SimpleNamespace(status=None)
    async with playing(server, 503, 500, 200) as asked:
        await server._until_ready(process)
    assert len(asked) == 3
    assert all(f"Authorization: Bearer {server.access.token}".encode() in request for request in asked)


async def test_a_server_that_ended_is_not_waited_for(server):
    """Nobody listens and the process is over: the bundle is refused at once."""
    process: Any = SimpleNamespace(status="exit status 1")
    with pytest.raises(PolicyError, match="exit status 1"):
        await server._until_ready(process)
