"""Which refusals of callers that have proven nothing stand in the audit log by themselves, so that nobody fills it by being refused.

Rules:

1. In a minute some :data:`SOURCE_PER_MINUTE` refusals of one address are recorded one by one, and some :data:`ALL_PER_MINUTE` of all.
2. An operator's refusal is always recorded: whoever it is has a name, and an access that can be revoked.
3. The rest is counted by the check that did not hold, and one record says how many they were.
"""

from __future__ import annotations

from collections import Counter

from controller.api.limiter import Limiter

__all__ = ["ALL_PER_MINUTE", "SOURCE_PER_MINUTE", "Refusals"]

SOURCE_PER_MINUTE = 120
ALL_PER_MINUTE = 300


class Refusals:
    """Decides and counts, for one replica."""

    def __init__(self) -> None:
        self._sources = Limiter(SOURCE_PER_MINUTE)
        self._all = Limiter(ALL_PER_MINUTE)
        self._counted: Counter[str] = Counter()

    def has_record(self, source: str, check: str) -> bool:
        """Say whether a refusal is recorded by itself; if not, it is counted by its check."""
        if self._sources.wait_s(source) == 0 and self._all.wait_s("") == 0:
            return True
        self._counted[check] += 1
        return False

    def counted(self) -> Counter[str]:
        """Return how many were counted and not told yet."""
        return Counter(self._counted)

    def told(self, counts: Counter[str]) -> None:
        """Forget what stands in a record now."""
        self._counted -= counts
