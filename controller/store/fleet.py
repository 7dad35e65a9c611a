"""Nodes: who is enrolled, when each is due, what was found at its last appraisal, and the history of that.

Rules:

1. A node is claimed for a poll by moving its due time ahead by a whole interval, under ``FOR UPDATE SKIP LOCKED``. So whatever becomes of the
   replica that claimed it, no other polls it in this interval, and all find it due in the next.
2. Whether a node answers (``polls``) and what is thought of it (``states``) are separate facts; an unreachable node keeps its last result.
3. The history has a row only where a status or a reason changed; how long it held is seen from the next row.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Row, bindparam, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent.attest.appraisal import Verified
from agent.attest.measurement import LogState
from agent.errors import PeerError
from controller.store.schema import challenges, groups, logs, nodes, polls, results, states

__all__ = [
    "Appraised",
    "Due",
    "NewNode",
    "NodeRecord",
    "add",
    "answered",
    "certified",
    "check_free",
    "claim",
    "count",
    "find",
    "history",
    "hurry",
    "load",
    "postpone",
    "release",
    "row",
    "save",
    "silent",
    "table",
]

MAX_BACKOFF = 8  # times the interval, for a node that does not answer
JITTER = 0.1  # of an interval, at most


@dataclass(frozen=True, slots=True)
class NewNode:
    """A node that has passed its enrolment."""

    id: str
    group: str
    labels: dict[str, str]
    mode: str
    address: str | None
    ek_sha256: str
    ak_public: bytes
    spki_sha256: str
    boot_pcrs: dict[int, str]
    certificate_until_us: int


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """What an appraisal needs to know about a node."""

    id: str
    group: str
    mode: str
    address: str | None
    ak_public: bytes
    spki_sha256: str
    boot_pcrs: dict[int, str]
    interval_s: int
    version: int
    verified: Verified | None
    log_state: bytes | None
    status: str | None
    checks: str | None


@dataclass(frozen=True, slots=True)
class Due:
    """A node that was claimed, and how late."""

    node: str
    lag_us: int


@dataclass(frozen=True, slots=True)
class Appraised:
    """An appraisal to be kept.

    Attributes:
        before: the record that it was made with.
        status, checks, claims, nonce, version: what was found; ``checks`` and ``claims`` are JSON.
        at_us: when.
        verified: how far the log is verified now; None leaves what was known.
    """

    before: NodeRecord
    status: str
    checks: str
    claims: str
    nonce: str
    version: int
    at_us: int
    verified: Verified | None

    @property
    def changed(self) -> bool:
        """Whether it differs from the last one in a way that a reader of the history wants to see."""
        return (self.status, self.checks) != (self.before.status, self.before.checks)


async def add(connection: AsyncConnection, node: NewNode, now_us: int) -> None:
    """Enrol a node.

    Raises:
        PeerError: 409, when its name or its TPM is enrolled already: an operator must release it first.
    """
    await check_free(connection, node.id, node.ek_sha256)
    interval_s = (await connection.execute(select(groups.c.interval_s).where(groups.c.name == node.group))).scalar_one()
    await connection.execute(
        insert(nodes).values(
            id=node.id,
            group_name=node.group,
            labels=msgspec.json.encode(node.labels).decode(),
            mode=node.mode,
            address=node.address,
            ek_sha256=node.ek_sha256,
            ak_public=node.ak_public,
            spki_sha256=node.spki_sha256,
            boot_pcrs=msgspec.json.encode(node.boot_pcrs).decode(),
            enrolled_us=now_us,
            certificate_until_us=node.certificate_until_us,
        )
    )
    # Nodes that come together are spread over an interval.
    due_us = now_us + interval_s * 500_000 + secrets.randbelow(interval_s * 500_000 + 1)
    await connection.execute(insert(polls).values(node=node.id, due_us=due_us, failures=0, contact_us=now_us))


async def check_free(connection: AsyncConnection, node: str, ek_sha256: str) -> None:
    """Make sure that neither a name nor a TPM is enrolled.

    Raises:
        PeerError: 409.
    """
    query = select(nodes.c.id).where((nodes.c.id == node) | (nodes.c.ek_sha256 == ek_sha256))
    other = (await connection.execute(query.limit(1))).scalar()
    if other is not None:
        what = "this name" if other == node else "this TPM"
        words = f"{what} is enrolled already, as {other}: an operator must release that node first"
        raise PeerError(409, "enrolled_already", words)


async def postpone(connection: AsyncConnection, node: str, due_us: int) -> None:
    """Say when a node that pushes would be late."""
    await connection.execute(update(polls).where(polls.c.node == node).values(due_us=due_us))


async def certified(connection: AsyncConnection, node: str, spki_sha256: str, until_us: int) -> None:
    """Note a renewed certificate."""
    values = {"spki_sha256": spki_sha256, "certificate_until_us": until_us}
    await connection.execute(update(nodes).where(nodes.c.id == node).values(**values))


def _records() -> Any:  # noqa: ANN401 -- a join of many columns has no short type
    return (
        select(nodes, groups.c.interval_s, groups.c.version.label("group_version"), states, logs.c.state)
        .join(groups, groups.c.name == nodes.c.group_name)
        .outerjoin(states, states.c.node == nodes.c.id)
        .outerjoin(logs, logs.c.node == nodes.c.id)
    )


async def load(connection: AsyncConnection, names: list[str]) -> dict[str, NodeRecord]:
    """Return the records of nodes by name; those that are not enrolled are left out."""
    rows = await connection.execute(_records().where(nodes.c.id.in_(names)))
    return {row.id: _record(row) for row in rows}


async def find(connection: AsyncConnection, node: str) -> NodeRecord:
    """Return one node.

    Raises:
        PeerError: 404.
    """
    found = await load(connection, [node])
    if node not in found:
        raise PeerError(404, "not_enrolled", f"no node {node!r} is enrolled here")
    return found[node]


def _record(row: Row[Any]) -> NodeRecord:
    verified = None
    if row.log_index is not None and row.state is not None:
        verified = Verified(
            index=row.log_index,
            pcr=row.pcr,
            state=msgspec.json.decode(row.state, type=LogState),
            clock=row.clock,
            reset_count=row.reset_count,
            restart_count=row.restart_count,
        )
    return NodeRecord(
        id=row.id,
        group=row.group_name,
        mode=row.mode,
        address=row.address,
        ak_public=row.ak_public,
        spki_sha256=row.spki_sha256,
        boot_pcrs=msgspec.json.decode(row.boot_pcrs, type=dict[int, str]),
        interval_s=row.interval_s,
        version=row.group_version,
        verified=verified,
        log_state=row.state,
        status=row.status,
        checks=row.checks,
    )


async def claim(connection: AsyncConnection, now_us: int, limit: int) -> list[Due]:
    """Take the nodes that are due, the longest waiting first (rule 1)."""
    query = (
        select(polls.c.node, polls.c.due_us, polls.c.failures, groups.c.interval_s)
        .join(nodes, nodes.c.id == polls.c.node)
        .join(groups, groups.c.name == nodes.c.group_name)
        .where(polls.c.due_us <= now_us)
        .order_by(polls.c.due_us)
        .limit(limit)
        .with_for_update(skip_locked=True, of=polls)
    )
    rows = (await connection.execute(query)).all()
    if rows:
        await connection.execute(
            update(polls).where(polls.c.node == bindparam("who")).values(due_us=bindparam("next")),
            [{"who": row.node, "next": _next(row, now_us)} for row in rows],
        )
    return [Due(row.node, now_us - row.due_us) for row in rows]


def _next(row: Row[Any, Any, Any, Any], now_us: int) -> int:
    """Return when a node is due again: an interval later, more for one that does not answer, with jitter."""
    interval_us = row.interval_s * 1_000_000
    wait_us = interval_us * min(2**row.failures, MAX_BACKOFF)
    jitter_us = secrets.randbelow(int(interval_us * JITTER) + 1)
    # From when it was due, so that a fleet stays spread; from now where a whole interval was missed.
    start_us = row.due_us if row.due_us + interval_us > now_us else now_us
    return int(start_us + wait_us + jitter_us)


async def hurry(connection: AsyncConnection, group: str, now_us: int) -> None:
    """Make all nodes of a group due within a tenth of their interval: what they are held against has changed."""
    interval_s = (await connection.execute(select(groups.c.interval_s).where(groups.c.name == group))).scalar_one()
    mine = select(nodes.c.id).where(nodes.c.group_name == group)
    latest = now_us + int(interval_s * 1_000_000 * JITTER)
    await connection.execute(update(polls).where(polls.c.node.in_(mine), polls.c.due_us > latest).values(due_us=latest))


async def answered(connection: AsyncConnection, who: list[str], now_us: int) -> None:
    """Note that nodes were reached, whatever they said."""
    await connection.execute(
        update(polls).where(polls.c.node == bindparam("who")).values(failures=0, contact_us=now_us, error=None),
        [{"who": node} for node in who],
    )


async def silent(connection: AsyncConnection, node: str, error: str) -> bool:
    """Note that a node was not reached; returns whether that is news."""
    row = (await connection.execute(select(polls.c.failures).where(polls.c.node == node))).one_or_none()
    if row is None:
        return False
    await connection.execute(
        update(polls).where(polls.c.node == node).values(failures=row.failures + 1, error=error[:512])
    )
    return bool(row.failures == 0)


async def save(connection: AsyncConnection, found: Appraised) -> None:
    """Keep an appraisal: the node's state, its verified log where it grew, and history where something changed."""
    before, verified = found.before, found.verified
    values: dict[str, Any] = {
        "status": found.status,
        "appraised_us": found.at_us,
        "nonce": found.nonce,
        "version": found.version,
        "checks": found.checks,
        "claims": found.claims,
    }
    if found.changed:
        values["since_us"] = found.at_us
        await connection.execute(
            insert(results).values(
                node=before.id, status=found.status, checks=found.checks, version=found.version, first_us=found.at_us
            )
        )
    if verified is not None:
        values |= {
            "log_index": verified.index,
            "pcr": verified.pcr,
            "clock": verified.clock,
            "reset_count": verified.reset_count,
            "restart_count": verified.restart_count,
        }
        if before.verified is None or verified.pcr != before.verified.pcr:
            await _save_log(connection, before, verified.state)
    if before.status is None:
        await connection.execute(insert(states).values(node=before.id, **values))
    else:
        await connection.execute(update(states).where(states.c.node == before.id).values(**values))


