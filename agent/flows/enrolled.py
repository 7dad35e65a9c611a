"""What a node keeps of its enrolment, below ``<state_dir>/controller/``.

Rules:

1. ``key.pem`` (0600) is on the disk before anyone hears of the key. ``enrolment.json`` comes last and goes first: where it is, the node is
   enrolled, and everything else is there; a crash leaves one or the other.
2. Each file is whole on the disk before it takes its name.
3. What is read back is checked as when it came: a key that nobody else could read, a certificate for this key, keys of the controller. An
   enrolment that can't be read is an error and not "not enrolled": that would be trusted more. The error says how to get out of it.
4. Dates stop no start: the certificate renews itself, and a CA that has ended shows as a controller that can't be reached.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from agent.attest.enrolment import NodeId
from agent.attest.result import MAX_RESULT_BYTES, MAX_TIME_S
from agent.errors import ConfigError, HostError, VerificationError
from agent.flows.controller import ca_context, controller_origin, key_sha256
from agent.identity.token import parse_jwks

__all__ = ["Enrolment", "EnrolmentStore", "Identity", "Mode", "csr_for", "new_key", "public_spki_sha256"]

Mode = Literal["pull", "push"]
MAX_FILE_BYTES: Final = 1 << 20
ADVICE: Final = "stop the agent, `edgewarden attest leave --offline`, and enrol again"
_CHECK = "enrolment"
_NO_CERTIFICATE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_RECORD, _KEY, _CERTIFICATE, _CA, _RESULT = "enrolment.json", "key.pem", "certificate.pem", "ca.pem", "result.jwt"


class Enrolment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the node is enrolled.

    Attributes:
        url: of the controller.
        mode: who begins an appraisal; ``address`` is where the controller reaches the node, when it begins.
        trust_domain: of the SPIFFE IDs.
        interval_s: between two appraisals, as the grant said.
        jwks: keys that sign Attestation Results.
        since: seconds since the Unix epoch.
    """

    version: Literal[1] = 1
    url: str
    node: NodeId
    mode: Mode
    address: str | None = None
    trust_domain: Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9._-]{1,255}\Z")]
    interval_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)]
    jwks: str
    since: Annotated[int, msgspec.Meta(ge=0, le=MAX_TIME_S)]


@dataclass(frozen=True, slots=True)
class Identity:
    """An enrolled node: its key, its certificate and whom it believes. Made by :meth:`build`, which checks it.

    Attributes:
        key, certificate, ca: PEM.
        keys: of the controller, by ``kid``.
        spki_sha256: digest of the key's SubjectPublicKeyInfo.
        valid_from, valid_until: of the certificate, in seconds since the epoch.
        ca_until: when the last of the controller's CA certificates ends, in the same.
    """

    enrolment: Enrolment
    key: bytes = field(repr=False)
    certificate: bytes
    ca: bytes
    keys: Mapping[str, ec.EllipticCurvePublicKey]
    spki_sha256: str
    valid_from: float
    valid_until: float
    ca_until: float

    @property
    def controller_id(self) -> str:
        """SPIFFE ID of the controller."""
        return f"spiffe://{self.enrolment.trust_domain}/controller"

    @property
    def renew_at(self) -> float:
        """Half of the certificate's life, in seconds since the epoch."""
        return (self.valid_from + self.valid_until) / 2

    @classmethod
    def build(cls, enrolment: Enrolment, key: bytes, certificate: bytes, ca: bytes) -> Identity:
        """Check what belongs together.

        Raises:
            VerificationError: ``enrolment``.
        """
        # 1. The certificate is for this key and names this node.
        try:
            leaf = x509.load_pem_x509_certificates(certificate)[0]
            digest = key_sha256(leaf.public_key())
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        except _NO_CERTIFICATE as error:
            raise VerificationError(_CHECK, f"the node's certificate: {error}") from error
        if uris != [f"spiffe://{enrolment.trust_domain}/node/{enrolment.node}"]:
            raise VerificationError(_CHECK, "the certificate is not for this node")
        # 2. The key is the certificate's, the CA's certificates are some, and TLS takes them all.
        if public_spki_sha256(key) != digest:
            raise VerificationError(_CHECK, "the node's key is not the one in its certificate")
        try:
            ca_until = max(root.not_valid_after_utc.timestamp() for root in x509.load_pem_x509_certificates(ca))
        except _NO_CERTIFICATE as error:
            raise VerificationError(_CHECK, f"the controller's CA: {error}") from error
        ca_context(ca, certificate, key)
        # 3. The controller's keys.
        try:
            keys = parse_jwks(enrolment.jwks.encode())
        except ConfigError as error:
            raise VerificationError(_CHECK, f"the controller's keys: {error}") from error
        valid = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
        return cls(enrolment, key, certificate, ca, keys, digest, *valid, ca_until)

    def renewed(self, certificate: bytes) -> Identity:
        """Return it with a new certificate for the same key.

        Raises:
            VerificationError: ``enrolment``.
        """
        return self.build(self.enrolment, self.key, certificate, self.ca)

    def csr(self) -> bytes:
        """Return a certificate request for the key (PKCS #10, DER)."""
        return csr_for(self.key, self.enrolment.node)


