"""Limits: what passes, what waits, what is refused, and that nobody starves."""

import asyncio
import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agent.errors import PeerError, PolicyError
from agent.guard.admission import Admission, Bucket, Limit, RateWindow, check_batch, check_size, compile_limits

_WIDE = Limit(requests_per_second=1_000_000, burst=1_000_000, concurrency=1000, max_bytes=10, max_batch=4)


def _limit(**changes):
    values = {name: getattr(_WIDE, name) for name in Limit.__dataclass_fields__}
    return Limit(**{**values, **changes})


def _admission(limit=_WIDE, **options):
    return Admission({"standard": limit}, **options)


async def _settle():
    for _ in range(5):
        await asyncio.sleep(0)


# --- the bucket


@given(
    st.floats(0.01, 100_000),
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(0, 2_000_000), st.integers(1, 5)), max_size=60),
)
def test_a_bucket_never_gives_more_than_burst_and_rate(rate, burst, steps):
    """In every interval between two requests, at most burst + rate * time tokens passed."""
    limit = _limit(requests_per_second=rate, burst=burst)
    bucket = Bucket()
    now_us = 0
    given_at = []
    for advance_us, count in steps:
        now_us += advance_us
        if bucket.take(limit, now_us, count) == 0:
            given_at += [now_us] * count
    for first in range(len(given_at)):
        for last in range(first, len(given_at)):
            seconds = (given_at[last] - given_at[first]) / 1e6
            assert last - first + 1 <= burst + rate * seconds + 1e-9


@given(st.floats(0.1, 10_000), st.integers(1, 20), st.lists(st.integers(0, 100_000), max_size=40))
def test_the_wait_that_a_bucket_names_is_enough_and_not_too_long(rate, burst, advances):
    """Asking again after the named time succeeds; a little earlier does not."""
    limit = _limit(requests_per_second=rate, burst=burst)
    bucket = Bucket()
    now_us = 0
    for advance_us in advances:
        now_us += advance_us
        wait_s = bucket.take(limit, now_us)
        if wait_s:
            wait_us = math.ceil(wait_s * 1e6)
            assert bucket.take(limit, now_us + wait_us - 2) > 0 or wait_us < 2
            assert bucket.take(limit, now_us + wait_us) == 0
            now_us += wait_us


def test_a_full_bucket_gives_its_burst_at_once():
    """After any rest the burst is there again, and not one more."""
    limit = _limit(requests_per_second=10, burst=3)
    bucket = Bucket()
    for start_us in (0, 5_000_000):
        assert [bucket.take(limit, start_us) for _ in range(4)] == [0, 0, 0, pytest.approx(0.1)]
    assert bucket.take(limit, 0, count=4) == math.inf


# --- the windows


@given(st.lists(st.integers(0, 400_000), max_size=80))
def test_a_window_counts_what_is_recent(advances):
    """The count lies between what happened in the last 19/20 of the window and in all of it."""
    window = RateWindow(1_000_000)
    times = []
    now_us = 123_456_789
    for advance_us in advances:
        now_us += advance_us
        times.append(now_us)
        count = window.add(now_us)
        assert sum(time > now_us - 950_000 for time in times) <= count
        assert count <= sum(time > now_us - 1_000_000 for time in times)


def test_rates_are_counted_for_each_principal():
    """The policy's input gets the principal's own counts."""
    admission = _admission()
    rates = [admission.observe("alice", 1_000_000) for _ in range(3)]
    assert rates[2] == {"1s": 3, "60s": 3}
    assert admission.observe("bob", 1_000_000) == {"1s": 1, "60s": 1}
    assert admission.observe("alice", 3_000_000) == {"1s": 1, "60s": 4}
    assert admission.observe("alice", 70_000_000) == {"1s": 1, "60s": 1}


# --- admission


async def test_the_rate_is_a_principals_own():
    """Past the burst the answer is 429 with a time; another principal does not notice."""
    admission = _admission(_limit(requests_per_second=2, burst=1))
    with await admission.enter("alice", "standard", 0):
        pass
    with pytest.raises(PeerError) as refusal:
        await admission.enter("alice", "standard", 0)
    assert (refusal.value.status, refusal.value.reason) == (429, "rate")
    assert refusal.value.retry_after_s == pytest.approx(0.5)
    with await admission.enter("bob", "standard", 0):
        pass
    with await admission.enter("alice", "standard", 500_000):
        pass


async def test_the_concurrency_of_a_principal_is_bounded():
    """One more than allowed gets 429 and costs no token; a place that was left can be taken again."""
    admission = _admission(_limit(concurrency=2, requests_per_second=0.001, burst=3))
    first = await admission.enter("alice", "standard", 0)
    with await admission.enter("alice", "standard", 0):
        with pytest.raises(PeerError) as refusal:
            await admission.enter("alice", "standard", 0)
        assert (refusal.value.status, refusal.value.reason) == (429, "concurrency")
        assert refusal.value.retry_after_s
    with first, await admission.enter("alice", "standard", 0):
        pass


