"""When to start a process again after it died, and whether it dies too often.

Rules:

1. The first restart is at once; while deaths follow each other the delay doubles from 0.1 s to 5 s.
2. A life of 10 s starts the count anew.
3. Five deaths within 30 s are a crash loop, for as long as those five stay within 30 s of now: a fact for health, not a
   reason to give up.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, Never, Protocol, TypeVar

import structlog

from agent.errors import IsolationError
from agent.isolation.process import ExitStatus

__all__ = [
    "CRASH_LOOP_DEATHS",
    "CRASH_LOOP_WINDOW_S",
    "FIRST_DELAY_S",
    "GOOD_LIFE_S",
    "LONGEST_DELAY_S",
    "Backoff",
    "Keeper",
    "Supervised",
    "ignore",
]

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


class Supervised(Protocol):
    """What a keeper needs of a process."""

    @property
    def pid(self) -> int:
        """Its process id."""

    async def wait(self) -> ExitStatus:
        """Wait for its end."""


_P = TypeVar("_P", bound=Supervised)
_log = structlog.get_logger(__name__)


def ignore(_: object) -> None:
    """Do nothing, for a callback that nobody needs."""


class Keeper(Generic[_P]):
    """Keeps one process running: starts it, waits for its end, backs off, starts it again.

    Args:
        name: for the log.
        start: gives a running process, or raises ``IsolationError``, which counts as a death.
    """

    def __init__(self, name: str, start: Callable[[], Awaitable[_P]]) -> None:
        self._name = name
        self._start = start
        self._backoff = Backoff()

    @property
    def crash_loop(self) -> bool:
        """Whether it died five times within the last 30 s."""
        return self._backoff.crash_loop(time.monotonic())

    async def run(
        self, on_death: Callable[[ExitStatus], None] = ignore, on_start: Callable[[_P], None] = ignore
    ) -> Never:
        """Do it until cancelled; a process that runs then is the caller's to end.

        Args:
            on_death: told of each end, before the next start.
            on_start: given each new process.
        """
        while True:
            began = time.monotonic()
            try:
                process = await self._start()
                on_start(process)
                status = await process.wait()
                _log.warning("process_ended", process=self._name, pid=process.pid, status=str(status))
                on_death(status)
            except IsolationError as error:
                _log.error("process_start_failed", process=self._name, error=str(error))
            now = time.monotonic()
            await asyncio.sleep(self._backoff.died(now, now - began))
