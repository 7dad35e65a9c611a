"""What the agent and a policy template say to each other.

These stand apart from the template's own code, so that the agent loads neither engine: what it does not load, it can't run.
"""

from typing import Literal, TypeAlias

import msgspec

__all__ = ["AUTHZ_ROOT", "LOOPBACK", "Forked", "Loaded", "OpaAccess", "Refused", "Report", "TemplateArgs"]

LOOPBACK = "127.0.0.1"
AUTHZ_ROOT = "system/authz"


class OpaAccess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a worker reaches its OPA server. ``certificate`` is the server's own, PEM."""

    port: int
    token: str
    certificate: str


class TemplateArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a template is told. ``trusted_keys`` are PEM; ``opa`` is set when OPA decides, else the embedded engine does."""

    trusted_keys: tuple[str, ...] = ()
    opa: OpaAccess | None = None


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The template has the bundle, and every package could be evaluated.

    ``request_reads``: see :func:`agent.policy.reads.request_reads`.
    """

    revision: str
    sha256: str
    request_reads: tuple[str, ...] | None = None


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The template does not take the bundle, or could not fork."""

    kind: Literal["policy", "verification", "config", "isolation"]
    reason: str


class Forked(msgspec.Struct, frozen=True, tag="forked"):
    """A worker runs."""

    pid: int


Report: TypeAlias = Loaded | Refused | Forked
