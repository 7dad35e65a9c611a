"""How long a decision takes: asker, sandboxed worker and the way between them, as in a gateway.

The pool, the workers and their sandbox are the product's own; the asker is this process. Prints one JSON line:
``{"1": [p50_us, p99_us, rate], ...}`` by askers.

Usage: python -m bench.decisions small|realistic --seconds S
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvloop

from agent import clock
from agent.isolation.supervisor import Zygote
from agent.policy.build import build
from agent.policy.client import PolicyClient
from agent.policy.pool import PRELOAD, PolicyPool
from bench.realistic_policy import realistic_data, realistic_input, write
from tools.demo_node import ROOT

ASKERS = (1, 8, 32)
SEED = 7
DEADLINE_S = 2.0  # a shared machine may keep a worker waiting; what is measured is what comes back

SMALL_INPUT: Mapping[str, Any] = {
    "subject": {"id": "alice", "kind": "mtls", "roles": ["operator"], "mfa": False, "claims": {}},
    "action": "infer",
    "resource": {
        "model": "tiny",
        "version": "1",
        "digest": "0" * 64,
        "signer": "1" * 64,
        "measured": True,
        "sensitivity": "internal",
    },
    "request": {"bytes": 1400, "batch": 1, "rate": {"1s": 9, "60s": 90}, "source_ip": "127.0.0.1"},
    "node": {"id": "edge-0001", "trust": "unknown", "posture": {}},
}


async def _measure(
    zygote: Zygote, bundle: bytes, document: Mapping[str, Any], seconds: float
) -> dict[str, list[float]]:
    pool = PolicyPool(zygote, deadline_s=DEADLINE_S, total_deadline_s=DEADLINE_S, samples={"bench": document})
    client = PolicyClient(lambda _: None, deadline_s=DEADLINE_S, total_deadline_s=DEADLINE_S)
    subscription = pool.subscribe(client.attach)
    running = asyncio.create_task(pool.run())
    await pool.activate(bundle)
    figures = {}
    for askers in ASKERS:
        latencies: list[int] = []
        begin = time.monotonic()
        await asyncio.gather(*(_ask(client, document, begin + seconds, latencies) for _ in range(askers)))
        elapsed = time.monotonic() - begin
        latencies.sort()
        p50, p99 = latencies[len(latencies) // 2] / 1000, latencies[len(latencies) * 99 // 100] / 1000
        figures[str(askers)] = [p50, p99, len(latencies) / elapsed]
    subscription.close()
    client.close()
    running.cancel()
    return figures


async def _ask(client: PolicyClient, document: Mapping[str, Any], until: float, latencies: list[int]) -> None:
    count = 0
    while time.monotonic() < until:
        count += 1
        # As in a gateway, no two questions are the same.
        request = {**document["request"], "rate": {"1s": count % 1000, "60s": count}}
        if "time" not in request:
            request["time"] = clock.rfc3339(clock.now_us())
        begin = time.perf_counter_ns()
        answer = await client.decide({**document, "request": request})
        latencies.append(time.perf_counter_ns() - begin)
        if not answer.decision.allow:
            raise RuntimeError(f"denied: {answer.error} {answer.decision.reasons}")


def main() -> None:
    """Measure one policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", choices=["small", "realistic"])
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        policies, document = ROOT / "policies", SMALL_INPUT
        if arguments.policy == "realistic":
            policies, document = Path(folder) / "policies", realistic_input()
            write(policies, realistic_data(SEED))
        bundle = build(ROOT / "rego", policies, "bench")
        zygote = Zygote.start(PRELOAD, user=None, sandbox_required=False)
        try:
            print(json.dumps(uvloop.run(_measure(zygote, bundle, document, arguments.seconds))))
        finally:
            zygote.close()


if __name__ == "__main__":
    main()
