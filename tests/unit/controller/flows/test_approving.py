"""Approvals while nodes are polled, on SQLite and on PostgreSQL."""

import asyncio

from agent import clock
from controller.flows.approving import Approval, approve
from controller.store import audit, fleet, schedule
from controller.store.database import Database
from controller.store.fleet import NewNode

APPROVAL = Approval(policy="1" * 64, config="2" * 64, pcr=14)
NODE = NewNode("edge-1", "default", {}, "pull", "192.0.2.7:8444", "e" * 64, b"ak", "5" * 64, {}, 2**52)


async def test_an_approval_and_a_poll_that_is_kept_do_not_wait_for_each_other(database: Database) -> None:
    """Both lock a node's row of the schedule first and the audit log's head last, so neither is ended by the database."""
    await approve(database, "default", APPROVAL, "admin", 3600)
    async with database.begin() as connection:
        await fleet.add(connection, NODE, clock.now_us())
    async with database.begin() as connection:
        await schedule.answered(connection, "edge-1", 1)
        approval = asyncio.create_task(approve(database, "default", Approval(config="3" * 64), "admin", 3600))
        await asyncio.sleep(0.5)  # it has come as far as it can
        await audit.append(connection, audit.AuditEntry(kind="node.result", principal="controller"))
    assert (await approval).version == 2
