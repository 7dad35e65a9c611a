"""What every X.509 certificate that this project makes has in common."""

from __future__ import annotations

import datetime as dt

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

__all__ = ["begin_certificate", "key_usage"]

_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def key_usage(*uses: str) -> x509.KeyUsage:
    """Return a key usage (RFC 5280, section 4.2.1.3) of these uses, as the library names them, and no other."""
    if not set(_USES).issuperset(uses):
        raise ValueError(f"{', '.join(uses)}: not all of them are key usages")
    return x509.KeyUsage(**{use: use in uses for use in _USES})


def begin_certificate(
    subject: x509.Name, issuer: x509.Name, key: CertificatePublicKeyTypes, begin: dt.datetime, end: dt.datetime
) -> x509.CertificateBuilder:
    """Return a builder with names, key, dates, a random serial number and the subject's key identifier."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
