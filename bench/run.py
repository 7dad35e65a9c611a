"""``make bench``: the guarded node beside an unguarded server, in one run; prints Markdown.

Rules:

1. Ratios, not times: rounds of the servers alternate, each round's ratio is taken with the bare round beside it, and the table has the
   median and the spread.
2. One core serves, the other loads (``bench/servers.py``).
3. What the bench changes of a shipped node: the default limit's numbers and the policy deadlines, so that neither binds. Nothing else.

``--quick`` takes about two minutes, the full run about fifteen. ``--only`` takes some of the sections; ``fleet``, which takes half an hour,
runs only when it is named.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import appraisal, fleet, loading
from bench.machine import describe, steal_share
from bench.servers import LOAD_CORE, BareServer, NodeServer, Round, Server, cpu_ns, load, pinned
from bench.workloads import Workload, write_workloads
from tools.demo_node import ROOT

HOME = ROOT / ".cache" / "bench"
CONCURRENCY = (1, 8, 32)
INFERENCE_BAR = 0.45
LOADING_BAR = 0.6
MEMORY_BAR_MB = 200.0
IDLE_S = 10.0
_PROCESSES = ("gateway", "policy", "agent")


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure."""

    rounds: int
    seconds: float
    decision_seconds: float
    starts: int


QUICK = Effort(rounds=3, seconds=0.5, decision_seconds=1.0, starts=1)
FULL = Effort(rounds=7, seconds=2.0, decision_seconds=4.0, starts=3)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def title(text: str) -> None:
    """Begin a section."""
    print(f"\n## {text}", flush=True)


