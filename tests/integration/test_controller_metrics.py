"""Health and metrics of a running controller: right figures, honest readiness, nothing that a peer chose."""

import asyncio
import contextlib
import json
import re
import socket
import sys
from pathlib import Path

import aiohttp
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select

from agent import clock
from agent.errors import ConfigError
from agent.host.notify import Notifier
from controller.api.metrics import MAX_CONNECTIONS
from controller.flows import watching
from controller.flows.polling import Poller
from controller.service import Controller
from controller.settings import load
from controller.store.database import Database
from controller.store.schema import replicas
from tests.support.controller_service import controller_home, desk, eventually
from tests.support.postgres import binaries, postgres_server
from tests.support.software_node import SoftwareNode, Vendor

pytestmark = pytest.mark.integration
VENDOR = Vendor()
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "controller.md"
METRICS = {"listen": "127.0.0.1:0"}


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    """Samples are taken often, so that a test need not wait for them."""
    monkeypatch.setattr(watching, "SAMPLE_S", 0.05)
    monkeypatch.setattr(watching, "SIGN_S", 0.05)


@pytest.fixture
def config(tmp_path):
    return controller_home(tmp_path, VENDOR.pem(), metrics=METRICS, poll={"interval_s": 1, "timeout_s": 1})


async def _read(url, path):
    async with aiohttp.ClientSession() as session, session.get(url + path) as answer:
        return answer.status, await answer.text()


