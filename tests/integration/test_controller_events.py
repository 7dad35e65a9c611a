"""Events of the controller, from the outbox to real receivers over HTTP and HTTPS."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from sqlalchemy import select
from standardwebhooks import Webhook, WebhookVerificationError

from agent import clock
from controller.flows import deliver
from controller.flows.deliver import Deliverer
from controller.settings import DatabaseSettings
from controller.store import hooks as hook_store
from controller.store.database import Database
from controller.store.schema import deliveries
from tests.support.outbox import KIND, add_hook, emit, make_due, only_hook, running, sqlite, until
from tests.support.postgres import PostgresServer
from tests.support.receiver import Receiver, server_certificate

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = await Database.open(sqlite(tmp_path))
    yield opened
    await opened.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver().serving() as serving:
        yield serving


async def test_signature(database: Database, tmp_path: Path) -> None:
    """Over HTTPS the body arrives as it was emitted, and Standard Webhooks' own library verifies it, but not with a byte changed."""
    server, client = server_certificate(tmp_path)
    async with Receiver().serving(server) as receiver, running(Deliverer(database, context=client)):
        hook = await add_hook(database, receiver.url)
        event = await emit(database)
        (got,) = await receiver.wait_for(1)
        await until(database)
    body = Webhook(hook.secret).verify(got.body, got.headers)
    assert body == json.loads(got.body)
    assert (body["id"], body["kind"], body["node"], body["status"]) == (event, KIND, "node-1", "warning")
    assert body["time"].endswith("Z")
    assert got.id == event
    for changed in (got.body.replace(b"warning", b"warninh"), got.body + b" "):
        with pytest.raises(WebhookVerificationError, match="No matching signature"):
            Webhook(hook.secret).verify(changed, got.headers)
    with pytest.raises(WebhookVerificationError, match="No matching signature"):
        Webhook(hook.secret).verify(got.body, {**got.headers, "webhook-id": "0" * 32})


async def test_unknown_certificate_is_refused(database: Database, tmp_path: Path) -> None:
    """A receiver whose certificate is not verified gets nothing."""
    server, _ = server_certificate(tmp_path)
    async with Receiver().serving(server) as receiver, running(Deliverer(database)):
        await add_hook(database, receiver.url)
        await emit(database)
        await until(database, pending=1, error="ClientConnectorCertificateError")
        assert receiver.got == []


async def test_retries_keep_the_id(database: Database, receiver: Receiver) -> None:
    """A receiver that fails twice and then accepts gets the same id and the same body each time."""
    receiver.answers = [500, 302]
    async with running(Deliverer(database)):
        await add_hook(database, receiver.url)
        event = await emit(database)
        await until(database, pending=1, error="status 500")
        await make_due(database)
        await until(database, pending=1, error="status 302")
        await make_due(database)
        record = await until(database)
    assert [got.id for got in receiver.got] == [event] * 3
    assert len({got.body for got in receiver.got}) == 1
    assert (record.enabled, record.given_up) == (True, 0)


async def test_killed_before_settling(tmp_path: Path, receiver: Receiver) -> None:
    """A replica that is killed between sending and keeping the outcome leaves a lease; after it the event comes again with its id."""
    settings = sqlite(tmp_path)
    database = await Database.open(settings)
    await add_hook(database, receiver.url)
    event = await emit(database)
    await database.close()

    async def kill(_: web.Request) -> web.Response:
        process.kill()
        await process.wait()
        return web.Response()

    receiver.answers = [kill]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.delivering", settings.url, cwd=ROOT, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        await receiver.wait_for(1)
        assert await process.wait() == -9
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    database = await Database.open(settings)
    try:
        async with database.begin() as connection:
            (row,) = await connection.execute(select(deliveries))
        assert (row.attempts, row.delivered_us) == (1, None)
        assert row.due_us > clock.now_us()
        await make_due(database)
        async with running(Deliverer(database)):
            await receiver.wait_for(2)
            await until(database)
    finally:
        await database.close()
    assert [got.id for got in receiver.got] == [event, event]


