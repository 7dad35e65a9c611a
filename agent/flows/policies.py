"""A policy bundle from its bytes to the decisions that it makes.

The steps, in this order, at boot and at each activation:

1. verify: OPA's bundle signature by a trusted key, where the configuration demands one (it does by default).
2. try out: a new template process loads it, evaluates every package and decides samples within the deadline.
3. measure: the digest of the bundle's bytes is in the log and in the PCR.
4. record: the audit log holds it.
5. activate: all askers get workers of the new template; the native limits follow; the bundle is kept as the last known good.

A bundle that fails at any step leaves the old one in force, untouched.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import structlog

from agent import clock
from agent.attest.log import MeasurementLog
from agent.attest.measurement import policy_entry
from agent.errors import HostError, PolicyError
from agent.flows.dataplane import Dataplane
from agent.flows.models import ModelHooks
from agent.flows.policy_data import AREAS, PolicyData
from agent.isolation.memfd import seal_bytes
from agent.policy.bundle import Bundle
from agent.policy.pool import PolicyPool
from agent.records import AuditEvent, JsonValue, Principal

__all__ = ["PolicyKeeper"]

_log = structlog.get_logger(__name__)


class PolicyKeeper:
    """Keeps the active policy and its last known good copy.

    Args:
        state: directory of the last known good bundle.
        trusted: PEM keys that sign bundles; empty where no signature is demanded.
    """

    def __init__(
        self,
        state: Path,
        trusted: Sequence[bytes],
        *,
        pool: PolicyPool,
        log: MeasurementLog,
        dataplane: Dataplane,
        hooks: ModelHooks,
    ) -> None:
        self._state = state
        self._trusted = trusted
        self._pool = pool
        self._log = log
        self._dataplane = dataplane
        self._hooks = hooks
        self._active: Bundle | None = None
        self._turn = asyncio.Lock()

    def status(self) -> dict[str, JsonValue]:
        """Return revision and digest of the active policy."""
        if self._active is None:
            return {"revision": None, "sha256": None}
        return {"revision": self._active.revision, "sha256": self._active.sha256}

    async def start(self, configured: Path) -> None:
        """Activate the bundle for this start: the configured one where it is new, else the last known good.

        Raises:
            PolicyError, VerificationError: neither can be activated.
            HostError: a file can't be read or written.
        """
        data, is_new = await asyncio.to_thread(self._choose, configured)
        node = Principal(id="edgewarden", kind="unix", roles=("node",))
        await self.activate(data, node)
        if is_new:
            await asyncio.to_thread(_keep, self._state / "configured.sha256", hashlib.sha256(data).hexdigest().encode())

    async def activate(self, data: bytes, principal: Principal) -> dict[str, JsonValue]:
        """Take a bundle through all steps.

        Raises:
            PolicyError, VerificationError: it is refused; the old one stays in force.
        """
        async with self._turn:
            try:
                bundle, native, document = await asyncio.to_thread(self._read, data)
                prepared = await self._pool.prepare(bundle)
            except PolicyError as error:
                await self._record("refused", principal, error=str(error))
                raise
            try:
                await self._log.append(policy_entry(bundle.revision, bytes.fromhex(bundle.sha256)))
                await self._record("ok", principal, bundle=bundle)
                await asyncio.to_thread(_keep, self._state / "active.tar.gz", data)
            except BaseException:
                prepared.discard()
                raise
            self._pool.commit(prepared)
            self._dataplane.set_policy_data(bundle.sha256, seal_bytes("policy-data", document))
            self._active = bundle
            _log.info("policy_activated", revision=bundle.revision, sha256=bundle.sha256, limits=sorted(native.limits))
            return self.status()

    def _choose(self, configured: Path) -> tuple[bytes, bool]:
        active, marker = self._state / "active.tar.gz", self._state / "configured.sha256"
        try:
            data = configured.read_bytes()
            known = marker.read_text() if marker.exists() and active.exists() else ""
            if known == hashlib.sha256(data).hexdigest():
                return active.read_bytes(), False
        except OSError as error:
            if active.exists():
                _log.warning("configured_policy_unreadable", path=str(configured), error=error.strerror)
                return active.read_bytes(), False
            raise HostError(f"policy bundle {configured}: {error.strerror}") from error
        return data, True

    def _read(self, data: bytes) -> tuple[Bundle, PolicyData, bytes]:
        bundle = Bundle.from_bytes(data, self._trusted)
        missing = [area for area in AREAS if area not in bundle.data]
        if missing:
            raise PolicyError(f"the bundle has no data.{missing[0]}")
        document = msgspec.json.encode({area: bundle.data[area] for area in AREAS})
        return bundle, PolicyData.parse(document), document

    async def _record(
        self, outcome: str, principal: Principal, *, bundle: Bundle | None = None, error: str = ""
    ) -> None:
        await self._hooks.record(
            AuditEvent(
                kind="policy.activate",
                time_us=clock.now_us(),
                outcome="ok" if outcome == "ok" else "refused",
                principal=principal.id,
                principal_kind=principal.kind,
                action="policy.activate",
                policy_sha256=bundle.sha256 if bundle else "",
                policy_revision=bundle.revision if bundle else "",
                error=error,
            )
        )


def _keep(path: Path, data: bytes) -> None:
    """Write a small file so that a crash leaves the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
