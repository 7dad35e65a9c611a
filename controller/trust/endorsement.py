"""Whose TPM it is: endorsement certificates against the operator's trust store, or endorsement keys on an allowlist.

Rules:

1. The chain leads from the EK certificate to a certificate of the operator's store; every link is signed, in date, and a CA within its path length.
   A node may send intermediates; it can't make them trusted. Path building is ``cryptography.x509.verification``'s work.
2. The EK certificate is no CA's; where it names a use, that is encryption, and where it names an extended one, a TPM's endorsement (TCG EK Credential
   Profile 2.5).
3. The key in the certificate is the key that the node showed.
4. A TPM is known by SHA-256 over its key's SubjectPublicKeyInfo.
5. All that has to do with a chain's links is one check, ``ek-chain``: signatures, dates, CA flags, uses, length. Its words say which of them, as far
   as path building knows: it tries every way to a trusted certificate, and none of them may be *the* one that failed.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import verification

from agent.attest.enrolment import MAX_CERTIFICATE_BYTES, MAX_EK_CHAIN
from agent.errors import ConfigError, VerificationError
from controller.trust.credential import EkKey

__all__ = ["EndorsementKey", "allowed", "load_allowlist", "load_roots", "parse_ek_public", "verify_endorsement"]

MAX_CHAIN = 6  # CA certificates below the trusted one
MAX_ROOTS = 1024  # certificates of the trust store, all files together
MAX_ROOTS_FILE_BYTES = 8 * 1024 * 1024
MAX_ALLOWED = 200_000  # TPMs on the allowlist
MAX_ALLOWLIST_BYTES = 32 * 1024 * 1024
_EK_CERTIFICATE = x509.ObjectIdentifier("2.23.133.8.1")  # tcg-kp-EKCertificate
_DIGEST = re.compile(r"[0-9a-f]{64}")

# TPMT_PUBLIC of the default templates (EK Credential Profile 2.5, B.3.3 and B.3.4) up to the ``unique`` field. Attributes: FIXEDTPM,
# FIXEDPARENT, SENSITIVEDATAORIGIN, ADMINWITHPOLICY, RESTRICTED, DECRYPT; the policy is PolicySecret(ENDORSEMENT).
_POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
_ATTRIBUTES = 0x000300B2
_HEAD = struct.Struct(">HHIH")
_RSA_HEAD = _HEAD.pack(0x0001, 0x000B, _ATTRIBUTES, 32) + _POLICY + struct.pack(">HHHHHI", 6, 128, 0x43, 0x10, 2048, 0)
_ECC_HEAD = _HEAD.pack(0x0023, 0x000B, _ATTRIBUTES, 32) + _POLICY + struct.pack(">HHHHHH", 6, 128, 0x43, 0x10, 3, 0x10)
_RSA_BYTES = 256
_P256_BYTES = 32


@dataclass(frozen=True, slots=True)
class EndorsementKey:
    """A genuine TPM's key: its digest, itself, and what the certificate calls it (empty without one)."""

    sha256: str
    key: EkKey
    subject: str


def load_roots(paths: Sequence[str]) -> tuple[x509.Certificate, ...]:
    """Read the operator's trust store.

    Raises:
        ConfigError: a file can't be read, holds no certificate or is over :data:`MAX_ROOTS_FILE_BYTES`, or all of them hold more than
            :data:`MAX_ROOTS` certificates.
    """
    found: list[x509.Certificate] = []
    for path in paths:
        data = _read(path, "enrolment.ek_roots", MAX_ROOTS_FILE_BYTES)
        if data.count(b"-----BEGIN CERTIFICATE-----") > MAX_ROOTS - len(found):
            raise ConfigError(f"enrolment.ek_roots: {path}: more than {MAX_ROOTS} certificates in all")
        try:
            found += x509.load_pem_x509_certificates(data)
        except (ValueError, x509.InvalidVersion) as error:
            raise ConfigError(f"enrolment.ek_roots: {path}: not PEM certificates: {error}") from error
    return tuple(found)


