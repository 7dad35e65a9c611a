"""Keys, certificates and tokens for tests, made by the real libraries."""

from __future__ import annotations

import datetime as dt
import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = ["NOT_AFTER", "NOT_BEFORE", "base64url", "client_certificate", "jwk", "jwks", "sign_token"]

NOT_BEFORE = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
NOT_AFTER = dt.datetime(2036, 1, 1, tzinfo=dt.UTC)


def client_certificate(
    *,
    common_names: Sequence[str] = ("alice",),
    roles: Sequence[str] = (),
    uris: Sequence[str] = (),
    usages: Sequence[x509.ObjectIdentifier] | None = (ExtendedKeyUsageOID.CLIENT_AUTH,),
    ca: bool = False,
    key_usage: x509.KeyUsage | None = None,
    extensions: Sequence[x509.ExtensionType] = (),
) -> bytes:
    """Return a self-signed certificate in DER; the chain is the TLS library's business, not the reader's."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in common_names]
        + [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role) for role in roles]
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOT_BEFORE)
        .not_valid_after(NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if usages is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(list(usages)), critical=False)
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if key_usage is not None:
        builder = builder.add_extension(key_usage, critical=True)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def base64url(data: bytes) -> str:
    """Encode without padding, as RFC 7515 does."""
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def jwk(kid: str, key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
    """Return the public JWK of a P-256 key."""
    numbers = key.public_key().public_numbers()
    x, y = (base64url(value.to_bytes(32)) for value in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": "P-256", "kid": kid, "x": x, "y": y, "alg": "ES256", "use": "sig"}


def jwks(**keys: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a JWKS document of public keys by their kid."""
    return json.dumps({"keys": [jwk(kid, key) for kid, key in keys.items()]}).encode()


def sign_token(
    key: ec.EllipticCurvePrivateKey,
    claims: Mapping[str, Any],
    *,
    kid: str = "k1",
    headers: Mapping[str, Any] | None = None,
) -> str:
    """Sign claims with ES256, as an identity provider does."""
    return jwt.encode(dict(claims), key, algorithm="ES256", headers={"kid": kid, **(headers or {})})
