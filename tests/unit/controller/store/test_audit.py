"""The controller's audit log on SQLite and on PostgreSQL: proofs of any record in a tree of any size, and what they read."""

import asyncio
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, event, select, text

from agent.audit.merkle import inclusion_proof, leaf_hash, tree_root, verify_inclusion
from agent.errors import PeerError
from controller.store import audit
from controller.store import database as database_module
from controller.store.database import Database
from controller.store.schema import audit as records
from controller.store.schema import audit_nodes


async def append(database: Database, count: int = 1) -> None:
    async with database.begin() as connection:
        for _ in range(count):
            await audit.append(connection, audit.AuditEntry(kind="test", principal="nobody"))


async def test_a_proof_is_that_of_the_whole_log(database: Database) -> None:
    """For each record of each tree up to 40 records: the same that is made of all leaves, and of the head that comes with it."""
    for size in range(1, 41):
        await append(database)
        async with database.begin() as connection:
            leaves = [leaf_hash(one) for one in await connection.scalars(select(records.c.record).order_by("sequence"))]
            for index in range(size):
                record, proof, head = await audit.prove(connection, index)
                assert leaf_hash(record) == leaves[index]
                assert proof == inclusion_proof(leaves, index)
                assert (head.size, head.root) == (size, tree_root(leaves).hex())


@pytest.mark.parametrize("index", [-1, 3])
async def test_what_is_not_there_is_not_proven(database: Database, index: int) -> None:
    """404, with the number of records."""
    await append(database, 3)
    async with database.begin() as connection:
        with pytest.raises(PeerError, match="has 3 records"):
            await audit.prove(connection, index)


async def test_a_proof_holds_while_records_are_appended(database: Database) -> None:
    """It is for the head that is returned with it."""
    await append(database, 20)

    async def prove() -> None:
        async with database.begin() as connection:
            record, proof, head = await audit.prove(connection, 7)
        verify_inclusion(leaf_hash(record), 7, head.size, proof, bytes.fromhex(head.root))

    await asyncio.gather(*(step() for _ in range(30) for step in (lambda: append(database), prove)))


async def test_a_proof_reads_as_many_rows_as_the_tree_is_deep(database: Database) -> None:
    """Of 1,500 records fewer than thirty rows are read."""
    await append(database, 1500)
    read: list[int] = []

    def count(_conn: Any, cursor: Any, *_: object) -> None:
        read.append(cursor.rowcount)

    async with database.begin() as connection:
        query = select(audit_nodes.c.level)
        kept = len((await connection.execute(query)).all())
        assert kept == 1500 - (1500).bit_count()
        event.listen(connection.sync_connection, "after_cursor_execute", count)
        for index in (0, 700, 1499):
            await audit.prove(connection, index)
    assert len(read) == 9
    assert all(number < 30 for number in read)  # SQLite says -1: it does not count what it selects


def _downgrade_to_three(connection: Connection) -> None:
    connection.execute(text("DROP TABLE audit_nodes"))
    connection.execute(text("UPDATE alembic_version SET version_num = '0003'"))


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(database_module._MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "0004")


async def test_a_log_of_before_is_proven_after_the_migration(database: Database) -> None:
    """Its nodes are made of its records."""
    await append(database, 2100)
    async with database.begin() as connection:
        before = (await connection.execute(select(audit_nodes).order_by("level", "position"))).all()
        await connection.run_sync(_downgrade_to_three)
        await connection.run_sync(_upgrade)
        after = (await connection.execute(select(audit_nodes).order_by("level", "position"))).all()
        assert after == before
        record, proof, head = await audit.prove(connection, 1234)
    verify_inclusion(leaf_hash(record), 1234, head.size, proof, bytes.fromhex(head.root))
