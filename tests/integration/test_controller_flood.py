"""What a peer can make the controller keep, read or work at: each on SQLite and on PostgreSQL."""

import asyncio
import threading

import pytest

from agent.attest.appraisal import appraise
from agent.attest.measurement import model_entry
from controller.api import refusals
from controller.flows import appraising
from tests.support.attest import digest
from tests.support.controller_service import controller_home, desk, eventually
from tests.support.software_node import SoftwareNode, Vendor

pytestmark = pytest.mark.integration
VENDOR = Vendor()


@pytest.fixture(params=["sqlite", "postgresql"])
def config(request, tmp_path):
    options = ("--database", request.getfixturevalue("postgres_url")) if request.param == "postgresql" else ()
    return controller_home(tmp_path, VENDOR.pem(), *options, poll={"interval_s": 3600, "timeout_s": 5})


@pytest.fixture
async def office(config):
    async with desk(config) as running:
        await running.approve()
        yield running


async def test_nobody_fills_the_audit_log_by_being_refused(office):
    """Of an address some refusals stand in it by themselves; the others are counted, in one record, and none is lost."""
    calls = refusals.SOURCE_PER_MINUTE + 80
    for _ in range(calls):
        async with office.anyone.get(office.url + "/v1/nodes") as answer:
            assert answer.status == 401

    alone = len(await office.records("node.list"))
    assert refusals.SOURCE_PER_MINUTE <= alone < calls

    async def told():
        details = [record["detail"] for record in await office.records("refusals")]
        assert all(detail["checks"] == {"no_certificate": detail["count"]} for detail in details)
        return sum(detail["count"] for detail in details) == calls - alone

    await eventually(told)


async def test_an_admin_s_refusals_are_all_recorded(office):
    """However many."""
    calls = refusals.ALL_PER_MINUTE + 20
    for _ in range(calls):
        await office.call("GET", "/v1/nodes/nobody", expect=404)
    assert len(await office.records("node.show")) == calls


@pytest.fixture
async def strict_office(config):
    config.write_text(config.read_text().replace("per_minute: 1000", "per_minute: 3"))
    async with desk(config) as running:
        await running.approve()
        yield running


@pytest.mark.parametrize(
    "path", ["/node/v1/enrol", "/node/v1/enrol/" + "0" * 32, "/node/v1/challenge", "/node/v1/evidence"]
)
async def test_who_calls_too_often_is_refused_before_its_body_is_read(strict_office, path):
    """A body that never comes does not delay the refusal."""
    answers = []
    for _ in range(4):
        async with strict_office.anyone.post(strict_office.url + path, data=b"{}") as answer:
            answers.append(answer.status)
    assert answers == [400, 400, 400, 429]

    async def endless():
        yield b"{"
        await asyncio.sleep(3600)

    async with asyncio.timeout(20), strict_office.anyone.post(strict_office.url + path, data=endless()) as answer:
        assert answer.status == 429


async def test_the_fleet_is_not_held_up_by_strangers(strict_office):
    """Who shows a certificate has a limit of its own."""
    node = SoftwareNode(vendor=VENDOR)
    await node.enrol(strict_office.anyone, strict_office.url, await strict_office.token(), mode="push", address=None)
    status = 0
    for _ in range(4):
        async with strict_office.anyone.post(
            strict_office.url + "/node/v1/challenge", json={"node": "edge-1"}
        ) as answer:
            status = answer.status
    assert status == 429
    async with node.session() as session:
        assert (await node.push(session, strict_office.url))[0] == 200


async def test_a_long_log_holds_up_nobody_else(office, monkeypatch):
    """Its appraisal leaves the event loop: when it comes first, when it is read again for new Reference Values, and not in between."""
    threads = []

    def observed(evidence, expect):
        threads.append(threading.current_thread() is threading.main_thread())
        return appraise(evidence, expect)

    monkeypatch.setattr(appraising, "appraise", observed)
    node = SoftwareNode(vendor=VENDOR)
    node.entries += [model_entry("m", str(number), "model.onnx", digest(str(number))) for number in range(1500)]
    runner = await node.serve()
    try:
        await node.enrol(office.anyone, office.url, await office.token())
        assert threads == [False]
        await office.call("POST", "/v1/nodes/edge-1/poll")
        assert threads == [False, True]
        await office.approve(config="3" * 64)
        await office.call("POST", "/v1/nodes/edge-1/poll")
        assert threads == [False, True, True, False]  # at first without the state
    finally:
        await runner.cleanup()
    assert (await office.node("edge-1"))["log_entries"] == len(node.entries)


@pytest.mark.parametrize("stranger", ["anybody", "another node"])
async def test_what_strangers_ask_for_displaces_no_nonce_of_a_node_s_own(office, stranger):
    """A node that shows its certificate can answer its challenge, however many others were asked for in its name."""
    node, other = (SoftwareNode(id=f"edge-{number}", vendor=VENDOR) for number in range(2))
    for one in (node, other):
        await one.enrol(office.anyone, office.url, await office.token(), mode="push", address=None)
    async with node.session() as mine, other.session() as others:
        challenge = await node.challenge(mine, office.url)
        for _ in range(10):
            await other.challenge(office.anyone if stranger == "anybody" else others, office.url, node.id)
        status, answer = await node.answer(mine, office.url, challenge)
    assert status == 200, answer