def spread(values: Sequence[float]) -> str:
    """Median and range of some ratios."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def verdict(bar: str, *, holds: bool) -> str:
    """Say whether a bar holds."""
    return f"\nBar: {bar}: **{'holds' if holds else 'MISSED'}**."


# --- inference


def inference(effort: Effort) -> None:
    """The first table, and where the time of a tiny request goes."""
    title("Inference beside an unguarded server")
    workloads = write_workloads(HOME / "requests")
    nodes = [NodeServer(durability, HOME / durability, durability) for durability in ("buffered", "strict")]
    bares: dict[str, BareServer] = {}
    try:
        for node in nodes:
            node.start()
        packages = nodes[0].node.root / "packages"
        for model, version in (("tiny", "1"), ("orientation", "1.0.0")):
            bares[model] = BareServer(packages / model / version / "model.onnx")
        rows, held = [], []
        for workload in workloads:
            for connections in CONCURRENCY:
                rounds = _rounds([bares[workload.model], *nodes], workload, connections, effort)
                rows.append(_row(workload, connections, rounds))
                if workload is workloads[0]:
                    held.append(statistics.median(_ratios(rounds, "buffered")))
        heads = (
            "request",
            "at a time",
            "bare, req/s",
            "buffered / bare",
            "strict / bare",
            "p50 µs: bare, buffered, strict",
        )
        table((*heads, "CPU µs: bare, buffered, strict"), rows)
        print(
            verdict(
                f"buffered, tiny JSON, at least {INFERENCE_BAR} of the bare server at {CONCURRENCY}",
                holds=min(held) >= INFERENCE_BAR,
            )
        )
        _where(nodes[0], bares["tiny"], workloads[0], effort)
        _asked_anew(bares["tiny"], workloads[0], effort)
    finally:
        for server in (*bares.values(), *nodes):
            server.stop()


def _rounds(
    servers: Sequence[Server], workload: Workload, connections: int, effort: Effort
) -> Mapping[str, list[Round]]:
    rounds: dict[str, list[Round]] = {server.name: [] for server in servers}
    for server in servers:  # not counted: connections, caches, specialised bytecode
        load(server, workload, connections, 0.2)
    for _ in range(effort.rounds):
        for server in servers:
            rounds[server.name].append(load(server, workload, connections, effort.seconds))
    return rounds


def _ratios(rounds: Mapping[str, Sequence[Round]], name: str) -> list[float]:
    return [mine.rate / bare.rate for mine, bare in zip(rounds[name], rounds["bare"], strict=True)]


def _median(rounds: Sequence[Round], of: Callable[[Round], float]) -> float:
    return statistics.median(of(one) for one in rounds)


def _row(workload: Workload, connections: int, rounds: Mapping[str, Sequence[Round]]) -> list[str]:
    order = [rounds[name] for name in ("bare", "buffered", "strict")]
    return [
        workload.name,
        str(connections),
        f"{_median(rounds['bare'], lambda one: one.rate):.0f}",
        spread(_ratios(rounds, "buffered")),
        spread(_ratios(rounds, "strict")),
        ", ".join(f"{_median(some, lambda one: one.p50_us):.0f}" for some in order),
        ", ".join(f"{_median(some, lambda one: sum(one.cpu_us.values())):.0f}" for some in order),
    ]


def _where(node: NodeServer, bare: BareServer, workload: Workload, effort: Effort) -> None:
    title("Where the time of a tiny JSON request goes, buffered")
    print(
        "\nCPU time of each process from `/proc/PID/task/*/schedstat`; stages by the gateway's own clock (its metrics are the sum of the"
        "\n`Server-Timing` that each answer carries). A stage that waits contains what other processes and other requests do meanwhile."
    )
    rows = []
    for connections in CONCURRENCY:
        before = _stages(node)
        guarded = load(node, workload, connections, effort.seconds * 2)
        after = _stages(node)
        plain = load(bare, workload, connections, effort.seconds)
        processes = ", ".join(f"{kind} {micros:.0f}" for kind, micros in guarded.cpu_us.items() if micros >= 1)
        rows.append([f"{connections} at a time, CPU", f"bare {plain.cpu_us['bare']:.0f}; {processes}"])
        split = [
            f"{stage} {1e6 * (total - before.get(stage, (0, 0))[0]) / max(count - before.get(stage, (0, 0))[1], 1):.0f}"
            for stage, (total, count) in after.items()
        ]
        rows.append([f"{connections} at a time, stages", ", ".join(split)])
    table(("tiny, JSON", "µs a request"), rows)


def _asked_anew(bare: BareServer, workload: Workload, effort: Effort) -> None:
    title("The same, with every decision asked anew")
    node = NodeServer("anew", HOME / "anew", "buffered", pictures=False, remember=False)
    rows = []
    try:
        node.start()
        for connections in CONCURRENCY:
            rounds = _rounds([bare, node], workload, connections, effort)
            processes = {kind: _median(rounds["anew"], lambda one, kind=kind: one.cpu_us[kind]) for kind in _PROCESSES}
            split = ", ".join(f"{kind} {micros:.0f}" for kind, micros in processes.items())
            rows.append([workload.name, str(connections), spread(_ratios(rounds, "anew")), split])
    finally:
        node.stop()
    table(("request", "at a time", "buffered / bare", "CPU µs"), rows)


def _stages(node: NodeServer) -> dict[str, tuple[float, float]]:
    """Return sum (seconds) and count by stage of the latency histogram."""
    time.sleep(1.2)  # a gateway reports once a second
    text = node.node.local("GET", "/metrics", surface="health")[1]
    found: dict[str, dict[str, float]] = {}
    for line in str(text).splitlines():
        name, _, value = line.rpartition(" ")
        metric, _, labels = name.partition("{")
        if metric in {"edgewarden_latency_seconds_sum", "edgewarden_latency_seconds_count"}:
            found.setdefault(labels.split('"')[1], {})[metric.rsplit("_", 1)[1]] = float(value)
    return {stage: (values["sum"], values["count"]) for stage, values in found.items()}


# --- the other sections


def decisions(effort: Effort) -> None:
    """Latency of a decision, IPC included."""
    title("A policy decision, from the asker through the sandboxed worker and back")
    rows = []
    for policy in ("small", "realistic"):
        command = [sys.executable, "-m", "bench.decisions", policy, "--seconds", str(effort.decision_seconds)]
        with pinned(LOAD_CORE):
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=120)
        for askers, (p50, p99, rate) in json.loads(done.stdout.splitlines()[-1]).items():
            rows.append([policy, askers, f"{p50:.0f}", f"{p99:.0f}", f"{rate:.0f}"])
    table(("policy", "askers", "p50 µs", "p99 µs", "decisions/s"), rows)
    print(
        "\n`small` is the shipped policy; `realistic` the same rules over 1,000 users, 20 roles, 60 models and 32 networks."
    )


def package_load(effort: Effort) -> None:
    """A large package."""
    title("Verified load of a large package")
    figures = loading.measure(HOME / "large", effort.rounds)
    rows = [
        ["openssl dgst -sha256", f"{figures.openssl_s:.3f}", "1"],
        ["read, hash, seal, verify the signature", f"{figures.verify_s:.3f}", spread(figures.verify_ratios)],
        ["the same, and build the session", f"{figures.session_s:.3f}", spread(figures.session_ratios)],
    ]
    table((f"{figures.megabytes:.0f} MB of external data", "seconds", "of openssl's speed"), rows)
    holds = statistics.median(figures.verify_ratios) >= LOADING_BAR
    print(verdict(f"verified load at {LOADING_BAR} of openssl's speed or more", holds=holds))


def footprint(effort: Effort) -> None:
    """Memory, idle CPU and start of a node with the tiny model."""
    title("Footprint of a node with the tiny model")
    node = NodeServer("footprint", HOME / "footprint", "strict", pictures=False)
    starts = []
    try:
        for number in range(effort.starts):
            if number:
                node.node.stop()
            begin = time.monotonic()
            node.start()
            starts.append(time.monotonic() - begin)
        load(node, write_workloads(HOME / "requests")[0], 8, 0.5)
        time.sleep(2.0)
        processes = node.processes()
        before = {name: cpu_ns(pid) for name, pid in processes.items()}
        time.sleep(IDLE_S)
        idle = {name: (cpu_ns(pid) - before[name]) / IDLE_S / 1e7 for name, pid in processes.items()}
        memory = {name: _pss_mb(pid) for name, pid in processes.items()}
        rows = [[name.split()[0], f"{memory[name]:.1f}", f"{idle[name]:.2f}"] for name in processes]
        total = sum(memory.values())
        rows.append(["**all**", f"**{total:.1f}**", f"**{sum(idle.values()):.2f}**"])
        table(("process", "proportional set size, MB", "idle CPU, % of a core"), rows)
        print(f"\nFrom the start of the process to serving: {statistics.median(starts):.2f} s ({len(starts)} starts).")
        print(verdict(f"at most {MEMORY_BAR_MB:.0f} MB in all", holds=total <= MEMORY_BAR_MB))
    finally:
        node.stop()


def _pss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"process {pid} has no Pss")


def appraisals(effort: Effort) -> None:
    """Evidence beside Keylime's library."""
    appraisal.report(effort.rounds)


def fleets(effort: Effort) -> None:
    """A controller under load."""
    fleet.report(fleet.SIZES[:1] if effort is QUICK else fleet.SIZES, 2.0 * fleet.INTERVAL_S)


SECTIONS: Mapping[str, Callable[[Effort], None]] = {
    "inference": inference,
    "decisions": decisions,
    "loading": package_load,
    "footprint": footprint,
    "appraisal": appraisals,
    "fleet": fleets,
}
ON_DEMAND = ("fleet",)  # takes half an hour


def main() -> None:
    """Run the sections and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), default=[name for name in SECTIONS if name not in ON_DEMAND]
    )
    arguments = parser.parse_args()
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    stolen, total = steal_share()
    title("Machine")
    table(("", ""), describe(HOME))
    try:
        for name in arguments.only:
            SECTIONS[name](QUICK if arguments.quick else FULL)
    finally:
        shutil.rmtree(HOME, ignore_errors=True)
    now_stolen, now_total = steal_share()
    print(
        f"\nCPU time that the hypervisor gave to others meanwhile: {(now_stolen - stolen) / (now_total - total):.1%}."
    )


if __name__ == "__main__":
    main()
