"""A policy bundle from its bytes to the decisions that it makes.

The steps, in this order, at boot and at each activation:

1. verify: OPA's bundle signature by a trusted key, where the configuration demands one (it does by default).
2. try out: a new template process loads it, evaluates every package and decides samples within the deadline.
3. measure: the digest of the bundle's bytes is in the log and in the PCR.
4. record: the audit log holds it.
5. activate: all askers get workers of the new template; the native limits follow; the bundle is kept as the last known good.

A bundle that fails at any step leaves the old one in force, untouched; where it had been measured already, the old one is measured again.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
import structlog

from agent import clock
from agent.attest.log import MeasurementLog
from agent.attest.measurement import policy_entry
from agent.errors import EdgeWardenError, HostError, PolicyError, VerificationError
from agent.flows.dataplane import Dataplane
from agent.flows.models import ModelHooks
from agent.flows.policy_document import AREAS, PolicyDocument
from agent.isolation.memfd import seal_bytes
from agent.policy.bundle import MAX_BUNDLE_BYTES, Bundle
from agent.policy.last_good import LAST_GOOD_FILE, commit, load_last_good, stage
from agent.policy.pool import Activation, PolicyPool
from agent.records import AuditEvent, JsonValue, Principal

__all__ = ["PolicyKeeper"]

CONFIGURED_MARKER: Final = "configured.sha256"

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
        self._active: Activation | None = None
        self._configured_digest = ""
        self._turn = asyncio.Lock()

    def status(self) -> dict[str, JsonValue]:
        """Return revision and digest of the active policy."""
        if self._active is None:
            return {"revision": None, "sha256": None}
        return {"revision": self._active.revision, "sha256": self._active.sha256}

    async def start(self, configured: Path) -> None:
        """Activate a bundle for this start: the configured one where it is new, else the last known good; the other where that is refused.

        Raises:
            PolicyError: both are refused, or the only one.
            HostError: a file can't be read or written.
        """
        candidates = await asyncio.to_thread(self._candidates, configured)
        for path, data in candidates:
            self._configured_digest = hashlib.sha256(data).hexdigest() if path == configured else ""
            try:
                await self.activate(data, Principal(id="edgewarden", kind="unix", roles=("node",)))
            except (PolicyError, VerificationError) as error:
                if path == candidates[-1][0]:
                    raise PolicyError(f"{path}: {error}") from error
                _log.error("policy_refused", path=str(path), error=str(error))
            else:
                return

    async def activate(self, data: bytes, principal: Principal) -> dict[str, JsonValue]:
        """Take a bundle through all steps.

        Raises:
            PolicyError, VerificationError: it is refused; the old one stays in force.
            HostError: the node could not do a step; the old one stays in force.
        """
        async with self._turn:
            native = b""
            measured = False

            async def before_use(activation: Activation) -> None:
                nonlocal measured
                await asyncio.to_thread(self._stage, data)
                # 3. measure, 4. record; what follows needs no space on the disk.
                measured = True
                await self._log.append(policy_entry(activation.revision, bytes.fromhex(activation.sha256)))
                await self._record("ok", principal, activation)
                await asyncio.to_thread(self._keep)
                self._dataplane.set_policy_data(activation.sha256, seal_bytes("policy-data", native))

            try:
                native = await asyncio.to_thread(_native, data, self._trusted)
                self._active = await self._pool.activate(data, before_use)
            except EdgeWardenError as error:
                if measured and self._active is not None:
                    # The log must not go on saying that the new one is in force.
                    await self._log.append(policy_entry(self._active.revision, bytes.fromhex(self._active.sha256)))
                refused = isinstance(error, PolicyError | VerificationError)
                await self._record("refused" if refused else "failed", principal, error=str(error))
                raise
            return self.status()

    def _candidates(self, configured: Path) -> list[tuple[Path, bytes]]:
        """Return the bundles that may be put in force, the first choice first."""
        try:
            self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
            known = _read(self._state / CONFIGURED_MARKER)
        except OSError as error:
            raise HostError(f"{self._state}: {error.strerror}") from error
        kept = load_last_good(self._state)
        last_good = [] if kept is None else [(self._state / LAST_GOOD_FILE, kept)]
        try:
            data = _read(configured)
            if data is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        except OSError as error:
            if not last_good:
                raise HostError(f"policy.bundle: {configured}: {error.strerror}") from error
            _log.warning("configured_policy_unreadable", path=str(configured), error=error.strerror)
            return last_good
        is_new = known != hashlib.sha256(data).hexdigest().encode()
        return [(configured, data), *last_good] if is_new else [*last_good, (configured, data)]

    def _stage(self, data: bytes) -> None:
        stage(self._state, LAST_GOOD_FILE, data)
        if self._configured_digest:
            stage(self._state, CONFIGURED_MARKER, self._configured_digest.encode())

    def _keep(self) -> None:
        commit(self._state, LAST_GOOD_FILE)
        if self._configured_digest:
            # After the bundle: a crash in between takes the configured bundle up once more.
            commit(self._state, CONFIGURED_MARKER)
            self._configured_digest = ""

    async def _record(
        self,
        outcome: Literal["ok", "refused", "failed"],
        principal: Principal,
        activation: Activation | None = None,
        *,
        error: str = "",
    ) -> None:
        await self._hooks.record(
            AuditEvent(
                kind="policy.activate",
                time_us=clock.now_us(),
                outcome=outcome,
                principal=principal.id,
                principal_kind=principal.kind,
                action="policy.activate",
                policy_sha256=activation.sha256 if activation else "",
                policy_revision=activation.revision if activation else "",
                error=error,
            )
        )


def _read(path: Path) -> bytes | None:
    """Read a file up to one byte more than a bundle can have; None when there is none."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BUNDLE_BYTES + 1)
    except FileNotFoundError:
        return None


def _native(data: bytes, trusted: Sequence[bytes]) -> bytes:
    """Return the areas of a bundle's data that the gateway enforces, once they are validated."""
    bundle = Bundle.from_bytes(data, trusted)
    missing = [area for area in AREAS if area not in bundle.data]
    if missing:
        raise PolicyError(f"the bundle has no data.{missing[0]}")
    document = msgspec.json.encode({area: bundle.data[area] for area in AREAS})
    PolicyDocument.parse(document)
    return document
