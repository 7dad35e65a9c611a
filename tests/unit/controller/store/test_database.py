"""The database's opening: its tables, its lock, its failures, on SQLite and on PostgreSQL."""

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, func, insert, select, text

from agent.errors import HostError
from controller.settings import DatabaseSettings
from controller.store.database import Database, StoreError
from controller.store.schema import groups, metadata
from tests.support.postgres import PostgresServer


def sqlite_settings(tmp_path: Path) -> DatabaseSettings:
    return DatabaseSettings(url=f"sqlite+aiosqlite:///{tmp_path / 'controller.db'}")


def differences(connection: Connection) -> list[object]:
    return list(compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata))


async def test_migrations_make_the_schema(database: Database) -> None:
    """The migrations give exactly the tables of the schema."""
    async with database.begin() as connection:
        assert await connection.run_sync(differences) == []


async def test_difference_is_found(database: Database) -> None:
    """A table that lost a column is a difference, so an empty list says something."""
    async with database.begin() as connection:
        await connection.execute(text("ALTER TABLE groups DROP COLUMN version"))
        assert await connection.run_sync(differences) != []


async def test_tables_of_a_later_version_are_not_touched(tmp_path: Path) -> None:
    """A program that meets tables which it does not know says so, and changes nothing."""
    settings = sqlite_settings(tmp_path)
    database = await Database.open(settings)
    async with database.begin() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    await database.close()
    for _ in range(2):  # the file's lock is free again after each
        with pytest.raises(StoreError, match=r"its tables are not of this program's line of versions: .*9999"):
            await Database.open(settings)


async def test_error_rolls_back(database: Database) -> None:
    """A transaction that ends by an error leaves nothing behind."""

    async def fail() -> None:
        async with database.begin() as connection:
            await connection.execute(groups.insert().values(name="edge", interval_s=60, version=0))
            raise HostError("no")

    with pytest.raises(HostError, match="no"):
        await fail()
    async with database.begin() as connection:
        assert await connection.scalar(select(func.count()).select_from(groups)) == 0


async def test_second_opener_of_sqlite_is_refused(tmp_path: Path) -> None:
    """A second replica can't open the same SQLite file; after the first one closed, it can, and finds the rows."""
    first = await Database.open(sqlite_settings(tmp_path))
    try:
        async with first.begin() as connection:
            await connection.execute(groups.insert().values(name="edge", interval_s=60, version=0))
        with pytest.raises(StoreError, match="another controller uses"):
            await Database.open(sqlite_settings(tmp_path))
    finally:
        await first.close()
    second = await Database.open(sqlite_settings(tmp_path))
    try:
        async with second.begin() as connection:
            assert await connection.scalar(select(groups.c.name)) == "edge"
    finally:
        await second.close()


async def test_stopped_server_is_a_store_error(postgres: PostgresServer, postgres_url: str) -> None:
    """A server that went away is a StoreError, for an open connection and for a new one, until it is back."""
    database = await Database.open(DatabaseSettings(url=postgres_url))
    try:
        postgres.stop()
        try:
            for _ in range(2):
                with pytest.raises(StoreError):
                    async with database.begin() as connection:
                        await connection.execute(select(groups))
            with pytest.raises(StoreError):
                await Database.open(DatabaseSettings(url=postgres_url))
        finally:
            postgres.start()
        async with database.begin() as connection:
            assert (await connection.execute(select(groups))).all() == []
    finally:
        await database.close()


async def test_refused_statement_is_a_store_error(database: Database) -> None:
    """A statement that the database refuses is a StoreError that names the kind of the refusal."""

    async def twice() -> None:
        async with database.begin() as connection:
            for _ in range(2):
                await connection.execute(groups.insert().values(name="edge", interval_s=60, version=0))

    with pytest.raises(StoreError, match=r"database: .*(IntegrityError|UniqueViolation)"):
        await twice()


async def test_missing_directory_is_a_store_error(tmp_path: Path) -> None:
    """A SQLite file in a directory that is not there is a StoreError that names it."""
    with pytest.raises(StoreError, match=r"absent/controller\.db: No such file"):
        await Database.open(sqlite_settings(tmp_path / "absent"))


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_a_statement_alone_is_durable(kind, request, tmp_path):
    """Without a transaction around it, it is there for another connection, and after the first one has ended."""
    url = request.getfixturevalue("postgres_url") if kind == "postgresql" else f"sqlite+aiosqlite:///{tmp_path}/c.db"
    database = await Database.open(DatabaseSettings(url=url))
    async with database.alone() as connection:
        await connection.execute(insert(groups).values(name="g", interval_s=1, version=0))
    await database.close()
    database = await Database.open(DatabaseSettings(url=url))
    async with database.begin() as connection:
        assert (await connection.execute(select(groups.c.name))).scalars().all() == ["g"]
    await database.close()
