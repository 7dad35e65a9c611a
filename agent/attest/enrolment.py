"""What a node and its controller say to each other about enrolment and pushed Evidence: formats, no I/O.

Rules:

1. A join token carries the controller's address and the digest of its key, so the first word is said over a pinned connection already. It is
   used once; its secret is compared by digest.
2. Enrolment is two calls. ``POST /node/v1/enrol`` shows endorsement and attestation key and gets a credential that only this TPM opens, for
   this attestation key only, and a nonce. ``POST /node/v1/enrol/<enrolment>`` shows the opened secret, Evidence over the nonce and a
   certificate request for the key in its claims.
3. Pushed Evidence and renewal are the same two calls: ``POST /node/v1/challenge``, then ``POST /node/v1/evidence``; with a certificate request
   the certificate is renewed. Who holds no valid certificate any more is recognised by its attestation key.
4. A reader takes no field that it does not know and no value over its limit.
5. Intermediates that a TPM's maker left in its NV are X.509 certificates in DER, one after the other, with or without padding (TCG EK Credential
   Profile 2.5). Nobody vouches for them: they are split here, and believed where a chain leads through them to an operator's root.
"""

from __future__ import annotations

import base64
import binascii
import struct
from typing import Annotated, Literal, TypeVar

import msgspec

from agent.attest.evidence import Evidence, HexDigest
from agent.attest.result import MAX_RESULT_BYTES
from agent.attest.structures import MAX_PUBLIC_BYTES
from agent.errors import VerificationError

__all__ = [
    "CHALLENGE_PATH",
    "ENROL_PATH",
    "EVIDENCE_PATH",
    "MAX_CERTIFICATE_BYTES",
    "MAX_EK_CHAIN",
    "MAX_EK_CHAIN_BYTES",
    "MAX_JOIN_TOKEN_CHARS",
    "RESULT_PATH",
    "Challenge",
    "ChallengeRequest",
    "EnrolChallenge",
    "EnrolGrant",
    "EnrolProof",
    "EnrolRequest",
    "JoinToken",
    "NodeId",
    "PushAnswer",
    "PushedEvidence",
    "read_message",
    "split_certificates",
    "without_padding",
]

ENROL_PATH = "/node/v1/enrol"
CHALLENGE_PATH = "/node/v1/challenge"
EVIDENCE_PATH = "/node/v1/evidence"
RESULT_PATH = "/attestation/v1/result"
"""On the node's control listener: where a polling controller leaves the Attestation Result (``PUT``, the JWT as the body)."""

MAX_JOIN_TOKEN_CHARS = 2048
MAX_CERTIFICATE_BYTES = 4096
MAX_EK_CHAIN = 6  # intermediates that a node may send beside its EK certificate
MAX_EK_CHAIN_BYTES = MAX_EK_CHAIN * MAX_CERTIFICATE_BYTES
_PREFIX = "ew1."
_DER_HEAD = struct.Struct(">HH")
_DER_SEQUENCE = 0x3082  # with a length in two bytes, as every certificate has it
_PADDING = b"\x00\xff"

NodeId = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9._-]{1,64}\Z")]
_Certificate = Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_CERTIFICATE_BYTES)]
_Public = Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_PUBLIC_BYTES)]
_Secret = Annotated[bytes, msgspec.Meta(min_length=16, max_length=64)]
_Pem = Annotated[str, msgspec.Meta(max_length=64 * 1024)]
_Jwt = Annotated[str, msgspec.Meta(max_length=MAX_RESULT_BYTES)]
_T = TypeVar("_T")


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Travels as JSON, byte strings in base64."""

    def encode(self) -> bytes:
        """Return it as JSON."""
        return msgspec.json.encode(self)


class JoinToken(_Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an operator hands to a node.

    Attributes:
        url: the controller, ``https://host:port``.
        spki_sha256: digest of the SubjectPublicKeyInfo that the controller's listener must show.
        id: names the token in the controller's records.
        secret: 32 random bytes; the controller knows their digest alone.
    """

    version: Literal[1] = 1
    url: Annotated[str, msgspec.Meta(pattern=r"\Ahttps://[!-~]{1,255}\Z")]
    spki_sha256: HexDigest
    id: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{16}\Z")]
    secret: _Secret

    def text(self) -> str:
        """Return it as one word to be copied."""
        return _PREFIX + base64.urlsafe_b64encode(self.encode()).rstrip(b"=").decode()

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Read it.

        Raises:
            VerificationError: ``join-token``; the error does not repeat the text.
        """
        body = text.strip().removeprefix(_PREFIX)
        if len(text) > MAX_JOIN_TOKEN_CHARS or not text.strip().startswith(_PREFIX):
            raise VerificationError("join-token", f"a join token begins with {_PREFIX} and is one line")
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            return msgspec.json.decode(data, type=cls)
        except (binascii.Error, ValueError) as error:
            raise VerificationError("join-token", "it is damaged: copy it again, or create another") from error


class EnrolRequest(_Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """First call.

    Attributes:
        token, secret: of the join token.
        mode: whether the controller polls (then ``address`` says where) or the node pushes.
        ek_certificate: X.509 in DER, where the TPM has one; ``ek_chain`` are intermediates that came with it.
        ek_public, ak_public: TPMT_PUBLIC.
    """

    version: Literal[1] = 1
    token: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{16}\Z")]
    secret: _Secret
    node: NodeId
    mode: Literal["pull", "push"]
    address: Annotated[str, msgspec.Meta(max_length=255)] | None = None
    ek_certificate: _Certificate | None = None
    ek_chain: Annotated[tuple[_Certificate, ...], msgspec.Meta(max_length=MAX_EK_CHAIN)] = ()
    ek_public: _Public
    ak_public: _Public


class EnrolChallenge(_Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Answer to the first call.

    Attributes:
        credential_blob: TPM2B_ID_OBJECT; ``encrypted_secret``: TPM2B_ENCRYPTED_SECRET.
        nonce: for the first Evidence.
        expires_s: time for the second call.
    """

    enrolment: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    credential_blob: Annotated[bytes, msgspec.Meta(max_length=1024)]
    encrypted_secret: Annotated[bytes, msgspec.Meta(max_length=1024)]
    nonce: HexDigest
    expires_s: int


