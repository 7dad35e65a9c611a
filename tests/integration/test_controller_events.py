"""Events of the controller, from the outbox to real receivers: HTTP, HTTPS and NATS JetStream."""

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import pytest
from aiohttp import web
from sqlalchemy import Row, select, update
from standardwebhooks import Webhook, WebhookVerificationError

from agent import clock
from controller.flows import deliver
from controller.flows.deliver import Deliverer
from controller.flows.jetstream import JetStream, StreamError
from controller.settings import DatabaseSettings, NatsSettings
from controller.store import outbox
from controller.store.database import Database
from controller.store.outbox import HookRecord, NewHook
from controller.store.schema import deliveries
from tests.support.nats_server import NatsServer
from tests.support.postgres import PostgresServer
from tests.support.receiver import Receiver, server_certificate

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
KIND = "node.status"
needs_nats = pytest.mark.skipif(
    shutil.which("nats-server") is None, reason="there is no nats-server; Debian's package nats-server has it"
)


def sqlite(tmp_path: Path) -> DatabaseSettings:
    return DatabaseSettings(url=f"sqlite+aiosqlite:///{tmp_path / 'controller.db'}")


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = await Database.open(sqlite(tmp_path))
    yield opened
    await opened.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver().serving() as serving:
        yield serving


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path)
    server.start()
    yield server
    server.stop()


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
        return await outbox.create_hook(connection, url, kinds or ("*",), "admin", clock.now_us())


async def emit(database: Database, kind: str = KIND, *, nats: bool = False) -> str:
    async with database.begin() as connection:
        return await outbox.emit(connection, kind, "node-1", {"status": "warning"}, clock.now_us(), nats=nats)


async def hook_record(database: Database) -> HookRecord:
    async with database.begin() as connection:
        (record,) = await outbox.list_hooks(connection)
    return record


async def until(database: Database, *, pending: int = 0, error: str | None = None) -> HookRecord:
    """Wait until the only hook's deliveries stand so."""
    async with asyncio.timeout(30):
        while True:
            record = await hook_record(database)
            if (record.pending, record.error) == (pending, error):
                return record
            await asyncio.sleep(0.05)


async def make_due(database: Database) -> None:
    """Let every wait and every lease be over."""
    async with database.begin() as connection:
        await connection.execute(update(deliveries).where(deliveries.c.due_us.is_not(None)).values(due_us=0))


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
                    first, second = await outbox.list_hooks(connection)
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
        assert (await hook_record(database)).pending == 0
    assert (record.enabled, record.given_up) == (False, 1)
    assert len(receiver.got) == 1


async def test_removed_hook_gets_nothing(database: Database, receiver: Receiver) -> None:
    """A hook that was removed gets neither what was due nor what comes later; another one does."""
    removed = await add_hook(database, receiver.url + "/removed")
    kept = await add_hook(database, receiver.url + "/kept")
    await emit(database)
    async with database.begin() as connection:
        await outbox.delete_hook(connection, removed.id)
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


@needs_nats
async def test_nats_keeps_one_message(database: Database, nats_server: NatsServer) -> None:
    """Events go into the stream, which is made; one whose outcome was lost is published again and kept once."""
    async with running(Deliverer(database, NatsSettings(url=nats_server.url))):
        first = await emit(database, nats=True)
        await all_settled(database)
        async with database.begin() as connection:
            await connection.execute(update(deliveries).values(due_us=0, delivered_us=None))
        await all_settled(database)
        second = await emit(database, "node.gone", nats=True)
        await all_settled(database)
    async with database.begin() as connection:
        attempts = {row.event: row.attempts for row in await connection.execute(select(deliveries))}
    assert attempts == {first: 2, second: 1}
    assert await messages(nats_server) == [("edgewarden.node.status", first), ("edgewarden.node.gone", second)]


@needs_nats
async def test_nats_down_blocks_nobody(database: Database, receiver: Receiver, nats_server: NatsServer) -> None:
    """While NATS is down webhooks go on and its events wait, without an attempt counted; they arrive when it is back."""
    async with running(Deliverer(database, NatsSettings(url=nats_server.url))):
        await add_hook(database, receiver.url)
        first = await emit(database, nats=True)
        await all_settled(database)
        nats_server.stop()
        second = await emit(database, nats=True)
        await receiver.wait_for(2)
        await until(database)
        await asyncio.sleep(1)
        nats_server.start()
        await make_due(database)
        await all_settled(database)
    assert [message for _, message in await messages(nats_server)] == [first, second]


async def all_settled(database: Database) -> None:
    async with asyncio.timeout(30):
        while True:
            async with database.begin() as connection:
                rows = (await connection.execute(select(deliveries))).all()
            if all(row.delivered_us is not None for row in rows):
                return
            await asyncio.sleep(0.05)


async def messages(server: NatsServer) -> list[tuple[str, str]]:
    """Return subject and id of all messages of the stream."""
    client = await nats.connect(server.url, allow_reconnect=False)
    try:
        stream = client.jetstream()
        info = await stream.stream_info("EDGEWARDEN")
        kept = [await stream.get_msg("EDGEWARDEN", number + 1) for number in range(info.state.messages)]
    finally:
        await client.close()
    for message in kept:
        assert json.loads(message.data or b"")["id"] == (message.headers or {})["Nats-Msg-Id"]
    return [(message.subject or "", (message.headers or {})["Nats-Msg-Id"]) for message in kept]


@needs_nats
async def test_stream_of_another_owner_is_refused(database: Database, nats_server: NatsServer) -> None:
    """Where another stream has the subjects, nothing is published into it: the failure is kept and the event waits."""
    client = await nats.connect(nats_server.url, allow_reconnect=False)
    try:
        await client.jetstream().add_stream(name="EDGEWARDEN", subjects=["something.else"])
        other = await client.jetstream().add_stream(name="OTHER", subjects=["edgewarden.>"])
        async with running(Deliverer(database, NatsSettings(url=nats_server.url))):
            await emit(database, nats=True)
            async with asyncio.timeout(30):
                while True:
                    row = await only_delivery(database)
                    if row.error is not None:
                        break
                    await asyncio.sleep(0.05)
        other = await client.jetstream().stream_info("OTHER")
    finally:
        await client.close()
    assert (row.error, row.delivered_us, row.attempts) == ("nats: BadRequestError", None, 1)
    assert other.state.messages == 0


async def test_publishing_needs_a_connection(tmp_path: Path) -> None:
    """Without a server, connecting and publishing are StreamErrors."""
    stream = JetStream(NatsSettings(url=NatsServer(tmp_path).url))
    with pytest.raises(StreamError, match="nats: "):
        await stream.connect()
    with pytest.raises(StreamError, match="not connected"):
        await stream.publish("0" * 32, KIND, b"{}")
    await stream.close()


@needs_nats
async def test_tls_is_not_given_up(nats_server: NatsServer) -> None:
    """A server without TLS is refused where tls:// was asked for."""
    stream = JetStream(NatsSettings(url=nats_server.url.replace("nats://", "tls://")))
    with pytest.raises(StreamError, match="nats: "):
        await stream.connect()


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


async def only_delivery(database: Database) -> Row[tuple[Any, ...]]:
    async with database.begin() as connection:
        return (await connection.execute(select(deliveries))).one()
