"""Histograms and tallies: right, and bounded."""

import pytest

from controller.metrics import MAX_SERIES, OTHER, Histogram, Tally


def test_a_duration_stands_in_each_bucket_that_is_not_shorter():
    """Buckets are cumulative, their bounds belong to them, and the last holds all."""
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 1.0, 7.0):
        histogram.observe(seconds)
    assert histogram.buckets() == [("0.1", 2.0), ("1.0", 4.0), ("+Inf", 5.0)]
    assert histogram.count == 5
    assert histogram.sum == pytest.approx(8.65)


def test_a_clock_that_was_set_back_takes_nothing_away():
    """A negative duration counts as none, so that the sum never falls."""
    histogram = Histogram((0.1,))
    histogram.observe(-5.0)
    assert (histogram.buckets(), histogram.sum) == ([("0.1", 1.0), ("+Inf", 1.0)], 0.0)


@pytest.mark.parametrize("bounds", [(), (1.0, 1.0), (2.0, 1.0)])
def test_buckets_ascend(bounds):
    """No bounds, equal ones or a wrong order are a programming error."""
    with pytest.raises(ValueError, match="ascending"):
        Histogram(bounds)


def test_a_tally_is_bounded():
    """However many values come, a tally holds so many series, loses no count, and goes on counting those it knows."""
    tally = Tally("check")
    for number in range(10 * MAX_SERIES):
        tally.add(f"made-up-{number}")
    tally.add("made-up-0", by=4)
    found = dict(tally)
    assert len(found) == MAX_SERIES + 1
    assert found[OTHER,] == 9 * MAX_SERIES
    assert found["made-up-0",] == 5
    assert sum(found.values()) == 10 * MAX_SERIES + 4


def test_a_count_names_all_labels():
    """One value too few is a programming error."""
    with pytest.raises(ValueError, match="step, outcome"):
        Tally("step", "outcome").add("begin")
