"""Reference Values: one line of versions for each group of nodes. A version never changes."""

from __future__ import annotations

from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent.attest.reference import ReferenceValues
from agent.errors import PeerError
from controller.store.inserting import insert_new
from controller.store.schema import groups, reference_values

__all__ = ["add_group", "current", "get", "list_groups", "list_versions", "put"]


async def add_group(connection: AsyncConnection, name: str, interval_s: int) -> None:
    """Make a group, if there is none of that name."""
    await insert_new(connection, groups, {"name": name, "interval_s": interval_s, "version": 0})


async def current(connection: AsyncConnection, group: str) -> tuple[int, ReferenceValues | None]:
    """Return the version in force and its values, None before the first approval; the group is locked against another change.

    Raises:
        PeerError: 404.
    """
    row = (await connection.execute(select(groups).where(groups.c.name == group).with_for_update())).one_or_none()
    if row is None:
        raise PeerError(404, "no_group", f"there is no group {group!r}")
    return row.version, await get(connection, group, row.version) if row.version else None


async def get(connection: AsyncConnection, group: str, version: int) -> ReferenceValues:
    """Return one version.

    Raises:
        PeerError: 404.
    """
    key = (reference_values.c.group_name == group, reference_values.c.version == version)
    document = (await connection.execute(select(reference_values.c.document).where(*key))).scalar()
    if document is None:
        raise PeerError(404, "no_version", f"group {group!r} has no Reference Values of version {version}")
    return ReferenceValues.decode(document)


async def put(
    connection: AsyncConnection, group: str, version: int, values: ReferenceValues, *, change: str, by: str, now_us: int
) -> int:
    """Put the next version in force; returns its number. ``version`` is the one that it follows."""
    await connection.execute(
        insert(reference_values).values(
            group_name=group,
            version=version + 1,
            document=values.encode(),
            created_us=now_us,
            created_by=by,
            change=change,
        )
    )
    await connection.execute(update(groups).where(groups.c.name == group).values(version=version + 1))
    return version + 1


async def list_groups(connection: AsyncConnection) -> list[dict[str, Any]]:
    """Return all groups."""
    return [dict(row) for row in (await connection.execute(select(groups).order_by(groups.c.name))).mappings()]


async def list_versions(connection: AsyncConnection, group: str, limit: int) -> list[dict[str, Any]]:
    """Return a group's versions without their documents, the newest first."""
    columns = [column for column in reference_values.c if column.name != "document"]
    query = select(*columns).where(reference_values.c.group_name == group)
    rows = await connection.execute(query.order_by(reference_values.c.version.desc()).limit(limit))
    return [dict(row) for row in rows.mappings()]
