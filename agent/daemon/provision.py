"""What the agent takes from its surroundings before it starts: sockets, key material, users.

Rules:

1. Listeners are bound before the zygote starts and listen only once there is something to serve.
2. Key files are read once, into sealed memory, and only if no one but their owner can write them and no stranger can read them.
3. Children never run as root: started as root, the agent gives them ``node.child_user``, else ``nobody``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pwd
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from agent import messages
from agent.audit.log import Space
from agent.config import ControlSettings, Settings, split_listen
from agent.daemon.tls import check_expiry, server_context
from agent.errors import ConfigError, HostError
from agent.identity.token import parse_jwks
from agent.inference.signing import TrustStore
from agent.isolation.memfd import SealedFile, seal_bytes
from agent.isolation.sandbox import Limits, Profile
from agent.isolation.supervisor import ChildSpec

__all__ = [
    "Listeners",
    "Material",
    "audit_space",
    "bind_listeners",
    "child_user",
    "gateway_spec",
    "lock_state",
    "make_directory",
    "read_material",
    "read_pem",
    "spki_sha256",
    "trust_store",
]

MAX_PEM_BYTES = 1 << 20
AUDIT_SEGMENTS = 8  # at least, in the budget
LARGEST_AUDIT_SEGMENT_BYTES = 16 << 20
GATEWAY_OPEN_FILES_BASE = 1024
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class Listeners:
    """Bound sockets; TCP ones do not listen yet."""

    inference: socket.socket
    control: socket.socket | None
    metrics: socket.socket | None
    keylime: socket.socket | None
    health_unix: socket.socket
    admin_unix: socket.socket

    def close(self) -> None:
        """Close all of them."""
        for sock in (self.inference, self.control, self.metrics, self.keylime, self.health_unix, self.admin_unix):
            if sock is not None:
                sock.close()


def make_directory(setting: str, path: Path) -> None:
    """Make a directory of the configuration's where it is missing.

    Raises:
        HostError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"{setting}: {path}: {error.strerror}") from error


def bind_listeners(settings: Settings) -> Listeners:
    """Bind everything that the configuration names.

    Raises:
        HostError: an address is taken or not ours.
    """
    runtime = Path(settings.node.runtime_dir)
    make_directory("node.runtime_dir", runtime)
    control = settings.control.listen if settings.control else None
    metrics = settings.metrics.listen
    keylime = settings.attest.keylime.listen if settings.attest.keylime.enabled else None
    with contextlib.ExitStack() as stack:
        bound = Listeners(
            stack.enter_context(_bind_tcp("inference.listen", settings.inference.listen)),
            stack.enter_context(_bind_tcp("control.listen", control)) if control else None,
            stack.enter_context(_bind_tcp("metrics.listen", metrics)) if metrics else None,
            stack.enter_context(_bind_tcp("attest.keylime.listen", keylime)) if keylime else None,
            stack.enter_context(_bind_unix(runtime / "health.sock", 0o666)),
            stack.enter_context(_bind_unix(runtime / "admin.sock", 0o660)),
        )
        stack.pop_all()
    return bound


def _bind_tcp(name: str, listen: str) -> socket.socket:
    host, port = split_listen(listen)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise HostError(f"{name}: {listen}: {error.strerror}") from error
    return sock


