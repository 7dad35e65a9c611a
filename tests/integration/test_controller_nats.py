"""Events of the controller into a real NATS JetStream: plain, over TLS, with an operator's credentials, and against what stands in between."""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import nats
import pytest
from nats.js.errors import NotFoundError
from sqlalchemy import select, update
from structlog.testing import capture_logs

from agent.errors import ConfigError
from controller.flows import deliver
from controller.flows.deliver import Deliverer
from controller.flows.jetstream import JetStream, StreamError
from controller.settings import NatsSettings, load
from controller.store.database import Database
from controller.store.schema import deliveries
from tests.support.controller_service import ControllerProcess, access, controller_home, eventually
from tests.support.nats_server import NatsOperator, NatsServer, require_nats
from tests.support.outbox import KIND, add_hook, all_settled, emit, make_due, only_delivery, running, sqlite, until
from tests.support.receiver import Receiver, server_certificate
from tests.support.software_node import SoftwareNode, Vendor

pytestmark = pytest.mark.integration
VENDOR = Vendor()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = await Database.open(sqlite(tmp_path))
    yield opened
    await opened.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver().serving() as serving:
        yield serving


@contextlib.contextmanager
def serving(server: NatsServer) -> Iterator[NatsServer]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    require_nats()
    with serving(NatsServer(tmp_path)) as server:
        yield server


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again soon."""
    monkeypatch.setattr(deliver, "RETRY_S", 0.2)


@dataclass(frozen=True, slots=True)
class Secured:
    """A server with TLS and an operator, and what opens it."""

    server: NatsServer
    settings: NatsSettings
    reader: Path  # credentials of another user

    def file(self, name: str) -> Path:
        return Path((self.settings.ca if name == "ca" else self.settings.credentials) or "")

    async def kept(self) -> list[tuple[str, str]]:
        context = ssl.create_default_context(cafile=self.settings.ca)
        return await messages(self.server, tls=context, user_credentials=str(self.reader))


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    require_nats()
    server_certificate(tmp_path)
    operator = NatsOperator()
    with serving(NatsServer(tmp_path, (tmp_path / "receiver.pem", tmp_path / "receiver.key"), operator)) as server:
        (tmp_path / "ca.pem").write_bytes((tmp_path / "receiver.pem").read_bytes())
        # What the operator guide says that the controller needs.
        credentials = operator.write_credentials(
            tmp_path / "user.creds",
            publish=["edgewarden.>", "$JS.API.STREAM.*.EDGEWARDEN"],
            subscribe=["_INBOX.>"],
        )
        settings = NatsSettings(url=server.url, ca=str(tmp_path / "ca.pem"), credentials=str(credentials))
        yield Secured(server, settings, operator.write_credentials(tmp_path / "reader.creds"))


async def messages(server: NatsServer, **options: Any) -> list[tuple[str, str]]:
    """Return subject and id of all messages of the stream."""
    client = await nats.connect(server.url, allow_reconnect=False, **options)
    try:
        stream = client.jetstream()
        info = await stream.stream_info("EDGEWARDEN")
        kept = [await stream.get_msg("EDGEWARDEN", number + 1) for number in range(info.state.messages)]
    finally:
        await client.close()
    for message in kept:
        assert json.loads(message.data or b"")["id"] == (message.headers or {})["Nats-Msg-Id"]
    return [(message.subject or "", (message.headers or {})["Nats-Msg-Id"]) for message in kept]


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
    assert "nats: BadRequestError" in row.error
    assert (row.delivered_us, row.attempts) == (None, 1)
    assert other.state.messages == 0


async def test_publishing_needs_a_connection(tmp_path: Path) -> None:
    """Without a server, connecting and publishing are StreamErrors."""
    stream = JetStream(NatsSettings(url=NatsServer(tmp_path).url))
    with pytest.raises(StreamError, match="nats: "):
        await stream.connect()
    with pytest.raises(StreamError, match="not connected"):
        await stream.publish("0" * 32, KIND, b"{}")
    await stream.close()


async def test_tls_is_not_given_up(nats_server: NatsServer) -> None:
    """A server without TLS is refused where tls:// was asked for."""
    stream = JetStream(NatsSettings(url=nats_server.url.replace("nats://", "tls://")))
    with pytest.raises(StreamError, match="nats: "):
        await stream.connect()


async def test_tls_and_credentials(database: Database, secured: Secured) -> None:
    """Over TLS, with an operator's credentials, events arrive; also after the server was killed and came back."""
    async with running(Deliverer(database, secured.settings)):
        first = await emit(database, nats=True)
        await all_settled(database)
        secured.server.stop()
        second = await emit(database, nats=True)
        secured.server.start()
        await make_due(database)
        await all_settled(database)
    assert [event for _, event in await secured.kept()] == [first, second]