def load_allowlist(path: str | None) -> frozenset[str]:
    """Read the digests of TPMs that need no certificate; ``#`` begins a comment.

    Raises:
        ConfigError: the file can't be read, or a line is no digest, or there is more than :data:`MAX_ALLOWLIST_BYTES` or :data:`MAX_ALLOWED` of it.
    """
    if path is None:
        return frozenset()
    try:
        lines = _read(path, "enrolment.ek_allowlist", MAX_ALLOWLIST_BYTES).decode().splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"enrolment.ek_allowlist: {path}: {error}") from error
    found: set[str] = set()
    for number, line in enumerate(lines, 1):
        word = line.partition("#")[0].strip()
        if word and not _DIGEST.fullmatch(word):
            raise ConfigError(f"enrolment.ek_allowlist: {path}:{number}: not a SHA-256 digest in lower-case hex")
        if word:
            found.add(word)
        if len(found) > MAX_ALLOWED:
            raise ConfigError(f"enrolment.ek_allowlist: {path}:{number}: more than {MAX_ALLOWED} digests")
    return frozenset(found)


def _read(path: str, setting: str, limit: int) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ConfigError(f"{setting}: {path}: {error.strerror}") from error
    if len(data) > limit:
        raise ConfigError(f"{setting}: {path}: larger than {limit} bytes")
    return data


def parse_ek_public(data: bytes) -> EkKey:
    """Read a TPMT_PUBLIC that equals one of the default templates but for its ``unique`` field.

    Raises:
        VerificationError: ``ek-template``.
    """
    rsa_size = len(_RSA_HEAD) + 2 + _RSA_BYTES
    if data.startswith(_RSA_HEAD) and len(data) == rsa_size and data[len(_RSA_HEAD) :][:2] == b"\x01\x00":
        modulus = int.from_bytes(data[-_RSA_BYTES:])
        if modulus.bit_length() != 8 * _RSA_BYTES or modulus % 2 == 0:
            raise VerificationError("ek-template", "no RSA key: the modulus has not 2048 bits, or is even")
        return rsa.RSAPublicNumbers(65537, modulus).public_key()
    if data.startswith(_ECC_HEAD):
        rest = data[len(_ECC_HEAD) :]
        if len(rest) == 2 * (2 + _P256_BYTES) and rest[:2] == rest[34:36] == b"\x00\x20":
            point = b"\x04" + rest[2:34] + rest[36:]
            try:
                return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
            except ValueError as error:
                raise VerificationError("ek-template", f"no point of the curve: {error}") from error
    raise VerificationError("ek-template", "the endorsement key is not of the default RSA 2048 or ECC P-256 template")


def _digest(key: EkKey) -> str:
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def allowed(ek_public: bytes, allowlist: frozenset[str]) -> EndorsementKey:
    """Accept a TPM without a certificate that the operator has listed.

    Raises:
        VerificationError: ``ek-template``, ``ek-allowlist``.
    """
    key = parse_ek_public(ek_public)
    digest = _digest(key)
    if digest not in allowlist:
        raise VerificationError(
            "ek-allowlist", f"the TPM has no certificate, and its key {digest} is not on the allowlist"
        )
    return EndorsementKey(digest, key, "")


