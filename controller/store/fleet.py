"""Nodes: who is enrolled, with what is known about each.

Rules:

1. A name and a TPM are enrolled once; a release by an operator frees both.
2. The state of a node's log, which may be large, is read only for who needs it (:func:`with_state`).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent.attest.appraisal import Verified
from agent.attest.findings import Judgement
from agent.attest.log_state import LogState
from agent.errors import PeerError
from controller.store.inserting import insert_new
from controller.store.schema import challenges, groups, logs, nodes, polls, states

__all__ = [
    "NewNode",
    "NodeRecord",
    "add",
    "certified",
    "check_free",
    "find",
    "interval_of",
    "late_us",
    "overtaken",
    "record",
    "records",
    "release",
    "row",
    "table",
    "with_state",
]


interval_of = func.coalesce(nodes.c.interval_s, groups.c.interval_s).label("interval_s")
"""A node's interval, in a query over ``nodes`` and ``groups``."""


def late_us(now_us: int, interval_s: int) -> int:
    """Return when a node that pushes now would be late."""
    return now_us + 2 * interval_s * 1_000_000


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
    status: str | None
    checks: str | None
    nonce: str | None  # of the last appraisal
    failures: int  # polls since it was reached


async def add(connection: AsyncConnection, node: NewNode, now_us: int) -> None:
    """Enrol a node.

    Raises:
        PeerError: 409, when its name or its TPM is enrolled already: an operator must release it first.
    """
    interval_s = (await connection.execute(select(groups.c.interval_s).where(groups.c.name == node.group))).scalar_one()
    row = {
        "id": node.id,
        "group_name": node.group,
        "labels": msgspec.json.encode(node.labels).decode(),
        "mode": node.mode,
        "address": node.address,
        "ek_sha256": node.ek_sha256,
        "ak_public": node.ak_public,
        "spki_sha256": node.spki_sha256,
        "boot_pcrs": msgspec.json.encode(node.boot_pcrs).decode(),
        "enrolled_us": now_us,
        "certificate_until_us": node.certificate_until_us,
    }
    if not await insert_new(connection, nodes, row):
        await check_free(connection, node.id, node.ek_sha256)
        raise PeerError(409, "enrolled_already", "its name or its TPM was enrolled until just now: begin again")
    if node.mode == "push":
        due_us = late_us(now_us, interval_s)
    else:  # Those that come together are spread over an interval.
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


async def certified(connection: AsyncConnection, node: str, spki_sha256: str, until_us: int) -> None:
    """Note a renewed certificate."""
    values = {"spki_sha256": spki_sha256, "certificate_until_us": until_us}
    await connection.execute(update(nodes).where(nodes.c.id == node).values(**values))


def records() -> Any:  # noqa: ANN401 -- a join of many columns has no short type
    """Return a query for what :func:`record` reads, without the states of logs."""
    return (
        select(
            nodes,
            interval_of.label("every_s"),
            groups.c.version.label("group_version"),
            polls.c.due_us,
            polls.c.failures,
            states,
        )
        .join(groups, groups.c.name == nodes.c.group_name)
        .join(polls, polls.c.node == nodes.c.id)
        .outerjoin(states, states.c.node == nodes.c.id)
    )


async def find(connection: AsyncConnection, node: str) -> NodeRecord:
    """Return one node.

    Raises:
        PeerError: 404.
    """
    row = (await connection.execute(records().where(nodes.c.id == node))).one_or_none()
    if row is None:
        raise PeerError(404, "not_enrolled", f"no node {node!r} is enrolled here")
    return record(row)


def record(row: Row[Any]) -> NodeRecord:
    """Read one row of :func:`records`."""
    verified = None
    if row.log_index is not None:
        verified = Verified(
            index=row.log_index,
            pcr=row.pcr,
            state=None,
            clock=row.clock,
            reset_count=row.reset_count,
            restart_count=row.restart_count,
            judgement=msgspec.json.decode(row.judgement, type=Judgement) if row.judgement else None,
        )
    return NodeRecord(
        id=row.id,
        group=row.group_name,
        mode=row.mode,
        address=row.address,
        ak_public=row.ak_public,
        spki_sha256=row.spki_sha256,
        boot_pcrs=msgspec.json.decode(row.boot_pcrs, type=dict[int, str]),
        interval_s=row.every_s,
        version=row.group_version,
        verified=verified,
        status=row.status,
        checks=row.checks,
        nonce=row.nonce,
        failures=row.failures,
    )


async def with_state(connection: AsyncConnection, node: NodeRecord) -> tuple[Verified | None, int]:
    """Return what is verified of a node's log with the state that it says, and how large that is, in bytes.

    Raises:
        PeerError: 409, when the node was appraised meanwhile.
    """
    if node.verified is None:
        return None, 0
    query = select(logs.c.state).join(states, states.c.node == logs.c.node)
    query = query.where(logs.c.node == node.id, states.c.pcr == node.verified.pcr)
    data = (await connection.execute(query)).scalar()
    if data is None:
        raise overtaken(node.id)
    return msgspec.structs.replace(node.verified, state=msgspec.json.decode(data, type=LogState)), len(data)


def overtaken(node: str) -> PeerError:
    """Return the refusal of an appraisal that came too late."""
    return PeerError(409, "overtaken", f"{node} was appraised by another meanwhile; that result stands")


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
            interval_of,
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
