"""The node's life with a controller: enrol, be appraised, leave.

Rules:

1. One enrolment at a time, and none while there is one. What takes part in it begins only after it is on the disk, and ends before it is forgotten.
2. A node that is enrolled listens for its controller where a control listener is configured without certificates of its own, and pushes in mode push.
3. Enrolling and leaving are recorded with their outcome, and take effect only when they are: an enrolment whose record fails is forgotten
   again, and who can't record that the node left stays.
4. A leaving that fails leaves the node as it was: it goes on to speak to its controller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeAlias

import structlog

from agent import clock
from agent.attest.enrolment import JoinToken
from agent.attest.evidence import Evidence
from agent.attest.tpm_thread import TpmThread
from agent.config import ControlSettings, split_listen
from agent.daemon.control import ControlListener
from agent.errors import AuditError, EdgeWardenError, HostError, PeerError
from agent.flows.controller import controller_origin
from agent.flows.enrolled import EnrolmentStore, Identity, Mode
from agent.flows.enrolment import EnrolmentFlow, EnrolOrder
from agent.flows.push import Reporter
from agent.flows.trust import TrustKeeper
from agent.records import AuditEvent, JsonValue, Principal

__all__ = ["Membership", "MembershipHooks"]

MAX_ERROR_CHARS = 1000
Spawn: TypeAlias = Callable[[Coroutine[Any, Any, object]], "asyncio.Task[object]"]
_log = structlog.get_logger(__name__)


class MembershipHooks(Protocol):
    """What it needs of the node, besides what a :class:`~agent.flows.trust.TrustKeeper` needs."""

    def record(self, event: AuditEvent) -> asyncio.Future[Any]:
        """Append to the audit log."""

    def trust_changed(self, *, models: bool) -> None:
        """Take up the facts of the trust keeper."""

    async def collect(self, nonce: bytes, from_index: int, control_spki_sha256: str | None) -> Evidence:
        """Return Evidence."""


class Membership:
    """At most one controller.

    Args:
        node: its id.
        store: where the enrolment is kept.
        settings: of the control listener, where there is one.
        hooks: see :class:`MembershipHooks`.
    """

    def __init__(
        self, node: str, store: EnrolmentStore, tpm: TpmThread, settings: ControlSettings | None, hooks: MembershipHooks
    ) -> None:
        self._node = node
        self._store = store
        self._tpm = tpm
        self._settings = settings
        self._hooks = hooks
        self._identity: Identity | None = None
        self._listener: ControlListener | None = None
        self._reporter: Reporter | None = None
        self._reporting: asyncio.Task[object] | None = None
        self._turn = asyncio.Lock()
        self._spawn: Spawn
        self.trust = TrustKeeper(store, hooks)

    # --- the node's life

    async def restore(self) -> None:
        """Take up what an earlier agent was enrolled to; before any model is loaded.

        Raises:
            VerificationError, HostError: there is an enrolment that can't be read.
        """
        self._identity = await asyncio.to_thread(self._store.load, self._node)
        if self._identity is not None:
            self.trust.begin(self._identity, await asyncio.to_thread(self._store.result))

    async def start(self, listener: ControlListener | None, spawn: Spawn) -> None:
        """Speak to the controller from now on, where there is one.

        Args:
            spawn: runs what ends with the process only; its failure is the process's.
            listener: to be served with the enrolled certificate; None where there is none, or it has a certificate of its own.
        """
        self._listener, self._spawn = listener, spawn
        if self._identity is not None:
            await self._begin(self._identity)

    async def stop(self) -> None:
        """Speak to it no more; the enrolment stays."""
        if self._reporting is not None:
            self._reporting.cancel()
            await asyncio.wait([self._reporting])
        self._reporter = self._reporting = None
        if self._listener is not None:
            await self._listener.stop()

    async def _begin(self, identity: Identity) -> None:
        if self._listener is not None:
            await self._listener.serve_enrolled(identity)
        self._reporter = Reporter(identity, self)
        self._reporting = self._spawn(self._reporter.run())

    # --- what an operator asks for

    async def enrol(self, order: EnrolOrder, principal: Principal) -> dict[str, JsonValue]:
        """Enrol the node.

        Raises:
            PeerError: 409: it is enrolled, or another call enrols it; 400: the order does not fit the configuration.
            EdgeWardenError: as :meth:`~agent.flows.enrolment.EnrolmentFlow.run`.
        """
        if self._turn.locked():
            raise PeerError(409, "enrolling", "another call enrols this node or makes it leave")
        async with self._turn:
            if self._identity is not None:
                url = self._identity.enrolment.url
                raise PeerError(409, "enrolled", f"this node is enrolled at {url}: leave first")
            token = JoinToken.parse(order.token)
            origin, _, _ = controller_origin(token.url)  # before it is told or recorded: an address may hold a password
            mode, address = self._mode(order)
            try:
                enrolled = await EnrolmentFlow(self._node, self._tpm, self._store, self._hooks.collect).run(
                    token, mode, address
                )
            except EdgeWardenError as error:
                _log.warning("enrolment_failed", url=origin, error=str(error))
                await self._record("node.enrol", principal, origin, error=str(error))
                raise
            try:
                await self._record("node.enrol", principal, origin, mode=mode, trust=enrolled.result.status)
            except AuditError:
                await asyncio.to_thread(self._store.forget)
                raise
            self._identity = enrolled.identity
            self.trust.begin(enrolled.identity, enrolled.jwt, fresh=True)
            await self._begin(enrolled.identity)
            _log.info("enrolled", url=origin, mode=mode, trust=enrolled.result.status)
            return self.status()

    def _mode(self, order: EnrolOrder) -> tuple[Mode, str | None]:
        address = order.address or self._known_address()
        able = self._listener is not None
        mode: Mode = order.mode or ("pull" if able and address else "push")
        if mode == "push":
            return mode, None
        if not able:
            raise PeerError(400, "mode", "pull needs a section control: in the configuration, without certificates")
        if address is None:
            raise PeerError(400, "address", "pull needs the address where the controller reaches the control listener")
        return mode, address

    def _known_address(self) -> str | None:
        """Return the control listener's address, where it is one that others can use."""
        if self._listener is None or self._settings is None:
            return None
        host, _ = split_listen(self._settings.listen)
        shown, port = self._listener.address
        if host in {"0.0.0.0", "::"} or host.startswith("127.") or host == "::1":  # noqa: S104 -- compared, not bound
            return None
        return f"[{shown}]:{port}" if ":" in shown else f"{shown}:{port}"

    async def leave(self, principal: Principal) -> dict[str, JsonValue]:
        """Forget the enrolment.

        Raises:
            PeerError: 409: there is none, or it is being made.
            HostError: the disk does not do its part; the node may be enrolled still.
        """
        if self._turn.locked():
            raise PeerError(409, "enrolling", "another call enrols this node or makes it leave")
        async with self._turn:
            identity = self._identity
            if identity is None:
                raise PeerError(409, "not_enrolled", "this node is not enrolled")
            url = controller_origin(identity.enrolment.url)[0]
            await self._record("node.leave", principal, url)
            await self.stop()
            try:
                await asyncio.to_thread(self._store.forget)
            except HostError as error:
                await self._begin(self._identity or identity)  # which was renewed meanwhile, perhaps
                await self._record("node.leave", principal, url, error=str(error))
                raise
            self._identity = None
            self.trust.end()
            _log.warning("enrolment_left", url=url, by=principal.id)
            return self.status()

    async def _record(self, kind: str, principal: Principal, url: str, *, error: str = "", **detail: str) -> None:
        await self._hooks.record(
            AuditEvent(
                kind=kind,
                time_us=clock.now_us(),
                outcome="failed" if error else "ok",
                principal=principal.id,
                principal_kind=principal.kind,
                action=kind.partition(".")[2],
                error=error[:MAX_ERROR_CHARS],
                detail={"controller": url, **detail},
            )
        )

    def status(self) -> dict[str, JsonValue]:
        """Return where the node is enrolled, and what the controller thinks of it."""
        holds, why = self.trust.connected()
        status: dict[str, JsonValue] = {"enrolled": False, "connected": holds, "why": why, **self.trust.status()}
        identity = self._identity
        if identity is None:
            return status
        enrolment = identity.enrolment
        status |= {
            "enrolled": True,
            "controller": enrolment.url,
            "node": enrolment.node,
            "mode": enrolment.mode,
            "address": enrolment.address,
            "since": clock.rfc3339_seconds(enrolment.since * 1_000_000),
            "certificate_until": clock.rfc3339_seconds(int(identity.valid_until) * 1_000_000),
            "control_spki_sha256": identity.spki_sha256,
            "push_failure": self._reporter.failure if self._reporter else "",
        }
        return status

    # --- what a controller and the rounds ask for

    def answered(self, nonce: bytes, control_spki_sha256: str | None) -> None:
        """Note that Evidence was made; with the enrolled key in its claims a result may speak of it."""
        if self._identity is not None and control_spki_sha256 == self._identity.spki_sha256:
            self.trust.quoted(nonce)

    async def controller_evidence(self, nonce: bytes, from_index: int) -> Evidence:
        """Return Evidence for the controller; its result may speak of it."""
        if self._identity is None:
            raise PeerError(409, "not_enrolled", "this node is not enrolled")
        evidence = await self._hooks.collect(nonce, from_index, self._identity.spki_sha256)
        self.trust.quoted(nonce)
        return evidence

    async def take_result(self, jwt: str) -> None:
        """Take an Attestation Result, or raise."""
        await self.trust.take(jwt)

    async def renewed(self, identity: Identity) -> None:
        """Keep a renewed certificate and show it from now on."""
        await asyncio.to_thread(self._store.save_certificate, identity.certificate)
        self._identity = identity
        if self._listener is not None:
            await self._listener.serve_enrolled(identity)
        _log.info("certificate_renewed", until=clock.rfc3339_seconds(int(identity.valid_until) * 1_000_000))
