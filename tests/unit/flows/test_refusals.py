"""Nobody fills the audit log by being refused."""

from hypothesis import given
from hypothesis import strategies as st

from agent.flows.refusals import MAX_PRINCIPALS, NAMED_PRINCIPALS, RECORDS_PER_SECOND, Refusals

NOW_US = 5_000_000


def test_a_flood_without_identity_has_a_bounded_number_of_records():
    """However many there are in a second, a fixed number is recorded, and one record counts the rest by reason."""
    refusals = Refusals()
    alone = sum(refusals.has_record("", "no_identity", NOW_US + n) for n in range(10_000))
    summary = refusals.summary()
    assert alone == RECORDS_PER_SECOND
    assert summary is not None
    assert summary.detail["reasons"] == {"no_identity": 10_000 - RECORDS_PER_SECOND}
    assert refusals.summary() is None


def test_the_flood_of_one_does_not_hide_the_refusals_of_another():
    """Each principal has records of its own; who floods is named with the number."""
    refusals = Refusals()
    for n in range(1000):
        refusals.has_record("mallory", "rate", NOW_US + n)
    assert refusals.has_record("alice", "rate", NOW_US + 1000)
    assert refusals.has_record("", "no_identity", NOW_US + 1000)
    summary = refusals.summary()
    assert summary is not None
    assert summary.detail["principals"] == {"mallory": 1000 - RECORDS_PER_SECOND}


def test_the_next_second_has_records_again():
    """The cap is by the second."""
    refusals = Refusals()
    for n in range(100):
        refusals.has_record("", "no_identity", NOW_US + n)
    assert refusals.has_record("", "no_identity", NOW_US + 1_000_000)


def test_connections_that_were_cut_are_in_the_summary():
    """What never became a request is counted too."""
    refusals = Refusals()
    refusals.count("header_timeout")
    summary = refusals.summary()
    assert summary is not None
    assert (summary.kind, summary.outcome, summary.detail["count"]) == ("refusal", "refused", 1)


@given(st.lists(st.tuples(st.integers(0, 3 * MAX_PRINCIPALS).map(str), st.integers(0, 2_000_000)), max_size=300))
def test_every_refusal_is_either_recorded_or_counted(calls):
    """None is lost, whatever the order of names and times."""
    refusals = Refusals()
    alone = sum(refusals.has_record(name, "rate", at) for name, at in calls)
    summary = refusals.summary()
    counted = summary.detail["count"] if summary else 0
    assert alone + counted == len(calls)


def test_many_names_take_bounded_memory_and_a_bounded_record():
    """Past the limit names share one budget, and only the most frequent are written down."""
    refusals = Refusals()
    alone = sum(refusals.has_record(f"name-{n}", "rate", NOW_US) for n in range(5 * MAX_PRINCIPALS))
    for n in range(3 * MAX_PRINCIPALS):
        refusals.count("rate", f"name-{n}")
    summary = refusals.summary()
    assert alone == MAX_PRINCIPALS + RECORDS_PER_SECOND
    assert summary is not None
    assert len(summary.detail["principals"]) == NAMED_PRINCIPALS
