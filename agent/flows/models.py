"""A model package from the store to the gateway, and back out when it no longer is what was measured.

The steps, in this order, for each package at boot and whenever its files change:

1. read: every file once, into sealed memory; digests are taken over that memory.
2. verify: the signature lists exactly these files with these digests, by a trusted signer; the manifest names this very package.
   Then the controller: nothing is loaded on a node that it calls contraindicated, nor a file that it has withdrawn.
3. inspect: a sandboxed process checks the graph and makes a trial run.
4. measure: each file that is to be handed over is in the log and in the PCR.
5. authorize: the policy allows ``load``; where it denies, the log says that the package is out of force again.
6. record: the audit log holds it.
7. hand over: the gateway makes its session from the same sealed memory.

A new policy is asked again about every package in force, and so is the policy when the node's trust changes. A package that fails at any step is not loaded. A file whose digest is not the signed
one is measured as refused; what no trusted signer has signed has no right digest to differ from, and is in the audit log alone. A package that
was in force and no longer verifies is taken from the gateway first and measured as unloaded; so is one that only the log of an earlier agent
still calls in force. A package whose steps the node itself could not complete (a TPM that hangs, a full disk) stays unsettled and is looked at
again.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from agent import clock
from agent.attest.log import MeasurementLog
from agent.attest.measurement import model_entry, refused_entry, unload_entry
from agent.errors import ConfigError, HostError, VerificationError
from agent.flows.dataplane import Dataplane, ServedModel
from agent.inference.inspection import inspect
from agent.inference.manifest import MANIFEST_FILE, ModelManifest
from agent.inference.package import MODEL_FILE, Package, PackageLimits, read_package
from agent.inference.signing import FileDigestError, Signer, TrustStore, verify_package
from agent.inference.store import is_package, model_directory, package_directories
from agent.isolation.supervisor import Zygote
from agent.records import AuditEvent, JsonValue, PolicyAnswer

__all__ = ["ModelHooks", "ModelKeeper"]

_log = structlog.get_logger(__name__)


class ModelHooks(Protocol):
    """What the flow needs besides its own rooms."""

    @property
    def policy_sha256(self) -> str:
        """Digest of the policy in force."""

    @property
    def trust(self) -> str:
        """What the policy is told of the node's trust."""

    def bars(self, digests: Iterable[str]) -> str:
        """Return why files with these digests must not be loaded, whatever the policy says; nothing where they may."""

    async def authorize(self, action: str, resource: dict[str, Any]) -> PolicyAnswer:
        """Ask the policy as the node itself."""

    def record(self, event: AuditEvent) -> asyncio.Future[Any]:
        """Append to the audit log."""


@dataclass(frozen=True, slots=True)
class _InForce:
    digest: str
    signer: str
    asked: tuple[str, str]  # the policy that allowed it, and the trust that it was told


