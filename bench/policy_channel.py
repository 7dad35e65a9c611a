"""What a decision costs through the real policy processes: CPU and latency at 1, 8 and 32 askers.

Both processes share one core, as on a busy node, so that a wake-up's price shows. ``cpu`` is user and system time of asker
and worker together, divided by decisions; ``evaluation`` is the worker's own clock around the engine.

Run ``python -m bench.policy_channel``; it needs no root.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Any, Final

import uvloop

from agent.isolation.supervisor import Zygote
from agent.policy.build import archive, build
from agent.policy.client import PolicyClient
from agent.policy.pool import PRELOAD, PolicyPool
from agent.policy.samples import SAMPLES

ROOT: Final = Path(__file__).resolve().parents[1]
ROUNDS: Final = 6000
ASKERS: Final = (1, 8, 32)
SMALL: Final = """package edgewarden.authz
default decision := {"allow": false, "reasons": ["no rule allows this"]}
decision := {"allow": true} if {
	some role in input.subject.roles
	role == "sample"
	input.action == "infer"
}
"""
TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")


def cpu_s() -> float:
    """User and system time of this process and of its children that live: zygote, template, workers."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in children]
    return time.process_time() + TICK_S * sum(int(fields[11]) + int(fields[12]) for fields in stats)


async def measure(client: PolicyClient, askers: int, document: dict[str, Any]) -> tuple[float, ...]:
    """Return CPU µs a decision, p50 and p99 µs, and the median evaluation in µs."""
    waits: list[float] = []
    evaluations: list[int] = []

    async def ask(rounds: int) -> None:
        for _ in range(rounds):
            start = time.perf_counter()
            answer = await client.decide(document)
            waits.append(time.perf_counter() - start)
            evaluations.append(answer.eval_us)
            assert answer.error is None, answer.error

    await ask(200)
    waits.clear()
    evaluations.clear()
    before = cpu_s()
    await asyncio.gather(*(ask(ROUNDS // askers) for _ in range(askers)))
    spent = cpu_s() - before
    waits.sort()
    count = len(waits)
    return spent / count * 1e6, waits[count // 2] * 1e6, waits[count * 99 // 100] * 1e6, statistics.median(evaluations)


async def compare(zygote: Zygote) -> None:
    """Print one line for each policy and number of askers."""
    bundles = {
        "small": archive({".manifest": b'{"roots":["edgewarden"]}', "authz.rego": SMALL.encode()}),
        "shipped": build(ROOT / "rego", ROOT / "policies", "bench"),
    }
    print(f"{'policy':>8} {'askers':>6} {'cpu µs':>7} {'p50 µs':>7} {'p99 µs':>7} {'evaluation µs':>13}")
    for name, data in bundles.items():
        pool = PolicyPool(zygote)
        await pool.start(data)
        client = PolicyClient(lambda _: None, deadline_s=5, total_deadline_s=30)
        subscription = pool.subscribe(client.attach)
        await client.decide(SAMPLES["infer"])  # waits for the first worker
        for askers in ASKERS:
            figures = await measure(client, askers, SAMPLES["infer"])
            print(f"{name:>8} {askers:>6} " + " ".join(f"{figure:7.0f}" for figure in figures))
        client.close()
        subscription.close()
        await pool.close()


def main() -> None:
    """Pin everything to one core and measure."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    zygote = Zygote.start(PRELOAD)
    uvloop.run(compare(zygote))
    zygote.close()


if __name__ == "__main__":
    main()
