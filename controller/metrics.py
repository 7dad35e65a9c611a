"""What one replica counts: histograms and tallies that stay small, whatever is sent to it.

Rules:

1. A label's values are our own words: names of routes, checks, statuses and sinks, never a node's id or anything that a peer chooses.
2. Should one of them be somebody else's all the same, :data:`MAX_SERIES` bounds what it costs: the rest is counted as :data:`OTHER`.
3. A figure is added to in the event loop alone, and costs no memory that grows with time.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

__all__ = ["APPRAISAL_BUCKETS_S", "LAG_BUCKETS_S", "MAX_SERIES", "OTHER", "Figures", "Histogram", "Tally"]

LAG_BUCKETS_S = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
APPRAISAL_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)
MAX_SERIES = 256  # of one tally
OTHER = "other"


class Histogram:
    """Counts durations by bucket.

    Args:
        buckets_s: upper bounds in seconds, each included, ascending; one for all that is longer is added.

    Attributes:
        sum: of all durations, in seconds.
        count: how many there were.
    """

    def __init__(self, buckets_s: Sequence[float]) -> None:
        if not buckets_s or any(a >= b for a, b in itertools.pairwise(buckets_s)):
            raise ValueError("buckets: at least one, ascending")
        self._bounds = tuple(buckets_s)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0
        self.count = 0

    def observe(self, seconds: float) -> None:
        """Add one duration; a clock that was set back makes it zero, never less."""
        seconds = max(seconds, 0.0)
        self._counts[bisect.bisect_left(self._bounds, seconds)] += 1
        self.sum += seconds
        self.count += 1

    def buckets(self) -> list[tuple[str, float]]:
        """Return upper bounds as text and how many were at most so long, as Prometheus has it; the last is ``+Inf``."""
        running = 0
        found = []
        for bound, number in zip((*self._bounds, float("inf")), self._counts, strict=True):
            running += number
            found.append(("+Inf" if bound == float("inf") else str(bound), float(running)))
        return found


class Tally:
    """Counts by labels.

    Args:
        labels: their names.
    """

    def __init__(self, *labels: str) -> None:
        self.labels = labels
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, *values: str, by: int = 1) -> None:
        """Count, by a value for each label."""
        if len(values) != len(self.labels):
            raise ValueError(f"a value for each of {', '.join(self.labels)}")
        if values not in self._counts and len(self._counts) >= MAX_SERIES:
            values = (OTHER,) * len(self.labels)
        self._counts[values] = self._counts.get(values, 0) + by

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], int]]:
        return iter(sorted(self._counts.items()))


@dataclass(frozen=True, slots=True)
class Figures:
    """What is counted where calls and Evidence come in.

    Attributes:
        calls: answers by method, route as it stands in the table, and status.
        enrolments: by step (``begin``, ``complete``), outcome (``ok``, ``refused``, ``failed``) and the check that did not hold.
        appraisals: by status of the result.
        appraisal_s: time for one appraisal.
    """

    calls: Tally = field(default_factory=lambda: Tally("method", "route", "status"))
    enrolments: Tally = field(default_factory=lambda: Tally("step", "outcome", "check"))
    appraisals: Tally = field(default_factory=lambda: Tally("status"))
    appraisal_s: Histogram = field(default_factory=lambda: Histogram(APPRAISAL_BUCKETS_S))
