"""Two replicas on one PostgreSQL: they share the fleet, and the death of one is no matter."""

import time

import pytest

from tests.support.controller_service import ControllerProcess, controller_home, desk, eventually
from tests.support.software_node import SoftwareNode, Vendor

pytestmark = [pytest.mark.integration, pytest.mark.slow]
VENDOR = Vendor()
INTERVAL_S = 2
NODES = 12


@pytest.fixture
def config(tmp_path, postgres_url):
    """The settings of all replicas: one directory of keys, one database; the first admin was made in it."""
    poll = {"interval_s": INTERVAL_S, "timeout_s": 2}
    return controller_home(tmp_path, VENDOR.pem(), "--database", postgres_url, poll=poll)


async def test_a_killed_replica_costs_no_node_a_poll_and_none_two(config):
    """However the two share the work, a node is asked at most once an interval; after a kill -9 every node goes on being asked."""
    nodes = [SoftwareNode(id=f"edge-{number}", vendor=VENDOR) for number in range(NODES)]
    runners = [await node.serve() for node in nodes]
    try:
        async with desk(config) as office:
            await office.approve()
            begin = time.monotonic()
            for node in nodes:
                await node.enrol(office.anyone, office.url, await office.token())
            async with ControllerProcess(config) as other:

                async def all_twice():
                    return all(len(node.asked) >= 2 for node in nodes)

                await eventually(all_twice)
                other.kill()
                assert await other.wait() == -9
                asked = [len(node.asked) for node in nodes]

                async def all_twice_more():
                    return all(len(node.asked) >= before + 2 for node, before in zip(nodes, asked, strict=True))

                await eventually(all_twice_more)
            slots = (time.monotonic() - begin) // INTERVAL_S + 1
            assert max(len(node.asked) for node in nodes) <= slots
            shown = (await office.call("GET", "/v1/nodes"))["nodes"]
            assert {(node["status"], node["reachable"]) for node in shown} == {("affirming", True)}
    finally:
        for runner in runners:
            await runner.cleanup()
