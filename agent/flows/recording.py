"""The gateway's side of the audit log: events go to the agent, which settles them in the order of their numbers.

Rules:

1. In ``strict`` mode an answer waits for its record, which is sent in the same turn of the loop; a record that fails, or a channel that
   closes, refuses the answer.
2. In ``buffered`` mode nothing waits, and events are sent together every :data:`COLLECT_S`: to wake the agent is what costs. That is what
   the death of the gateway may lose. Once a record has failed, answers are refused until one succeeds again. An event may come as a
   function that makes it: then it is made when it is sent, many in a row, which costs less than each between two other things.
3. A success settles every event up to its number that had not failed before; a failure settles its own event.
4. At most :data:`MAX_OUTSTANDING` records wait for their acknowledgement; past that, requests are refused.
"""

import asyncio
from collections.abc import Callable

from agent.errors import AuditError, IsolationError
from agent.messages import append_frame
from agent.records import AuditEvent

__all__ = ["COLLECT_S", "MAX_OUTSTANDING", "AuditClient"]

COLLECT_S = 0.01
MAX_COLLECTED = 256  # events that go at once
MAX_OUTSTANDING = 8192


class AuditClient:
    """Records events through the agent. Made and used within a running event loop.

    Args:
        send: queues a frame to the agent.
        strict: whether answers wait.
    """

    def __init__(self, send: Callable[[bytes], None], *, strict: bool) -> None:
        self._send = send
        self._strict = strict
        self._number = 0
        self._waiting: dict[int, asyncio.Future[None] | None] = {}  # by number, in their order
        self._collected: list[tuple[int, AuditEvent | Callable[[], AuditEvent]]] = []
        self._failure = ""

    def append(self, event: AuditEvent | Callable[[], AuditEvent]) -> asyncio.Future[None] | None:
        """Send an event; in strict mode the future is done when it is durable, in buffered mode there is none to wait for.

        Raises:
            AuditError: the record can't be kept.
        """
        if len(self._waiting) >= MAX_OUTSTANDING:
            raise AuditError(f"{MAX_OUTSTANDING} records wait for the audit log")
        self._number += 1
        if self._strict:
            return self._append_now(append_frame(self._number, event if isinstance(event, AuditEvent) else event()))
        self._waiting[self._number] = None
        self._collected.append((self._number, event))
        if len(self._collected) == 1:
            asyncio.get_running_loop().call_later(COLLECT_S, self.flush)
        elif len(self._collected) == MAX_COLLECTED:
            self.flush()
        if self._failure:
            raise AuditError(self._failure)
        return None

    def _append_now(self, frame: bytes) -> asyncio.Future[None]:
        try:
            self._send(frame)
        except IsolationError as error:
            raise _unreachable(error) from error
        future = self._waiting[self._number] = asyncio.get_running_loop().create_future()
        return future

    def flush(self) -> None:
        """Send what is collected."""
        collected, self._collected = self._collected, []
        try:
            for number, event in collected:
                self._send(append_frame(number, event if isinstance(event, AuditEvent) else event()))
        except IsolationError as error:
            self._failure = str(_unreachable(error))

    def acknowledged(self, number: int, error: str) -> None:
        """Take the agent's word on one record, or on all up to one."""
        self._failure = error
        if error:
            future = self._waiting.pop(number, None)
            if future is not None and not future.done():
                future.set_exception(AuditError(error))
            return
        while self._waiting and (first := next(iter(self._waiting))) <= number:
            future = self._waiting.pop(first)
            if future is not None and not future.done():
                future.set_result(None)

    def close(self) -> None:
        """Refuse whatever still waits: the agent is gone."""
        for future in self._waiting.values():
            if future is not None and not future.done():
                future.set_exception(AuditError("the agent is gone"))
        self._waiting.clear()


def _unreachable(error: IsolationError) -> AuditError:
    return AuditError(f"the audit log is out of reach: {error}")
