"""Fills a small file system under a strict log, frees it again, and prints what happened as JSON.

Runs in a mount namespace of its own, with a tmpfs of a few MiB at the directory it is given.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from agent.audit.log import AuditLog
from agent.audit.reader import tail, verify_log
from agent.errors import AuditError
from tests.support.audit import SMALL, event, head_of


async def _run(disk: Path) -> dict[str, object]:
    log = await AuditLog.open(disk / "log", "node-1", space=SMALL)
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler = os.open(disk / "filler", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(filler, 0, free - 300 * 1024)  # one more segment fits
    os.close(filler)
    acknowledged: list[int | None] = []
    refused = 0
    for n in range(100):
        results = await asyncio.gather(*[_append(log, n * 10 + k) for k in range(10)])
        acknowledged += [seq for seq in results if seq is not None]
        refused += results.count(None)
        if None in results:
            break
    full = {"durable": log.durable, "failure": log.failure, "last": head_of(next(tail(disk / "log", 1))).kind}
    present = {head_of(record).seq for record in tail(disk / "log", 10**6) if head_of(record).kind == "infer"}
    verified_full = verify_log(disk / "log").ok
    (disk / "filler").unlink()
    while not log.durable:  # noqa: ASYNC110 -- the condition is a fact of the log, not an event
        await asyncio.sleep(0.05)
    after = await log.append(event())
    await log.close()
    kinds = [head_of(record).kind for record in tail(disk / "log", 3)]
    return {
        "acknowledged": len(acknowledged),
        "refused": refused,
        "all_present": present == set(acknowledged),
        "full": full,
        "verified_full": verified_full,
        "after": after is not None,
        "kinds": kinds,
        "verified": verify_log(disk / "log").ok,
    }


async def _append(log: AuditLog, number: int) -> int | None:
    try:
        return await log.append(event(number, pad=5000))
    except AuditError:
        return None


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_run(Path(sys.argv[1])))))  # noqa: T201 -- its result, for the test that started it
