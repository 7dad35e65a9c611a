"""Evidence in, Attestation Result out: the one place where a node's trust is decided, for polls, pushes and enrolments alike.

1. The Reference Values are the group's; the node's own boot PCRs at enrolment go with them, for rules of mode ``pinned``.
2. The appraiser is the node's own (:mod:`agent.attest.appraisal`). What a log says is read from the database only when a node's log has grown or
   its group has new Reference Values: in between the kept judgement holds.
3. What a node sends may be long, and costs those alone that wait for it: its appraisal leaves the event loop.
4. What was found is kept, with history, audit record and events, in one transaction; only then is the result signed and told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from agent import clock
from agent.attest.appraisal import Appraisal, Expectation, StateNeededError, appraise
from agent.attest.reference import Measurement, PolicyReference, ReferenceValues
from agent.attest.result import AttestationResult, CheckResult
from controller import __version__
from controller.metrics import Figures
from controller.store import audit, fleet, outbox, references, results, schedule
from controller.store.database import Database
from controller.store.fleet import NodeRecord
from controller.store.results import Appraised
from controller.trust.authority import Authority

__all__ = ["Appraiser", "Connect", "Finding"]

MAX_CACHED_FILES = 200_000  # of all versions that are held ready; some hundred bytes each
_A_VERSION = 100  # what a version costs besides, in files
MAX_INLINE_BYTES = 128 * 1024  # of Evidence and of a log's state, for an appraisal in the event loop: some milliseconds
_BUILD = f"edgewarden-controller {__version__}"
_NOTHING_APPROVED = ReferenceValues(
    measurement=Measurement(14), policy=PolicyReference(assigned="0" * 64), configs=frozenset()
)
# AR4SI, section 2.3: what each tier is said by. 2: recognised, approved; 32: look into it; 96: not what was approved; 0: no claim.
_AFFIRMING, _WARNING, _CONTRAINDICATED, _NOTHING = 2, 32, 96, 0
_VECTOR = {
    "executables": ("models", "refused"),
    "configuration": ("config", "policy"),
    "hardware": ("boot-aggregate", "boot-pcrs"),
}
_VALUES = {"ok": _AFFIRMING, "warning": _WARNING, "failed": _CONTRAINDICATED, "skipped": _NOTHING, "retry": _NOTHING}


Connect: TypeAlias = Callable[[], AbstractAsyncContextManager[AsyncConnection]]
"""Opens a transaction, for who may not need one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """An appraisal of one node, ready to be kept."""

    appraised: Appraised
    appraisal: Appraisal
    result: AttestationResult


