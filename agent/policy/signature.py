"""Bundle signatures: OPA's own ``.signatures.json``, ES256 only.

The file holds one JWT whose payload names every file of the bundle with its SHA-256; ``opa sign`` and
``opa build --signing-key`` write it, ``opa run`` and ``opa build --verification-key`` check it.
See https://www.openpolicyagent.org/docs/management-bundles#signing.

A bundle is verified when all of this holds:

1. The bundle has a ``.signatures.json`` with exactly one signature.
2. Its JWT is ES256 and verifies with one of the trusted EC P-256 keys. Times in the claims are not judged: a signature
   does not expire into a site visit.
3. The payload lists each file of the bundle, and no other, once.
4. Each listed digest is SHA-256 and equals that of the file.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.errors import ConfigError, VerificationError
from agent.policy.documents import Document, hashable_form, parse_json

__all__ = ["SIGNATURES_FILE", "load_crypto", "sign_files", "verify_files"]

SIGNATURES_FILE = ".signatures.json"
_CHECK = "bundle-signature"
_T = TypeVar("_T")
_ALGORITHM = "ES256"
_STRUCTURED_JSON = {"data.json", ".manifest"}
_STRUCTURED_YAML = {"data.yaml", "data.yml"}


class _SignedFile(msgspec.Struct, frozen=True):
    name: str
    hash: str
    algorithm: str


class _Payload(msgspec.Struct, frozen=True):
    files: tuple[_SignedFile, ...]


class _Signatures(msgspec.Struct, frozen=True):
    signatures: tuple[str, ...]


def sign_files(files: Mapping[str, bytes], private_key_pem: bytes, key_id: str = "") -> bytes:
    """Return the ``.signatures.json`` for a bundle.

    Args:
        files: path in the bundle -> content; an old signature among them is left out.
        private_key_pem: EC P-256, PEM, without a passphrase.
        key_id: written as OPA's ``keyid`` claim, so that ``opa run`` finds the key by name; left out when empty.

    Raises:
        ConfigError: the key is not an EC P-256 private key.
        VerificationError: ``bundle-document``: a structured file cannot be read.
    """
    try:
        key = serialization.load_pem_private_key(private_key_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"the signing key cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError("the signing key must be an EC P-256 private key")
    claims: dict[str, Any] = {
        "files": [
            {"name": path, "hash": _digest(path, files[path]), "algorithm": "SHA-256"}
            for path in sorted(files)
            if path != SIGNATURES_FILE
        ]
    }
    headers = None
    if key_id:
        claims["keyid"] = key_id
        headers = {"kid": key_id}
    token = jwt.api_jws.encode(msgspec.json.encode(claims), key, algorithm=_ALGORITHM, headers=headers)
    return msgspec.json.encode({"signatures": [token]})


def verify_files(files: Mapping[str, bytes], trusted_keys: Sequence[bytes]) -> None:
    """Check the signature of a bundle.

    Args:
        files: path in the bundle -> content, the signature among them.
        trusted_keys: EC P-256 public keys, PEM.

    Raises:
        ConfigError: a trusted key is not an EC P-256 public key.
        VerificationError: ``bundle-signature``, with the first rule that does not hold.
    """
    keys = [_public_key(pem) for pem in trusted_keys]
    # 1. One signature.
    if SIGNATURES_FILE not in files:
        raise VerificationError(_CHECK, "the bundle is not signed, and this node trusts signed bundles only")
    tokens = _convert(parse_json(SIGNATURES_FILE, files[SIGNATURES_FILE]), _Signatures, SIGNATURES_FILE).signatures
    if len(tokens) != 1:
        raise VerificationError(_CHECK, f"{len(tokens)} signatures stand where OPA's format wants one")
    # 2. By a trusted key.
    payload = _convert(parse_json("the signature's payload", _verified(tokens[0], keys)), _Payload, "its payload")
    # 3. Over these files and no other.
    listed = {entry.name.removeprefix("/"): entry for entry in payload.files}
    present = files.keys() - {SIGNATURES_FILE}
    if len(listed) != len(payload.files):
        raise VerificationError(_CHECK, "a file is listed twice")
    if unlisted := sorted(present - listed.keys()):
        raise VerificationError(_CHECK, f"{unlisted[0]} is not covered by the signature")
    if missing := sorted(listed.keys() - present):
        raise VerificationError(_CHECK, f"{missing[0]} is signed but not in the bundle")
    # 4. With these contents.
    for path, entry in listed.items():
        if entry.algorithm != "SHA-256":
            raise VerificationError(_CHECK, f"{path} is signed with {entry.algorithm[:20]!r}, not SHA-256")
        if entry.hash != _digest(path, files[path]):
            raise VerificationError(_CHECK, f"{path} is not what was signed")


def load_crypto() -> None:
    """Verify a throw-away signature, so that what ``cryptography`` imports at first use is imported before a sandbox."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    verify_files({SIGNATURES_FILE: sign_files({}, private)}, [public])


def _verified(token: str, keys: Sequence[ec.EllipticCurvePublicKey]) -> bytes:
    for key in keys:
        try:
            payload: bytes = jwt.api_jws.decode_complete(token, key, algorithms=[_ALGORITHM])["payload"]
        except jwt.InvalidSignatureError:
            continue
        except (jwt.PyJWTError, ValueError) as error:  # PyJWT leaks ValueError for some malformed tokens
            raise VerificationError(_CHECK, f"the signature is malformed: {error}") from error
        return payload
    raise VerificationError(_CHECK, "no trusted key made this signature")


def _public_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"a trusted policy key cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError("a trusted policy key is not an EC P-256 public key")
    return key


def _convert(value: Document, as_type: type[_T], name: str) -> _T:
    try:
        return msgspec.convert(value, as_type)
    except msgspec.ValidationError as error:
        raise VerificationError(_CHECK, f"{name} is malformed: {error}") from error


def _digest(path: str, content: bytes) -> str:
    base = PurePosixPath(path).name
    if base in _STRUCTURED_JSON or base in _STRUCTURED_YAML:
        content = hashable_form(path, content, is_yaml=base in _STRUCTURED_YAML)
    return hashlib.sha256(content).hexdigest()
