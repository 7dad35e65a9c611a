"""The outbox on SQLite and on PostgreSQL: what is written, claimed, settled, given up and removed."""

import base64
import json

import pytest
from sqlalchemy import Row, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from agent.errors import HostError, PeerError
from controller.settings import DatabaseSettings
from controller.store import hooks as hook_store
from controller.store import outbox
from controller.store.database import Database
from controller.store.outbox import Outcome, backoff_s
from controller.store.schema import deliveries, events, hooks

US = 1_000_000
NOW_US = 1_800_000_000 * US
LEASE_US = outbox.LEASE_S * US
KIND = "node.status"
URL = "https://receiver.example/events"


async def add_hook(connection: AsyncConnection, *kinds: str) -> str:
    return (await hook_store.create_hook(connection, URL, kinds or ("*",), "admin", NOW_US)).id


async def emit(connection: AsyncConnection, kind: str = KIND, *, now_us: int = NOW_US, nats: bool = False) -> str:
    return await outbox.emit(connection, kind, "node-1", {"status": "warning"}, now_us, nats=nats)


async def row(connection: AsyncConnection) -> Row[tuple[object, ...]]:
    return (await connection.execute(select(deliveries))).one()


async def targets(connection: AsyncConnection, event: str) -> set[str]:
    return set(await connection.scalars(select(deliveries.c.target).where(deliveries.c.event == event)))


def test_backoff() -> None:
    """The waits double from ten seconds to an hour, and all of them together are some three days."""
    waits = [backoff_s(attempt) for attempt in range(1, outbox.MAX_ATTEMPTS)]
    assert waits[:10] == [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600]
    assert set(waits[9:]) == {3600}
    assert 2.5 * 86_400 < sum(waits) < 3.5 * 86_400
    assert backoff_s(10**6) == 3600


@pytest.mark.parametrize(
    "url",
    [
        "https://receiver.example/events?x=1",
        "https://10.0.0.1:8443",
        "http://127.0.0.1:8080/",
        "http://127.9.9.9/",
        "http://[::1]:8080/a",
    ],
)
async def test_url_of_a_receiver(database: Database, url: str) -> None:
    """For any host https is taken, for loopback addresses http too; and what is taken is kept as it is."""
    async with database.begin() as connection:
        await hook_store.create_hook(connection, url, ["*"], "admin", NOW_US)
        assert [hook.url for hook in await hook_store.list_hooks(connection)] == [url]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "events",
        "http://receiver.example/",
        "http://localhost/",
        "http://127.0.0.1.example/",
        "http://10.0.0.1/",
        "http://[::1",
        "https://",
        "https:///events",
        "https://host:99999/",
        "https://user@host/",
        "https://user:password@host/",
        "https://host/#fragment",
        "https://host/a b",
        "https://host/\r\nx: y",
        "https://host/\u00e4",
        "ftp://127.0.0.1/",
        "https://host/" + "x" * hook_store.MAX_URL_CHARS,
    ],
)
def test_url_that_is_refused(url: str) -> None:
    """Whatever is not https, or http to a loopback address, is refused."""
    with pytest.raises(PeerError) as caught:
        hook_store.check_url(url)
    assert (caught.value.status, caught.value.reason) == (400, "hook_url")


async def test_event_goes_to_matching_targets(database: Database) -> None:
    """An event goes to the enabled hooks that name its kind or all, and to NATS where that is asked for."""
    async with database.begin() as connection:
        every, same = await add_hook(connection), await add_hook(connection, "other.kind", KIND)
        await add_hook(connection, "other.kind")
        disabled = await add_hook(connection)
        await connection.execute(hooks.update().where(hooks.c.id == disabled).values(enabled=False))
        assert await targets(connection, await emit(connection)) == {every, same}
        assert await targets(connection, await emit(connection, nats=True)) == {every, same, outbox.NATS}


async def test_event_without_target(database: Database) -> None:
    """An event that nobody wants is kept, with its document, and has no delivery."""
    async with database.begin() as connection:
        event = await emit(connection)
        assert await targets(connection, event) == set()
        document = json.loads(await connection.scalar(select(events.c.body)) or b"")
    assert document == {
        "id": event, "kind": KIND, "node": "node-1", "time": "2027-01-15T08:00:00.000000Z", "status": "warning",
    }  # fmt: skip