def new_key() -> bytes:
    """Make a key for the node's control side (EC P-256, PEM)."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_spki_sha256(key: bytes) -> str:
    """Return the hex SHA-256 of a private key's SubjectPublicKeyInfo."""
    return key_sha256(_private(key).public_key())


def _private(key: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        raise VerificationError(_CHECK, "the node's key can't be read") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise VerificationError(_CHECK, "the node's key is no EC key")
    return private


def csr_for(key: bytes, node: str) -> bytes:
    """Return a certificate request (PKCS #10, DER).

    Raises:
        VerificationError: ``enrolment``: it is no EC key.
    """
    private = _private(key)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(private, hashes.SHA256())
    return request.public_bytes(Encoding.DER)


class EnrolmentStore:
    """The directory. Blocking: to be used off the event loop.

    Args:
        directory: made where it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, node: str) -> Identity | None:
        """Return the enrolment; None where there is none.

        Raises:
            HostError: it can't be read.
            VerificationError: ``enrolment``: it is damaged, or another node's.
        """
        try:
            return self._load(node)
        except VerificationError as error:
            raise VerificationError(_CHECK, f"{self._directory}: {error.message}: {ADVICE}") from error

    def _load(self, node: str) -> Identity | None:
        record = self._read(_RECORD)
        if record is None:
            return None
        try:
            enrolment = msgspec.json.decode(record, type=Enrolment)
        except ValueError as error:
            raise VerificationError(_CHECK, f"{_RECORD} is damaged: {error}") from error
        controller_origin(enrolment.url)
        if enrolment.node != node:
            raise VerificationError(_CHECK, f"it is that of {enrolment.node!r}, and node.id is {node!r} now")
        parts = {name: self._read(name) for name in (_KEY, _CERTIFICATE, _CA)}
        if missing := [name for name, part in parts.items() if part is None]:
            raise VerificationError(_CHECK, f"{', '.join(missing)}: missing")
        key, certificate, ca = (part or b"" for part in parts.values())
        return Identity.build(enrolment, key, certificate, ca)

    def save_key(self, key: bytes) -> None:
        """Keep a key that nobody knows of yet.

        Raises:
            HostError: the directory can't be written.
        """
        self._write(_KEY, key)

    def save(self, identity: Identity, result: str) -> None:
        """Make the node enrolled; its key was kept before.

        Raises:
            HostError: the directory can't be written; the node is not enrolled.
        """
        self._write(_CERTIFICATE, identity.certificate)
        self._write(_CA, identity.ca)
        self._write(_RESULT, result.encode())
        self._write(_RECORD, msgspec.json.encode(identity.enrolment))

    def save_certificate(self, certificate: bytes) -> None:
        """Exchange the certificate.

        Raises:
            HostError: the directory can't be written; the old one stays.
        """
        self._write(_CERTIFICATE, certificate)

    def save_result(self, result: str) -> None:
        """Keep an Attestation Result in the last one's place.

        Raises:
            HostError: the directory can't be written; the last one stays.
        """
        self._write(_RESULT, result.encode())

    def result(self) -> str | None:
        """Return the last Attestation Result; None where there is none that could be one.

        Raises:
            HostError: it can't be read.
        """
        data = self._read(_RESULT)
        try:
            return None if data is None or len(data) > MAX_RESULT_BYTES else data.decode("ascii")
        except UnicodeDecodeError:
            return None

    def forget(self) -> None:
        """Make the node not enrolled.

        Raises:
            HostError: the directory can't be written.
        """
        for name in (_RECORD, _RESULT, _CERTIFICATE, _CA, _KEY):
            try:
                for path in (self._directory / name, self._fresh(name)):
                    path.unlink(missing_ok=True)
                self._sync()
            except OSError as error:
                raise self._failure(name, error) from error

    def _read(self, name: str) -> bytes | None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe in a file's place is not waited for
        try:
            fd = os.open(self._directory / name, flags)
            try:
                mode = os.fstat(fd).st_mode
                data = os.read(fd, MAX_FILE_BYTES + 1) if stat.S_ISREG(mode) else b""
            finally:
                os.close(fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:  # a symbolic link, which is not followed
                raise VerificationError(_CHECK, f"{name} is no file") from error
            raise self._failure(name, error) from error
        if not stat.S_ISREG(mode):
            raise VerificationError(_CHECK, f"{name} is no file")
        if name == _KEY and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise VerificationError(_CHECK, f"{name}: mode {stat.S_IMODE(mode):o}: others may have read the key")
        if len(data) > MAX_FILE_BYTES:
            raise VerificationError(_CHECK, f"{name} is larger than {MAX_FILE_BYTES} bytes")
        return data

    def _write(self, name: str, data: bytes) -> None:
        fresh = self._fresh(name)
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh.unlink(missing_ok=True)  # what a crash left might be open to others
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(fresh, flags, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._directory / name)
            self._sync()
        except OSError as error:
            raise self._failure(name, error) from error

    def _fresh(self, name: str) -> Path:
        return self._directory / f"{name}.new"

    def _sync(self) -> None:
        if not self._directory.is_dir():
            return
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _failure(self, name: str, error: OSError) -> HostError:
        return HostError(f"{self._directory / name}: {error.strerror}")
