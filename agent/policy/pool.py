"""The agent's side of policy: which bundle is in force, and who gets which workers.

Rules:

1. A bundle takes effect only after a trial: loaded in a process of its own, every package evaluated, and every sample
   decided within the deadline by a worker of it. Until then, and when it fails, the policy in force goes on untouched.
2. ``before_use`` (the measurement) runs between the trial and the first real question; if it raises, nothing changes.
3. Each asker has a worker in use and a warm spare of its own; an asker can have only its own workers killed.
4. A worker that died is replaced, with backoff; so is a template.
5. After an activation a worker of the old policy lives until its asker has let go of it, at most :data:`DRAIN_S`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from agent.errors import EdgeWardenError, PolicyError
from agent.isolation.sandbox import Limits
from agent.isolation.supervisor import Backoff, Zygote
from agent.policy.client import DEADLINE_S, TOTAL_DEADLINE_S, PolicyClient
from agent.policy.generation import LIMITS, PRELOAD, Generation, Worker
from agent.policy.messages import Endpoint
from agent.policy.opa_server import OpaProgram
from agent.policy.samples import SAMPLES

__all__ = ["DRAIN_S", "LOAD_TIMEOUT_S", "PRELOAD", "WORKERS_PER_ASKER", "Activation", "PolicyPool", "Subscription"]

LOAD_TIMEOUT_S = 15.0
DRAIN_S = 2.0
WORKERS_PER_ASKER = 2  # one in use, one warm spare
_HAND_OVER_S = 5.0
_TRIAL_ATTEMPTS = 2  # a loaded machine may stall one evaluation for longer than the deadline
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Activation:
    """A policy that is, or is about to be, in force."""

    revision: str
    sha256: str


class Subscription:
    """One asker's workers. Get one by :meth:`PolicyPool.subscribe`."""

    def __init__(self, asker: Callable[[Endpoint], None]) -> None:
        self._asker = asker
        self._workers: dict[int, tuple[Generation, Worker]] = {}
        self._served: dict[Generation, asyncio.Event] = {}
        self.closed = False

    @property
    def workers(self) -> int:
        """How many workers it has, those of a policy that is on its way out included."""
        return len(self._workers)

    def overrun(self, number: int) -> None:
        """Kill the asker's worker of this number; any other number is ignored."""
        if number in self._workers:
            _, worker = self._workers[number]
            _log.warning("policy_worker_overrun", worker=number, pid=worker.process.pid)
            worker.process.kill()

    def close(self) -> None:
        """End the asker's workers; it gets no more."""
        self.closed = True
        for _, worker in self._workers.values():
            worker.process.kill()

    async def served(self, generation: Generation) -> None:
        """Wait until the asker has a worker of this policy."""
        await self._served.setdefault(generation, asyncio.Event()).wait()

    async def hold(self, generation: Generation, worker: Worker) -> None:
        """Hand a worker to the asker and wait for the worker's end."""
        number = worker.endpoint.number
        self._workers[number] = (generation, worker)
        self._asker(worker.endpoint)
        self._served.setdefault(generation, asyncio.Event()).set()
        status = await worker.process.wait()
        del self._workers[number]
        _log.info("policy_worker_ended", worker=number, pid=worker.process.pid, status=str(status))

    def retire(self, generation: Generation) -> None:
        """Kill what is left of a policy's workers."""
        self._served.pop(generation, None)
        for source, worker in self._workers.values():
            if source is generation:
                worker.process.kill()


