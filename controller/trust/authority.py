"""The controller's keys and the certificates that it issues.

Rules:

1. Three keys, each for one thing: ``ca`` signs certificates, ``server`` is the listener's and the poller's, ``result`` signs Attestation Results.
   Files of a directory that only the controller reads (mode 0600); none of them signs policies or models.
2. A node's certificate names ``spiffe://<trust domain>/node/<id>``, an admin's ``…/admin/<name>``, the controller's ``…/controller``. No certificate
   is a CA's but the CA's own, whose path length is 0.
3. Who an admin is, is looked up by the key of the certificate; a role stands in the database, so that it can be taken away.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from jwt.algorithms import ECAlgorithm

from agent import clock
from agent.certificate import begin_certificate, key_usage
from agent.errors import ConfigError, VerificationError

__all__ = ["Authority", "Issued", "request_key", "spki_sha256"]

CA_DAYS = 3650
SERVER_DAYS = 825
BACKDATE = dt.timedelta(minutes=5)  # for clocks that are a little slow
_EXTENDED = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])


def spki_sha256(key: ec.EllipticCurvePublicKey) -> str:
    """Return the digest by which a key is known."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate: PEM, the digest of its key, and until when (microseconds since the epoch)."""

    pem: str
    spki_sha256: str
    until_us: int


@dataclass(frozen=True, slots=True)
class Authority:
    """The keys of one controller, loaded."""

    directory: Path
    trust_domain: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    result_key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, directory: Path, trust_domain: str, names: Sequence[str]) -> Authority:
        """Make all keys and certificates in a new directory.

        Args:
            directory: must not hold keys yet.
            trust_domain: of the SPIFFE IDs.
            names: DNS names and addresses by which nodes and operators reach the controller.

        Raises:
            ConfigError: there are keys already, or the directory can't be written.
        """
        if (directory / "ca.key").exists():
            raise ConfigError(f"{directory}: it holds a controller's keys already; they are not replaced")
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server", "result")}
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"EdgeWarden controller {trust_domain}")])
            certificate = (
                _builder(subject, subject, keys["ca"].public_key(), dt.timedelta(days=CA_DAYS))
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(key_usage("key_cert_sign", "crl_sign"), critical=True)
                .sign(keys["ca"], hashes.SHA256())
            )
            authority = cls(directory, trust_domain, certificate, keys["ca"], keys["result"])
            (directory / "ca.pem").write_text(_pem(certificate))
            (directory / "server.pem").write_text(authority._server(keys["server"].public_key(), names))
            for name in ("server", "result", "ca"):  # the CA's last: it says that all is there
                _write_key(directory / f"{name}.key", keys[name])
        except OSError as error:
            raise ConfigError(f"{directory}: {error.strerror}") from error
        return authority

    @classmethod
    def load(cls, directory: Path, trust_domain: str) -> Authority:
        """Load what :meth:`create` made.

        Raises:
            ConfigError: something is missing or is no key.
        """
        try:
            certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
            keys = [_read_key(directory / f"{name}.key") for name in ("ca", "result")]
        except OSError as error:
            raise ConfigError(f"keys: {error.filename}: {error.strerror}; see `edgewarden controller init`") from error
        except (ValueError, x509.InvalidVersion) as error:
            raise ConfigError(f"keys: {directory}: {error}") from error
        if keys[0].public_key() != certificate.public_key():
            raise ConfigError(f"keys: {directory}: ca.key is not the key of ca.pem")
        return cls(directory, trust_domain, certificate, keys[0], keys[1])

    @property
    def ca_pem(self) -> str:
        """The CA's certificate."""
        return _pem(self.certificate)

    @property
    def server_files(self) -> tuple[Path, Path]:
        """Chain and key of the listener and the poller."""
        return self.directory / "server.pem", self.directory / "server.key"

    def server_spki_sha256(self) -> str:
        """Return what a join token pins."""
        certificate = x509.load_pem_x509_certificate((self.directory / "server.pem").read_bytes())
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ConfigError(f"keys: {self.directory}/server.pem: not an EC key")
        return spki_sha256(key)

    @property
    def result_kid(self) -> str:
        """Name of the key that signs results."""
        return spki_sha256(self.result_key.public_key())[:16]

    def jwks(self) -> str:
        """Return the keys that verify results (RFC 7517)."""
        key = json.loads(ECAlgorithm.to_jwk(self.result_key.public_key()))
        return json.dumps({"keys": [{**key, "kid": self.result_kid, "use": "sig", "alg": "ES256"}]})

    def spiffe(self, path: str) -> str:
        """Return a SPIFFE ID of this trust domain."""
        return f"spiffe://{self.trust_domain}/{path}"

    def issue(self, path: str, name: str, key: ec.EllipticCurvePublicKey, seconds: int) -> Issued:
        """Issue a certificate for a node or an admin.

        Args:
            path: of the SPIFFE ID.
            name: the subject's common name.
            key: to be certified.
            seconds: validity.
        """
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(self.spiffe(path))])
        certificate = self._leaf(subject, key, dt.timedelta(seconds=seconds), san)
        until_us = int(certificate.not_valid_after_utc.timestamp()) * 1_000_000
        return Issued(_pem(certificate), spki_sha256(key), until_us)

    def _server(self, key: ec.EllipticCurvePublicKey, names: Sequence[str]) -> str:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "controller")])
        general: list[x509.GeneralName] = [x509.UniformResourceIdentifier(self.spiffe("controller"))]
        for name in names:
            try:
                general.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                general.append(x509.DNSName(name))
        return _pem(self._leaf(subject, key, dt.timedelta(days=SERVER_DAYS), x509.SubjectAlternativeName(general)))

    def _leaf(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        validity: dt.timedelta,
        names: x509.SubjectAlternativeName,
    ) -> x509.Certificate:
        return (
            _builder(subject, self.certificate.subject, key, validity)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage("digital_signature"), critical=True)
            .add_extension(_EXTENDED, critical=False)
            .add_extension(names, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )


def request_key(csr: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key of a certificate request (PKCS #10, DER) that it has signed itself.

    Raises:
        VerificationError: ``csr``.
    """
    try:
        request = x509.load_der_x509_csr(csr)
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion) as error:
        raise VerificationError("csr", f"not a certificate request: {error}") from error
    if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise VerificationError("csr", "it is not signed by its own EC P-256 key")
    return key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, validity: dt.timedelta
) -> x509.CertificateBuilder:
    now = dt.datetime.fromtimestamp(int(clock.now()), dt.UTC)
    return begin_certificate(subject, issuer, key, now - BACKDATE, now + validity)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path.name}: not an EC key")  # noqa: TRY004 -- one kind of error for all that is wrong with it
    return key
