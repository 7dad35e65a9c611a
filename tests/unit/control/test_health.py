"""Health facts and metrics, as an operator's tools read them."""

import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from agent.control.health import FACTS, LATENCY_BUCKETS_US, Health, Metrics, health_application
from agent.flows.counters import Counters


def metrics(health=None):
    return Metrics(health or Health(), lambda: {"audit_records": 7})


def samples(exposition):
    """Return (name, labels) -> value, as Prometheus' own parser reads the text."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition.decode())
        for sample in family.samples
    }


def test_what_nobody_reported_is_false():
    """At the beginning no fact holds, and each says that it was not reported."""
    health = Health()
    assert {health[name].holds for name in FACTS} == {False}
    assert {health[name].why for name in FACTS} == {"not reported yet"}


def test_a_fact_changes_alone():
    """Reporting one fact leaves the others; a report says whether the truth changed, not the words."""
    health = Health()
    assert health.report("ready", holds=True, why="a") is True
    assert health.report("ready", holds=True, why="b") is False
    assert health["ready"].why == "b"
    assert [name for name in FACTS if health[name].holds] == ["ready"]


def test_an_unknown_fact_is_a_programming_error():
    """There is no way to invent a fact."""
    with pytest.raises(KeyError):
        Health().report("well", holds=True, why="")


def test_counters_go_on_over_gateways():
    """A new gateway counts from zero; the sum never falls, and an ended gateway is counted once."""
    kept = metrics()
    kept.gateway_reported({"refusals_total|reason=rate": 5})
    kept.gateway_ended()
    kept.gateway_ended()
    kept.gateway_reported({"refusals_total|reason=rate": 2})
    kept.count("unrecorded_refusals_total")
    assert kept.total() == {"refusals_total|reason=rate": 7, "unrecorded_refusals_total": 1}
    kept.gateway_reported({"refusals_total|reason=rate": 3})
    assert kept.total()["refusals_total|reason=rate"] == 8


def test_prometheus_reads_all_of_it():
    """Facts are 0 or 1, gauges and counters keep their values, and a histogram is cumulative with count and sum in seconds."""
    health = Health()
    health.report("live", holds=True, why="x")
    shown = metrics(health)
    counters = Counters()
    counters.count("requests_total|model=a.b|outcome=ok")
    for micros in (50, 100, 101, 2_000_000):
        counters.observe({"infer": micros})
    shown.gateway_reported(counters.values)
    read = samples(shown.exposition())
    assert read["edgewarden_health", (("fact", "live"),)] == 1
    assert read["edgewarden_health", (("fact", "ready"),)] == 0
    assert read["edgewarden_audit_records", ()] == 7
    assert read["edgewarden_requests_total", (("model", "a.b"), ("outcome", "ok"))] == 1
    name, stage = "edgewarden_latency_seconds", ("stage", "infer")
    assert read[f"{name}_bucket", (("le", "0.0001"), stage)] == 2
    assert read[f"{name}_bucket", (("le", "0.00025"), stage)] == 3
    assert read[f"{name}_bucket", (("le", "1.0"), stage)] == 3
    assert read[f"{name}_bucket", (("le", "+Inf"), stage)] == read[f"{name}_count", (stage,)] == 4
    assert read[f"{name}_sum", (stage,)] == pytest.approx(2.000251)


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=50))
def test_no_latency_is_lost(latencies):
    """Whatever the latencies, the histogram counts each once, and its buckets never fall."""
    counters = Counters()
    for micros in latencies:
        counters.observe({"infer": micros})
    shown = metrics()
    shown.gateway_reported(counters.values)
    read = samples(shown.exposition())
    edges = [*(str(edge / 1e6) for edge in LATENCY_BUCKETS_US), "+Inf"]
    buckets = [read["edgewarden_latency_seconds_bucket", (("le", edge), ("stage", "infer"))] for edge in edges]
    assert buckets == sorted(buckets)
    assert buckets[-1] == len(latencies)
    assert Counters.EDGES == LATENCY_BUCKETS_US


async def test_facts_are_served_with_their_status():
    """`/health` is always 200; a fact's own path is 200 or 503 with the reason; another one is 404."""
    health = Health()
    health.report("ready", holds=True, why="serving")
    health.detail("crash_loops", ["gateway"])
    async with TestClient(TestServer(health_application(health, metrics(health)))) as client:
        whole = await (await client.get("/health")).json()
        assert whole["ready"] == {"holds": True, "why": "serving"}
        assert whole["details"] == {"crash_loops": ["gateway"]}
        ready, attested, other = [await client.get(f"/health/{name}") for name in ("ready", "attested", "other")]
        assert [answer.status for answer in (ready, attested, other)] == [200, 503, 404]
        assert await attested.json() == {"holds": False, "why": "not reported yet"}
        scrape = await client.get("/metrics")
        assert scrape.headers["Content-Type"].startswith("text/plain; version=")
        assert samples(await scrape.read())["edgewarden_health", (("fact", "ready"),)] == 1
