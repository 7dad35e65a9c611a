"""An agent with one child of every kind: prints their pids as JSON and waits to be killed."""

import asyncio
import json
import os
import sys

from agent.isolation.channel import Channel, channel_pair
from agent.isolation.sandbox import Profile
from agent.isolation.supervisor import ProgramSpec, Zygote
from tests.support.isolation import ENTRIES, LIMITS, POLICY, spec


async def main(zygote: Zygote) -> None:
    gateway = await zygote.spawn(spec("echo"))
    template = await zygote.spawn(spec("policy_template", Profile.POLICY_TEMPLATE, args={"policy": POLICY}))
    ours, theirs = channel_pair()
    channel = Channel(template.sock)
    channel.send(b"fork", [theirs.fileno()])
    theirs.close()
    frames = channel.receive()
    assert frames is not None
    worker = zygote.adopt(int(frames[0].data))
    program = await zygote.spawn_program(ProgramSpec(["/bin/sleep", "600"], LIMITS))
    pids = [os.getpid(), zygote.pid, gateway.pid, template.pid, worker.pid, program.pid]
    sys.stdout.write(json.dumps(pids) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()
    ours.close()


if __name__ == "__main__":
    asyncio.run(main(Zygote.start([ENTRIES])))
