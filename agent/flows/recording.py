"""The gateway's side of the audit log: events go to the agent, acknowledgements come back in order of their numbers.

Rules:

1. In ``strict`` mode an answer waits for its record; a record that fails, or a channel that closes, refuses the answer.
2. In ``buffered`` mode nothing waits; once a record has failed, answers are refused until one succeeds again.
3. At most :data:`MAX_OUTSTANDING` records wait for their acknowledgement; past that, requests are refused.
"""

import asyncio
from collections.abc import Callable

from agent.errors import AuditError, IsolationError
from agent.messages import append_frame
from agent.records import AuditEvent

__all__ = ["MAX_OUTSTANDING", "AuditClient"]

MAX_OUTSTANDING = 8192


class AuditClient:
    """Records events through the agent.

    Args:
        send: queues a frame to the agent.
        strict: whether answers wait.
    """

    def __init__(self, send: Callable[[bytes], None], *, strict: bool) -> None:
        self._send = send
        self._strict = strict
        self._number = 0
        self._waiting: dict[int, asyncio.Future[None] | None] = {}
        self._failure = ""

    def append(self, event: AuditEvent) -> asyncio.Future[None] | None:
        """Send an event; in strict mode the future is done when it is durable, in buffered mode there is none to wait for.

        Raises:
            AuditError: the record can't be kept.
        """
        if len(self._waiting) >= MAX_OUTSTANDING:
            raise AuditError(f"{MAX_OUTSTANDING} records wait for the audit log")
        self._number += 1
        try:
            self._send(append_frame(self._number, event))
        except IsolationError as error:
            raise AuditError(f"the audit log is out of reach: {error}") from error
        future = asyncio.get_running_loop().create_future() if self._strict else None
        self._waiting[self._number] = future
        if not self._strict and self._failure:
            raise AuditError(self._failure)
        return future

    def acknowledged(self, number: int, error: str) -> None:
        """Take the agent's word on one record."""
        self._failure = error
        future = self._waiting.pop(number, None)
        if future is not None and not future.done():
            if error:
                future.set_exception(AuditError(error))
            else:
                future.set_result(None)

    def close(self) -> None:
        """Refuse whatever still waits: the agent is gone."""
        for future in self._waiting.values():
            if future is not None and not future.done():
                future.set_exception(AuditError("the agent is gone"))
        self._waiting.clear()