class EnrolProof(_Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Second call: ``secret`` out of the credential; ``csr`` is PKCS #10 in DER for the key in the Evidence's claims."""

    secret: _Secret
    csr: _Certificate
    evidence: Evidence


class EnrolGrant(_Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Answer to the second call: the node belongs to the controller now.

    Attributes:
        certificate: PEM chain for the node's key; ``ca``: PEM of who issued it and the controller's own.
        jwks: keys that sign Attestation Results (RFC 7517), as JSON text.
        trust_domain: of the SPIFFE IDs; the controller is ``spiffe://<trust domain>/controller``.
        interval_s: between two appraisals.
        result: the first Attestation Result, a JWT.
    """

    node: NodeId
    certificate: _Pem
    ca: _Pem
    jwks: _Pem
    trust_domain: Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9._-]{1,255}\Z")]
    interval_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)]
    result: _Jwt


class ChallengeRequest(_Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Asks for a nonce to push Evidence with."""

    node: NodeId


class Challenge(_Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A single-use nonce, and the index of the first log entry that the controller does not know (``from``)."""

    nonce: HexDigest
    start: Annotated[int, msgspec.Meta(ge=0)] = msgspec.field(name="from")


class PushedEvidence(_Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Evidence over a challenge's nonce; with ``csr`` the certificate is renewed, which needs no valid certificate."""

    node: NodeId
    nonce: HexDigest
    evidence: Evidence
    csr: _Certificate | None = None


class PushAnswer(_Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The Attestation Result, when to come again, and the renewed certificate where one was asked for."""

    result: _Jwt
    interval_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)]
    certificate: _Pem | None = None


def read_message(data: bytes, as_type: type[_T], limit: int) -> _T:
    """Decode a message.

    Args:
        data: JSON.
        as_type: one of this module's types.
        limit: in bytes.

    Raises:
        VerificationError: ``encoding``.
    """
    if len(data) > limit:
        raise VerificationError("encoding", f"{len(data)} bytes are over {limit}")
    try:
        return msgspec.json.decode(data, type=as_type)
    except ValueError as error:
        raise VerificationError("encoding", f"not a message of the node protocol: {error}") from error


def split_certificates(data: bytes) -> tuple[bytes, ...]:
    """Split certificates that stand one after the other in a TPM's NV; only their frames are looked at.

    Args:
        data: DER certificates; zeros or 0xff may stand between and after them.

    Raises:
        VerificationError: ``ek-chain``: more than :data:`MAX_EK_CHAIN`, or something that is no certificate or larger than
            :data:`MAX_CERTIFICATE_BYTES`.
    """
    found: list[bytes] = []
    rest = data.lstrip(_PADDING)
    while rest:
        size = _der_size(rest)
        if not 0 < size <= min(len(rest), MAX_CERTIFICATE_BYTES):
            raise VerificationError("ek-chain", f"what follows {len(found)} certificates is none")
        if len(found) == MAX_EK_CHAIN:
            raise VerificationError("ek-chain", f"more than {MAX_EK_CHAIN} certificates")
        found.append(rest[:size])
        rest = rest[size:].lstrip(_PADDING)
    return tuple(found)


def without_padding(certificate: bytes) -> bytes:
    """Cut the padding that some makers leave behind a certificate in NV; what is no certificate stays as it is, and whoever verifies it says so."""
    size = _der_size(certificate)
    return certificate[:size] if size and not certificate[size:].strip(_PADDING) else certificate


def _der_size(data: bytes) -> int:
    """Return the size that the certificate at the start of these bytes gives itself; 0 where there is none."""
    kind, length = _DER_HEAD.unpack_from(data.ljust(_DER_HEAD.size, b"\0"))
    return _DER_HEAD.size + int(length) if kind == _DER_SEQUENCE else 0
