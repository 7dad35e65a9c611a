"""What the agent and a gateway say to each other over their channel.

Rules:

1. The agent believes nothing because a gateway says it: a gateway parses clients' bytes and may be taken over. It can report, ask for a
   worker to be replaced and append audit events of the kinds in :data:`GATEWAY_KINDS`; it can't order anything else.
2. Frames of the hot path start with one byte and a little-endian u64 (:func:`append_frame`, :func:`acknowledge_frame`); all others are JSON
   with a ``type``.
"""

import re
import struct
from typing import Any, Final, TypeAlias

import msgspec

from agent.errors import IsolationError
from agent.records import AuditEvent

__all__ = [
    "ACKNOWLEDGE",
    "APPEND",
    "GATEWAY_KINDS",
    "AgentMessage",
    "Drain",
    "Drained",
    "Fatal",
    "GatewayMessage",
    "GatewayStart",
    "LoadModel",
    "ModelReport",
    "NodeFacts",
    "Overrun",
    "PolicyData",
    "Ready",
    "Serve",
    "Statistics",
    "TokenRules",
    "UnloadModel",
    "WorkerEndpoint",
    "acknowledge_frame",
    "append_frame",
    "decode_agent_message",
    "decode_gateway_message",
    "encode",
    "split_hot_frame",
]

GATEWAY_KINDS: Final = frozenset({"infer", "metadata", "refusal"})
APPEND: Final = b"A"
ACKNOWLEDGE: Final = b"K"
MAX_COUNTERS: Final = 4096
_HOT: Final = struct.Struct("<cQ")
_COUNTER: Final = re.compile(
    r"requests_total\|model=[A-Za-z0-9._-]{1,64}\|outcome=ok"
    r"|refusals_total\|reason=[a-z_]{1,40}"
    r"|unrecorded_refusals_total|decisions_remembered_total"
    r"|latency\|le=(?:[0-9]{1,9}|\+Inf|sum)\|stage=[a-z0-9_.]{1,40}",
    re.ASCII,
)


class TokenRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How bearer tokens are checked; the JWKS itself comes as the descriptor ``jwks``."""

    audience: str
    issuer: str | None
    roles_claim: str


class GatewayStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a gateway is told at its birth; its key material comes as descriptors."""

    node: str
    tokens: TokenRules | None
    strict_audit: bool
    threads: int
    max_body_bytes: int
    max_inflight_bytes: int
    header_timeout_ms: int
    body_timeout_ms: int
    idle_timeout_ms: int
    max_connections: int
    max_connections_per_source: int
    max_concurrent: int
    evaluation_deadline_ms: int
    total_deadline_ms: int
    remember_decisions: bool


class WorkerEndpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="worker"):
    """A policy worker for this gateway; descriptors: its socket, its shared memory.

    ``request_reads``: the members of ``input.request`` that its decisions depend on; None where they are not to be remembered.
    """

    worker: int
    policy_sha256: str
    revision: str
    request_reads: tuple[str, ...] | None = None


class PolicyData(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="policy-data"):
    """The policy's data that the gateway enforces natively; one sealed descriptor with the JSON document."""

    policy_sha256: str


class LoadModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="load"):
    """A measured, verified and authorized package; descriptors: one sealed file for each of ``files``.

    ``number`` counts hand-overs; of one name and version only the newest may answer. ``last`` is false while more files
    of the same package follow (a message carries a bounded number of descriptors).
    """

    number: int
    name: str
    version: str
    digest: str
    signer: str
    files: tuple[str, ...]
    last: bool


class UnloadModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="unload"):
    """Stop serving this version; requests in work end."""

    name: str
    version: str


class NodeFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="facts"):
    """What the policy is told about the node."""

    trust: str
    attested_age_s: int | None = None
    posture: dict[str, Any] = {}


class Serve(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="serve"):
    """Everything has been handed over: accept connections."""


class Drain(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="drain"):
    """Accept no more, end the requests in work, then leave."""

    timeout_ms: int


class Ready(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="ready"):
    """The gateway accepts connections."""


class ModelReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="model"):
    """Whether the package of this hand-over became a session that answers (``error`` is empty)."""

    number: int
    error: str = ""


class Overrun(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="overrun"):
    """This worker has missed its deadline: please kill it."""

    worker: int


class Statistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="statistics"):
    """Counters since the gateway's start. Keys of ``counters`` are ``name|label=value|…``; only those of :data:`_COUNTER` exist."""

    counters: dict[str, int]
    open_connections: int
    in_work: int

    def __post_init__(self) -> None:
        if len(self.counters) > MAX_COUNTERS:
            raise ValueError(f"more than {MAX_COUNTERS} counters")
        for key, value in self.counters.items():
            if value < 0 or _COUNTER.fullmatch(key) is None:
                raise ValueError(f"no counter: {key[:64]!r}")


class Fatal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="fatal"):
    """The gateway can't start; what is wrong, for the operator."""

    error: str


class Drained(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="drained"):
    """Nothing is in work any more."""


AgentMessage: TypeAlias = WorkerEndpoint | PolicyData | LoadModel | UnloadModel | NodeFacts | Serve | Drain
GatewayMessage: TypeAlias = Ready | ModelReport | Overrun | Statistics | Fatal | Drained

_encoder = msgspec.json.Encoder()
_agent_decoder: msgspec.json.Decoder[AgentMessage] = msgspec.json.Decoder(AgentMessage)
_gateway_decoder: msgspec.json.Decoder[GatewayMessage] = msgspec.json.Decoder(GatewayMessage)


def encode(message: AgentMessage | GatewayMessage) -> bytes:
    """Encode one message as a frame."""
    return _encoder.encode(message)


def decode_agent_message(frame: bytes) -> AgentMessage:
    """Decode what the agent sent.

    Raises:
        IsolationError: it is no message of the agent.
    """
    try:
        return _agent_decoder.decode(frame)
    except (ValueError, RecursionError) as error:
        raise IsolationError(f"unexpected message from the agent: {error}") from error


def decode_gateway_message(frame: bytes) -> GatewayMessage:
    """Decode what a gateway sent.

    Raises:
        IsolationError: it is no message of a gateway.
    """
    try:
        return _gateway_decoder.decode(frame)
    except (ValueError, RecursionError) as error:
        raise IsolationError(f"unexpected message from the gateway: {error}") from error


def append_frame(number: int, event: AuditEvent) -> bytes:
    """Frame that asks the agent to record ``event``; ``number`` counts the gateway's events from 1."""
    return _HOT.pack(APPEND, number) + _encoder.encode(event)


def acknowledge_frame(number: int, error: str = "") -> bytes:
    """Frame that says that all events up to ``number`` which had not failed are recorded, or why this one can't be."""
    return _HOT.pack(ACKNOWLEDGE, number) + error.encode()


def split_hot_frame(frame: bytes, kind: bytes) -> tuple[int, bytes] | None:
    """Return the number and the rest of a hot frame of this kind, or None for any other frame."""
    if not frame.startswith(kind) or len(frame) < _HOT.size:
        return None
    return _HOT.unpack_from(frame)[1], frame[_HOT.size :]
