"""The gateway's life: take what the agent hands over, serve, report, drain.

Rules:

1. Nothing is accepted before the agent says ``Serve``; nothing is answered once its channel has closed.
2. A model is replaced or removed between two requests; one that is being answered keeps what it began with.
3. A malformed message of the agent ends the process: the two disagree about what is true.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Coroutine
from typing import Any, Final

from agent import messages
from agent.errors import IsolationError, PolicyError, VerificationError
from agent.flows.counters import Counters
from agent.flows.loading import load_model
from agent.flows.policy_data import PolicyData
from agent.flows.recording import AuditClient
from agent.flows.request import RequestFlow
from agent.flows.running import Runner
from agent.gateway import oip
from agent.gateway.connections import ConnectionLimits, Front
from agent.gateway.routes import Routes
from agent.guard.admission import Admission
from agent.guard.bodies import BodyBudget
from agent.guard.sanitize import new_generator
from agent.identity.peer import PeerVerifier
from agent.identity.token import TokenVerifier
from agent.inference.registry import LoadedModel, Registry
from agent.isolation.channel import AsyncChannel, Frame
from agent.isolation.memfd import map_sealed
from agent.policy.client import PolicyClient
from agent.policy.messages import Endpoint

__all__ = ["Gateway"]

REPORT_INTERVAL_S: Final = 1.0
CLOSING_S: Final = 0.5  # twice, at the end: less than the agent waits beyond the drain's own time


class Gateway:
    """One data-plane process.

    Args:
        channel: to the agent.
        listener: the inherited, bound and listening socket.
        start: what the agent said at the birth.
        context: TLS, with its key loaded.
        tokens: checks bearer tokens, where they are accepted.
    """

    def __init__(
        self,
        channel: socket.socket,
        listener: socket.socket,
        start: messages.GatewayStart,
        context: ssl.SSLContext,
        tokens: TokenVerifier | None,
    ) -> None:
        self._sock = channel
        self._listener = listener
        self._start = start
        self._context = context
        self._registry = Registry()
        self._parts: dict[int, dict[str, int]] = {}
        self._newest: dict[tuple[str, str], int] = {}  # hand-over that may answer for a name and version
        self._loading = asyncio.Lock()
        self._loads: set[asyncio.Task[None]] = set()
        self._drained = asyncio.Event()
        self._counters = Counters()
        self._runner = Runner(max(1, os.cpu_count() or 1))
        self._tokens = tokens

    async def run(self) -> None:
        """Serve until drained or until the agent is gone."""
        start = self._start
        self._channel = AsyncChannel(self._sock, self._frame, self._agent_gone)
        self._audit = AuditClient(self._channel.send, strict=start.strict_audit)
        self._policy = PolicyClient(
            lambda worker: self._report(messages.Overrun(worker)),
            deadline_s=start.evaluation_deadline_ms / 1000,
            total_deadline_s=start.total_deadline_ms / 1000,
            remember=start.remember_decisions,
        )
        self._flow = RequestFlow(
            node=start.node,
            peers=PeerVerifier(),
            tokens=self._tokens,
            admission=Admission({}, running=start.max_concurrent),
            bodies=BodyBudget(start.max_inflight_bytes, start.max_inflight_bytes // 4),
            policy=self._policy,
            registry=self._registry,
            audit=self._audit,
            counters=self._counters,
            max_body_bytes=start.max_body_bytes,
            runner=self._runner,
            generator=new_generator(),
        )
        limits = oip.WireLimits(body_bytes=start.max_body_bytes, json_bytes=start.max_body_bytes)
        self._routes = Routes(self._flow, limits, start.body_timeout_ms / 1000, start.max_concurrent)
        connections = ConnectionLimits(
            start.max_connections,
            start.max_connections_per_source,
            start.header_timeout_ms / 1000,
            start.idle_timeout_ms / 1000,
        )
        self._front = Front(self._routes.handle, connections, self._refused)
        reporting = asyncio.create_task(self._report_regularly())
        await self._drained.wait()
        reporting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reporting
        self._runner.close()

    def _frame(self, frame: Frame) -> None:
        hot = messages.split_hot_frame(frame.data, messages.ACKNOWLEDGE)
        if hot is not None:
            self._audit.acknowledged(hot[0], hot[1].decode(errors="replace"))
            return
        try:
            self._obey(frame)
        except (IsolationError, ValueError) as error:  # ValueError: another number of descriptors than the message says
            self._fail(error)

    def _obey(self, frame: Frame) -> None:
        match messages.decode_agent_message(frame.data):
            case messages.WorkerEndpoint() as worker:
                sock_fd, shm_fd = frame.fds
                sock = socket.socket(fileno=sock_fd)
                self._policy.attach(
                    Endpoint(worker.worker, sock, shm_fd, worker.policy_sha256, worker.revision, worker.request_reads)
                )
            case messages.PolicyData(policy_sha256=policy_sha256):
                (fd,) = frame.fds
                self._take_policy_data(fd, policy_sha256)
            case messages.LoadModel() as load:
                self._take_model_part(load, frame.fds)
            case messages.UnloadModel(name=name, version=version):
                self._newest.pop((name, version), None)
                self._registry.remove(name, version)
            case messages.NodeFacts() as facts:
                self._flow.take_facts(facts)
            case messages.Serve():
                self._spawn(self._serve())
            case messages.Drain(timeout_ms=timeout_ms):
                self._spawn(self._drain(timeout_ms / 1000))

    def _take_policy_data(self, fd: int, policy_sha256: str) -> None:
        document = bytes(map_sealed(fd))
        os.close(fd)
        try:
            data = PolicyData.parse(document, policy_sha256)
            self._flow.data, self._flow.earlier_data = data, self._flow.data
            self._flow.admission.replace_limits(self._flow.data.limits)
        except PolicyError as error:
            # The agent has parsed the same bytes before it sent them.
            raise IsolationError(f"policy data: {error}") from error

    def _take_model_part(self, load: messages.LoadModel, fds: tuple[int, ...]) -> None:
        parts = self._parts.setdefault(load.number, {})
        parts.update(zip(load.files, fds, strict=True))
        self._newest[load.name, load.version] = load.number
        self._registry.expect(load.name, load.version)
        if load.last:
            del self._parts[load.number]
            self._spawn(self._load(load, parts))

    async def _load(self, load: messages.LoadModel, files: dict[str, int]) -> None:
        error = ""
        try:
            # A session takes long to build; requests go on meanwhile. One at a time: with several threads in msgspec's converter at once
            # gateways have died of a null pointer in its C code.
            async with self._loading:
                model: LoadedModel = await asyncio.to_thread(
                    load_model, files, digest=load.digest, signer=load.signer, threads=self._start.threads
                )
            if self._is_newest(load):
                self._registry.add(model)
            else:
                error = "another was handed over in its place, or it was taken away"
        except (VerificationError, IsolationError) as failure:
            error = str(failure)
            if self._is_newest(load):
                self._registry.fail(load.name, load.version, error)
        finally:
            for fd in files.values():
                os.close(fd)
        self._report(messages.ModelReport(load.number, error))

    def _is_newest(self, load: messages.LoadModel) -> bool:
        return self._newest.get((load.name, load.version)) == load.number

    async def _serve(self) -> None:
        self._spawn(self._front.accept(self._listener, self._context))
        await asyncio.sleep(0)  # from here on it listens
        self._report(messages.Ready())

    async def _drain(self, timeout_s: float) -> None:
        self._routes.drain()
        # The agent has the listener too: closing it here would leave clients in its queue until the agent ends.
        with contextlib.suppress(OSError):  # it did not listen yet
            self._listener.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._routes.idle.wait(), timeout_s)
        await self._front.shutdown(CLOSING_S)
        with contextlib.suppress(TimeoutError):  # whose connection was cut is refused, and recorded before the end is
            await asyncio.wait_for(self._routes.idle.wait(), CLOSING_S)
        await self._flow.note_refusals()
        self._audit.flush()
        self._report(messages.Drained())
        await asyncio.sleep(0)
        self._drained.set()

    async def _report_regularly(self) -> None:
        sent: dict[str, int] | None = None
        while True:
            counters = self._counters.values
            if self._policy.remembered:
                counters["decisions_remembered_total"] = self._policy.remembered
            if sent != counters:
                sent = counters
                self._report(messages.Statistics(sent, self._front.open_connections, self._routes.in_work))
            await self._flow.note_refusals()
            await asyncio.sleep(REPORT_INTERVAL_S)

    def _report(self, message: messages.GatewayMessage) -> None:
        # The agent is gone when this fails, and then this process ends with its channel.
        with contextlib.suppress(IsolationError):
            self._channel.send(messages.encode(message))

    def _refused(self, reason: str, _: str) -> None:
        self._counters.count(f"refusals_total|reason={reason}")
        self._flow.refusals.count(reason)

    def _agent_gone(self) -> None:
        self._audit.close()
        os._exit(0)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._loads.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._loads.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Say why, and end."""
        self._report(messages.Fatal(f"{type(error).__name__}: {error}"))
        self._drained.set()
