"""Time one decision in the embedded engine: shipped and realistic data, allowed and denied.

As a policy worker does it: a clone of a prepared engine, the input as JSON, one rule, the decision as JSON. Beside the
times stands the floor, the same with a rule that is a constant: what the engine and the input cost before any rule.

Run ``python -m bench.rego_decision`` at the root of the repository.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Final

import regorus
import yaml

from bench.realistic_policy import realistic_data, realistic_input

__all__ = ["decision_us"]

ROOT: Final = Path(__file__).resolve().parents[1]
DECISION: Final = "data.edgewarden.authz.decision"
ROUNDS: Final = 5000


def prepared_engine(data: dict[str, Any]) -> regorus.Engine:
    """An engine with the shipped rules, evaluated once: clones of it need not prepare the rules again."""
    engine = regorus.Engine()
    for path in sorted((ROOT / "rego").rglob("*.rego")):
        if not path.name.endswith("_test.rego"):
            engine.add_policy(str(path), path.read_text())
    engine.add_policy("floor", "package floor\n\nvalue := true")
    engine.add_data_json(json.dumps(data))
    engine.set_input_json("{}")
    engine.eval_rule_as_json(DECISION)
    return engine


def decision_us(engine: regorus.Engine, document: dict[str, Any], rule: str = DECISION) -> tuple[float, float]:
    """Median and 99th percentile of one evaluation, in microseconds."""
    text = json.dumps(document)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter_ns()
        clone = engine.clone()
        clone.set_input_json(text)
        clone.eval_rule_as_json(rule)
        times.append(time.perf_counter_ns() - start)
    times.sort()
    return times[ROUNDS // 2] / 1000, times[ROUNDS * 99 // 100] / 1000


def main() -> None:
    """Print the table."""
    shipped = {path.parent.name: yaml.safe_load(path.read_text()) for path in (ROOT / "policies").glob("*/data.yaml")}
    allowed = realistic_input()
    listed = allowed | {"resource": allowed["resource"] | {"model": "model-10"}}
    denied = allowed | {"subject": allowed["subject"] | {"roles": []}}
    cases = {
        "floor": ("shipped", shipped, allowed, "data.floor.value"),
        "plain, allowed": ("shipped", shipped, allowed, DECISION),
        "IPv6, allowed": (
            "shipped",
            shipped,
            allowed | {"request": allowed["request"] | {"source_ip": "::1"}},
            DECISION,
        ),
        "metadata": ("shipped", shipped, allowed | {"action": "metadata"}, DECISION),
        "denied": ("shipped", shipped, denied, DECISION),
        "unlisted model": ("realistic", realistic_data(7), allowed, DECISION),
        "listed model": ("realistic", realistic_data(7), listed, DECISION),
    }
    for name, (title, data, document, rule) in cases.items():
        median, tail = decision_us(prepared_engine(data), document, rule)
        print(f"{title:10} {name:16} p50 {median:7.1f} us   p99 {tail:7.1f} us")


if __name__ == "__main__":
    main()
