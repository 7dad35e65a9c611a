"""The audit log as the agent uses it: append from the event loop, group commit on one thread of its own.

Rules:

1. ``strict``: the future of an append is done when the record is durable. A commit starts at once when the thread is idle;
   everything that comes meanwhile goes into the next one. What can't be written fails with AuditError, so that whoever waits
   refuses the request.
2. ``buffered``: nothing waits. Records reach the kernel within :data:`WRITE_INTERVAL_S` and the disk within
   :data:`SYNC_INTERVAL_S` more: that is what the death of the process or of the machine may cost. What could not be written is
   counted, and a record names the number as soon as one can be written.
3. ``head()`` is the tree of what is durable, never of what is hoped for. It is what a checkpoint will sign.
4. The queue is bounded; a disk that does not keep up counts as one that can't be written.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent.audit.committer import Appended, Committer, Report, Waiting
from agent.audit.journal import Journal, Space
from agent.audit.record import MAX_NODE_CHARACTERS, decode_event, encode_event
from agent.errors import AuditError, ConfigError
from agent.records import AuditEvent

__all__ = ["SYNC_INTERVAL_S", "WRITE_INTERVAL_S", "Appended", "AuditLog", "Durability", "Space", "TreeHead"]

Durability = Literal["strict", "buffered"]

SYNC_INTERVAL_S = 1.0  # default loss window of buffered mode when the machine dies
WRITE_INTERVAL_S = 0.01  # and when only the process dies
MAX_QUEUED_RECORDS = 65_536
MAX_QUEUED_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TreeHead:
    """The tree over all durable records: what Evidence claims and a checkpoint signs."""

    size: int
    root: bytes


def _unwritten(reason: str | None) -> AuditError:
    return AuditError(f"audit: the record can't be made durable: {reason}")


class AuditLog:
    """The node's audit log. Made by :meth:`open`, within a running event loop; ended by :meth:`close`.

    Attributes:
        failure: why nothing can be written now; None when it can.
    """

    def __init__(self, journal: Journal, durability: Durability, sync_interval_s: float) -> None:
        self.failure = journal.failure
        self._journal = journal
        self._strict = durability == "strict"
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._queued_bytes = 0
        self._wake_scheduled = False
        self._closed = False
        self._committer = Committer(
            journal,
            strict=self._strict,
            sync_interval_us=int(sync_interval_s * 1_000_000),
            on_report=self._settle,
            on_end=self._end,
        )

    @classmethod
    async def open(
        cls,
        directory: Path,
        node: str,
        *,
        durability: Durability = "strict",
        space: Space | None = None,
        sync_interval_s: float = SYNC_INTERVAL_S,
    ) -> AuditLog:
        """Open or create the log, recover it and start its thread.

        Raises:
            AuditError: another process writes it, it can't be read or written, or it is damaged.
            ConfigError: the node's name is empty or too long.
        """
        if not 0 < len(node) <= MAX_NODE_CHARACTERS:
            raise ConfigError(f"audit: the node's name must have 1 to {MAX_NODE_CHARACTERS} characters")
        strict = durability == "strict"
        journal = await asyncio.to_thread(Journal.open, directory, node, space or Space(), strict=strict)
        return cls(journal, durability, sync_interval_s)

    def append(self, event: AuditEvent) -> Appended:
        """Append an event of this process; see :meth:`append_encoded`."""
        return self.append_encoded(encode_event(event))

    def append_encoded(self, data: bytes) -> Appended:
        """Append an event that came as JSON from another process.

        Returns:
            In strict mode a future for the sequence number, done when the record is durable; it fails with AuditError when the
            record can't be written. In buffered mode one that is done already, with None: there is no number yet.

        Raises:
            AuditError: the event is not one, the log is closed, or (strict mode) nothing can be written now.
        """
        return self.append_decoded(decode_event(data), len(data))

    def append_decoded(self, event: AuditEvent, size: int) -> Appended:
        """Append what :func:`agent.audit.record.decode_event` returned for so many bytes; else as :meth:`append_encoded`."""
        if self._closed:
            raise AuditError("audit: the log is closed")
        refusal = self.failure
        if len(self._committer.queue) >= MAX_QUEUED_RECORDS or self._queued_bytes >= MAX_QUEUED_BYTES:
            refusal = "the disk does not keep up"
        if refusal is not None and self._strict:
            raise _unwritten(refusal)
        done: Appended = self._loop.create_future()
        if not self._strict:
            done.set_result(None)
        if refusal is None:
            self._queued_bytes += size
            self._committer.queue.append(Waiting(event, done if self._strict else None, size))
            self._schedule_wake()
        else:
            self._committer.dropped += 1
        return done

    async def flush(self) -> TreeHead:
        """Wait until everything appended so far is durable, in either mode.

        Raises:
            AuditError: it can't be made durable.
        """
        if self._closed:
            raise AuditError("audit: the log is closed")
        done: asyncio.Future[None] = self._loop.create_future()
        self._committer.flushes.append(done)
        self._committer.wake()
        await done
        return self.head()

    def head(self) -> TreeHead:
        """Return size and root of the durable tree, as one."""
        tree = self._journal.durable
        return TreeHead(tree.size, tree.root())

    def size(self) -> int:
        """Return the number of durable records."""
        return self._journal.durable.size

    def root(self) -> bytes:
        """Return the root over the durable records (32 bytes)."""
        return self._journal.durable.root()

    @property
    def durable(self) -> bool:
        """The health fact: records can be made durable now. When not, ``failure`` says why."""
        return self.failure is None and not self._closed

    async def run(self) -> None:
        """Wait until the log is closed; raise when its thread dies, so that a task group stops the process."""
        await asyncio.shield(self._ended)

    async def close(self) -> None:
        """Write and sync what is queued, end the thread and let the next writer in."""
        if not self._closed:
            self._closed = True
            self._committer.stop()
        await asyncio.shield(self._ended)

    def _schedule_wake(self) -> None:
        if self._wake_scheduled:
            return
        self._wake_scheduled = True
        if self._strict:
            self._loop.call_soon(self._wake)  # what this turn of the loop still appends goes along
        else:
            self._loop.call_later(WRITE_INTERVAL_S, self._wake)

    def _wake(self) -> None:
        self._wake_scheduled = False
        self._committer.wake()

    def _settle(self, report: Report) -> None:
        """Tell who waits what became of one commit."""
        self.failure = report.failure
        written = len(report.sequences)
        for waiting, seq in zip(report.batch, report.sequences, strict=False):
            if waiting.done is not None and not waiting.done.done():
                waiting.done.set_result(seq)
        for waiting in report.batch[written:]:
            if waiting.done is not None and not waiting.done.done():
                waiting.done.set_exception(_unwritten(report.failure))
        self._queued_bytes -= sum(waiting.size for waiting in report.batch)
        for flush in report.flushes:
            if flush.done():
                continue
            if report.failure is None:
                flush.set_result(None)
            else:
                flush.set_exception(_unwritten(report.failure))

    def _end(self, error: BaseException | None) -> None:
        self._closed = True
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)
