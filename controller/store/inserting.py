"""One rule for rows that two may write at once: the database's constraints decide who was first, and the other learns it as an answer, not as an error.

A look before the insert decides nothing: on PostgreSQL two transactions look, see no row, and both insert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["insert_new"]


async def insert_new(connection: AsyncConnection, table: Table, values: Mapping[str, Any]) -> bool:
    """Insert a row unless one that is there stands against it, by whatever is unique; returns whether it was inserted.

    One of a transaction that has not ended yet is waited for. When False is returned, the row that was first can be read.
    """
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    done = await connection.execute(dialect.insert(table).values(**values).on_conflict_do_nothing())
    return done.rowcount == 1
