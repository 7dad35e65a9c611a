"""Each call of an operator is authorized by Rego, in the engine that the nodes use.

The policy is a part of the product (``controller/rego``), not input: nobody can send one, so it is evaluated in this process.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from agent.errors import PeerError, PolicyError
from agent.policy.bundle import Bundle
from agent.policy.embedded import EmbeddedEngine
from agent.records import Decision, Principal

__all__ = ["ROLES", "Authorizer"]

ROLES = ("viewer", "operator", "approver")
_REGO = Path(__file__).parent.parent / "rego"


class Authorizer:
    """Asks the policy. The engine belongs to the thread that made it: close it there, for a garbage collection may run on any."""

    def __init__(self) -> None:
        modules = {path.name: path.read_text() for path in sorted(_REGO.glob("*.rego"))}
        digest = hashlib.sha256("".join(modules.values()).encode()).hexdigest()
        self._engine: EmbeddedEngine | None = EmbeddedEngine(Bundle(modules, {}, "controller", ("edgewarden",), digest))

    def close(self) -> None:
        """Drop the engine; nobody may do anything from here on."""
        self._engine = None

    def require(self, principal: Principal, action: str) -> None:
        """Return when the principal may do this.

        Raises:
            PeerError: 403; also when the policy gives no decision.
        """
        question = {"subject": {"id": principal.id, "kind": principal.kind, "roles": principal.roles}, "action": action}
        if self._engine is None:
            raise PeerError(503, "stopping", "the controller is stopping")
        try:
            answer = self._engine.evaluate(msgspec.json.encode(question))
            allowed = msgspec.json.decode(answer, type=Decision).allow
        except (PolicyError, ValueError) as error:
            raise PeerError(403, "policy", f"no decision on {action}: {error}") from error
        if not allowed:
            roles = ", ".join(principal.roles) or "no role"
            raise PeerError(403, "role", f"{principal.id} ({roles}) may not {action}")
