"""What a gateway counts of its requests; see ``agent/control/health.py`` for the form of the keys."""

from bisect import bisect_left
from collections.abc import Mapping

__all__ = ["Counters"]


class Counters:
    """Counters that the gateway reports; see ``agent/control/health.py`` for the form of the keys."""

    PENDING = 1024  # latency splits that are counted together
    EDGES = (100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 1_000_000)

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._latency: dict[str, list[int]] = {}  # by stage: requests in each bucket, then the sum
        self._pending: list[Mapping[str, int]] = []

    @property
    def values(self) -> dict[str, int]:
        """All counters by key. Keys are made here, once a report, and not once a request."""
        self._fold()
        values = dict(self._counts)
        for stage, buckets in self._latency.items():
            for edge, count in zip((*self.EDGES, "+Inf", "sum"), buckets, strict=True):
                if count:
                    values[f"latency|le={edge}|stage={stage}"] = count
        return values

    def count(self, key: str, by: int = 1) -> None:
        """Add to a counter."""
        self._counts[key] = self._counts.get(key, 0) + by

    def observe(self, latency_us: Mapping[str, int]) -> None:
        """Add a request's latency split, which does not change any more, to the histograms."""
        self._pending.append(latency_us)
        if len(self._pending) >= self.PENDING:
            self._fold()

    def _fold(self) -> None:
        pending, self._pending = self._pending, []
        for latency_us in pending:
            for stage, micros in latency_us.items():
                buckets = self._latency.get(stage)
                if buckets is None:
                    buckets = self._latency[stage] = [0] * (len(self.EDGES) + 2)
                buckets[bisect_left(self.EDGES, micros)] += 1
                buckets[-1] += micros
