"""The two servers that are compared, on one core; what loads them, on the other; and what either cost.

Rules:

1. A server's whole process tree is pinned to :data:`SERVER_CORE` from its start; generators run on :data:`LOAD_CORE`. With one core only, all share it.
2. CPU time is read from ``/proc/PID/task/*/schedstat`` (nanoseconds) of every process of the tree, before and after a round.
3. What was started is ended by its own process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import yaml

from bench.workloads import Workload
from tests.support.models import write_tiny
from tools.demo_node import ROOT, DemoNode, SoftwareTpm
from tools.example_models import write_orientation

__all__ = ["LOAD_CORE", "SERVER_CORE", "BareServer", "NodeServer", "Round", "Server", "cpu_ns", "load", "pinned"]

CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE = CORES[0]
LOAD_CORE = CORES[-1]
BENCH_LIMIT = {
    "requests_per_second": 1_000_000,
    "burst": 1_000_000,
    "concurrency": 256,
    "max_bytes": 64 << 20,
    "max_batch": 1024,
}


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """Pin this process, and with it what it starts meanwhile, to a core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Server(Protocol):
    """Something that can be loaded."""

    name: str

    def address(self) -> str:
        """HOST:PORT."""

    def tls(self) -> Mapping[str, str]:
        """The files ca, cert, key of the client; none for plain HTTP."""

    def processes(self) -> Mapping[str, int]:
        """Process ids by what they are."""


class BareServer:
    """``bench/bare.py`` with one model."""

    def __init__(self, model: Path) -> None:
        self.name = "bare"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        with pinned(SERVER_CORE):
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "bench" / "bare.py"), str(model), str(self._port)], stdout=subprocess.PIPE
            )
        if self._process.stdout is None or self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("the bare server does not start")

    def address(self) -> str:
        """See :class:`Server`."""
        return f"127.0.0.1:{self._port}"

    def tls(self) -> Mapping[str, str]:
        """See :class:`Server`."""
        return {}

    def processes(self) -> Mapping[str, int]:
        """See :class:`Server`."""
        return {"bare": self._process.pid}

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class NodeServer:
    """A whole node: real swtpm, sandboxes, signed packages and policy; only the limit of its one client is generous.

    Args:
        name: of the row.
        root: everything lies below it.
        durability: of the audit log.
        models: whether the picture model is installed besides the tiny one.
        policies: the policy's data instead of the shipped one.
        remember: whether decisions are remembered.
        environment: of the agent.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        durability: str,
        *,
        pictures: bool = True,
        policies: Path = ROOT / "policies",
        remember: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._tpm = SoftwareTpm(root / "tpm")
        with pinned(SERVER_CORE):
            self._tpm.start()
        # On a machine that is shared a worker may be kept waiting for longer than the deadline: that is not what is measured.
        deadlines = {"evaluation_deadline_ms": 2_000, "total_deadline_ms": 10_000}
        overrides = {
            "audit": {"durability": durability},
            "policy": {**deadlines, "remember_decisions": remember},
        }
        self.node = DemoNode(root / "node", self._tpm.tcti, overrides)
        self._environment = environment
        self._prepare(pictures=pictures, policies=policies)

    def _prepare(self, *, pictures: bool, policies: Path) -> None:
        node = self.node
        node.prepare()
        packages = [write_tiny(node.root / "packages" / "tiny" / "1", sensitivity="internal")]
        if pictures:
            packages.append(write_orientation(node.root / "packages" / "orientation" / "1.0.0"))
        for package in packages:
            node.sign_and_install(package)
        node.build_policy(policies=_generous(policies, node.root / "policies"))

    def start(self) -> None:
        """Start the agent and wait until it serves."""
        with pinned(SERVER_CORE):
            self.node.start(self._environment)

    def address(self) -> str:
        """See :class:`Server`."""
        return f"127.0.0.1:{self.node.port}"

    def tls(self) -> Mapping[str, str]:
        """See :class:`Server`."""
        return self.node.client_files("alice")

    def processes(self) -> Mapping[str, int]:
        """See :class:`Server`; without the software TPM, which stands for a chip."""
        if self.node.process is None:
            return {}
        agent = psutil.Process(self.node.process.pid)
        found = {"agent": agent.pid}
        for number, child in enumerate(agent.children(recursive=True)):
            # A child is named by what it became: ew-zygote, ew-gateway, ew-policy-template, with its workers named like it.
            found[f"{child.name().removeprefix('ew-')} {number}"] = child.pid
        return found

    def stop(self) -> None:
        """End the agent and the software TPM."""
        self.node.stop()
        self._tpm.stop()


def _generous(policies: Path, copy: Path) -> Path:
    """Copy policy data; the numbers of the default limit are raised so that it does not bind. The rules stay as they are."""
    for source in policies.glob("*/data.yaml"):
        data: dict[str, Any] = yaml.safe_load(source.read_text())
        if source.parent.name == "limits":
            data["limits"][data["default"]] |= BENCH_LIMIT
        target = copy / source.parent.name
        target.mkdir(parents=True)
        (target / "data.yaml").write_text(yaml.safe_dump(data))
    (copy / ".manifest").write_bytes((policies / ".manifest").read_bytes())
    return copy


@dataclass(frozen=True, slots=True)
class Round:
    """One closed loop.

    Attributes:
        rate: requests a second.
        p50_us: median latency.
        p99_us: 99th percentile.
        cpu_us: CPU time a request, by kind of process: bare, agent, gateway, policy.
    """

    rate: float
    p50_us: float
    p99_us: float
    cpu_us: Mapping[str, float]


def load(server: Server, workload: Workload, connections: int, seconds: float) -> Round:
    """Run one closed loop against a server."""
    command = [
        *(sys.executable, str(ROOT / "bench" / "load.py"), server.address(), str(workload.request)),
        *("--connections", str(connections), "--seconds", str(seconds)),
    ]
    for option, value in server.tls().items():
        command += [f"--{option}", value]
    processes = server.processes()
    before = {name: cpu_ns(pid) for name, pid in processes.items()}
    with pinned(LOAD_CORE):
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds + 60)
    if done.returncode:
        raise RuntimeError(f"{server.name}, {workload.name}, {connections} connections: {done.stderr[-500:]}")
    figures = json.loads(done.stdout)
    spent: dict[str, float] = {}
    for name, pid in processes.items():
        kind = name.split()[0].split("-")[0]
        with contextlib.suppress(FileNotFoundError):  # the worker of a policy's trial ends when it likes
            spent[kind] = spent.get(kind, 0.0) + (cpu_ns(pid) - before[name]) / 1000 / figures["requests"]
    return Round(figures["rate"], figures["p50_us"], figures["p99_us"], spent)


def cpu_ns(pid: int) -> int:
    """Return the CPU time of a process, user and system, of all its threads."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total
