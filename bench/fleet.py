"""A fleet of simulated nodes against one controller on PostgreSQL: ``python -m bench.fleet`` (``--nodes 1000 10000``).

Rules:

1. The nodes are software, and all of it in one process: real TPM structures and signatures, real TLS, the real protocol, each with its own
   endorsement and attestation key and an address of its own (127.1.0.0/16, one listener bound to the loopback device). They share the key of
   their control listener, which costs the controller nothing less.
2. Every node joins through the API with a token of its own. The controller is a process as its unit runs it; PostgreSQL is Debian's, durable.
3. Controller, PostgreSQL and fleet share the machine's cores, none is pinned; each one's CPU time is read from the kernel, before and after.
4. Lag is the controller's own histogram: from when a node was due to when its poll was begun. Measuring begins after one whole interval.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import psutil
import uvloop
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.engine import make_url

from agent.attest.enrolment import JoinToken
from bench.servers import cpu_ns
from tests.support.controller_service import APPROVAL, admin_context, controller_home
from tests.support.postgres import PostgresServer, binaries, postgres_server
from tests.support.software_node import SoftwareNode, Vendor

__all__ = ["INTERVAL_S", "SIZES", "Figures", "measure", "report"]

SIZES = (1_000, 10_000)
INTERVAL_S = 60
LAG_BAR_S = 5.0
ENROLLING = 16  # at a time
_PORT, _METRICS_PORT = 18445, 18446
_SO_BINDTODEVICE = 25
_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Figures:
    """One row. CPU times are milliseconds a poll; ``lag`` is shares by upper bound in seconds."""

    nodes: int
    interval_s: float
    polls_s: float
    controller_ms: float
    postgres_ms: float
    fleet_ms: float
    appraisal_us: float
    unreachable: int
    lag: dict[float, float]
    enrol_ms: float
    bytes_a_node: float
    growth_a_node_day: float
    wal_a_node_day: float

    def lag_p99_s(self) -> float:
        """Return the histogram's bound below which 99 of 100 polls began."""
        return min(bound for bound, share in self.lag.items() if share >= 0.99)


