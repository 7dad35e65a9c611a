"""Which replicas live.

Rules:

1. A replica that has said nothing for :data:`LOST_US` is lost. Whoever finds it removes its row, so one replica and no other finds it.
2. The database's clock counts, so that replicas whose clocks differ do not take each other for lost.
3. A replica that ends in order takes its row away itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import BigInteger, cast, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent import clock
from controller.store.schema import replicas

__all__ = ["LOST_US", "LostReplica", "beat", "leave", "now_us", "take_lost"]

LOST_US = 30_000_000  # without a heartbeat


@dataclass(frozen=True, slots=True)
class LostReplica:
    """A replica that fell silent: its id, its host and process, and when it was heard last."""

    id: str
    name: str
    seen_us: int


async def now_us(connection: AsyncConnection) -> int:
    """Return the time by which heartbeats are judged; SQLite's is this machine's, for there is one replica."""
    if connection.dialect.name != "postgresql":
        return clock.now_us()
    query = select(cast(func.extract("epoch", func.clock_timestamp()) * 1_000_000, BigInteger))
    return int((await connection.execute(query)).scalar_one())


async def beat(connection: AsyncConnection, replica: str, name: str, now_us: int) -> None:
    """Say that a replica lives."""
    seen = await connection.execute(update(replicas).where(replicas.c.id == replica).values(seen_us=now_us))
    if seen.rowcount == 0:
        await connection.execute(insert(replicas).values(id=replica, name=name, started_us=now_us, seen_us=now_us))


async def take_lost(connection: AsyncConnection, now_us: int) -> list[LostReplica]:
    """Remove and return those that were lost, each once."""
    query = select(replicas).where(replicas.c.seen_us < now_us - LOST_US).with_for_update(skip_locked=True)
    lost = (await connection.execute(query)).all()
    await connection.execute(delete(replicas).where(replicas.c.id.in_([row.id for row in lost])))
    return [LostReplica(row.id, row.name, row.seen_us) for row in lost]


async def leave(connection: AsyncConnection, replica: str) -> None:
    """Say that a replica ends in order."""
    await connection.execute(delete(replicas).where(replicas.c.id == replica))
