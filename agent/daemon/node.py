"""The node: joins the flows, answers for the health facts, and is what both control surfaces speak to.

Rules:

1. Each fact of :class:`agent.control.health.Health` is reported here and nowhere else.
2. The node asks the policy for its own actions as ``edgewarden`` with the role ``node``; an operator's calls are asked as the peer.
3. A decision that can't be recorded does not take effect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog

from agent import clock, messages
from agent.attest.evidence import Evidence
from agent.audit.log import AuditLog
from agent.control.health import Health, Metrics
from agent.daemon.membership import Membership
from agent.errors import HostError, PeerError, VerificationError
from agent.flows.attestation import AttestationFlow
from agent.flows.dataplane import Dataplane
from agent.flows.enrolment import EnrolOrder
from agent.flows.keylime import KeylimeFlow
from agent.flows.models import ModelKeeper
from agent.flows.policies import PolicyKeeper
from agent.policy.client import PolicyClient
from agent.policy.messages import Endpoint
from agent.policy.pool import PolicyPool, Subscription
from agent.records import AuditEvent, JsonValue, PolicyAnswer, Principal

__all__ = ["Node"]

_log = structlog.get_logger(__name__)
_SELF = Principal(id="edgewarden", kind="unix", roles=("node",))


@dataclass(slots=True)
class Node:
    """What the flows and the surfaces share. The fields at the end are set as the start goes on."""

    id: str
    audit: AuditLog
    health: Health
    metrics: Metrics
    policy: PolicyClient
    pool: PolicyPool
    facts: messages.NodeFacts = field(default_factory=lambda: messages.NodeFacts(trust="unknown"))
    dataplane: Dataplane = field(init=False)
    models: ModelKeeper = field(init=False)
    policies: PolicyKeeper = field(init=False)
    attestation: AttestationFlow = field(init=False)
    membership: Membership = field(init=False)
    models_changed: asyncio.Event = field(default_factory=asyncio.Event)
    keylime: KeylimeFlow | None = field(default=None, init=False)

    # --- what the flows ask for

    def record(self, event: AuditEvent, size: int | None = None) -> asyncio.Future[Any]:
        """Append to the audit log; keeps the fact ``log_durable``. With a ``size`` in bytes the event came decoded from a gateway."""
        try:
            future = self.audit.append(event) if size is None else self.audit.append_decoded(event, size)
        finally:
            self.report_log()
        if not future.done():
            future.add_done_callback(lambda _: self.report_log())
        return future

    def report_log(self) -> None:
        """Report the fact ``log_durable``. In buffered mode no record's future knows it; and it may change while nothing is recorded."""
        if self.health["log_durable"].holds == self.audit.durable:
            return
        why = self.audit.failure or "records can be made durable"
        self.health.report("log_durable", holds=self.audit.durable, why=why)
        _log.info("log_durable" if self.audit.durable else "log_not_durable", why=why)

    @property
    def policy_sha256(self) -> str:
        """Digest of the policy in force."""
        active = self.pool.active
        return active.sha256 if active else ""

    def bars(self, digests: Iterable[str]) -> str:
        """Return why the controller keeps model files with these digests out; nothing where it does not."""
        return self.membership.trust.bars(digests)

    @property
    def trust(self) -> str:
        """The tier of the last Attestation Result."""
        return self.facts.trust

    def trust_changed(self, *, models: bool) -> None:
        """Tell policy and gateways what the controller thinks of the node; with ``models`` they are looked at again."""
        self.report_trust()
        if models:
            self.models_changed.set()

    def report_trust(self) -> None:
        """Report the fact ``connected``, and tell policy and gateways the age of the last result."""
        facts = self.membership.trust.facts()
        if facts != self.facts:
            self.facts = facts
            self.dataplane.set_facts(facts)
        holds, why = self.membership.trust.connected()
        if self.health.report("connected", holds=holds, why=why):
            _log.log(logging.INFO if holds else logging.WARNING, "connected" if holds else "disconnected", why=why)

    def gauges(self) -> dict[str, int]:
        """Return what is known of the controller's opinion, for the metrics."""
        age_s = self.membership.trust.age_s()
        return {} if age_s is None else {"attestation_result_age_seconds": age_s}

    async def authorize(self, action: str, resource: dict[str, Any]) -> PolicyAnswer:
        """Ask the policy as the node itself."""
        return await self._decide(_SELF, action, resource)

    async def _decide(self, principal: Principal, action: str, resource: dict[str, Any]) -> PolicyAnswer:
        node: dict[str, Any] = {"id": self.id, "trust": self.facts.trust, "posture": self.facts.posture}
        if self.facts.attested_age_s is not None:
            node["attested_age_s"] = self.facts.attested_age_s
        return await self.policy.decide(
            {
                "subject": msgspec.structs.asdict(principal),
                "action": action,
                "resource": resource,
                "request": {"time": clock.rfc3339_seconds(clock.now_us())},
                "node": node,
            }
        )

    def subscribe(self, asker: Callable[[Endpoint], None]) -> Subscription:
        """Give policy workers to a gateway."""
        return self.pool.subscribe(asker)

    def serving(self, *, holds: bool, why: str) -> None:
        """Report the fact ``ready``."""
        if self.health.report("ready", holds=holds, why=why):
            _log.info("ready" if holds else "not_ready", why=why)

    def statistics(self, report: messages.Statistics | None) -> None:
        """Take a gateway's counters."""
        if report is None:
            self.metrics.gateway_ended()
        else:
            self.metrics.gateway_reported(report.counters)

    # --- what the surfaces ask for

    async def authorize_admin(self, principal: Principal, verb: str) -> None:
        """Raise ``PeerError`` 403 unless the policy allows ``admin.<verb>``; the decision is recorded first."""
        action = f"admin.{verb}"
        answer = await self._decide(principal, action, {})
        await self.record(
            AuditEvent(
                kind="admin",
                time_us=clock.now_us(),
                outcome="ok" if answer.decision.allow else "denied",
                principal=principal.id,
                principal_kind=principal.kind,
                action=action,
                policy_sha256=answer.policy_sha256,
                policy_revision=answer.revision,
                decision_id=answer.decision_id,
                reasons=answer.decision.reasons,
                error=answer.error or "",
            )
        )
        if not answer.decision.allow:
            reasons = ", ".join(answer.decision.reasons) or answer.error or "no reason given"
            raise PeerError(403, "policy", f"{action} is denied to {principal.id}: {reasons}")

    async def evidence(self, nonce: bytes, from_index: int, peer_spki_sha256: str | None) -> bytes:
        """Return Evidence as JSON; there is none while the log and the TPM differ."""
        evidence = await self.collect(nonce, from_index, peer_spki_sha256)
        self.membership.answered(nonce, peer_spki_sha256)
        return evidence.encode()

    async def collect(self, nonce: bytes, from_index: int, control_spki_sha256: str | None) -> Evidence:
        """Return Evidence; there is none while the log and the TPM differ."""
        await self.check_attested()
        return await self.attestation.evidence(nonce, from_index, control_spki_sha256)

    async def check_attested(self) -> None:
        """Keep the fact ``attested``: the TPM answers and holds what the log says.

        Raises:
            VerificationError, TpmError, HostError: it does not.
        """
        try:
            await self.attestation.log.check()
        except (HostError, VerificationError) as error:
            self._attested(holds=False, why=str(error))
            raise
        self._attested(holds=True, why="the measurement log and the TPM agree")

    def _attested(self, *, holds: bool, why: str) -> None:
        if self.health.report("attested", holds=holds, why=why):
            _log.log(logging.INFO if holds else logging.ERROR, "attested" if holds else "attestation_lost", why=why)

    async def ak_public(self) -> bytes:
        """Return the attestation key's public part."""
        return await self.attestation.ak_public()

    def status(self) -> dict[str, JsonValue]:
        """Return health, models, policy, audit log and processes."""
        head = self.audit.head()
        settled = self.attestation.log.settled
        return {
            "node": self.id,
            "health": self.health.as_json(),
            "models": self.models.status(),
            "policy": self.policies.status(),
            "audit": {"size": head.size, "root": head.root.hex()},
            "measurements": settled.count if settled else None,
            "gateway_pid": self.dataplane.pid,
            "controller": self.membership.status(),
        }

    def enrolment(self) -> dict[str, JsonValue]:
        """Return where the node is enrolled, and what its controller thinks of it."""
        return self.membership.status()

    async def enrol(self, order: EnrolOrder, principal: Principal) -> dict[str, JsonValue]:
        """Enrol the node."""
        return await self.membership.enrol(order, principal)

    async def leave(self, principal: Principal) -> dict[str, JsonValue]:
        """Forget the enrolment."""
        return await self.membership.leave(principal)

    async def take_result(self, jwt: str) -> None:
        """Take an Attestation Result."""
        await self.membership.take_result(jwt)

    async def activate_policy(self, bundle: bytes, principal: Principal) -> dict[str, JsonValue]:
        """Take a bundle through its steps."""
        status = await self.policies.activate(bundle, principal)
        self.health.report("enforcing", holds=True, why=f"policy {status['revision']}")
        await self.models.scan()
        return status

    async def rescan_models(self, principal: Principal) -> dict[str, JsonValue]:
        """Bring what is loaded in line with the store."""
        _log.info("models_rescanned", by=principal.id)
        await self.models.scan()
        return {"models": self.models.status()}
