"""Approvals while nodes are polled, on SQLite and on PostgreSQL."""

import asyncio
import itertools

import msgspec
import pytest

from agent import clock
from agent.attest.result import MAX_WITHDRAWN
from agent.errors import PeerError
from controller.flows.approving import Approval, Withdrawal, approve, withdraw
from controller.store import audit, fleet, references, schedule
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


async def test_no_more_is_withdrawn_than_a_node_is_told(database: Database) -> None:
    """A node refuses a result that names more: one withdrawal too many would take the trust of a whole fleet."""
    digests = (f"{number:064x}" for number in itertools.count())
    many = {f"m/1/{number}": digest for number, digest in zip(range(MAX_WITHDRAWN), digests, strict=False)}
    await approve(database, "default", msgspec.structs.replace(APPROVAL, models=many), "admin", 3600)
    await approve(database, "default", Approval(models={"m/2/model.onnx": next(digests)}), "admin", 3600)
    await withdraw(database, "default", Withdrawal(kind="model", what="m/1"), "admin")
    with pytest.raises(PeerError, match="at most 4096"):
        await withdraw(database, "default", Withdrawal(kind="model", what="m/2"), "admin")
    async with database.begin() as connection:
        version, values = await references.current(connection, "default")
    assert values is not None
    assert (version, len(values.withdrawn_digests), list(values.models)) == (3, MAX_WITHDRAWN, ["m/2/model.onnx"])