async def _save_log(connection: AsyncConnection, before: NodeRecord, state: LogState) -> None:
    data = msgspec.json.encode(state)
    if before.log_state is None:
        await connection.execute(insert(logs).values(node=before.id, state=data))
    else:
        await connection.execute(update(logs).where(logs.c.node == before.id).values(state=data))


async def release(connection: AsyncConnection, node: str) -> None:
    """Forget a node; its history stays.

    Raises:
        PeerError: 404.
    """
    await connection.execute(delete(challenges).where(challenges.c.node == node))
    gone = await connection.execute(delete(nodes).where(nodes.c.id == node))
    if gone.rowcount == 0:
        raise PeerError(404, "not_enrolled", f"no node {node!r} is enrolled here")


async def table(connection: AsyncConnection, group: str | None, after: str, limit: int) -> list[dict[str, Any]]:
    """Return nodes in the order of their names, with their last result and whether they answer."""
    query = _rows().where(nodes.c.id > after).order_by(nodes.c.id).limit(limit)
    if group is not None:
        query = query.where(nodes.c.group_name == group)
    return [dict(row) for row in (await connection.execute(query)).mappings()]


async def row(connection: AsyncConnection, node: str) -> dict[str, Any]:
    """Return one node as :func:`table` does.

    Raises:
        PeerError: 404.
    """
    found = (await connection.execute(_rows().where(nodes.c.id == node))).mappings().one_or_none()
    if found is None:
        raise PeerError(404, "not_enrolled", f"no node {node!r} is enrolled here")
    return dict(found)


