"""Join tokens, enrolments on their way, and challenges: all single-use, all expiring.

Rules: a secret is stored as its SHA-256; what is used is marked or deleted in the transaction that uses it, so of two that come together one wins.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
from sqlalchemy import and_, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent.errors import PeerError
from controller.store.schema import challenges, enrolments, groups, tokens

__all__ = [
    "Enrolment",
    "Token",
    "add_challenge",
    "add_enrolment",
    "add_token",
    "list_tokens",
    "revoke_token",
    "sweep",
    "take_challenge",
    "take_enrolment",
    "use_token",
    "valid_token",
]

TOKEN_KEPT_US = 30 * 86_400 * 1_000_000  # after its time is over
MAX_CHALLENGES = 4  # open at a time for one node, of each kind


@dataclass(frozen=True, slots=True)
class Token:
    """A join token as it is stored."""

    id: str
    secret_sha256: str
    group_name: str
    node: str | None
    labels: dict[str, str]
    created_us: int
    created_by: str
    expires_us: int


@dataclass(frozen=True, slots=True)
class Enrolment:
    """Between the first and the second call."""

    id: str
    token: str
    node: str
    mode: str
    address: str | None
    ek_sha256: str
    ak_public: bytes
    secret_sha256: str
    nonce: str
    expires_us: int


def _refused(words: str) -> PeerError:
    return PeerError(403, "join_token", words)


async def add_token(connection: AsyncConnection, token: Token) -> None:
    """Keep a new token.

    Raises:
        PeerError: 404, when there is no such group.
    """
    if (await connection.execute(select(groups.c.name).where(groups.c.name == token.group_name))).scalar() is None:
        raise PeerError(
            404, "no_group", f"there is no group {token.group_name!r}; `edgewarden reference approve` makes one"
        )
    await connection.execute(
        insert(tokens).values(**{**asdict(token), "labels": msgspec.json.encode(token.labels).decode()})
    )


async def valid_token(connection: AsyncConnection, name: str, secret: bytes, node: str, now_us: int) -> Token:
    """Return the token that a node shows, if it may enrol with it.

    Raises:
        PeerError: 403; the caller learns no more than it must.
    """
    row = (await connection.execute(select(tokens).where(tokens.c.id == name).with_for_update())).one_or_none()
    digest = hashlib.sha256(secret).hexdigest()
    if not hmac.compare_digest(digest, row.secret_sha256 if row else "0" * 64) or row is None:
        raise _refused("no such join token")
    if row.used_us is not None:
        raise _refused("the join token was used already: create another")
    if row.expires_us <= now_us:
        raise _refused("the join token has expired: create another")
    if row.node is not None and row.node != node:
        raise _refused("the join token is for another node")
    return Token(
        id=row.id,
        secret_sha256=row.secret_sha256,
        group_name=row.group_name,
        node=row.node,
        labels=msgspec.json.decode(row.labels, type=dict[str, str]),
        created_us=row.created_us,
        created_by=row.created_by,
        expires_us=row.expires_us,
    )


async def use_token(connection: AsyncConnection, name: str, node: str, now_us: int) -> Token:
    """Use a token up.

    Raises:
        PeerError: 403, when another enrolment was faster.
    """
    used = await connection.execute(
        update(tokens).where(tokens.c.id == name, tokens.c.used_us.is_(None)).values(used_us=now_us, used_by=node)
    )
    if used.rowcount != 1:
        raise _refused("the join token was used already: create another")
    row = (await connection.execute(select(tokens).where(tokens.c.id == name))).one()
    labels = msgspec.json.decode(row.labels, type=dict[str, str])
    return Token(
        row.id, row.secret_sha256, row.group_name, row.node, labels, row.created_us, row.created_by, row.expires_us
    )


async def list_tokens(connection: AsyncConnection, limit: int) -> list[dict[str, Any]]:
    """Return tokens without their digests, the newest first."""
    columns = [column for column in tokens.c if column.name != "secret_sha256"]
    rows = await connection.execute(select(*columns).order_by(tokens.c.created_us.desc()).limit(limit))
    return [{**row, "labels": msgspec.json.decode(row["labels"])} for row in rows.mappings()]


async def revoke_token(connection: AsyncConnection, name: str, now_us: int) -> None:
    """End a token that was not used, and enrolments that have begun with it.

    Raises:
        PeerError: 404 when there is none, 409 when it was used or has ended already.
    """
    if (await connection.execute(select(tokens.c.id).where(tokens.c.id == name).with_for_update())).scalar() is None:
        raise PeerError(404, "no_token", f"there is no join token {name!r}")
    still = (tokens.c.id == name, tokens.c.used_us.is_(None), tokens.c.expires_us > now_us)
    if (await connection.execute(update(tokens).where(*still).values(expires_us=now_us))).rowcount != 1:
        raise PeerError(
            409, "token_ended", "the join token was used, or its time is over; release the node that used it"
        )
    await connection.execute(delete(enrolments).where(enrolments.c.token == name))


async def add_enrolment(connection: AsyncConnection, enrolment: Enrolment) -> None:
    """Keep an enrolment until its second call."""
    await connection.execute(insert(enrolments).values(**asdict(enrolment)))


async def take_enrolment(connection: AsyncConnection, name: str, now_us: int) -> Enrolment:
    """Take an enrolment up, once.

    Raises:
        PeerError: 404.
    """
    row = (await connection.execute(select(enrolments).where(enrolments.c.id == name).with_for_update())).one_or_none()
    if row is None or row.expires_us <= now_us:
        raise PeerError(404, "no_enrolment", "no such enrolment, or its time is over: begin again")
    await connection.execute(delete(enrolments).where(enrolments.c.id == name))
    return Enrolment(**dict(row._mapping))  # noqa: SLF001 -- SQLAlchemy's public name for it


async def add_challenge(connection: AsyncConnection, node: str, nonce: str, expires_us: int, *, own: bool) -> None:
    """Keep a nonce for a node; the oldest open ones go, of those that it has asked for itself (``own``) or of those that anybody may have asked for."""
    mine = and_(challenges.c.node == node, challenges.c.own.is_(own))
    kept = select(challenges.c.nonce).where(mine).order_by(challenges.c.expires_us.desc()).limit(MAX_CHALLENGES - 1)
    await connection.execute(delete(challenges).where(mine, challenges.c.nonce.not_in(kept)))
    await connection.execute(insert(challenges).values(nonce=nonce, node=node, expires_us=expires_us, own=own))


async def take_challenge(connection: AsyncConnection, node: str, nonce: str, now_us: int) -> None:
    """Use a nonce up.

    Raises:
        PeerError: 409, when it is not an open one of this node.
    """
    gone = await connection.execute(
        delete(challenges).where(
            challenges.c.nonce == nonce, challenges.c.node == node, challenges.c.expires_us > now_us
        )
    )
    if gone.rowcount != 1:
        raise PeerError(409, "nonce", "this nonce is not open: ask for a challenge again")


async def sweep(connection: AsyncConnection, now_us: int) -> None:
    """Delete what has expired; of join tokens it is known for some time yet what became of them."""
    await connection.execute(delete(tokens).where(tokens.c.expires_us <= now_us - TOKEN_KEPT_US))
    await connection.execute(delete(enrolments).where(enrolments.c.expires_us <= now_us))
    await connection.execute(delete(challenges).where(challenges.c.expires_us <= now_us))
