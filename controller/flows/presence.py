"""Presence: say that this replica lives, and tell that another does not any more.

Rules:

1. A loss is a record and an event, in the transaction of the heartbeat that finds it: one of the survivors tells it, once.
2. Who was not heard itself for some time judges nobody until it was heard for as long as makes a loss: after an outage of the database
   everybody is late, and whoever comes back first must not take the others for lost.
3. A replica that ends in order says so, and is not lost. One that fails does not: its end is news.
"""

from __future__ import annotations

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from agent import clock
from controller.store import audit, outbox, replicas
from controller.store.database import Database, StoreError
from controller.store.replicas import LostReplica

__all__ = ["REPLICA_LOST", "Presence"]

REPLICA_LOST = "controller.replica_lost"
MAX_GAP_US = replicas.LOST_US // 2  # between two heartbeats of one that is heard steadily
_log = structlog.get_logger(__name__)


class Presence:
    """One replica's heartbeat.

    Args:
        database: what all replicas share.
        replica: this one's id.
        name: its host and process, for people.
        nats: whether events go to NATS.
    """

    def __init__(self, database: Database, replica: str, name: str, *, nats: bool) -> None:
        self._database = database
        self._replica = replica
        self._name = name
        self._nats = nats
        self._heard_us = 0
        self._steady_us = 0  # since when without a gap

    async def beat(self) -> None:
        """Say that this replica lives, and tell which do not.

        Raises:
            StoreError: nothing was said.
        """
        async with self._database.begin() as connection:
            now_us = await replicas.now_us(connection)
            await replicas.beat(connection, self._replica, self._name, now_us)
            lost = await replicas.take_lost(connection, now_us) if self._is_steady(now_us) else []
            for other in lost:
                await self._tell(connection, other)
        self._heard_us = now_us
        for other in lost:
            _log.error("replica_lost", replica=other.name)

    def _is_steady(self, now_us: int) -> bool:
        if not 0 <= now_us - self._heard_us <= MAX_GAP_US:
            self._steady_us = now_us
        return now_us - self._steady_us > replicas.LOST_US

    async def _tell(self, connection: AsyncConnection, other: LostReplica) -> None:
        news = {"replica": other.name, "seen": clock.rfc3339_seconds(other.seen_us), "noticed_by": self._name}
        entry = audit.AuditEntry(kind=REPLICA_LOST, principal="controller", outcome="failed", detail=news)
        await audit.append(connection, entry)
        await outbox.emit(connection, REPLICA_LOST, "", news, clock.now_us(), nats=self._nats)

    async def leave(self) -> None:
        """Say that this replica ends in order. Without a database it can't, and will be taken for lost."""
        try:
            async with self._database.begin() as connection:
                await replicas.leave(connection, self._replica)
        except StoreError as error:
            _log.error("database_lost", error=str(error))
