"""Immutable values that cross a boundary between processes, and their canonical encoding.

Every struct here is decoded from bytes that another process wrote, so each is typed and validated on decoding; an
unknown field is an error. Digests are lower-case hex of SHA-256 unless the name says otherwise; durations are integer
microseconds. The canonical encoding is JCS (RFC 8785), narrowed to what can be encoded without doubt: no floats, ASCII
keys, integers within ±(2**53 - 1).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, TypeVar

import msgspec
import orjson

__all__ = [
    "DENY_ALL",
    "AuditEvent",
    "Decision",
    "JsonValue",
    "Obligations",
    "PolicyAnswer",
    "Principal",
    "TensorSpec",
    "canonical",
    "decode",
]

JsonValue: TypeAlias = "bool | int | str | list[JsonValue] | dict[str, JsonValue] | None"

_MAX_SAFE_INTEGER = 2**53 - 1
_T = TypeVar("_T")


def canonical(value: JsonValue) -> bytes:
    """Encode a value as canonical JSON (RFC 8785).

    Raises:
        ValueError: for a float, an integer past 2**53 - 1 or a key that is not ASCII: their canonical form is
            disputed between implementations, so none of our records may hold one.
    """
    _check_canonical(value)
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _check_canonical(value: JsonValue) -> None:
    match value:
        case str() | None | bool():
            return
        case int():
            if not -_MAX_SAFE_INTEGER <= value <= _MAX_SAFE_INTEGER:
                raise ValueError(f"integer {value} is outside the range that canonical JSON can carry")
        case dict():
            for key, member in value.items():
                if not key.isascii():
                    raise ValueError(f"key {key!r} is not an ASCII string")
                _check_canonical(member)
        case list():
            for member in value:
                _check_canonical(member)
        case _:
            raise ValueError(f"{type(value).__name__} has no canonical JSON form here")


class Principal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who asks. ``kind`` says by what proof; ``roles`` come from the proof, never from the request."""

    id: str
    kind: Literal["mtls", "jwt", "spiffe", "unix"]
    roles: tuple[str, ...] = ()
    mfa: bool = False
    claims: dict[str, Any] = {}


class Obligations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the enforcing side must do with an allowed request."""

    sanitize: str | None = None
    output: str | None = None
    limit: str | None = None
    receipt: bool = False


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The value of ``data.edgewarden.authz.decision``, version 1."""

    allow: bool
    reasons: tuple[str, ...] = ()
    obligations: Obligations = Obligations()


DENY_ALL = Decision(allow=False)


class PolicyAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A decision with what the decision log needs. ``error`` is set when the engine gave none: then it is a deny."""

    decision: Decision
    decision_id: str
    policy_sha256: str
    revision: str
    error: str | None = None
    eval_us: int = 0


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output of a model in the Open Inference Protocol's words; -1 is a dynamic dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class AuditEvent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One thing that happened, as the process that saw it reports it to the agent, which adds node and sequence.

    ``outcome`` is ``ok``, ``denied`` (by policy), ``refused`` (by a limit or a format) or ``failed``. ``latency_us``
    splits the time by stage. ``input_digest`` and ``output_digest`` are
    ``SHA-256(salt || OIP binary encoding)``; the salt is given to the caller alone.
    """

    kind: str
    time_us: int
    outcome: Literal["ok", "denied", "refused", "failed"]
    principal: str = ""
    principal_kind: str = ""
    action: str = ""
    source_ip: str = ""
    model: str = ""
    version: str = ""
    model_sha256: str = ""
    sanitizer: str = ""
    policy_sha256: str = ""
    policy_revision: str = ""
    decision_id: str = ""
    reasons: tuple[str, ...] = ()
    error: str = ""
    input_digest: str = ""
    output_digest: str = ""
    latency_us: dict[str, int] = {}
    detail: dict[str, Any] = {}


def decode(data: bytes, as_type: type[_T]) -> _T:
    """Decode JSON bytes into a struct of this module.

    Raises:
        ValueError: when the bytes are not that struct (msgspec's ``ValidationError`` and ``DecodeError`` are
            ``ValueError``); the caller turns it into its own error with the blame it knows.
    """
    return msgspec.json.decode(data, type=as_type)
