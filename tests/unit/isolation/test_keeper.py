"""Delays between restarts and the crash-loop fact."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import IsolationError
from agent.isolation.keeper import (
    CRASH_LOOP_DEATHS,
    CRASH_LOOP_WINDOW_S,
    GOOD_LIFE_S,
    LONGEST_DELAY_S,
    Backoff,
    Keeper,
)
from agent.isolation.process import ExitStatus


def test_the_first_restart_is_at_once_and_then_the_delay_doubles():
    """0, 0.1, 0.2 … up to 5 s."""
    backoff = Backoff()
    delays = [backoff.died(at, 0.5) for at in range(9)]
    assert delays == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_a_good_life_starts_the_count_anew():
    """After a life of 10 s the next restart is at once."""
    backoff = Backoff()
    for at in range(5):
        backoff.died(at, 0)
    assert backoff.died(100, GOOD_LIFE_S) == 0
    assert backoff.died(101, 0) == 0.1


def test_a_crash_loop_is_five_deaths_in_thirty_seconds_and_passes():
    """Four are none, five within the window are one, and it is over when the window has passed."""
    backoff = Backoff()
    for at in range(CRASH_LOOP_DEATHS - 1):
        backoff.died(at, 0)
    assert not backoff.crash_loop(4)
    backoff.died(4, 0)
    assert backoff.crash_loop(4)
    assert backoff.crash_loop(CRASH_LOOP_WINDOW_S)
    assert not backoff.crash_loop(CRASH_LOOP_WINDOW_S + 0.1)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), max_size=40))
def test_delays_stay_in_their_bounds_and_a_crash_loop_is_what_it_says(deaths):
    """For any history the delay is 0 to 5 s, and the fact equals a count of recent deaths."""
    backoff = Backoff()
    now, times = 0.0, []
    for pause, lived in deaths:
        now += pause
        times.append(now)
        assert 0 <= backoff.died(now, lived) <= LONGEST_DELAY_S
        recent = [at for at in times if now - at <= CRASH_LOOP_WINDOW_S]
        assert backoff.crash_loop(now) is (len(recent) >= CRASH_LOOP_DEATHS)


class Ending:
    """A process that has ended."""

    pid = 1

    async def wait(self) -> ExitStatus:
        return ExitStatus(code=1)


async def test_a_start_that_fails_counts_as_a_death():
    """The keeper goes on after a start that failed, and says that it is in a crash loop when that goes on."""
    attempts = 0
    ends: list[ExitStatus] = []
    done = asyncio.Event()

    async def start() -> Ending:
        nonlocal attempts
        attempts += 1
        if attempts <= 2:
            raise IsolationError("not now")
        return Ending()

    def note(status: ExitStatus) -> None:
        ends.append(status)
        if len(ends) == CRASH_LOOP_DEATHS - 2:
            done.set()

    keeper = Keeper("x", start)
    task = asyncio.create_task(keeper.run(note))
    await done.wait()
    await asyncio.sleep(0)
    assert keeper.crash_loop
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (ExitStatus(code=70), "exit code 70"),
        (ExitStatus(signal=9), "killed by SIGKILL"),
        (ExitStatus(), "ended in an unknown way"),
    ],
)
def test_an_exit_status_reads_well(status, words):
    """Logs say how a process ended in words."""
    assert str(status) == words
