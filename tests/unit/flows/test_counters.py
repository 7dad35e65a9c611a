"""What a gateway counts."""

from agent.flows.counters import Counters


def test_a_latency_falls_into_the_bucket_of_the_first_edge_that_is_not_below_it():
    """An edge belongs to its own bucket, what is beyond the last one to +Inf, and the sum is exact."""
    counters = Counters()
    for micros in (0, 100, 101, 1_000_000, 1_000_001):
        counters.observe({"policy": micros})
    assert counters.values == {
        "latency|le=100|stage=policy": 2,
        "latency|le=250|stage=policy": 1,
        "latency|le=1000000|stage=policy": 1,
        "latency|le=+Inf|stage=policy": 1,
        "latency|le=sum|stage=policy": 2_000_202,
    }


def test_counters_and_stages_stand_side_by_side():
    """Counts go by their own keys; each stage has its own histogram."""
    counters = Counters()
    counters.count("requests_total|outcome=ok")
    counters.count("requests_total|outcome=ok", 2)
    counters.observe({"read": 5, "infer": 200})
    assert counters.values["requests_total|outcome=ok"] == 3
    assert counters.values["latency|le=100|stage=read"] == counters.values["latency|le=250|stage=infer"] == 1