@dataclass
class Fleet:
    """The nodes, behind one listener."""

    vendor: Vendor = field(default_factory=Vendor)
    control: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    nodes: dict[str, SoftwareNode] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """Serve all of them; gives the port."""
        application = web.Application()
        application.add_routes(
            [web.get("/attestation/v1/evidence", self._evidence), web.put("/attestation/v1/result", self._result)]
        )
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, b"lo\0")  # all of 127.0.0.0/8, and nothing else
        sock.bind(("", 0))
        sock.listen(4096)
        context = SoftwareNode(vendor=self.vendor, control=self.control).server_context()
        await web.SockSite(runner, sock, ssl_context=context).start()
        try:
            yield sock.getsockname()[1]
        finally:
            await runner.cleanup()

    async def _evidence(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        node = self.nodes[request.transport.get_extra_info("sockname")[0]]
        evidence = node.evidence(bytes.fromhex(request.query["nonce"]), int(request.query["from"]))
        return web.Response(body=evidence.encode(), content_type="application/json")

    async def _result(self, request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=204)

    async def enrol(self, count: int, port: int, admin: aiohttp.ClientSession, anyone: aiohttp.ClientSession) -> None:
        """Let that many nodes join."""
        gate = asyncio.Semaphore(ENROLLING)
        url = f"https://localhost:{_PORT}"

        async def one(number: int) -> None:
            async with gate:
                host = f"127.1.{number >> 8}.{number & 255}"
                node = SoftwareNode(id=f"edge-{number:05}", vendor=self.vendor, control=self.control)
                self.nodes[host] = node
                async with admin.post(f"{url}/v1/tokens", json={"group": "default"}) as answer:
                    token = JoinToken.parse((await answer.json())["token"])
                await node.enrol(anyone, url, token, address=f"{host}:{port}")

        await asyncio.gather(*(one(number) for number in range(count)))


@dataclass(frozen=True, slots=True)
class _Reading:
    at: float
    cpu_s: dict[str, float]
    polls: float
    unreachable: float
    appraisals: tuple[float, float]
    lag: dict[float, float]
    database_bytes: int
    wal: int


def _tree_s(pid: int) -> float:
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    total = 0
    for process in processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += cpu_ns(process.pid)
    return total / 1e9


async def _read(session: aiohttp.ClientSession, database: asyncpg.Connection, pids: dict[str, int]) -> _Reading:
    at = time.monotonic()
    cpu_s = {name: _tree_s(pid) for name, pid in pids.items()} | {"fleet": time.process_time()}
    wal = await database.fetchval("select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint")
    async with session.get(f"http://127.0.0.1:{_METRICS_PORT}/metrics") as answer:
        text = await answer.text()
    found: dict[str, float] = {}
    lag: dict[float, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("edgewarden_controller_")
            if name == "poll_lag_seconds_bucket":
                lag[float(sample.labels["le"])] = sample.value
            elif not sample.labels:
                found[name] = sample.value
    # What autovacuum would do in time, so that a size is the size of what is kept.
    await database.execute("VACUUM")
    size = await database.fetchval("select pg_database_size(current_database())")
    return _Reading(
        at=at,
        cpu_s=cpu_s,
        polls=found["polls_total"],
        unreachable=found["unreachable_total"],
        appraisals=(found["appraisal_seconds_count"], found["appraisal_seconds_sum"]),
        lag=lag,
        database_bytes=size,
        wal=wal,
    )


def _figures(begin: _Reading, end: _Reading, *, count: int, interval_s: float, enrol_ms: float, empty: int) -> Figures:
    seconds, polls = end.at - begin.at, end.polls - begin.polls
    cpu = {name: 1000 * (end.cpu_s[name] - begin.cpu_s[name]) / polls for name in end.cpu_s}
    appraised = end.appraisals[0] - begin.appraisals[0]
    days = seconds / _DAY_S
    claimed = end.lag[float("inf")] - begin.lag[float("inf")]
    return Figures(
        nodes=count,
        interval_s=interval_s,
        polls_s=polls / seconds,
        controller_ms=cpu["controller"],
        postgres_ms=cpu["postgres"],
        fleet_ms=cpu["fleet"],
        appraisal_us=1e6 * (end.appraisals[1] - begin.appraisals[1]) / appraised,
        unreachable=int(end.unreachable - begin.unreachable),
        lag={bound: (end.lag[bound] - begin.lag[bound]) / claimed for bound in end.lag},
        enrol_ms=enrol_ms,
        bytes_a_node=(end.database_bytes - empty) / count,
        growth_a_node_day=(end.database_bytes - begin.database_bytes) / count / days,
        wal_a_node_day=(end.wal - begin.wal) / count / days,
    )


@contextlib.contextmanager
def _controller(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "agent.cli", "controller", "run", "--config", str(config)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


async def _ready(session: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"http://127.0.0.1:{_METRICS_PORT}/readyz") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)


async def _run(count: int, config: Path, server: PostgresServer, database: str, seconds: float) -> list[Figures]:
    fleet = Fleet()
    (config.parent / "vendor.pem").write_bytes(fleet.vendor.pem())
    found = []
    async with contextlib.AsyncExitStack() as stack:
        process = stack.enter_context(_controller(config))
        port = await stack.enter_async_context(fleet.serving())
        admin, anyone = [
            await stack.enter_async_context(
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=admin_context(config.parent, name), limit=64))
            )
            for name in ("admin", None)
        ]
        await _ready(anyone)
        connection = await asyncpg.connect(host=str(server.directory), user="edgewarden", database=database)
        stack.push_async_callback(connection.close)
        async with admin.post(f"https://localhost:{_PORT}/v1/groups/default/references", json=APPROVAL) as answer:
            assert answer.status == 201, await answer.text()
        empty = await connection.fetchval("select pg_database_size(current_database())")
        pids = {"controller": process.pid, "postgres": server.pid}
        before = _tree_s(process.pid)
        print(f"{count} nodes join", file=sys.stderr, flush=True)
        await fleet.enrol(count, port, admin, anyone)
        enrol_ms = 1000 * (_tree_s(process.pid) - before) / count
        for interval_s in (INTERVAL_S, INTERVAL_S // 2):
            await _set_interval(admin, interval_s)
            print(f"polled every {interval_s} s", file=sys.stderr, flush=True)
            await asyncio.sleep(1.2 * interval_s)
            begin = await _read(anyone, connection, pids)
            await asyncio.sleep(seconds)
            end = await _read(anyone, connection, pids)
            found.append(_figures(begin, end, count=count, interval_s=interval_s, enrol_ms=enrol_ms, empty=empty))
    return found


async def _set_interval(admin: aiohttp.ClientSession, interval_s: int) -> None:
    url = f"https://localhost:{_PORT}/v1/groups/default/interval"
    async with admin.put(url, json={"interval_s": interval_s}) as answer:
        assert answer.status == 200, await answer.text()


def measure(count: int, seconds: float) -> list[Figures]:
    """Measure one fleet, at the interval of the bar and at half of it, each for that many seconds."""
    programs = binaries()
    if programs is None:
        raise RuntimeError("no PostgreSQL: make setup installs Debian's")
    with tempfile.TemporaryDirectory() as folder, postgres_server(programs, durable=True) as server:
        url = server.create_database()
        settings: dict[str, Any] = {
            "listen": f"127.0.0.1:{_PORT}",
            "url": f"https://localhost:{_PORT}",
            "metrics": {"listen": f"127.0.0.1:{_METRICS_PORT}"},
            "enrolment": {"ek_roots": ["vendor.pem"], "per_minute": 100_000},
            "poll": {"interval_s": 86_400},  # while they join, nobody is polled
            "log_level": "error",
        }
        config = controller_home(Path(folder), b"", "--database", url, **settings)
        return uvloop.run(_run(count, config, server, make_url(url).database or "", seconds))


def report(sizes: tuple[int, ...], seconds: float) -> None:
    """Print the table and its bar."""
    print("\n## A fleet against one controller on PostgreSQL\n")
    heads = (
        "nodes",
        "interval, s",
        "appraisals/s",
        "CPU ms a poll: controller, PostgreSQL, fleet",
        "in the appraiser, µs",
    )
    print("| " + " | ".join((*heads, "lag ≤ 1 s", "p99 lag below, s", "not reached")) + " |")
    print("| --- " * 8 + "|")
    rows = [row for count in sizes for row in measure(count, seconds)]
    for row in rows:
        cpu = f"{row.controller_ms:.1f}, {row.postgres_ms:.1f}, {row.fleet_ms:.1f}"
        print(
            f"| {row.nodes} | {row.interval_s:.0f} | {row.polls_s:.0f} | {cpu} | {row.appraisal_us:.0f} "
            f"| {row.lag[1.0]:.1%} | {row.lag_p99_s():g} | {row.unreachable} |"
        )
    print(
        "\n| nodes | enrolment, controller's CPU ms | database, bytes a node | growth meanwhile, a node and day | WAL a node and day |"
    )
    print("| --- " * 5 + "|")
    for row in rows[::2]:
        print(
            f"| {row.nodes} | {row.enrol_ms:.1f} | {row.bytes_a_node:.0f} "
            f"| {row.growth_a_node_day / 1e3:.1f} kB | {row.wal_a_node_day / 1e6:.1f} MB |"
        )
    for row in rows[::2]:
        word = "holds" if row.lag_p99_s() <= LAG_BAR_S and not row.unreachable else "MISSED"
        print(
            f"\nBar: {row.nodes} nodes at {INTERVAL_S} s, 99 of 100 polls at most {LAG_BAR_S:.0f} s late: **{word}**."
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--seconds", type=float, default=2.0 * INTERVAL_S, help="of measuring, at each interval")
    arguments = parser.parse_args()
    report(tuple(arguments.nodes), arguments.seconds)


if __name__ == "__main__":
    main()
