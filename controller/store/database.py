"""The connection to the database and its migrations.

Rules:

1. On SQLite one replica: a lock beside the file refuses a second one. A write transaction takes SQLite's lock at its begin.
2. Everything that belongs together is written in one transaction; a transaction that ended is durable.
3. A failure of the database is a :class:`StoreError`, a HostError: it is nobody's Evidence that is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from agent.errors import ConfigError, HostError
from controller.settings import DatabaseSettings, database_url

__all__ = ["Database", "StoreError"]

CONNECT_TIMEOUT_S = 10
STATEMENT_TIMEOUT_S = 30
_MIGRATIONS = Path(__file__).parent / "migrations"


class StoreError(HostError):
    """The database does not do its part."""


class Database:
    """One replica's way to the state. Make it with :meth:`open`.

    Attributes:
        errors: transactions that the database failed, for the metrics.
    """

    def __init__(self, engine: AsyncEngine, lock: int | None) -> None:
        self._engine = engine
        self._by_statement = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._lock = lock
        self._turn = asyncio.Lock() if engine.dialect.name == "sqlite" else contextlib.nullcontext()
        self.is_sqlite = engine.dialect.name == "sqlite"
        self.errors = 0

    @classmethod
    async def open(cls, settings: DatabaseSettings) -> Database:
        """Connect and bring the tables to this version.

        Raises:
            ConfigError: the URL is of no use.
            StoreError: the database can't be reached, or another replica has this SQLite file.
        """
        url = database_url(settings)
        lock = _lock(Path(url.database or "")) if settings.is_sqlite else None
        try:
            if settings.is_sqlite:
                engine = create_async_engine(url, poolclass=StaticPool, connect_args={"timeout": CONNECT_TIMEOUT_S})
                _prepare_sqlite(engine)
            else:
                engine = create_async_engine(
                    url,
                    pool_size=settings.connections,
                    max_overflow=0,
                    pool_pre_ping=False,
                    connect_args={
                        "timeout": CONNECT_TIMEOUT_S,
                        "command_timeout": STATEMENT_TIMEOUT_S,
                        "server_settings": {"application_name": "edgewarden-controller"},
                        **_tls(settings.ca),
                    },
                )
            database = cls(engine, lock)
            lock = None  # the database's from now on
            try:
                async with database.begin() as connection:
                    await connection.run_sync(_upgrade)
            except CommandError as error:
                await database.close()
                raise StoreError(f"database: its tables are not of this program's line of versions: {error}") from error
            except BaseException:
                await database.close()
                raise
        except BaseException:
            if lock is not None:
                os.close(lock)
            raise
        return database

    @contextlib.asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """Hold a transaction: committed at the end, rolled back on an error.

        Raises:
            StoreError: the database failed.
        """
        async with self._errors(), self._turn, self._engine.begin() as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[AsyncConnection]:
        """Hold a connection for one statement, which is a transaction by itself: two ways to PostgreSQL less.

        Raises:
            StoreError: the database failed.
        """
        if self.is_sqlite:  # a way to a file is short, and a transaction begins there in a way of our own
            async with self.begin() as connection:
                yield connection
        else:
            async with self._errors(), self._by_statement.connect() as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        try:
            yield
        except (DBAPIError, asyncpg.PostgresError, OSError, TimeoutError) as error:
            self.errors += 1
            if (
                isinstance(error, DBAPIError)
                and not isinstance(error, OperationalError)
                and not error.connection_invalidated
            ):
                cause = type(error.orig).__name__ if error.orig else type(error).__name__
                raise StoreError(f"database: {cause}: {error.orig}") from error
            raise StoreError(f"database: it does not answer: {error}") from error

    async def close(self) -> None:
        """End all connections."""
        await self._engine.dispose()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _tls(ca: str | None) -> dict[str, ssl.SSLContext]:
    """Return the argument by which PostgreSQL is verified: by its name, against these CAs alone. None: what the URL says holds."""
    if ca is None:
        return {}
    try:
        return {"ssl": ssl.create_default_context(cafile=ca)}
    except OSError as error:  # a file that holds no certificate is one, too
        raise ConfigError(f"database.ca: {ca}: {error.strerror or error}") from error


def _lock(path: Path) -> int:
    try:
        fd = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise StoreError(
                f"database: another controller uses {path}; SQLite is for one replica, take PostgreSQL for more"
            ) from error
    except OSError as error:
        raise StoreError(f"database: {path}: {error.strerror}") from error
    return fd


def _prepare_sqlite(engine: AsyncEngine) -> None:
    """Durable commits, foreign keys, and transactions that lock at their begin."""

    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection: Any, _record: object) -> None:  # noqa: ANN401 -- a DB-API connection has no common type
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        # Replicas that start together take turns.
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7233179041)")
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
