"""The TPM off the event loop: one thread, calls in their order, each with an end.

Rules:

1. Everything runs on one thread, off the event loop, in the order of the calls. A call that does not end in time fails, and so do all
   that wait behind it and all that come before the next attempt: fail closed. The stuck thread is left behind with its connection; a new
   thread with a new connection is tried with a growing delay.
2. A job that was left behind may still take effect: :attr:`TpmThread.outstanding` counts those, and who changes a PCR waits until it is
   zero.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from agent.attest.tpm import Tpm
from agent.errors import TpmError

__all__ = ["CALL_TIMEOUT_S", "CONNECT_TIMEOUT_S", "TpmThread"]

CALL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 30.0  # a discrete TPM may need seconds to make a primary key
FIRST_RETRY_S = 0.5
MAX_RETRY_S = 30.0
_T = TypeVar("_T")


class _Worker:
    """A thread with a connection of its own, made by its first job. Daemonic: a stuck driver must not hold the process."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connect: Callable[[], Tpm]) -> None:
        self._loop = loop
        self._connect = connect
        self._jobs: queue.SimpleQueue[tuple[Callable[[Tpm], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._tpm: Tpm | None = None
        self._thread = threading.Thread(target=self._serve, name="tpm", daemon=True)
        self.connected = False
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Callable[[Tpm], _T]) -> asyncio.Future[_T]:
        future: asyncio.Future[_T] = self._loop.create_future()
        self._jobs.put((job, future))
        return future

    def stop(self) -> None:
        """Let the thread end, and its connection with it, once the job that it is in has ended."""
        self._jobs.put(None)

    def join(self, timeout_s: float | None) -> None:
        self._thread.join(timeout_s)

    def _serve(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            result, failure = None, None
            try:
                if self._tpm is None:
                    self._tpm = self._connect()
                result = job(self._tpm)
            except Exception as error:  # noqa: BLE001 -- carried to the loop's thread and raised where the call is awaited
                failure = error
            self.connected = self._tpm is not None and not self._tpm.broken
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_settle, future, result, failure)
        if self._tpm is not None:
            with contextlib.suppress(TpmError):  # the connection ends, and what it held ends with it
                self._tpm.close()


def _settle(future: asyncio.Future[Any], result: object, failure: Exception | None) -> None:
    if future.done():  # its caller ran out of time or was cancelled
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)


class TpmThread:
    """A TPM for an event loop. Make it inside the running loop.

    Args:
        tcti: as for :class:`Tpm`.
        enrolled_ak: as for :class:`Tpm`.
        call_timeout_s: longest time for one call.
        connect_timeout_s: the same for a call that must connect first.
        first_retry_s: how long calls fail at once after a failure; doubles with each, up to :data:`MAX_RETRY_S`.
    """

    def __init__(
        self,
        tcti: str,
        enrolled_ak: bytes | None = None,
        *,
        call_timeout_s: float = CALL_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        first_retry_s: float = FIRST_RETRY_S,
    ) -> None:
        self._connect = lambda: Tpm(tcti, enrolled_ak)
        self._call_timeout_s = call_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._first_retry_s = first_retry_s
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._worker: _Worker | None = None
        self._left_behind: list[_Worker] = []
        self._failures = 0
        self._failure = TpmError("TPM: not connected")
        self._next_attempt = 0.0

    @property
    def outstanding(self) -> int:
        """How many jobs that ran out of time may still take effect."""
        self._left_behind = [worker for worker in self._left_behind if worker.alive]
        return len(self._left_behind)

    @property
    def answering(self) -> bool:
        """Whether the last call was answered, if only by a refusal."""
        return self._failures == 0

    async def call(self, job: Callable[[Tpm], _T], *, timeout_s: float = 0.0) -> _T:
        """Run a job on the TPM's thread, after those that were called before.

        Args:
            job: what to do with the TPM.
            timeout_s: for a job that may take longer than a call usually does, such as the making of an RSA key.

        Raises:
            TpmError: the TPM refused, did not answer in time, can't be reached, or waits for its next attempt.
        """
        async with self._turn:
            worker, limit_s = self._begin()
            try:
                async with asyncio.timeout(max(limit_s, timeout_s)):
                    result = await worker.submit(job)
            except TimeoutError:
                raise self._fail(worker, TpmError(f"TPM: no answer within {max(limit_s, timeout_s)} s")) from None
            except TpmError as error:
                if worker.connected:
                    self._failures = 0
                    raise
                raise self._fail(worker, error) from error
            self._failures = 0
            return result

    def _begin(self) -> tuple[_Worker, float]:
        if self._worker is not None:
            return self._worker, self._call_timeout_s
        wait_s = self._next_attempt - self._loop.time()
        if wait_s > 0:
            raise type(self._failure)(f"{self._failure}; calls fail at once until the next attempt")
        self._worker = _Worker(self._loop, self._connect)
        return self._worker, self._connect_timeout_s

    def _fail(self, worker: _Worker, failure: TpmError) -> TpmError:
        worker.stop()
        self._left_behind.append(worker)
        self._worker = None
        self._next_attempt = self._loop.time() + min(self._first_retry_s * 2**self._failures, MAX_RETRY_S)
        self._failures += 1
        self._failure = failure
        return failure

    async def close(self) -> None:
        """End the connection, or leave a stuck one behind after :data:`CALL_TIMEOUT_S` or what was given for it."""
        async with self._turn:
            if self._worker is not None:
                worker = self._worker
                self._fail(worker, TpmError("TPM: closed"))
                self._next_attempt = math.inf
                await asyncio.to_thread(worker.join, self._call_timeout_s)
