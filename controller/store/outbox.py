"""The transactional outbox: events, and to whom each still has to go. The hooks that take them: :mod:`controller.store.hooks`.

Rules:

1. An event and its deliveries are written in the transaction of what they tell, so there is no event of a change that was rolled back.
2. A delivery is claimed by moving its due time ahead by a lease, under ``FOR UPDATE SKIP LOCKED``. Whoever claimed it and died loses the lease;
   then it is delivered again, with the same id and the same bytes: at least once, in no promised order.
3. A failed attempt waits 10 s, then twice as long each time up to an hour; after 80 attempts (some three days), or when the event is a week old,
   the delivery is given up, which stays visible until the event is removed.
4. An event is removed when it is 30 days old and nothing is left to do for it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy import CursorResult, and_, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent import clock
from controller.store.schema import deliveries, events, hooks

__all__ = [
    "ANY_KIND",
    "NATS",
    "Delivery",
    "Outcome",
    "backoff_s",
    "claim",
    "emit",
    "is_kind",
    "kinds_of",
    "retire",
    "settle",
    "waiting",
]

NATS = "nats"  # the target that is no hook
ANY_KIND = "*"
LEASE_S = 120  # longer than one attempt with its two transactions
BACKOFF_MIN_S = 10
BACKOFF_MAX_S = 3600
MAX_ATTEMPTS = 80
GIVE_UP_S = 7 * 86_400
RETENTION_S = 30 * 86_400
MAX_BODY_BYTES = 64 * 1024
MAX_ERROR_CHARS = 256
_ID_BYTES = 16
_RETIRE_EVENTS = 1000  # a transaction, so that none is long
_US = 1_000_000
_KIND = re.compile(r"[a-z_]+(\.[a-z_]+)*")
_MAX_KIND_CHARS = 32
_OWN_KEYS = frozenset({"id", "kind", "node", "time"})


@dataclass(frozen=True, slots=True)
class Delivery:
    """A claimed delivery: what goes where, for the how manieth time."""

    event: str
    target: str
    kind: str
    body: bytes
    attempt: int
    url: str = ""
    secret: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        delivery: what was claimed.
        error: why the target is not known to have it; none: it has it.
        gone: whether the target wants no more events at all.
    """

    delivery: Delivery
    error: str | None = None
    gone: bool = False


def backoff_s(attempt: int) -> int:
    """Return how long to wait after the given attempt (1: the first) failed, in seconds."""
    doublings = min(attempt - 1, BACKOFF_MAX_S.bit_length())
    return min(BACKOFF_MIN_S << doublings, BACKOFF_MAX_S)


async def emit(
    connection: AsyncConnection,
    kind: str,
    node: str,
    body: Mapping[str, Any],
    now_us: int,
    *,
    nats: bool,
    hook: str | None = None,
) -> str:
    """Write an event and its deliveries in the caller's transaction; returns the event's id.

    Args:
        connection: the caller's transaction.
        kind: for example ``node.status``.
        node: whom it concerns; empty for none.
        body: further members of the event's JSON object.
        now_us: when it happened.
        nats: whether it goes to NATS too.
        hook: the only hook that it is for, whatever kinds that names; without it all hooks of this kind.

    Raises:
        ValueError: the caller's kind or body is not one; a programming error.
    """
    if not is_kind(kind) or _OWN_KEYS & body.keys():
        raise ValueError(f"not an event: {kind!r} with members {sorted(body)}")
    event = secrets.token_hex(_ID_BYTES)
    own = {"id": event, "kind": kind, "node": node, "time": clock.rfc3339(now_us)}
    document = msgspec.json.encode({**own, **body})
    if len(document) > MAX_BODY_BYTES:
        raise ValueError(f"event {kind} is larger than {MAX_BODY_BYTES} bytes")
    await connection.execute(insert(events).values(id=event, kind=kind, node=node, created_us=now_us, body=document))
    rows = await connection.execute(select(hooks.c.id, hooks.c.kinds).where(hooks.c.enabled))
    wanted = {row.id for row in rows if {kind, ANY_KIND} & set(kinds_of(row.kinds))}
    targets = sorted(wanted) if hook is None else [hook]
    targets += [NATS] if nats else []
    if targets:
        await connection.execute(
            insert(deliveries), [{"event": event, "target": to, "due_us": now_us, "attempts": 0} for to in targets]
        )
    return event


async def waiting(connection: AsyncConnection, now_us: int) -> list[str]:
    """Return the enabled hooks for which something is due."""
    query = (
        select(deliveries.c.target)
        .join(hooks, and_(hooks.c.id == deliveries.c.target, hooks.c.enabled))
        .where(deliveries.c.due_us <= now_us)
        .distinct()
    )
    return list(await connection.scalars(query))


