"""Throw-away certificates for the demo and the tests: one CA, a server, clients with roles, signing keys.

Not for production: the CA's key lies beside its certificate.
"""

import datetime as dt
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent import clock
from agent.certificate import begin_certificate, key_usage

__all__ = ["Authority", "write_signing_key"]

VALID_DAYS = 30


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA that issues into a directory: ``<name>.pem`` (chain) and ``<name>.key``, mode 0600."""

    directory: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, directory: Path, name: str = "Example CA") -> "Authority":
        """Make a new CA and write ``ca.pem``."""
        directory.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(subject, subject, key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        certificate = builder.add_extension(key_usage("key_cert_sign", "crl_sign"), critical=True).sign(
            key, hashes.SHA256()
        )
        (directory / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        _write_key(directory / "ca.key", key)
        return cls(directory, certificate, key)

    @classmethod
    def open(cls, directory: Path) -> "Authority":
        """Take up a CA made earlier."""
        key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError("the CA's key is no EC key")
        return cls(directory, x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes()), key)

    def server(self, name: str) -> Path:
        """Issue a server certificate for loopback."""
        names = [
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            x509.IPAddress(ipaddress.ip_address("::1")),
        ]
        return self._issue(name, [], x509.SubjectAlternativeName(names), ExtendedKeyUsageOID.SERVER_AUTH)

    def client(self, name: str, roles: tuple[str, ...] = (), spiffe: str | None = None) -> Path:
        """Issue a client certificate with its roles as OU attributes."""
        san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe)]) if spiffe else None
        return self._issue(name, roles, san, ExtendedKeyUsageOID.CLIENT_AUTH)

    def _issue(
        self,
        name: str,
        roles: list[str] | tuple[str, ...],
        san: x509.SubjectAlternativeName | None,
        usage: x509.ObjectIdentifier,
    ) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
        attributes += [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role) for role in roles]
        builder = (
            _builder(x509.Name(attributes), self.certificate.subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage("digital_signature"), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if san:
            builder = builder.add_extension(san, critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        path = self.directory / f"{name}.pem"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        _write_key(self.directory / f"{name}.key", key)
        return path


def write_signing_key(directory: Path, name: str) -> Path:
    """Write an EC P-256 key pair ``<name>.key`` and ``<name>.pub``, as model and policy signers use them."""
    directory.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    _write_key(directory / f"{name}.key", key)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (directory / f"{name}.pub").write_bytes(public)
    return directory / f"{name}.key"


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    start = dt.datetime.fromtimestamp(clock.now(), dt.UTC) - dt.timedelta(hours=1)
    return begin_certificate(subject, issuer, key, start, start + dt.timedelta(days=VALID_DAYS))


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
