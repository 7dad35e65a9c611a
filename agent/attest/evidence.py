r"""Evidence: a quote, the measurement log that it covers, and claims; what a node shows to a Verifier.

Rules:

1. ``extraData = SHA-256("edgewarden/evidence/v1\0" || nonce || SHA-256(JCS(claims)))``: claims and the Verifier's nonce
   are under the TPM's signature. Entries are covered by the PCR that they replay to; PCR values by the quoted digest.
2. The SHA-256 bank's PCRs 0-9, 11 and the measurement PCR are quoted, whatever was asked.
3. A reader takes no byte over a limit and no field that it does not know, and no number that canonical JSON can't carry;
   what it can't take is a VerificationError of the check ``encoding``.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from agent.attest.measurement import MAX_LOG_BYTES
from agent.attest.structures import MAX_ATTEST_BYTES, MAX_SIGNATURE_BYTES
from agent.errors import VerificationError
from agent.records import canonical

__all__ = [
    "MAX_EVIDENCE_BYTES",
    "NONCE_BYTES",
    "AuditHead",
    "Claims",
    "Evidence",
    "HexDigest",
    "PcrValues",
    "Posture",
    "extra_data",
    "quoted_pcrs",
]

NONCE_BYTES = 32
MAX_CLAIMS_BYTES = 64 * 1024
MAX_EVIDENCE_BYTES = (MAX_LOG_BYTES + MAX_ATTEST_BYTES + MAX_SIGNATURE_BYTES) * 4 // 3 + 2 * MAX_CLAIMS_BYTES
MAX_POSTURE_FACTS = 64
_CONTEXT = b"edgewarden/evidence/v1\0"
_BOOT_PCRS = (*range(10), 11)

HexDigest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Word = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
Posture: TypeAlias = Annotated[
    dict[_Word, bool | int | Annotated[str, msgspec.Meta(max_length=512)]], msgspec.Meta(max_length=MAX_POSTURE_FACTS)
]
"""Facts about the host, flat, for example ``{"secure_boot": true, "kernel": "6.1"}``; what is unknown is absent."""


class AuditHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and root of the audit log's Merkle tree."""

    size: _Count
    root: HexDigest


class Claims(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the node says about itself under the TPM's signature. What is unset is absent, never null.

    Attributes:
        start: index of the first entry sent (``from`` on the wire).
        count: entries sent.
        policy_sha256: policy bundle in force.
        control_spki_sha256: SHA-256 of the SubjectPublicKeyInfo that the control listener answers with.
        inference_spki_sha256: the same for the inference listener.
    """

    version: Literal[1] = 1
    node: _Word
    boot_id: _Word
    start: _Count = msgspec.field(name="from")
    count: _Count
    audit: AuditHead | msgspec.UnsetType = msgspec.UNSET
    policy_sha256: HexDigest | msgspec.UnsetType = msgspec.UNSET
    control_spki_sha256: HexDigest | msgspec.UnsetType = msgspec.UNSET
    inference_spki_sha256: HexDigest | msgspec.UnsetType = msgspec.UNSET
    posture: Posture = {}

    def canonical(self) -> bytes:
        """Return the claims as JCS.

        Raises:
            VerificationError: ``encoding``: a number or key has no canonical form.
        """
        plain: Any = msgspec.to_builtins(self)
        try:
            return canonical(plain)
        except (ValueError, TypeError) as error:  # orjson's refusal of a lone surrogate is a TypeError
            raise VerificationError("encoding", f"claims: {error}") from error


class PcrValues(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Values of the SHA-256 bank by index."""

    sha256: Annotated[dict[int, HexDigest], msgspec.Meta(max_length=24)]


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What travels. ``attest`` is a TPMS_ATTEST, ``signature`` a TPMT_SIGNATURE, ``entries`` a part of the binary log."""

    attest: bytes
    signature: bytes
    pcrs: PcrValues
    entries: bytes
    claims: Claims

    def encode(self) -> bytes:
        """Return it as JSON, byte strings in base64."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Evidence:
        """Read it from JSON.

        Raises:
            VerificationError: ``encoding``.
        """
        if len(data) > MAX_EVIDENCE_BYTES:
            raise VerificationError("encoding", f"{len(data)} bytes of Evidence are over {MAX_EVIDENCE_BYTES}")
        try:
            return msgspec.json.decode(data, type=cls)
        except ValueError as error:
            raise VerificationError("encoding", f"not Evidence: {error}") from error


def extra_data(nonce: bytes, claims: Claims) -> bytes:
    """Return what a quote's extraData must be for a nonce and claims (rule 1)."""
    return hashlib.sha256(_CONTEXT + nonce + hashlib.sha256(claims.canonical()).digest()).digest()


def quoted_pcrs(measurement_pcr: int) -> tuple[int, ...]:
    """Return the PCRs that Evidence quotes, ascending."""
    return tuple(sorted({*_BOOT_PCRS, measurement_pcr}))
