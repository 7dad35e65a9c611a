"""The TPM's own structures, parsed without a TPM library: what an appraiser must read, and no more.

Source: TCG "Trusted Platform Module Library", Part 2 (structures) and Part 1, chapter 16 (names); numbers are
big-endian. Rules:

1. Every length is checked against what is left, and nothing may follow the last field.
2. Bytes that are not the structure raise :class:`~agent.errors.VerificationError` with the name of the check that a
   reader of the result knows: ``encoding``, ``attest-type``, ``ak-template``, ``signature-scheme``.
3. An attestation key is accepted only when everything but its unique part equals a fixed template (:data:`AK_TEMPLATE`, or
   :data:`RSA_AK_TEMPLATE` for the second key): a restricted key that the TPM made and that never leaves it.
4. The signer is recognised by its *qualified* name, which holds the hierarchy: only in the endorsement hierarchy does a
   TPM attest its counters unobfuscated.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from agent.errors import VerificationError

__all__ = [
    "AK_TEMPLATE",
    "ALG_SHA256",
    "MAX_ATTEST_BYTES",
    "MAX_PUBLIC_BYTES",
    "MAX_SIGNATURE_BYTES",
    "RSA_AK_TEMPLATE",
    "AkKind",
    "AkPublic",
    "ClockInfo",
    "PcrSelection",
    "Quote",
    "Signature",
    "parse_ak_public",
    "parse_quote",
    "parse_rsa_ak_public",
    "parse_signature",
    "pcr_digest",
]

MAX_ATTEST_BYTES = 4096
MAX_SIGNATURE_BYTES = 1024
MAX_PUBLIC_BYTES = 1024
MAX_CACHED_KEYS = (
    4096  # a controller asks for the same nodes' keys again and again: a sixth of a poll that brings nothing new
)
MAX_PCR_BANKS = 16  # TPML_PCR_SELECTION of the TSS
MAX_SELECT_BYTES = 8  # bitmap of 64 PCRs; a PC client has 24

ALG_SHA256 = 0x000B
_ALG_RSA = 0x0001
_ALG_NULL = 0x0010
_ALG_RSASSA = 0x0014
_ALG_ECDSA = 0x0018
_ALG_ECC = 0x0023
_ECC_NIST_P256 = 0x0003
_P256_BYTES = 32
_RSA_BITS = 2048
_MAGIC = 0xFF544347  # TPM_GENERATED_VALUE
_ST_ATTEST_QUOTE = 0x8018
_RH_ENDORSEMENT = 0x4000000B
_HEAD = struct.Struct(">IH")
_CLOCK_INFO = struct.Struct(">QIIB")
_FIRMWARE_AND_BANKS = struct.Struct(">QI")
_SELECTION = struct.Struct(">HB")
_SCHEME = struct.Struct(">HH")

# FIXEDTPM 0x2, FIXEDPARENT 0x10, SENSITIVEDATAORIGIN 0x20, USERWITHAUTH 0x40, NODA 0x400, RESTRICTED 0x10000, SIGN 0x40000
_AK_ATTRIBUTES = 0x0002 | 0x0010 | 0x0020 | 0x0040 | 0x0400 | 0x10000 | 0x40000

AK_TEMPLATE = struct.pack(
    ">HHIHHHHHH",
    _ALG_ECC,
    ALG_SHA256,  # nameAlg
    _AK_ATTRIBUTES,
    0,  # no authPolicy
    _ALG_NULL,  # symmetric
    _ALG_ECDSA,
    ALG_SHA256,
    _ECC_NIST_P256,
    _ALG_NULL,  # kdf
)
"""TPMT_PUBLIC of the attestation key up to its ``unique`` field."""

RSA_AK_TEMPLATE = struct.pack(
    ">HHIHHHHHI",
    _ALG_RSA,
    ALG_SHA256,  # nameAlg
    _AK_ATTRIBUTES,
    0,  # no authPolicy
    _ALG_NULL,  # symmetric
    _ALG_RSASSA,
    ALG_SHA256,
    _RSA_BITS,
    0,  # the default exponent, 65537
)
"""The same of the second key, for Verifiers that accept no ECDSA."""


class AkKind(enum.Enum):
    """Which attestation key: the one of Evidence, or the second one."""

    ECC_P256 = AK_TEMPLATE
    RSA_2048 = RSA_AK_TEMPLATE


class _Reader:
    """Takes big-endian fields off a byte string; whatever does not fit is a VerificationError of the given check."""

    def __init__(self, data: bytes, limit: int, what: str, check: str = "encoding") -> None:
        self._data = data
        self._at = 0
        self._what = what
        self._check = check
        if len(data) > limit:
            self.fail(f"{len(data)} bytes are over the limit of {limit}")

    def fail(self, message: str) -> NoReturn:
        raise VerificationError(self._check, f"{self._what}: {message}")

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            self.fail("cut short")
        part = self._data[self._at : self._at + size]
        self._at += size
        return part

    def fields(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(self.take(form.size))

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def sized(self) -> bytes:
        """Take a TPM2B: u16 length, then that many bytes."""
        return self.take(self.number(2))

    def end(self) -> None:
        if self._at != len(self._data):
            self.fail(f"{len(self._data) - self._at} bytes follow its end")


@dataclass(frozen=True, slots=True)
class ClockInfo:
    """TPMS_CLOCK_INFO. ``clock`` is milliseconds of powered time; ``safe`` is false when it may repeat itself."""

    clock: int
    reset_count: int
    restart_count: int
    safe: bool


@dataclass(frozen=True, slots=True)
class PcrSelection:
    """One bank's part of a TPML_PCR_SELECTION."""

    algorithm: int
    indices: frozenset[int]


