"""Where a model runs: in the event loop when it is quick, in a thread when it would hold up everyone else.

A tiny model takes some 13 microseconds in the loop and ten times that through a thread; a large one would stop every other connection.
The last run decides about the next: a slow run or two in the loop are the price of learning it. What counts is the CPU time of the thread that
ran it: the time that a busy machine made it wait says nothing about the model. It is asked of the kernel only where a run took long by
the clock, which costs nothing.
"""

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from agent.inference.registry import LoadedModel
from agent.inference.tensors import Tensor

__all__ = ["Runner"]

SLOW_RUN_NS = 2_000_000
MEMORY = 4096  # package digests remembered


class Runner:
    """Runs sessions.

    Args:
        threads: how many slow runs go on at a time.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="infer")
        self._slow: dict[str, None] = {}
        self._suspects: dict[str, None] = {}

    def run_here(self, loaded: LoadedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Run a model in the loop; None for one that belongs into a thread or is looked at: :meth:`run` does that.

        Raises what :meth:`agent.inference.session.Session.run` raises.
        """
        model = loaded.sha256
        if model in self._slow or model in self._suspects:
            return None
        began_ns = time.perf_counter_ns()
        outputs = loaded.session.run(inputs)
        if time.perf_counter_ns() - began_ns > SLOW_RUN_NS:
            _note(self._suspects, model)
        return outputs

    async def run(self, loaded: LoadedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a model that was slow, and see whether it still is; raises as :meth:`run_here`."""
        model = loaded.sha256
        if model in self._suspects:
            del self._suspects[model]
            outputs, spent_ns = _timed(loaded, inputs)
        else:
            outputs, spent_ns = await asyncio.get_running_loop().run_in_executor(self._pool, _timed, loaded, inputs)
        if spent_ns <= SLOW_RUN_NS:
            self._slow.pop(model, None)
        else:
            _note(self._slow, model)
        return outputs

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _note(known: dict[str, None], model: str) -> None:
    known[model] = None
    if len(known) > MEMORY:
        del known[next(iter(known))]


def _timed(loaded: LoadedModel, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    began_ns = time.thread_time_ns()
    return loaded.session.run(inputs), time.thread_time_ns() - began_ns
