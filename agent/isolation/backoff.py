"""When to start a process again after it died, and whether it dies too often. Pure: times are handed in.

Rules:

1. The first restart is at once; while deaths follow each other the delay doubles from 0.1 s to 5 s.
2. A life of 10 s starts the count anew.
3. Five deaths within 30 s are a crash loop, for as long as those five stay within 30 s of now.
"""

from collections import deque

__all__ = ["CRASH_LOOP_DEATHS", "CRASH_LOOP_WINDOW_S", "FIRST_DELAY_S", "GOOD_LIFE_S", "LONGEST_DELAY_S", "Backoff"]

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0
GOOD_LIFE_S = 10.0
CRASH_LOOP_DEATHS = 5
CRASH_LOOP_WINDOW_S = 30.0


class Backoff:
    """The deaths of one kind of process."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=CRASH_LOOP_DEATHS)
        self._delay = 0.0

    def died(self, at_s: float, lived_s: float) -> float:
        """Note a death and return the seconds to wait before the next start.

        Args:
            at_s: now, on a monotonic clock.
            lived_s: how long it had lived.
        """
        self._deaths.append(at_s)
        if lived_s >= GOOD_LIFE_S:
            self._delay = 0.0
        delay = self._delay
        self._delay = min(max(delay * 2, FIRST_DELAY_S), LONGEST_DELAY_S)
        return delay

    def crash_loop(self, at_s: float) -> bool:
        """Say whether it is in a crash loop at this moment."""
        return len(self._deaths) == CRASH_LOOP_DEATHS and at_s - self._deaths[0] <= CRASH_LOOP_WINDOW_S