async def test_event_of_a_rolled_back_change(database: Database) -> None:
    """There is no event of a transaction that was rolled back."""

    async def fail() -> None:
        async with database.begin() as connection:
            await add_hook(connection)
            await emit(connection)
            raise HostError("no")

    with pytest.raises(HostError, match="no"):
        await fail()
    async with database.begin() as connection:
        for table in (events, deliveries, hooks):
            assert await connection.scalar(select(func.count()).select_from(table)) == 0


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("", {}),
        ("Node", {}),
        ("a..b", {}),
        ("a" * 33, {}),
        (KIND, {"id": "x"}),
        (KIND, {"x": "y" * outbox.MAX_BODY_BYTES}),
    ],
)
async def test_no_event(database: Database, kind: str, body: dict[str, str]) -> None:
    """A kind that is none, a member that would hide one of the event's own, and a document over the limit are refused."""
    async with database.begin() as connection:
        with pytest.raises(ValueError, match="event"):
            await outbox.emit(connection, kind, "", body, NOW_US, nats=False)


async def test_secret_is_shown_once(database: Database) -> None:
    """A hook's secret is 32 bytes, other for each hook, and in no list and no printed value."""
    async with database.begin() as connection:
        first = await hook_store.create_hook(connection, URL, ["*"], "admin", NOW_US)
        second = await hook_store.create_hook(connection, URL, ["*"], "admin", NOW_US)
        await emit(connection)
        (delivery,) = await outbox.claim(connection, first.id, NOW_US, 10)
        listed = repr(await hook_store.list_hooks(connection))
    assert first.secret.startswith("whsec_")
    secret = base64.b64decode(first.secret.removeprefix("whsec_"))
    assert (len(secret), secret) == (32, delivery.secret)
    assert first.secret != second.secret
    for text in (listed, repr(first), repr(delivery)):
        assert first.secret not in text
        assert repr(secret) not in text


