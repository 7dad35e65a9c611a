"""The thread that writes the log: takes what is queued, commits it, syncs when it is due, reports to the event loop.

Rules:

1. The queue and the list of waiting flushes have one producer, the event loop, and one consumer, this thread; a report goes
   back through ``call_soon_threadsafe`` and is the only thing that touches a future.
2. After a failure nothing is written until :meth:`Journal.resume` works, tried every :data:`RETRY_INTERVAL_S`.
3. Records that buffered mode could not write are counted; the count is written as soon as records are.
4. An error that is not foreseen here ends the thread and reaches the loop with everything that still waits.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeAlias

from agent.audit.journal import Journal
from agent.audit.record import DROPPED, own_event
from agent.clock import monotonic_us
from agent.records import AuditEvent

__all__ = ["Appended", "Committer", "Flush", "Report", "Waiting"]

RETRY_INTERVAL_S = 1.0  # between attempts to write again after a failure

Appended: TypeAlias = "asyncio.Future[int | None]"
Flush: TypeAlias = "asyncio.Future[None]"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued event; ``done`` is None when nobody waits; ``size`` is what the queue counts it for, in bytes."""

    event: AuditEvent
    done: Appended | None
    size: int


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one turn: the first ``len(sequences)`` of the batch were written; ``failure`` says why not the rest."""

    batch: Sequence[Waiting]
    sequences: Sequence[int]
    flushes: Sequence[Flush]
    failure: str | None


class Committer:
    """Runs a journal on a thread of its own.

    Args:
        journal: owned from now on; closed when the thread ends.
        strict: every commit is durable; else a sync follows within ``sync_interval_us`` of the first unsynced record.
        on_report: called in the loop after each turn that did something.
        on_end: called in the loop once, last of all; with the error when it was not :meth:`stop` that ended the thread.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        strict: bool,
        sync_interval_us: int,
        on_report: Callable[[Report], None],
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        self.queue: deque[Waiting] = deque()
        self.flushes: deque[Flush] = deque()
        self.dropped = 0  # counted by the loop: events that it did not queue
        self._journal = journal
        self._strict = strict
        self._sync_interval_us = sync_interval_us
        self._on_report = on_report
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._wake: SimpleQueue[bool] = SimpleQueue()  # False ends the thread
        self._dropped_here = 0
        self._dropped_told = 0
        self._sync_due_us: int | None = None
        self._retry_due_us = 0
        self._taken: tuple[Sequence[Waiting], Sequence[Flush]] = ((), ())
        threading.Thread(target=self._main, name="audit", daemon=True).start()

    def wake(self) -> None:
        """Make the thread look at the queue."""
        self._wake.put(True)

    def stop(self) -> None:
        """Make the thread write what is queued, close the journal and end."""
        self._wake.put(False)

    def _main(self) -> None:
        error: BaseException | None = None
        try:
            going = True
            while going:
                going = self._wait()
                self._turn(last=not going)
        except BaseException as caught:  # noqa: BLE001 -- not swallowed: on_end hands it to the loop
            error = caught
        finally:
            self._journal.close()
            self._loop.call_soon_threadsafe(self._end, error)

    def _end(self, error: BaseException | None) -> None:
        """In the loop: settle whoever still waits, and say that it is over."""
        batch, flushes = self._taken
        left = Report([*batch, *self.queue], (), [*flushes, *self.flushes], "the log's thread has ended")
        self.queue.clear()
        self.flushes.clear()
        self._on_report(left)
        self._on_end(error)

    def _wait(self) -> bool:
        """Sleep until woken or until a sync or a retry is due; False when it is the end."""
        due = self._sync_due_us
        if self._journal.failure is not None:
            due = self._retry_due_us
        try:
            return self._wake.get(timeout=None if due is None else max(0, due - monotonic_us()) / 1_000_000)
        except Empty:
            return True

    def _turn(self, *, last: bool) -> None:
        """Write what is queued, sync when it is due, report."""
        # 1. Flushes first: what was appended before one of them is in the queue by now.
        flushes = [self.flushes.popleft() for _ in range(len(self.flushes))]
        batch = [self.queue.popleft() for _ in range(len(self.queue))]
        self._taken = (batch, flushes)
        # 2. After a failure, see whether it is over.
        before = self._journal.failure
        if before is not None and monotonic_us() >= self._retry_due_us and not self._journal.resume():
            self._retry_later()
        # 3. Write; in strict mode this syncs.
        sequences = self._journal.commit([waiting.event for waiting in batch])
        if not self._strict:
            self._dropped_here += len(batch) - len(sequences)
            self._tell_dropped()
            self._sync_when_due(at_once=last or bool(flushes))
        # 4. Report.
        failure = self._journal.failure
        if failure is not None and before is None:
            self._retry_later()
        self._taken = ((), ())
        if batch or flushes or failure != before:
            self._loop.call_soon_threadsafe(self._on_report, Report(batch, sequences, flushes, failure))

    def _retry_later(self) -> None:
        self._retry_due_us = monotonic_us() + int(RETRY_INTERVAL_S * 1_000_000)

    def _tell_dropped(self) -> None:
        dropped = self.dropped + self._dropped_here + self._journal.lost
        if dropped > self._dropped_told and self._journal.commit(
            [own_event(DROPPED, count=dropped - self._dropped_told)]
        ):
            self._dropped_told = dropped

    def _sync_when_due(self, *, at_once: bool) -> None:
        if not self._journal.unsynced:
            self._sync_due_us = None
        elif self._sync_due_us is None and not at_once:
            self._sync_due_us = monotonic_us() + self._sync_interval_us
        elif at_once or (self._sync_due_us is not None and monotonic_us() >= self._sync_due_us):
            self._journal.sync_or_fail()
            self._sync_due_us = None
