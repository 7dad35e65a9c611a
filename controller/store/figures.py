"""What the database alone knows and an operator wants to watch: three aggregates, one statement each.

Rules:

1. They read; they take no lock that somebody waits for.
2. What comes out is bounded: statuses times two, sinks of events, replicas that live.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import case, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from controller.store.schema import deliveries, events, nodes, polls, replicas, states

__all__ = ["Backlog", "Sample", "sample"]


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits for one sink: how many events, and how old the oldest is in seconds."""

    sink: str
    depth: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class Sample:
    """The figures of one moment.

    Attributes:
        nodes: how many, by status of the last result and by whether they answered last time.
        backlogs: of the outbox.
        replicas: seconds since each replica's last heartbeat, by its name.
    """

    nodes: dict[tuple[str, bool], int]
    backlogs: tuple[Backlog, ...]
    replicas: dict[str, float]


async def sample(connection: AsyncConnection, now_us: int) -> Sample:
    """Read the figures."""
    reached = case((polls.c.failures == 0, 1), else_=0)
    status = func.coalesce(states.c.status, "none")
    by_status = await connection.execute(
        select(status, reached, func.count())
        .select_from(
            nodes.join(polls, polls.c.node == nodes.c.id).outerjoin(states, states.c.node == nodes.c.id),
        )
        .group_by(status, reached)
    )
    waiting = await connection.execute(
        select(deliveries.c.target, func.count(), func.min(events.c.created_us))
        .join(events, events.c.id == deliveries.c.event)
        .where(deliveries.c.due_us.is_not(None))
        .group_by(deliveries.c.target)
        .order_by(deliveries.c.target)
    )
    alive = await connection.execute(select(replicas.c.name, replicas.c.seen_us).order_by(replicas.c.seen_us))
    return Sample(
        {(str(status), bool(reached)): int(number) for status, reached, number in by_status},
        tuple(Backlog(sink, int(depth), _age_s(now_us, oldest_us)) for sink, depth, oldest_us in waiting),
        {name: _age_s(now_us, seen_us) for name, seen_us in alive},
    )


def _age_s(now_us: int, then_us: int) -> float:
    return max(now_us - then_us, 0) / 1e6  # another replica's clock may be a little ahead
