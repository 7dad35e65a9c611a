"""The controller's audit log: a Merkle tree (RFC 6962) over records in the database, written with what they speak of.

Rules:

1. A record is appended in the transaction of its effect: there is no change without its record, and no record of a change that was rolled back.
2. The row of the tree's head is locked while records are appended, so replicas number them without gap.
3. A record is canonical JSON; nothing is ever updated or deleted.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent import clock
from agent.audit.merkle import HASH_BYTES, Frontier, inclusion_proof, leaf_hash
from agent.errors import PeerError
from agent.records import canonical
from controller.store.schema import audit, audit_head

__all__ = ["AuditEntry", "AuditHead", "append", "head", "prove", "read"]

MAX_READ = 1000  # records an answer
MAX_WORDS_CHARS = 512


class AuditEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that was done, or refused.

    Attributes:
        kind: what it is about, for example ``node.enrol``.
        principal: who asked: an admin's name, ``node/<id>`` or ``controller``.
        node: whom it concerns.
        check: first check that failed, where something was refused.
    """

    kind: str
    principal: str
    outcome: Literal["ok", "denied", "refused", "failed"] = "ok"
    node: str = ""
    check: str = ""
    words: str = ""
    detail: dict[str, Any] = {}


class AuditHead(msgspec.Struct, frozen=True):
    """Size and root of the tree."""

    size: int
    root: str


async def append(connection: AsyncConnection, entry: AuditEntry) -> None:
    """Append a record in the caller's transaction."""
    row = (await connection.execute(select(audit_head).with_for_update())).one()
    plain: dict[str, Any] = msgspec.to_builtins(entry)
    words = {"words": entry.words[:MAX_WORDS_CHARS]} if entry.words else {}
    record = canonical(
        {**plain, **words, "outcome": entry.outcome, "sequence": row.size, "time": clock.rfc3339(clock.now_us())}
    )
    tree = Frontier(row.size, _split(row.peaks))
    tree.append(leaf_hash(record))
    await connection.execute(audit.insert().values(sequence=row.size, record=record))
    await connection.execute(update(audit_head).values(size=tree.size, peaks=b"".join(tree.peaks)))


async def head(connection: AsyncConnection) -> AuditHead:
    """Return size and root."""
    row = (await connection.execute(select(audit_head))).one()
    return AuditHead(row.size, Frontier(row.size, _split(row.peaks)).root().hex())


async def read(connection: AsyncConnection, start: int, limit: int) -> list[dict[str, Any]]:
    """Return records in order, as they were written."""
    query = select(audit.c.record).where(audit.c.sequence >= start).order_by(audit.c.sequence)
    rows = await connection.execute(query.limit(min(limit, MAX_READ)))
    return [msgspec.json.decode(row.record) for row in rows]


async def prove(connection: AsyncConnection, sequence: int) -> tuple[bytes, list[bytes]]:
    """Return a record and the proof that the tree holds it.

    Raises:
        PeerError: 404.
    """
    rows = (await connection.execute(select(audit.c.record).order_by(audit.c.sequence))).all()
    if not 0 <= sequence < len(rows):
        raise PeerError(404, "not_found", f"the audit log has {len(rows)} records")
    return rows[sequence].record, inclusion_proof([leaf_hash(row.record) for row in rows], sequence)


def _split(peaks: bytes) -> list[bytes]:
    return [peaks[at : at + HASH_BYTES] for at in range(0, len(peaks), HASH_BYTES)]