@dataclass(frozen=True, slots=True)
class Quote:
    """TPMS_ATTEST of type quote: everything that the TPM vouches for."""

    qualified_signer: bytes
    extra_data: bytes
    clock: ClockInfo
    firmware_version: int
    selections: tuple[PcrSelection, ...]
    pcr_digest: bytes


@dataclass(frozen=True, slots=True)
class Signature:
    """TPMT_SIGNATURE of ECDSA on P-256 over SHA-256. Another scheme becomes a class beside this one."""

    r: int
    s: int


@dataclass(frozen=True, slots=True)
class AkPublic:
    """An attestation key that equals the template.

    Attributes:
        marshaled: its TPMT_PUBLIC.
        name: ``nameAlg || H(TPMT_PUBLIC)``.
        qualified_name: ``nameAlg || H(endorsement hierarchy || name)``; what a quote by this primary key carries.
    """

    marshaled: bytes
    name: bytes
    qualified_name: bytes
    key: ec.EllipticCurvePublicKey

    def verify(self, signature: Signature, message: bytes) -> None:
        """Verify a signature by this key.

        Raises:
            VerificationError: ``signature``.
        """
        try:
            self.key.verify(encode_dss_signature(signature.r, signature.s), message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise VerificationError("signature", "it is not this attestation key's") from None


def parse_quote(data: bytes) -> Quote:
    """Parse a TPMS_ATTEST.

    Raises:
        VerificationError: ``encoding``; ``attest-type`` when the TPM did not make it or it is not a quote.
    """
    reader = _Reader(data, MAX_ATTEST_BYTES, "TPMS_ATTEST")
    magic, kind = reader.fields(_HEAD)
    if magic != _MAGIC:
        raise VerificationError("attest-type", f"magic {magic:#x} is not that of a structure that a TPM made")
    if kind != _ST_ATTEST_QUOTE:
        raise VerificationError("attest-type", f"structure {kind:#x} is not a quote")
    signer, extra_data = reader.sized(), reader.sized()
    clock, reset_count, restart_count, safe = reader.fields(_CLOCK_INFO)
    if safe > 1:
        reader.fail("a flag is neither yes nor no")
    firmware, banks = reader.fields(_FIRMWARE_AND_BANKS)
    if banks > MAX_PCR_BANKS:
        reader.fail(f"{banks} PCR banks are over the limit of {MAX_PCR_BANKS}")
    selections = tuple(_selection(reader) for _ in range(banks))
    digest = reader.sized()
    reader.end()
    info = ClockInfo(clock, reset_count, restart_count, bool(safe))
    return Quote(signer, extra_data, info, firmware, selections, digest)


def _selection(reader: _Reader) -> PcrSelection:
    algorithm, size = reader.fields(_SELECTION)
    if size > MAX_SELECT_BYTES:
        reader.fail(f"a PCR bitmap of {size} bytes is over the limit of {MAX_SELECT_BYTES}")
    bits = int.from_bytes(reader.take(size), "little")
    return PcrSelection(algorithm, frozenset(index for index in range(size * 8) if bits >> index & 1))


def parse_signature(data: bytes) -> Signature:
    """Parse a TPMT_SIGNATURE.

    Raises:
        VerificationError: ``signature-scheme``, for anything but a well-formed ECDSA signature over SHA-256.
    """
    reader = _Reader(data, MAX_SIGNATURE_BYTES, "TPMT_SIGNATURE", "signature-scheme")
    scheme, digest = reader.fields(_SCHEME)
    if (scheme, digest) != (_ALG_ECDSA, ALG_SHA256):
        raise VerificationError("signature-scheme", f"{scheme:#x} over {digest:#x} is not ECDSA over SHA-256")
    r, s = reader.sized(), reader.sized()
    reader.end()
    if max(len(r), len(s)) > _P256_BYTES:
        reader.fail(f"a number is longer than {_P256_BYTES} bytes")
    return Signature(int.from_bytes(r), int.from_bytes(s))


@functools.lru_cache(MAX_CACHED_KEYS)
def parse_ak_public(data: bytes) -> AkPublic:
    """Parse the TPMT_PUBLIC of an attestation key (or the TPM2B_PUBLIC around it) and hold it against the template.

    Raises:
        VerificationError: ``ak-template``.
    """
    if len(data) == int.from_bytes(data[:2]) + 2:
        data = data[2:]
    reader = _Reader(data, MAX_PUBLIC_BYTES, "TPMT_PUBLIC", "ak-template")
    if reader.take(len(AK_TEMPLATE)) != AK_TEMPLATE:
        reader.fail("type, attributes, scheme or curve are not those of the attestation key's template")
    x, y = reader.sized(), reader.sized()
    reader.end()
    if max(len(x), len(y)) > _P256_BYTES:
        reader.fail(f"a coordinate is longer than {_P256_BYTES} bytes")
    numbers = ec.EllipticCurvePublicNumbers(int.from_bytes(x), int.from_bytes(y), ec.SECP256R1())
    try:
        key = numbers.public_key()
    except ValueError:
        reader.fail("the point does not lie on the curve")
    name = _name_of(data)
    return AkPublic(data, name, _name_of(_RH_ENDORSEMENT.to_bytes(4) + name), key)


def parse_rsa_ak_public(data: bytes) -> bytes:
    """Hold the TPMT_PUBLIC of the second attestation key against its template; returns it.

    Raises:
        VerificationError: ``ak-template``.
    """
    reader = _Reader(data, MAX_PUBLIC_BYTES, "TPMT_PUBLIC", "ak-template")
    if reader.take(len(RSA_AK_TEMPLATE)) != RSA_AK_TEMPLATE:
        reader.fail("type, attributes, scheme or size are not those of the second attestation key's template")
    modulus = reader.sized()
    reader.end()
    if int.from_bytes(modulus).bit_length() != _RSA_BITS:
        reader.fail(f"its modulus has not {_RSA_BITS} bits")
    return data


def _name_of(data: bytes) -> bytes:
    return ALG_SHA256.to_bytes(2) + hashlib.sha256(data).digest()


def pcr_digest(values: Iterable[bytes]) -> bytes:
    """Return SHA-256 over PCR values in ascending order of their index: what a quote of one bank signs."""
    return hashlib.sha256(b"".join(values)).digest()
