"""Admins by the key of their certificate."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent.errors import PeerError
from controller.store.inserting import insert_new
from controller.store.schema import admins

__all__ = ["add", "list_admins", "revoke", "role_of"]


async def add(
    connection: AsyncConnection, name: str, role: str, spki_sha256: str, *, expires_us: int, by: str, now_us: int
) -> None:
    """Make an admin.

    Raises:
        PeerError: 409, when the name is taken or another has this key; neither is given again after a revocation.
    """
    row = {"name": name, "role": role, "spki_sha256": spki_sha256, "expires_us": expires_us}
    if not await insert_new(connection, admins, row | {"created_us": now_us, "created_by": by}):
        raise PeerError(409, "admin_exists", f"there is an admin {name!r} already, or one with this key")


async def role_of(connection: AsyncConnection, spki_sha256: str, now_us: int) -> tuple[str, str] | None:
    """Return name and role of the admin with this key, unless it was revoked or has expired."""
    query = select(admins.c.name, admins.c.role).where(
        admins.c.spki_sha256 == spki_sha256, admins.c.revoked_us.is_(None), admins.c.expires_us > now_us
    )
    row = (await connection.execute(query)).one_or_none()
    return (row.name, row.role) if row else None


async def revoke(connection: AsyncConnection, name: str, now_us: int) -> None:
    """Take an admin's access away, at once.

    Raises:
        PeerError: 404.
    """
    changed = await connection.execute(
        update(admins).where(admins.c.name == name, admins.c.revoked_us.is_(None)).values(revoked_us=now_us)
    )
    if changed.rowcount == 0:
        raise PeerError(404, "no_admin", f"there is no active admin {name!r}")


async def list_admins(connection: AsyncConnection) -> list[dict[str, Any]]:
    """Return all admins, revoked ones too."""
    return [dict(row) for row in (await connection.execute(select(admins).order_by(admins.c.name))).mappings()]