class PolicyPool:
    """Keeps a policy in force. Needs a running event loop; :meth:`run` belongs into the agent's task group.

    Args:
        zygote: started with :data:`PRELOAD` among its modules.
        trusted_keys: EC P-256 public keys, PEM; with any given only signed bundles are taken.
        limits: of a template and, together with it, of its workers.
        deadline_s: longest time of one evaluation in the trial.
        total_deadline_s: longest time of one answer in the trial.
        load_timeout_s: longest time to load a bundle.
        samples: input documents by name that a policy must decide.
        opa: run this OPA server instead of the embedded engine.
    """

    def __init__(
        self,
        zygote: Zygote,
        *,
        trusted_keys: Sequence[bytes] = (),
        limits: Limits = LIMITS,
        deadline_s: float = DEADLINE_S,
        total_deadline_s: float = TOTAL_DEADLINE_S,
        load_timeout_s: float = LOAD_TIMEOUT_S,
        samples: Mapping[str, Mapping[str, Any]] = SAMPLES,
        opa: OpaProgram | None = None,
    ) -> None:
        self._zygote = zygote
        self._trusted_keys = tuple(trusted_keys)
        self._limits = limits
        self._deadlines = (deadline_s, total_deadline_s)
        self._load_timeout_s = load_timeout_s
        self._samples = samples
        self._opa = opa
        self._generation: Generation | None = None
        self._subscriptions: list[Subscription] = []
        self._activating = asyncio.Lock()
        self._backoff = Backoff()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def active(self) -> Activation | None:
        """The policy in force; None before the first activation."""
        generation = self._generation
        return None if generation is None else Activation(generation.revision, generation.sha256)

    @property
    def crash_loop(self) -> bool:
        """Whether workers die one after the other."""
        return self._backoff.crash_loop(time.monotonic())

    async def run(self) -> None:
        """Wait until the pool is closed; raise what a task of it fails with: a programming error ends the agent."""
        await asyncio.shield(self._failed)

    async def start(
        self, bundle: bytes, before_use: Callable[[Activation], Awaitable[None]] | None = None
    ) -> Activation:
        """Put the first policy in force; as :meth:`activate`."""
        return await self.activate(bundle, before_use)

    async def activate(
        self, bundle: bytes, before_use: Callable[[Activation], Awaitable[None]] | None = None
    ) -> Activation:
        """Put a policy in force, or leave everything as it is.

        Args:
            bundle: the ``.tar.gz``.
            before_use: awaited after the trial, before any asker gets a worker of this policy.

        Raises:
            PolicyError: the policy is refused; the text says why.
            VerificationError: the bundle is malformed, or not signed by a trusted key.
            IsolationError: no process can be had.
        """
        async with self._activating:
            generation = await Generation.load(
                self._zygote,
                bundle,
                trusted_keys=self._trusted_keys,
                limits=self._limits,
                load_timeout_s=self._load_timeout_s,
                opa=self._opa,
            )
            try:
                await self._try_out(generation)
                activation = Activation(generation.revision, generation.sha256)
                if before_use is not None and self.active != activation:
                    await before_use(activation)
            except BaseException:
                generation.close()
                raise
            if self._generation is not None and self._generation.sha256 == generation.sha256:
                generation.close()  # the same bytes are in force already
                return activation
            await self._swap(generation)
            _log.info("policy_activated", revision=activation.revision, sha256=activation.sha256)
            return activation

    def subscribe(self, asker: Callable[[Endpoint], None]) -> Subscription:
        """Give an asker workers from now on, and new ones after each activation and each death.

        Args:
            asker: called with each endpoint, which it owns.
        """
        subscription = Subscription(asker)
        self._subscriptions.append(subscription)
        if self._generation is not None:
            self._serve(subscription, self._generation)
        return subscription

    async def close(self) -> None:
        """End all workers and the template."""
        generation, self._generation = self._generation, None
        for subscription in self._subscriptions:
            subscription.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if generation is not None:
            generation.close()
        if not self._failed.done():
            self._failed.set_result(None)

    async def _try_out(self, generation: Generation) -> None:
        failure = ""
        for _ in range(_TRIAL_ATTEMPTS):
            failure = await self._trial_error(generation)
            if not failure:
                return
        raise PolicyError(f"the trial failed: {failure}")

    async def _trial_error(self, generation: Generation) -> str:
        """Decide every sample by a worker of its own; return what went wrong."""
        worker = await generation.fork()
        deadline_s, total_s = self._deadlines
        client = PolicyClient(lambda _: worker.process.kill(), deadline_s=deadline_s, total_deadline_s=total_s)
        try:
            client.attach(worker.endpoint)
            for name, document in self._samples.items():
                answer = await client.decide(document)
                if answer.error is not None:
                    return f"sample {name!r}: {answer.error}"
        finally:
            client.close()
            worker.process.kill()
            await worker.process.wait()
        return ""

    async def _swap(self, generation: Generation) -> None:
        old, self._generation = self._generation, generation
        live = [subscription for subscription in self._subscriptions if not subscription.closed]
        self._subscriptions = live
        for subscription in live:
            self._serve(subscription, generation)
        try:
            async with asyncio.timeout(_HAND_OVER_S):
                for subscription in live:
                    await subscription.served(generation)
        except TimeoutError:
            _log.error("policy_hand_over_slow", sha256=generation.sha256, limit_s=_HAND_OVER_S)
        if old is not None:
            self._spawn(self._retire(old, live))

    async def _retire(self, old: Generation, subscriptions: Sequence[Subscription]) -> None:
        try:
            await asyncio.sleep(DRAIN_S)
        finally:
            for subscription in subscriptions:
                subscription.retire(old)
            old.close()

    def _serve(self, subscription: Subscription, generation: Generation) -> None:
        for _ in range(WORKERS_PER_ASKER):
            self._spawn(self._keep(subscription, generation))

    async def _keep(self, subscription: Subscription, generation: Generation) -> None:
        """Keep one worker for an asker, as long as this policy is in force."""
        backoff = Backoff()
        while self._generation is generation and not subscription.closed:
            began = time.monotonic()
            try:
                worker = await generation.fork()
                if self._generation is not generation or subscription.closed:
                    worker.endpoint.close()
                    worker.process.kill()
                    return
                await subscription.hold(generation, worker)
            except EdgeWardenError as error:
                _log.error("policy_worker_failed", error=str(error))
            if self._generation is generation and not subscription.closed:
                now = time.monotonic()
                self._backoff.died(now, now - began)
                await asyncio.sleep(backoff.died(now, now - began))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)