async def _samples(url):
    status, text = await _read(url, "/metrics")
    assert status == 200
    return {
        (sample.name.removeprefix("edgewarden_controller_"), *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_the_figures_are_those_of_what_happened(config):
    """A node that joins, is polled and goes away shows in every figure that speaks of it."""
    edge = SoftwareNode(vendor=VENDOR)
    runner = await edge.serve()
    async with desk(config) as office:
        await office.approve()
        await office.call("POST", "/v1/hooks", {"url": "http://127.0.0.1:9/", "kinds": ["*"]}, expect=201)
        await edge.enrol(office.anyone, office.url, await office.token())

        async def polled():
            return (await _samples(office.metrics))["polls_total",] >= 2

        await eventually(polled)
        await runner.cleanup()

        async def away():
            return (await _samples(office.metrics)).get(("nodes", ("reached", "false"), ("status", "affirming"))) == 1

        await eventually(away)
        found = await _samples(office.metrics)
    assert found["ready",] == 1
    written = set(re.findall(r"\bedgewarden_controller_(\w+)", GUIDE.read_text()))
    assert written <= {name for name, *_ in found}
    assert found["unreachable_total",] >= 1
    assert found["appraisals_total", ("status", "affirming")] == found["appraisal_seconds_count",] >= 3
    assert found["appraisal_seconds_sum",] > 0
    assert found["poll_lag_seconds_count",] >= found["polls_total",]
    assert found["poll_lag_seconds_bucket", ("le", "+Inf")] == found["poll_lag_seconds_count",]
    assert found["enrolments_total", ("check", ""), ("outcome", "ok"), ("step", "begin")] == 1
    assert found["enrolments_total", ("check", ""), ("outcome", "ok"), ("step", "complete")] == 1
    assert found["calls_total", ("method", "POST"), ("route", "/v1/hooks"), ("status", "201")] == 1
    assert found["deliveries_total", ("outcome", "failed"), ("sink", "hook")] >= 1
    (depth,) = (value for (name, *_), value in found.items() if name == "outbox_events")
    (oldest,) = (value for (name, *_), value in found.items() if name == "outbox_oldest_seconds")
    assert depth >= 1
    assert oldest > 0
    (beat,) = (value for (name, *_), value in found.items() if name == "replica_heartbeat_age_seconds")
    assert beat < watching.STALE_S
    assert found["database_errors_total",] == 0
    assert clock.now() < found["certificate_until_seconds", ("certificate", "server.pem")]
    assert (
        found["certificate_until_seconds", ("certificate", "server.pem")]
        < found["certificate_until_seconds", ("certificate", "ca.pem")]
    )
    assert found["process_resident_memory_bytes",] > 0
    assert found["process_cpu_seconds_total",] > 0
    assert 0 < found["process_open_fds",] < found["process_max_fds",]


async def test_a_replica_that_ends_as_asked_is_forgotten(config):
    """Its place in the list of replicas is empty, so the next one reports no loss."""
    async with desk(config) as office:

        async def listed():
            return [key for key in await _samples(office.metrics) if key[0] == "replica_heartbeat_age_seconds"]

        await eventually(listed)
    database = await Database.open(load(config).database)
    async with database.begin() as connection:
        assert (await connection.execute(select(replicas))).all() == []
    await database.close()


async def test_no_label_holds_what_a_peer_chose(config):
    """Names of nodes, paths, methods and words of a hostile caller are in no label, and make no series of their own."""
    marks = ["evil-node", "evil/path", "EVIL", "evil-token"]
    edge = SoftwareNode(id="evil-node", vendor=VENDOR)
    async with desk(config) as office:
        await office.approve()
        await edge.enrol(office.anyone, office.url, await office.token(labels={"evil-token": "evil-token"}))
        before = await _samples(office.metrics)
        for number in range(40):
            for method, path, body in (
                ("GET", f"/evil/path/{number}", None),
                (f"EVIL{number}", "/v1/nodes", None),
                ("POST", f"/node/v1/enrol/evil-node-{number}", b"{}"),
                ("POST", "/node/v1/challenge", json.dumps({"node": f"evil-node-{number}"}).encode()),
                ("GET", f"/v1/nodes/evil-node-{number}", None),
            ):
                async with office.admin.request(method, office.url + path, data=body) as answer:
                    assert 400 <= answer.status < 500
        _, text = await _read(office.metrics, "/metrics")
        after = await _samples(office.metrics)
    assert not [mark for mark in marks if mark.lower() in text.lower()]
    assert len(after) - len(before) < 15


async def test_health_tells_life_from_work(tmp_path):
    """Without its database a replica lives and is not ready, says why to its own machine alone, and comes back by itself."""
    programs = binaries()
    if programs is None:
        pytest.skip("there is no PostgreSQL; Debian's package postgresql has it")
    with postgres_server(programs) as server:
        url = server.create_database()
        config = await asyncio.to_thread(controller_home, tmp_path, VENDOR.pem(), "--database", url, metrics=METRICS)
        async with desk(config) as office:

            async def ready():
                return (await _read(office.metrics, "/readyz"))[0] == 200

            await eventually(ready)
            async with office.anyone.get(office.url + "/readyz") as answer:
                assert (answer.status, await answer.json()) == (200, {"ready": True})
            await asyncio.to_thread(server.stop)

            async def unready():
                return not await ready()

            await eventually(unready)
            status, text = await _read(office.metrics, "/readyz")
            assert (status, json.loads(text)["holds"]) == (503, False)
            assert json.loads(text)["why"].startswith("database: ")
            assert (await _read(office.metrics, "/healthz"))[0] == 200
            found = await _samples(office.metrics)
            assert (found["ready",], found["database_errors_total",] > 0) == (0, True)
            async with office.anyone.get(office.url + "/readyz") as answer:
                assert (answer.status, (await answer.json())["check"]) == (503, "not_ready")
                assert "database" not in await answer.text()
            await asyncio.to_thread(server.start)
            await eventually(ready)


class _Still(Poller):
    """A poller that looks for nobody."""

    def __init__(self):
        """It needs nothing."""
        self.paused, self.looked_us = False, 0


async def test_polling_that_pauses_or_stands_still_is_no_readiness(config, monkeypatch):
    """Each reason is named: nothing seen yet, paused, standing still, stopping; and a silence of the database."""
    settings = load(config)
    database = await Database.open(settings.database)
    poller = _Still()
    watch = watching.Watch(database, poller, settings.poll, Notifier(None))
    assert watch.why_not() == "the database has not answered yet"
    task = asyncio.create_task(watch.run())
    await eventually(lambda: _true(watch.sample is not None))
    assert watch.why_not() == ""
    poller.paused = True
    assert watch.why_not() == "polling waits for the database"
    poller.paused = False
    monkeypatch.setattr(watch, "_stall_us", -1)
    assert watch.why_not().startswith("polling has stood still")
    task.cancel()
    await asyncio.wait([task])
    monkeypatch.setattr(watching, "STALE_S", -1.0)
    assert watch.why_not().startswith("database: it has not answered for")
    watch.stop()
    assert watch.why_not() == "it is stopping"
    await database.close()


async def _true(value):
    return value


async def test_a_full_house_still_answers(config):
    """With twice the connections that are allowed, the oldest are cut and the next call is answered."""
    async with desk(config) as office:
        port = int(office.metrics.rpartition(":")[2])
        with contextlib.ExitStack() as stack:
            idle = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(2 * MAX_CONNECTIONS)
            ]
            assert (await _read(office.metrics, "/healthz"))[0] == 200
            idle[0].setblocking(False)

            async def cut():
                try:
                    return idle[0].recv(1) == b""
                except BlockingIOError:
                    return False
                except ConnectionResetError:
                    return True

            await eventually(cut)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_the_listener_reads_only(config, method):
    """No method that could change anything is known there, and no route of the other listener."""
    async with desk(config) as office, aiohttp.ClientSession() as session:
        for path, status in (("/healthz", 405), ("/readyz", 405), ("/metrics", 405), ("/v1/nodes", 404)):
            async with session.request(method, office.metrics + path) as answer:
                assert answer.status == status


@pytest.mark.parametrize(
    ("listen", "words"),
    [
        ("0.0.0.0:9", "not a loopback address"),
        ("[::]:9", "not a loopback address"),
        ("localhost:9", "not ADDRESS:PORT"),
        ("127.0.0.1", "not ADDRESS:PORT"),
        ("127.0.0.1:x", "no port"),
        ("127.0.0.1:65536", "no port"),
    ],
)
def test_only_loopback_is_taken(tmp_path, listen, words):
    """An address that others could reach, a name or a wrong port is refused before anything runs."""
    path = tmp_path / "controller.yaml"
    path.write_text(json.dumps({"metrics": {"listen": listen}}))
    with pytest.raises(ConfigError, match=re.escape(words)):
        load(path)


def _move(config, port):
    """Name the port of the metrics in the settings."""
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(settings | {"metrics": {"listen": f"127.0.0.1:{port}"}}))


