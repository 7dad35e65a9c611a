"""The gateway's side of the audit log."""

import asyncio

import pytest

from agent import messages
from agent.errors import AuditError, IsolationError
from agent.flows.recording import MAX_OUTSTANDING, AuditClient
from agent.records import AuditEvent

EVENT = AuditEvent(kind="infer", time_us=1, outcome="ok")


def numbers(sent):
    found = [messages.split_hot_frame(frame, messages.APPEND) for frame in sent]
    return [hot[0] for hot in found if hot]


async def test_strict_waits_for_its_own_record():
    """An answer goes out when its own record is durable, in whatever order the acknowledgements come."""
    sent: list[bytes] = []
    client = AuditClient(sent.append, strict=True)
    first, second = client.append(EVENT), client.append(EVENT)
    assert numbers(sent) == [1, 2]
    assert first is not None
    assert second is not None
    client.acknowledged(2, "")
    assert second.done()
    assert not first.done()
    client.acknowledged(1, "disk full")
    with pytest.raises(AuditError, match="disk full"):
        await first


async def test_buffered_waits_for_nothing_and_stops_at_a_failure():
    """Nothing waits; after a failure each append is refused, and still sent, until one is recorded again."""
    sent: list[bytes] = []
    client = AuditClient(sent.append, strict=False)
    assert client.append(EVENT) is None
    client.acknowledged(1, "disk full")
    with pytest.raises(AuditError, match="disk full"):
        client.append(EVENT)
    client.acknowledged(2, "")
    assert client.append(EVENT) is None
    assert numbers(sent) == [1, 2, 3]


async def test_an_agent_out_of_reach_refuses():
    """A channel that is closed, or full, refuses the record, and with it the answer."""

    def closed(_):
        raise IsolationError("channel: closed")

    client = AuditClient(closed, strict=True)
    with pytest.raises(AuditError, match="out of reach"):
        client.append(EVENT)


async def test_the_backlog_is_bounded():
    """At most so many records wait; an acknowledgement makes room again."""
    client = AuditClient(lambda _: None, strict=False)
    for _ in range(MAX_OUTSTANDING):
        client.append(EVENT)
    with pytest.raises(AuditError, match="wait for the audit log"):
        client.append(EVENT)
    client.acknowledged(1, "")
    client.append(EVENT)


async def test_the_end_of_the_agent_refuses_what_waits():
    """When the channel ends, whoever waits is refused; a late or repeated acknowledgement changes nothing."""
    client = AuditClient(lambda _: None, strict=True)
    waiting, gone = client.append(EVENT), client.append(EVENT)
    assert waiting is not None
    assert gone is not None
    gone.cancel()
    client.close()
    with pytest.raises(AuditError, match="the agent is gone"):
        await waiting
    client.acknowledged(1, "")
    client.acknowledged(99, "")
    await asyncio.sleep(0)