class ModelKeeper:
    """Keeps what is loaded in line with what the store holds.

    Args:
        store: the directory ``<name>/<version>/``.
        trust: whose signatures count.
        limits: of a package.
        inspect_timeout_s: time for one inspection.
    """

    def __init__(
        self,
        store: Path,
        trust: TrustStore,
        limits: PackageLimits,
        inspect_timeout_s: float,
        *,
        zygote: Zygote,
        log: MeasurementLog,
        dataplane: Dataplane,
        hooks: ModelHooks,
    ) -> None:
        self._store = store
        self._trust = trust
        self._limits = limits
        self._inspect_timeout_s = inspect_timeout_s
        self._zygote = zygote
        self._log = log
        self._dataplane = dataplane
        self._hooks = hooks
        self._in_force: dict[tuple[str, str], _InForce] = {}
        self._refused: dict[tuple[str, str], str] = {}  # why
        self._packages: dict[tuple[str, str], Package] = {}
        self._unsettled: set[tuple[str, str]] = set()
        self._loading: set[tuple[str, str]] = set()
        self._turn = asyncio.Lock()

    def status(self) -> list[JsonValue]:
        """Return what is loaded and what is refused, and why."""
        loaded: list[JsonValue] = [
            {
                "name": name,
                "version": version,
                "state": self._state(name, version),
                "digest": model.digest,
                "signer": model.signer,
            }
            for (name, version), model in sorted(self._in_force.items())
        ]
        refused: list[JsonValue] = [
            {"name": name, "version": version, "state": "refused", "reason": reason}
            for (name, version), reason in sorted(self._refused.items())
        ]
        unsettled: list[JsonValue] = [
            {"name": name, "version": version, "state": "unsettled", "reason": "the node could not look at it yet"}
            for name, version in sorted(self._unsettled - self._in_force.keys() - self._refused.keys())
        ]
        return loaded + refused + unsettled

    def _state(self, name: str, version: str) -> str:
        """Say where a package in force stands: the gateway makes its session, answers with it, or could not take it."""
        if (name, version) in self._loading:
            return "loading"
        return "loaded" if (name, version) in self._dataplane.models else "not served"

    async def scan(self) -> None:
        """Bring every package of the store, and every one that is loaded or that the log calls in force, up to date.

        Raises:
            TpmError, HostError, AuditError, VerificationError: as :meth:`changed`, the first, once all packages were looked at.
        """
        present = await asyncio.to_thread(package_directories, self._store)
        await self._all_changed({*present, *self._in_force, *self._refused})
        async with self._log.locked() as now:
            claimed = {(name, version) for name, version, _ in (path.split("/", 2) for path in now.state.models)}
        await self._all_changed(claimed - self._in_force.keys())

    async def _all_changed(self, keys: set[tuple[str, str]]) -> None:
        failures: list[HostError | VerificationError] = []
        for name, version in sorted(keys):
            try:
                await self.changed(name, version)
            except (HostError, VerificationError) as error:
                failures.append(error)
        if failures:
            raise failures[0]

    async def retry(self) -> None:
        """Look again at what the node itself failed at, and at what a new gateway could not take.

        Raises:
            TpmError, HostError, AuditError, VerificationError: it fails again.
        """
        async with self._turn:
            for name, version in sorted(self._in_force.keys() - self._dataplane.models.keys()):
                self._unsettled.add((name, version))
                await self._unload(name, version, "the gateway has no session of it")
        await self._all_changed(set(self._unsettled))

    async def changed(self, name: str, version: str) -> None:
        """Look at one package again; nothing happens when it is what is in force.

        Raises:
            TpmError, HostError, AuditError: a step of ours failed; the package is not loaded.
            VerificationError: the measurement log was tampered with; nothing is loaded any more.
        """
        try:
            directory = model_directory(self._store, name, version)
        except ConfigError:
            # Of no package: nothing of it is read, loaded or measured, and its name would spoil every record.
            _log.warning("store_entry_ignored", name=ascii(name), version=ascii(version))
            return
        async with self._turn:
            # Until every step is done; an error on the way leaves it so.
            self._unsettled.add((name, version))
            await self._look(directory, name, version)
            self._unsettled.discard((name, version))

    async def _look(self, directory: Path, name: str, version: str) -> None:
        if not await asyncio.to_thread(is_package, directory):
            await self._gone(name, version)
            return
        try:
            package = await asyncio.to_thread(read_package, directory, self._limits)
        except (VerificationError, HostError) as error:
            await self._refuse(name, version, {}, str(error))
            return
        kept = False
        try:
            kept = await self._bring(name, version, package)
        except FileDigestError as error:
            digests = package.digests()
            await self._refuse(name, version, {path: digests[path] for path in error.paths}, str(error))
        except VerificationError as error:
            await self._refuse(name, version, {}, str(error))
        finally:
            if not kept:
                package.close()

    async def _bring(self, name: str, version: str, package: Package) -> bool:
        """Steps 2 to 7; returns whether the package is in force now and must stay open."""
        key = (name, version)
        # 2. verify
        signer, manifest = await asyncio.to_thread(self._verify, name, version, package)
        barred = self._hooks.bars(package.digests().values())
        if barred:
            await self._barred(name, version, package, barred)
            return False
        asked = (self._hooks.policy_sha256, self._hooks.trust)
        force = self._in_force.get(key)
        same = force is not None and force.digest == package.sha256 and force.signer == signer.sha256_of_spki
        if same and force is not None and force.asked == asked:
            self._refused.pop(key, None)
            return False
        handed: list[str] = []
        if not same:
            # 3. inspect
            report = await inspect(self._zygote, package, self._inspect_timeout_s)
            # 4. measure
            handed = _handed_over(manifest, report.gate.external)
            for path in handed:
                await self._log.append(model_entry(name, version, path, bytes.fromhex(package.file(path).sha256)))
        # 5. authorize
        answer = await self._hooks.authorize(
            "load",
            {
                "model": name,
                "version": version,
                "digest": package.sha256,
                "signer": signer.sha256_of_spki,
                "measured": True,
                "sensitivity": manifest.sensitivity,
            },
        )
        if not answer.decision.allow:
            await self._denied(name, version, package, answer)
            return False
        if same and force is not None:
            self._in_force[key] = dataclasses.replace(force, asked=(answer.policy_sha256, asked[1]))
            return False
        # 6. record
        await self._record("model.load", "ok", name, version, package.sha256, answer=answer)
        # 7. hand over
        self._in_force[key] = _InForce(package.sha256, signer.sha256_of_spki, (answer.policy_sha256, asked[1]))
        self._refused.pop(key, None)
        served = ServedModel(
            name, version, package.sha256, signer.sha256_of_spki, {path: package.file(path) for path in handed}
        )
        self._loading.add(key)
        try:
            error = await self._dataplane.load(served)
        finally:
            self._loading.discard(key)
        old = self._packages.pop(key, None)
        if old:
            old.close()
        self._packages[key] = package
        if error:
            await self._unload(name, version, error)
            return True
        _log.info("model_loaded", model=name, version=version, digest=package.sha256, signer=signer.sha256_of_spki)
        return True

    def _verify(self, name: str, version: str, package: Package) -> tuple[Signer, ModelManifest]:
        signer = verify_package(package, self._trust)
        manifest = package.manifest()
        if (manifest.name, manifest.version) != (name, version):
            raise VerificationError(
                "package-name", f"the manifest says {manifest.name}/{manifest.version}, the store {name}/{version}"
            )
        return signer, manifest

    async def _refuse(self, name: str, version: str, wrong: Mapping[str, str], reason: str) -> None:
        """Keep a package out; ``wrong`` are the digests of files that are not the signed ones."""
        await self._out_of_force(name, version, reason)
        self._refused[name, version] = reason
        for path, digest in sorted(wrong.items()):
            if self._log_state_refused(name, version, path) != digest:
                await self._log.append(refused_entry(name, version, path, bytes.fromhex(digest)))
        _log.warning("model_refused", model=name, version=version, reason=reason)
        await self._record("model.refuse", "refused", name, version, "", error=reason)

    def _log_state_refused(self, name: str, version: str, path: str) -> str | None:
        settled = self._log.settled
        return settled.state.refused.get(f"{name}/{version}/{path}") if settled else None

    async def _denied(self, name: str, version: str, package: Package, answer: PolicyAnswer) -> None:
        reasons = ", ".join(answer.decision.reasons) or answer.error or "no reason given"
        self._refused[name, version] = f"denied by policy: {reasons}"
        await self._out_of_force(name, version, f"denied by policy: {reasons}")
        _log.warning("model_denied", model=name, version=version, reasons=reasons)
        await self._record("model.load", "denied", name, version, package.sha256, answer=answer)

    async def _barred(self, name: str, version: str, package: Package, reason: str) -> None:
        """Keep a package out that the controller does not let in."""
        known = self._refused.get((name, version)) == reason
        await self._out_of_force(name, version, reason)
        self._refused[name, version] = reason
        if not known:  # it is looked at with every change of trust
            _log.warning("model_barred", model=name, version=version, reason=reason)
            await self._record("model.load", "refused", name, version, package.sha256, error=reason)

    async def _gone(self, name: str, version: str) -> None:
        self._refused.pop((name, version), None)
        await self._out_of_force(name, version, "removed from the store")

    async def _out_of_force(self, name: str, version: str, reason: str) -> None:
        """Unload a package that is in force, or measure that one is not which only the log says is."""
        if (name, version) in self._in_force:
            await self._unload(name, version, reason)
        else:
            await self._measure_unload(name, version)

    async def _unload(self, name: str, version: str, reason: str) -> None:
        force = self._in_force.pop((name, version))
        # Out of service first: what follows may fail, and must not keep a doubtful model answering.
        self._dataplane.unload(name, version)
        package = self._packages.pop((name, version), None)
        if package:
            package.close()
        _log.warning("model_unloaded", model=name, version=version, reason=reason)
        await self._measure_unload(name, version)
        await self._record("model.unload", "ok", name, version, force.digest, error=reason)

    async def _measure_unload(self, name: str, version: str) -> None:
        """Measure that a package is out of force, where the log says that it is in force."""
        async with self._log.locked() as now:
            claimed = any(path.startswith(f"{name}/{version}/") for path in now.state.models)
        if claimed:
            await self._log.append(unload_entry(name, version))

    async def _record(
        self,
        kind: str,
        outcome: Any,  # noqa: ANN401 -- the literal of AuditEvent.outcome
        name: str,
        version: str,
        digest: str,
        *,
        answer: PolicyAnswer | None = None,
        error: str = "",
    ) -> None:
        event = AuditEvent(
            kind=kind,
            time_us=clock.now_us(),
            outcome=outcome,
            principal="edgewarden",
            principal_kind="unix",
            action=kind.partition(".")[2],
            model=name,
            version=version,
            model_sha256=digest,
            policy_sha256=answer.policy_sha256 if answer else "",
            policy_revision=answer.revision if answer else "",
            decision_id=answer.decision_id if answer else "",
            reasons=answer.decision.reasons if answer else (),
            error=error or (answer.error or "" if answer else ""),
        )
        await self._hooks.record(event)


def _handed_over(manifest: ModelManifest, external: tuple[str, ...]) -> list[str]:
    names = {MODEL_FILE, MANIFEST_FILE, *external}
    if manifest.labels is not None:
        names.add(manifest.labels)
    return sorted(names)
