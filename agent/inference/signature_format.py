"""What a file ``model.sig`` looks like: the parts of a Sigstore bundle v0.3, DSSE and in-toto that :mod:`agent.inference.signing` reads.

Fields that nobody here looks at are left out, and unknown ones are let through: other tools write more.
"""

from __future__ import annotations

import msgspec

__all__ = [
    "Bundle",
    "Chain",
    "Material",
    "PublicKey",
    "Statement",
    "StatementHead",
]


class PublicKey(msgspec.Struct):
    """A bare key, by a hint of which it is."""

    hint: str | None = None


class Certificate(msgspec.Struct, rename="camel"):
    """One certificate, DER."""

    raw_bytes: bytes


class Chain(msgspec.Struct):
    """The signer's certificate first."""

    certificates: list[Certificate]


class Material(msgspec.Struct):
    """What the signature is verified with: one of the two."""

    public_key: PublicKey | None = msgspec.field(default=None, name="publicKey")
    chain: Chain | None = msgspec.field(default=None, name="x509CertificateChain")


class Signature(msgspec.Struct):
    """One signature."""

    sig: bytes


class Envelope(msgspec.Struct, rename="camel"):
    """DSSE."""

    payload: bytes
    payload_type: str
    signatures: list[Signature]


class Bundle(msgspec.Struct, rename="camel"):
    """The file."""

    media_type: str
    verification_material: Material
    dsse_envelope: Envelope


class Subject(msgspec.Struct):
    """What is signed: the model."""

    name: str
    digest: dict[str, str]


class Serialization(msgspec.Struct):
    """How the files became digests."""

    method: str
    hash_type: str


class Resource(msgspec.Struct):
    """One file."""

    name: str
    algorithm: str
    digest: str


class Predicate(msgspec.Struct):
    """All files."""

    serialization: Serialization
    resources: list[Resource]


class StatementHead(msgspec.Struct):
    """What kind of statement it is; read first."""

    type: str = msgspec.field(name="_type")
    predicate_type: str = msgspec.field(name="predicateType")


class Statement(msgspec.Struct):
    """The statement."""

    subject: list[Subject]
    predicate: Predicate
