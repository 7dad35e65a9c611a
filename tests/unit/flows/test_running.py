"""Where a model runs."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from agent.errors import PeerError
from agent.flows import running
from agent.flows.running import Runner
from agent.inference.manifest import ModelManifest
from agent.inference.registry import LoadedModel
from agent.inference.session import Session
from agent.records import TensorSpec
from tests.support.models import tiny_graph

MANIFEST = ModelManifest("tiny", "1", (TensorSpec("x", "FP32", (-1, 64)),), (TensorSpec("y", "FP32", (-1, 10)),))
INPUT = {"x": np.zeros((1, 64), np.float32)}


class Watched:
    """A real session that remembers on which thread it ran."""

    def __init__(self) -> None:
        self._session = Session(tiny_graph()[0].SerializeToString(), {}, MANIFEST)
        self.threads: list[str] = []

    def run(self, inputs):
        self.threads.append(threading.current_thread().name)
        return self._session.run(inputs)


@pytest.fixture
def watched():
    return Watched()


@pytest.fixture
def loaded(watched):
    session: Any = watched
    return LoadedModel(session, MANIFEST, "d" * 64, "s" * 64)


@pytest.fixture
def runner():
    runner = Runner(2)
    yield runner
    runner.close()


async def test_a_quick_model_runs_in_the_loop(loaded, runner, watched, monkeypatch):
    """A model that is quick never pays for a thread."""
    monkeypatch.setattr(running, "SLOW_RUN_NS", 10**12)
    for _ in range(3):
        assert (await runner.run(loaded, INPUT))["y"].shape == (1, 10)
    assert set(watched.threads) == {threading.current_thread().name}


async def test_a_slow_model_runs_in_a_thread_from_its_second_run_on(loaded, runner, watched, monkeypatch):
    """One slow run teaches; from then on the loop is free while the model runs."""
    monkeypatch.setattr(running, "SLOW_RUN_NS", -1)
    first = await runner.run(loaded, INPUT)
    rest = await asyncio.gather(*(runner.run(loaded, INPUT) for _ in range(3)))
    assert watched.threads[0] == threading.current_thread().name
    assert all(name.startswith("infer") for name in watched.threads[1:])
    for answer in rest:
        np.testing.assert_array_equal(answer["y"], first["y"])


async def test_what_is_remembered_is_bounded(loaded, runner, watched, monkeypatch):
    """Digests of slow models are forgotten, the oldest first, so that updates don't fill the memory."""
    monkeypatch.setattr(running, "SLOW_RUN_NS", -1)
    monkeypatch.setattr(running, "MEMORY", 1)
    await runner.run(loaded, INPUT)
    await runner.run(LoadedModel(loaded.session, MANIFEST, "e" * 64, "s" * 64), INPUT)
    watched.threads.clear()
    await runner.run(loaded, INPUT)
    assert watched.threads == [threading.current_thread().name]


async def test_a_refusal_comes_through_a_thread(loaded, runner, monkeypatch):
    """What the session refuses is the caller's error, wherever it ran."""
    monkeypatch.setattr(running, "SLOW_RUN_NS", -1)
    await runner.run(loaded, INPUT)
    with pytest.raises(PeerError) as refused:
        await runner.run(loaded, {"x": np.zeros((1, 63), np.float32)})
    assert refused.value.reason == "shape"
