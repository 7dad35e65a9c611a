"""Replicas notice each other's end."""

from controller.settings import DatabaseSettings
from controller.store import replicas
from controller.store.database import Database


async def test_a_replica_that_is_silent_is_missed_once(tmp_path):
    """The others learn its name; then it is forgotten, and may come back."""
    database = await Database.open(DatabaseSettings(url=f"sqlite+aiosqlite:///{tmp_path}/c.db"))
    late = replicas.LOST_US + 1
    async with database.begin() as connection:
        assert await replicas.beat(connection, "a", "host-a:1", 0) == []
        assert await replicas.beat(connection, "b", "host-b:2", 0) == []
        assert await replicas.beat(connection, "b", "host-b:2", late) == ["host-a:1"]
        assert await replicas.beat(connection, "b", "host-b:2", late) == []
        assert await replicas.beat(connection, "a", "host-a:1", late) == []
    await database.close()
