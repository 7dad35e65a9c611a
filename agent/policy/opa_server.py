"""The ``opa`` engine, the agent's side: one OPA server for each policy, supervised.

Rules:

1. It loads exactly the measured bytes: the sealed memory whose digest was taken, by its descriptor. No file is involved, neither
   for the bundle nor for key and certificate.
2. It listens on loopback with TLS 1.3, a key and a certificate made for it alone, and answers nobody without the token:
   queries of data and health, nothing that changes it.
3. It keeps no decision log, asks nobody for a new version, and leaves the signature to the template, which verifies the
   same bytes before anyone is answered.
4. When it dies it is started again, with backoff; until then its policy denies.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import json
import secrets
import socket
import ssl
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.certificate import begin_certificate
from agent.errors import IsolationError, PolicyError
from agent.isolation.memfd import SealedFile, seal_bytes
from agent.isolation.sandbox import Limits
from agent.isolation.supervisor import Keeper, ProcessHandle, ProgramSpec, Zygote
from agent.policy.build import archive
from agent.policy.template import AUTHZ_ROOT, LOOPBACK, OpaAccess

__all__ = ["OpaProgram", "OpaServer"]

_READY_TIMEOUT_S = 15.0
_READY_PAUSE_S = 0.05
_PROBE_TIMEOUT_S = 2.0
_TOKEN_BYTES = 32
_AUTHZ = """package system.authz
import rego.v1
default allow := false
allow if {{ input.identity == {token}; input.method == "POST"; array.slice(input.path, 0, 2) == ["v1", "data"] }}
allow if {{ input.identity == {token}; input.method == "GET"; input.path == ["health"] }}
"""
# The clock may be wrong before the network is there; the certificate lives as long as its server.
_NOT_BEFORE = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)
_NOT_AFTER = dt.datetime(2099, 1, 1, tzinfo=dt.UTC)


@dataclass(frozen=True, slots=True)
class OpaProgram:
    """Which OPA to run.

    Attributes:
        path: absolute, of the binary.
        limits: Go reserves much more address space than it uses.
    """

    path: str
    limits: Limits = field(default_factory=lambda: Limits(headroom_bytes=4 << 30, open_files=256))


class OpaServer:
    """A supervised OPA server. Get one by :meth:`start`; needs a running event loop.

    Attributes:
        access: how a worker reaches it.
    """

    def __init__(self, zygote: Zygote, program: OpaProgram, bundle: SealedFile) -> None:
        certificate, key = _certificate()
        token = secrets.token_hex(_TOKEN_BYTES)
        self.access = OpaAccess(_free_port(), token, certificate.decode())
        manifest = json.dumps({"revision": "agent", "roots": [AUTHZ_ROOT]}).encode()
        module = _AUTHZ.format(token=json.dumps(token)).encode()
        self._files = [
            seal_bytes("opa-certificate", certificate),
            seal_bytes("opa-key", key),
            seal_bytes("opa-authz", archive({".manifest": manifest, "authz.rego": module})),
        ]
        self._zygote = zygote
        self._program = program
        self._bundle = bundle
        self._process: ProcessHandle | None = None
        self._keeping: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, zygote: Zygote, program: OpaProgram, bundle: SealedFile) -> OpaServer:
        """Start a server on a bundle and wait until it answers.

        Args:
            zygote: starts the program.
            program: which.
            bundle: stays the caller's, and open as long as the server runs.

        Raises:
            PolicyError: OPA refuses the bundle (its words are on standard error), or is not ready in time.
            IsolationError: the program cannot be run.
        """
        server = cls(zygote, program, bundle)
        try:
            process = await server._spawn()
            await server._until_ready(process)
        except BaseException:
            server.close()
            raise
        server._keeping = asyncio.create_task(server._keep(process))
        return server

    def close(self) -> None:
        """End it."""
        if self._keeping is not None:
            self._keeping.cancel()
        if self._process is not None:
            self._process.kill()
        for file in self._files:
            file.close()
        self._files = []

    async def _keep(self, process: ProcessHandle) -> None:
        await process.wait()
        await Keeper("opa", self._spawn).run()

    async def _spawn(self) -> ProcessHandle:
        if not self._files:
            raise IsolationError("this OPA server is retired")
        certificate, key, authz = self._files
        argv = [self._program.path, "run", "--server", "--bundle", "{fd:bundle}", "{fd:authz}"]
        argv += ["--addr", f"{LOOPBACK}:{self.access.port}", "--min-tls-version", "1.3"]
        argv += ["--tls-cert-file", "{fd:certificate}", "--tls-private-key-file", "{fd:key}"]
        argv += ["--authentication", "token", "--authorization", "basic"]
        argv += [
            "--skip-version-check",
            "--skip-verify",
            "--log-level",
            "error",
            "--set",
            "decision_logs.console=false",
        ]
        fds = {"bundle": self._bundle.fd, "authz": authz.fd, "certificate": certificate.fd, "key": key.fd}
        self._process = await self._zygote.spawn_program(ProgramSpec(argv, self._program.limits, {}, fds))
        return self._process

    async def _until_ready(self, process: ProcessHandle) -> None:
        try:
            await asyncio.wait_for(self._healthy_once(process), _READY_TIMEOUT_S)
        except TimeoutError as error:
            raise PolicyError(f"OPA is not ready within {_READY_TIMEOUT_S:g} s") from error

    async def _healthy_once(self, process: ProcessHandle) -> None:
        while not await self._healthy(process):  # noqa: ASYNC110 -- a program of others, which announces nothing
            await asyncio.sleep(_READY_PAUSE_S)

    async def _healthy(self, process: ProcessHandle) -> bool:
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                return await self._probe()
        except (OSError, TimeoutError):
            _check_running(process)
            return False

    async def _probe(self) -> bool:
        context = ssl.create_default_context(cadata=self.access.certificate)
        reader, writer = await asyncio.open_connection(LOOPBACK, self.access.port, ssl=context)
        try:
            writer.write(f"GET /health HTTP/1.0\r\nAuthorization: Bearer {self.access.token}\r\n\r\n".encode())
            status = await reader.readline()
        finally:
            writer.transport.abort()
        return status.split(b" ")[1:2] == [b"200"]


def _check_running(process: ProcessHandle) -> None:
    if process.status is not None:
        raise PolicyError(f"OPA does not take the bundle ({process.status}); see its words in the journal")


def _free_port() -> int:
    """Return a port that is free now; should another take it first, TLS fails and so does the start."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port


def _certificate() -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edgewarden opa")])
    built = (
        begin_certificate(name, name, key.public_key(), _NOT_BEFORE, _NOT_AFTER)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return built.public_bytes(pem), secret