async def test_slow_receiver_holds_up_nobody(
    database: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver that never answers runs into the time limit, and another hook is served meanwhile."""
    monkeypatch.setattr(deliver, "TIMEOUT_S", 1)
    hanging = asyncio.Event()

    async def hang(_: web.Request) -> web.Response:
        await hanging.wait()
        return web.Response()

    async with Receiver([hang] * 20).serving() as slow, running(Deliverer(database)):
        await add_hook(database, slow.url, "node.slow")
        await add_hook(database, receiver.url, KIND)
        await emit(database, "node.slow")
        await slow.wait_for(1)
        event = await emit(database)
        assert [got.id for got in await receiver.wait_for(1)] == [event]
        async with asyncio.timeout(30):
            while True:
                async with database.begin() as connection:
                    first, second = await hook_store.list_hooks(connection)
                if first.error is not None and second.pending == 0:
                    break
                await asyncio.sleep(0.05)
        hanging.set()
    assert (first.error, first.pending, second.error) == ("TimeoutError", 1, None)


async def test_redirect_is_not_followed(database: Database, receiver: Receiver) -> None:
    """A redirect is a failure, and the address that it names gets nothing."""

    async def redirect(_: web.Request) -> web.Response:
        return web.Response(status=307, headers={"location": elsewhere.url})

    receiver.answers = [redirect]
    async with Receiver().serving() as elsewhere, running(Deliverer(database)):
        await add_hook(database, receiver.url)
        await emit(database)
        await until(database, pending=1, error="status 307")
        assert elsewhere.got == []


async def test_huge_answer_is_not_read(database: Database, receiver: Receiver) -> None:
    """A receiver that answers without end is cut off; its 200 counts."""
    cut = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 65536)
        except ConnectionError:
            cut.set()
        return response

    receiver.answers = [endless]
    async with running(Deliverer(database)):
        await add_hook(database, receiver.url)
        await emit(database)
        await receiver.wait_for(1)
        await until(database)
        async with asyncio.timeout(30):
            await cut.wait()


async def test_gone_disables_the_hook(database: Database, receiver: Receiver) -> None:
    """410 Gone disables the hook; what was to go there is given up, visibly, and nothing new is written for it."""
    receiver.answers = [410]
    async with running(Deliverer(database)):
        await add_hook(database, receiver.url)
        await emit(database)
        record = await until(database, error="given up, the receiver wants no more: status 410")
        await emit(database)
        assert (await only_hook(database)).pending == 0
    assert (record.enabled, record.given_up) == (False, 1)
    assert len(receiver.got) == 1


async def test_removed_hook_gets_nothing(database: Database, receiver: Receiver) -> None:
    """A hook that was removed gets neither what was due nor what comes later; another one does."""
    removed = await add_hook(database, receiver.url + "/removed")
    kept = await add_hook(database, receiver.url + "/kept")
    await emit(database)
    async with database.begin() as connection:
        await hook_store.delete_hook(connection, removed.id)
    await emit(database)
    async with running(Deliverer(database)):
        await receiver.wait_for(2)
        record = await until(database)
    assert record.id == kept.id
    assert [got.path for got in receiver.got] == ["/events/kept"] * 2


async def test_two_replicas_share(postgres_url: str, receiver: Receiver) -> None:
    """Two replicas on one PostgreSQL deliver each event once while both live."""
    settings = DatabaseSettings(url=postgres_url)
    first, second = await Database.open(settings), await Database.open(settings)
    try:
        await add_hook(first, receiver.url)
        sent = [await emit(first) for _ in range(60)]
        async with running(Deliverer(first), Deliverer(second)):
            await receiver.wait_for(len(sent))
            await until(first)
    finally:
        await first.close()
        await second.close()
    assert sorted(got.id for got in receiver.got) == sorted(sent)


async def test_database_comes_back(
    postgres: PostgresServer, postgres_url: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that goes away, also between sending and keeping the outcome, pauses delivery; when it is back everything is delivered."""
    monkeypatch.setattr(deliver, "RETRY_S", 0.2)
    database = await Database.open(DatabaseSettings(url=postgres_url))
    stopped = asyncio.Event()

    async def stop(_: web.Request) -> web.Response:
        postgres.stop()
        stopped.set()
        return web.Response()

    receiver.answers = [stop]
    try:
        await add_hook(database, receiver.url)
        event = await emit(database)
        async with running(Deliverer(database)):
            try:
                await stopped.wait()
                await asyncio.sleep(1)
            finally:
                postgres.start()
            await make_due(database)
            await receiver.wait_for(2)
            await until(database)
    finally:
        await database.close()
    assert [got.id for got in receiver.got] == [event, event]
