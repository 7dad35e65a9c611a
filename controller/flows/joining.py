"""A node joins: the controller's half of enrolment, pushed Evidence and renewal.

Enrolment, first call (a node that wants to be polled names an address that can be one: :mod:`controller.trust.address`):

1. The join token is known, unused, in date, and for this node if for any.
2. The endorsement key is a genuine TPM's: its certificate leads to the operator's trust store, or its digest stands on the allowlist.
3. The attestation key equals the template.
4. Neither the name nor the TPM is enrolled already.
5. A credential is made for the endorsement key *of the certificate*, openable for this attestation key alone.

Second call:

6. The secret is the one that was in the credential: attestation key and endorsement key live in one TPM.
7. The Evidence is authentic, over the nonce, by that attestation key, for the key that is to be certified, and its PCR values are the quoted ones.
8. The token is used up, the node written, its first result kept and its certificate issued in one transaction.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import hmac
import secrets
from dataclasses import dataclass

from cryptography import x509
from sqlalchemy.ext.asyncio import AsyncConnection

from agent import clock
from agent.attest.enrolment import (
    Challenge,
    EnrolChallenge,
    EnrolGrant,
    EnrolProof,
    EnrolRequest,
    PushAnswer,
    PushedEvidence,
)
from agent.attest.evidence import NONCE_BYTES
from agent.attest.structures import parse_ak_public
from agent.errors import VerificationError
from controller.flows.appraising import Appraiser, Finding
from controller.settings import Settings
from controller.store import audit, fleet, joining, schedule
from controller.store.database import Database
from controller.store.fleet import NewNode, NodeRecord
from controller.store.joining import Enrolment
from controller.trust.address import check_address
from controller.trust.authority import Authority, Issued, request_key, spki_sha256
from controller.trust.credential import make_credential
from controller.trust.endorsement import EndorsementKey, allowed, verify_endorsement

__all__ = ["Joining"]

ENROLMENT_S = 120
CHALLENGE_S = 120
SECRET_BYTES = 32
_UNPROVEN = frozenset({"spki", "pcr-selection", "pcr-digest"})
"""Checks without which an enrolment would keep something that nobody has proven: the key that is certified, the boot PCRs that rules are pinned to."""


@dataclass(frozen=True, slots=True)
class Joining:
    """What both halves need. ``roots`` and ``allowlist`` are the operator's trust in TPMs."""

    database: Database
    appraiser: Appraiser
    authority: Authority
    settings: Settings
    roots: tuple[x509.Certificate, ...]
    allowlist: frozenset[str]

    async def begin(self, request: EnrolRequest) -> EnrolChallenge:
        """First call.

        Raises:
            PeerError, VerificationError: with the first thing that does not hold.
        """
        now_us = clock.now_us()
        check_address(request.mode, request.address)
        async with self.database.begin() as connection:
            # 1. The token.
            await joining.valid_token(connection, request.token, request.secret, request.node, now_us)
        # 2. A genuine TPM.
        endorsement = self._endorsement(request)
        # 3. A key that it made and keeps.
        ak = parse_ak_public(request.ak_public)
        # 5. What only that TPM can open.
        secret, nonce = secrets.token_bytes(SECRET_BYTES), secrets.token_hex(NONCE_BYTES)
        blob, encrypted = make_credential(endorsement.key, ak.name, secret)
        enrolment = Enrolment(
            id=secrets.token_hex(16),
            token=request.token,
            node=request.node,
            mode=request.mode,
            address=request.address,
            ek_sha256=endorsement.sha256,
            ak_public=ak.marshaled,
            secret_sha256=hashlib.sha256(secret).hexdigest(),
            nonce=nonce,
            expires_us=now_us + ENROLMENT_S * 1_000_000,
        )
        async with self.database.begin() as connection:
            # 4. Not enrolled yet; asked again when it is written.
            await fleet.check_free(connection, request.node, endorsement.sha256)
            await joining.add_enrolment(connection, enrolment)
        return EnrolChallenge(
            enrolment=enrolment.id,
            credential_blob=blob,
            encrypted_secret=encrypted,
            nonce=nonce,
            expires_s=ENROLMENT_S,
        )

    def _endorsement(self, request: EnrolRequest) -> EndorsementKey:
        if request.ek_certificate is None:
            return allowed(request.ek_public, self.allowlist)
        moment = dt.datetime.fromtimestamp(clock.now(), dt.UTC)
        return verify_endorsement(request.ek_certificate, request.ek_chain, request.ek_public, self.roots, moment)

    async def take(self, name: str) -> Enrolment:
        """Use up what a first call has begun; whatever the second call shows, there is no third.

        Raises:
            PeerError: 404, when there is no such enrolment or its time is over.
        """
        async with self.database.begin() as connection:
            return await joining.take_enrolment(connection, name, clock.now_us())

    async def complete(self, enrolment: Enrolment, proof: EnrolProof) -> EnrolGrant:
        """Second call.

        Raises:
            PeerError, VerificationError: as :meth:`begin`.
        """
        now_us = clock.now_us()
        # 6. One TPM.
        if not hmac.compare_digest(hashlib.sha256(proof.secret).hexdigest(), enrolment.secret_sha256):
            raise VerificationError("credential", "the secret is not the one in the credential")
        key = request_key(proof.csr)
        async with self.database.begin() as connection:
            # 8. All of it, or nothing.
            token = await joining.use_token(connection, enrolment.token, enrolment.node, now_us)
            issued = self._issue(enrolment.node, proof.csr)
            new = NewNode(
                id=enrolment.node,
                group=token.group_name,
                labels=token.labels,
                mode=enrolment.mode,
                address=enrolment.address,
                ek_sha256=enrolment.ek_sha256,
                ak_public=enrolment.ak_public,
                spki_sha256=issued.spki_sha256,
                boot_pcrs=proof.evidence.pcrs.sha256,
                certificate_until_us=issued.until_us,
            )
            await fleet.add(connection, new, now_us)
            node = await fleet.find(connection, enrolment.node)
            # 7. Authentic Evidence. What it shows may still be wrong: then the node is enrolled and not trusted.
            finding = await self._first(connection, node, proof, enrolment.nonce, spki_sha256(key))
            await audit.append(
                connection,
                audit.AuditEntry(
                    kind="node.enrol",
                    principal=f"node/{node.id}",
                    node=node.id,
                    detail={"group": token.group_name, "token": token.id, "ek_sha256": enrolment.ek_sha256},
                ),
            )
            await self.appraiser.keep(connection, finding)
        return EnrolGrant(
            node=node.id,
            certificate=issued.pem,
            ca=self.authority.ca_pem,
            jwks=self.authority.jwks(),
            trust_domain=self.authority.trust_domain,
            interval_s=node.interval_s,
            result=self.appraiser.sign(finding),
        )

    async def _first(
        self, connection: AsyncConnection, node: NodeRecord, proof: EnrolProof, nonce: str, spki: str
    ) -> Finding:
        held = contextlib.nullcontext(connection)
        finding = await self.appraiser.appraise(lambda: held, node, proof.evidence.encode(), bytes.fromhex(nonce), spki)
        if node.version and finding.appraisal.retry:
            raise VerificationError("clock", "the TPM's clock is not safe yet: enrol again in a few minutes")
        failed = finding.appraisal.failed
        if finding.appraisal.claims is None:
            raise failed_check(finding)
        if failed is not None and failed.name in _UNPROVEN:
            raise failed_check(finding)
        if finding.appraisal.claims.node != node.id:
            raise VerificationError("node", f"the Evidence speaks of {finding.appraisal.claims.node}")
        return finding

    def _issue(self, node: str, csr: bytes) -> Issued:
        return self.authority.issue(f"node/{node}", node, request_key(csr), self.settings.enrolment.certificate_s)

    # --- afterwards

    async def challenge(self, name: str, peer_spki_sha256: str | None) -> Challenge:
        """Give a nonce for pushed Evidence.

        Args:
            name: of the node.
            peer_spki_sha256: key of the client certificate, if any: what others ask for displaces none of the node's own nonces.

        Raises:
            PeerError: 404, when no such node is enrolled.
        """
        nonce = secrets.token_hex(NONCE_BYTES)
        async with self.database.begin() as connection:
            node = await fleet.find(connection, name)
            own = peer_spki_sha256 == node.spki_sha256
            await joining.add_challenge(connection, name, nonce, clock.now_us() + CHALLENGE_S * 1_000_000, own=own)
        return Challenge(nonce=nonce, start=node.verified.index if node.verified else 0)

    async def pushed(self, push: PushedEvidence, peer_spki_sha256: str | None) -> PushAnswer:
        """Appraise pushed Evidence; renew the certificate where that is asked for.

        Args:
            push: what was sent.
            peer_spki_sha256: key of the client certificate, where the node has shown a valid one.

        Raises:
            PeerError: the node is not enrolled, or the nonce is not open.
            VerificationError: a renewal whose Evidence is not authentic, or Evidence that is not authentic from who has not shown the node's own
                certificate, or no certificate and no request for one; ``clock``, when the node should come again later.
        """
        now_us = clock.now_us()
        async with self.database.begin() as connection:
            await joining.take_challenge(connection, push.node, push.nonce, now_us)
            node = await fleet.find(connection, push.node)
        spki = peer_spki_sha256
        if push.csr is not None:
            spki = spki_sha256(request_key(push.csr))
        if spki is None:
            raise VerificationError("spki", "no client certificate: send a certificate request with the Evidence")
        evidence, nonce = push.evidence.encode(), bytes.fromhex(push.nonce)
        finding = await self.appraiser.appraise(self.database.begin, node, evidence, nonce, spki)
        refused = failed_check(finding) if finding.appraisal.status == "none" else None
        if refused is not None and peer_spki_sha256 != node.spki_sha256:
            # Neither the Evidence nor the certificate is the node's: this says something about the sender, and nothing about the node.
            raise refused
        issued = None
        async with self.database.begin() as connection:
            # Locks in the order of every other change: the node, its schedule, its state, the audit log's head.
            if push.csr is not None and refused is None:
                issued = self._issue(node.id, push.csr)
                await fleet.certified(connection, node.id, issued.spki_sha256, issued.until_us)
            await schedule.answered(connection, node.id, now_us)
            if node.mode == "push":
                await schedule.postpone(connection, node.id, fleet.late_us(now_us, node.interval_s))
            if not finding.appraisal.retry:  # as with a poll: nobody's fault, and the last result goes on ageing
                await self.appraiser.keep(connection, finding)
            if issued is not None:
                await audit.append(
                    connection,
                    audit.AuditEntry(kind="node.renew", principal=f"node/{node.id}", node=node.id),
                )
        if refused is not None and (push.csr is not None or finding.appraisal.retry):
            raise refused
        return PushAnswer(
            result=self.appraiser.sign(finding),
            interval_s=node.interval_s,
            certificate=issued.pem if issued else None,
        )


def failed_check(finding: Finding) -> VerificationError:
    """Return the first failed check as an error."""
    failed = finding.appraisal.failed
    if failed is None:
        return VerificationError("evidence", "it is not authentic")
    return VerificationError(failed.name, failed.words)
