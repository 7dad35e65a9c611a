"""Replicas notice each other's end."""

import pytest
from sqlalchemy import select

from agent import clock
from controller.flows.presence import MAX_GAP_US, REPLICA_LOST, Presence
from controller.settings import DatabaseSettings
from controller.store import audit, replicas
from controller.store.database import Database
from controller.store.schema import events
from controller.store.schema import replicas as rows

HEARTBEAT_US = 5_000_000
LATE_US = replicas.LOST_US + 1


@pytest.fixture
def time(monkeypatch):
    """The database's clock, as a list of one number."""
    now = [1_800_000_000_000_000]

    async def read(_connection):
        return now[0]

    monkeypatch.setattr(replicas, "now_us", read)
    return now


async def _live(time, until_us, *present):
    """Let replicas send heartbeats until a time has passed."""
    end = time[0] + until_us
    while time[0] < end:
        time[0] += HEARTBEAT_US
        for one in present:
            await one.beat()


async def _told(database):
    async with database.begin() as connection:
        bodies = list(await connection.scalars(select(events.c.body).where(events.c.kind == REPLICA_LOST)))
        records = [record for record in await audit.read(connection, 0, 100) if record["kind"] == REPLICA_LOST]
    assert len(bodies) == len(records)
    return [record["detail"]["replica"] for record in records]


async def test_a_replica_that_is_silent_is_missed_once(database):
    """Whoever looks first learns its name; then it is forgotten, and may come back."""
    async with database.begin() as connection:
        await replicas.beat(connection, "a", "host-a:1", 0)
        await replicas.beat(connection, "b", "host-b:2", 0)
        assert await replicas.take_lost(connection, replicas.LOST_US) == []
        await replicas.beat(connection, "b", "host-b:2", LATE_US)
        assert await replicas.take_lost(connection, LATE_US) == [replicas.LostReplica("a", "host-a:1", 0)]
        assert await replicas.take_lost(connection, LATE_US) == []
        await replicas.beat(connection, "a", "host-a:1", LATE_US)
        assert await replicas.take_lost(connection, LATE_US) == []


async def test_the_loss_is_told_once(database, time):
    """Of two survivors one writes a record and an event; who left in order is not told of."""
    first, second, killed, ended = (Presence(database, name, f"{name}:1", nats=False) for name in "abcd")
    await _live(time, LATE_US, first, second, killed, ended)
    await ended.leave()
    await _live(time, 3 * LATE_US, first, second)
    assert await _told(database) == ["c:1"]


async def test_after_an_outage_nobody_is_lost(database, time):
    """Who comes back first after all were silent waits until the others could have come back too."""
    first, second = (Presence(database, name, f"{name}:1", nats=False) for name in "ab")
    await _live(time, 2 * LATE_US, first, second)
    time[0] += 10 * LATE_US
    await _live(time, replicas.LOST_US - HEARTBEAT_US, first)
    await _live(time, LATE_US, first, second)
    assert await _told(database) == []
    await _live(time, 2 * LATE_US, first)
    assert await _told(database) == ["b:1"]


async def test_a_clock_that_goes_back_makes_nobody_lost(database, time):
    """The one whose time went back begins anew."""
    first, second = (Presence(database, name, f"{name}:1", nats=False) for name in "ab")
    await _live(time, 2 * LATE_US, first, second)
    time[0] -= 10 * LATE_US
    await _live(time, 2 * LATE_US, first, second)
    assert await _told(database) == []
    assert HEARTBEAT_US < MAX_GAP_US


async def test_the_database_s_clock_counts(database):
    """On either database it is in microseconds since the epoch."""
    async with database.begin() as connection:
        assert abs(await replicas.now_us(connection) - clock.now_us()) < 60_000_000


async def test_without_a_database_the_end_is_an_end(postgres, postgres_url):
    """A replica whose database is gone can't take leave, and ends all the same; it will be missed."""
    database = await Database.open(DatabaseSettings(url=postgres_url))
    presence = Presence(database, "a", "a:1", nats=False)
    await presence.beat()
    postgres.stop()
    try:
        await presence.leave()
    finally:
        postgres.start()
    async with database.begin() as connection:
        assert list(await connection.scalars(select(rows.c.name))) == ["a:1"]
    await database.close()
