"""How many calls are taken from one address: a token bucket for each, the least used forgotten first."""

from __future__ import annotations

from collections import OrderedDict

from agent import clock
from agent.errors import PeerError

__all__ = ["MAX_SOURCES", "Limiter"]

MAX_SOURCES = 10_000


class Limiter:
    """Takes ``per_minute`` calls of an address, as many at once."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def admit(self, source: str) -> None:
        """Take a call.

        Raises:
            PeerError: 429, with the time after which it may come again.
        """
        if wait_s := self.wait_s(source):
            raise PeerError(429, "rate", "too many calls from this address", retry_after_s=wait_s)

    def wait_s(self, source: str) -> float:
        """Take a call, where one may be taken; returns 0 then, or else after how many seconds one may be."""
        now_us = clock.monotonic_us()
        filled, then_us = self._buckets.pop(source, (float(self._per_minute), now_us))
        level = min(float(self._per_minute), filled + (now_us - then_us) * self._per_minute / 60e6)
        admitted = level >= 1
        self._buckets[source] = (level - 1 if admitted else level, now_us)
        if len(self._buckets) > MAX_SOURCES:
            self._buckets.popitem(last=False)
        return 0 if admitted else (1 - level) * 60 / self._per_minute
