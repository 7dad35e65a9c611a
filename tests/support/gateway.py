"""A gateway in the test's own process: real TLS, real sessions, the real policy on a thread; the test plays the agent.

What runs in a sandboxed child elsewhere can be looked into, and measured by coverage, here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import msgspec

from agent import messages
from agent.flows.dataplane import MAX_FILES_A_MESSAGE
from agent.flows.policy_document import AREAS
from agent.gateway.entry import _tls
from agent.gateway.service import Gateway
from agent.identity.token import TokenVerifier
from agent.inference.package import read_package
from agent.isolation.channel import AsyncChannel, Channel, Frame, channel_pair
from agent.isolation.memfd import seal_bytes
from agent.policy.bundle import Bundle
from agent.policy.embedded import EmbeddedEngine
from agent.policy.messages import Stamp, stamp_memory
from agent.policy.worker import serve

__all__ = ["START", "Agent", "until"]

START = messages.GatewayStart(
    node="edge-0001",
    tokens=None,
    strict_audit=True,
    threads=1,
    max_body_bytes=1 << 20,
    max_inflight_bytes=4 << 20,
    header_timeout_ms=20_000,
    body_timeout_ms=20_000,
    idle_timeout_ms=20_000,
    max_connections=64,
    max_connections_per_source=64,
    max_concurrent=16,
    evaluation_deadline_ms=5_000,
    total_deadline_ms=10_000,
    remember_decisions=True,
)


async def until(holds: Callable[[], Any]) -> None:
    """Wait for something that no event announces."""
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 -- lists that callbacks fill, counters
            await asyncio.sleep(0.005)


class Agent:
    """The agent's part, played by a test. ``async with Agent(home) as agent: ...`` serves."""

    def __init__(self, home: Path, start: messages.GatewayStart = START, tokens: TokenVerifier | None = None) -> None:
        self.home = home
        self.events: list[dict[str, Any]] = []
        self.said: list[messages.GatewayMessage] = []
        self.failure = ""  # of the audit log
        self.silent = False  # the audit log does not answer
        self.port = 0
        self._start = start
        self._tokens = tokens
        self._numbers = 0

    async def __aenter__(self) -> Self:
        ours, theirs = channel_pair()
        self._channel = AsyncChannel(ours, self._frame, lambda: None)
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        pki = self.home / "pki"
        fds = {
            name: os.open(pki / file, os.O_RDONLY)
            for name, file in (("certificate", "node.pem"), ("key", "node.key"), ("client_ca", "ca.pem"))
        }
        try:
            context = _tls(fds, tokens=self._start.tokens is not None)
        finally:
            for fd in fds.values():
                os.close(fd)
        self.gateway = Gateway(theirs, self.listener, self._start, context, self._tokens)
        self.running = asyncio.create_task(self.gateway.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self.running.done():
            self.tell(messages.Drain(0))
        await self.running
        for task in [*self.gateway._loads, *self.gateway._front._handshakes]:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.gateway._front.shutdown(0)
        self.gateway._policy.close()
        self._channel._on_close = lambda: None
        self.gateway._channel._on_close = lambda: None  # it would end the process, as a gateway does
        self.gateway._channel.close()
        self._channel.close()
        self.listener.close()

    def _frame(self, frame: Frame) -> None:
        hot = messages.split_hot_frame(frame.data, messages.APPEND)
        if hot is None:
            self.said.append(messages.decode_gateway_message(frame.data))
            return
        self.events.append(msgspec.json.decode(hot[1]))
        if not self.silent:
            self._channel.send(messages.acknowledge_frame(hot[0], self.failure))

    def tell(self, message: messages.AgentMessage, *fds: int) -> None:
        """Send a message."""
        self._channel.send(messages.encode(message), fds)

    def tell_bytes(self, frame: bytes, *fds: int) -> None:
        """Send what may be no message."""
        self._channel.send(frame, fds)

    async def until(self, kind: type[Any], count: int = 1) -> Any:
        """Wait until the gateway has said so many messages of a kind; returns the last."""
        found: list[Any] = []

        def said() -> bool:
            found[:] = [message for message in self.said if isinstance(message, kind)]
            return len(found) >= count

        await until(said)
        return found[-1] if found else None

    def give_policy(self, bundle_bytes: bytes) -> None:
        """Hand over the native data and one worker."""
        bundle = Bundle.from_bytes(bundle_bytes)
        data = seal_bytes("policy-data", msgspec.json.encode({area: bundle.data[area] for area in AREAS}))
        self.tell(messages.PolicyData(bundle.sha256), data.fd)
        data.close()
        ours, theirs = channel_pair()
        stamp = stamp_memory()

        def work() -> None:
            with contextlib.closing(theirs), contextlib.suppress(Exception):
                serve(EmbeddedEngine(bundle), Channel(theirs), written)

        written = Stamp(stamp, write=True)
        threading.Thread(target=work, daemon=True).start()
        self._numbers += 1
        reads = EmbeddedEngine(bundle).request_reads
        self.tell(messages.WorkerEndpoint(self._numbers, bundle.sha256, bundle.revision, reads), ours.fileno(), stamp)
        ours.close()
        os.close(stamp)

    def give_model(self, name: str, version: str, files: Mapping[str, bytes] | None = None, leave_out: str = "") -> int:
        """Hand a package of the store over, or made-up files; returns the hand-over's number."""
        if files is None:
            package = read_package(self.home / "models" / name / version)
            sealed = {path: file for path, file in package.files.items() if path != leave_out}
            digest = package.sha256
        else:
            sealed = {path: seal_bytes(path, data) for path, data in files.items()}
            digest = "0" * 64
        self._numbers += 1
        paths = list(sealed)
        for at in range(0, len(paths), MAX_FILES_A_MESSAGE):
            part = paths[at : at + MAX_FILES_A_MESSAGE]
            last = at + MAX_FILES_A_MESSAGE >= len(paths)
            message = messages.LoadModel(self._numbers, name, version, digest, "5" * 64, tuple(part), last)
            self.tell(message, *(sealed[path].fd for path in part))
        for file in sealed.values():
            file.close()
        return self._numbers

    async def serve(self, *models: tuple[str, str]) -> None:
        """Hand the shipped policy and these models over, and open the port."""
        self.give_policy((self.home / "policy.tar.gz").read_bytes())
        for model in models:
            self.give_model(*model)
        await self.until(messages.ModelReport, len(models))
        self.tell(messages.Serve())
        await self.until(messages.Ready)
