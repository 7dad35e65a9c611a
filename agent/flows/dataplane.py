"""The agent's side of the gateway: start it, hand over what it may use, record what it reports, replace it when it dies.

Rules:

1. The gateway opens its port only after everything was handed over and its sessions exist (:class:`agent.messages.Serve`).
2. A gateway that dies is replaced, and gets the same hand-over again; the models stay in the agent's sealed files meanwhile.
3. An audit event of a gateway is acknowledged when the log says that it is recorded, and refused when it can't be; only kinds in
   :data:`agent.messages.GATEWAY_KINDS` are accepted.
4. A message that a gateway may not send ends that gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from agent import messages
from agent.audit.record import decode_event
from agent.errors import AuditError, IsolationError
from agent.isolation.channel import AsyncChannel, Frame
from agent.isolation.memfd import SealedFile
from agent.isolation.supervisor import ChildHandle, ChildSpec, ExitStatus, Keeper, Zygote
from agent.policy.messages import Endpoint
from agent.policy.pool import Subscription
from agent.records import AuditEvent

__all__ = ["Dataplane", "DataplaneHooks", "ServedModel"]

MAX_FILES_A_MESSAGE = 128
LOAD_TIMEOUT_S = 300.0
DRAIN_SLACK_S = (
    2.0  # for what a gateway still does when the time of its requests is over: cut connections, record it, say so
)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A package that may be loaded: verified, inspected, authorized and measured."""

    name: str
    version: str
    digest: str
    signer: str
    files: Mapping[str, SealedFile]


class DataplaneHooks(Protocol):
    """Whom the data plane tells and asks."""

    def record(self, event: AuditEvent, size: int) -> asyncio.Future[Any]:
        """Append what ``decode_event`` gave for ``size`` bytes; the future is done when the record counts, or fails with ``AuditError``."""

    def subscribe(self, asker: Callable[[Endpoint], None]) -> Subscription:
        """Give policy workers to ``asker`` from now on."""

    def serving(self, *, holds: bool, why: str) -> None:
        """Report whether inference is served."""

    def statistics(self, report: messages.Statistics | None) -> None:
        """Take a gateway's counters; None when it ended."""


