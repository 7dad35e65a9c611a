"""Attestation by a stock Keylime: enrol once, then answer its verifier's polls.

Enrolment, in this order, until it succeeds; inference does not wait for it:

1. keys: the TPM's endorsement key with its certificate, and the second attestation key.
2. register: the registrar gets both, and where the listener is.
3. activate: the TPM decrypts the registrar's challenge, which it can only if both keys are its own.
4. prove: the registrar gets the proof of that.
5. record: the audit log holds it.

A poll: quote the wanted PCRs, with PCR 16 bound to the listener's key and the list of PCR 10 beside it.

Rules: what goes wrong is reported and recorded when it changes, not at each attempt; nothing that Keylime sends changes what the node does.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import aiohttp
import structlog

from agent import clock
from agent.attest.keylime import (
    MAX_ANSWER_BYTES,
    KernelList,
    Registration,
    activation,
    measurement_list,
    parse_challenge,
    parse_revocation,
)
from agent.attest.keylime_quote import KEY_TIMEOUT_S, collect_keylime_quote
from agent.attest.log import MeasurementLog, TpmResetError
from agent.attest.measurement import KERNEL_PCR
from agent.attest.structures import AkKind
from agent.attest.tpm import DEFAULT_EK_PROFILES, Endorsement, Tpm
from agent.attest.tpm_thread import TpmThread
from agent.errors import AuditError, HostError, VerificationError
from agent.records import AuditEvent, JsonValue

__all__ = ["API_VERSION", "KeylimeFlow", "KeylimeHooks", "KeylimePeer"]

API_VERSION = "2.5"
REGISTRAR_TIMEOUT_S = 30.0
FIRST_RETRY_S = 1.0
MAX_RETRY_S = 300.0
MAX_ERROR_CHARS = 300  # of what a registrar says
_HTTP_OK = 200
_log = structlog.get_logger(__name__)


class KeylimeHooks(Protocol):
    """What the flow needs besides its own rooms."""

    def record(self, event: AuditEvent) -> asyncio.Future[Any]:
        """Append to the audit log."""


@dataclass(frozen=True, slots=True)
class KeylimePeer:
    """Who polls: the name in the certificate that the TLS library has verified, and the address."""

    name: str
    address: str


@dataclass(slots=True)
class KeylimeFlow:
    """One node in one Keylime.

    Attributes:
        uuid: the node's name there.
        registrar: its URL.
        contact: where the verifier finds the listener.
        certificate: the listener's own (PEM).
        public_key: its key (PEM).
        log: of PCR 10.
        kernel: what stands before it in the list.
        boot_time_s: when the machine started, in seconds since the epoch; the same for as long as the agent runs.
        report: takes what the health says.
    """

    uuid: str
    registrar: str
    contact: tuple[str, int]
    certificate: bytes
    public_key: bytes
    tpm: TpmThread
    log: MeasurementLog
    kernel: KernelList
    boot_time_s: int
    hooks: KeylimeHooks
    report: Callable[[dict[str, JsonValue]], None]
    first_retry_s: float = FIRST_RETRY_S
    _registered: bool = field(default=False, init=False)
    _measured: bool = field(default=True, init=False)
    _outcomes: dict[str, str] = field(default_factory=dict, init=False)

    # --- enrolment

    async def enrol(self) -> None:
        """Enrol, again and again with a growing delay; returns once the registrar knows the node."""
        delay_s = self.first_retry_s
        self._say("not registered yet")
        while True:
            try:
                await self._enrol_once()
            except (HostError, VerificationError) as error:
                await self._note("keylime.register", "failed", error=str(error))
                self._say(f"not registered: {error}")
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, MAX_RETRY_S)
            else:
                self._registered = True
                self._say(f"registered as {self.uuid}")
                return

    async def _enrol_once(self) -> None:
        # 1. keys
        endorsement, ak_public = await self.tpm.call(_keys, timeout_s=KEY_TIMEOUT_S)
        body = Registration.of(
            endorsement.certificate or None, endorsement.public, ak_public, self.certificate, self.contact
        )
        path = f"{self.registrar}/v{API_VERSION}/agents/{self.uuid}"
        timeout = aiohttp.ClientTimeout(total=REGISTRAR_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            # 2. register
            challenge = parse_challenge(await _ask(session, "POST", path, body.encode()))
            # 3. activate
            secret = await self.tpm.call(
                lambda tpm: tpm.activate_credential(
                    AkKind.RSA_2048, endorsement.profile, challenge.credential_blob, challenge.encrypted_secret
                ),
                timeout_s=KEY_TIMEOUT_S,
            )
            # 4. prove
            await _ask(session, "PUT", f"{path}/activate", activation(secret, self.uuid))
        # 5. record
        self._outcomes["keylime.register"] = "ok"
        await self.hooks.record(_event("keylime.register", "ok", detail={"endorsed": bool(endorsement.certificate)}))

    # --- polls

    async def identity(self, nonce: str, peer: KeylimePeer) -> dict[str, JsonValue]:
        """Return a quote that binds the listener's key, and that key.

        Raises:
            VerificationError, TpmError, HostError: the log or the TPM is not in order.
        """
        return await self._answer(nonce, frozenset(), 0, peer, with_key=True)

    async def integrity(
        self, nonce: str, pcrs: frozenset[int], start: int, peer: KeylimePeer, *, with_key: bool
    ) -> dict[str, JsonValue]:
        """Return a quote of PCRs and, where PCR 10 is one of them, the list from an index on.

        Raises:
            VerificationError, TpmError, HostError: as :meth:`identity`.
        """
        return await self._answer(nonce, pcrs, start, peer, with_key=with_key)

    async def _answer(
        self, nonce: str, pcrs: Collection[int], start: int, peer: KeylimePeer, *, with_key: bool
    ) -> dict[str, JsonValue]:
        try:
            made = await collect_keylime_quote(
                self.tpm, self.log, self.kernel, nonce=nonce, pcrs=pcrs, bound=self.public_key, start=start
            )
        except (HostError, VerificationError) as error:
            await self._note("keylime.quote", "failed", peer=peer, error=str(error))
            raise
        results: dict[str, JsonValue] = {
            "quote": made.quote,
            "hash_alg": "sha256",
            "enc_alg": "rsa2048",
            "sign_alg": "rsassa",
            "boottime": self.boot_time_s,
        }
        if with_key:
            results["pubkey"] = self.public_key.decode("ascii")
        if KERNEL_PCR in pcrs:
            text = await asyncio.to_thread(measurement_list, made.kernel, made.entries)
            results |= {"ima_measurement_list": text, "ima_measurement_list_entry": made.start}
        await self._note("keylime.quote", "ok", peer=peer)
        return results

    async def revocation(self, body: bytes, peer: KeylimePeer) -> None:
        """Record what the verifier says of a node that failed; nothing else follows from it.

        Raises:
            VerificationError: it is no such thing.
            AuditError: it can't be recorded.
        """
        told = parse_revocation(body)
        detail = {"agent_id": told.agent_id, "event_id": told.event_id, "type": told.type}
        detail = {name: value[:MAX_ERROR_CHARS] for name, value in detail.items()}
        _log.warning("keylime_revocation", **detail)
        detail["sha256"] = hashlib.sha256(body).hexdigest()
        await self.hooks.record(_event("keylime.revocation", "ok", peer, detail=detail))

    # --- health and records

    async def check(self) -> None:
        """Compare the list with PCR 10; where they differ the health says so, and nothing is measured any more.

        Raises:
            TpmResetError: the TPM was reset under the agent.
        """
        try:
            await self.log.check()
        except TpmResetError:
            raise
        except (HostError, VerificationError) as error:
            self._measured = False
            await self._note("keylime.check", "failed", error=str(error))
            self._say(str(error))
        else:
            await self._note("keylime.check", "ok")
            if not self._measured:
                self._measured = True
                self._say("the list and PCR 10 agree again")

    def _say(self, why: str) -> None:
        self.report({"registered": self._registered, "measured": self._measured, "why": why})

    async def _note(
        self, kind: str, outcome: Literal["ok", "failed"], *, peer: KeylimePeer | None = None, error: str = ""
    ) -> None:
        """Log and record an outcome that is not the last one of its kind. A record that fails is the health's to tell, and stops no poll."""
        if self._outcomes.get(kind, "ok" if kind == "keylime.check" else "") == outcome + error:
            return
        self._outcomes[kind] = outcome + error
        _log.log(
            logging.INFO if outcome == "ok" else logging.WARNING, kind.replace(".", "_"), outcome=outcome, error=error
        )
        with contextlib.suppress(AuditError):
            await self.hooks.record(_event(kind, outcome, peer, error=error))


