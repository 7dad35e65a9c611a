"""Events into the outbox of a real database, and what becomes of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Row, select, update

from agent import clock
from controller.flows.deliver import Deliverer
from controller.settings import DatabaseSettings
from controller.store import hooks as hook_store
from controller.store import outbox
from controller.store.database import Database
from controller.store.hooks import HookRecord, NewHook
from controller.store.schema import deliveries

__all__ = [
    "KIND",
    "add_hook",
    "all_settled",
    "emit",
    "make_due",
    "only_delivery",
    "only_hook",
    "running",
    "sqlite",
    "until",
]

KIND = "node.status"


def sqlite(tmp_path: Path) -> DatabaseSettings:
    return DatabaseSettings(url=f"sqlite+aiosqlite:///{tmp_path / 'controller.db'}")


@asynccontextmanager
async def running(*deliverers: Deliverer) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(deliverer.run()) for deliverer in deliverers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


async def add_hook(database: Database, url: str, *kinds: str) -> NewHook:
    async with database.begin() as connection:
        return await hook_store.create_hook(connection, url, kinds or ("*",), "admin", clock.now_us())


async def emit(database: Database, kind: str = KIND, *, nats: bool = False) -> str:
    async with database.begin() as connection:
        return await outbox.emit(connection, kind, "node-1", {"status": "warning"}, clock.now_us(), nats=nats)


async def only_hook(database: Database) -> HookRecord:
    async with database.begin() as connection:
        (record,) = await hook_store.list_hooks(connection)
    return record


async def until(database: Database, *, pending: int = 0, error: str | None = None) -> HookRecord:
    """Wait until the only hook's deliveries stand so."""
    async with asyncio.timeout(30):
        while True:
            record = await only_hook(database)
            if (record.pending, record.error) == (pending, error):
                return record
            await asyncio.sleep(0.05)


async def make_due(database: Database) -> None:
    """Let every wait and every lease be over."""
    async with database.begin() as connection:
        await connection.execute(update(deliveries).where(deliveries.c.due_us.is_not(None)).values(due_us=0))


async def all_settled(database: Database) -> None:
    async with asyncio.timeout(30):
        while True:
            async with database.begin() as connection:
                rows = (await connection.execute(select(deliveries))).all()
            if all(row.delivered_us is not None for row in rows):
                return
            await asyncio.sleep(0.05)


async def only_delivery(database: Database) -> Row[tuple[Any, ...]]:
    async with database.begin() as connection:
        return (await connection.execute(select(deliveries))).one()
