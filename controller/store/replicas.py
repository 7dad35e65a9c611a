"""Which replicas live."""

from __future__ import annotations

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from controller.store.schema import replicas

__all__ = ["LOST_US", "beat"]

LOST_US = 30_000_000  # without a heartbeat


async def beat(connection: AsyncConnection, replica: str, name: str, now_us: int) -> list[str]:
    """Say that a replica lives; returns the names of those that were lost, each once."""
    seen = await connection.execute(update(replicas).where(replicas.c.id == replica).values(seen_us=now_us))
    if seen.rowcount == 0:
        await connection.execute(insert(replicas).values(id=replica, name=name, started_us=now_us, seen_us=now_us))
    query = select(replicas).where(replicas.c.seen_us < now_us - LOST_US).with_for_update(skip_locked=True)
    lost = (await connection.execute(query)).all()
    await connection.execute(delete(replicas).where(replicas.c.id.in_([row.id for row in lost])))
    return [row.name for row in lost]