@pytest.mark.usefixtures("soon")
async def test_credentials_that_end_are_renewed(database: Database, tmp_path: Path) -> None:
    """When the JWT expires the server ends the connection, and events wait; with a new file they arrive, without a restart."""
    require_nats()
    operator = NatsOperator()
    with serving(NatsServer(tmp_path, operator=operator)) as server:
        file = operator.write_credentials(tmp_path / "user.creds", expires_s=2)
        with capture_logs() as log:
            async with running(Deliverer(database, NatsSettings(url=server.url, credentials=str(file)))):

                async def refused() -> bool:
                    return any(line["event"] == "nats_unreachable" for line in log)

                await eventually(refused)
                event = await emit(database, nats=True)
                operator.write_credentials(file)
                await all_settled(database)
        kept = await messages(server, user_credentials=str(file))
    assert [one for _, one in kept] == [event]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        ("ca", "CERTIFICATE_VERIFY_FAILED"),
        ("credentials", "Authorization Violation"),
        ("unreadable", "not a NATS credentials file"),
    ],
)
async def test_refusals_are_named_and_tried_again(
    database: Database, secured: Secured, spoilt: str, words: str
) -> None:
    """What does not fit is named in the log, and no attempt is counted; once the file is right the event arrives, without a restart."""
    file = secured.file(spoilt)
    right = file.read_bytes()
    deliverer = Deliverer(database, secured.settings)
    file.write_bytes(_wrong(spoilt, file.parent))
    with capture_logs() as log:
        async with running(deliverer):
            event = await emit(database, nats=True)

            async def refused_twice() -> bool:
                return len([line for line in log if line["event"] == "nats_unreachable"]) >= 2

            await eventually(refused_twice)
            assert words in next(line["error"] for line in log if line["event"] == "nats_unreachable")
            assert (await only_delivery(database)).attempts == 0
            file.write_bytes(right)
            await all_settled(database)
    assert [kept for _, kept in await secured.kept()] == [event]
    assert right.splitlines()[-2].decode() not in json.dumps(log)  # of credentials: the seed


def _wrong(what: str, folder: Path) -> bytes:
    """CAs that did not sign the server, credentials of another operator, or a file that is none."""
    if what == "ca":
        (folder / "other").mkdir()
        server_certificate(folder / "other")
        return (folder / "other" / "receiver.pem").read_bytes()
    if what == "credentials":
        return NatsOperator().write_credentials(folder / "other.creds").read_bytes()
    return b"-----BEGIN USER NKEY SEED-----\n"


async def test_another_host_s_certificate_is_refused(secured: Secured) -> None:
    """A certificate that is verified but names another host is none."""
    settings = msgspec.structs.replace(secured.settings, url=secured.settings.url.replace("127.0.0.1", "localhost"))
    stream = JetStream(settings)
    with pytest.raises(StreamError, match="CERTIFICATE_VERIFY_FAILED"):
        await stream.connect()


@pytest.mark.parametrize("says", [{}, {"tls_available": True}, {"tls_required": False, "auth_required": True}])
async def test_nothing_is_said_in_the_clear(secured: Secured, says: dict[str, Any]) -> None:
    """Where tls:// was asked for, a server that announces no TLS hears not one byte: no JWT, and no signature of a nonce that it may have got."""
    heard = bytearray()
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = {"server_id": "x", "version": "2.9.10", "nonce": "real-server-s", "max_payload": 1024, **says}
        writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096):
                heard.extend(data)
                writer.write(b"PONG\r\n")
        writer.close()
        ended.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as between:
        port = between.sockets[0].getsockname()[1]
        stream = JetStream(msgspec.structs.replace(secured.settings, url=f"tls://127.0.0.1:{port}"))
        with pytest.raises(StreamError, match="the server offers no TLS"):
            await stream.connect()
        async with asyncio.timeout(30):
            await ended.wait()
    assert heard == b""


async def test_a_controller_starts_only_with_files_that_it_can_use(secured: Secured, tmp_path: Path) -> None:
    """CAs and credentials that can't be read at the start are errors of the configuration, by name."""
    replace = msgspec.structs.replace
    (tmp_path / "empty").write_bytes(b"")
    for changed, words in (
        ({"ca": str(tmp_path / "none")}, "nats.ca: .*No such file"),
        ({"ca": str(tmp_path / "empty")}, "nats.ca: "),
        ({"credentials": str(tmp_path / "none")}, "nats.credentials: .*No such file"),
        ({"credentials": str(tmp_path / "empty")}, "nats.credentials: .*not a NATS credentials file"),
    ):
        with pytest.raises(ConfigError, match=words):
            JetStream(replace(secured.settings, **changed))


@pytest.mark.parametrize(
    ("nats", "words"),
    [
        ({"url": "nats://events.example:4222", "credentials": "user.creds"}, "only for tls://"),
        ({"url": "nats://localhost:4222", "credentials": "user.creds"}, "only for tls://"),
        ({"url": "nats://host:port"}, "nats.url"),
        ({"url": "tls://:4222"}, "nats.url"),
    ],
)
def test_credentials_are_for_tls(tmp_path: Path, nats: dict[str, str], words: str) -> None:
    """Credentials with an unencrypted connection to another host, and addresses that are none, are errors of the configuration."""
    file = tmp_path / "controller.yaml"
    file.write_text(json.dumps({"nats": nats}))
    with pytest.raises(ConfigError, match=words):
        load(file)
    file.write_text(json.dumps({"nats": {"url": "nats://127.0.0.1:4222", "credentials": "user.creds"}}))
    settings = load(file).nats
    assert settings is not None
    assert settings.credentials == str(tmp_path / "user.creds")


@pytest.fixture
def config(secured: Secured, tmp_path: Path) -> Path:
    return controller_home(tmp_path, VENDOR.pem(), nats=msgspec.to_builtins(secured.settings))


@pytest.mark.slow
async def test_a_controller_as_it_is_started(secured: Secured, config: Path) -> None:
    """The service itself, with its settings file and its event loop, publishes over TLS with credentials."""
    node = SoftwareNode(vendor=VENDOR)
    async with ControllerProcess(config) as controller, access(config, controller.url) as office:
        await office.approve()
        await node.enrol(office.anyone, office.url, await office.token())

        async def arrived() -> list[tuple[str, str]] | None:
            with contextlib.suppress(NotFoundError):  # the controller makes the stream
                return await secured.kept()
            return None

        kept = await eventually(arrived)
        await controller.stop()
        assert controller.logged("nats_unreachable") == []
    assert [subject for subject, _ in kept] == ["edgewarden.node.result"]
