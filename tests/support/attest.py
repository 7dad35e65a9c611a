"""An Attester in software: a real key that signs whatever structure a test wants, honest or forged."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from agent.attest.appraisal import Appraisal, Expectation, Verified, appraise
from agent.attest.evidence import AuditHead, Claims, Evidence, PcrValues, extra_data, quoted_pcrs
from agent.attest.log_state import LogState
from agent.attest.measurement import (
    ZERO_PCR,
    Entry,
    boot_aggregate,
    config_entry,
    model_entry,
    policy_entry,
    replay,
)
from agent.attest.reference import Measurement, PolicyReference, ReferenceValues
from agent.attest.structures import AK_TEMPLATE, ClockInfo, pcr_digest

PCR = 14
NONCE = bytes(range(32))
CONTROL_SPKI = "c1" * 32
INFERENCE_SPKI = "c2" * 32
BOOT_PCRS = {index: hashlib.sha256(bytes([index])).digest() for index in (*range(10), 11)}


def digest(word: str) -> bytes:
    return hashlib.sha256(word.encode()).digest()


CONFIG, POLICY, MODEL = digest("config"), digest("policy"), digest("model")
ENTRIES = (
    boot_aggregate(BOOT_PCRS[index] for index in range(10)),
    config_entry(CONFIG),
    policy_entry("r1", POLICY),
    model_entry("m", "1", "model.onnx", MODEL),
)
REFERENCE = ReferenceValues(
    measurement=Measurement(PCR),
    policy=PolicyReference(assigned=POLICY.hex()),
    configs=frozenset({CONFIG.hex()}),
    models={"m/1/model.onnx": frozenset({MODEL.hex()})},
)


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def name(data: bytes) -> bytes:
    return b"\x00\x0b" + hashlib.sha256(data).digest()


@dataclass
class Attester:
    """Every field of the quote can be set; what is left alone is what an honest TPM would write."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.derive_private_key(7, ec.SECP256R1()))
    template: bytes = AK_TEMPLATE
    magic: int = 0xFF544347
    kind: int = 0x8018
    hierarchy: int = 0x4000000B
    bank: int = 0x000B
    selected: Sequence[int] = quoted_pcrs(PCR)
    clock: ClockInfo = field(default_factory=lambda: ClockInfo(1000, 3, 0, safe=True))
    scheme: tuple[int, int] = (0x0018, 0x000B)

    @property
    def ak_public(self) -> bytes:
        numbers = self.key.public_key().public_numbers()
        return self.template + _sized(numbers.x.to_bytes(32)) + _sized(numbers.y.to_bytes(32))

    def quote(self, qualifying: bytes, values: dict[int, bytes]) -> tuple[bytes, bytes]:
        bits = sum(1 << index for index in self.selected)
        attest = b"".join(
            [
                struct.pack(">IH", self.magic, self.kind),
                _sized(name(struct.pack(">I", self.hierarchy) + name(self.ak_public))),
                _sized(qualifying),
                struct.pack(
                    ">QII?", self.clock.clock, self.clock.reset_count, self.clock.restart_count, self.clock.safe
                ),
                struct.pack(">Q", 0x2019),
                struct.pack(">IHB", 1, self.bank, 3) + bits.to_bytes(3, "little"),
                _sized(pcr_digest(values[index] for index in sorted(values))),
            ]
        )
        return attest, self.sign(attest)

    def sign(self, attest: bytes) -> bytes:
        r, s = decode_dss_signature(self.key.sign(attest, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))
        return struct.pack(">HH", *self.scheme) + _sized(r.to_bytes(32)) + _sized(s.to_bytes(32))

    def evidence(
        self,
        entries: Sequence[Entry] = ENTRIES,
        *,
        start: int = 0,
        nonce: bytes = NONCE,
        pcrs: dict[int, bytes] | None = None,
        **claims: Any,
    ) -> Evidence:
        """Evidence over a whole log, of which the entries from ``start`` on are sent."""
        values = {**BOOT_PCRS, PCR: replay(entries, ZERO_PCR), **(pcrs or {})}
        values = dict(sorted(values.items()))
        fields: dict[str, Any] = {
            "node": "node-1",
            "boot_id": "b",
            "start": start,
            "count": len(entries) - start,
            "audit": AuditHead(0, "00" * 32),
            "policy_sha256": POLICY.hex(),
            "control_spki_sha256": CONTROL_SPKI,
            "inference_spki_sha256": INFERENCE_SPKI,
            "posture": {"secure_boot": True},
        }
        said = Claims(**fields | claims)
        attest, signature = self.quote(extra_data(nonce, said), values)
        sent = b"".join(entry.encode(PCR) for entry in entries[start:])
        return Evidence(attest, signature, PcrValues({i: v.hex() for i, v in values.items()}), sent, said)


def expectation(attester: Attester | None = None, **changes: Any) -> Expectation:
    fields: dict[str, Any] = {
        "nonce": NONCE,
        "ak_public": (attester or Attester()).ak_public,
        "reference": REFERENCE,
        "control_spki_sha256": CONTROL_SPKI,
        "inference_spki_sha256": frozenset({INFERENCE_SPKI}),
    }
    return Expectation(**fields | changes)


def with_reference(**changes: Any) -> ReferenceValues:
    return msgspec.structs.replace(REFERENCE, **changes)


def state_of(*entries: Entry) -> LogState:
    return LogState().after(entries, at_start=True)


@dataclass
class PolledNode:
    """A node whose log grows, and a Verifier that asks for what is new and keeps what it verified."""

    attester: Attester = field(default_factory=Attester)
    log: list[Entry] = field(default_factory=lambda: list(ENTRIES))
    verified: Verified | None = None

    def poll(self, *new: Entry, reference: ReferenceValues = REFERENCE) -> Appraisal:
        """Append entries, then ask from the last verified index."""
        self.log += new
        before = self.verified
        clock = self.attester.clock
        start = before.index if before is not None and before.reset_count == clock.reset_count else 0
        return self._ask(start, reference)

    def poll_anew(self, reference: ReferenceValues = REFERENCE) -> Appraisal:
        """Ask for the whole log."""
        return self._ask(0, reference)

    def reset(self) -> None:
        """Boot anew: the TPM counts it, and a new log begins."""
        self.attester.clock = replace(self.attester.clock, reset_count=self.attester.clock.reset_count + 1)
        self.log = list(ENTRIES)

    def _ask(self, start: int, reference: ReferenceValues) -> Appraisal:
        self.attester.clock = replace(self.attester.clock, clock=self.attester.clock.clock + 1)
        evidence = self.attester.evidence(self.log, start=start, policy_sha256=state_of(*self.log).policy)
        asked = expectation(self.attester, reference=reference, verified=self.verified)
        found = appraise(evidence.encode(), asked)
        self.verified = found.verified or self.verified
        return found