def _bind_unix(path: Path, mode: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The state directory's lock is held: a socket that lies there belongs to a process that is gone.
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        sock.bind(str(path))
        path.chmod(mode)
    except OSError as error:
        sock.close()
        raise HostError(f"{path}: {error.strerror or error}") from error
    return sock


def audit_space(budget_bytes: int) -> Space:
    """Divide the audit log's disk space; a small budget has small segments, so that history goes in small steps."""
    segment_bytes = min(LARGEST_AUDIT_SEGMENT_BYTES, budget_bytes // AUDIT_SEGMENTS)
    return Space(segment_bytes=segment_bytes, budget_bytes=budget_bytes)


def lock_state(directory: Path) -> int:
    """Create the state directory and take its lock; returns the descriptor that holds it.

    Raises:
        HostError: another agent has it, or it can't be made.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"state directory {directory}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise HostError(f"state directory {directory}: another agent is running on it") from error
    return fd


def read_pem(setting: str, path: str, *, secret: bool = False) -> bytes:
    """Read a PEM file.

    Raises:
        ConfigError: it can't be read, is too large, or its mode lets others write it (or, a secret, read it).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_PEM_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{setting}: {path}: {error.strerror}") from error
    if mode & _OTHERS_WRITE or (secret and mode & stat.S_IRWXO):
        raise ConfigError(
            f"{setting}: {path}: mode {stat.S_IMODE(mode):o} is too open; try chmod {600 if secret else 644}"
        )
    if len(data) > MAX_PEM_BYTES:
        raise ConfigError(f"{setting}: {path}: larger than {MAX_PEM_BYTES} bytes")
    return data


def trust_store(settings: Settings) -> TrustStore:
    """Read the keys and roots that sign models."""
    models = settings.models
    documents = [read_pem("models.trusted_keys", path) for path in models.trusted_keys]
    documents += [read_pem("models.trusted_roots", path) for path in models.trusted_roots]
    return TrustStore.from_pem(*documents)


def spki_sha256(setting: str, certificate: bytes) -> str:
    """Return the hex SHA-256 of a certificate's SubjectPublicKeyInfo."""
    try:
        key = x509.load_pem_x509_certificate(certificate).public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise ConfigError(f"{setting}: not a PEM certificate ({error})") from error
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


@dataclass(frozen=True, slots=True)
class Material:
    """Every file of the configuration that is read once, at the start.

    Attributes:
        policy_keys: PEM keys that sign policies; empty where no signature is demanded.
        model_trust: whose packages count.
        gateway: how a gateway is started.
        sealed: what ``gateway`` refers to; stays open as long as gateways are started.
        inference_spki_sha256: digest of the inference certificate's key.
        inference_until: when that certificate ends.
        control: TLS of the control listener and the digest of its key, where the configuration names them.
    """

    policy_keys: tuple[bytes, ...]
    model_trust: TrustStore
    gateway: ChildSpec
    sealed: tuple[SealedFile, ...]
    inference_spki_sha256: str
    inference_until: str
    control: tuple[ssl.SSLContext, str] | None

    def close(self) -> None:
        """Close the sealed files."""
        for file in self.sealed:
            file.close()


def read_material(settings: Settings, listener: socket.socket) -> Material:
    """Read all of it, before anything is measured for a start that can't succeed.

    Raises:
        ConfigError: a file can't be read, is too open, or is not what it should be.
    """
    policy = settings.policy
    keys = [read_pem("policy.trusted_keys", path) for path in policy.trusted_keys] if policy.require_signature else []
    trust = trust_store(settings)
    certificate = read_pem("inference.certificate", settings.inference.certificate)
    control = _control_tls(settings.control) if settings.control else None
    spki = spki_sha256("inference.certificate", certificate)
    until = check_expiry("inference.certificate", certificate)
    spec, sealed = gateway_spec(settings, listener)
    return Material(tuple(keys), trust, spec, tuple(sealed), spki, until, control)


def _control_tls(control: ControlSettings) -> tuple[ssl.SSLContext, str] | None:
    if control.certificate is None or control.key is None or control.client_ca is None:
        return None  # all of them: the configuration was checked
    certificate = read_pem("control.certificate", control.certificate)
    key = read_pem("control.key", control.key, secret=True)
    context = server_context("control", certificate, key, read_pem("control.client_ca", control.client_ca))
    check_expiry("control.certificate", certificate)
    return context, spki_sha256("control.certificate", certificate)


def child_user(settings: Settings) -> tuple[int, int] | None:
    """Return uid and gid that children take, where the agent runs as root.

    Raises:
        ConfigError: no such user, or it is root.
    """
    if os.geteuid() != 0:
        return None
    name = settings.node.child_user or "nobody"
    try:
        entry = pwd.getpwnam(name)
    except KeyError as error:
        raise ConfigError(f"node.child_user: there is no user {name!r}") from error
    if entry.pw_uid == 0:
        raise ConfigError("node.child_user: children must not run as root")
    return entry.pw_uid, entry.pw_gid


def gateway_spec(settings: Settings, listener: socket.socket) -> tuple[ChildSpec, list[SealedFile]]:
    """Describe the gateway; the sealed files must stay open as long as gateways are started.

    Raises:
        ConfigError: key material can't be read, or is of no use.
    """
    inference = settings.inference
    material = {
        "certificate": read_pem("inference.certificate", inference.certificate),
        "key": read_pem("inference.key", inference.key, secret=True),
        "client_ca": read_pem("inference.client_ca", inference.client_ca),
    }
    # The gateway does this again; here it is an error that an operator sees, there it would be a crash loop.
    server_context("inference", material["certificate"], material["key"], material["client_ca"])
    tokens = None
    if inference.tokens:
        material["jwks"] = read_pem("inference.tokens.jwks", inference.tokens.jwks)
        try:
            parse_jwks(material["jwks"])
        except ConfigError as error:
            raise ConfigError(f"inference.tokens.jwks: {inference.tokens.jwks}: {error}") from error
        tokens = messages.TokenRules(inference.tokens.audience, inference.tokens.issuer, inference.tokens.roles_claim)
    sealed = {name: seal_bytes(name, data) for name, data in material.items()}
    start = messages.GatewayStart(
        node=settings.node.id,
        tokens=tokens,
        strict_audit=settings.audit.durability == "strict",
        threads=inference.threads,
        max_body_bytes=inference.max_body_bytes,
        max_inflight_bytes=inference.max_inflight_bytes,
        header_timeout_ms=inference.header_timeout_ms,
        body_timeout_ms=inference.body_timeout_ms,
        idle_timeout_ms=inference.idle_timeout_ms,
        max_connections=inference.max_connections,
        max_connections_per_source=inference.max_connections_per_source,
        max_concurrent=inference.max_concurrent,
        evaluation_deadline_ms=settings.policy.evaluation_deadline_ms,
        total_deadline_ms=settings.policy.total_deadline_ms,
        remember_decisions=settings.policy.remember_decisions,
    )
    spec = ChildSpec(
        profile=Profile.GATEWAY,
        entry="agent.gateway.entry:main",
        limits=Limits(inference.memory_bytes, GATEWAY_OPEN_FILES_BASE + inference.max_connections),
        args=msgspec.to_builtins(start),
        fds={"listener": listener.fileno(), **{name: file.fd for name, file in sealed.items()}},
    )
    return spec, list(sealed.values())
