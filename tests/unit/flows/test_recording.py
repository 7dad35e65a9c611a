"""From the gateway's events to the agent's word on them, and back."""

import asyncio

import pytest

from agent import messages
from agent.errors import AuditError, IsolationError
from agent.flows.dataplane import _Acknowledger
from agent.flows.recording import COLLECT_S, MAX_COLLECTED, MAX_OUTSTANDING, AuditClient
from agent.records import AuditEvent

EVENT = AuditEvent(kind="infer", time_us=1, outcome="ok")


class Channel:
    """Stands for a channel: keeps what was sent, or refuses to."""

    def __init__(self):
        self.frames = []
        self.closed = False
        self.broken = False

    def send(self, frame):
        if self.broken:
            raise IsolationError("channel: closed")
        self.frames.append(frame)

    def answers(self):
        split = [messages.split_hot_frame(frame, messages.ACKNOWLEDGE) for frame in self.frames]
        return [(number, error.decode()) for number, error in filter(None, split)]


def appended(client):
    future = client.append(EVENT)
    assert future is not None
    return future


@pytest.fixture
def channel():
    return Channel()


async def test_a_strict_event_is_sent_at_once_and_waits_for_its_own_settlement(channel):
    """A success settles all events before it, a failure its own one, whatever stands around it."""
    client = AuditClient(channel.send, strict=True)
    first, second, third, fourth = (appended(client) for _ in range(4))
    assert len(channel.frames) == 4
    client.acknowledged(2, "disk")
    client.acknowledged(3, "")
    assert first.result() is None
    assert third.result() is None
    assert str(second.exception()) == "disk"
    assert not fourth.done()
    client.close()
    with pytest.raises(AuditError):
        await fourth


async def test_a_strict_event_that_can_not_be_sent_is_refused(channel):
    """Without a way to the agent there is no record, and so no answer."""
    channel.broken = True
    with pytest.raises(AuditError, match="out of reach"):
        AuditClient(channel.send, strict=True).append(EVENT)


async def test_buffered_events_go_together_and_none_is_left_behind(channel):
    """Events are sent in their order, after the interval at the latest, and at once when there are many or at the end."""
    client = AuditClient(channel.send, strict=False)
    assert client.append(EVENT) is None
    client.append(EVENT)
    assert channel.frames == []
    await asyncio.sleep(3 * COLLECT_S)
    assert len(channel.frames) == 2
    for _ in range(MAX_COLLECTED):
        client.append(EVENT)
    assert len(channel.frames) == 2 + MAX_COLLECTED
    client.append(EVENT)
    client.flush()
    split = [messages.split_hot_frame(frame, messages.APPEND) for frame in channel.frames]
    assert [part[0] for part in split if part] == list(range(1, MAX_COLLECTED + 4))


async def test_a_buffered_failure_refuses_until_a_record_succeeds(channel):
    """The failure of one record stops answers; the next success lets them go on."""
    client = AuditClient(channel.send, strict=False)
    client.append(EVENT)
    client.acknowledged(1, "disk")
    with pytest.raises(AuditError, match="disk"):
        client.append(EVENT)
    client.acknowledged(2, "")
    client.append(EVENT)
    channel.broken = True
    client.flush()
    with pytest.raises(AuditError, match="out of reach"):
        client.append(EVENT)


@pytest.mark.parametrize("strict", [True, False])
async def test_no_more_than_the_limit_waits(channel, strict):
    """An agent that answers nothing stops the gateway from answering, in either mode; its answer frees all places."""
    client = AuditClient(channel.send, strict=strict)
    for _ in range(MAX_OUTSTANDING):
        client.append(EVENT)
    with pytest.raises(AuditError):
        client.append(EVENT)
    client.acknowledged(MAX_OUTSTANDING, "")
    client.append(EVENT)


async def test_the_agent_acknowledges_a_turn_with_one_frame_and_each_failure_with_its_own(channel):
    """What the gateway hears never counts a failed event as recorded."""
    loop = asyncio.get_running_loop()
    recorded = [loop.create_future() for _ in range(5)]
    acknowledger = _Acknowledger(channel)
    for number, future in enumerate(recorded, start=1):
        acknowledger.follow(number, future)
    for number in (1, 2, 4):
        recorded[number - 1].set_result(number)
    recorded[2].set_exception(AuditError("disk"))
    recorded[4].cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert channel.answers() == [(3, "disk"), (5, "the log was closed"), (4, "")]
    client = AuditClient(Channel().send, strict=True)
    waiting = [appended(client) for _ in range(5)]
    for number, error in channel.answers():
        client.acknowledged(number, error)
    assert [future.exception() is None for future in waiting] == [True, True, False, True, False]


async def test_nothing_is_said_to_a_gateway_that_is_gone(channel):
    """A record that is settled after its gateway's end is no error."""
    done = asyncio.get_running_loop().create_future()
    acknowledger = _Acknowledger(channel)
    acknowledger.follow(1, done)
    channel.closed = True
    done.set_result(1)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert channel.frames == []