def _rows() -> Any:  # noqa: ANN401 -- as above
    return (
        select(
            nodes.c.id,
            nodes.c.group_name,
            nodes.c.labels,
            nodes.c.mode,
            nodes.c.address,
            nodes.c.enrolled_us,
            nodes.c.certificate_until_us,
            groups.c.interval_s,
            polls.c.due_us,
            polls.c.failures,
            polls.c.contact_us,
            polls.c.error,
            states.c.status,
            states.c.appraised_us,
            states.c.since_us,
            states.c.checks,
            states.c.claims,
            states.c.version,
            states.c.nonce,
            states.c.log_index,
        )
        .join(groups, groups.c.name == nodes.c.group_name)
        .join(polls, polls.c.node == nodes.c.id)
        .outerjoin(states, states.c.node == nodes.c.id)
    )


async def history(connection: AsyncConnection, node: str, limit: int) -> list[dict[str, Any]]:
    """Return a node's results, the newest first."""
    query = select(results).where(results.c.node == node).order_by(results.c.id.desc()).limit(limit)
    return [dict(row) for row in (await connection.execute(query)).mappings()]


async def count(connection: AsyncConnection) -> dict[str, int]:
    """Return how many nodes have each status; ``unreachable`` counts besides."""
    query = select(func.coalesce(states.c.status, "none"), func.count()).select_from(
        nodes.outerjoin(states, states.c.node == nodes.c.id)
    )
    rows = (await connection.execute(query.group_by(states.c.status))).all()
    unreachable = (await connection.execute(select(func.count()).where(polls.c.failures > 0))).scalar_one()
    return {**{str(status): int(number) for status, number in rows}, "unreachable": int(unreachable)}
