"""How the node makes Evidence: the measurement lock is held from reading the log's length until the quote returns.

Where another process extends a PCR between PCR_Read and the quote, both are repeated, at most
:data:`MAX_QUOTE_ATTEMPTS` times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from agent.attest.evidence import (
    NONCE_BYTES,
    AuditHead,
    Claims,
    Evidence,
    PcrValues,
    Posture,
    extra_data,
    quoted_pcrs,
)
from agent.attest.log import MeasurementLog, Snapshot
from agent.attest.structures import parse_quote, pcr_digest
from agent.attest.tpm import Tpm
from agent.attest.tpm_thread import TpmThread
from agent.errors import PeerError, TpmError

__all__ = ["MAX_QUOTE_ATTEMPTS", "NodeFacts", "collect_evidence"]

MAX_QUOTE_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the claims hold besides the log's own facts; ``None`` is unknown."""

    node: str
    boot_id: str
    audit: AuditHead | None
    control_spki_sha256: str | None
    inference_spki_sha256: str | None
    posture: Posture


async def collect_evidence(
    tpm: TpmThread, log: MeasurementLog, nonce: bytes, from_index: int, claims_source: Callable[[], NodeFacts]
) -> Evidence:
    """Quote the TPM over a Verifier's nonce.

    Args:
        tpm: the thread that the log uses too.
        log: the measurement log.
        nonce: 32 bytes of the Verifier's.
        from_index: first entry to send; those before it were verified earlier in this boot.
        claims_source: called once, with the measurement lock held.

    Raises:
        PeerError: 400: the nonce's length, or an index past the log's end.
        VerificationError, TpmError, HostError: the log or the TPM is not in order.
    """
    if len(nonce) != NONCE_BYTES:
        raise PeerError(400, "bad_nonce", f"the nonce must be {NONCE_BYTES} bytes")
    async with log.locked() as now:
        if not 0 <= from_index <= now.count:
            raise PeerError(400, "bad_from", f"the log has {now.count} entries since the last reset; ask from 0")
        claims = _claims(claims_source(), now, from_index)
        return await tpm.call(lambda door: _quote(door, log, now, claims, nonce))


def _claims(facts: NodeFacts, now: Snapshot, from_index: int) -> Claims:
    return Claims(
        node=facts.node,
        boot_id=facts.boot_id,
        start=from_index,
        count=now.count - from_index,
        audit=facts.audit or msgspec.UNSET,
        policy_sha256=now.state.policy or msgspec.UNSET,
        control_spki_sha256=facts.control_spki_sha256 or msgspec.UNSET,
        inference_spki_sha256=facts.inference_spki_sha256 or msgspec.UNSET,
        posture=facts.posture,
    )


def _quote(tpm: Tpm, log: MeasurementLog, now: Snapshot, claims: Claims, nonce: bytes) -> Evidence:
    qualifying = extra_data(nonce, claims)
    selection = quoted_pcrs(log.pcr)
    for _ in range(MAX_QUOTE_ATTEMPTS):
        values = tpm.read_pcrs(selection)
        attest, signature = tpm.quote(selection, qualifying)
        if parse_quote(attest).pcr_digest == pcr_digest(values.values()):
            shown = PcrValues({index: value.hex() for index, value in values.items()})
            return Evidence(attest, signature, shown, log.read(now, claims.start), claims)
    raise TpmError(f"TPM: another process extends PCRs: {MAX_QUOTE_ATTEMPTS} quotes did not match what was read")
