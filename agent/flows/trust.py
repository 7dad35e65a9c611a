"""What the controller thinks of this node: Attestation Results from their arrival to their effect.

The steps, in this order, for each result:

1. verify: one of the controller's keys has signed it, and it speaks of this node.
2. fresh: its nonce is one that this node quoted lately and that no result has answered yet. None is older than the last one, unless that one
   lies in the future: else a controller whose clock was wrong once could never speak to this node again.
3. restrict: what is worse than before takes effect at once, whatever becomes of the next steps.
4. keep: on the disk, so that a restart forgets neither the tier nor what was withdrawn.
5. record: a change of tier, or of what is withdrawn, is in the audit log.
6. effect: policy and models are told.

Trust is ``unknown`` only while the node is not enrolled. An enrolled node without a result that it can read has ``none``, and loads nothing: it
cannot know what was withdrawn. The age that policy is told is rounded up, so that it holds until it is told again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import Any, Final, Protocol

import structlog

from agent import clock
from agent.attest.result import AttestationResult
from agent.errors import VerificationError
from agent.flows.enrolled import EnrolmentStore, Identity
from agent.messages import NodeFacts
from agent.records import AuditEvent, JsonValue

__all__ = ["AGE_STEP_S", "FUTURE_S", "MAX_NONCES", "TrustHooks", "TrustKeeper"]

MAX_NONCES: Final = 64  # quoted and not answered
AGE_STEP_S: Final = 5  # the age is told in steps: decisions are remembered for as long as nothing changes
AGE_SLACK_S: Final = 2  # until it is told again
FUTURE_S: Final = 60  # what a result may lie in the future: clocks differ
MAX_RECORDED_DIGESTS: Final = 32
MAX_RECORDED_CHECKS: Final = 64
MAX_CHECK_CHARS: Final = 128
MISSED_INTERVALS: Final = 2.5  # without a result, until the node is not connected any more
_RANK: Final = {"contraindicated": 0, "none": 1, "warning": 2, "affirming": 3}
_CHECK = "result"
_log = structlog.get_logger(__name__)


class TrustHooks(Protocol):
    """Whom it tells."""

    def record(self, event: AuditEvent) -> asyncio.Future[Any]:
        """Append to the audit log."""

    def trust_changed(self, *, models: bool) -> None:
        """Take up :meth:`TrustKeeper.facts` now; with ``models`` what may be loaded has changed as well."""


class TrustKeeper:
    """The last Attestation Result, and what follows from it.

    Args:
        store: where it is kept.
        hooks: see :class:`TrustHooks`.
    """

    def __init__(self, store: EnrolmentStore, hooks: TrustHooks) -> None:
        self._store = store
        self._hooks = hooks
        self._identity: Identity | None = None
        self._last: AttestationResult | None = None
        self._tier = "unknown"
        self._issued_at: int | None = None
        self._withdrawn: frozenset[str] | None = frozenset()  # None: it can't be known
        self._nonces: dict[str, None] = {}
        self._taken_us: int | None = None
        self._interval_s = 60
        self._turn = asyncio.Lock()

    # --- the enrolment's begin and end

    def begin(self, identity: Identity, jwt: str | None, *, fresh: bool = False) -> None:
        """Take up an enrolment and the last result that was kept; ``fresh``: it came just now, with the grant."""
        self._identity = identity
        self._interval_s = identity.enrolment.interval_s
        self._tier, self._withdrawn = "none", None
        self._last, self._issued_at, self._taken_us = None, None, None
        try:
            if jwt is None:
                raise VerificationError(_CHECK, "the last Attestation Result is lost")
            last = AttestationResult.verify(jwt, identity.keys, identity.enrolment.node)
        except VerificationError as error:
            _log.error("attestation_result_lost", error=str(error))
        else:
            self._apply(last, last.status, last.issued_at, last.withdrawn)
            self._taken_us = clock.monotonic_us() if fresh else None
        self._hooks.trust_changed(models=True)

    def end(self) -> None:
        """Forget the enrolment."""
        self._identity = self._last = self._issued_at = self._taken_us = None
        self._tier, self._withdrawn = "unknown", frozenset()
        self._nonces.clear()
        self._hooks.trust_changed(models=True)

    def quoted(self, nonce: bytes) -> None:
        """Remember a nonce that Evidence for the controller answers; the oldest is forgotten."""
        self._nonces[nonce.hex()] = None
        if len(self._nonces) > MAX_NONCES:
            del self._nonces[next(iter(self._nonces))]

    # --- a result

    async def take(self, jwt: str) -> AttestationResult:
        """Take a result through its steps.

        Raises:
            VerificationError: ``result``: it does not count.
            HostError, AuditError: it can't be kept or recorded; only what is worse than before is in effect.
        """
        async with self._turn:
            identity = self._identity
            if identity is None:
                raise VerificationError(_CHECK, "this node is not enrolled")
            # 1. verify
            result = AttestationResult.verify(jwt, identity.keys, identity.enrolment.node)
            # 2. fresh
            self._check_fresh(result)
            # 3. restrict
            before = (self._tier, self._withdrawn)
            self._restrict(result)
            # 4. keep
            await asyncio.to_thread(self._store.save_result, jwt)
            # 5. record
            changed = before != (result.status, result.withdrawn)
            if changed:
                await self._hooks.record(_event(before[0], result))
            # 6. effect
            del self._nonces[result.nonce]
            self._apply(result, result.status, result.issued_at, result.withdrawn)
            self._taken_us = clock.monotonic_us()
            self._interval_s = result.interval_s
            self._hooks.trust_changed(models=changed)
        if changed:
            _log.warning("trust_changed", before=before[0], now=result.status, withdrawn=len(result.withdrawn))
        return result

    def _check_fresh(self, result: AttestationResult) -> None:
        if result.nonce not in self._nonces:
            raise VerificationError(_CHECK, "its nonce is none that this node quoted lately, or it was answered before")
        last = self._issued_at
        if last is not None and result.issued_at < last <= clock.now() + FUTURE_S:
            raise VerificationError(_CHECK, "it is older than the last one")

    def _restrict(self, result: AttestationResult) -> None:
        withdrawn = self._withdrawn
        union = None if withdrawn is None else withdrawn | result.withdrawn
        worse = _RANK[result.status] < _RANK[self._tier]
        if worse or union != withdrawn:
            issued_at = result.issued_at if worse else self._issued_at
            self._apply(self._last, result.status if worse else self._tier, issued_at, union)
            self._hooks.trust_changed(models=True)

    def _apply(
        self, last: AttestationResult | None, tier: str, issued_at: int | None, withdrawn: frozenset[str] | None
    ) -> None:
        self._last, self._tier, self._issued_at, self._withdrawn = last, tier, issued_at, withdrawn

    # --- what follows

    @property
    def tier(self) -> str:
        """What policy is told of the node's trust."""
        return self._tier

    def bars(self, digests: Iterable[str]) -> str:
        """Return why model files with these digests must not be loaded, whatever the policy says; nothing where they may."""
        if self._tier == "contraindicated":
            return "the controller calls this node contraindicated"
        if self._withdrawn is None:
            return "what the controller has withdrawn is not known until its next Attestation Result"
        found = sorted(self._withdrawn.intersection(digests))
        return f"withdrawn by the controller: {', '.join(found)}" if found else ""

    def age_s(self) -> int | None:
        """Return the age of the last result in seconds; negative where it lies too far in the future."""
        if self._issued_at is None:
            return None
        age = math.ceil(clock.now() - self._issued_at)
        return 0 if -FUTURE_S <= age < 0 else age

    def facts(self) -> NodeFacts:
        """Return what policy is told of the node; holds for :data:`AGE_SLACK_S` at least."""
        age = self.age_s()
        if age is not None and age >= 0:
            age = -(-(age + AGE_SLACK_S) // AGE_STEP_S) * AGE_STEP_S
        return NodeFacts(trust=self._tier, attested_age_s=age)

    def connected(self) -> tuple[bool, str]:
        """Return whether the controller appraises this node, and the words for it."""
        if self._identity is None:
            return False, "no controller is configured"
        url = self._identity.enrolment.url
        if self._taken_us is None:
            return False, self._ended() or f"{url} has not appraised this node since the agent's start"
        silent_s = (clock.monotonic_us() - self._taken_us) // 1_000_000
        if silent_s > MISSED_INTERVALS * self._interval_s:
            return False, self._ended() or f"{url} has not appraised this node for {silent_s} s"
        return True, f"{url} appraises this node"

    def _ended(self) -> str:
        """Return why no connection can work any more, where the controller's CA has ended."""
        identity = self._identity
        if identity is None or clock.now() < identity.ca_until:
            return ""
        return f"{identity.enrolment.url}: the CA of this enrolment has ended, by this node's clock: leave, and enrol again"

    def status(self) -> dict[str, JsonValue]:
        """Return the last result for an operator."""
        last = self._last
        if last is None:
            return {"trust": self._tier}
        checks: list[JsonValue] = [
            {"name": check.name, "outcome": check.outcome, "words": check.words} for check in last.checks
        ]
        return {
            "trust": self._tier,
            "issued_at": clock.rfc3339_seconds(last.issued_at * 1_000_000),
            "age_s": self.age_s(),
            "interval_s": self._interval_s,
            "checks": checks,
            "withdrawn": len(last.withdrawn),
        }


def _event(before: str, result: AttestationResult) -> AuditEvent:
    return AuditEvent(
        kind="node.trust",
        time_us=clock.now_us(),
        outcome="ok",
        principal="controller",
        detail={
            "before": before,
            "now": result.status,
            "issued_at": result.issued_at,
            "checks": [
                f"{check.name}: {check.outcome}"[:MAX_CHECK_CHARS] for check in result.checks[:MAX_RECORDED_CHECKS]
            ],
            "withdrawn": sorted(result.withdrawn)[:MAX_RECORDED_DIGESTS],
            "withdrawn_count": len(result.withdrawn),
        },
    )
