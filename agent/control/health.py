"""Honest health: separate facts, each with its reason, and the metrics beside them.

Rules:

1. ``live``, ``ready``, ``enforcing``, ``attested``, ``connected`` and ``log_durable`` are separate facts. None is derived from another, so that
   a node which still answers but can't be attested says exactly that.
2. A fact that nobody has reported yet is false.
3. Metrics come from counters that the processes report; no label holds what a client can choose freely.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from agent.records import JsonValue

__all__ = ["FACTS", "Fact", "Health", "Metrics", "health_application"]

FACTS: Final = ("live", "ready", "enforcing", "attested", "connected", "log_durable")
LATENCY_BUCKETS_US: Final = (100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 1_000_000)


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact and why it is so, in words for an operator."""

    holds: bool
    why: str


class Health:
    """The facts of this node, set by whoever knows them."""

    def __init__(self) -> None:
        self._facts = {name: Fact(holds=False, why="not reported yet") for name in FACTS}
        self._details: dict[str, JsonValue] = {}

    def report(self, name: str, *, holds: bool, why: str) -> bool:
        """Set a fact; returns whether it changed its truth."""
        changed = self._facts[name].holds != holds
        self._facts[name] = Fact(holds, why)
        return changed

    def detail(self, name: str, value: JsonValue) -> None:
        """Set something worth knowing that is no fact of its own, such as the crash loops."""
        self._details[name] = value

    def __getitem__(self, name: str) -> Fact:
        return self._facts[name]

    def as_json(self) -> dict[str, JsonValue]:
        """Return every fact with its reason."""
        facts: dict[str, JsonValue] = {
            name: {"holds": fact.holds, "why": fact.why} for name, fact in self._facts.items()
        }
        return {**facts, "details": self._details}


@dataclass(slots=True, eq=False)  # a registry keeps collectors by identity
class Metrics(Collector):
    """Counters of all processes. A gateway's counters start again with it, so ended ones are kept as a base.

    Keys are ``name|label=value|…``; a key that ends in ``_us`` with a label ``le`` belongs to a histogram.
    """

    health: Health
    gauges: Callable[[], dict[str, int]]
    base: dict[str, int] = field(default_factory=dict)
    current: dict[str, int] = field(default_factory=dict)

    def gateway_reported(self, counters: dict[str, int]) -> None:
        """Take a gateway's counters since its start."""
        self.current = counters

    def gateway_ended(self) -> None:
        """Keep what an ended gateway had counted."""
        self.base = self.total()
        self.current = {}

    def count(self, key: str, by: int = 1) -> None:
        """Count something that the agent itself saw."""
        self.base[key] = self.base.get(key, 0) + by

    def total(self) -> dict[str, int]:
        """Return the sum over all gateways."""
        keys = self.base.keys() | self.current.keys()
        return {key: self.base.get(key, 0) + self.current.get(key, 0) for key in keys}

    def collect(self) -> Iterable[Metric]:
        """Give Prometheus what there is."""
        facts = GaugeMetricFamily("edgewarden_health", "1 where the fact holds", labels=["fact"])
        for name in FACTS:
            facts.add_metric([name], float(self.health[name].holds))
        yield facts
        for name, value in sorted(self.gauges().items()):
            yield GaugeMetricFamily(f"edgewarden_{name}", name.replace("_", " "), value=value)
        yield from _families(self.total())

    def exposition(self) -> bytes:
        """Return the text that Prometheus scrapes."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)


def _families(total: dict[str, int]) -> Iterator[Metric]:
    counters: dict[str, list[tuple[dict[str, str], int]]] = {}
    for key, value in sorted(total.items()):
        name, *pairs = key.split("|")
        labels = dict(pair.split("=", 1) for pair in pairs)
        counters.setdefault(name, []).append((labels, value))
    for name, samples in counters.items():
        if any("le" in labels for labels, _ in samples):
            yield _histogram(name, samples)
            continue
        names = sorted(samples[0][0])
        family = CounterMetricFamily(f"edgewarden_{name}", name.replace("_", " "), labels=names)
        for labels, value in samples:
            family.add_metric([labels.get(label, "") for label in names], value)
        yield family


def _histogram(name: str, samples: list[tuple[dict[str, str], int]]) -> HistogramMetricFamily:
    """Bucket counts (``le`` in microseconds, not cumulative) and the sum (``le=sum``) per stage, as seconds."""
    family = HistogramMetricFamily(f"edgewarden_{name}_seconds", f"{name.replace('_', ' ')} by stage", labels=["stage"])
    stages: dict[str, dict[str, int]] = {}
    for labels, value in samples:
        stages.setdefault(labels["stage"], {})[labels["le"]] = value
    for stage, counts in stages.items():
        running = 0
        buckets = []
        for edge in LATENCY_BUCKETS_US:
            running += counts.get(str(edge), 0)
            buckets.append((str(edge / 1e6), float(running)))
        running += counts.get("+Inf", 0)
        buckets.append(("+Inf", float(running)))
        family.add_metric([stage], buckets, sum_value=counts.get("sum", 0) / 1e6)
    return family


def health_application(health: Health, metrics: Metrics) -> web.Application:
    """Serve ``/health``, ``/health/<fact>`` (200 or 503) and ``/metrics``."""

    async def all_facts(_: web.Request) -> web.Response:
        return web.json_response(health.as_json())

    async def one_fact(request: web.Request) -> web.Response:
        name = request.match_info["fact"]
        if name not in FACTS:
            return web.json_response({"error": f"no such fact; there are {', '.join(FACTS)}"}, status=404)
        fact = health[name]
        return web.json_response({"holds": fact.holds, "why": fact.why}, status=200 if fact.holds else 503)

    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    application = web.Application(client_max_size=1024)
    application.add_routes(
        [web.get("/health", all_facts), web.get("/health/{fact}", one_fact), web.get("/metrics", scrape)]
    )
    return application
