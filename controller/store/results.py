"""What was found at a node's last appraisal, and the history of that.

Rules:

1. Of two appraisals that cross, the one of the older quote is not kept: the TPM's clock orders quotes as the log orders its entries.
2. The log's state is written only where the log grew.
3. The history has a row only where a status or a reason changed; how long it held is seen from the next row. Changed against what is kept now, not
   against what an appraisal began with: of two that cross, the second would else hide what it changes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from sqlalchemy import BigInteger, ColumnElement, Update, bindparam, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent.attest.appraisal import Verified
from agent.attest.log_state import LogState
from controller.store.fleet import NodeRecord, overtaken
from controller.store.schema import logs, nodes, results, states

__all__ = ["Appraised", "history", "refresh", "save"]


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


async def save(connection: AsyncConnection, found: Appraised) -> Appraised:
    """Keep an appraisal: the node's state, its verified log where it grew, and history where something changed.

    Returns:
        It, with what stands before it.

    Raises:
        PeerError: 409, when the node was appraised meanwhile by a newer quote (rule 1).
    """
    before, verified = found.before, found.verified
    if before.status is None:
        await connection.execute(insert(states).values(node=before.id, since_us=found.at_us, **_columns(found)))
    elif not await _update(connection, found, guarded=True):
        found = await _on_top(connection, found)
        await _update(connection, found, guarded=False)
    if verified is not None and verified.state is not None:
        await _save_log(connection, before.id, verified.state)
    if found.changed:
        await connection.execute(
            insert(results).values(
                node=before.id, status=found.status, checks=found.checks, version=found.version, first_us=found.at_us
            )
        )
    return found


async def refresh(connection: AsyncConnection, found: Appraised) -> bool:
    """Keep an appraisal that found what the last one found, by one statement, which is a transaction by itself.

    Returns:
        False where it did not, or another was kept meanwhile: nothing was written, and :func:`save` is due.
    """
    grown = found.verified is not None and found.verified.state is not None
    return not grown and not found.changed and await _update(connection, found, guarded=True)


async def _update(connection: AsyncConnection, found: Appraised, *, guarded: bool) -> bool:
    """Write the state; guarded: only if what the appraisal began with is still what is kept."""
    values = _columns(found) | ({"since_us": found.at_us} if found.changed else {})
    where = {"of_node": found.before.id} | ({"of_nonce": found.before.nonce} if guarded else {})
    changed = await connection.execute(_statement(tuple(values), guarded=guarded), values | where)
    return changed.rowcount > 0


@functools.cache  # the making of a statement takes longer than its execution
def _statement(columns: tuple[str, ...], *, guarded: bool) -> Update:
    where = [states.c.node == bindparam("of_node")]
    if guarded:
        where.append(states.c.nonce == bindparam("of_nonce"))
    return update(states).where(*where).values({name: bindparam(name) for name in columns})


async def _on_top(connection: AsyncConnection, found: Appraised) -> Appraised:
    """Put an appraisal on top of the one that was kept since it began."""
    query = select(states.c.status, states.c.checks).join(nodes, nodes.c.id == states.c.node)
    # Of the same key: who enrolled under this name since then is another.
    query = query.where(nodes.c.ak_public == found.before.ak_public, *_not_older(found.before.id, found.verified))
    kept = (await connection.execute(query.with_for_update(of=states))).one_or_none()
    if kept is None:
        raise overtaken(found.before.id)
    return replace(found, before=replace(found.before, status=kept.status, checks=kept.checks))


def _columns(found: Appraised) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "status": found.status,
        "appraised_us": found.at_us,
        "nonce": found.nonce,
        "version": found.version,
        "checks": found.checks,
        "claims": found.claims,
    }
    return columns | ({} if found.verified is None else _verified_columns(found.before.verified, found.verified))


def _verified_columns(before: Verified | None, now: Verified) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "log_index": now.index,
        "pcr": now.pcr,
        "clock": now.clock,
        "reset_count": now.reset_count,
        "restart_count": now.restart_count,
    }
    if before is None or now.judgement is not before.judgement:
        columns["judgement"] = msgspec.json.encode(now.judgement).decode()
    return columns


def _not_older(node: str, verified: Verified | None) -> tuple[ColumnElement[bool], ...]:
    mine = states.c.node == node
    if verified is None:
        return (mine,)
    kept = tuple_(states.c.reset_count, states.c.clock)
    return mine, states.c.log_index.is_(None) | (
        kept <= tuple_(verified.reset_count, verified.clock, types=[BigInteger, BigInteger])
    )


async def _save_log(connection: AsyncConnection, node: str, state: LogState) -> None:
    data = msgspec.json.encode(state)
    written = await connection.execute(update(logs).where(logs.c.node == node).values(state=data))
    if written.rowcount == 0:
        await connection.execute(insert(logs).values(node=node, state=data))


async def history(connection: AsyncConnection, node: str, limit: int) -> list[dict[str, Any]]:
    """Return a node's results, the newest first."""
    query = select(results).where(results.c.node == node).order_by(results.c.id.desc()).limit(limit)
    return [dict(row) for row in (await connection.execute(query)).mappings()]
