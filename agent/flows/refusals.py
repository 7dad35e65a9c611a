"""Which refusals have a record of their own, so that nobody fills the audit log by being refused.

Rules:

1. In a second at most :data:`RECORDS_PER_SECOND` refusals of one principal are recorded one by one, and as many of all callers that proved
   no identity.
2. What the policy denied is always recorded: it has passed the principal's rate limit before.
3. The rest, and connections that were cut before they said anything, are counted by reason; one record a second holds the counts.
4. At most :data:`MAX_PRINCIPALS` are told apart in a second, and the :data:`NAMED_PRINCIPALS` with the most refusals are named.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from agent import clock
from agent.records import AuditEvent

__all__ = ["MAX_PRINCIPALS", "NAMED_PRINCIPALS", "RECORDS_PER_SECOND", "Refusals"]

RECORDS_PER_SECOND = 20
MAX_PRINCIPALS = 1024
NAMED_PRINCIPALS = 8
_SECOND_US = 1_000_000


class Refusals:
    """Counts refusals; in memory of bounded size."""

    def __init__(self) -> None:
        self._second = 0
        self._recorded: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._principals: Counter[str] = Counter()

    def has_record(self, principal: str, reason: str, now_us: int) -> bool:
        """Say whether a refusal is to be recorded by itself; if not, it is counted.

        Args:
            principal: who was refused; empty where that is not known.
            reason: the word of the error; from a fixed set, never the caller's.
            now_us: monotonic time.
        """
        if (second := now_us // _SECOND_US) != self._second:
            self._second = second
            self._recorded.clear()
        key = principal if principal in self._recorded or len(self._recorded) < MAX_PRINCIPALS else ""
        if self._recorded[key] < RECORDS_PER_SECOND:
            self._recorded[key] += 1
            return True
        self.count(reason, principal)
        return False

    def count(self, reason: str, principal: str = "") -> None:
        """Count what has no record of its own."""
        self._reasons[reason] += 1
        if principal and (principal in self._principals or len(self._principals) < MAX_PRINCIPALS):
            self._principals[principal] += 1

    def summary(self) -> AuditEvent | None:
        """Return the record of all that was counted since the last call; None when nothing was."""
        if not self._reasons:
            return None
        detail: dict[str, Any] = {
            "reason": "repeated",
            "count": self._reasons.total(),
            "reasons": dict(self._reasons),
            "principals": dict(self._principals.most_common(NAMED_PRINCIPALS)),
        }
        self._reasons.clear()
        self._principals.clear()
        return AuditEvent(kind="refusal", time_us=clock.now_us(), outcome="refused", detail=detail)
