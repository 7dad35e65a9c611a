"""When each node is due, and whether it answers.

Rules:

1. A node is claimed for a poll by moving its due time ahead by a whole interval, under ``FOR UPDATE SKIP LOCKED``. So whatever becomes of the
   replica that claimed it, no other polls it in this interval, and all find it due in the next.
2. A node is polled in its own interval, or else in its group's.
3. A node that pushes is due when it is late: two intervals after its last push. Nothing makes it late sooner, for it hears of nothing before it pushes.
4. Whether a node answers is a fact of its own; what is thought of it (:mod:`controller.store.results`) stays as it was.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, bindparam, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent.errors import PeerError
from controller.store import fleet
from controller.store.fleet import NodeRecord
from controller.store.schema import groups, nodes, polls

__all__ = [
    "Due",
    "answered",
    "claim",
    "hurry",
    "postpone",
    "set_group_interval",
    "set_interval",
    "silent",
]

MAX_BACKOFF = 8  # times the interval, for a node that does not answer
JITTER = 0.1  # of an interval, at most


_DUE = (
    fleet.records()
    .where(polls.c.due_us <= bindparam("now"))
    .order_by(polls.c.due_us)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True, of=polls)
)
_MOVE = update(polls).where(polls.c.node == bindparam("who")).values(due_us=bindparam("next"))


@dataclass(frozen=True, slots=True)
class Due:
    """A node that was claimed, and how late."""

    node: NodeRecord
    lag_us: int


async def claim(connection: AsyncConnection, now_us: int, limit: int) -> list[Due]:
    """Take the nodes that are due, the longest waiting first (rule 1)."""
    rows = (await connection.execute(_DUE, {"now": now_us, "most": limit})).all()
    if rows:
        await connection.execute(
            _MOVE,
            [{"who": row.id, "next": _next(row, now_us)} for row in rows],
        )
    return [Due(fleet.record(row), now_us - row.due_us) for row in rows]


def _next(row: Row[Any], now_us: int) -> int:
    """Return when a node is due again: an interval later, more for one that does not answer, with jitter."""
    interval_us = row.every_s * 1_000_000
    wait_us = interval_us * min(2**row.failures, MAX_BACKOFF)
    jitter_us = secrets.randbelow(int(interval_us * JITTER) + 1)
    # From when it was due, so that a fleet stays spread; from now where a whole interval was missed.
    start_us = row.due_us if row.due_us + interval_us > now_us else now_us
    return int(start_us + wait_us + jitter_us)


async def hurry(connection: AsyncConnection, group: str, now_us: int) -> None:
    """Make all nodes of a group that are polled due within a tenth of its interval: what they are held against has changed."""
    interval_s = (await connection.execute(select(groups.c.interval_s).where(groups.c.name == group))).scalar_one()
    mine = select(nodes.c.id).where(nodes.c.group_name == group, nodes.c.mode == "pull")
    latest = now_us + int(interval_s * 1_000_000 * JITTER)
    await connection.execute(update(polls).where(polls.c.node.in_(mine), polls.c.due_us > latest).values(due_us=latest))


async def postpone(connection: AsyncConnection, node: str, due_us: int) -> None:
    """Say when a node that pushes would be late."""
    await connection.execute(update(polls).where(polls.c.node == node).values(due_us=due_us))


async def answered(connection: AsyncConnection, node: str, now_us: int) -> None:
    """Note that a node was reached, whatever it said. One whose appraisal is kept, and that was reached before, needs no such note."""
    mine = update(polls).where(polls.c.node == node)
    await connection.execute(mine.values(failures=0, contact_us=now_us, error=None))


async def silent(connection: AsyncConnection, node: str, error: str) -> bool:
    """Note that a node was not reached; returns whether that is news."""
    row = (await connection.execute(select(polls.c.failures).where(polls.c.node == node))).one_or_none()
    if row is None:
        return False
    await connection.execute(
        update(polls).where(polls.c.node == node).values(failures=row.failures + 1, error=error[:512])
    )
    return bool(row.failures == 0)


async def set_interval(connection: AsyncConnection, node: str, interval_s: int | None, now_us: int) -> None:
    """Give a node an interval of its own, or its group's again; it holds at once.

    Raises:
        PeerError: 404.
    """
    changed = await connection.execute(update(nodes).where(nodes.c.id == node).values(interval_s=interval_s))
    if changed.rowcount == 0:
        raise PeerError(404, "not_enrolled", f"no node {node!r} is enrolled here")
    effective = select(fleet.interval_of).join(groups, groups.c.name == nodes.c.group_name).where(nodes.c.id == node)
    interval_s = (await connection.execute(effective)).scalar_one()
    await _spread(connection, nodes.c.id == node, interval_s, now_us)


async def set_group_interval(connection: AsyncConnection, group: str, interval_s: int, now_us: int) -> None:
    """Change the interval of a group; it holds at once, for those nodes that have none of their own.

    Raises:
        PeerError: 404.
    """
    changed = await connection.execute(update(groups).where(groups.c.name == group).values(interval_s=interval_s))
    if changed.rowcount == 0:
        raise PeerError(404, "no_group", f"there is no group {group!r}")
    mine = and_(nodes.c.group_name == group, nodes.c.interval_s.is_(None))
    await _spread(connection, mine, interval_s, now_us)


async def _spread(connection: AsyncConnection, mine: ColumnElement[bool], interval_s: int, now_us: int) -> None:
    """Make nodes due within an interval from now, each at a moment of its own; those that push never sooner than they were (rule 3)."""
    late = fleet.late_us(now_us, interval_s)
    pushing = select(nodes.c.id).where(mine, nodes.c.mode == "push")
    await connection.execute(update(polls).where(polls.c.node.in_(pushing), polls.c.due_us < late).values(due_us=late))
    names = list(await connection.scalars(select(nodes.c.id).where(mine, nodes.c.mode == "pull")))
    if names:
        await connection.execute(
            _MOVE,
            [{"who": name, "next": now_us + secrets.randbelow(interval_s * 1_000_000)} for name in names],
        )
