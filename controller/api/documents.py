"""What operators send and get. Times are RFC 3339 in UTC."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from agent import clock
from agent.attest.enrolment import NodeId
from agent.attest.result import CheckResult
from controller.store.results import Appraised

__all__ = [
    "Admin",
    "AdminCertificate",
    "AdminRequest",
    "HookDelivery",
    "HookGrant",
    "HookRequest",
    "Interval",
    "NodeInterval",
    "Page",
    "Result",
    "ShownHook",
    "ShownNode",
    "TokenGrant",
    "TokenRequest",
    "shown_node",
    "shown_result",
    "time_of",
    "times",
]

Name = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9._-]{1,64}\Z")]
# Names and values of labels go into the audit log, whose canonical form has ASCII keys, and to terminals, which obey control characters.
_Label = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,64}\Z")]
_LabelValue = Annotated[str, msgspec.Meta(pattern=r"\A[^\x00-\x1f\x7f-\x9f]{1,64}\Z")]
Role = Literal["viewer", "operator", "approver"]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of what is sent."""


class TokenRequest(Request, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A join token to be made; ``node`` binds it to one name."""

    group: Name = "default"
    node: NodeId | None = None
    labels: Annotated[dict[_Label, _LabelValue], msgspec.Meta(max_length=32)] = {}
    valid_s: Annotated[int, msgspec.Meta(ge=60, le=30 * 86_400)] = 86_400


class TokenGrant(msgspec.Struct, frozen=True):
    """A join token; its text is shown this once."""

    id: str
    token: str
    group: str
    expires: str


class AdminRequest(Request, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An admin to be made, by a certificate request (PKCS #10, DER in base64)."""

    name: Name
    role: Role
    csr: Annotated[bytes, msgspec.Meta(max_length=4096)]
    valid_s: Annotated[int, msgspec.Meta(ge=3600, le=3 * 366 * 86_400)] = 90 * 86_400


class HookRequest(Request, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A webhook to be made; ``*`` stands for all kinds of events. ``secret``: one that the receiver has made, as Standard Webhooks writes it."""

    url: Annotated[str, msgspec.Meta(max_length=2048)]
    kinds: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=32)], ...], msgspec.Meta(max_length=32)] = ("*",)
    secret: Annotated[str, msgspec.Meta(max_length=128)] | None = None


class HookGrant(msgspec.Struct, frozen=True):
    """A webhook; its secret is shown this once, and not at all where the receiver had made it."""

    id: str
    secret: str


class HookDelivery(msgspec.Struct, frozen=True, omit_defaults=True):
    """What went, or has to go, to a webhook.

    Attributes:
        state: ``waiting`` is tried again at ``due``; ``given up`` is not.
        error: what the last attempt met.
    """

    event: str
    kind: str
    created: str
    state: Literal["delivered", "waiting", "given up"]
    attempts: int
    due: str = ""
    delivered: str = ""
    error: str = ""


class ShownHook(msgspec.Struct, frozen=True):
    """A webhook without its secret, and its newest deliveries, the newest event first."""

    id: str
    url: str
    kinds: list[str]
    created: str
    created_by: str
    enabled: bool
    pending: int
    given_up: int
    deliveries: list[HookDelivery]


class AdminCertificate(msgspec.Struct, frozen=True):
    """The certificate of a new admin, and the CA's."""

    name: str
    role: str
    certificate: str
    ca: str
    expires: str


class Admin(msgspec.Struct, frozen=True):
    """An admin."""

    name: str
    role: str
    expires: str
    revoked: bool


class ShownNode(msgspec.Struct, frozen=True, omit_defaults=True):
    """A node with its facts; what it is thought of and whether it answers are separate.

    Attributes:
        status: of the last appraisal; ``since``: how long it has been so.
        reachable: whether it answered last time; ``contact``: when it last did; ``error``: why it does not.
        due: when it is polled next, or is late, if it pushes.
    """

    id: str
    group: str
    labels: dict[str, str]
    mode: str
    address: str
    enrolled: str
    certificate_until: str
    interval_s: int
    status: str
    reachable: bool
    due: str
    appraised: str = ""
    since: str = ""
    checks: tuple[CheckResult, ...] = ()
    contact: str = ""
    error: str = ""
    reference_version: int = 0
    log_entries: int = 0
    claims: dict[str, Any] | None = None


class Interval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often a group's nodes are polled, in seconds."""

    interval_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)]


class NodeInterval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often one node is polled, in seconds; null: as often as its group."""

    interval_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)] | None


class Page(msgspec.Struct, frozen=True):
    """Some nodes; ``next`` is what to give as ``after`` for more, empty at the end."""

    nodes: tuple[ShownNode, ...]
    next: str


class Result(msgspec.Struct, frozen=True):
    """One row of a node's history, or a fresh appraisal."""

    status: str
    at: str
    checks: tuple[CheckResult, ...]
    reference_version: int


def time_of(value: int | None) -> str:
    """Format a time of the database."""
    return "" if value is None else clock.rfc3339_seconds(value)


def times(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its times as text: ``created_us`` becomes ``created``."""
    return {name.removesuffix("_us"): time_of(value) if name.endswith("_us") else value for name, value in row.items()}


def shown_node(row: dict[str, Any]) -> ShownNode:
    """Make a node's document of its row."""
    return ShownNode(
        id=row["id"],
        group=row["group_name"],
        labels=msgspec.json.decode(row["labels"]),
        mode=row["mode"],
        address=row["address"] or "",
        enrolled=time_of(row["enrolled_us"]),
        certificate_until=time_of(row["certificate_until_us"]),
        interval_s=row["interval_s"],
        status=row["status"] or "none",
        reachable=row["failures"] == 0,
        due=time_of(row["due_us"]),
        appraised=time_of(row["appraised_us"]),
        since=time_of(row["since_us"]),
        checks=msgspec.json.decode(row["checks"] or "[]", type=tuple[CheckResult, ...]),
        contact=time_of(max(row["contact_us"] or 0, row["appraised_us"] or 0)),
        error=row["error"] or "",
        reference_version=row["version"] or 0,
        log_entries=row["log_index"] or 0,
        claims=msgspec.json.decode(row["claims"] or "null"),
    )


def shown_result(found: Appraised) -> Result:
    """Make a result's document of an appraisal."""
    checks = msgspec.json.decode(found.checks, type=tuple[CheckResult, ...])
    return Result(found.status, time_of(found.at_us), checks, found.version)
