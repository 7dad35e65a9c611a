"""A node without a machine: real structures, real keys, the real protocol; the TPM's part done in software, which a real TPM's vendor would not certify.

For the controller's tests and for fleets. What needs a TPM to be true is tested with one.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import hmac
import socket
import ssl
import struct
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode
from cryptography.x509.oid import NameOID

from agent.attest.enrolment import EnrolChallenge, EnrolProof, EnrolRequest, JoinToken, PushedEvidence
from agent.attest.measurement import Entry, boot_aggregate
from agent.attest.structures import parse_ak_public
from tests.support.attest import BOOT_PCRS, ENTRIES, Attester

__all__ = ["SoftwareNode", "Vendor"]

_EK_POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
_EK_HEAD = (
    struct.pack(">HHIH", 0x0023, 0x000B, 0x000300B2, 32)
    + _EK_POLICY
    + struct.pack(">HHHHHH", 6, 128, 0x43, 0x10, 3, 0x10)
)
_EK_USE = x509.ObjectIdentifier("2.23.133.8.1")
_START = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
_END = dt.datetime(2090, 1, 1, tzinfo=dt.UTC)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclass
class Vendor:
    """A maker of TPMs: one CA."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    name: str = "TPM vendor"

    def certificate(self) -> x509.Certificate:
        return self._build(_name(self.name), self.key.public_key(), ca=True).sign(self.key, hashes.SHA256())

    def pem(self) -> bytes:
        return self.certificate().public_bytes(serialization.Encoding.PEM)

    def endorse(
        self,
        key: ec.EllipticCurvePublicKey,
        *,
        ca: bool = False,
        use: x509.ObjectIdentifier = _EK_USE,
        end: dt.datetime = _END,
    ) -> bytes:
        builder = self._build(_name("TPM"), key, ca=ca, end=end)
        certificate = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False).sign(
            self.key, hashes.SHA256()
        )
        return certificate.public_bytes(serialization.Encoding.DER)

    def _build(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, ca: bool, end: dt.datetime = _END
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(_name(self.name))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_START)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@dataclass
class SoftwareNode:
    """One node; ``entries`` is its measurement log."""

    id: str = "edge-1"
    vendor: Vendor = field(default_factory=Vendor)
    ek: ec.EllipticCurvePrivateKey = field(default_factory=_new_key)
    attester: Attester = field(default_factory=lambda: Attester(key=_new_key()))
    control: ec.EllipticCurvePrivateKey = field(default_factory=_new_key)
    entries: list[Entry] = field(default_factory=lambda: list(ENTRIES))
    policy: str | None = None
    boot: dict[int, bytes] = field(default_factory=lambda: dict(BOOT_PCRS))
    results: list[str] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    grant: dict[str, Any] = field(default_factory=dict)
    port: int = 0

    # --- its keys

    @property
    def ek_public(self) -> bytes:
        point = self.ek.public_key().public_numbers()
        return _EK_HEAD + b"\0\x20" + point.x.to_bytes(32) + b"\0\x20" + point.y.to_bytes(32)

    @property
    def spki_sha256(self) -> str:
        der = self.control.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return hashlib.sha256(der).hexdigest()

    def csr(self, key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(_name(self.id))
            .sign(key or self.control, hashes.SHA256())
        )
        return request.public_bytes(serialization.Encoding.DER)

    def activate(self, blob: bytes, encrypted: bytes) -> bytes:
        """ActivateCredential, as a TPM does it with an ECC endorsement key."""
        (size,) = struct.unpack_from(">H", encrypted)
        inner = encrypted[2:]
        assert size == len(inner)
        x, y = int.from_bytes(inner[2:34]), int.from_bytes(inner[36:68])
        point = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
        mine = self.ek.public_key().public_numbers().x.to_bytes(32)
        info = b"IDENTITY\0" + x.to_bytes(32) + mine
        seed = ConcatKDFHash(hashes.SHA256(), 32, info).derive(self.ek.exchange(ec.ECDH(), point))
        name = parse_ak_public(self.attester.ak_public).name
        outer, identity = blob[4:36], blob[36:]
        expected = hmac.digest(_kdf_a(seed, b"INTEGRITY", b"", 32), identity + name, hashlib.sha256)
        assert hmac.compare_digest(outer, expected), "made for another key"
        cipher = Cipher(algorithms.AES(_kdf_a(seed, b"STORAGE", name, 16)), CFB(bytes(16))).decryptor()
        return (cipher.update(identity) + cipher.finalize())[2:]

    # --- its Evidence

    def evidence(self, nonce: bytes, start: int = 0, **claims: Any) -> Any:
        fields = {"node": self.id, "control_spki_sha256": self.spki_sha256, **claims}
        if self.policy is not None:
            fields["policy_sha256"] = self.policy
        return self.attester.evidence(self.entries, start=start, nonce=nonce, pcrs=self.boot, **fields)

    def reboot(self, **changes: bytes) -> None:
        """Boot anew: PCRs as ``pcr7=...`` says, the others as before, the log from its beginning."""
        self.boot |= {int(name.removeprefix("pcr")): value for name, value in changes.items()}
        self.entries[0] = boot_aggregate(self.boot[index] for index in range(10))
        clock = self.attester.clock
        self.attester.clock = replace(clock, clock=clock.clock + 1000, reset_count=clock.reset_count + 1)

    # --- its calls

    def request(self, token: JoinToken, **changes: Any) -> EnrolRequest:
        fields: dict[str, Any] = {
            "token": token.id,
            "secret": token.secret,
            "node": self.id,
            "mode": "pull",
            "address": f"127.0.0.1:{self.port}",
            "ek_certificate": self.vendor.endorse(self.ek.public_key()),
            "ek_public": self.ek_public,
            "ak_public": self.attester.ak_public,
        }
        return EnrolRequest(**fields | changes)

    def proof(self, challenge: EnrolChallenge) -> EnrolProof:
        secret = self.activate(challenge.credential_blob, challenge.encrypted_secret)
        return EnrolProof(secret=secret, csr=self.csr(), evidence=self.evidence(bytes.fromhex(challenge.nonce)))

    async def enrol(self, session: aiohttp.ClientSession, url: str, token: JoinToken, **changes: Any) -> dict[str, Any]:
        """Both calls; returns the grant as JSON."""
        async with session.post(f"{url}/node/v1/enrol", data=self.request(token, **changes).encode()) as answer:
            assert answer.status == 200, await answer.text()
            challenge = EnrolChallenge(**_bytes(await answer.json()))
        proof = self.proof(challenge).encode()
        async with session.post(f"{url}/node/v1/enrol/{challenge.enrolment}", data=proof) as answer:
            assert answer.status == 200, await answer.text()
            self.grant = await answer.json()
        return self.grant

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[aiohttp.ClientSession]:
        """Show the granted certificate to the controller."""
        context = ssl.create_default_context(cadata=self.grant["ca"])
        self._load(context, self.grant["certificate"])
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
            yield session

    async def push(
        self, session: aiohttp.ClientSession, url: str, *, about: str | None = None, csr: bytes | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Ask for a challenge and push Evidence over it, in the name of ``about``; returns status and answer."""
        challenge = await self.challenge(session, url, about)
        return await self.answer(session, url, challenge, about=about, csr=csr)

    async def challenge(self, session: aiohttp.ClientSession, url: str, about: str | None = None) -> dict[str, Any]:
        """Ask for a challenge."""
        async with session.post(f"{url}/node/v1/challenge", json={"node": about or self.id}) as answer:
            assert answer.status == 200, await answer.text()
            challenge: dict[str, Any] = await answer.json()
            return challenge

    async def answer(
        self,
        session: aiohttp.ClientSession,
        url: str,
        challenge: dict[str, Any],
        *,
        about: str | None = None,
        csr: bytes | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Push Evidence over a challenge; returns status and answer."""
        evidence = self.evidence(bytes.fromhex(challenge["nonce"]), min(challenge["from"], len(self.entries)))
        pushed = PushedEvidence(node=about or self.id, nonce=challenge["nonce"], evidence=evidence, csr=csr)
        async with session.post(f"{url}/node/v1/evidence", data=pushed.encode()) as answer:
            return answer.status, await answer.json()

    # --- its control listener

    def application(self) -> web.Application:
        async def evidence(request: web.Request) -> web.Response:
            start = int(request.query["from"])
            self.asked.append(start)
            if start > len(self.entries):
                return web.json_response({"error": "the log is shorter"}, status=400)
            body = self.evidence(bytes.fromhex(request.query["nonce"]), start).encode()
            return web.Response(body=body, content_type="application/json")

        async def result(request: web.Request) -> web.Response:
            self.results.append((await request.read()).decode())
            return web.Response(status=204)

        application = web.Application()
        application.add_routes(
            [web.get("/attestation/v1/evidence", evidence), web.put("/attestation/v1/result", result)]
        )
        return application

    def server_context(self) -> ssl.SSLContext:
        """TLS with the control key; before the grant with a certificate of its own, for its key is what counts."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._load(context, self.grant.get("certificate") or self._self_signed())
        return context

    def _load(self, context: ssl.SSLContext, certificate: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            chain, key = Path(folder) / "c.pem", Path(folder) / "k.pem"
            chain.write_text(certificate)
            key.write_bytes(
                self.control.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                )
            )
            context.load_cert_chain(chain, key)

    def _self_signed(self) -> str:
        builder = x509.CertificateBuilder().subject_name(_name(self.id)).issuer_name(_name(self.id))
        builder = builder.public_key(self.control.public_key()).serial_number(1)
        certificate = builder.not_valid_before(_START).not_valid_after(_END).sign(self.control, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM).decode()

    async def serve(self, application: web.Application | None = None) -> web.AppRunner:
        """Serve the control listener on a free port, or on the one it had."""
        runner = web.AppRunner(application or self.application(), shutdown_timeout=0)
        await runner.setup()
        sock = socket.create_server(("127.0.0.1", self.port))
        self.port = sock.getsockname()[1]
        await web.SockSite(runner, sock, ssl_context=self.server_context()).start()
        return runner


def _kdf_a(key: bytes, label: bytes, context: bytes, size: int) -> bytes:
    mode, where = Mode.CounterMode, CounterLocation.BeforeFixed
    return KBKDFHMAC(hashes.SHA256(), mode, size, 4, 4, where, label, context, None).derive(key)


def _bytes(answer: dict[str, Any], names: Sequence[str] = ("credential_blob", "encrypted_secret")) -> dict[str, Any]:
    import base64  # noqa: PLC0415 -- a helper of one function

    return {**answer, **{name: base64.b64decode(answer[name]) for name in names}}
