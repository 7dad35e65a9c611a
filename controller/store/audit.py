"""The controller's audit log: a Merkle tree (RFC 6962) over records in the database, written with what they speak of.

Rules:

1. A record is appended in the transaction of its effect: there is no change without its record, and no record of a change that was rolled back.
2. The row of the tree's head is locked while records are appended, so replicas number them without gap.
3. A record is canonical JSON; nothing is ever updated or deleted.
4. The root of every complete subtree is kept, one row a record on average; so a proof reads as many rows as the tree is deep, however long the log.
5. A proof is for the tree whose head is returned with it, whatever is appended meanwhile.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from sqlalchemy import select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent import clock
from agent.audit.merkle import HASH_BYTES, Frontier, leaf_hash, node_hash
from agent.errors import PeerError
from agent.records import canonical
from controller.store.schema import audit, audit_head, audit_nodes

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
    peaks = list(Frontier(row.size, _split(row.peaks)).peaks)
    node, level = leaf_hash(record), 0
    nodes = []
    while row.size >> level & 1:
        node, level = node_hash(peaks.pop(), node), level + 1
        nodes.append({"level": level, "position": row.size >> level, "hash": node})
    await connection.execute(audit.insert().values(sequence=row.size, record=record))
    if nodes:
        await connection.execute(audit_nodes.insert(), nodes)
    await connection.execute(update(audit_head).values(size=row.size + 1, peaks=b"".join([*peaks, node])))


async def head(connection: AsyncConnection) -> AuditHead:
    """Return size and root."""
    row = (await connection.execute(select(audit_head))).one()
    return AuditHead(row.size, Frontier(row.size, _split(row.peaks)).root().hex())


async def read(connection: AsyncConnection, start: int, limit: int) -> list[dict[str, Any]]:
    """Return records in order, as they were written."""
    query = select(audit.c.record).where(audit.c.sequence >= start).order_by(audit.c.sequence)
    rows = await connection.execute(query.limit(min(limit, MAX_READ)))
    return [msgspec.json.decode(row.record) for row in rows]


async def prove(connection: AsyncConnection, sequence: int) -> tuple[bytes, list[bytes], AuditHead]:
    """Return a record, the proof that a tree holds it (RFC 6962, section 2.1.1), and that tree's head.

    Raises:
        PeerError: 404.
    """
    now = await head(connection)
    if not 0 <= sequence < now.size:
        raise PeerError(404, "not_found", f"the audit log has {now.size} records")
    siblings = [_subtrees(start, end) for start, end in _siblings(sequence, now.size)]
    wanted = {node for nodes in siblings for node in nodes}
    leaves = [position for level, position in wanted if level == 0]
    query = select(audit.c.sequence, audit.c.record).where(audit.c.sequence.in_([sequence, *leaves]))
    records = {row.sequence: row.record for row in await connection.execute(query)}
    inner = tuple_(audit_nodes.c.level, audit_nodes.c.position).in_([node for node in wanted if node[0]])
    hashes = {(row.level, row.position): row.hash for row in await connection.execute(select(audit_nodes).where(inner))}
    hashes |= {(0, position): leaf_hash(records[position]) for position in leaves}
    proof = []
    for nodes in siblings:
        *rest, root = (hashes[node] for node in nodes)
        for left in reversed(rest):
            root = node_hash(left, root)
        proof.append(root)
    return records[sequence], proof, now


def _siblings(index: int, size: int) -> list[tuple[int, int]]:
    """Return the ranges of records whose hashes are the path of a leaf, the nearest to it first."""
    path = []
    start, end = 0, size
    while end - start > 1:
        middle = start + (1 << (end - start - 1).bit_length() - 1)
        if index < middle:
            path.append((middle, end))
            end = middle
        else:
            path.append((start, middle))
            start = middle
    return path[::-1]


def _subtrees(start: int, end: int) -> list[tuple[int, int]]:
    """Return level and position of the complete subtrees that make a range of such a path, the largest first."""
    found = []
    while start < end:
        level = (end - start).bit_length() - 1
        found.append((level, start >> level))
        start += 1 << level
    return found


def _split(peaks: bytes) -> list[bytes]:
    return [peaks[at : at + HASH_BYTES] for at in range(0, len(peaks), HASH_BYTES)]