def _event(
    kind: str,
    outcome: Literal["ok", "failed"],
    peer: KeylimePeer | None = None,
    *,
    error: str = "",
    detail: dict[str, Any] | None = None,
) -> AuditEvent:
    return AuditEvent(
        kind=kind,
        time_us=clock.now_us(),
        outcome=outcome,
        principal=peer.name if peer else "edgewarden",
        principal_kind="mtls" if peer else "unix",
        source_ip=peer.address if peer else "",
        error=error,
        detail=detail or {},
    )


def _keys(tpm: Tpm) -> tuple[Endorsement, bytes]:
    """Return the endorsement key that the registrar is shown, a certified one where there is one, and the second attestation key."""
    for profile in DEFAULT_EK_PROFILES:
        for found in tpm.endorsements([profile]):
            return found, tpm.rsa_ak_public()
    profile = DEFAULT_EK_PROFILES[0]
    return Endorsement(profile, b"", tpm.ek_public(profile)), tpm.rsa_ak_public()


async def _ask(session: aiohttp.ClientSession, method: str, url: str, body: bytes) -> bytes:
    """Call the registrar.

    Raises:
        HostError: it can't be reached.
        VerificationError: ``keylime-registrar``: it refuses.
    """
    headers = {"Content-Type": "application/json"}
    try:
        async with session.request(method, url, data=body, headers=headers, allow_redirects=False) as response:
            answer = await response.content.read(MAX_ANSWER_BYTES + 1)
            status = response.status
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise HostError(f"attest.keylime.registrar: {url}: {str(error) or type(error).__name__}") from error
    if status != _HTTP_OK:
        words = answer[:MAX_ERROR_CHARS].decode("ascii", "replace")
        raise VerificationError("keylime-registrar", f"{url} answered {status}: {words}")
    return answer
