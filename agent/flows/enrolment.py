"""A node becomes a controller's: join token, credential, Evidence, grant.

The steps, in this order:

1. The listener shows the key that the join token names; from here on nobody else is spoken to.
2. A key for the node's control side is made and kept.
3. First call: endorsement key, with its certificate where the TPM has one and the intermediates in its NV, and attestation key. Intermediates that
   can't be read are left out and named in the log: the controller says whether it needs them.
4. The TPM opens the credential: only the one with this endorsement key can, and only for this attestation key.
5. Second call: what was in it, Evidence over the controller's nonce with the new key's digest in its claims, a certificate request.
6. The grant is for this node and this key; its first Attestation Result speaks of the Evidence just sent.
7. It is kept; now the node is enrolled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
import structlog

from agent import clock
from agent.attest.enrolment import (
    ENROL_PATH,
    MAX_JOIN_TOKEN_CHARS,
    EnrolChallenge,
    EnrolGrant,
    EnrolProof,
    EnrolRequest,
    JoinToken,
)
from agent.attest.evidence import Evidence
from agent.attest.result import MAX_RESULT_BYTES, AttestationResult
from agent.attest.structures import AkKind
from agent.attest.tpm import DEFAULT_EK_PROFILES, Tpm
from agent.attest.tpm_thread import TpmThread
from agent.errors import VerificationError
from agent.flows.controller import open_link, pinned_context
from agent.flows.enrolled import Enrolment, EnrolmentStore, Identity, Mode, csr_for, new_key, public_spki_sha256

__all__ = ["EnrolOrder", "Enrolled", "EnrolmentFlow"]

MAX_CHALLENGE_BYTES: Final = 16 * 1024
MAX_GRANT_BYTES: Final = MAX_RESULT_BYTES + 256 * 1024
DEFAULT_EK: Final = "EK-RSA2048"
_SLOW_CALL_S: Final = 90.0  # a discrete TPM makes keys for these calls
_log = structlog.get_logger(__name__)


class EnrolOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an operator hands to the running agent.

    Attributes:
        token: the join token's text.
        mode: None where the agent shall choose.
        address: ``HOST:PORT`` where the controller reaches the control listener.
    """

    token: Annotated[str, msgspec.Meta(max_length=MAX_JOIN_TOKEN_CHARS)]
    mode: Mode | None = None
    address: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9.:\[\]-]{1,248}:[0-9]{1,5}\Z")] | None = None


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What came of it: who the node is now, and its first Attestation Result."""

    identity: Identity
    jwt: str
    result: AttestationResult


@dataclass(frozen=True, slots=True)
class _Endorsement:
    profile: str
    certificate: bytes | None
    chain: tuple[bytes, ...]
    public: bytes
    ak_public: bytes


@dataclass(frozen=True, slots=True)
class EnrolmentFlow:
    """Everything that it needs.

    Attributes:
        evidence: nonce, first log entry and the control key's digest to Evidence.
    """

    node: str
    tpm: TpmThread
    store: EnrolmentStore
    evidence: Callable[[bytes, int, str], Awaitable[Evidence]]

    async def run(self, token: JoinToken, mode: Mode, address: str | None) -> Enrolled:
        """Enrol this node, which must not be enrolled.

        Raises:
            ControllerError: the controller can't be reached, or refuses.
            VerificationError: it is not the token's controller, or what it says does not hold.
            TpmError, HostError: the TPM or the disk does not do its part.
        """
        # 1. Who answers there?
        context = await pinned_context(token.url, token.spki_sha256)
        # 2. The key.
        key = new_key()
        await asyncio.to_thread(self.store.save_key, key)
        spki = public_spki_sha256(key)
        endorsement = await self.tpm.call(_endorsement, timeout_s=_SLOW_CALL_S)
        async with open_link(token.url, context) as link:
            # 3. First call.
            request = EnrolRequest(
                token=token.id,
                secret=token.secret,
                node=self.node,
                mode=mode,
                address=address,
                ek_certificate=endorsement.certificate,
                ek_chain=endorsement.chain,
                ek_public=endorsement.public,
                ak_public=endorsement.ak_public,
            )
            challenge = await link.post(ENROL_PATH, request.encode(), EnrolChallenge, MAX_CHALLENGE_BYTES)
            # 4. Only this TPM opens it.
            secret = await self.tpm.call(
                lambda tpm: tpm.activate_credential(
                    AkKind.ECC_P256, endorsement.profile, challenge.credential_blob, challenge.encrypted_secret
                ),
                timeout_s=_SLOW_CALL_S,
            )
            # 5. Second call.
            evidence = await self.evidence(bytes.fromhex(challenge.nonce), 0, spki)
            proof = EnrolProof(secret=secret, csr=csr_for(key, self.node), evidence=evidence)
            grant = await link.post(f"{ENROL_PATH}/{challenge.enrolment}", proof.encode(), EnrolGrant, MAX_GRANT_BYTES)
        # 6. What was granted.
        enrolment = self._granted(grant, token.url, mode, address)
        identity = Identity.build(enrolment, key, grant.certificate.encode(), grant.ca.encode())
        result = AttestationResult.verify(grant.result, identity.keys, self.node)
        if result.nonce != challenge.nonce:
            raise VerificationError("enrolment", "the first Attestation Result is not about this enrolment's Evidence")
        # 7. From here on the node is enrolled.
        await asyncio.to_thread(self.store.save, identity, grant.result)
        return Enrolled(identity, grant.result, result)

    def _granted(self, grant: EnrolGrant, url: str, mode: Mode, address: str | None) -> Enrolment:
        if grant.node != self.node:
            raise VerificationError("enrolment", "the grant is for another node")
        return Enrolment(
            url=url,
            node=grant.node,
            mode=mode,
            address=address,
            trust_domain=grant.trust_domain,
            interval_s=grant.interval_s,
            jwks=grant.jwks,
            since=int(clock.now()),
        )


def _endorsement(tpm: Tpm) -> _Endorsement:
    """Choose the endorsement key: one with a certificate, else the default one."""
    for found in tpm.endorsements(DEFAULT_EK_PROFILES):
        return _Endorsement(found.profile, found.certificate, _chain(tpm), found.public, tpm.ak_public)
    return _Endorsement(DEFAULT_EK, None, (), tpm.ek_public(DEFAULT_EK), tpm.ak_public)


def _chain(tpm: Tpm) -> tuple[bytes, ...]:
    try:
        return tpm.ek_chain()
    except VerificationError as error:
        _log.warning("ek_chain_left_out", error=str(error))
        return ()