async def claim(connection: AsyncConnection, target: str, now_us: int, limit: int) -> list[Delivery]:
    """Take due deliveries of one target, a hook's id or :data:`NATS`, the longest waiting first (rule 2)."""
    query = (
        select(deliveries.c.event, deliveries.c.attempts, events.c.kind, events.c.body, hooks.c.url, hooks.c.secret)
        .join(events, events.c.id == deliveries.c.event)
        .outerjoin(hooks, and_(hooks.c.id == deliveries.c.target, hooks.c.enabled))
        .where(deliveries.c.target == target, deliveries.c.due_us <= now_us)
        .where(or_(deliveries.c.target == NATS, hooks.c.id.is_not(None)))
        .order_by(deliveries.c.due_us)
        .limit(limit)
        .with_for_update(skip_locked=True, of=deliveries)
    )
    rows = (await connection.execute(query)).all()
    if rows:
        await connection.execute(
            update(deliveries)
            .where(deliveries.c.target == target, deliveries.c.event.in_([row.event for row in rows]))
            .values(due_us=now_us + LEASE_S * _US, attempts=deliveries.c.attempts + 1)
        )
    return [
        Delivery(row.event, target, row.kind, row.body, row.attempts + 1, row.url or "", row.secret or b"")
        for row in rows
    ]


async def settle(connection: AsyncConnection, outcomes: Sequence[Outcome], now_us: int) -> None:
    """Keep how attempts ended (rule 3). A failure that comes after its lease was lost changes nothing; a success counts whenever it comes."""
    for outcome in outcomes:
        delivery = outcome.delivery
        row = and_(deliveries.c.event == delivery.event, deliveries.c.target == delivery.target)
        if outcome.error is None:
            change = update(deliveries).where(row).values(due_us=None, delivered_us=now_us, error=None)
        else:
            over = delivery.attempt >= MAX_ATTEMPTS
            change = (
                update(deliveries)
                .where(row, deliveries.c.attempts == delivery.attempt, deliveries.c.due_us.is_not(None))
                .values(
                    due_us=None if over else now_us + backoff_s(delivery.attempt) * _US,
                    error=outcome.error[:MAX_ERROR_CHARS],
                )
            )
        await connection.execute(change)
        if outcome.gone:
            await _disable_hook(connection, delivery.target, f"given up, the receiver wants no more: {outcome.error}")


async def retire(connection: AsyncConnection, now_us: int, *, nats: bool) -> int:
    """Give up what is too old or has no target any more, and remove old events (rules 3 and 4); returns how many went.

    Args:
        connection: a transaction.
        now_us: the time.
        nats: whether there is a NATS to deliver to.
    """
    is_hook = deliveries.c.target.in_(select(hooks.c.id).where(hooks.c.enabled))
    known = or_(is_hook, deliveries.c.target == NATS) if nats else is_hook
    pending = deliveries.c.due_us.is_not(None)
    await connection.execute(
        update(deliveries).where(pending, ~known).values(due_us=None, error="given up: the target is gone")
    )
    too_old = select(events.c.id).where(events.c.created_us < now_us - GIVE_UP_S * _US)
    await connection.execute(
        update(deliveries)
        .where(pending, deliveries.c.event.in_(too_old))
        .values(due_us=None, error=func.coalesce("given up by age; " + deliveries.c.error, "given up by age"))
    )
    # Given up at a quarter of the age at which it is removed, so no old event has anything pending.
    old = select(events.c.id).where(events.c.created_us < now_us - RETENTION_S * _US).limit(_RETIRE_EVENTS)
    gone: CursorResult[Any] = await connection.execute(delete(events).where(events.c.id.in_(old)))
    return gone.rowcount


async def _disable_hook(connection: AsyncConnection, hook: str, why: str) -> None:
    """Send nothing more to a hook; what was to go there is given up."""
    await connection.execute(update(hooks).where(hooks.c.id == hook).values(enabled=False))
    await connection.execute(
        update(deliveries)
        .where(deliveries.c.target == hook, deliveries.c.due_us.is_not(None))
        .values(due_us=None, error=why[:MAX_ERROR_CHARS])
    )


def kinds_of(text: str) -> list[str]:
    """Return the kinds that a hook's row names."""
    return msgspec.json.decode(text, type=list[str])


def is_kind(kind: str) -> bool:
    """Whether this can be the kind of an event."""
    return len(kind) <= _MAX_KIND_CHARS and _KIND.fullmatch(kind) is not None
