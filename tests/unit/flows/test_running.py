"""Where a model runs."""

import threading
import time
from types import SimpleNamespace

import pytest

from agent.flows import running
from agent.flows.running import Runner

SLOW_RUN_NS = 50_000_000  # so long that no tracing and no neighbour makes a quick run slow


class Session:
    """Stands for a session: burns CPU time or sleeps, and tells on which thread."""

    def __init__(self):
        self.burn_ns = 0
        self.sleep_s = 0.0
        self.threads = []

    def run(self, inputs):
        self.threads.append(threading.current_thread())
        time.sleep(self.sleep_s)
        until = time.thread_time_ns() + self.burn_ns
        while time.thread_time_ns() < until:
            pass
        return inputs


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.setattr(running, "SLOW_RUN_NS", SLOW_RUN_NS)
    runner = Runner(1)
    yield runner
    runner.close()


async def run(runner, session):
    loaded = SimpleNamespace(sha256="0" * 64, session=session)
    if runner.run_here(loaded, {}) is None:
        await runner.run(loaded, {})
    return session.threads[-1] is threading.current_thread()


async def test_a_model_that_computes_long_leaves_the_loop_and_comes_back_when_it_is_quick(runner):
    """The last run decides about the next, in both directions; a run that took long by the clock is looked at once more."""
    session = Session()
    assert await run(runner, session)
    session.burn_ns = 2 * SLOW_RUN_NS
    assert await run(runner, session)
    assert await run(runner, session)
    assert not await run(runner, session)
    session.burn_ns = 0
    assert not await run(runner, session)
    assert await run(runner, session)


async def test_a_run_that_had_to_wait_for_the_machine_is_not_slow(runner):
    """Time in which the thread did not compute does not send a quick model to the threads."""
    session = Session()
    session.sleep_s = 2 * SLOW_RUN_NS / 1e9
    assert await run(runner, session)
    assert await run(runner, session)
