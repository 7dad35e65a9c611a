"""Two replicas on one PostgreSQL: they share the fleet, and the death of one is no matter."""

import asyncio
import json
import os
import socket
import time

import pytest
from sqlalchemy import select

from controller.service import HEARTBEAT_S
from controller.settings import load
from controller.store.database import Database
from controller.store.schema import replicas
from tests.support.controller_service import ControllerProcess, controller_home, desk, eventually
from tests.support.receiver import Receiver
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


@pytest.mark.timeout(200)
async def test_the_loss_of_a_replica_is_told_once(config):
    """One of the survivors writes a record and an event about the killed one, once; a replica that ended in order is not lost."""
    async with (
        Receiver().serving() as receiver,
        desk(config) as office,
        ControllerProcess(config) as survivor,
        ControllerProcess(config) as killed,
        ControllerProcess(config) as ended,
    ):
        await office.call("POST", "/v1/hooks", {"url": receiver.url, "kinds": ["controller.replica_lost"]}, expect=201)
        everybody = hosts(survivor, killed, ended)

        async def all_known():
            return await names(config) == everybody

        await eventually(all_known)
        killed.kill()
        await ended.stop()
        lost = f"{socket.gethostname()}:{killed.pid}"
        (got,) = await receiver.wait_for(1)
        # Whoever else would tell it has looked meanwhile: each looks every 5 s.
        await asyncio.sleep(2 * HEARTBEAT_S)
        (record,) = await office.records("controller.replica_lost")
        assert len(receiver.got) == 1
        event = json.loads(got.body)
        assert (event["kind"], event["replica"], event["node"]) == ("controller.replica_lost", lost, "")
        assert (record["outcome"], record["detail"]) == ("failed", {name: event[name] for name in record["detail"]})
        assert event["noticed_by"] in hosts(survivor)
        assert await names(config) == hosts(survivor)


def hosts(*others):
    """The names of replicas; this process runs one too."""
    return {f"{socket.gethostname()}:{pid}" for pid in (os.getpid(), *(other.pid for other in others))}


async def names(config):
    database = await Database.open(load(config).database)
    try:
        async with database.begin() as connection:
            return set(await connection.scalars(select(replicas.c.name)))
    finally:
        await database.close()
