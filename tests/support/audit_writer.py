"""Forks a child for each line on its input; the child appends in strict mode until it is killed.

Output, one line each: ``pid N`` for a fork, ``SEQ NUMBER`` for an acknowledged record, ``end`` when the child is gone.
"""

import asyncio
import os
import sys
from pathlib import Path

from agent.audit.log import AuditLog, Space
from tests.support.audit import event

# Small segments, so that kills meet rotations, and room for every record that the fastest machine writes in that time.
SPACE = Space(segment_bytes=256 * 1024, budget_bytes=4 * 1024**3, ballast_bytes=512 * 1024)


async def _append_for_ever(directory: Path, generation: int) -> None:
    log = await AuditLog.open(directory, "node-1", space=SPACE)

    async def producer(lane: int) -> None:
        for n in range(10**6):
            number = (generation * 100 + lane) * 10**6 + n
            seq = await log.append(event(number, pad=(n % 7) * 1500))
            os.write(1, f"{seq} {number}\n".encode())

    await asyncio.gather(*[producer(lane) for lane in range(4)])


def main() -> None:
    """Serve until the input ends."""
    for generation, _ in enumerate(sys.stdin):
        pid = os.fork()
        if pid == 0:
            asyncio.run(_append_for_ever(Path(sys.argv[1]), generation))
        os.write(1, f"pid {pid}\n".encode())
        os.waitpid(pid, 0)
        os.write(1, b"end\n")


if __name__ == "__main__":
    main()