class Dataplane:
    """One gateway and everything it was given.

    Args:
        zygote: forks it.
        spec: how; with the listener and its key material as descriptors.
        hooks: see :class:`DataplaneHooks`.
    """

    def __init__(self, zygote: Zygote, spec: ChildSpec, hooks: DataplaneHooks) -> None:
        self._zygote = zygote
        self._spec = spec
        self._hooks = hooks
        self._models: dict[tuple[str, str], ServedModel] = {}
        self._number = 0  # of the last hand-over
        self._reports: dict[int, asyncio.Future[str]] = {}
        self._facts = messages.NodeFacts(trust="unknown")
        self._policy_data: SealedFile | None = None
        self._policy_sha256 = ""
        self._channel: AsyncChannel | None = None
        self._acknowledger: _Acknowledger | None = None
        self._child: ChildHandle | None = None
        self._workers: Subscription | None = None
        self._ready = asyncio.Event()
        self._drained = asyncio.Event()
        self._draining = False
        self._keeper = Keeper("gateway", self._start)

    @property
    def crash_loop(self) -> bool:
        """Whether gateways die one after the other."""
        return self._keeper.crash_loop

    @property
    def pid(self) -> int | None:
        """The gateway's process id, while there is one."""
        return self._child.pid if self._child else None

    @property
    def models(self) -> Mapping[tuple[str, str], ServedModel]:
        """What is handed over, by name and version."""
        return self._models

    async def run(self) -> None:
        """Keep a gateway running until cancelled or drained."""
        try:
            await self._keeper.run(on_death=self._died)
        finally:
            self._end()

    async def wait_ready(self) -> None:
        """Wait until a gateway accepts connections."""
        await self._ready.wait()

    def set_facts(self, facts: messages.NodeFacts) -> None:
        """Tell the policy something new about the node."""
        self._facts = facts
        self._tell(facts)

    def set_policy_data(self, policy_sha256: str, data: SealedFile) -> None:
        """Replace the policy's data that the gateway enforces natively; owns ``data`` from now on."""
        if self._policy_data:
            self._policy_data.close()
        self._policy_data, self._policy_sha256 = data, policy_sha256
        self._tell(messages.PolicyData(policy_sha256), data.fd)

    async def load(self, model: ServedModel) -> str:
        """Hand a model over and wait for its session; returns why there is none, or an empty string.

        A model that was handed over before under the same name and version is replaced once the new one answers.
        """
        key = (model.name, model.version)
        self._models[key] = model
        if self._channel is None:
            return ""  # the next gateway gets it with all others
        try:
            return await self._hand_over(model)
        except IsolationError:
            return ""  # the gateway ended; again the next one gets it

    def unload(self, name: str, version: str) -> None:
        """Take a model away from the gateway."""
        if self._models.pop((name, version), None):
            self._tell(messages.UnloadModel(name, version))

    async def drain(self, timeout_s: float) -> None:
        """Let the requests in work end, at most ``timeout_s``; the gateway leaves afterwards."""
        self._draining = True
        if self._channel is None:
            return
        self._tell(messages.Drain(int(timeout_s * 1000)))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drained.wait(), timeout_s + DRAIN_SLACK_S)

    async def _start(self) -> ChildHandle:
        if self._draining:
            await asyncio.Event().wait()
        child = await self._zygote.spawn(self._spec)
        self._drained.clear()
        channel = AsyncChannel(child.sock, self._frame, lambda: self._lost(child))
        self._child, self._channel, self._acknowledger = child, channel, _Acknowledger(channel)
        if self._policy_data:
            self._tell(messages.PolicyData(self._policy_sha256), self._policy_data.fd)
        self._tell(self._facts)
        self._workers = self._hooks.subscribe(self._endpoint)
        try:
            # All are sent in this turn of the loop: later their files may be closed, and their numbers be another's.
            models = list(self._models.values())
            errors = await asyncio.gather(*[self._hand_over(model) for model in models])
        except IsolationError:
            self._end()
            raise
        for model, error in zip(models, errors, strict=True):
            if error and self._models.get((model.name, model.version)) is model:
                _log.error("model_not_served", model=model.name, version=model.version, error=error)
                del self._models[model.name, model.version]
        self._tell(messages.Serve())
        return child

    def _hand_over(self, model: ServedModel) -> Coroutine[Any, Any, str]:
        """Send a model at once; what is returned waits for why it has no session, or an empty string.

        Raises:
            IsolationError: (when awaited) the gateway ended.
        """
        self._number += 1
        report: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reports[self._number] = report
        names = list(model.files)
        for at in range(0, len(names), MAX_FILES_A_MESSAGE):
            part = names[at : at + MAX_FILES_A_MESSAGE]
            last = at + MAX_FILES_A_MESSAGE >= len(names)
            message = messages.LoadModel(
                self._number, model.name, model.version, model.digest, model.signer, tuple(part), last
            )
            self._tell(message, *(model.files[name].fd for name in part))
        if self._channel is None or self._channel.closed:
            self._fail_reports()
        return self._reported(self._number, report)

    async def _reported(self, number: int, report: asyncio.Future[str]) -> str:
        try:
            return await asyncio.wait_for(report, LOAD_TIMEOUT_S)
        except TimeoutError:
            return "no session in time"
        finally:
            self._reports.pop(number, None)

    def _lost(self, child: ChildHandle) -> None:
        """The channel closed: whoever waits for this gateway need not wait any longer."""
        child.kill()
        if self._child is child:
            self._fail_reports()

    def _fail_reports(self) -> None:
        for report in self._reports.values():
            if not report.done():
                report.set_exception(IsolationError("the gateway ended"))

    def _endpoint(self, endpoint: Endpoint) -> None:
        self._tell(
            messages.WorkerEndpoint(endpoint.number, endpoint.policy_sha256, endpoint.revision, endpoint.request_reads),
            endpoint.sock.fileno(),
            endpoint.stamp_fd,
        )
        endpoint.close()  # the channel has its own copies

    def _tell(self, message: messages.AgentMessage, *fds: int) -> None:
        if self._channel is None or self._channel.closed:
            return
        # A gateway that does not read is cut off by the channel; its end is handled where it is waited for.
        with contextlib.suppress(IsolationError):
            self._channel.send(messages.encode(message), fds)

    def _frame(self, frame: Frame) -> None:
        frame.close_fds()
        try:
            hot = messages.split_hot_frame(frame.data, messages.APPEND)
            if hot is not None:
                self._append(*hot)
            else:
                self._message(messages.decode_gateway_message(frame.data))
        except IsolationError as error:
            _log.error("gateway_broke_the_protocol", error=str(error))
            if self._channel:
                self._channel.close()

    def _append(self, number: int, encoded: bytes) -> None:
        try:
            event = decode_event(encoded)
        except AuditError as error:
            raise IsolationError(str(error)) from error
        if event.kind not in messages.GATEWAY_KINDS:
            raise IsolationError(f"a gateway may not record {event.kind!r}")
        if self._acknowledger is None:
            return
        try:
            self._acknowledger.follow(number, self._hooks.record(event, len(encoded)))
        except AuditError as error:
            self._acknowledger.refuse(number, str(error))

    def _message(self, message: messages.GatewayMessage) -> None:
        match message:
            case messages.Ready():
                self._ready.set()
                self._hooks.serving(holds=True, why="the gateway accepts connections")
            case messages.ModelReport():
                waiting = self._reports.get(message.number)
                if waiting and not waiting.done():
                    waiting.set_result(message.error)
            case messages.Overrun():
                if self._workers:
                    self._workers.overrun(message.worker)
            case messages.Statistics():
                self._hooks.statistics(message)
            case messages.Fatal():
                _log.error("gateway_failed", error=message.error)
            case messages.Drained():
                self._drained.set()

    def _died(self, status: ExitStatus) -> None:
        self._end()
        self._hooks.serving(holds=False, why=f"the gateway ended ({status}); a new one is being started")

    def _end(self) -> None:
        self._ready.clear()
        self._drained.set()
        if self._workers:
            self._workers.close()
            self._workers = None
        self._fail_reports()
        if self._channel and not self._channel.closed:
            self._channel.close()
        if self._child:
            self._child.kill()
        self._channel = self._child = None
        self._hooks.statistics(None)


