"""Signatures over model packages: OpenSSF Model Signing (OMS) v1.0.

A Sigstore bundle v0.3 holds a DSSE envelope, that an in-toto Statement v1, that one SHA-256 per file.

Rules:

1. Trusted are EC P-256 public keys and X.509 roots, both offline. The algorithm follows from the trusted key (ECDSA
   with SHA-256), never from the bundle.
2. The signature is over DSSE's pre-authentication encoding of the payload type and the payload's bytes; nothing in the
   payload is believed before it holds. (The double-escaped encoding of the format's version 0.2 is refused.)
3. Every file of the package but ``model.sig`` is listed with its digest, and everything listed is there. The bundle's
   own ``ignore_paths`` has no say.
4. Malformed input is a :class:`~agent.errors.VerificationError` with the name of the check, whatever it is.

Sources: https://github.com/secure-systems-lab/dsse (protocol v1.0), https://in-toto.io/Statement/v1,
https://github.com/ossf/model-signing-spec.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.errors import ConfigError, VerificationError
from agent.inference.certificates import MAX_CHAIN, check_chain
from agent.inference.package import SIGNATURE_FILE, Package
from agent.isolation.memfd import map_sealed
from agent.records import canonical

__all__ = [
    "MAX_BUNDLE_BYTES",
    "FileDigestError",
    "Signer",
    "TrustStore",
    "load_signing_key",
    "sign",
    "verify_bundle",
    "verify_package",
]

MAX_BUNDLE_BYTES = 1 << 20

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"


class FileDigestError(VerificationError):
    """A trusted signer signed other bytes: check ``file-digest``.

    Attributes:
        paths: every file whose digest is not the signed one.
    """

    def __init__(self, message: str, paths: tuple[str, ...]) -> None:
        super().__init__("file-digest", message)
        self.paths = paths


@dataclass(frozen=True, slots=True)
class Signer:
    """Who signed a package.

    Attributes:
        sha256_of_spki: hex digest of the key's SubjectPublicKeyInfo in DER.
        kind: by what it is trusted.
        subject: the certificate's subject (RFC 4514); empty for a key.
        in_date: whether every certificate is in date now; a key has no dates.
    """

    sha256_of_spki: str
    kind: Literal["key", "certificate"]
    subject: str = ""
    in_date: bool = True


@dataclass(frozen=True, slots=True)
class TrustStore:
    """What the operator trusts to sign models."""

    keys: tuple[ec.EllipticCurvePublicKey, ...] = ()
    roots: tuple[x509.Certificate, ...] = ()

    @classmethod
    def from_pem(cls, *documents: bytes) -> "TrustStore":
        """Load PEM files, each with one public key or with certificates.

        Raises:
            ConfigError: a file holds neither, or a key that is not EC P-256.
        """
        keys: list[ec.EllipticCurvePublicKey] = []
        roots: list[x509.Certificate] = []
        for pem in documents:
            try:
                if b"-----BEGIN CERTIFICATE-----" in pem:
                    roots.extend(x509.load_pem_x509_certificates(pem))
                else:
                    keys.append(_p256(serialization.load_pem_public_key(pem)))
            except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
                raise ConfigError(
                    f"trusted signer: give a PEM file with an EC P-256 public key or with certificates ({error})"
                ) from error
        return cls(tuple(keys), tuple(roots))


class _PublicKey(msgspec.Struct):
    hint: str | None = None


class _Certificate(msgspec.Struct, rename="camel"):
    raw_bytes: bytes


class _Chain(msgspec.Struct):
    certificates: list[_Certificate]


class _Material(msgspec.Struct):
    public_key: _PublicKey | None = msgspec.field(default=None, name="publicKey")
    chain: _Chain | None = msgspec.field(default=None, name="x509CertificateChain")


class _Signature(msgspec.Struct):
    sig: bytes


class _Envelope(msgspec.Struct, rename="camel"):
    payload: bytes
    payload_type: str
    signatures: list[_Signature]


class _Bundle(msgspec.Struct, rename="camel"):
    media_type: str
    verification_material: _Material
    dsse_envelope: _Envelope


class _Subject(msgspec.Struct):
    name: str
    digest: dict[str, str]


class _Serialization(msgspec.Struct):
    method: str
    hash_type: str


class _Resource(msgspec.Struct):
    name: str
    algorithm: str
    digest: str


class _Predicate(msgspec.Struct):
    serialization: _Serialization
    resources: list[_Resource]


class _StatementHead(msgspec.Struct):
    type: str = msgspec.field(name="_type")
    predicate_type: str = msgspec.field(name="predicateType")


class _Statement(msgspec.Struct):
    subject: list[_Subject]
    predicate: _Predicate


def verify_package(package: Package, trust: TrustStore) -> Signer:
    """Verify that a trusted signer listed exactly these files with these digests.

    Raises:
        VerificationError: ``missing-signature``, or a check of :func:`verify_bundle`.
    """
    if package.signature is None:
        raise VerificationError("missing-signature", f"the package has no {SIGNATURE_FILE}")
    if package.signature.size > MAX_BUNDLE_BYTES:
        raise VerificationError("bundle-size", f"{package.signature.size} bytes, more than {MAX_BUNDLE_BYTES}")
    return verify_bundle(bytes(map_sealed(package.signature.fd)), package.digests(), trust)


def verify_bundle(data: bytes, digests: Mapping[str, str], trust: TrustStore) -> Signer:
    """Verify a bundle against the digests of the files that are there.

    Args:
        data: the bundle's JSON.
        digests: path to SHA-256 in hex of every file but the signature.
        trust: trusted keys and roots.

    Raises:
        VerificationError: the first check that fails: ``bundle-size``, ``bundle-format``, ``bundle-media-type``,
            ``payload-type``, ``signature-count``, ``verification-material``, ``untrusted-key``, ``certificate-chain``,
            ``signature``, ``statement-format``, ``statement-type``, ``predicate-type``,
            ``serialization``, ``subject``, ``digest-algorithm``, ``duplicate-name``, ``subject-digest``,
            ``unlisted-file``, ``missing-file``, ``file-digest``.
    """
    # 1. A bundle of the right size, form and type.
    if len(data) > MAX_BUNDLE_BYTES:
        raise VerificationError("bundle-size", f"{len(data)} bytes, more than {MAX_BUNDLE_BYTES}")
    bundle = _decode("bundle-format", data, _Bundle)
    if bundle.media_type != _MEDIA_TYPE:
        raise VerificationError("bundle-media-type", f"{bundle.media_type[:80]!r} is not {_MEDIA_TYPE}")
    # 2. An envelope around an in-toto statement, with one signature.
    envelope = bundle.dsse_envelope
    if envelope.payload_type != _PAYLOAD_TYPE:
        raise VerificationError("payload-type", f"{envelope.payload_type[:80]!r} is not {_PAYLOAD_TYPE}")
    if len(envelope.signatures) != 1:
        raise VerificationError("signature-count", f"{len(envelope.signatures)} signatures, expected one")
    # 3. A signer whom the operator trusts, and its signature.
    signature, message = envelope.signatures[0].sig, _pae(envelope.payload)
    match bundle.verification_material:
        case _Material(public_key=_PublicKey() as named, chain=None):
            signer = _verify_by_key(named.hint, signature, message, trust)
        case _Material(public_key=None, chain=_Chain() as chain):
            signer = _verify_by_chain(chain, signature, message, trust)
        case _:
            raise VerificationError("verification-material", "expected either publicKey or x509CertificateChain")
    # 4. Only now, what was signed.
    _check_files(_listed(envelope.payload), digests)
    return signer


def _decode(check: str, data: bytes, as_type: type[Any]) -> Any:  # noqa: ANN401 -- msgspec's generic
    try:
        return msgspec.json.decode(data, type=as_type)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors; nesting is bounded by recursion
        raise VerificationError(check, str(error)[:200]) from error


def _pae(payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding (protocol v1.0, "signature definition")."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def _p256(key: object) -> ec.EllipticCurvePublicKey:
    if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
        raise ValueError("not an EC P-256 key")  # noqa: TRY004 -- a wrong document, not a wrong argument
    return key


def _verify_by_key(hint: str | None, signature: bytes, message: bytes, trust: TrustStore) -> Signer:
    candidates = [key for key in trust.keys if hint is None or hint == _hint(key)]
    if not candidates:
        raise VerificationError("untrusted-key", f"no trusted key has the fingerprint {(hint or 'unnamed')[:64]}")
    for key in candidates:
        if _holds(key, signature, message):
            return Signer(_spki_sha256(key), "key")
    raise VerificationError("signature", "it does not verify with the trusted key")


def _verify_by_chain(chain: _Chain, signature: bytes, message: bytes, trust: TrustStore) -> Signer:
    if not 1 <= len(chain.certificates) <= MAX_CHAIN:
        raise VerificationError("certificate-chain", f"{len(chain.certificates)} certificates, expected 1..{MAX_CHAIN}")
    try:
        certificates = [x509.load_der_x509_certificate(certificate.raw_bytes) for certificate in chain.certificates]
        key = _p256(certificates[0].public_key())
        subject = certificates[0].subject.rfc4514_string()
        in_date = check_chain(certificates, trust.roots)
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise VerificationError(
            "certificate-chain", f"a certificate is malformed or of a wrong kind: {error}"
        ) from error
    if not _holds(key, signature, message):
        raise VerificationError("signature", "it does not verify with the signing certificate's key")
    return Signer(_spki_sha256(key), "certificate", subject, in_date)


def _holds(key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    try:
        key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _listed(payload: bytes) -> dict[str, str]:
    """Return path to digest as the statement lists them."""
    head = _decode("statement-format", payload, _StatementHead)
    if head.type != _STATEMENT_TYPE:
        raise VerificationError("statement-type", f"{head.type[:80]!r} is not {_STATEMENT_TYPE}")
    if head.predicate_type != _PREDICATE_TYPE:
        raise VerificationError("predicate-type", f"{head.predicate_type[:80]!r} is not {_PREDICATE_TYPE}")
    statement = _decode("statement-format", payload, _Statement)
    serialized = statement.predicate.serialization
    if (serialized.method, serialized.hash_type) != ("files", "sha256"):
        raise VerificationError("serialization", "expected one SHA-256 per file (method files, hash_type sha256)")
    if len(statement.subject) != 1:
        raise VerificationError("subject", f"{len(statement.subject)} subjects, expected one")
    listed: dict[str, str] = {}
    root = hashlib.sha256()
    for resource in statement.predicate.resources:
        if resource.algorithm != "sha256":
            raise VerificationError("digest-algorithm", f"{resource.name[:255]}: {resource.algorithm[:32]!r}")
        if resource.name in listed:
            raise VerificationError("duplicate-name", f"{resource.name[:255]} is listed twice")
        listed[resource.name] = resource.digest
        try:
            root.update(bytes.fromhex(resource.digest))
        except ValueError as error:
            raise VerificationError("statement-format", f"{resource.name[:255]}: the digest is not hex") from error
    if statement.subject[0].digest != {"sha256": root.hexdigest()}:
        raise VerificationError("subject-digest", "it is not the digest over the listed files' digests")
    return listed


def _check_files(listed: Mapping[str, str], present: Mapping[str, str]) -> None:
    # Names are compared, never opened: a listed "../x" or "/x" can only be a file that is missing.
    for path in sorted(present.keys() - listed.keys()):
        raise VerificationError("unlisted-file", f"{path} is in the package but not in its signature")
    for path in sorted(listed.keys() - present.keys()):
        raise VerificationError("missing-file", f"{path[:255]!r} is in the signature but not in the package")
    wrong = tuple(path for path, digest in sorted(present.items()) if listed[path] != digest)
    if wrong:
        path = wrong[0]
        raise FileDigestError(f"{path} has SHA-256 {present[path]}, signed was {listed[path][:64]}", wrong)


def _spki_sha256(key: ec.EllipticCurvePublicKey) -> str:
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _hint(key: ec.EllipticCurvePublicKey) -> str:
    """Return the format's name for a key: SHA-256 over its PEM."""
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def load_signing_key(pem: bytes, password: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Load an EC P-256 private key.

    Raises:
        ConfigError: it is another kind of key, encrypted without the right password, or no key.
    """
    try:
        key = serialization.load_pem_private_key(pem, password)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("not an EC P-256 key")  # noqa: TRY004 -- a wrong document, not a wrong argument
        _p256(key.public_key())
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: password missing or not needed
        raise ConfigError(f"signing key: give a PEM file with an EC P-256 private key ({error})") from error
    return key


def sign(
    name: str,
    digests: Mapping[str, str],
    key: ec.EllipticCurvePrivateKey,
    chain: Sequence[x509.Certificate] = (),
) -> bytes:
    """Return the bundle that signs these files.

    Args:
        name: of the model; it becomes the statement's subject.
        digests: path to SHA-256 in hex of every file but the signature.
        key: signs.
        chain: certificate of ``key`` first, then intermediates; empty to sign with the bare key.

    Raises:
        ConfigError: the first certificate is not that of the key.
    """
    if chain and chain[0].public_key() != key.public_key():
        raise ConfigError("certificate chain: the first certificate must be that of the signing key")
    resources = [{"algorithm": "sha256", "digest": digest, "name": path} for path, digest in sorted(digests.items())]
    root = hashlib.sha256(b"".join(bytes.fromhex(resource["digest"]) for resource in resources)).hexdigest()
    payload = canonical(
        {
            "_type": _STATEMENT_TYPE,
            "subject": [{"name": name, "digest": {"sha256": root}}],
            "predicateType": _PREDICATE_TYPE,
            "predicate": {
                "serialization": {
                    "method": "files",
                    "hash_type": "sha256",
                    "allow_symlinks": False,
                    "ignore_paths": [SIGNATURE_FILE],
                },
                "resources": [dict(resource) for resource in resources],
            },
        }
    )
    material: dict[str, Any] = {"publicKey": {"hint": _hint(key.public_key())}}
    if chain:
        raw = [{"rawBytes": certificate.public_bytes(serialization.Encoding.DER)} for certificate in chain]
        material = {"x509CertificateChain": {"certificates": raw}}
    return msgspec.json.encode(
        {
            "mediaType": _MEDIA_TYPE,
            "verificationMaterial": {**material, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": payload,
                "payloadType": _PAYLOAD_TYPE,
                "signatures": [{"sig": key.sign(_pae(payload), ec.ECDSA(hashes.SHA256())), "keyid": ""}],
            },
        }
    )