async def test_a_flood_does_not_starve_a_second_client():
    """With one place and a hundred requests of one client before it, the other's request is next."""
    admission = _admission(running=1)
    order = []

    async def ask(name):
        with await admission.enter(name, "standard", 0):
            order.append(name)
            await asyncio.sleep(0)

    flood = [asyncio.ensure_future(ask("flood")) for _ in range(100)]
    await _settle()
    quiet = [asyncio.ensure_future(ask("quiet")) for _ in range(3)]
    await asyncio.gather(*flood, *quiet)
    places = [place for place, name in enumerate(order) if name == "quiet"]
    assert len(order) == 103
    assert places[0] <= 8  # some of the flood ran before the quiet client came
    assert [after - before for before, after in itertools.pairwise(places)] == [2, 2]


async def test_when_all_waiting_places_are_taken_the_greediest_gives_one_up():
    """A newcomer is let in at the expense of the newest request of who has most; then nobody has more than another."""
    admission = _admission(running=1, waiting=4)
    running = await admission.enter("flood", "standard", 0)
    flood = [asyncio.ensure_future(admission.enter("flood", "standard", 0)) for _ in range(4)]
    await _settle()
    quiet = asyncio.ensure_future(admission.enter("quiet", "standard", 0))
    await _settle()
    assert [task.done() for task in flood] == [False, False, False, True]
    refused = flood[3].exception()
    assert isinstance(refused, PeerError)
    assert (refused.status, refused.reason) == (503, "overloaded")
    with pytest.raises(PeerError) as refusal:
        await admission.enter("flood", "standard", 0)
    assert refusal.value.status == 503
    with running:
        pass
    for task in (flood[0], quiet, flood[1], flood[2]):
        with await task:
            pass
    assert (admission._running, admission._waiting, len(admission._turns)) == (0, 0, 0)


async def test_a_client_that_goes_away_gives_its_place_on():
    """Cancelled while it waits, or in the moment its turn comes: no place is lost."""
    admission = _admission(running=1)
    running = await admission.enter("a", "standard", 0)
    waiting = [asyncio.ensure_future(admission.enter(name, "standard", 0)) for name in "bcd"]
    await _settle()
    waiting[0].cancel()  # still in the line when the place becomes free
    with running:
        pass
    waiting[1].cancel()  # its turn has come, and it has not run since
    await _settle()
    assert [task.cancelled() for task in waiting] == [True, True, False]
    with await waiting[2]:
        assert admission._running == 1
    assert (admission._running, admission._waiting, len(admission._turns)) == (0, 0, 0)
    assert not any(principal.in_house for principal in admission._known.values())


async def test_room_is_made_where_a_client_has_just_gone_away():
    """A request that was cancelled a moment ago gives its waiting place up without a refusal."""
    admission = _admission(running=1, waiting=3)
    running = await admission.enter("flood", "standard", 0)
    flood = [asyncio.ensure_future(admission.enter("flood", "standard", 0)) for _ in range(3)]
    await _settle()
    quiet = asyncio.ensure_future(admission.enter("quiet", "standard", 0))
    flood[2].cancel()  # it will run after the other has come
    await _settle()
    assert [task.done() for task in (*flood, quiet)] == [False, False, True, False]
    with running:
        pass
    for task in (flood[0], quiet, flood[1]):
        with await task:
            pass
    assert (admission._running, admission._waiting, len(admission._turns)) == (0, 0, 0)


async def test_a_place_is_free_again_after_an_error():
    """An exception inside the block leaves the place."""
    admission = _admission(running=1)
    with pytest.raises(KeyError), await admission.enter("a", "standard", 0):
        raise KeyError
    with await admission.enter("a", "standard", 0):
        pass


async def test_the_memory_of_principals_is_bounded():
    """The one that was idle longest is forgotten; one with a request in the house never."""
    admission = _admission(_limit(requests_per_second=0.001, burst=1), principals=3)
    busy = await admission.enter("busy", "standard", 0)
    for name in ("a", "b", "c", "d"):
        admission.observe(name, 0)
    assert list(admission._known) == ["busy", "c", "d"]
    with pytest.raises(PeerError):
        await admission.enter("busy", "standard", 0)
    with busy:
        pass


async def test_when_every_principal_is_busy_a_new_one_is_refused():
    """The memory does not grow past its bound."""
    admission = _admission(principals=2)
    with await admission.enter("a", "standard", 0), await admission.enter("b", "standard", 0):
        with pytest.raises(PeerError) as refusal:
            admission.observe("c", 0)
        assert refusal.value.status == 503