def verify_endorsement(
    certificate: bytes,
    chain: Sequence[bytes],
    ek_public: bytes,
    roots: Sequence[x509.Certificate],
    moment: dt.datetime,
) -> EndorsementKey:
    """Verify an EK certificate.

    Args:
        certificate: DER.
        chain: intermediates that came with it, DER.
        ek_public: TPMT_PUBLIC of the key.
        roots: the operator's trust store.
        moment: when every link must be in date.

    Raises:
        VerificationError: ``ek-certificate``, ``ek-chain``, ``ek-template``, ``ek-key``.
    """
    # 1. and 2. To a certificate that the operator trusts, by one that is for endorsement.
    if len(certificate) > MAX_CERTIFICATE_BYTES:
        raise VerificationError("ek-certificate", f"{len(certificate)} bytes are over {MAX_CERTIFICATE_BYTES}")
    if len(chain) > MAX_EK_CHAIN or any(len(one) > MAX_CERTIFICATE_BYTES for one in chain):
        raise VerificationError(
            "ek-chain", f"more than {MAX_EK_CHAIN} intermediates, or one over {MAX_CERTIFICATE_BYTES} bytes"
        )
    try:
        leaf = x509.load_der_x509_certificate(certificate)
        between = [x509.load_der_x509_certificate(one) for one in chain]
        key = leaf.public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise VerificationError("ek-certificate", f"not a certificate: {error}") from error
    if not roots:
        raise VerificationError("ek-chain", "no TPM vendor is trusted here: enrolment.ek_roots is empty")
    _verify_chain(leaf, between, roots, moment)
    # 3. The same key as shown.
    shown = parse_ek_public(ek_public)
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey) or _digest(key) != _digest(shown):
        raise VerificationError("ek-key", "the certificate is for another key")
    return EndorsementKey(_digest(key), key, leaf.subject.rfc4514_string())


def _check_signs(_policy: verification.Policy, _one: x509.Certificate, extension: x509.KeyUsage | None) -> None:
    if extension is not None and not extension.key_cert_sign:
        raise ValueError("an issuer's key may not sign certificates")


def _check_use(_policy: verification.Policy, _one: x509.Certificate, extension: x509.KeyUsage | None) -> None:
    if extension is not None and not (extension.key_encipherment or extension.key_agreement):
        raise ValueError("the certificate's key is not for encryption")


def _check_extended(
    _policy: verification.Policy, _one: x509.Certificate, extension: x509.ExtendedKeyUsage | None
) -> None:
    if extension is not None and _EK_CERTIFICATE not in extension:
        raise ValueError("the certificate is not for an endorsement key")


_EITHER = verification.Criticality.AGNOSTIC
_CA_POLICY = (
    verification.ExtensionPolicy.permit_all()
    .require_present(x509.BasicConstraints, _EITHER, None)  # the verifier demands that it says so
    .may_be_present(x509.KeyUsage, _EITHER, _check_signs)
)
_EK_POLICY = (
    verification.ExtensionPolicy.permit_all()
    .may_be_present(x509.KeyUsage, _EITHER, _check_use)
    .may_be_present(x509.ExtendedKeyUsage, _EITHER, _check_extended)
)

# BasicConstraints (RFC 5280, 4.2.1.9) that say "not a CA". The second form spells the default out, which DER forbids; Intel's firmware TPMs have it in
# every EK certificate, and a strict parser would turn all of them away. So the leaf's are compared as bytes: each occurrence of the identifier must
# go on in one of these two forms, which no CA's certificate does.
_CONSTRAINTS = b"\x06\x03\x55\x1d\x13"
_NO_CA = re.compile(_CONSTRAINTS + rb"(?:\x01\x01\xff)?\x04(?:\x02\x30\x00|\x05\x30\x03\x01\x01\x00)")


def _verify_chain(
    leaf: x509.Certificate,
    between: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    moment: dt.datetime,
) -> None:
    signed = leaf.tbs_certificate_bytes
    if len(_NO_CA.findall(signed)) != signed.count(_CONSTRAINTS):
        raise VerificationError("ek-chain", "the endorsement certificate is a CA's")
    verifier = (
        verification.PolicyBuilder()
        .store(verification.Store(list(roots)))
        .time(moment)
        .max_chain_depth(MAX_CHAIN)
        .extension_policies(ca_policy=_CA_POLICY, ee_policy=_EK_POLICY)
        .build_client_verifier()
    )
    try:
        verifier.verify(leaf, list(between))
    except verification.VerificationError as error:
        raise VerificationError("ek-chain", " ".join(str(error).split())[:400]) from error