async def test_a_taken_port_is_a_clear_error(config):
    """The start ends with the setting's name."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        _move(config, port)
        with pytest.raises(ConfigError, match=r"metrics\.listen: 127\.0\.0\.1"):
            async with Controller(load(config)).running():
                pass


async def test_the_service_manager_hears_of_it(config, tmp_path):
    """READY once, then signs of life and a status, and STOPPING at the end."""
    path = tmp_path / "n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.setblocking(False)
        heard = []

        def hear():
            with contextlib.suppress(BlockingIOError):
                while True:
                    heard.append(manager.recv(4096).decode())

        async with Controller(load(config), Notifier(str(path)), 0.2).running():

            async def lives():
                hear()
                return heard.count("WATCHDOG=1") >= 3 and "STATUS=ready" in heard

            await eventually(lives)
        hear()
    assert heard.count("READY=1") == 1
    assert heard[-1] == "STOPPING=1"


async def _status(config, *more):
    """As an operator types it: exit code, output, errors."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "agent.cli", "controller", "status", "--config", str(config), *more),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


async def test_the_command_line_tells_the_state(config):
    """Ready: exit code 0 and the figures, as JSON the same; nobody there: 3."""
    async with desk(config) as office:
        _move(config, office.metrics.rpartition(":")[2])

        async def ready():
            return (await _read(office.metrics, "/readyz"))[0] == 200

        await eventually(ready)
        code, shown, _ = await _status(config)
        assert (code, shown.splitlines()[0]) == (0, "ready       database and polling do their work")
        assert re.search(r"^polls_total +0$", shown, re.MULTILINE)
        told = json.loads((await _status(config, "--json"))[1])
        assert told["ready"] is True
        assert told["figures"]["edgewarden_controller_ready"] == [{"labels": {}, "value": 1.0}]
    code, _, errors = await _status(config)
    assert (code, "no controller answers" in errors) == (3, True)


async def test_the_command_line_says_why_not(config, monkeypatch):
    """Not ready: exit code 1 and the reason."""
    monkeypatch.setattr(watching.Watch, "why_not", lambda _self: "polling waits for the database")
    async with desk(config) as office:
        _move(config, office.metrics.rpartition(":")[2])
        code, shown, _ = await _status(config)
    assert (code, shown.splitlines()[0]) == (1, "not ready   polling waits for the database")


async def test_the_command_line_takes_no_other_s_word(config):
    """Something else at that port is no controller, and without a port the setting is named."""

    async def other(reader, writer):
        await reader.readline()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(other, "127.0.0.1", 0)
    async with server:
        _move(config, server.sockets[0].getsockname()[1])
        code, _, errors = await _status(config)
    assert (code, "is no controller" in errors) == (3, True)
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(settings | {"metrics": {}}))
    code, _, errors = await _status(config)
    assert (code, "metrics.listen" in errors) == (3, True)
