"""Evidence for a Verifier's nonce: the claims are taken and the quote is made under the measurement lock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from agent.attest.collect import NodeFacts, collect_evidence
from agent.attest.evidence import AuditHead, Evidence
from agent.attest.log import MeasurementLog
from agent.attest.tpm_thread import TpmThread
from agent.audit.log import AuditLog

__all__ = ["AttestationFlow"]


@dataclass(frozen=True, slots=True)
class AttestationFlow:
    """Everything that the claims speak of.

    Attributes:
        inference_spki_sha256: digest of the inference certificate's key.
    """

    node: str
    boot_id: str
    tpm: TpmThread
    log: MeasurementLog
    audit: AuditLog
    inference_spki_sha256: str
    posture_source: Callable[[], dict[str, str | int | bool]]

    async def evidence(self, nonce: bytes, from_index: int, control_spki_sha256: str | None) -> Evidence:
        """Return Evidence.

        Args:
            nonce: 32 bytes of the Verifier.
            from_index: first wanted entry of the log.
            control_spki_sha256: the node's control key, where Evidence goes to a controller; None on the Unix socket.

        Raises:
            PeerError: the nonce or the index is no such thing.
            TpmError, VerificationError: the TPM does not answer, or the log was tampered with.
        """
        # Processes are counted outside the lock: that reads a file for each of them.
        facts = await asyncio.to_thread(self.posture_source)
        return await collect_evidence(
            self.tpm, self.log, nonce, from_index, lambda: self._facts(facts, control_spki_sha256)
        )

    def _facts(self, facts: dict[str, str | int | bool], control_spki_sha256: str | None) -> NodeFacts:
        head = self.audit.head()
        return NodeFacts(
            node=self.node,
            boot_id=self.boot_id,
            audit=AuditHead(head.size, head.root.hex()),
            control_spki_sha256=control_spki_sha256,
            inference_spki_sha256=self.inference_spki_sha256,
            posture=facts,
        )

    async def ak_public(self) -> bytes:
        """Return the attestation key's public part (TPMT_PUBLIC)."""
        return await self.tpm.call(lambda tpm: tpm.ak_public)