async def test_new_limits_are_in_force_at_once_and_keep_what_was_given():
    """A new policy is no fresh burst; a limit that it no longer has is an error."""
    admission = Admission({"standard": _limit(requests_per_second=0.001, burst=1), "bulk": _WIDE})
    for name in ("standard", "bulk"):
        with await admission.enter("a", name, 0):
            pass
    admission.replace_limits({"standard": _limit(requests_per_second=0.001, burst=1)})
    with pytest.raises(PeerError):
        await admission.enter("a", "standard", 0)
    with pytest.raises(PolicyError, match="bulk"):
        await admission.enter("a", "bulk", 0)
    assert list(admission._known["a"].buckets) == ["standard"]


class _House(RuleBasedStateMachine):
    """Requests come, finish and go away in any order."""

    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.admission = _admission(_limit(concurrency=4), running=2, waiting=3, principals=8)
        self.tasks = []
        self.slots = []

    def _turn(self):
        self.loop.run_until_complete(_settle())
        for task in [task for task in self.tasks if task.done()]:
            self.tasks.remove(task)
            if not task.cancelled() and task.exception() is None:
                self.slots.append(task.result())

    @rule(name=st.sampled_from("abc"), settle=st.booleans())
    def come(self, name, settle):
        self.tasks.append(self.loop.create_task(self.admission.enter(name, "standard", 0)))
        if settle:
            self._turn()

    @rule(which=st.integers(0, 9), settle=st.booleans())
    def finish(self, which, settle):
        if self.slots:
            self.slots.pop(which % len(self.slots)).__exit__(None, None, None)
        if settle:
            self._turn()

    @rule(which=st.integers(0, 9), settle=st.booleans())
    def go_away(self, which, settle):
        if self.tasks:
            self.tasks[which % len(self.tasks)].cancel()
        if settle:
            self._turn()

    @invariant()
    def the_bounds_hold(self):
        assert len(self.slots) <= self.admission._running <= 2
        assert 0 <= self.admission._waiting <= 3
        assert all(0 <= principal.in_house <= 4 for principal in self.admission._known.values())

    def teardown(self):
        self._turn()
        while self.tasks or self.slots:
            while self.slots:
                self.slots.pop().__exit__(None, None, None)
            self._turn()
        assert (self.admission._running, self.admission._waiting) == (0, 0)
        assert not any(principal.in_house for principal in self.admission._known.values())
        self.loop.close()


TestHouse = _House.TestCase


# --- sizes and data


def test_sizes_are_refused_with_413():
    """By the declared length, by the read length, and by the batch; an unknown length passes the first check."""
    check_size(None, 10)
    check_size(10, 10)
    check_batch(4, _WIDE)
    for refused in (lambda: check_size(11, 10), lambda: check_batch(5, _WIDE)):
        with pytest.raises(PeerError) as refusal:
            refused()
        assert refusal.value.status == 413


_DATA = {"requests_per_second": 100, "burst": 200, "concurrency": 32, "max_bytes": 8388608, "max_batch": 64}


def test_limits_are_compiled_from_the_policys_data():
    """What policy enforces by itself is not our business."""
    limits = compile_limits({"standard": _DATA, "metered": {**_DATA, "requests_per_second": 0.5, "lifetime_budget": 9}})
    assert limits["standard"] == Limit(100, 200, 32, 8388608, 64)
    assert limits["metered"].requests_per_second == 0.5


_BAD: list[Any] = [None, [], {}, {**_DATA, "burst": 1.5}]
_BAD_VALUES: list[Any] = [None, 0, -1, True, "1", math.inf, math.nan, [], 2**40]
_BAD += [{**_DATA, member: value} for member in _DATA for value in _BAD_VALUES]


@pytest.mark.parametrize("data", _BAD)
def test_limits_that_are_none_are_a_policy_error(data):
    """The policy is refused when it is activated."""
    with pytest.raises(PolicyError, match="limit 'x'"):
        compile_limits({"x": data})


# --- a minute


async def test_a_limit_may_bound_a_minute():
    """One request more than the minute allows is refused, with those that were refused counted; a minute of rest forgets them."""
    admission = _admission(_limit(requests_per_minute=3))
    for number in range(5):
        admission.observe("mtls:a", number)
        if number < 3:
            with await admission.enter("mtls:a", "standard", number):
                pass
            continue
        with pytest.raises(PeerError, match="3 requests a minute") as refused:
            await admission.enter("mtls:a", "standard", number)
        assert (refused.value.status, refused.value.reason) == (429, "rate")
        assert refused.value.retry_after_s
    later = 61_000_000
    admission.observe("mtls:a", later)
    with await admission.enter("mtls:a", "standard", later):
        pass


@pytest.mark.parametrize("minute", [0, -1, True, "3", 1.5, None])
def test_a_minutes_bound_is_a_number(minute):
    """What is no count is refused when the policy is activated."""
    limit = {"requests_per_second": 1, "burst": 1, "concurrency": 1, "max_bytes": 1, "max_batch": 1}
    assert compile_limits({"x": {**limit, "requests_per_minute": 7}})["x"].requests_per_minute == 7
    with pytest.raises(PolicyError, match="requests_per_minute"):
        compile_limits({"x": {**limit, "requests_per_minute": minute}})
