"""Two appraisals of one node at a time, of which the newer one is kept last: what is thought, the history and what the node was told agree."""

import asyncio
import dataclasses
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from tests.support.controller_service import controller_home, desk
from tests.support.software_node import SoftwareNode, Vendor

pytestmark = pytest.mark.integration
VENDOR = Vendor()


@dataclass
class SlowNode(SoftwareNode):
    """A node that makes its quotes at once, and gives each when it is told to; it may call itself what it is not."""

    called: str = "edge-1"
    quoted: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    given: list[asyncio.Event] = field(default_factory=list)

    def evidence(self, nonce, start=0, **claims):
        return super().evidence(nonce, start, node=self.called, **claims)

    def application(self):
        @web.middleware
        async def hold(request, handler):
            answer = await handler(request)
            if request.method == "GET":
                self.attester.clock = dataclasses.replace(self.attester.clock, clock=self.attester.clock.clock + 1)
                go_on = asyncio.Event()
                self.given.append(go_on)
                self.quoted.release()
                await asyncio.wait_for(go_on.wait(), 30)
            return answer

        application = super().application()
        application.middlewares.append(hold)
        return application


@pytest.fixture(params=["sqlite", "postgresql"])
def config(request, tmp_path):
    options = ["--database", request.getfixturevalue("postgres_url")] if request.param == "postgresql" else []
    return controller_home(tmp_path, VENDOR.pem(), *options, poll={"interval_s": 3600, "timeout_s": 30})


@pytest.fixture
async def office(config):
    async with desk(config) as running:
        await running.approve()
        yield running


@pytest.fixture
async def node(office):
    node = SlowNode(vendor=VENDOR)
    runner = await node.serve()
    try:
        await node.enrol(office.anyone, office.url, await office.token())
        yield node
    finally:
        await runner.cleanup()


async def begin(office, node, called, *, expect=200):
    """Have the node polled, until it has made its quote."""
    node.called = called
    poll = asyncio.create_task(office.call("POST", "/v1/nodes/edge-1/poll", expect=expect))
    await asyncio.wait_for(node.quoted.acquire(), 30)
    return poll


async def changes(office):
    """The node's history, the oldest first; records and events must tell the same."""
    history = [row["status"] for row in await office.call("GET", "/v1/nodes/edge-1/results")][::-1]
    told = [(one["detail"]["before"], one["detail"]["status"]) for one in await office.records("node.result")]
    assert told == list(zip(["none", *history], history, strict=False))
    return history


async def test_no_change_is_hidden_by_polls_that_cross(office, node):
    """Both began when the node was affirming; of the first's finding and of the newer second's, affirming again, each has its row and its record."""
    first, second = await begin(office, node, "edge-2"), await begin(office, node, "edge-1")
    node.given[0].set()
    assert (await first)["status"] == "contraindicated"
    node.given[1].set()
    assert (await second)["status"] == "affirming"
    assert (await office.node("edge-1"))["status"] == "affirming"
    assert await changes(office) == ["affirming", "contraindicated", "affirming"]
    assert len(node.results) == 2


async def test_an_older_quote_is_not_put_over_a_newer(office, node):
    """The one that comes too late is refused by name; nothing of it is kept or told."""
    older, newer = await begin(office, node, "edge-1", expect=409), await begin(office, node, "edge-2")
    node.given[1].set()
    assert (await newer)["status"] == "contraindicated"
    node.given[0].set()
    assert (await older)["check"] == "overtaken"
    assert (await office.node("edge-1"))["status"] == "contraindicated"
    assert await changes(office) == ["affirming", "contraindicated"]
    assert len(node.results) == 1


async def test_a_poll_of_who_was_released_is_not_put_over_who_came_instead(office, node):
    """Another TPM has enrolled under the name meanwhile: the old node's appraisal is nobody's."""
    poll = await begin(office, node, "edge-2", expect=409)
    await office.call("DELETE", "/v1/nodes/edge-1")
    other = SoftwareNode(vendor=VENDOR)
    await other.enrol(office.anyone, office.url, await office.token(), mode="push", address=None)
    node.given[0].set()
    assert (await poll)["check"] == "overtaken"
    assert (await office.node("edge-1"))["status"] == "affirming"
    assert node.results == []