async def test_hooks_that_are_refused(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kind, a kind that is none, too many kinds and too many hooks are refused; so is deleting what is not there."""
    async with database.begin() as connection:
        for kinds in ([], ["No"], ["a"] * (hook_store.MAX_KINDS + 1)):
            with pytest.raises(PeerError) as caught:
                await hook_store.create_hook(connection, URL, kinds, "admin", NOW_US)
            assert (caught.value.status, caught.value.reason) == (400, "hook_kinds")
        monkeypatch.setattr(hook_store, "MAX_HOOKS", 1)
        hook = await add_hook(connection)
        with pytest.raises(PeerError) as caught:
            await add_hook(connection)
        assert caught.value.status == 409
        await hook_store.delete_hook(connection, hook)
        with pytest.raises(PeerError) as caught:
            await hook_store.delete_hook(connection, hook)
        assert caught.value.status == 404


async def test_claim_is_a_lease(database: Database) -> None:
    """What was claimed is not claimed again until its lease ends; then it is, as the next attempt, with the same bytes."""
    async with database.begin() as connection:
        hook = await add_hook(connection)
        event = await emit(connection)
        assert await outbox.claim(connection, hook, NOW_US - 1, 10) == []
        assert await outbox.waiting(connection, NOW_US - 1) == []
        assert await outbox.waiting(connection, NOW_US) == [hook]
        (first,) = await outbox.claim(connection, hook, NOW_US, 10)
        assert await outbox.claim(connection, hook, NOW_US + LEASE_US - 1, 10) == []
        (second,) = await outbox.claim(connection, hook, NOW_US + LEASE_US, 10)
    assert (first.event, first.kind, first.url, first.attempt) == (event, KIND, URL, 1)
    assert (second.event, second.body, second.attempt) == (event, first.body, 2)


async def test_claim_of_one_target(database: Database) -> None:
    """A claim takes only what is for its target, the oldest first, and no more than its limit."""
    async with database.begin() as connection:
        hook = await add_hook(connection)
        later = await emit(connection, now_us=NOW_US + 1, nats=True)
        sooner = await emit(connection, now_us=NOW_US, nats=True)
        (mine,) = await outbox.claim(connection, hook, NOW_US + 1, 1)
        published = await outbox.claim(connection, outbox.NATS, NOW_US + 1, 10)
        assert await outbox.waiting(connection, NOW_US + 1) == [hook]
    assert (mine.event, mine.target) == (sooner, hook)
    assert [(delivery.event, delivery.target, delivery.secret) for delivery in published] == [
        (sooner, outbox.NATS, b""),
        (later, outbox.NATS, b""),
    ]


async def test_two_claims_at_once(postgres_url: str) -> None:
    """On PostgreSQL a claim passes over what another transaction is just claiming, without waiting for it."""
    database = await Database.open(DatabaseSettings(url=postgres_url))
    try:
        async with database.begin() as connection:
            hook = await add_hook(connection)
            sent = {await emit(connection) for _ in range(10)}
        async with database.begin() as first, database.begin() as second:
            mine = {delivery.event for delivery in await outbox.claim(first, hook, NOW_US, 4)}
            others = {delivery.event for delivery in await outbox.claim(second, hook, NOW_US, 100)}
    finally:
        await database.close()
    assert (len(mine), len(others)) == (4, 6)
    assert mine | others == sent


async def test_delivered(database: Database) -> None:
    """What was delivered is never due again, also when a late failure of an earlier lease comes after it."""
    async with database.begin() as connection:
        hook = await add_hook(connection)
        await emit(connection)
        (first,) = await outbox.claim(connection, hook, NOW_US, 10)
        (second,) = await outbox.claim(connection, hook, NOW_US + LEASE_US, 10)
        await outbox.settle(connection, [Outcome(first, "late")], NOW_US + LEASE_US)
        kept = await row(connection)
        assert (kept.error, kept.due_us) == (None, NOW_US + 2 * LEASE_US)
        await outbox.settle(connection, [Outcome(second)], NOW_US + LEASE_US + 1)
        await outbox.settle(connection, [Outcome(second, "late")], NOW_US + LEASE_US + 2)
        kept = await row(connection)
    assert (kept.due_us, kept.delivered_us, kept.attempts, kept.error) == (None, NOW_US + LEASE_US + 1, 2, None)


async def test_given_up(database: Database) -> None:
    """A failure is tried again after its wait, with its error kept; the last attempt's is given up, and the hook's record says so."""
    async with database.begin() as connection:
        hook = await add_hook(connection)
        await emit(connection)
        (delivery,) = await outbox.claim(connection, hook, NOW_US, 10)
        await outbox.settle(connection, [Outcome(delivery, "status 500" + "x" * 1000)], NOW_US)
        kept = await row(connection)
        assert kept.due_us == NOW_US + 10 * US
        assert len(kept.error) == outbox.MAX_ERROR_CHARS
        await connection.execute(deliveries.update().values(attempts=outbox.MAX_ATTEMPTS - 1))
        (last,) = await outbox.claim(connection, hook, NOW_US + 10 * US, 10)
        await outbox.settle(connection, [Outcome(last, "status 503")], NOW_US + 10 * US)
        kept = await row(connection)
        (record,) = await hook_store.list_hooks(connection)
    assert (kept.due_us, kept.delivered_us, kept.attempts) == (None, None, outbox.MAX_ATTEMPTS)
    assert (record.pending, record.given_up, record.error, record.enabled) == (0, 1, "status 503", True)


async def test_old_deliveries_are_given_up(database: Database) -> None:
    """What is pending for a week is given up and keeps why; what is younger stays."""
    week_us = outbox.GIVE_UP_S * US
    async with database.begin() as connection:
        hook = await add_hook(connection)
        await emit(connection)
        (delivery,) = await outbox.claim(connection, hook, NOW_US, 10)
        await outbox.settle(connection, [Outcome(delivery, "status 500")], NOW_US)
        assert await outbox.retire(connection, NOW_US + week_us, nats=False) == 0
        assert (await row(connection)).due_us is not None
        assert await outbox.retire(connection, NOW_US + week_us + 1, nats=False) == 0
        kept = await row(connection)
    assert (kept.due_us, kept.error) == (None, "given up by age; status 500")


async def test_deliveries_without_target_are_given_up(database: Database) -> None:
    """What is pending for NATS is given up where there is none any more, and kept where there is."""
    async with database.begin() as connection:
        await emit(connection, nats=True)
        await outbox.retire(connection, NOW_US, nats=True)
        assert (await row(connection)).due_us == NOW_US
        await outbox.retire(connection, NOW_US, nats=False)
        kept = await row(connection)
    assert (kept.due_us, kept.error) == (None, "given up: the target is gone")


async def test_old_events_are_removed(database: Database) -> None:
    """Events over the stated age go with their deliveries; younger ones stay."""
    async with database.begin() as connection:
        await add_hook(connection)
        await emit(connection, now_us=NOW_US - outbox.RETENTION_S * US - 1)
        young = await emit(connection, now_us=NOW_US - outbox.RETENTION_S * US)
        assert await outbox.retire(connection, NOW_US, nats=False) == 1
        assert await connection.scalar(select(events.c.id)) == young
        assert (await row(connection)).event == young