class Appraiser:
    """Holds Reference Values, which never change once they have a version, and the key that signs.

    Args:
        authority: the controller's keys.
        figures: where appraisals are counted.
        nats: whether events go to NATS.
    """

    def __init__(self, authority: Authority, figures: Figures, *, nats: bool = False) -> None:
        self._authority = authority
        self._figures = figures
        self._nats = nats
        self._versions: dict[tuple[str, int], ReferenceValues] = {}

    async def reference(self, connect: Connect, group: str, version: int) -> ReferenceValues:
        """Return what a group's nodes are held against; where nothing was approved yet, nothing is."""
        if version == 0:
            return _NOTHING_APPROVED
        key = (group, version)
        values = self._versions.pop(key, None)
        if values is None:
            async with connect() as connection:
                values = await references.get(connection, *key)
            while self._versions and self._held() + _A_VERSION + len(values.models) > MAX_CACHED_FILES:
                del self._versions[next(iter(self._versions))]
        self._versions[key] = values  # the last one used is the last one
        return values

    def _held(self) -> int:
        return sum(_A_VERSION + len(values.models) for values in self._versions.values())

    async def appraise(self, connect: Connect, node: NodeRecord, evidence: bytes, nonce: bytes, spki: str) -> Finding:
        """Appraise Evidence that a peer with this key has sent for this nonce. Nothing that it holds is an error.

        Raises:
            PeerError: 409, when another appraisal of this node was kept meanwhile.
            StoreError: what is needed can't be read.
        """
        reference = await self.reference(connect, node.group, node.version)
        expect = Expectation(
            nonce=nonce,
            ak_public=node.ak_public,
            reference=reference,
            control_spki_sha256=spki,
            verified=node.verified,
            enrolled_pcrs=node.boot_pcrs,
        )
        work = len(evidence)
        try:
            appraisal, took_s = await _timed(evidence, expect, work)
        except StateNeededError:
            async with connect() as connection:
                verified, size = await fleet.with_state(connection, node)
            node, work = replace(node, verified=verified), work + size
            appraisal, took_s = await _timed(evidence, replace(expect, verified=verified), work)
        self._figures.appraisal_s.observe(took_s)
        return self._finding(node, reference, appraisal, nonce)

    def _finding(self, node: NodeRecord, reference: ReferenceValues, appraisal: Appraisal, nonce: bytes) -> Finding:
        now_us = clock.now_us()
        checks = tuple(
            CheckResult(check.name, check.outcome, check.words, check.entries)
            for check in appraisal.checks
            if check.outcome in {"failed", "warning", "retry"}
        )
        status = appraisal.status
        if status != "none" and appraisal.claims is not None and appraisal.claims.node != node.id:
            status = "contraindicated"
            checks = (CheckResult("node", "failed", f"the node calls itself {appraisal.claims.node}"), *checks)
        self._figures.appraisals.add(status)
        appraised = Appraised(
            before=node,
            status=status,
            checks=msgspec.json.encode(checks).decode(),
            claims=msgspec.json.encode(appraisal.claims).decode(),
            nonce=nonce.hex(),
            version=node.version,
            at_us=now_us,
            verified=appraisal.verified,
        )
        result = AttestationResult(
            node=node.id,
            status=status,
            issued_at=now_us // 1_000_000,
            nonce=nonce.hex(),
            vector=_vector(appraisal),
            policy_id=f"urn:edgewarden:reference:{node.group}:{node.version}",
            build=_BUILD,
            checks=checks,
            interval_s=node.interval_s,
            withdrawn=reference.withdrawn_digests,
        )
        return Finding(appraised, appraisal, result)

    async def keep_same(self, database: Database, finding: Finding) -> bool:
        """Keep an appraisal of a node that was reached before and shows what it showed then, at the least cost.

        Returns:
            False where anything is news: nothing was written, and :meth:`keep` is due.
        """
        if finding.appraised.before.failures:
            return False
        async with database.alone() as connection:
            return await results.refresh(connection, finding.appraised)

    async def keep(self, connection: AsyncConnection, finding: Finding) -> None:
        """Write an appraisal in the caller's transaction."""
        found = await results.save(connection, finding.appraised)
        if found.changed:
            failed = finding.result.checks[0] if finding.result.checks else None
            await audit.append(
                connection,
                audit.AuditEntry(
                    kind="node.result",
                    principal="controller",
                    outcome="ok" if found.status in {"affirming", "warning"} else "refused",
                    node=found.before.id,
                    check=failed.name if failed else "",
                    words=failed.words if failed else "",
                    detail={"status": found.status, "before": found.before.status or "none", "version": found.version},
                ),
            )
            news = {
                "status": found.status,
                "before": found.before.status or "none",
                "checks": msgspec.json.decode(found.checks),
            }
            await outbox.emit(connection, "node.result", found.before.id, news, found.at_us, nats=self._nats)

    async def keep_silence(self, connection: AsyncConnection, node: NodeRecord, words: str) -> None:
        """Write that a node did not answer; the first time it is news."""
        if not await schedule.silent(connection, node.id, words):
            return
        entry = audit.AuditEntry(
            kind="node.unreachable", principal="controller", outcome="failed", node=node.id, words=words
        )
        await audit.append(connection, entry)
        news = {"error": words}
        await outbox.emit(connection, "node.unreachable", node.id, news, clock.now_us(), nats=self._nats)

    def sign(self, finding: Finding) -> str:
        """Return the result as a JWT; only for what was kept."""
        return finding.result.sign(self._authority.result_key, self._authority.result_kid)

    def sign_kept(self, row: dict[str, Any], reference: ReferenceValues) -> str:
        """Return the last result of a node's row, as of when it was appraised."""
        result = AttestationResult(
            node=row["id"],
            status=row["status"],
            issued_at=row["appraised_us"] // 1_000_000,
            nonce=row["nonce"],
            vector=_tier_vector(row["status"]),
            policy_id=f"urn:edgewarden:reference:{row['group_name']}:{row['version']}",
            build=_BUILD,
            checks=msgspec.json.decode(row["checks"], type=tuple[CheckResult, ...]),
            interval_s=row["interval_s"],
            withdrawn=reference.withdrawn_digests,
        )
        return result.sign(self._authority.result_key, self._authority.result_kid)


async def _timed(evidence: bytes, expect: Expectation, work_bytes: int) -> tuple[Appraisal, float]:
    """Appraise, on another thread where it takes longer than everybody else should wait; returns how long it took, too."""

    def work() -> tuple[Appraisal, float]:
        began_ns = time.perf_counter_ns()
        return appraise(evidence, expect), (time.perf_counter_ns() - began_ns) / 1e9

    return work() if work_bytes <= MAX_INLINE_BYTES else await asyncio.to_thread(work)


def _tier_vector(status: str) -> dict[str, int]:
    """The same for a result of which only the tier was kept."""
    values = {"affirming": _AFFIRMING, "warning": _WARNING, "contraindicated": _CONTRAINDICATED}
    return {"instance-identity": values.get(status, _NOTHING)}


def _vector(appraisal: Appraisal) -> dict[str, int]:
    """Say the checks in AR4SI's words. Where the Evidence is not authentic, nothing is claimed but that."""
    if appraisal.status == "none":
        return {"instance-identity": _NOTHING}
    outcomes = {check.name: check.outcome for check in appraisal.checks}
    worst = {claim: max(_VALUES[outcomes[name]] for name in names) for claim, names in _VECTOR.items()}
    return {"instance-identity": _AFFIRMING, **worst}
