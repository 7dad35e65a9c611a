"""A small controller for tests: the real protocol over real TLS, real credentials, a real appraisal; and the ways in which one may lie.

It runs on a thread of its own. It holds one node at a time and appraises with Reference Values that approve what the node shows first.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import json
import secrets
import socket
import ssl
import tempfile
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from tpm2_pytss import TPM2B_NAME, TPM2B_PUBLIC, TPMT_PUBLIC
from tpm2_pytss.utils import make_credential

from agent import clock
from agent.attest.enrolment import (
    CHALLENGE_PATH,
    ENROL_PATH,
    EVIDENCE_PATH,
    RESULT_PATH,
    Challenge,
    ChallengeRequest,
    EnrolChallenge,
    EnrolGrant,
    EnrolProof,
    EnrolRequest,
    JoinToken,
    PushAnswer,
    PushedEvidence,
    read_message,
)
from agent.attest.evidence import MAX_EVIDENCE_BYTES, Evidence, extra_data
from agent.attest.result import AttestationResult
from agent.attest.structures import parse_ak_public, parse_quote, parse_signature

TRUST_DOMAIN = "fleet.example"
MAX_REQUEST_BYTES = MAX_EVIDENCE_BYTES + 65536
Handler = Callable[[web.Request], Awaitable[web.Response]]


def spki(key: ec.EllipticCurvePublicKey) -> str:
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def private_key(data: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(data, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def jwks(key: ec.EllipticCurvePrivateKey) -> str:
    """Return the JWKS that holds this key's public part as ``k1``."""
    numbers = key.public_key().public_numbers()
    coordinates = {
        name: base64.urlsafe_b64encode(value.to_bytes(32)).rstrip(b"=").decode()
        for name, value in (("x", numbers.x), ("y", numbers.y))
    }
    return json.dumps({"keys": [{"kty": "EC", "crv": "P-256", "kid": "k1", "use": "sig", **coordinates}]})


class Ca:
    """Issues what the controller and its nodes show."""

    def __init__(self, name: str = "Fleet CA") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(self.name, self.key.public_key(), -3600, 365 * 86400).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self.root = builder.sign(self.key, hashes.SHA256())

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, begin_s: float, end_s: float
    ) -> x509.CertificateBuilder:
        now = dt.datetime.fromtimestamp(clock.now(), dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + dt.timedelta(seconds=begin_s))
            .not_valid_after(now + dt.timedelta(seconds=end_s))
        )

    def issue(
        self, key: ec.EllipticCurvePublicKey, spiffe: str, *, begin_s: float = -3600, end_s: float = 86400
    ) -> x509.Certificate:
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(spiffe)]
        if spiffe.endswith("/controller"):
            names.append(x509.DNSName("localhost"))
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, spiffe.rpartition("/")[2])])
        return (
            self._builder(subject, key, begin_s, end_s)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )


@dataclass
class Member:
    """The enrolled node, as the controller knows it."""

    request: EnrolRequest
    secret: bytes
    nonce: str
    control_spki: str = ""
    results: list[str] = field(default_factory=list)


