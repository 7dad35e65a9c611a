"""Make a node out of its settings: everything that is opened before anything is served.

What was opened is closed in the reverse order, by the caller's stack.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.attest.log import MeasurementLog
from agent.attest.measurement import ZERO_PCR, config_entry
from agent.attest.tpm_thread import TpmThread
from agent.audit.log import AuditLog
from agent.config import Settings
from agent.control.health import Health, Metrics
from agent.daemon.keylime import KeylimeMode, prepare_keylime
from agent.daemon.membership import Membership
from agent.daemon.node import Node
from agent.daemon.provision import Listeners, Material, read_material
from agent.flows.attestation import AttestationFlow
from agent.flows.dataplane import Dataplane
from agent.flows.enrolled import EnrolmentStore
from agent.flows.models import ModelKeeper
from agent.flows.policies import PolicyKeeper
from agent.host.posture import posture
from agent.inference.package import PackageLimits
from agent.isolation.sandbox import Limits
from agent.isolation.supervisor import Zygote
from agent.policy.client import PolicyClient
from agent.policy.opa_server import OpaProgram
from agent.policy.pool import PolicyPool
from agent.records import JsonValue

__all__ = ["Assembly", "assemble"]

POLICY_OPEN_FILES: Final = 64
TPM_COMMANDS_TO_CONNECT: Final = 6  # the making of the attestation key among them


@dataclass(frozen=True, slots=True)
class Assembly:
    """A node, and what its listeners need besides.

    Attributes:
        control: context of the control listener and the fingerprint of its key, where the settings name a certificate.
        keylime: Keylime's mode, where it is enabled.
    """

    node: Node
    control: tuple[ssl.SSLContext, str] | None
    keylime: KeylimeMode | None


async def assemble(
    stack: contextlib.AsyncExitStack, settings: Settings, zygote: Zygote, listeners: Listeners, audit: AuditLog
) -> Assembly:
    """Read the configuration's files, open TPM and measurement logs, and put the flows together.

    Raises:
        EdgeWardenError: what stands in the way.
    """
    material = stack.enter_context(contextlib.closing(read_material(settings, listeners.inference)))
    state = Path(settings.node.state_dir)
    keylime = prepare_keylime(settings.attest.keylime, state)
    health = Health()
    health.report("live", holds=True, why="the control plane runs")
    timeout_s = settings.tpm.timeout_ms / 1000
    tpm = TpmThread(settings.tpm.tcti, call_timeout_s=timeout_s, connect_timeout_s=TPM_COMMANDS_TO_CONNECT * timeout_s)
    stack.push_async_callback(tpm.close)
    log, mirror = await _open_logs(settings, tpm, keylime)
    health.report("attested", holds=True, why="the measurement log and the TPM agree")
    pool, client = _policy(stack, settings, zygote, material)
    metrics = Metrics(health, lambda: {"audit_records": audit.head().size, **node.gauges()})
    node = Node(settings.node.id, audit, health, metrics, client, pool)
    node.dataplane = Dataplane(zygote, material.gateway, node)
    node.models = ModelKeeper(
        Path(settings.models.store),
        material.model_trust,
        PackageLimits(max_total_bytes=settings.models.max_package_bytes),
        settings.models.inspect_timeout_ms / 1000,
        zygote=zygote,
        log=log,
        dataplane=node.dataplane,
        hooks=node,
    )
    node.policies = PolicyKeeper(
        state / "policy", material.policy_keys, pool=pool, log=log, dataplane=node.dataplane, hooks=node
    )
    store = EnrolmentStore(state / "controller")
    node.membership = Membership(settings.node.id, store, tpm, settings.control, node)
    health.detail("inference_certificate_until", material.inference_until)
    node.attestation = AttestationFlow(
        node=settings.node.id,
        boot_id=_boot_id(),
        tpm=tpm,
        log=log,
        audit=audit,
        inference_spki_sha256=material.inference_spki_sha256,
        posture_source=lambda: _flat(posture(state)),
    )
    if keylime and mirror:
        node.keylime = keylime.flow(tpm, mirror, node, lambda said: health.detail("keylime", said))
    return Assembly(node, material.control, keylime)


def _policy(
    stack: contextlib.AsyncExitStack, settings: Settings, zygote: Zygote, material: Material
) -> tuple[PolicyPool, PolicyClient]:
    deadline_s = settings.policy.evaluation_deadline_ms / 1000
    total_s = settings.policy.total_deadline_ms / 1000
    pool = PolicyPool(
        zygote,
        trusted_keys=material.policy_keys,
        limits=Limits(settings.policy.worker_memory_bytes, POLICY_OPEN_FILES),
        opa=OpaProgram(settings.policy.opa_binary) if settings.policy.engine == "opa" else None,
        deadline_s=deadline_s,
        total_deadline_s=total_s,
    )
    stack.push_async_callback(pool.close)
    # The subscription that answers for overruns exists only once there is a client to subscribe.
    client = PolicyClient(lambda worker: workers.overrun(worker), deadline_s=deadline_s, total_deadline_s=total_s)  # noqa: PLW0108 -- bound later
    stack.callback(client.close)
    workers = pool.subscribe(client.attach)
    return pool, client


async def _open_logs(
    settings: Settings, tpm: TpmThread, keylime: KeylimeMode | None
) -> tuple[MeasurementLog, MeasurementLog | None]:
    """Open the node's measurement log, and Keylime's where that is enabled, and measure the configuration."""
    state = Path(settings.node.state_dir)
    start = bytes.fromhex(settings.tpm.start_value) if settings.tpm.start_value else ZERO_PCR
    log = await MeasurementLog.open(tpm, state / "measurements", settings.tpm.pcr, start)
    mirror = await keylime.mirror(tpm, state) if keylime else None
    if mirror:
        log.mirror_to(mirror)
    await log.append(config_entry(hashlib.sha256(settings.measured()).digest()))
    return log, mirror


def _flat(facts: dict[str, JsonValue]) -> dict[str, str | int | bool]:
    """Leave the facts that Evidence can carry: it has no lists."""
    return {name: value for name, value in facts.items() if isinstance(value, str | int)}


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
