"""Certificate chains of endorsement keys: good ones, and each way in which one can be wrong."""

from __future__ import annotations

import base64
import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from agent.certificate import begin_certificate

__all__ = ["HOSTILE", "PAST", "ROOT", "Ca", "Shown", "armoured", "good", "line", "of_version", "under", "usage"]

EK_USE = x509.ObjectIdentifier("2.23.133.8.1")
START = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
PAST = dt.datetime(2021, 1, 1, tzinfo=dt.UTC)
FUTURE = dt.datetime(2089, 1, 1, tzinfo=dt.UTC)
END = dt.datetime(2090, 1, 1, tzinfo=dt.UTC)
EkPublic: TypeAlias = "ec.EllipticCurvePublicKey | rsa.RSAPublicKey"
EkPrivate: TypeAlias = ec.EllipticCurvePrivateKey


def usage(*names: str) -> x509.KeyUsage:
    """Return a KeyUsage with these bits."""
    bits = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    every = (*bits, "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{bit: bit in names for bit in every})


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@dataclass
class Ca:
    """An authority; without an issuer its certificate is its own. ``constraints`` None leaves the extension out."""

    name: str
    issuer: Ca | None = None
    key: ec.EllipticCurvePrivateKey = field(default_factory=_new_key)
    start: dt.datetime = START
    end: dt.datetime = END
    constraints: x509.BasicConstraints | None = field(default_factory=lambda: x509.BasicConstraints(True, None))
    key_usage: x509.KeyUsage | None = field(default_factory=lambda: usage("key_cert_sign", "crl_sign"))

    def certificate(self) -> x509.Certificate:
        by = self.issuer or self
        builder = _builder(self.name, self.key.public_key(), by, self.start, self.end)
        for extension in (self.constraints, self.key_usage):
            if extension is not None:
                builder = builder.add_extension(extension, critical=True)
        return builder.sign(by.key, hashes.SHA256())

    def der(self) -> bytes:
        return self.certificate().public_bytes(serialization.Encoding.DER)

    def pem(self) -> bytes:
        return self.certificate().public_bytes(serialization.Encoding.PEM)

    def endorse(
        self,
        key: EkPublic,
        *,
        start: dt.datetime = START,
        end: dt.datetime = END,
        name: str = "TPM",
        constraints: x509.ExtensionType = x509.BasicConstraints(False, None),  # noqa: B008 -- a value
        key_usage: x509.KeyUsage | None = None,
        use: x509.ObjectIdentifier | None = EK_USE,
        padding: int = 0,
    ) -> bytes:
        """Return an EK certificate in DER. ``padding`` is the size of an extension that says nothing."""
        builder = _builder(name, key, self, start, end).add_extension(constraints, critical=True)
        fitting = usage("key_encipherment" if isinstance(key, rsa.RSAPublicKey) else "key_agreement")
        builder = builder.add_extension(key_usage or fitting, critical=True)
        if use is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        if padding:
            filler = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), bytes(padding))
            builder = builder.add_extension(filler, critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def _builder(name: str, key: EkPublic, by: Ca, start: dt.datetime, end: dt.datetime) -> x509.CertificateBuilder:
    builder = begin_certificate(_name(name), _name(by.name), key, start, end)
    of_issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.key.public_key())
    return builder.add_extension(of_issuer, critical=False)


ROOT = Ca("TPM vendor")
"""The one that is trusted."""


@dataclass(frozen=True)
class Shown:
    """What a node shows: EK certificate and intermediates, in DER."""

    certificate: bytes
    chain: tuple[bytes, ...] = ()


def under(key: EkPublic, *below: Ca) -> Shown:
    """Return what the last of these endorses, with all of them beside it."""
    return Shown(below[-1].endorse(key), tuple(ca.der() for ca in below))


def _under(*below: Ca) -> Callable[[EkPrivate], Shown]:
    return lambda key: under(key.public_key(), *below)


def _alone(by: Ca = ROOT, **changes: Any) -> Callable[[EkPrivate], Shown]:
    return lambda key: Shown(by.endorse(key.public_key(), **changes))


def line(count: int, top: Ca = ROOT) -> tuple[Ca, ...]:
    """Return authorities, each below the one before."""
    found: list[Ca] = []
    for number in range(count):
        found.append(Ca(f"Intermediate {number}", found[-1] if found else top))
    return tuple(found)


def good(key: EkPublic, intermediates: int = 1) -> Shown:
    """As a vendor does it."""
    return under(key, *line(intermediates)) if intermediates else Shown(ROOT.endorse(key))


def of_version(number: int, der: bytes) -> bytes:
    """Return a certificate or a request with another version: 2 says X.509 v3, and above it there is none."""
    head = b"\xa0\x03\x02\x01\x02" if b"\xa0\x03\x02\x01" in der[:16] else b"\x02\x01\x00"
    assert head in der[:16]
    return der.replace(head, head[:-1] + bytes([number]), 1)


def armoured(der: bytes) -> bytes:
    """Return PEM of what may be a certificate."""
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"


def _self_signed(key: EkPrivate) -> Shown:
    return Shown(Ca("TPM", key=key).endorse(key.public_key()))


def _endorsed_by_another(key: EkPrivate) -> Shown:
    """A genuine TPM's key as an issuer."""
    other = Ca("TPM", ROOT)
    return Shown(other.endorse(key.public_key()), (ROOT.endorse(other.key.public_key()),))


_EXPLICIT_TRUE = x509.UnrecognizedExtension(ExtensionOID.BASIC_CONSTRAINTS, b"\x30\x03\x01\x01\xff")
_AT_NOTHING = x509.BasicConstraints(True, 0)
_OLD = Ca("Old", ROOT, end=PAST)
_LAST = Ca("Last", ROOT, constraints=_AT_NOTHING)

HOSTILE: dict[str, Callable[[EkPrivate], Shown]] = {
    "expired certificate": _alone(end=PAST),
    "certificate that is not valid yet": _alone(start=FUTURE),
    "expired intermediate": _under(Ca("Old", ROOT, end=PAST)),
    "intermediate that is not valid yet": _under(Ca("Young", ROOT, start=FUTURE)),
    "expired intermediate in the middle": _under(_OLD, *line(1, _OLD)),
    "signed by itself": _self_signed,
    "signed by somebody in the vendor's name": _alone(Ca(ROOT.name)),
    "signed by nobody who is known": _alone(Ca("Somebody")),
    "a root of its own, sent along": _under(Ca("Somebody")),
    "a root of its own with the vendor's name, sent along": _under(Ca(ROOT.name)),
    "intermediate left out": _alone(line(1)[0]),
    "a CA's certificate": _alone(constraints=_AT_NOTHING),
    "a CA's certificate, oddly encoded": _alone(constraints=_EXPLICIT_TRUE),
    "intermediate that does not say what it is": _under(Ca("Mute", ROOT, constraints=None)),
    "intermediate that is no CA": _under(Ca("End", ROOT, constraints=x509.BasicConstraints(False, None))),
    "intermediate past its path length": _under(_LAST, Ca("One more", _LAST)),
    "intermediate that may not sign": _under(Ca("Reader", ROOT, key_usage=usage("digital_signature"))),
    "a key that is for signing": _alone(key_usage=usage("digital_signature")),
    "a certificate for TLS": _alone(use=ExtendedKeyUsageOID.CLIENT_AUTH),
    "another TPM's endorsement in between": _endorsed_by_another,
}
"""What is signed in part and must not be believed: refused as ``ek-chain``, each of them."""
