"""What the figures were measured on: machine, versions, and how long this disk takes to make a record durable."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import ssl
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

__all__ = ["describe", "fdatasync_us", "steal_share", "wake_us"]

PACKAGES = ("aiohttp", "uvloop", "onnxruntime", "numpy", "gordon-to-regorus", "msgspec", "orjson", "cryptography")
SYNCS = 200
TURNS = 5000
RECORD_BYTES = 1024


def describe(directory: Path) -> list[tuple[str, str]]:
    """Return the rows of the first table."""
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    waits = fdatasync_us(directory)
    return [
        ("processor", f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores"),
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("Python", f"{platform.python_version()}, {_build()}, {ssl.OPENSSL_VERSION}"),
        ("packages", packages),
        ("fdatasync", f"p50 {statistics.median(waits):.0f} µs, p99 {sorted(waits)[len(waits) * 99 // 100]:.0f} µs"),
        ("two processes on one core", f"{wake_us():.1f} µs from a message to its answer"),
        ("load average at the start", " ".join(f"{load:.1f}" for load in os.getloadavg())),
    ]


def fdatasync_us(directory: Path) -> list[float]:
    """Append records to an allocated file, as the audit log does; return the time of each sync in microseconds."""
    path = directory / "fdatasync.probe"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    waits = []
    try:
        os.posix_fallocate(fd, 0, SYNCS * RECORD_BYTES)
        os.fsync(fd)
        for at in range(SYNCS):
            os.pwrite(fd, b"x" * RECORD_BYTES, at * RECORD_BYTES)
            begin = time.perf_counter_ns()
            os.fdatasync(fd)
            waits.append((time.perf_counter_ns() - begin) / 1000)
    finally:
        os.close(fd)
        path.unlink()
    return waits


def wake_us() -> float:
    """Return the time, in microseconds, that nine in ten exceed, of a message to a process on the same core and back: what a process boundary costs at best."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    echo = "import socket, sys\ns = socket.socket(fileno=int(sys.argv[1]))\nwhile m := s.recv(64): s.send(m)"
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with subprocess.Popen([sys.executable, "-c", echo, str(theirs.fileno())], pass_fds=[theirs.fileno()]):
            theirs.close()
            turns = []
            for _ in range(TURNS):
                begin = time.perf_counter_ns()
                ours.send(b"x")
                ours.recv(64)
                turns.append((time.perf_counter_ns() - begin) / 1000)
            ours.close()
    finally:
        os.sched_setaffinity(0, before)
    return sorted(turns)[TURNS // 10]


def steal_share() -> tuple[int, int]:
    """Return the machine's stolen and total CPU time, in ticks; the difference of two readings says who else ran."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return fields[7], sum(fields)


def _build() -> str:
    """Say whether this interpreter was configured for profile-guided optimisation, which is worth a fifth of its speed."""
    optimized = "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS"))
    # Debian applies it by another way, of which nothing is left to see.
    return f"configured with{'' if optimized else 'out'} --enable-optimizations"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
