"""The agent's end of a policy template, where no process is needed to see it."""

import asyncio
from typing import Any

import msgspec

from agent.isolation.channel import Channel, channel_pair
from agent.policy.generation import _Template
from agent.policy.template import Forked


class Handle:
    """Stands for a template's process: one end of its channel."""

    def __init__(self, sock):
        self.sock = sock
        self.killed = False

    def kill(self):
        self.killed = True


async def test_what_a_template_says_unasked_is_not_taken_for_an_answer():
    """A report that nobody waits for is dropped, with whatever comes after the one that was waited for."""
    ours, theirs = channel_pair()
    handle: Any = Handle(ours)
    template = _Template(handle)
    peer = Channel(theirs)
    peer.send(msgspec.json.encode(Forked(1)))
    await asyncio.sleep(0.02)
    asking = asyncio.create_task(template.reply(5.0))
    await asyncio.sleep(0)
    peer.send_many([msgspec.json.encode(Forked(2)), msgspec.json.encode(Forked(3))])
    assert await asking == Forked(2)
    template.close()
    assert handle.killed
    peer.close()
