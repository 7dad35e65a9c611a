"""Watch this replica: whether it can do its work, the figures that the database alone knows, and a sign of life for the service manager.

Rules:

1. *Alive* and *ready* are separate. A database that is away makes a replica unready; a restart would not bring it back, so the watchdog does not
   hear of it.
2. A replica is ready while the database's last answer is fresh and its polling goes on. What was never seen is not so.
3. The database is asked every :data:`SAMPLE_S`, however often somebody looks: who asks for health or figures costs nobody a query.
"""

from __future__ import annotations

import asyncio

import structlog

from agent import clock
from agent.host.notify import Notifier
from controller.flows.polling import Poller
from controller.settings import PollSettings
from controller.store import figures
from controller.store.database import Database, StoreError
from controller.store.figures import Sample

__all__ = ["SAMPLE_S", "STALE_S", "Watch"]

SAMPLE_S = 5.0
STALE_S = 20.0  # without an answer of the database
SIGN_S = 5.0  # between two signs of life, where the service manager names no time
_POLL_CALLS = 4  # requests of one poll that each may take `poll.timeout_s`, with room
_log = structlog.get_logger(__name__)


class Watch:
    """What one replica knows about itself.

    Args:
        database: asked for figures.
        poller: the replica's own.
        settings: how long a poll may take.
        notifier: speaks to the service manager.

    Attributes:
        sample: the last figures; None before the first.
    """

    def __init__(self, database: Database, poller: Poller, settings: PollSettings, notifier: Notifier) -> None:
        self._database = database
        self._poller = poller
        self._stall_us = int((_POLL_CALLS * settings.timeout_s + STALE_S) * 1e6)
        self._notifier = notifier
        self._began_us = clock.monotonic_us()
        self._answered_us = 0
        self._lost = ""
        self._stopping = False
        self.sample: Sample | None = None

    def why_not(self) -> str:
        """Return why this replica is not ready, in words; empty: it is."""
        now_us = clock.monotonic_us()
        silent_us = now_us - self._answered_us
        still_us = now_us - max(self._poller.looked_us, self._began_us)
        reasons = (
            (self._stopping, "it is stopping"),
            (self._lost != "", self._lost),
            (self.sample is None, "the database has not answered yet"),
            (silent_us > STALE_S * 1e6, f"database: it has not answered for {silent_us // 1_000_000} s"),
            (self._poller.paused, "polling waits for the database"),
            (still_us > self._stall_us, f"polling has stood still for {still_us // 1_000_000} s"),
        )
        return next((why for holds, why in reasons if holds), "")

    def stop(self) -> None:
        """Say that the end has begun."""
        self._stopping = True
        self._notifier.stopping()

    async def run(self) -> None:
        """Take figures until cancelled."""
        while True:
            try:
                async with self._database.begin() as connection:
                    self.sample = await figures.sample(connection, clock.now_us())
            except StoreError as error:
                self._lost = str(error)
            else:
                self._lost = ""
                self._answered_us = clock.monotonic_us()
            await asyncio.sleep(SAMPLE_S)

    async def keep_alive(self, watchdog_s: float | None) -> None:
        """Tell the service manager that the event loop turns, twice in each ``watchdog_s``, and whether the work goes on."""
        told: str | None = None
        while True:
            self._notifier.watchdog()
            why = self.why_not()
            if why != told:
                self._notifier.status(f"not ready: {why}" if why else "ready")
                log = _log.warning if why else _log.info
                log("readiness", ready=not why, why=why)
                told = why
            await asyncio.sleep(min(SIGN_S, watchdog_s / 2 if watchdog_s else SIGN_S))