class FakeController:
    """``with FakeController() as controller: ... controller.token()``.

    Attributes:
        status, withdrawn: of the next results.
        received: path and body of every request, and whether a client certificate was shown.
        answers: path prefix to a handler that answers in the place of the real one.
        node_begin_s, node_end_s: period of the next node certificate, from now.
    """

    def __init__(self) -> None:
        self.ca = Ca()
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.signing_key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self.ca.issue(self.key.public_key(), f"spiffe://{TRUST_DOMAIN}/controller")
        self.status: Any = "affirming"
        self.withdrawn: frozenset[str] = frozenset()
        self.interval_s = 1
        self.received: list[tuple[str, bytes, bool]] = []
        self.connections = 0
        self.answers: dict[str, Handler] = {}
        self.node_begin_s: float = -60
        self.node_end_s: float = 86400
        self.credential_for: bytes | None = None  # another attestation key
        self.member: Member | None = None
        self.issued_at: Callable[[], int] = lambda: int(clock.now())
        self._secrets: dict[str, bytes] = {}
        self._nonces: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="controller")
        self._runner: web.AppRunner | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def start(self) -> None:
        """Listen; on the same port as before."""
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def stop(self) -> None:
        """Listen no more."""
        if self._runner is not None:
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
            self._runner = None

    async def _start(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=pem(self.ca.root))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "both.pem"
            path.write_bytes(pem(self.certificate).encode() + key_pem(self.key))
            context.load_cert_chain(path)
        application = web.Application(client_max_size=MAX_REQUEST_BYTES)
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=context)
        await site.start()
        server: Any = site._server
        self.port = server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def token(self, **changes: Any) -> str:
        """Make a join token."""
        secret = secrets.token_bytes(32)
        fields = {
            "url": self.url,
            "spki_sha256": spki(self.key.public_key()),
            "id": secrets.token_hex(8),
            "secret": secret,
        }
        token = JoinToken(**{**fields, **changes})
        self._secrets[token.id] = secret
        return token.text()

    # --- what it answers

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        tls = request.transport.get_extra_info("ssl_object") if request.transport else None
        self.received.append((request.path, body, bool(tls and tls.getpeercert(True))))
        for prefix, handler in self.answers.items():
            if request.path.startswith(prefix):
                return await handler(request)
        try:
            answer = self._route(request.path, body)
        except PermissionError as error:
            return web.json_response({"error": str(error)}, status=403)
        return web.Response(body=answer.encode(), content_type="application/json")

    def _route(self, path: str, body: bytes) -> Any:
        if path == ENROL_PATH:
            return self._enrol(read_message(body, EnrolRequest, MAX_REQUEST_BYTES))
        if path.startswith(ENROL_PATH + "/"):
            return self._prove(read_message(body, EnrolProof, MAX_REQUEST_BYTES))
        if path == CHALLENGE_PATH:
            return self._challenge(read_message(body, ChallengeRequest, 4096))
        if path == EVIDENCE_PATH:
            return self._pushed(read_message(body, PushedEvidence, MAX_REQUEST_BYTES))
        raise PermissionError("no such call")

    def _enrol(self, request: EnrolRequest) -> EnrolChallenge:
        if self._secrets.pop(request.token, None) != request.secret:
            raise PermissionError("the join token is not known, or was used")
        if request.ek_certificate is not None:
            shown = x509.load_der_x509_certificate(request.ek_certificate).public_key()
            assert shown == TPMT_PUBLIC_key(request.ek_public), "the certificate is for the key that was sent"
        secret = secrets.token_bytes(32)
        ak = parse_ak_public(self.credential_for or request.ak_public)
        ek, _ = TPMT_PUBLIC.unmarshal(request.ek_public)
        blob, encrypted = make_credential(TPM2B_PUBLIC(publicArea=ek), secret, TPM2B_NAME(ak.name))
        self.member = Member(request, secret, secrets.token_hex(32))
        return EnrolChallenge(
            enrolment=secrets.token_hex(16),
            credential_blob=blob.marshal(),
            encrypted_secret=encrypted.marshal(),
            nonce=self.member.nonce,
            expires_s=60,
        )

    def _prove(self, proof: EnrolProof) -> EnrolGrant:
        member = self._known()
        if proof.secret != member.secret:
            raise PermissionError("the credential was not opened")
        self._verify(proof.evidence, member.nonce)
        assert isinstance(proof.evidence.claims.control_spki_sha256, str)
        member.control_spki = proof.evidence.claims.control_spki_sha256
        return EnrolGrant(
            node=member.request.node,
            certificate=self._certify(proof.csr),
            ca=pem(self.ca.root),
            jwks=jwks(self.signing_key),
            trust_domain=TRUST_DOMAIN,
            interval_s=self.interval_s,
            result=self.result(member.nonce),
        )

    def _challenge(self, request: ChallengeRequest) -> Challenge:
        if self._known().request.node != request.node:
            raise PermissionError("no such node")
        nonce = secrets.token_hex(32)
        self._nonces.add(nonce)
        return Challenge(nonce=nonce, start=0)

    def _pushed(self, pushed: PushedEvidence) -> PushAnswer:
        member = self._known()
        if pushed.nonce not in self._nonces:
            raise PermissionError("no such challenge")
        self._nonces.discard(pushed.nonce)
        self._verify(pushed.evidence, pushed.nonce)
        if pushed.evidence.claims.control_spki_sha256 != member.control_spki:
            raise PermissionError("another control key")
        certificate = self._certify(pushed.csr) if pushed.csr is not None else None
        return PushAnswer(result=self.result(pushed.nonce), interval_s=self.interval_s, certificate=certificate)

    def _known(self) -> Member:
        if self.member is None:
            raise PermissionError("no such node")
        return self.member

    def _verify(self, evidence: Evidence, nonce: str) -> None:
        ak = parse_ak_public(self._known().request.ak_public)
        quote = parse_quote(evidence.attest)
        ak.verify(parse_signature(evidence.signature), evidence.attest)
        if quote.extra_data != extra_data(bytes.fromhex(nonce), evidence.claims):
            raise PermissionError("the Evidence is not over this nonce")

    def _certify(self, request: bytes) -> str:
        csr = x509.load_der_x509_csr(request)
        key = csr.public_key()
        member = self._known()
        assert csr.is_signature_valid
        assert isinstance(key, ec.EllipticCurvePublicKey)
        if spki(key) != member.control_spki:
            raise PermissionError("the request is not for the attested key")
        name = f"spiffe://{TRUST_DOMAIN}/node/{member.request.node}"
        return pem(self.ca.issue(key, name, begin_s=self.node_begin_s, end_s=self.node_end_s))

    def result(self, nonce: str, **changes: Any) -> str:
        """Make an Attestation Result about the node."""
        key = changes.pop("key", self.signing_key)
        fields: dict[str, Any] = {
            "node": self._known().request.node,
            "status": self.status,
            "issued_at": self.issued_at(),
            "nonce": nonce,
            "vector": {},
            "policy_id": "p1",
            "build": "fake",
            "interval_s": self.interval_s,
            "withdrawn": self.withdrawn,
        }
        jwt = AttestationResult(**{**fields, **changes}).sign(key, "k1")
        self._known().results.append(jwt)
        return jwt

    # --- what it asks, in mode pull

    def client(self, *, spiffe: str = f"spiffe://{TRUST_DOMAIN}/controller") -> ssl.SSLContext:
        """Return TLS that shows a certificate of the CA."""
        key = ec.generate_private_key(ec.SECP256R1())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "both.pem"
            path.write_bytes(pem(self.ca.issue(key.public_key(), spiffe)).encode() + key_pem(key))
            context.load_cert_chain(path)
        return context

    def ask(
        self, method: str, path: str, body: bytes | None = None, context: ssl.SSLContext | None = None
    ) -> tuple[int, bytes]:
        """Call the node's control listener."""
        work = self._ask(method, path, body, context or self.client())
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _ask(self, method: str, path: str, body: bytes | None, context: ssl.SSLContext) -> tuple[int, bytes]:
        member = self._known()
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"https://{member.request.address}{path}", data=body, ssl=context) as response,
        ):
            return response.status, await response.read()

    def listener_spki(self) -> str:
        """Return the digest of the key that the node's control listener shows."""
        host, _, port = str(self._known().request.address).rpartition(":")
        with (
            socket.create_connection((host, int(port)), 10) as plain,
            self.client().wrap_socket(plain) as tls,
        ):
            key = x509.load_der_x509_certificate(tls.getpeercert(True) or b"").public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return spki(key)

    def poll(self, **changes: Any) -> tuple[int, bytes]:
        """Get Evidence from the node, appraise it and leave the result; returns what the node said to that."""
        nonce = secrets.token_hex(32)
        code, body = self.ask("GET", f"/attestation/v1/evidence?nonce={nonce}")
        assert code == 200, body
        self._verify(Evidence.decode(body), nonce)
        return self.ask("PUT", RESULT_PATH, self.result(changes.pop("nonce", nonce), **changes).encode())


def TPMT_PUBLIC_key(public: bytes) -> Any:  # noqa: N802 -- named as what it reads
    """Return the public key of a TPMT_PUBLIC."""
    area, _ = TPMT_PUBLIC.unmarshal(public)
    return serialization.load_der_public_key(area.to_der())


__all__ = ["TRUST_DOMAIN", "Ca", "FakeController", "Member", "jwks", "key_pem", "pem", "private_key", "spki"]
