"""A process that measures and is killed, by itself at a named point of an append or by who started it."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from agent.attest.log import MeasurementLog
from agent.attest.measurement import model_entry
from agent.attest.tpm import Tpm
from agent.attest.tpm_thread import TpmThread

real_write, real_extend = os.write, Tpm.extend


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def torn(fd, data):
    real_write(fd, data[: len(data) // 2])
    die()


def extend_and_die(self, pcr, data):
    real_extend(self, pcr, data)
    die()


POINTS = {
    "before-write": (os, "write", die),
    "torn-write": (os, "write", torn),
    "before-fsync": (os, "fsync", die),
    "before-extend": (Tpm, "extend", die),
    "after-extend": (Tpm, "extend", extend_and_die),
}


async def main():
    tcti, folder, point = sys.argv[1:]
    log = await MeasurementLog.open(TpmThread(tcti), Path(folder), 14)
    await log.append(model_entry("m", "1", "first", bytes(32)))
    if point == "loop":
        for at in range(10_000):
            print(at, flush=True)  # noqa: T201 -- tells the test how far it is
            await log.append(model_entry("m", "1", f"file-{at}", bytes(32)))
    setattr(*POINTS[point])
    await log.append(model_entry("m", "1", "second", bytes(32)))


if __name__ == "__main__":
    asyncio.run(main())