class _Acknowledger:
    """Tells one gateway what became of its events: the log settles them in their order, so one frame a turn of the loop speaks for all."""

    def __init__(self, channel: AsyncChannel) -> None:
        self._channel = channel
        self._recorded = 0  # the last event of those that shall be acknowledged
        self._scheduled = False

    def follow(self, number: int, recorded: asyncio.Future[Any]) -> None:
        """Acknowledge an event when it is recorded."""
        if recorded.done():
            self._settle(number, recorded)
        else:
            recorded.add_done_callback(lambda done: self._settle(number, done))

    def refuse(self, number: int, error: str) -> None:
        """Say that an event can't be recorded."""
        self._send(messages.acknowledge_frame(number, error))

    def _settle(self, number: int, recorded: asyncio.Future[Any]) -> None:
        if recorded.cancelled():
            self.refuse(number, "the log was closed")
        elif (failure := recorded.exception()) is not None:
            self.refuse(number, str(failure) or type(failure).__name__)
        else:
            self._recorded = number
            if not self._scheduled:
                self._scheduled = True
                asyncio.get_running_loop().call_soon(self._acknowledge)

    def _acknowledge(self) -> None:
        self._scheduled = False
        self._send(messages.acknowledge_frame(self._recorded))

    def _send(self, frame: bytes) -> None:
        # A gateway that is gone waits for nothing any more.
        if not self._channel.closed:
            with contextlib.suppress(IsolationError):
                self._channel.send(frame)
